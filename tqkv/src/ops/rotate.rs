//! The orthogonal transform by itself.

use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::format::RowFormat;
use crate::problem::Direction;
use crate::problem::checks::{expect_apart, expect_float, expect_shape};
use crate::problem::op::{Op, Rotate};

/// Rotates vectors as `row`'s codec does before it stores them, or undoes that: y = T·S·x forward, x = S·T·y inverse,
/// with S the signs and T the normalised Walsh-Hadamard transform (see [`RowFormat::block`]). Dense codecs copy.
///
/// What is not rotated is \[..., head_dim\], what is rotated \[..., row_dim\], of any float type each. `out` may be `x` itself where
/// both have one size.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], and [`Error::Aliased`] if `out` overlaps `x` without
/// being the same view.
///
/// ```
/// use tqkv::{Codec, Device, format::RowFormat, ops::{Direction, rotate}};
/// let device = Device::cpu();
/// let row = RowFormat::new(Codec::tq(4), 80)?;
/// let x = device.upload(&[1.0f32; 160], &[2, 80])?;
/// let mut encoder = device.encoder()?;
/// rotate(&mut encoder, &row, Direction::Forward, &x, &x)?;
/// rotate(&mut encoder, &row, Direction::Inverse, &x, &x)?;
/// encoder.submit_and_wait()?;
/// assert!(x.read::<f32>()?.iter().all(|v| (v - 1.0).abs() < 1e-5));
/// # Ok::<(), tqkv::Error>(())
/// ```
pub fn rotate(
    encoder: &mut CommandEncoder,
    row: &RowFormat,
    direction: Direction,
    x: &Buffer,
    out: &Buffer,
) -> Result<()> {
    encoder.expect_own("x", x)?;
    encoder.expect_own("out", out)?;
    expect_float("x", x)?;
    expect_float("out", out)?;
    let (x_dim, out_dim) = match direction {
        Direction::Forward => (row.head_dim(), row.row_dim()),
        Direction::Inverse => (row.row_dim(), row.head_dim()),
    };
    let Some((_, rows)) = x.shape().split_last().filter(|(last, _)| **last == x_dim) else {
        return Err(Error::shape("x", x.shape(), format!("[..., {x_dim}]")));
    };
    expect_shape("out", out, &[rows, &[out_dim]].concat())?;
    let same_view = x.address() == out.address() && x.dtype() == out.dtype() && x_dim == out_dim;
    if !same_view {
        expect_apart("out", out, [x])?;
    }
    if x.is_empty() {
        return Ok(());
    }
    Op::Rotate(Rotate { row: *row, direction, x: x.clone(), out: out.clone() }).record(encoder)
}
