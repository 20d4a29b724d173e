//! Floats into the cache.

use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::problem::checks::{expect_apart, expect_float, expect_shape};
use crate::problem::op::{Op, Quantize};
use crate::problem::{Batch, PagePool};

/// Encodes the new positions of every sequence of a batch into pools, in one launch.
///
/// Each part is an input \[tokens, kv_heads, head_dim\] (f32, f16 or bf16; tokens in the batch's order) and the pool that
/// takes it: usually K and V of a layer. The encoder's arithmetic is fixed to the last bit (`docs/format.md`). A vector
/// whose f32 norm is not finite (it holds NaN, infinity, or values near 1e19) is stored as code 0 and scale NaN, so that
/// everything decoded from it is NaN.
///
/// A pool with a [`ChannelMap`](super::ChannelMap) stores (x - shift) · (1 / scale), each operation rounded.
///
/// # Errors
/// [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], [`Error::Mismatch`] or [`Error::Page`] if the batch does not
/// fit a pool, [`Error::Aliased`] if a page would be written from two places or an argument shares memory with a pool.
///
/// ```
/// use tqkv::{Codec, Device, format::RowFormat, ops::{Batch, PagePool, quantize}};
/// let device = Device::cpu();
/// let row = RowFormat::new(Codec::tq(4), 128)?;
/// let pool = PagePool::new(&device, row, 8, 64, 1)?;          // 8 KV heads, 64 positions
/// let k = device.upload(&vec![0.5f32; 3 * 8 * 128], &[3, 8, 128])?;
/// let mut encoder = device.encoder()?;
/// quantize(&mut encoder, &[(&k, &pool)], &Batch::contiguous(&device, 64, 0, 3, 3)?)?;
/// encoder.submit_and_wait()?;
/// # Ok::<(), tqkv::Error>(())
/// ```
pub fn quantize(encoder: &mut CommandEncoder, parts: &[(&Buffer, &PagePool)], batch: &Batch) -> Result<()> {
    check_quantize(encoder, parts, batch)?;
    record_quantize(encoder, &[(parts.to_vec(), batch)])
}

/// Fails as [`quantize`] does, and records nothing.
pub(crate) fn check_quantize(encoder: &CommandEncoder, parts: &[(&Buffer, &PagePool)], batch: &Batch) -> Result<()> {
    if parts.is_empty() {
        return Err(Error::Zero { what: "parts" });
    }
    encoder.expect_device("batch", batch.device())?;
    for (i, (x, pool)) in parts.iter().enumerate() {
        encoder.expect_own("x", x)?;
        encoder.expect_own("pool", pool.codes())?;
        expect_float("x", x)?;
        expect_shape("x", x, &[batch.tokens(), pool.kv_heads(), pool.row().head_dim()])?;
        batch.expect_within(pool)?;
        for buffer in pool.buffers() {
            expect_apart("pool", buffer, parts.iter().map(|(x, _)| *x))?;
        }
        if parts[..i].iter().any(|(_, other)| pool.overlaps(other)) {
            return Err(Error::Aliased { what: "pool" });
        }
    }
    batch.expect_writes_apart()
}

/// What is written to some pools.
pub(crate) type Writes<'a> = (Vec<(&'a Buffer, &'a PagePool)>, &'a Batch);

/// Records what [`check_quantize`] has checked, of pools that are all different.
pub(crate) fn record_quantize(encoder: &mut CommandEncoder, all: &[Writes]) -> Result<()> {
    let ops: Vec<_> = all
        .iter()
        .filter(|(_, batch)| batch.tokens() > 0)
        .map(|(parts, batch)| {
            let parts = parts.iter().map(|(x, pool)| ((*x).clone(), (*pool).clone())).collect();
            Quantize { parts, batch: (*batch).clone() }
        })
        .collect();
    if ops.is_empty() { Ok(()) } else { Op::Quantize(ops).record(encoder) }
}
