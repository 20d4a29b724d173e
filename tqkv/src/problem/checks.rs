//! Checks that several operations make.

use crate::compute::Buffer;
use crate::error::{Error, Result};
use crate::format::DType;

pub(crate) fn expect_float(what: &'static str, buffer: &Buffer) -> Result<()> {
    if !buffer.dtype().is_float() {
        return Err(Error::DType { what, got: buffer.dtype().name(), expected: "f32, f16 or bf16" });
    }
    Ok(())
}

pub(crate) fn expect_f32(what: &'static str, buffer: &Buffer) -> Result<()> {
    if buffer.dtype() != DType::F32 {
        return Err(Error::DType { what, got: buffer.dtype().name(), expected: "f32" });
    }
    Ok(())
}

pub(crate) fn expect_shape(what: &'static str, buffer: &Buffer, shape: &[usize]) -> Result<()> {
    if buffer.shape() != shape {
        return Err(Error::shape(what, buffer.shape(), format!("{shape:?}")));
    }
    Ok(())
}

/// Fails if `written` shares memory with one of `others`.
pub(crate) fn expect_apart<'a>(
    what: &'static str,
    written: &Buffer,
    others: impl IntoIterator<Item = &'a Buffer>,
) -> Result<()> {
    if others.into_iter().any(|o| o.shares_memory(written)) {
        return Err(Error::Aliased { what });
    }
    Ok(())
}
