//! The cache back into floats.

use super::{Batch, Domain, PagePool, expect_apart, expect_float, expect_shape};
use crate::backend::{Dequantize, Op};
use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use std::ops::Range;

/// Which positions to decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Consecutive ones.
    Range(Range<usize>),
    /// Any, in any order, repeats allowed.
    List(Vec<u32>),
}

impl Positions {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Positions::Range(r) => r.len(),
            Positions::List(l) => l.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is one, and none is `end` or more.
    pub(crate) fn all_below(&self, end: usize) -> bool {
        match self {
            Positions::Range(r) => !r.is_empty() && r.end <= end,
            Positions::List(l) => !l.is_empty() && l.iter().all(|&p| (p as usize) < end),
        }
    }

    pub(crate) fn get(&self, i: usize) -> usize {
        match self {
            Positions::Range(r) => r.start + i,
            Positions::List(l) => l[i] as usize,
        }
    }
}

impl From<Range<usize>> for Positions {
    fn from(range: Range<usize>) -> Self {
        Positions::Range(range)
    }
}

impl From<usize> for Positions {
    /// A single position (`usize::MAX` gives the empty range, which decodes nothing).
    fn from(position: usize) -> Self {
        Positions::Range(position..position.saturating_add(1))
    }
}

/// The order of axes of a decoded block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// \[positions, kv_heads, head_dim\], as [`quantize`](super::quantize) takes it.
    TokenMajor,
    /// \[kv_heads, positions, head_dim\], as mlx-native gives it.
    HeadMajor,
}

/// Decodes positions of one sequence of a batch into `out`: f32, f16 or bf16, in the order that `order` says, in the
/// rotated domain (bit-exact on every backend: level · factor, rounded once more for f16 and bf16) or restored.
///
/// # Errors
/// [`Error::Positions`] for a position that the sequence does not hold, [`Error::Mismatch`] for a sequence that the batch
/// lacks, [`Error::Shape`], [`Error::DType`], [`Error::WrongDevice`], [`Error::Page`], [`Error::Aliased`].
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
    encoder.expect_own("batch", batch.device_table())?;
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
    let (n, kv_heads, head_dim) = (positions.len(), pool.kv_heads(), pool.row().head_dim());
    match order {
        RowOrder::TokenMajor => expect_shape("out", out, &[n, kv_heads, head_dim])?,
        RowOrder::HeadMajor => expect_shape("out", out, &[kv_heads, n, head_dim])?,
    }
    expect_apart("out", out, pool.buffers())?;
    if n == 0 {
        return Ok(());
    }
    encoder.record(Op::Dequantize(Dequantize {
        pool: pool.clone(),
        batch: batch.clone(),
        sequence,
        positions,
        domain,
        order,
        out: out.clone(),
    }))
}
