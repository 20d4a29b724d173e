//! Rotate, quantize, dequantize, merge and custom kernels: what they are compiled from and called with.

use super::driver::Launch;
use super::nvrtc::Source;
use super::tables::{Grid, Tables, Turn, row_defines, scale_unit};
use super::{Gpu, Prepared, Work, address, type_number};
use crate::compute::{Buffer, DType, KernelSource};
use crate::error::{Error, Result, to_u32};
use crate::format::Cells;
use crate::format::{RowFormat, Scaling, ZERO_NORM};
use crate::problem::op::Custom;
use crate::problem::op::{Dequantize, Merge, Quantize, Rotate};
use crate::problem::{Direction, Domain, PagePool, Positions, RowOrder};
use bytemuck::{Pod, Zeroable};
use std::sync::Arc;

/// Threads of a block of these kernels, and how many blocks a multiprocessor is given.
const THREADS: usize = 256;
const BLOCKS: usize = 8;
const DEQUANTIZE_THREADS: usize = 128;
const DEQUANTIZE_BLOCKS: usize = 32;
/// Rows that a warp takes at once in tiles (quantize.cu).
const TILE: usize = 8;

/// Lanes that share a row, as `Shape::GROUP` of row.cuh.
fn group(row: &RowFormat) -> usize {
    row.head_dim().div_ceil(32).next_power_of_two().min(row.block() / 8)
}

/// The largest power of two, up to 16, that divides both.
fn alignment(address: u64, stride: usize) -> u64 {
    1 << (address | stride as u64 | 16).trailing_zeros()
}

pub(super) fn code_alignment(pool: &PagePool) -> u64 {
    alignment(address(pool.codes()), pool.row().row_bytes())
}

fn aligned(buffer: &Buffer) -> u32 {
    address(buffer).is_multiple_of(16) as u32
}

fn source(name: &'static str, text: &'static str, params: usize, options: impl IntoIterator<Item = String>) -> Source {
    // Bytes are those of the CPU backend only without contraction.
    let options = options.into_iter().chain([format!("-DPARAMS_BYTES={params}"), "--fmad=false".to_owned()]).collect();
    Source {
        name: name.to_owned(),
        entry: name.to_owned(),
        text: text.into(),
        options,
        shared_memory: 0,
        shared_memory_symbol: None,
    }
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RotateParams {
    x: u64,
    out: u64,
    turn: Turn,
    rows: u32,
    pad: u32,
}

pub(super) fn rotate_source(row: &RowFormat, direction: Direction, from: DType, to: DType, aligned: u32) -> Source {
    let options = [
        format!("-DHEAD_DIM={}", row.head_dim()),
        format!("-DX_TYPE={}", type_number(from)),
        format!("-DOUT_TYPE={}", type_number(to)),
        format!("-DBOTH_ALIGNED={aligned}"),
        format!("-DINVERSE={}", (direction == Direction::Inverse) as u32),
    ];
    source("rotate", include_str!("kernels/rotate.cu"), size_of::<RotateParams>(), options)
}

pub(super) fn rotate(gpu: &Gpu, op: &Rotate) -> Result<Prepared> {
    let tables = gpu.tables(&op.row)?;
    let rows = op.x.len() / op.row.head_dim();
    let aligned = aligned(&op.x) & aligned(&op.out);
    let source = rotate_source(&op.row, op.direction, op.x.dtype(), op.out.dtype(), aligned);
    let rows32 = to_u32("rows", rows)?;
    let params = RotateParams { x: address(&op.x), out: address(&op.out), turn: tables.turn, rows: rows32, pad: 0 };
    let blocks = gpu.blocks(rows.div_ceil(THREADS / group(&op.row)), BLOCKS);
    gpu.prepare(&source, blocks, &params, vec![op.x.clone(), op.out.clone()])
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct QuantizeSide {
    x: u64,
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
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct QuantizeParams {
    sides: [QuantizeSide; 2],
    spans: u64,
    table: u64,
    sequences: u32,
    page_size: u32,
    width: u32,
    a_blocks: u32,
}

/// What one side of a quantize kernel is compiled for.
#[derive(Clone, Copy)]
pub(super) struct QuantizeShape<'a> {
    pub row: &'a RowFormat,
    pub cells: Option<&'a Cells>,
    pub grid: Option<&'a Grid>,
    pub input: DType,
    pub input_aligned: u32,
    pub code_alignment: u64,
}

impl<'a> QuantizeShape<'a> {
    /// Whether tensor cores do it.
    fn tiles(&self) -> Option<&'a Grid> {
        self.grid.filter(|_| self.input != DType::F32 && self.input_aligned == 1)
    }
}

/// Copies of the cells in shared memory, so that neighbouring lanes read different banks.
fn replicas(cells: &Cells) -> usize {
    let fit = 8192 / (cells.entries.len() * 8);
    if fit < 2 { 1 } else { 1 << fit.min(16).ilog2() }
}

pub(super) fn quantize_source(sides: [QuantizeShape; 2]) -> Source {
    let [a, b] = &sides;
    let kind = |s: &QuantizeShape| (s.row.codec(), s.row.head_dim(), s.input, s.input_aligned, s.code_alignment);
    let same = (kind(a) == kind(b)) as u32;
    let mut options = vec![format!("-DZERO_NORM={ZERO_NORM:e}f"), format!("-DSAME={same}")];
    for (name, side) in ["A_", "B_"].into_iter().zip(sides) {
        let (cells, replicas) = side.cells.map_or((1, 1), |c| (c.entries.len(), replicas(c)));
        options.extend(row_defines(name, side.row));
        options.extend([
            format!("-D{name}TYPE={}", type_number(side.input)),
            format!("-D{name}ALIGNED={}", side.input_aligned),
            format!("-D{name}CODE_ALIGN={}", side.code_alignment),
            format!("-D{name}CELLS={cells}"),
            format!("-D{name}CELL_REPLICAS={replicas}"),
            format!("-D{name}GRID={}", side.tiles().map_or(0, |g| g.cells)),
        ]);
    }
    let text = include_str!("kernels/quantize.cu");
    let source = source("quantize", text, size_of::<QuantizeParams>(), options);
    Source { shared_memory_symbol: Some("quantize_shared_bytes"), ..source }
}

/// K and V (any two parts) go in one launch.
pub(super) fn quantize(gpu: &Gpu, op: &Quantize) -> Result<Vec<Prepared>> {
    op.parts.chunks(2).map(|parts| quantize_pair(gpu, op, parts)).collect()
}

fn quantize_pair(gpu: &Gpu, op: &Quantize, parts: &[(Buffer, PagePool)]) -> Result<Prepared> {
    let (a, b) = (&parts[0], &parts[parts.len() - 1]);
    let tables = [gpu.tables(a.1.row())?, gpu.tables(b.1.row())?];
    let shapes = [(a, &tables[0]), (b, &tables[1])].map(|((x, pool), tables)| QuantizeShape {
        row: pool.row(),
        cells: tables.cells.as_ref(),
        grid: tables.grid.as_ref(),
        input: x.dtype(),
        input_aligned: aligned(x),
        code_alignment: code_alignment(pool),
    });
    let source = quantize_source(shapes);
    let side = |(x, pool): &(Buffer, PagePool), tables: &Tables| -> Result<QuantizeSide> {
        let row = pool.row();
        let (cells, grid) = (tables.cells.as_ref(), tables.grid.as_ref());
        Ok(QuantizeSide {
            x: address(x),
            codes: address(pool.codes()),
            scales: pool.scales().map_or(0, address),
            cells: tables.cells_at,
            squares: tables.squares,
            turn: tables.turn,
            kv_heads: pool.kv_heads() as u32,
            rows: to_u32("new vectors", op.batch.tokens() * pool.kv_heads())?,
            unit: if row.scaling() == Scaling::BlockRms {
                row.scale_factor_d512()
            } else {
                (row.head_dim() as f32).sqrt()
            },
            per_cell: cells.map_or(0.0, |c| c.per_unit),
            limit: cells.map_or(0.0, |c| c.limit),
            first_cell: cells.map_or(0.0, |c| c.first),
            grid: tables.grid_at,
            grid_step: grid.map_or(0.0, |g| g.step),
            grid_zero: grid.map_or(0.0, |g| g.zero),
            square_root: grid.map_or(0.0, |g| g.square_root),
            per_near: grid.map_or(0.0, |g| g.per_near),
        })
    };
    let sides = [side(a, &tables[0])?, side(b, &tables[1])?];
    let needed = |shape: &QuantizeShape, pool: &PagePool| {
        let rows = if shape.tiles().is_some() { TILE * THREADS / 32 } else { THREADS / group(pool.row()) };
        (op.batch.tokens() * pool.kv_heads()).div_ceil(rows)
    };
    let need_a = needed(&shapes[0], &a.1);
    let need_b = if parts.len() == 2 { needed(&shapes[1], &b.1) } else { 0 };
    // Of tiles as many as a multiprocessor holds at once: `Work::HELD`.
    let held = |shape: &QuantizeShape| match shape.tiles() {
        Some(_) if shape.row.head_dim() <= 128 => 3,
        Some(_) => 2,
        None => BLOCKS,
    };
    let all = gpu.blocks(need_a + need_b, held(&shapes[0]).min(held(&shapes[1]))) as usize;
    let a_blocks = (all * need_a).div_ceil(need_a + need_b).max(1) as u32;
    let b_blocks = if need_b == 0 { 0 } else { (all * need_b / (need_a + need_b)).max(1) as u32 };
    let params = QuantizeParams {
        sides,
        spans: address(op.batch.device_spans()),
        table: address(op.batch.device_table()),
        sequences: op.batch.sequences() as u32,
        page_size: op.batch.page_size() as u32,
        width: op.batch.width() as u32,
        a_blocks,
    };
    let mut keep = vec![op.batch.device_spans().clone(), op.batch.device_table().clone()];
    for (x, pool) in parts {
        keep.push(x.clone());
        keep.extend(pool.buffers().cloned());
    }
    gpu.prepare(&source, a_blocks + b_blocks, &params, keep)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct DequantizeParams {
    codes: u64,
    scales: u64,
    levels: u64,
    table: u64,
    positions: u64,
    out: u64,
    turn: Turn,
    start: u32,
    count: u32,
    kv_heads: u32,
    page_size: u32,
    width: u32,
    restored: u32,
    head_major: u32,
    unit: f32,
}

pub(super) fn dequantize_source(row: &RowFormat, out: DType, out_aligned: u32, code_alignment: u64) -> Source {
    let options = row_defines("ROW_", row).into_iter().chain([
        format!("-DCODE_ALIGN={code_alignment}"),
        format!("-DOUT_TYPE={}", type_number(out)),
        format!("-DOUT_ALIGNED={out_aligned}"),
    ]);
    source("dequantize", include_str!("kernels/dequantize.cu"), size_of::<DequantizeParams>(), options)
}

pub(super) fn dequantize(gpu: &Gpu, op: &Dequantize) -> Result<Prepared> {
    let (row, pool) = (op.pool.row(), &op.pool);
    let tables = gpu.tables(row)?;
    let (start, list) = match &op.positions {
        Positions::Range(r) => (to_u32("position", r.start)?, None),
        Positions::List(l) => (0, Some(gpu.stream.upload(bytemuck::cast_slice(l))?)),
    };
    let source = dequantize_source(row, op.out.dtype(), aligned(&op.out), code_alignment(pool));
    let (count, width) = (op.positions.len(), op.batch.width());
    let rows = to_u32("vectors", count * pool.kv_heads())?;
    let params = DequantizeParams {
        codes: address(pool.codes()),
        scales: pool.scales().map_or(0, address),
        levels: tables.levels,
        table: address(op.batch.device_table()) + 4 * (op.sequence * width) as u64,
        positions: list.as_ref().map_or(0, |l| l.address),
        out: address(&op.out),
        turn: tables.turn,
        start,
        count: count as u32,
        kv_heads: pool.kv_heads() as u32,
        page_size: pool.page_size() as u32,
        width: width as u32,
        restored: (op.domain == Domain::Original) as u32,
        head_major: (op.order == RowOrder::HeadMajor) as u32,
        unit: scale_unit(row),
    };
    let mut keep = vec![op.batch.device_table().clone(), op.out.clone()];
    keep.extend(pool.buffers().cloned());
    let blocks = gpu.blocks((rows as usize).div_ceil(DEQUANTIZE_THREADS / group(row)), DEQUANTIZE_BLOCKS);
    let mut prepared = gpu.prepare(&source, blocks, &params, keep)?;
    prepared.memory.extend(list.map(Arc::new));
    Ok(prepared)
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MergePart {
    out: u64,
    lse: u64,
    dtype: u32,
    pad: u32,
}

#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct MergeParams {
    parts: u64,
    out: u64,
    lse: u64,
    count: u32,
    rows: u32,
    head_dim: u32,
    pad: u32,
}

pub(super) fn merge_source(out: DType) -> Source {
    let options = [format!("-DOUT_TYPE={}", type_number(out))];
    source("merge", include_str!("kernels/merge.cu"), size_of::<MergeParams>(), options)
}

pub(super) fn merge(gpu: &Gpu, op: &Merge) -> Result<Prepared> {
    let parts: Vec<_> = op
        .parts
        .iter()
        .map(|(out, lse)| MergePart { out: address(out), lse: address(lse), dtype: type_number(out.dtype()), pad: 0 })
        .collect();
    let head_dim = op.out.shape()[2];
    let rows = to_u32("rows", op.out.len() / head_dim)?;
    let memory = gpu.stream.upload(bytemuck::cast_slice(&parts))?;
    let params = MergeParams {
        parts: memory.address,
        out: address(&op.out),
        lse: op.lse.as_ref().map_or(0, address),
        count: to_u32("parts", parts.len())?,
        rows,
        head_dim: to_u32("head_dim", head_dim)?,
        pad: 0,
    };
    let mut keep: Vec<_> = op.parts.iter().flat_map(|(o, l)| [o.clone(), l.clone()]).collect();
    keep.push(op.out.clone());
    keep.extend(op.lse.clone());
    let mut prepared = gpu.prepare(&merge_source(op.out.dtype()), rows.div_ceil(8), &params, keep)?;
    prepared.memory.push(Arc::new(memory));
    Ok(prepared)
}

pub(super) fn custom(gpu: &Gpu, op: &Custom) -> Result<Prepared> {
    let KernelSource::Cuda(text) = &op.source else {
        let what = format!("run kernel {}, whose source is for another kind of device", op.name);
        return Err(Error::Unsupported { device: gpu.stream.context.id.clone(), what });
    };
    let source = Source {
        name: op.name.clone(),
        entry: op.name.clone(),
        text: text.clone().into(),
        options: vec![],
        shared_memory: 0,
        shared_memory_symbol: None,
    };
    let kernel = gpu.stream.context.kernel(&source)?;
    let mut params: Vec<u8> = op.bindings.iter().flat_map(|b| address(b).to_le_bytes()).collect();
    params.extend(op.constants.iter().flat_map(|c| c.to_le_bytes()));
    let work = Work::Launch(Launch { kernel, grid: op.workgroups, params });
    Ok(Prepared { work, buffers: op.bindings.clone(), memory: vec![] })
}
