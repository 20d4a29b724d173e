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

/// Precision follows the queries' type: f16 and bf16 are answered by tensor cores, in f16 products and f32 sums; f32 by plain
/// cores in f32, which is slower. So are shapes that the tensor-core kernel does not take.
pub(super) fn attention(gpu: &Gpu, op: &Attention, to: &mut Recording) -> Result<()> {
    let limit = gpu.stream.context.limits.shared_memory as usize;
    match shape::Shape::of(op, gpu.multiprocessors()).and_then(|shape| variant::Variant::choose(&shape, limit)) {
        Some(variant) => launch::tensor(gpu, op, &variant, to),
        None => plain::plain(gpu, op, to),
    }
}
