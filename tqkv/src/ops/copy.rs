//! Bytes from one place to another, on the device.

use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::problem::checks::expect_shape;
use crate::problem::op::{Copy, Op};

/// Copies `from` to `to`, which may be views of the same memory as long as they do not overlap.
///
/// # Errors
/// [`Error::Shape`] and [`Error::DType`] unless both are alike, [`Error::WrongDevice`], [`Error::Aliased`] if they overlap,
/// [`Error::Mismatch`] unless both start, and end, at multiples of 4 bytes of their memory (GPUs copy words).
pub fn copy(encoder: &mut CommandEncoder, from: &Buffer, to: &Buffer) -> Result<()> {
    encoder.expect_own("from", from)?;
    encoder.expect_own("to", to)?;
    expect_shape("to", to, from.shape())?;
    if to.dtype() != from.dtype() {
        return Err(Error::DType { what: "to", got: to.dtype().name(), expected: "the type that is copied" });
    }
    for (what, n) in [("offset of from", from.offset()), ("offset of to", to.offset()), ("bytes copied", from.bytes())]
    {
        if !n.is_multiple_of(4) {
            return Err(Error::Mismatch { what, got: n, expected: "a multiple of 4".to_owned() });
        }
    }
    if from.overlaps(to) {
        return Err(Error::Aliased { what: "to" });
    }
    if from.is_empty() {
        return Ok(());
    }
    Op::Copy(Copy { from: from.clone(), to: to.clone() }).record(encoder)
}
