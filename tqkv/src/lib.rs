//! A KV cache that stays compressed by TurboQuant, and attention straight over the compressed bytes.
//!
//! | module | duty |
//! |---|---|
//! | [`format`] | the codec as data: bits, packing, codebooks, signs, scales, sizes |
//! | [`reference`] | the naive oracle that judges every backend |
//! | [`compute`] | [`Device`], [`Buffer`], [`CommandEncoder`], [`KernelRegistry`](compute::KernelRegistry): memory and submission |
//! | [`ops`] | the operations: rotate, quantize, dequantize, attention, merge |
//! | [`cache`] | [`KvCache`]: sequences that append, attend, truncate, fork, save, load |

#![deny(missing_docs)]

mod backend;
pub mod cache;
pub mod compute;
mod error;
pub mod format;
pub mod ops;
pub mod reference;

#[cfg(feature = "prefix-store")]
pub use cache::PrefixStore;
pub use cache::{CacheConfig, KvCache, SequenceId, Snapshot};
pub use compute::{Buffer, CommandEncoder, DType, Device, Element};
pub use error::{Error, Result, SnapshotPart};
pub use format::{Codec, CodecPair};
