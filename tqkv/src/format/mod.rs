//! The codec as data: bits, packing, codebooks, signs, scales and sizes. No I/O, no threads, no GPU.
//!
//! A *vector* is the K or V of one KV head at one position: `head_dim` floats. A *row* is what it is stored as:
//! `row_bytes` bytes of codes and `scales_per_row` scales. `docs/format.md` describes every byte.

mod codec;
mod dtype;
mod encoding;
pub mod exact;
mod packing;
mod row;
mod scalar;
mod scaling;
mod signs;
pub(crate) mod tables;

pub use codec::{Codec, CodecPair};
pub use dtype::{DType, Element};
pub use encoding::Encoding;
pub use packing::Packing;
pub use row::RowFormat;
pub use scalar::Codebook;
#[cfg_attr(not(feature = "cuda"), allow(unused_imports))]
pub(crate) use scalar::cells::Cells;
pub use scaling::Scaling;
pub use signs::SignWords;

/// The version of the stored bytes. It changes when the same bytes would decode to other values.
pub const FORMAT_VERSION: u32 = 2;

/// The largest head_dim that any codec takes.
pub const MAX_HEAD_DIM: usize = 1024;

/// A row has a multiple of so many elements, so that it is whole bytes at every width.
pub const ROW_STEP: usize = 16;

/// A norm at or under this encodes as the zero vector.
pub const ZERO_NORM: f32 = 1e-10;

#[cfg(test)]
mod tests;
