//! The rotation by itself, for queries and outputs of attention.

use super::expect_256_or_512;
use crate::format::{Codec, RowFormat};
use crate::mlx::{CommandEncoder, DType, KernelRegistry, MlxBuffer, MlxDevice, Result};
use crate::ops::{Direction, rotate};

/// Rotates `data` f32 \[num_heads, head_dim\] in place as the encoder does: signs, then the normalised transform.
///
/// # Errors
/// [`MlxError::InvalidArgument`](crate::mlx::MlxError::InvalidArgument) for a head_dim other than 256 or 512 and a buffer
/// that is too small or of another type or device.
pub fn dispatch_fwht_sign_premult_f32(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    data: &MlxBuffer,
    num_heads: u32,
    head_dim: u32,
) -> Result<()> {
    in_place("fwht_sign_premult", encoder, device, Direction::Forward, data, num_heads, head_dim)
}

/// Undoes [`dispatch_fwht_sign_premult_f32`] in place: the transform, then signs.
///
/// # Errors
/// As [`dispatch_fwht_sign_premult_f32`].
pub fn dispatch_fwht_sign_undo_f32(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    data: &MlxBuffer,
    num_heads: u32,
    head_dim: u32,
) -> Result<()> {
    in_place("fwht_sign_undo", encoder, device, Direction::Inverse, data, num_heads, head_dim)
}

fn in_place(
    op: &str,
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    direction: Direction,
    data: &MlxBuffer,
    num_heads: u32,
    head_dim: u32,
) -> Result<()> {
    encoder.record(op, device, |encoder| {
        // All seed widths rotate alike.
        expect_256_or_512(4, head_dim)?;
        let row = RowFormat::new(Codec::seed(4), head_dim as usize)?;
        let data = data.view("data", DType::F32, &[num_heads as usize, head_dim as usize])?;
        rotate(encoder, &row, direction, &data, &data)
    })
}
