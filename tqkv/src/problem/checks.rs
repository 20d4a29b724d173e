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

/// Fails if `written` overlaps one of `others`, or where kernels bind whole memories, if it is in one memory with them.
pub(crate) fn expect_apart<'a>(
    what: &'static str,
    written: &Buffer,
    others: impl IntoIterator<Item = &'a Buffer>,
) -> Result<()> {
    if others.into_iter().any(|o| o.overlaps(written) || bound_twice(o, written)) {
        return Err(Error::Aliased { what });
    }
    Ok(())
}

/// Whether kernels would have to bind one memory twice.
pub(crate) fn bound_twice(a: &Buffer, b: &Buffer) -> bool {
    a.device().driver().binds_storages() && a.shares_memory(b)
}
