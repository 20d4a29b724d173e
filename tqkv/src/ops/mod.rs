//! The operations. Each validates its arguments once, then records; nothing below it checks again.
//!
//! Cached vectors lie in a [`PagePool`]; a [`Batch`] says where the positions of some sequences are and which of them
//! are new. One batch serves all layers of a model step.

mod attention;
mod batch;
mod copy;
mod dequantize;
mod merge;
mod pool;
mod quantize;
mod rotate;

pub use attention::{AttentionParams, attention};
#[cfg_attr(not(feature = "cuda"), allow(unused_imports))]
pub(crate) use batch::SpanInfo;
pub use batch::{Batch, NO_PAGE, Span};
pub use copy::copy;
pub use dequantize::{Positions, RowOrder, dequantize};
pub use merge::merge;
pub use pool::PagePool;
pub(crate) use pool::check_geometry;
pub use quantize::quantize;
pub(crate) use quantize::{check_quantize, record_quantize};
pub use rotate::{Direction, rotate};

use crate::compute::{Buffer, DType};
use crate::error::{Error, Result};

/// Which basis vectors are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    /// The model's own: what was given to [`quantize`].
    Original,
    /// After signs and transform: what is stored. Dot products are the same in both.
    Rotated,
}

fn expect_float(what: &'static str, buffer: &Buffer) -> Result<()> {
    if !buffer.dtype().is_float() {
        return Err(Error::DType { what, got: buffer.dtype(), expected: "f32, f16 or bf16" });
    }
    Ok(())
}

fn expect_f32(what: &'static str, buffer: &Buffer) -> Result<()> {
    if buffer.dtype() != DType::F32 {
        return Err(Error::DType { what, got: buffer.dtype(), expected: "f32" });
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
