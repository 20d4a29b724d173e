//! Caches in files: save and load, whatever the backend. `docs/snapshot.md` describes every byte.

mod geometry;
mod header;
mod inspect;
mod load;
mod overlap;
mod save;
mod source;
mod transfer;

#[cfg(feature = "prefix-store")]
pub(super) use geometry::GroupGeometry;
pub use geometry::{ExtentGeometry, Geometry, LayerGeometry};
pub use header::{Label, MAX_FINGERPRINT, MAX_NOTE, SNAPSHOT_VERSION, Snapshot};
#[cfg(feature = "prefix-store")]
pub(super) use header::{encode_apart, encode_heads, encode_layer};
#[cfg(feature = "prefix-store")]
pub(super) use transfer::Stored;
