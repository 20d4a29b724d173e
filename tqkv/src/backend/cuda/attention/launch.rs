//! The tensor-core kernel: its parameters and its launch.

use super::device_plan::DevicePlan;
use super::params::{Near, Params, window};
use super::plan::{Problem, Sequences};
use super::refresh;
use super::variant::Variant;
use crate::backend::cuda::driver::lock;
use crate::backend::cuda::gpu::{Gpu, Recording};
use crate::backend::cuda::memory::batch_addresses;
use crate::backend::cuda::tables::{Side, Turn, scale_unit};
use crate::error::Result;
use crate::format::{RowFormat, Scaling};
use crate::problem::op::{self, Attention};
use crate::problem::{Domain, PagePool, Visible};
use bytemuck::Zeroable;

/// What every stored scale lacks of its factor.
fn lacking(row: &RowFormat) -> f32 {
    match row.scaling() {
        Scaling::None | Scaling::Corrected => 1.0,
        Scaling::Norm => scale_unit(row),
        Scaling::BlockRms => 1.0 / scale_unit(row),
    }
}

/// `factors`: what brings keys and values to the units of the operation's own rows.
fn near_params(gpu: &Gpu, op: &Attention, near: &op::Near, original: bool, factors: [f32; 2]) -> Result<Near> {
    let side = |pool: &PagePool, own: &PagePool| -> Result<Side> {
        let (tables, target) = (gpu.tables(pool.row())?, gpu.tables(own.row())?);
        let side = Side::new(pool, &tables, tables.levels, original);
        // The domain of the operation's own rows is what its queries are turned to, too.
        let rotated = (original && own.row().is_rotated() && !pool.row().is_rotated()) as u32;
        Ok(Side { turn: Turn { rotated, ..target.turn }, ..side })
    };
    let [spans, table] = batch_addresses(&near.batch)?;
    Ok(Near {
        key: side(&near.key, &op.key)?,
        value: side(&near.value, &op.value)?,
        spans,
        table,
        width: near.batch.width() as u32,
        page_size: near.key.page_size() as u32,
        causal: near.visible.causal as u32,
        window: window(near.visible.window),
        key_factor: factors[0],
        value_factor: factors[1],
    })
}

/// Of the sequences with few queries.
pub(super) fn tensor(
    gpu: &Gpu,
    op: &Attention,
    variant: &Variant,
    sequences: &Sequences,
    to: &mut Recording,
) -> Result<()> {
    let (key, value) = (op.key.row(), op.value.row());
    let (k_tables, v_tables) = (gpu.tables(key)?, gpu.tables(value)?);
    let (kv_heads, group, rows) = (op.key.kv_heads(), op.heads / op.key.kv_heads(), 8 * variant.tiles_n);
    let problem = Problem {
        kv_heads,
        group,
        rows,
        tile: variant.tile,
        warps: variant.warps,
        blocks: gpu.multiprocessors(),
        visible: Visible { causal: op.params.causal, window: op.params.window },
    };
    let planned = DevicePlan::get(gpu, &op.batch, problem, variant.short, sequences)?;
    // A new one; the others come with the batch's own refresh.
    if planned.is_to_be_made() {
        refresh::make(gpu, &op.batch, &planned, to)?;
    }
    let parts = problem.most_parts();
    let sums = parts * rows * value.row_dim() * 4;
    // Of each row a maximum and a sum, f32 or f64.
    let ml = parts * rows * 8 * variant.parts;
    let [partial, counters] = lock(&gpu.workspace).parts(&gpu.stream, sums + ml, parts * 4)?;
    let original = op.params.domain == Domain::Original;
    let mut near = [Near::zeroed(); 2];
    for (near, of) in near.iter_mut().zip(&op.near) {
        *near = near_params(gpu, op, of, original, [k_tables.gain / lacking(key), v_tables.gain / lacking(value)])?;
    }
    let sides = [(&*k_tables, k_tables.tensor_levels), (&*v_tables, v_tables.tensor_levels)];
    let params = Params {
        items: planned.items.address,
        partial: partial.address,
        partial_ml: partial.address + sums as u64,
        counters: counters.address,
        q_scale: op.params.scale * lacking(key) / k_tables.gain,
        out_scale: lacking(value) / v_tables.gain,
        // Levels have an rms of one, but for rows that no encoder makes.
        key_length: 1.25 * (key.row_dim() as f32).sqrt() * k_tables.gain,
        near,
        ..Params::of(op, sides)?
    };
    let key = variant.key.for_pools([&op.key, &op.value]);
    gpu.launch(&key, problem.blocks as u32, &params, to)?;
    to.memory.extend([partial, counters, planned.items.clone()]);
    Ok(())
}
