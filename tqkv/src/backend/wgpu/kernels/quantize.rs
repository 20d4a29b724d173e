//! Floats into the cache.

use crate::Buffer;
use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::codec::key::{Align, Stored};
use crate::backend::wgpu::codec::rows::PoolSlots;
use crate::backend::wgpu::codec::{scalar, tables};
use crate::backend::wgpu::commands::Commands;
use crate::backend::wgpu::kernel::Kernel;
use crate::backend::wgpu::kernels::channels::{Mapped, Pass, Way};
use crate::backend::wgpu::slot::Slot;
use crate::backend::wgpu::wgsl::builder::{Builder, Source, line};
use crate::backend::wgpu::wgsl::params::params;
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::Transform;
use crate::error::Result;
use crate::format::RowFormat;
use crate::problem::PagePool;
use crate::problem::op::{Places, Quantize};

/// Inputs of one dispatch, as far as bindings allow.
const INPUTS: usize = 2;

/// One input and its pool, or two in one dispatch.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct QuantizeKernel {
    pub inputs: [Option<Input>; INPUTS],
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Input {
    pub pool: Stored,
    pub x: Tensor,
}

params! {
    pub struct QuantizeParams {
        rows: u32,
        table_off: u32,
        spans_off: u32,
        sequences: u32,
        kv_heads: u32,
        page_size: u32,
        slots: u32,
        width: u32,
        /// Workgroups of an input, and how many times each takes rows.
        groups_each: u32,
        rounds: u32,
        x0_off: u32,
        p0_codes_off: u32,
        p0_scales_off: u32,
        x1_off: u32,
        p1_codes_off: u32,
        p1_scales_off: u32,
    }
}

/// Workgroups that a dispatch has for an input when there is work for more: each does several rounds of rows, for one copy of
/// tables. Large ones take longer.
fn most_groups(row: &RowFormat) -> usize {
    if row.codebook().is_some_and(|book| book.levels.len() > 64) { 1024 } else { 2048 }
}

impl Kernel for QuantizeKernel {
    type Params = QuantizeParams;
    const NAME: &'static str = "quantize";

    fn source(&self, caps: &Caps) -> Source {
        let inputs: Vec<Input> = self.inputs.iter().flatten().copied().collect();
        let pools: Vec<Stored> = inputs.iter().map(|input| input.pool).collect();
        let mut b = Builder::new(caps);
        b.params::<QuantizeParams>();
        for (i, input) in inputs.iter().enumerate() {
            input.x.bind(&mut b, &format!("x{i}"), false);
            scalar::bind(&mut b, &input.pool, &format!("p{i}"));
        }
        b.storage("batch", "u32", false);
        for (i, pool) in pools.iter().enumerate().filter(|(_, pool)| pool.book_vectors() > 0) {
            tables::declare_all(&mut b, pool, &format!("p{i}"));
        }
        let transform = Transform::new(&pools[0].format(), caps);
        b.push("var<workgroup> row_of: array<u32, WG>;");
        b.push(include_str!("locate.wgsl"));
        scalar::declare(&mut b, &pools, &transform);
        for (i, input) in inputs.iter().enumerate() {
            input.pool.elements().encode(&input.pool, &mut b, input.x, i, &transform);
        }
        b.main();
        for i in 0..inputs.len() {
            let before = format!("{i}u * a.groups_each");
            line!(b, "  if (wg >= {before} && wg < {before} + a.groups_each) {{ encode{i}(wg - {before}, tid); }}");
        }
        b.push("}");
        b.finish()
    }
}

pub fn record(commands: &mut Commands, op: &Quantize) -> Result<()> {
    // An input binds itself, codes and scales; all need the batch.
    let most = (commands.context.gpu.limits.max_storage_buffers_per_shader_stage as usize).saturating_sub(1) / 3;
    op.parts.chunks(most.clamp(1, INPUTS)).try_for_each(|parts| record_inputs(commands, op, parts))
}

/// The inputs whose pools have maps of channels, through them.
fn map_channels(commands: &mut Commands, parts: &[(Buffer, PagePool)]) -> Result<Vec<Mapped>> {
    let parts: Vec<_> = parts.iter().filter_map(|(x, pool)| Some((x, pool, pool.channels()?))).collect();
    if parts.is_empty() {
        return Ok(vec![]);
    }
    let rows = |x: &Buffer, pool: &PagePool| x.len() / pool.row().head_dim();
    let sizes: Vec<_> = parts.iter().map(|(x, pool, _)| (rows(x, pool), pool.row().row_dim())).collect();
    let mapped = Mapped::room(commands, &sizes)?;
    for ((x, _, map), to) in parts.iter().zip(&mapped) {
        Pass { map, way: Way::Store, per: 1, scale: 1.0 }.map_to(commands, x, to)?;
    }
    Ok(mapped)
}

fn record_inputs(commands: &mut Commands, op: &Quantize, parts: &[(Buffer, PagePool)]) -> Result<()> {
    let context = commands.context.clone();
    let gpu = &context.gpu;
    let Places::Batch(of) = &op.places else {
        return Err(gpu.unsupported("write to slots that lie in the device's memory".to_owned()));
    };
    let batch = commands.batch(of)?;
    let pool = &parts[0].1;
    let (count, width) = (of.tokens() * pool.kv_heads(), of.width());
    let rounds_of_rows = count.div_ceil(Transform::new(pool.row(), &gpu.caps).rows);
    let most = parts.iter().map(|(_, pool)| most_groups(pool.row())).min().unwrap_or(1);
    let rounds = rounds_of_rows.div_ceil(most);
    let groups = rounds_of_rows.div_ceil(rounds);
    let mut params = QuantizeParams {
        rows: count as u32,
        table_off: batch.table,
        spans_off: batch.spans,
        sequences: of.sequences() as u32,
        kv_heads: pool.kv_heads() as u32,
        page_size: pool.page_size() as u32,
        slots: (width * pool.page_size()) as u32,
        width: width as u32,
        groups_each: groups as u32,
        rounds: rounds as u32,
        ..Default::default()
    };
    let mut kernel = QuantizeKernel { inputs: [None; INPUTS] };
    let mapped = map_channels(commands, parts)?;
    let mut mapped = mapped.iter();
    let mut bound = Vec::with_capacity(parts.len());
    for (i, (x, pool)) in parts.iter().enumerate() {
        let (x, tensor) = match pool.channels().and_then(|_| mapped.next()) {
            Some(mapped) => (mapped.slot(), mapped.tensor()),
            None => Slot::tensor(gpu, "x", x, pool.row().row_dim())?,
        };
        let pool = PoolSlots::new(&context, "the pool's codes", pool)?;
        let unit = pool.stored.elements().offset_unit();
        if unit > 1 && pool.stored.align == Align::Byte {
            let what = format!("store dense floats at a byte offset that is no multiple of {unit}");
            return Err(gpu.unsupported(what));
        }
        let (x_off, codes_off) = (x.words(), pool.codes_off / unit);
        if i == 0 {
            (params.x0_off, params.p0_codes_off, params.p0_scales_off) = (x_off, codes_off, pool.scales_off);
        } else {
            (params.x1_off, params.p1_codes_off, params.p1_scales_off) = (x_off, codes_off, pool.scales_off);
        }
        kernel.inputs[i] = Some(Input { pool: pool.stored, x: tensor });
        bound.push((x, pool));
    }
    let mut slots = Vec::with_capacity(3 * INPUTS + 3);
    bound.iter().for_each(|(x, pool)| slots.extend(std::iter::once(*x).chain(pool.slots())));
    slots.push(batch.slot());
    slots.extend(bound.iter().filter_map(|(_, pool)| pool.tables()));
    commands.dispatch(&kernel, &slots, groups * parts.len(), &params)
}
