//! The cache of a model: sequences that append, attend, truncate and fork over one pool of pages.
//!
//! | file | duty |
//! |---|---|
//! | `config` | what a cache is made for |
//! | `codecs` | the codecs of all extents, and their name |
//! | `extent` | which positions are stored together: all, a window, sinks, the newest |
//! | `pages` | which page belongs to whom, and how full it is |
//! | `state` | the cache's pools and sequences |
//! | `sequences` | add, fork, truncate, free |
//! | `reserve` | the pages that new positions need, taken and given back |
//! | `plan` | where the positions of a step are written, and what its queries read |
//! | `append`, `attend`, `decode` | one layer's positions in and out |
//! | `step` | all layers of a model step, as one thing |
//! | `replay` | a step recorded once, for any number of tokens |
//! | `usage` | how full a cache is |
//! | `snapshot` | caches in files |
//! | `prefix_store` | prefixes in an object store |

mod append;
mod attend;
mod codecs;
mod config;
mod decode;
mod extent;
mod pages;
mod plan;
#[cfg(feature = "prefix-store")]
mod prefix_store;
mod replay;
mod reserve;
#[cfg(test)]
mod scale_tests;
mod sequences;
mod snapshot;
mod state;
mod step;
mod usage;

pub use codecs::CacheCodec;
pub use config::{CacheConfig, Heads};
pub use extent::{LayerKind, RECENT_SLACK, Recent, Sinks};
#[cfg(feature = "prefix-store")]
pub use prefix_store::{FoundPrefix, PrefixStore, Prompt, StoredPrefix};
pub use replay::{CapturedStep, Replay};
pub use snapshot::{
    ExtentGeometry, Geometry, Label, LayerGeometry, MAX_FINGERPRINT, MAX_NOTE, SNAPSHOT_VERSION, Snapshot,
};
pub use state::{KvCache, SequenceId, Side};
pub use step::Step;
pub use usage::Usage;
