//! The cache back into floats.

use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::problem::checks::{expect_apart, expect_float, expect_shape};
use crate::problem::op::{Dequantize, Op};
use crate::problem::{Batch, Domain, PagePool, Positions, RowOrder};

/// Decodes positions of one sequence of a batch into `out`: f32, f16 or bf16, in the order that `order` says, in the
/// rotated domain (bit-exact on every backend: level · factor, rounded once more for f16 and bf16) or restored. A pool's
/// [`ChannelMap`](super::ChannelMap) is undone in the original domain: x · scale + shift. In the rotated domain rows are as they are stored.
///
/// # Errors
/// [`Error::Positions`] for a position that the sequence does not hold, [`Error::Mismatch`] for a sequence that the batch
/// lacks, [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], [`Error::Page`], [`Error::Aliased`].
///
/// ```
/// use tqkv::format::RowFormat;
/// use tqkv::ops::{Batch, Domain, PagePool, RowOrder, Span, dequantize, quantize};
/// use tqkv::{Codec, DType, Device};
///
/// let device = Device::cpu();
/// let pool = PagePool::new(&device, RowFormat::new(Codec::tq(8), 64)?, 1, 8, 1)?;
/// let batch = Batch::new(&device, 8, &[Span { first: 0, len: 2, new: 2, pages: &[0] }])?;
/// let x: Vec<f32> = (0..2 * 64).map(|i| (i as f32).sin()).collect();
/// let stored = device.upload(&x, &[2, 1, 64])?;
/// let out = device.zeros(DType::F32, &[2, 1, 64])?;
/// let mut encoder = device.encoder()?;
/// quantize(&mut encoder, &[(&stored, &pool)], &batch)?;
/// dequantize(&mut encoder, &pool, &batch, 0, 0..2, Domain::Original, RowOrder::TokenMajor, &out)?;
/// encoder.submit_and_wait()?;
/// // With 8 bits an element the error is below a hundredth of a vector's length.
/// for (got, want) in out.read::<f32>()?.chunks(64).zip(x.chunks(64)) {
///     let (error, length) = got.iter().zip(want).fold((0.0, 0.0), |(e, l), (g, w)| (e + (g - w).powi(2), l + w * w));
///     assert!(error.sqrt() < 0.01 * length.sqrt());
/// }
/// # Ok::<(), tqkv::Error>(())
/// ```
#[allow(clippy::too_many_arguments)] // Each is a thing of its own.
pub fn dequantize(
    encoder: &mut CommandEncoder,
    pool: &PagePool,
    batch: &Batch,
    sequence: usize,
    positions: impl Into<Positions>,
    domain: Domain,
    order: RowOrder,
    out: &Buffer,
) -> Result<()> {
    let positions = positions.into();
    encoder.expect_own("pool", pool.codes())?;
    encoder.expect_device("batch", batch.device())?;
    encoder.expect_own("out", out)?;
    batch.expect_within(pool)?;
    let Some(span) = batch.spans().get(sequence) else {
        let expected = format!("less than the batch's {}", batch.sequences());
        return Err(Error::Mismatch { what: "sequence", got: sequence, expected });
    };
    let (first, len) = (span.first as usize, span.len as usize);
    let held = |start: usize, end: usize| {
        if first <= start && end <= len { Ok(()) } else { Err(Error::Positions { start, end, first, len }) }
    };
    match &positions {
        Positions::Range(r) if r.is_empty() => {}
        Positions::Range(r) => held(r.start, r.end)?,
        Positions::List(list) => list.iter().try_for_each(|&p| held(p as usize, p as usize + 1))?,
    }
    expect_float("out", out)?;
    let (n, kv_heads, head_dim) = (positions.len(), pool.kv_heads(), domain.dim(pool.row()));
    match order {
        RowOrder::TokenMajor => expect_shape("out", out, &[n, kv_heads, head_dim])?,
        RowOrder::HeadMajor => expect_shape("out", out, &[kv_heads, n, head_dim])?,
    }
    expect_apart("out", out, pool.buffers())?;
    if n == 0 {
        return Ok(());
    }
    Op::Dequantize(Dequantize {
        pool: pool.clone(),
        batch: batch.clone(),
        sequence,
        positions,
        domain,
        order,
        out: out.clone(),
    })
    .record(encoder)
}
