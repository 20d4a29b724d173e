//! Attention: which kernel takes a shape, how it is specialised, its plan and its workspace.

use super::driver::{Memory, Stream, lock};
use super::nvrtc::Source;
use super::plan::{self, Plan, Problem};
use super::rows::code_alignment;
use super::tables::{Tables, Turn, row_defines, scale_unit};
use super::{Gpu, Prepared, address, type_number};
use crate::compute::DType;
use crate::error::{Result, to_u32};
use crate::format::{Packing, RowFormat, Scaling};
use crate::problem::op::Attention;
use crate::problem::{Batch, Domain, PagePool};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// Where parts of split outputs meet. It grows when a plan needs more; what graphs may have captured stays.
#[derive(Default)]
pub(super) struct Workspace {
    partial: Option<Arc<Memory>>,
    /// One a part, zero between launches.
    counters: Option<Arc<Memory>>,
    outgrown: Vec<Arc<Memory>>,
}

impl Workspace {
    pub fn bytes(&self) -> usize {
        [&self.partial, &self.counters].into_iter().flatten().chain(&self.outgrown).map(|m| m.bytes).sum()
    }

    fn get(&mut self, stream: &Arc<Stream>, partial: usize, counters: usize) -> Result<[Arc<Memory>; 2]> {
        let Workspace { partial: p, counters: c, outgrown } = self;
        let mut grown = |slot: &mut Option<Arc<Memory>>, bytes: usize| -> Result<Arc<Memory>> {
            if let Some(memory) = slot.as_ref().filter(|m| m.bytes >= bytes) {
                return Ok(memory.clone());
            }
            let memory = Arc::new(stream.alloc(bytes.next_power_of_two())?);
            memory.clear()?;
            outgrown.extend(slot.replace(memory.clone()));
            Ok(memory)
        };
        Ok([grown(p, partial)?, grown(c, counters)?])
    }
}

/// Precision follows the queries' type: f16 and bf16 are answered by tensor cores, in f16 products and f32 sums; f32 by plain
/// cores in f32, which is slower. So are shapes that the tensor-core kernel does not take.
pub(super) fn attention(gpu: &Gpu, op: &Attention) -> Result<Prepared> {
    let limit = gpu.stream.context.limits.shared_memory as usize;
    match Shape::of(op, gpu.stream.context.limits.multiprocessors as usize)
        .and_then(|shape| Variant::choose(&shape, limit))
    {
        Some(variant) => tensor(gpu, op, &variant),
        None => plain(gpu, op),
    }
}

/// What of a problem decides how the tensor-core kernel is compiled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shape {
    pub key: RowFormat,
    pub value: RowFormat,
    pub page_size: usize,
    /// Query rows of the longest sequence: queries times heads of a KV head.
    pub query_rows: usize,
    pub q: DType,
    pub out: DType,
    /// Whether rows may be copied 16 bytes at a time.
    pub aligned: bool,
    /// Whether there is little for each block to do: finer tiles spread it better over its warps.
    pub short: bool,
}

impl Shape {
    /// Whether the eight columns of the tensor cores can be four pairs.
    fn narrow(&self) -> bool {
        self.query_rows <= 4
    }

    /// `None` for what the kernel does not take.
    fn of(op: &Attention, multiprocessors: usize) -> Option<Self> {
        let queries = op.batch.spans().iter().map(|s| s.new as usize).max()?;
        let buffers = || [&op.key, &op.value].into_iter().flat_map(PagePool::buffers);
        if op.q.dtype() == DType::F32 {
            return None;
        }
        let at = |unit: u64| buffers().all(|b| address(b).is_multiple_of(unit));
        // Less than two tiles of 64 positions for each of eight warps.
        let positions: usize = op.batch.spans().iter().map(|s| (s.len - s.first) as usize).sum();
        let short = positions * op.key.kv_heads() < 2 * 64 * 8 * multiprocessors;
        at(2).then(|| Shape {
            key: *op.key.row(),
            value: *op.value.row(),
            page_size: op.key.page_size(),
            query_rows: queries * (op.heads / op.key.kv_heads()),
            q: op.q.dtype(),
            out: op.out.dtype(),
            aligned: at(16),
            short,
        })
    }
}

/// One side of the cache as the kernel's macros tell it.
#[derive(Clone, Copy, PartialEq)]
struct Side {
    bits: usize,
    levels: usize,
    scale: usize,
}

impl Side {
    fn of(row: &RowFormat) -> Option<Self> {
        let bits = match row.packing() {
            Packing::Float(DType::F16) => 16,
            Packing::Float(_) => return None,
            Packing::Dense | Packing::Planes => row.bits(),
            Packing::Byte => 8,
        };
        let scale = if row.scales_per_row() == 0 { 0 } else { 8 * row.scale_dtype().size() };
        Some(Side { bits, levels: row.codebook().map_or(1, |b| b.levels.len()), scale })
    }
}

/// A specialisation of attention.cu.
#[derive(Clone, Debug)]
pub(super) struct Variant {
    defines: Vec<String>,
    pub tiles_n: usize,
    pub tile: usize,
    pub warps: usize,
}

impl Variant {
    /// The largest tiles whose pipelines fit a block of this much shared memory.
    pub fn choose(shape: &Shape, shared_memory: usize) -> Option<Self> {
        let (k, v) = (Side::of(&shape.key)?, Side::of(&shape.value)?);
        let d = shape.key.head_dim();
        let wanted = match shape.query_rows {
            0..=8 => 1,
            9..=16 => 2,
            _ => 4,
        };
        // Registers hold the accumulators of a row tile.
        let tiles_n = [4, 2, 1].into_iter().find(|&n| n <= wanted && n * d <= 576)?;
        let sizes = [(12, 64), (8, 64), (12, 32), (8, 32), (8, 16), (4, 16), (2, 16), (1, 16)];
        // Of rows that are looked up in two tables, 12 x 32 does more at once than 8 x 64.
        let tables = k != v && k.bits != 3;
        let sizes = sizes.into_iter().filter(|&(warps, tile)| {
            (tile <= 32 || (tiles_n == 1 && !shape.short && (shape.narrow() || !tables)))
                && (warps <= 8 || (tiles_n == 1 && d <= 128 && !shape.short))
                && (warps * tile <= 512 || shape.narrow())
        });
        let layouts = sizes.map(|(warps, tile)| Layout { warps, tile, stages: 2 });
        let last = Layout { warps: 1, tile: 16, stages: 1 };
        let layout = layouts.chain([last]).find(|l| l.shared_memory(shape, (k, v), tiles_n) <= shared_memory)?;
        let Layout { warps, tile, stages } = layout;
        let run = match shape.page_size {
            n if shape.aligned && n.is_multiple_of(tile) => tile,
            n if shape.aligned && n.is_multiple_of(16) => 16,
            _ => 1,
        };
        let constant_page = if run == tile && shape.page_size.is_power_of_two() && shape.page_size <= 256 {
            shape.page_size
        } else {
            0
        };
        let defines = [
            ("HEAD_DIM", d),
            ("K_BITS", k.bits),
            ("K_LEVELS", k.levels),
            ("K_SCALE", k.scale),
            ("V_BITS", v.bits),
            ("V_LEVELS", v.levels),
            ("V_SCALE", v.scale),
            ("Q_TYPE", type_number(shape.q) as usize),
            ("OUT_TYPE", type_number(shape.out) as usize),
            ("TILES_N", tiles_n),
            ("WARPS", warps),
            ("TILE", tile),
            ("STAGES", stages),
            ("NARROW", shape.narrow() as usize),
            ("RUN", run),
            ("PAGE_SIZE", constant_page),
        ];
        let defines = defines.iter().map(|(name, value)| format!("-D{name}={value}")).collect();
        Some(Variant { defines, tiles_n, tile, warps })
    }

    pub fn source(&self) -> Source {
        Source {
            name: "attention".to_owned(),
            entry: "attention".to_owned(),
            text: include_str!("kernels/attention.cu").into(),
            options: self.defines.clone(),
            shared_memory: 0,
            shared_memory_symbol: Some("attention_shared_bytes"),
        }
    }
}

/// How a block of the tensor-core kernel divides its shared memory.
#[derive(Clone, Copy)]
struct Layout {
    warps: usize,
    /// Positions that a warp copies at once.
    tile: usize,
    /// Copies in flight and in use.
    stages: usize,
}

impl Layout {
    /// `Layout::BYTES` of attention.cu.
    fn shared_memory(self, shape: &Shape, (k, v): (Side, Side), tiles_n: usize) -> usize {
        let d = shape.key.head_dim();
        let entries = |s: Side| match s.bits {
            3 if d.is_multiple_of(128) => 64,
            2..=4 | 7 | 8 => 256,
            5 => 64,
            6 => 128,
            _ => 0,
        };
        // Keys of 3 bits have no table.
        let integer = k.bits == 3;
        let same = k == v && !integer;
        let tables = 128 * (if integer { 0 } else { entries(k) } + if same { 0 } else { entries(v) });
        let row_bytes = |s: Side, row: &RowFormat| d * s.bits / 8 + row.scales_per_row() * s.scale / 8;
        let stage = (self.tile * (row_bytes(k, &shape.key) + row_bytes(v, &shape.value))).next_multiple_of(128);
        let rows = 8 * tiles_n;
        let steps = if integer { 4 * d.div_ceil(128) } else { d / 16 };
        let fragment = if integer && !shape.narrow() { 16 } else { 8 };
        let queries = tiles_n * steps * 32 * fragment;
        let pipes = self.warps * self.stages * stage;
        let scratch = self.warps * 2048;
        tables + pipes + 2 * rows * (d + 4) * 4 + scratch + queries + (2 * self.warps + 4) * rows * 4 + 16
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct TensorParams {
    k_codes: u64,
    k_scales: u64,
    k_codebook: u64,
    v_codes: u64,
    v_scales: u64,
    v_codebook: u64,
    page_table: u64,
    items: u64,
    q: u64,
    out: u64,
    lse: u64,
    sinks: u64,
    k_signs: u64,
    v_signs: u64,
    partial: u64,
    partial_ml: u64,
    counters: u64,
    kv_heads: u32,
    group: u32,
    page_size: u32,
    table_width: u32,
    causal: u32,
    window: u32,
    rotate_q: u32,
    restore_out: u32,
    q_scale: f32,
    out_scale: f32,
    softcap: f32,
    pad: u32,
}

/// A plan on the device, kept with its batch.
struct DevicePlan {
    problem: Problem,
    plan: Plan,
    items: Arc<Memory>,
}

impl DevicePlan {
    fn get(gpu: &Gpu, batch: &Batch, problem: Problem) -> Result<Arc<DevicePlan>> {
        batch.plans().get(
            |p: &DevicePlan| p.problem == problem,
            || {
                let plan = plan::plan(&problem, batch.spans());
                let items = Arc::new(gpu.stream.upload(bytemuck::cast_slice(&plan.items))?);
                Ok(DevicePlan { problem, plan, items })
            },
        )
    }
}

fn tensor(gpu: &Gpu, op: &Attention, variant: &Variant) -> Result<Prepared> {
    let (key, value) = (op.key.row(), op.value.row());
    let (k_tables, v_tables) = (gpu.tables(key)?, gpu.tables(value)?);
    let (d, kv_heads, group, rows) =
        (key.head_dim(), op.key.kv_heads(), op.heads / op.key.kv_heads(), 8 * variant.tiles_n);
    let problem = Problem {
        kv_heads,
        group,
        rows,
        tile: variant.tile,
        warps: variant.warps,
        blocks: gpu.stream.context.limits.multiprocessors as usize,
        causal: op.params.causal,
        window: op.params.window,
    };
    let planned = DevicePlan::get(gpu, &op.batch, problem)?;
    let parts = planned.plan.parts.max(1);
    let sums = parts * rows * d * 4;
    let [partial, counters] = lock(&gpu.workspace).get(&gpu.stream, sums + parts * rows * 8, parts * 4)?;

    // What every stored scale lacks of its factor.
    let lacking = |row: &RowFormat| match row.scaling() {
        Scaling::None | Scaling::Corrected => 1.0,
        Scaling::Norm => scale_unit(row),
        Scaling::BlockRms => 1.0 / scale_unit(row),
    };
    let original = op.params.domain == Domain::Original;
    let params = TensorParams {
        k_codes: address(op.key.codes()),
        k_scales: op.key.scales().map_or(0, address),
        k_codebook: k_tables.tensor_levels,
        v_codes: address(op.value.codes()),
        v_scales: op.value.scales().map_or(0, address),
        v_codebook: v_tables.tensor_levels,
        page_table: address(op.batch.device_table()),
        items: planned.items.address,
        q: address(&op.q),
        out: address(&op.out),
        lse: op.lse.as_ref().map_or(0, address),
        sinks: op.params.sink_logits.as_ref().map_or(0, address),
        k_signs: k_tables.signs(),
        v_signs: v_tables.signs(),
        partial: partial.address,
        partial_ml: partial.address + sums as u64,
        counters: counters.address,
        kv_heads: kv_heads as u32,
        group: to_u32("heads", group)?,
        page_size: op.key.page_size() as u32,
        table_width: op.batch.width() as u32,
        causal: op.params.causal as u32,
        // A window past 32 bits sees everything.
        window: op.params.window.map_or(0, |w| u32::try_from(w).unwrap_or(0).min(i32::MAX as u32)),
        rotate_q: (original && key.is_rotated()) as u32,
        restore_out: (original && value.is_rotated()) as u32,
        q_scale: op.params.scale * lacking(key) / k_tables.gain,
        out_scale: lacking(value) / v_tables.gain,
        softcap: op.params.softcap.unwrap_or(0.0),
        pad: 0,
    };
    let mut prepared = gpu.prepare(&variant.source(), problem.blocks as u32, &params, buffers(op))?;
    prepared.memory.extend([partial, counters, planned.items.clone()]);
    Ok(prepared)
}

/// All buffers that an attention launch touches.
fn buffers(op: &Attention) -> Vec<crate::compute::Buffer> {
    let mut all = vec![op.q.clone(), op.out.clone(), op.batch.device_spans().clone(), op.batch.device_table().clone()];
    all.extend(op.key.buffers().chain(op.value.buffers()).cloned());
    all.extend(op.lse.iter().chain(&op.params.sink_logits).cloned());
    all
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PlainSide {
    codes: u64,
    scales: u64,
    levels: u64,
    turn: Turn,
    unit: f32,
    pad: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PlainParams {
    sides: [PlainSide; 2],
    q: u64,
    out: u64,
    lse: u64,
    sinks: u64,
    spans: u64,
    table: u64,
    partial: u64,
    partial_ml: u64,
    counters: u64,
    splits: u32,
    pad: u32,
    sequences: u32,
    kv_heads: u32,
    heads: u32,
    page_size: u32,
    width: u32,
    causal: u32,
    window: u32,
    original: u32,
    scale: f32,
    softcap: f32,
}

/// Rows of a block of plain.cu, if so many read one KV head.
pub(super) fn plain_rows(head_dim: usize, wanted: usize) -> usize {
    let most = (2048 / head_dim).clamp(1, 8);
    wanted.next_power_of_two().min(1 << most.ilog2())
}

/// Blocks of plain.cu that a multiprocessor holds at once: registers are the limit.
fn plain_held(head_dim: usize, rows: usize) -> usize {
    if rows <= 4 && head_dim <= 128 { 3 } else { 2 }
}

/// `alignments`: of rows of keys' and values' codes.
pub(super) fn plain_source(
    [key, value]: [&RowFormat; 2],
    alignments: [u64; 2],
    q: DType,
    out: DType,
    rows: usize,
) -> Source {
    let sides = row_defines("K_", key).into_iter().chain(row_defines("V_", value));
    let own = [
        format!("-DHEAD_DIM={}", key.head_dim()),
        format!("-DK_CODE_ALIGN={}", alignments[0]),
        format!("-DV_CODE_ALIGN={}", alignments[1]),
        format!("-DQ_TYPE={}", type_number(q)),
        format!("-DOUT_TYPE={}", type_number(out)),
        format!("-DROWS={rows}"),
        format!("-DHELD={}", plain_held(key.head_dim(), rows)),
        format!("-DPARAMS_BYTES={}", size_of::<PlainParams>()),
    ];
    Source {
        name: "plain".to_owned(),
        entry: "plain".to_owned(),
        text: include_str!("kernels/plain.cu").into(),
        options: sides.chain(own).collect(),
        shared_memory: 0,
        shared_memory_symbol: None,
    }
}

fn plain(gpu: &Gpu, op: &Attention) -> Result<Prepared> {
    let side = |pool: &PagePool, tables: &Tables| PlainSide {
        codes: address(pool.codes()),
        scales: pool.scales().map_or(0, address),
        levels: tables.levels,
        turn: tables.turn,
        unit: scale_unit(pool.row()),
        pad: 0,
    };
    let (key, value) = (gpu.tables(op.key.row())?, gpu.tables(op.value.row())?);
    let (d, kv_heads) = (op.key.row().head_dim(), op.key.kv_heads());
    let query_rows = || op.batch.spans().iter().map(|s| s.new as usize * (op.heads / kv_heads));
    let rows = plain_rows(d, query_rows().max().unwrap_or(1));
    let tiles = kv_heads * query_rows().map(|n| n.div_ceil(rows)).sum::<usize>();
    // As many blocks as run at once, of 128 positions at least.
    let longest = op.batch.spans().iter().map(|s| (s.len - s.first) as usize).max().unwrap_or(0);
    let held = plain_held(d, rows) * gpu.stream.context.limits.multiprocessors as usize;
    let splits = (held / tiles.max(1)).min(longest.div_ceil(128)).max(1);
    let parts = tiles * rows * splits;
    let sums = parts * d * 4;
    let [partial, counters] = lock(&gpu.workspace).get(&gpu.stream, sums + parts * 16, tiles * 4)?;
    let params = PlainParams {
        sides: [side(&op.key, &key), side(&op.value, &value)],
        q: address(&op.q),
        out: address(&op.out),
        lse: op.lse.as_ref().map_or(0, address),
        sinks: op.params.sink_logits.as_ref().map_or(0, address),
        spans: address(op.batch.device_spans()),
        table: address(op.batch.device_table()),
        partial: partial.address,
        partial_ml: partial.address + sums as u64,
        counters: counters.address,
        splits: splits as u32,
        pad: 0,
        sequences: op.batch.sequences() as u32,
        kv_heads: kv_heads as u32,
        heads: to_u32("heads", op.heads)?,
        page_size: op.batch.page_size() as u32,
        width: op.batch.width() as u32,
        causal: op.params.causal as u32,
        window: op.params.window.map_or(0, |w| u32::try_from(w).unwrap_or(0)),
        original: (op.params.domain == Domain::Original) as u32,
        scale: op.params.scale,
        softcap: op.params.softcap.unwrap_or(0.0),
    };
    let blocks = to_u32("query rows", tiles * splits)?;
    let alignments = [code_alignment(&op.key), code_alignment(&op.value)];
    let source = plain_source([op.key.row(), op.value.row()], alignments, op.q.dtype(), op.out.dtype(), rows);
    let mut prepared = gpu.prepare(&source, blocks, &params, buffers(op))?;
    prepared.memory.extend([partial, counters]);
    Ok(prepared)
}
