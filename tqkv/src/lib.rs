//! A KV cache that stays compressed by TurboQuant, and attention straight over the compressed bytes.
//!
//! | module | duty |
//! |---|---|
//! | [`mod@format`] | the codec as data: bits, packing, codebooks, signs, scales, sizes |
//! | [`mod@reference`] | the naive oracle that judges every backend |
//! | [`compute`] | [`Device`], [`Buffer`], [`CommandEncoder`], [`KernelRegistry`](compute::KernelRegistry): memory and submission |
//! | [`ops`] | the operations: rotate, quantize, dequantize, attention, merge |
//! | [`cache`] | [`KvCache`]: sequences that append, attend, truncate, fork, save, load |
//! | `mlx` (feature `mlx`, on by default) | mlx-native's names and argument order over `ops`, so that its callers can move |

#![deny(missing_docs)]

mod backend;
pub mod cache;
pub mod compute;
mod error;
pub mod format;
#[cfg(feature = "mlx")]
pub mod mlx;
mod open;
pub mod ops;
mod problem;
pub mod reference;

pub use cache::{CacheConfig, KvCache, SequenceId, Snapshot};
#[cfg(feature = "prefix-store")]
pub use cache::{PrefixStore, Prompt};
pub use compute::{Buffer, CommandEncoder, DType, Device, Element};
pub use error::{Error, Result, SnapshotPart};
pub use format::{Codec, CodecPair};
/// The wgpu that [`Device::from_wgpu`] and [`Buffer::from_wgpu`] speak of.
#[cfg(feature = "wgpu")]
pub use wgpu;

/// The guides' snippets, compiled and run by `cargo test --doc`.
#[cfg(doctest)]
mod guides {
    #[doc = include_str!("../../README.md")]
    struct Readme;
    #[doc = include_str!("../README.md")]
    struct OwnReadme;
    #[doc = include_str!("../../docs/rust.md")]
    struct Rust;
    #[doc = include_str!("../../docs/turboquant.md")]
    struct TurboQuant;
    #[cfg(feature = "mlx")]
    #[doc = include_str!("../../docs/from-mlx-native.md")]
    struct FromMlxNative;
    #[doc = include_str!("../../docs/format.md")]
    struct Format;
}
