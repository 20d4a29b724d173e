//! Attention: `shape` is what of a problem decides how it is compiled, `variant` the choice, `layout` its shared memory, `plan` how work
//! is spread over blocks, `device_plan` where plans are kept, `refresh` what makes them on the device, `launch` the kernel on tensor cores, `prefill` the one for many queries a sequence, `plain` the one for everything else.

mod device_plan;
mod launch;
mod layout;
mod params;
mod plain;
mod plan;
mod prefill;
mod refresh;
mod shape;
mod variant;

#[cfg(test)]
pub(super) use plain::{plain_key, plain_rows};
#[cfg(test)]
pub(super) use prefill::{Tiles, expand_key, prefill_key};
#[cfg(test)]
pub(super) use shape::Shape;
#[cfg(test)]
pub(super) use variant::Variant;

pub(super) use refresh::refresh;
#[cfg(test)]
pub(super) use refresh::refresh_key;

use super::gpu::{Gpu, Recording};
use crate::error::Result;
use crate::problem::op::Attention;
use std::sync::Once;

/// Whether one launch takes what lies elsewhere too.
pub(super) fn fuses(gpu: &Gpu, op: &Attention) -> bool {
    let limit = gpu.stream.context.limits.shared_memory as usize;
    shape::Shape::of(op, gpu.multiprocessors()).and_then(|shape| variant::Variant::choose(&shape, limit)).is_some()
}

/// Precision follows the queries' type: f16 and bf16 are answered by f16 products and f32 sums, f32 by products of numbers in two parts,
/// which are as exact as f32. Shapes that the tensor-core kernels do not take are left to plain cores. Sequences with many queries have a
/// kernel of their own where there is one.
pub(super) fn attention(gpu: &Gpu, op: &Attention, to: &mut Recording) -> Result<()> {
    let limit = gpu.stream.context.limits.shared_memory as usize;
    let Some(shape) = shape::Shape::of(op, gpu.multiprocessors()) else { return on_plain_cores(gpu, op, to) };
    let (sequences, prefill) = prefill::Prefill::of(gpu, op)?;
    if let Some(query_rows) = sequences.few.iter().map(|&s| shape::query_rows(op, s)).max() {
        match variant::Variant::choose(&shape::Shape { query_rows, ..shape }, limit) {
            Some(variant) => launch::tensor(gpu, op, &variant, &sequences, to)?,
            None => return on_plain_cores(gpu, op, to),
        }
    }
    prefill.map_or(Ok(()), |prefill| prefill.record(gpu, op, to))
}

fn on_plain_cores(gpu: &Gpu, op: &Attention, to: &mut Recording) -> Result<()> {
    static SAID: Once = Once::new();
    SAID.call_once(|| {
        let (q, key, value, dim) = (op.q.dtype(), op.key.row().codec(), op.value.row().codec(), op.key.row().row_dim());
        tracing::warn!("attention on plain cores, which are several times slower (said once): {q} queries, keys {key}, values {value} of {dim} elements");
    });
    plain::plain(gpu, op, to)
}
