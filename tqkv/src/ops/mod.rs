//! The operations. Each validates its arguments once, then records; nothing below it checks again.
//!
//! Cached vectors lie in a [`PagePool`]; a [`Batch`] says where the positions of some sequences are and which of them
//! are new. One batch serves all layers of a model step.

mod attention;
mod copy;
mod custom;
mod dequantize;
mod merge;
mod quantize;
mod refresh;
mod rotate;

pub use crate::problem::{
    AttentionParams, Batch, Bounds, ChannelMap, DeviceTables, Direction, Domain, Lengths, NO_PAGE, PagePool, Positions,
    Precision, RowOrder, Span, Strides,
};
pub use attention::attention;
pub(crate) use attention::{Part, attention_of_parts};
pub use copy::copy;
pub use dequantize::dequantize;
pub use merge::merge;
pub(crate) use quantize::{check_quantize, record_quantize};
pub use quantize::{quantize, quantize_at};
pub use refresh::refresh;
pub use rotate::rotate;
