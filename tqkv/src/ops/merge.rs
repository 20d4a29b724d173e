//! Partial attention results into one.

use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::problem::checks::{expect_apart, expect_f32, expect_float, expect_shape};
use crate::problem::op::{Merge, Op};

/// Joins attention over disjoint sets of positions: out = Σ oᵢ·exp(lseᵢ) / Σ exp(lseᵢ), lse = ln Σ exp(lseᵢ).
///
/// Parts and `out` are \[tokens, heads, head_dim\] of any float type, their lse \[tokens, heads\] f32. A sink must be
/// counted in one part only. Flash-Decoding's last step; with all lse at -∞ the result is zeros and -∞.
///
/// # Errors
/// [`Error::Zero`] without parts, [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], [`Error::Aliased`].
///
/// ```
/// use tqkv::{DType, Device, ops::merge};
///
/// let device = Device::cpu();
/// // One token, one head, head_dim 2: the second part has three times the first one's weight.
/// let (a, a_lse) = (device.upload(&[1f32, 0.0], &[1, 1, 2])?, device.upload(&[0f32], &[1, 1])?);
/// let (b, b_lse) = (device.upload(&[0f32, 1.0], &[1, 1, 2])?, device.upload(&[3f32.ln()], &[1, 1])?);
/// let (out, lse) = (device.zeros(DType::F32, &[1, 1, 2])?, device.zeros(DType::F32, &[1, 1])?);
/// let mut encoder = device.encoder()?;
/// merge(&mut encoder, &[(&a, &a_lse), (&b, &b_lse)], &out, Some(&lse))?;
/// encoder.submit_and_wait()?;
/// let near = |got: f32, want: f32| (got - want).abs() < 1e-6;
/// assert!(out.read::<f32>()?.iter().zip([0.25, 0.75]).all(|(&got, want)| near(got, want)));
/// assert!(near(lse.read::<f32>()?[0], 4f32.ln()));
/// # Ok::<(), tqkv::Error>(())
/// ```
pub fn merge(
    encoder: &mut CommandEncoder,
    parts: &[(&Buffer, &Buffer)],
    out: &Buffer,
    lse: Option<&Buffer>,
) -> Result<()> {
    let &[tokens, heads, _] = out.shape() else {
        return Err(Error::shape("out", out.shape(), "[tokens, heads, head_dim]"));
    };
    if parts.is_empty() {
        return Err(Error::Zero { what: "parts" });
    }
    encoder.expect_own("out", out)?;
    expect_float("out", out)?;
    for (o, l) in parts {
        encoder.expect_own("part", o)?;
        encoder.expect_own("lse of a part", l)?;
        expect_float("part", o)?;
        expect_f32("lse of a part", l)?;
        expect_shape("part", o, out.shape())?;
        expect_shape("lse of a part", l, &[tokens, heads])?;
    }
    let inputs = || parts.iter().flat_map(|(o, l)| [*o, *l]);
    expect_apart("out", out, inputs())?;
    if let Some(lse) = lse {
        encoder.expect_own("lse", lse)?;
        expect_f32("lse", lse)?;
        expect_shape("lse", lse, &[tokens, heads])?;
        expect_apart("lse", lse, inputs().chain([out]))?;
    }
    if out.is_empty() {
        return Ok(());
    }
    let parts = parts.iter().map(|(o, l)| ((*o).clone(), (*l).clone())).collect();
    Op::Merge(Merge { parts, out: out.clone(), lse: lse.cloned() }).record(encoder)
}
