//! Rotate, quantize, dequantize, merge and custom kernels: what they are compiled from and called with.

use super::codec::row_values;
use super::driver::{Launch, ParamBytes};
use super::gpu::{Gpu, Recording, Work, alignment};
use super::kernel::{KernelKey, KernelText, kernel_struct, type_number};
use super::memory::{address, batch_addresses};
use super::nvrtc::Source;
use super::tables::{Grid, RowStrides, Side, Tables, Turn, side_asserts};
use crate::compute::{Buffer, KernelSource};
use crate::error::{Error, Result, to_u32};
use crate::format::{Cells, DType, RowFormat, Scaling, ZERO_NORM};
use crate::problem::op::{Custom, Dequantize, Merge, Places, Quantize, Rotate};
use crate::problem::{Direction, Domain, PagePool, Positions, RowOrder};
use bytemuck::Zeroable;
use std::sync::Arc;

/// Threads of a block of these kernels, and how many blocks a multiprocessor is given.
const THREADS: usize = 256;
const BLOCKS: usize = 8;
const DEQUANTIZE_THREADS: usize = 128;
const DEQUANTIZE_BLOCKS: usize = 32;
/// Rows that a warp takes at once in tiles (codec/tile_encoder.cuh).
const TILE: usize = 8;

/// Bytes are those of the CPU backend only without contraction.
const EXACT: &[&str] = &["--fmad=false"];

/// Lanes that share a row, as `Shape::GROUP` of transform.cuh.
fn group(row: &RowFormat) -> usize {
    row.row_dim().div_ceil(32).next_power_of_two().min(row.block() / 8)
}

pub(super) fn code_alignment(pool: &PagePool) -> u32 {
    let strides = pool.strides().0;
    alignment(address(pool.codes()) | (strides.page | strides.head | strides.row) as u64, pool.row().row_bytes())
}

/// Whether rows of `width` elements can be read and written 16 bytes at a time.
fn aligned(buffer: &Buffer, width: usize) -> u32 {
    (alignment(address(buffer), width * buffer.dtype().size()) == 16) as u32
}

static ROTATE: KernelText = KernelText {
    name: "rotate",
    text: include_str!("kernels/rotate.cu"),
    options: EXACT,
    macros: &["ROW_DIM", "X_WIDTH", "OUT_WIDTH", "X_TYPE", "OUT_TYPE", "BOTH_ALIGNED", "INVERSE"],
    asserts: || Turn::asserts() + &RotateParams::asserts(),
    shared_memory_symbol: None,
};

kernel_struct! {
    struct RotateParams as "Params" { x: u64, out: u64, turn: Turn, rows: u32, pad: u32 }
}

/// Elements of a vector before and after.
fn widths(row: &RowFormat, direction: Direction) -> (usize, usize) {
    match direction {
        Direction::Forward => (row.head_dim(), row.row_dim()),
        Direction::Inverse => (row.row_dim(), row.head_dim()),
    }
}

pub(super) fn rotate_key(row: &RowFormat, direction: Direction, from: DType, to: DType, aligned: u32) -> KernelKey {
    let (x, out) = widths(row, direction);
    let inverse = (direction == Direction::Inverse) as u32;
    ROTATE.with([row.row_dim() as u32, x as u32, out as u32, type_number(from), type_number(to), aligned, inverse])
}

pub(super) fn rotate(gpu: &Gpu, op: &Rotate, to: &mut Recording) -> Result<()> {
    let tables = gpu.tables(&op.row)?;
    let (from, into) = widths(&op.row, op.direction);
    let rows = op.x.len() / from;
    let aligned = aligned(&op.x, from) & aligned(&op.out, into);
    let key = rotate_key(&op.row, op.direction, op.x.dtype(), op.out.dtype(), aligned);
    let (x, out, rows32) = (address(&op.x), address(&op.out), to_u32("rows", rows)?);
    let params = RotateParams { x, out, turn: tables.turn, rows: rows32, pad: 0 };
    gpu.launch(&key, gpu.blocks(rows.div_ceil(THREADS / group(&op.row)), BLOCKS), &params, to)
}

const _: () = assert!(ZERO_NORM == 1e-10, "as QUANTIZE's options say");

static QUANTIZE: KernelText = KernelText {
    name: "quantize",
    text: include_str!("kernels/quantize.cu"),
    options: &["--fmad=false", "-DZERO_NORM=1e-10f"],
    macros: &[
        "SAME",
        "A_DIM",
        "A_BITS",
        "A_PACKING",
        "A_SCALING",
        "A_WIDTH",
        "A_TYPE",
        "A_ALIGNED",
        "A_CODE_ALIGN",
        "A_CELLS",
        "A_CELL_REPLICAS",
        "A_GRID",
        "B_DIM",
        "B_BITS",
        "B_PACKING",
        "B_SCALING",
        "B_WIDTH",
        "B_TYPE",
        "B_ALIGNED",
        "B_CODE_ALIGN",
        "B_CELLS",
        "B_CELL_REPLICAS",
        "B_GRID",
        "PAIRS",
        "SAME_2",
        "C_DIM",
        "C_BITS",
        "C_PACKING",
        "C_SCALING",
        "C_WIDTH",
        "C_TYPE",
        "C_ALIGNED",
        "C_CODE_ALIGN",
        "C_CELLS",
        "C_CELL_REPLICAS",
        "C_GRID",
        "D_DIM",
        "D_BITS",
        "D_PACKING",
        "D_SCALING",
        "D_WIDTH",
        "D_TYPE",
        "D_ALIGNED",
        "D_CODE_ALIGN",
        "D_CELLS",
        "D_CELL_REPLICAS",
        "D_GRID",
    ],
    asserts: || side_asserts() + &Input::asserts() + &BatchParams::asserts() + &QuantizeParams::asserts(),
    shared_memory_symbol: Some("quantize_shared_bytes"),
};

kernel_struct! {
    struct Input as "Input" {
        x: u64,
        channels: u64,
        codes: u64,
        scales: u64,
        cells: u64,
        squares: u64,
        turn: Turn,
        kv_heads: u32,
        rows: u32,
        unit: f32,
        per_cell: f32,
        limit: f32,
        first_cell: f32,
        grid: u64,
        grid_step: f32,
        grid_zero: f32,
        square_root: f32,
        per_near: f32,
        strides: RowStrides,
    }
}

kernel_struct! {
    struct BatchParams as "Batch" {
        spans: u64,
        table: u64,
        out_of_range: u64,
        sequences: u32,
        page_size: u32,
        width: u32,
        blocks: u32,
        a_blocks: u32,
        wide: u32,
        slots: u32,
        tokens: u32,
        pad: u32,
        pad2: u32,
    }
}

kernel_struct! {
    struct QuantizeParams as "Params" { side: [Input; 4], batch: [BatchParams; 2] }
}

/// What one side of a quantize kernel is compiled for.
#[derive(Clone, Copy)]
pub(super) struct InputShape<'a> {
    pub row: &'a RowFormat,
    pub cells: Option<&'a Cells>,
    pub grid: Option<&'a Grid>,
    pub input: DType,
    pub input_aligned: u32,
    pub code_alignment: u32,
}

impl<'a> InputShape<'a> {
    /// Whether tensor cores do it.
    fn tiles(&self) -> Option<&'a Grid> {
        self.grid.filter(|_| self.input != DType::F32 && self.input_aligned == 1)
    }

    fn values(&self) -> [u32; 11] {
        let [dim, bits, packing, scaling] = row_values(self.row);
        let (cells, replicas) = self.cells.map_or((1, 1), |c| (c.entries.len(), replicas(c)));
        let (width, input) = (self.row.head_dim() as u32, type_number(self.input));
        let grid = self.tiles().map_or(0, |g| g.cells as u32);
        let (aligned, code_alignment) = (self.input_aligned, self.code_alignment);
        [dim, bits, packing, scaling, width, input, aligned, code_alignment, cells as u32, replicas as u32, grid]
    }
}

/// Copies of the cells in shared memory, so that neighbouring lanes read different banks.
fn replicas(cells: &Cells) -> usize {
    let fit = 8192 / (cells.entries.len() * 8);
    if fit < 2 { 1 } else { 1 << fit.min(16).ilog2() }
}

/// Of one or two pairs of sides.
pub(super) fn quantize_key(pairs: &[[InputShape; 2]]) -> KernelKey {
    let mut all = [0; 47];
    all[23] = pairs.len() as u32;
    for ([a, b], [same, sides]) in pairs.iter().zip([[0, 1], [24, 25]]) {
        let (a, b) = (a.values(), b.values());
        all[same] = (a == b) as u32;
        all[sides..][..11].copy_from_slice(&a);
        all[sides + 11..][..11].copy_from_slice(&b);
    }
    QUANTIZE.with(all)
}

/// K and V (any two parts) go in one launch; two such pairs do where all are small, as in decoding.
pub(super) fn quantize(gpu: &Gpu, ops: &[Quantize], to: &mut Recording) -> Result<()> {
    let pairs = ops.iter().flat_map(|op| op.parts.chunks(2).map(move |parts| (op, parts)));
    let pairs = pairs.map(|(op, parts)| Pair::new(gpu, op, parts)).collect::<Result<Vec<_>>>()?;
    let small = |pair: &Pair| pair.needed[0] + pair.needed[1] <= gpu.multiprocessors();
    let mut at = 0;
    while at < pairs.len() {
        let n = pairs[at..].iter().take(2).take_while(|pair| small(pair)).count().max(1);
        launch_quantize(gpu, &pairs[at..at + n], to)?;
        at += n;
    }
    Ok(())
}

fn input(op: &Quantize, (x, pool): &(Buffer, PagePool), tables: &Tables) -> Result<Input> {
    let row = pool.row();
    let (cells, grid) = (tables.of.cells.as_ref(), tables.grid.as_ref());
    Ok(Input {
        x: address(x),
        channels: pool.channels().map_or(0, |map| address(map.values())),
        codes: address(pool.codes()),
        scales: pool.scales().map_or(0, address),
        cells: tables.cells_at,
        squares: tables.squares,
        turn: tables.turn,
        kv_heads: pool.kv_heads() as u32,
        rows: to_u32("new vectors", op.places.tokens() * pool.kv_heads())?,
        unit: match row.scaling() {
            Scaling::BlockRms => row.scale_factor_d512(),
            _ => (row.row_dim() as f32).sqrt(),
        },
        per_cell: cells.map_or(0.0, |c| c.per_unit),
        limit: cells.map_or(0.0, |c| c.limit),
        first_cell: cells.map_or(0.0, |c| c.first),
        grid: tables.grid_at,
        grid_step: grid.map_or(0.0, |g| g.step),
        grid_zero: grid.map_or(0.0, |g| g.zero),
        square_root: grid.map_or(0.0, |g| g.square_root),
        per_near: grid.map_or(0.0, |g| g.per_near),
        strides: RowStrides::new(pool),
    })
}

/// Two inputs of a quantize kernel with the same places, of which the second may be the first again.
struct Pair<'a> {
    op: &'a Quantize,
    parts: [&'a (Buffer, PagePool); 2],
    tables: [Arc<Tables>; 2],
    sides: [Input; 2],
    /// Blocks that would have a piece of work each.
    needed: [usize; 2],
}

impl<'a> Pair<'a> {
    fn new(gpu: &Gpu, op: &'a Quantize, parts: &'a [(Buffer, PagePool)]) -> Result<Self> {
        let parts_of = [&parts[0], &parts[parts.len() - 1]];
        let tables = [gpu.tables(parts_of[0].1.row())?, gpu.tables(parts_of[1].1.row())?];
        let sides = [input(op, parts_of[0], &tables[0])?, input(op, parts_of[1], &tables[1])?];
        let pair = Pair { op, parts: parts_of, tables, sides, needed: [0; 2] };
        let needed = |shape: InputShape, (_, pool): &(Buffer, PagePool)| {
            let rows = if shape.tiles().is_some() { TILE * THREADS / 32 } else { THREADS / group(shape.row) };
            (op.places.tokens() * pool.kv_heads()).div_ceil(rows)
        };
        let [a, b] = pair.shapes();
        let needed = [needed(a, parts_of[0]), if parts.len() == 2 { needed(b, parts_of[1]) } else { 0 }];
        Ok(Pair { needed, ..pair })
    }

    fn shapes(&self) -> [InputShape<'_>; 2] {
        [0, 1].map(|i| {
            let ((x, pool), tables) = (self.parts[i], &self.tables[i]);
            InputShape {
                row: pool.row(),
                cells: tables.of.cells.as_ref(),
                // Tiles take vectors as they come.
                grid: tables.grid.as_ref().filter(|_| pool.channels().is_none()),
                input: x.dtype(),
                input_aligned: aligned(x, pool.row().head_dim()),
                code_alignment: code_alignment(pool),
            }
        })
    }

    fn batch(&self, gpu: &Gpu) -> Result<BatchParams> {
        // Of tiles as many as a multiprocessor holds at once: `Work::HELD`.
        let held = |shape: &InputShape| match shape.tiles() {
            Some(_) if shape.row.row_dim() <= 128 => 3,
            Some(_) => 2,
            None => BLOCKS,
        };
        let [need_a, need_b] = self.needed;
        let most = self.shapes().iter().map(held).min().unwrap_or(BLOCKS);
        let all = gpu.blocks(need_a + need_b, most) as usize;
        let a_blocks = (all * need_a).div_ceil(need_a + need_b).max(1) as u32;
        let b_blocks = if need_b == 0 { 0 } else { (all * need_b / (need_a + need_b)).max(1) as u32 };
        let pool = &self.parts[0].1;
        let common = BatchParams {
            page_size: pool.page_size() as u32,
            blocks: a_blocks + b_blocks,
            a_blocks,
            tokens: self.op.places.tokens() as u32,
            ..BatchParams::zeroed()
        };
        Ok(match &self.op.places {
            Places::Batch(batch) => {
                let [spans, table] = batch_addresses(batch)?;
                BatchParams { spans, table, sequences: batch.sequences() as u32, width: batch.width() as u32, ..common }
            }
            Places::Slots { slots, out_of_range } => BatchParams {
                table: address(slots),
                out_of_range: out_of_range.as_ref().map_or(0, address),
                wide: (slots.dtype() == DType::I64) as u32,
                slots: (pool.pages() * pool.page_size()) as u32,
                ..common
            },
        })
    }
}

fn launch_quantize(gpu: &Gpu, pairs: &[Pair], to: &mut Recording) -> Result<()> {
    let mut params = QuantizeParams::zeroed();
    for (i, pair) in pairs.iter().enumerate() {
        params.side[2 * i..][..2].copy_from_slice(&pair.sides);
        params.batch[i] = pair.batch(gpu)?;
    }
    let shapes: Vec<_> = pairs.iter().map(Pair::shapes).collect();
    let key = quantize_key(&shapes).for_pools(pairs.iter().flat_map(|pair| pair.parts.map(|part| &part.1)));
    gpu.launch(&key, params.batch.iter().map(|b| b.blocks).sum(), &params, to)
}

static DEQUANTIZE: KernelText = KernelText {
    name: "dequantize",
    text: include_str!("kernels/dequantize.cu"),
    options: EXACT,
    macros: &[
        "ROW_DIM",
        "ROW_BITS",
        "ROW_PACKING",
        "ROW_SCALING",
        "CODE_ALIGN",
        "OUT_TYPE",
        "OUT_ALIGNED",
        "OUT_WIDTH",
    ],
    asserts: || side_asserts() + &DequantizeParams::asserts(),
    shared_memory_symbol: None,
};

kernel_struct! {
    struct DequantizeParams as "Params" {
        side: Side,
        table: u64,
        positions: u64,
        out: u64,
        start: u32,
        count: u32,
        kv_heads: u32,
        page_size: u32,
        width: u32,
        head_major: u32,
    }
}

pub(super) fn dequantize_key(
    row: &RowFormat,
    out: DType,
    out_aligned: u32,
    width: usize,
    code_align: u32,
) -> KernelKey {
    let [dim, bits, packing, scaling] = row_values(row);
    DEQUANTIZE.with([dim, bits, packing, scaling, code_align, type_number(out), out_aligned, width as u32])
}

pub(super) fn dequantize(gpu: &Gpu, op: &Dequantize, to: &mut Recording) -> Result<()> {
    let (row, pool) = (op.pool.row(), &op.pool);
    let tables = gpu.tables(row)?;
    let (start, list) = match &op.positions {
        Positions::Range(r) => (to_u32("position", r.start)?, None),
        Positions::List(l) => (0, Some(gpu.stream.upload(bytemuck::cast_slice(l))?)),
    };
    let out_width = if op.domain == Domain::Original { row.head_dim() } else { row.row_dim() };
    let aligned = aligned(&op.out, out_width);
    let key = dequantize_key(row, op.out.dtype(), aligned, out_width, code_alignment(pool)).for_pools([pool]);
    let (count, width) = (op.positions.len(), op.batch.width());
    let rows = to_u32("vectors", count * pool.kv_heads())?;
    let params = DequantizeParams {
        side: Side::new(pool, &tables, tables.levels, op.domain == Domain::Original),
        table: batch_addresses(&op.batch)?[1] + 4 * (op.sequence * width) as u64,
        positions: list.as_ref().map_or(0, |l| l.address),
        out: address(&op.out),
        start,
        count: count as u32,
        kv_heads: pool.kv_heads() as u32,
        page_size: pool.page_size() as u32,
        width: width as u32,
        head_major: (op.order == RowOrder::HeadMajor) as u32,
    };
    let blocks = gpu.blocks((rows as usize).div_ceil(DEQUANTIZE_THREADS / group(row)), DEQUANTIZE_BLOCKS);
    gpu.launch(&key, blocks, &params, to)?;
    to.memory.extend(list.map(Arc::new));
    Ok(())
}

static MERGE: KernelText = KernelText {
    name: "merge",
    text: include_str!("kernels/merge.cu"),
    options: EXACT,
    macros: &["OUT_TYPE"],
    asserts: || MergePart::asserts() + &MergeParams::asserts(),
    shared_memory_symbol: None,
};

kernel_struct! {
    #[derive(Default)]
    struct MergePart as "Part" { out: u64, lse: u64, dtype: u32, pad: u32 }
}

/// Parts that a launch takes along. A list of more lies in memory.
const FEW: usize = 8;

kernel_struct! {
    struct MergeParams as "Params" {
        few: [MergePart; FEW],
        parts: u64,
        out: u64,
        lse: u64,
        count: u32,
        rows: u32,
        head_dim: u32,
        pad: u32,
    }
}

pub(super) fn merge_key(out: DType) -> KernelKey {
    MERGE.with([type_number(out)])
}

pub(super) fn merge(gpu: &Gpu, op: &Merge, to: &mut Recording) -> Result<()> {
    let part = |(out, lse): &(Buffer, Buffer)| {
        let dtype = type_number(out.dtype());
        MergePart { out: address(out), lse: address(lse), dtype, pad: 0 }
    };
    let mut few = [MergePart::default(); FEW];
    few.iter_mut().zip(&op.parts).for_each(|(to, from)| *to = part(from));
    let list = if op.parts.len() > FEW {
        let parts: Vec<_> = op.parts.iter().map(part).collect();
        Some(gpu.stream.upload(bytemuck::cast_slice(&parts))?)
    } else {
        None
    };
    let head_dim = op.out.shape()[2];
    let rows = to_u32("rows", op.out.len() / head_dim)?;
    let params = MergeParams {
        few,
        parts: list.as_ref().map_or(0, |l| l.address),
        out: address(&op.out),
        lse: op.lse.as_ref().map_or(0, address),
        count: to_u32("parts", op.parts.len())?,
        rows,
        head_dim: to_u32("head_dim", head_dim)?,
        pad: 0,
    };
    gpu.launch(&merge_key(op.out.dtype()), rows.div_ceil(8), &params, to)?;
    to.memory.extend(list.map(Arc::new));
    Ok(())
}

pub(super) fn custom(gpu: &Gpu, op: &Custom, to: &mut Recording) -> Result<()> {
    let KernelSource::Cuda(text) = &op.source else {
        let what = format!("run kernel {}, whose source is for another kind of device", op.name);
        return Err(Error::Unsupported { device: gpu.stream.context.id.clone(), what });
    };
    let source = Source {
        name: op.name.clone(),
        entry: op.name.clone(),
        text: text.clone(),
        options: vec![],
        shared_memory: 0,
        shared_memory_symbol: None,
    };
    let kernel = gpu.stream.context.compiled(&source)?;
    let mut params: Vec<u8> = op.bindings.iter().flat_map(|b| address(b).to_le_bytes()).collect();
    params.extend(op.constants.iter().flat_map(|c| c.to_le_bytes()));
    to.work.push(Work::Launch(Launch { kernel, grid: op.workgroups, params: ParamBytes::new(&params), waits: false }));
    Ok(())
}
