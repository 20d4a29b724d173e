//! Floats into the cache.

use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result, to_u32};
use crate::format::DType;
use crate::problem::checks::{expect_apart, expect_float, expect_shape};
use crate::problem::op::{Op, Places, Quantize};
use crate::problem::{Batch, PagePool, check_integers};

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
    encoder.expect_device("batch", batch.device())?;
    parts.iter().try_for_each(|(_, pool)| batch.expect_within(pool))?;
    check_parts(encoder, parts, batch.tokens())?;
    batch.expect_writes_apart()
}

/// Fails unless inputs of so many tokens fit their pools.
fn check_parts(encoder: &CommandEncoder, parts: &[(&Buffer, &PagePool)], tokens: usize) -> Result<()> {
    if parts.is_empty() {
        return Err(Error::Zero { what: "parts" });
    }
    for (i, (x, pool)) in parts.iter().enumerate() {
        encoder.expect_own("x", x)?;
        encoder.expect_own("pool", pool.codes())?;
        expect_float("x", x)?;
        expect_shape("x", x, &[tokens, pool.kv_heads(), pool.row().head_dim()])?;
        for buffer in pool.buffers() {
            expect_apart("pool", buffer, parts.iter().map(|(x, _)| *x))?;
        }
        if parts[..i].iter().any(|(_, other)| pool.overlaps(other)) {
            return Err(Error::Aliased { what: "pool" });
        }
    }
    Ok(())
}

/// Encodes vectors into slots that lie in the device's memory, in one launch: token i of every part goes to slot `slots[i]`, which is
/// page · page_size + row, or nowhere if it is -1. Slots are integers of 32 or 64 bits ([`DType::U32`], which stands for signed ones too, or
/// [`DType::I64`]), \[tokens\]. Vectors are encoded as [`quantize`] does.
///
/// A slot that no pool has is not written: `out_of_range`, u32 \[1\], is increased by one for each. No two tokens may name one slot: its bytes
/// would be those of either, or of both (on the CPU it is an error).
///
/// ```
/// use tqkv::{Codec, Device, format::RowFormat, ops::{PagePool, quantize_at}};
/// let device = Device::cpu();
/// let pool = PagePool::new(&device, RowFormat::new(Codec::tq(4), 128)?, 8, 16, 4)?;
/// let k = device.upload(&vec![0.5f32; 3 * 8 * 128], &[3, 8, 128])?;
/// // Row 5 of page 2, nowhere, row 6 of page 2.
/// let slots = device.upload(&[37i64, -1, 38], &[3])?;
/// let mut encoder = device.encoder()?;
/// quantize_at(&mut encoder, &[(&k, &pool)], &slots, None)?;
/// encoder.submit_and_wait()?;
/// # Ok::<(), tqkv::Error>(())
/// ```
///
/// # Errors
/// Those of [`quantize`]; [`Error::Mismatch`] for pools of different pages or page sizes; [`Error::Unsupported`] on wgpu.
pub fn quantize_at(
    encoder: &mut CommandEncoder,
    parts: &[(&Buffer, &PagePool)],
    slots: &Buffer,
    out_of_range: Option<&Buffer>,
) -> Result<()> {
    let &[tokens] = slots.shape() else {
        return Err(Error::shape("slots", slots.shape(), "[tokens]"));
    };
    encoder.expect_own("slots", slots)?;
    check_integers(slots.device(), "slots", slots, tokens)?;
    check_parts(encoder, parts, tokens)?;
    to_u32("tokens", tokens)?;
    let inputs = || parts.iter().map(|(x, _)| *x).chain([slots]);
    if let Some(count) = out_of_range {
        encoder.expect_own("out_of_range", count)?;
        if count.dtype() != DType::U32 {
            return Err(Error::DType { what: "out_of_range", got: count.dtype().name(), expected: "u32" });
        }
        expect_shape("out_of_range", count, &[1])?;
        expect_apart("out_of_range", count, inputs().chain(parts.iter().flat_map(|(_, pool)| pool.buffers())))?;
    }
    for (_, pool) in parts {
        let first = parts[0].1;
        for (what, got, expected) in [
            ("page_size of a pool", pool.page_size(), first.page_size()),
            ("pages of a pool", pool.pages(), first.pages()),
        ] {
            if got != expected {
                return Err(Error::Mismatch { what, got, expected: format!("{expected} as in the first") });
            }
        }
        pool.buffers().try_for_each(|buffer| expect_apart("pool", buffer, [slots]))?;
    }
    if tokens == 0 {
        return Ok(());
    }
    let parts = parts.iter().map(|(x, pool)| ((*x).clone(), (*pool).clone())).collect();
    let places = Places::Slots { slots: slots.clone(), out_of_range: out_of_range.cloned() };
    Op::Quantize(vec![Quantize { parts, places }]).record(encoder)
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
            Quantize { parts, places: Places::Batch((*batch).clone()) }
        })
        .collect();
    if ops.is_empty() { Ok(()) } else { Op::Quantize(ops).record(encoder) }
}
