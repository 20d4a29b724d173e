//! A shift and a scale for each channel of a layer's keys.

use super::checks::expect_shape;
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product};

/// Shift and scale of the channels of keys, for each KV head: a key k is stored as the row of (k - shift) / scale.
///
/// Real keys have a large mean and channels of very different size, which a rotation spreads over everything it stores.
/// Attention undoes both without a cost a position: q·k = (q·scale)·k' + q·shift, so the query is multiplied by `scale` before
/// it is rotated, and q·shift, the same for all positions, is added where scores count as such (log-sum-exp, softcap, logits of
/// sinks). All pools whose results are merged may have maps of their own.
///
/// ```
/// use tqkv::{Codec, Device, format::RowFormat, ops::{ChannelMap, PagePool}};
/// let device = Device::cpu();
/// let map = ChannelMap::new(&device, 2, 64, &[1.5; 2 * 64], &[0.5; 2 * 64])?;   // 2 KV heads of 64 channels
/// let pool = PagePool::new(&device, RowFormat::new(Codec::tq(4), 64)?, 2, 16, 4)?.with_channels(&map)?;
/// assert!(pool.channels().is_some());
/// # Ok::<(), tqkv::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChannelMap {
    /// f32 [3, kv_heads, head_dim]: shift, 1 / scale, scale.
    values: Buffer,
}

impl ChannelMap {
    /// `shift` and `scale` are \[kv_heads, head_dim\], in the model's own domain (after RoPE).
    ///
    /// # Errors
    /// [`Error::Zero`] for a count of 0, [`Error::Shape`] for another number of elements, [`Error::Parameter`] for a shift that is
    /// not finite, or a scale that is not positive or whose inverse is not finite; those of [`Device::zeros`].
    pub fn new(device: &Device, kv_heads: usize, head_dim: usize, shift: &[f32], scale: &[f32]) -> Result<Self> {
        ChannelMap::check(kv_heads, head_dim, shift, scale)?;
        let inverse = scale.iter().map(|x| 1.0 / x);
        let values: Vec<f32> = shift.iter().copied().chain(inverse).chain(scale.iter().copied()).collect();
        Ok(ChannelMap { values: device.upload(&values, &[3, kv_heads, head_dim])? })
    }

    /// Fails as [`new`](ChannelMap::new) does, but for the device.
    pub(crate) fn check(kv_heads: usize, head_dim: usize, shift: &[f32], scale: &[f32]) -> Result<()> {
        for (what, n) in [("kv_heads", kv_heads), ("head_dim", head_dim)] {
            if n == 0 {
                return Err(Error::Zero { what });
            }
        }
        let n = checked_product("channels", &[kv_heads, head_dim])?;
        for (what, values) in [("shift", shift), ("scale", scale)] {
            if values.len() != n {
                return Err(Error::shape(what, &[values.len()], format!("[{kv_heads}, {head_dim}]")));
            }
        }
        if let Some(&got) = shift.iter().find(|x| !x.is_finite()) {
            return Err(Error::Parameter { name: "shift", got, expected: "finite" });
        }
        let usable = |x: f32| x > 0.0 && x.is_normal() && (1.0 / x).is_normal();
        if let Some(&got) = scale.iter().find(|&&x| !usable(x)) {
            return Err(Error::Parameter {
                name: "scale of a channel",
                got,
                expected: "positive, with a finite inverse",
            });
        }
        Ok(())
    }

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.values.shape()[1]
    }

    /// Elements of a key.
    pub fn head_dim(&self) -> usize {
        self.values.shape()[2]
    }

    /// f32 [3, kv_heads, head_dim]: shift, 1 / scale, scale.
    pub(crate) fn values(&self) -> &Buffer {
        &self.values
    }

    /// Fails unless it is for rows of a pool like this on `device`.
    pub(super) fn expect_for(&self, device: &Device, kv_heads: usize, head_dim: usize) -> Result<()> {
        expect_shape("channels", &self.values, &[3, kv_heads, head_dim])?;
        match self.values.device() == device {
            true => Ok(()),
            false => Err(Error::wrong_device("channels", self.values.device(), device)),
        }
    }
}
