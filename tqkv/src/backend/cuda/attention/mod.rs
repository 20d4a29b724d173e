//! Attention: `shape` is what of a problem decides how it is compiled, `variant` the choice, `layout` its shared memory, `plan` how work
//! is spread over blocks, `launch` the kernel on tensor cores, `plain` the one for everything else.

mod launch;
mod layout;
mod params;
mod plain;
mod plan;
mod shape;
mod variant;

#[cfg(test)]
pub(super) use plain::{plain_key, plain_rows};
#[cfg(test)]
pub(super) use shape::Shape;
#[cfg(test)]
pub(super) use variant::Variant;

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
/// which are as exact as f32. Shapes that the tensor-core kernel does not take are left to plain cores.
pub(super) fn attention(gpu: &Gpu, op: &Attention, to: &mut Recording) -> Result<()> {
    let limit = gpu.stream.context.limits.shared_memory as usize;
    match shape::Shape::of(op, gpu.multiprocessors()).and_then(|shape| variant::Variant::choose(&shape, limit)) {
        Some(variant) => launch::tensor(gpu, op, &variant, to),
        None => {
            static SAID: Once = Once::new();
            SAID.call_once(|| {
                let (q, key, value) = (op.q.dtype(), op.key.row(), op.value.row());
                tracing::warn!("attention on plain cores, which are several times slower (said once): {q} queries, keys {}, values {} of {} elements", key.codec(), value.codec(), key.row_dim());
            });
            plain::plain(gpu, op, to)
        }
    }
}
