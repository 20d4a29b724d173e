//! The cache that random steps use: every kind of layer and extent in one.

use crate::support::Rng;
use tqkv::cache::{LayerKind, Recent, Sinks};
use tqkv::{CacheConfig, CodecPair};

pub(crate) const KV_HEADS: usize = 2;
pub(crate) const HEADS: usize = 4;
pub(crate) const D: usize = 32;
pub(crate) const PAGE: usize = 8;
const CAPACITY: usize = 40 * PAGE;
pub(crate) const NEWEST: usize = 12;

/// Layers of the model's cache.
pub const LAYERS: usize = 12;

/// Full layers of two codecs, a windowed one, one that shares with the first; a windowed and a full layer with sinks, less
/// than a page of them and more, and one that shares with the former; layers that see nothing but the token itself, one of
/// them its sinks too; layers that store their newest positions apart: full with sinks, in a larger window, in a smaller one.
/// Keys of the first and of a layer with all extents are shifted and scaled.
pub fn config() -> CacheConfig {
    let pair = |name: &str| name.parse::<CodecPair>().expect("a pair of codecs");
    let sinks = |positions, codec| Sinks { positions, codec };
    let recent = Recent { positions: NEWEST, codec: pair("k8v8") };
    let (shift, scale) = channels();
    CacheConfig::new(LAYERS, KV_HEADS, D)
        .codec(pair("k5v4"))
        .codec_at(1, pair("k3v8"))
        .kind_at(2, LayerKind::Window(12))
        .kind_at(3, LayerKind::Shared(0))
        .kind_at(4, LayerKind::Window(12))
        .sinks_at(4, sinks(5, pair("f16")))
        .sinks_at(5, sinks(11, pair("k8v8")))
        .kind_at(6, LayerKind::Shared(4))
        .kind_at(7, LayerKind::Window(1))
        .kind_at(8, LayerKind::Window(1))
        .sinks_at(8, sinks(5, pair("f16")))
        .codec_at(9, pair("k3v3"))
        .sinks_at(9, sinks(5, pair("f16")))
        .recent_at(9, recent)
        .kind_at(10, LayerKind::Window(40))
        .recent_at(10, recent)
        .kind_at(11, LayerKind::Window(9))
        .recent_at(11, recent)
        .channels_at(0, shift.clone(), scale.clone())
        .channels_at(9, shift, scale)
        .sink_sequences(6)
        .page_size(PAGE)
        .capacity(CAPACITY)
}

/// Shift and scale of keys' channels.
pub(crate) fn channels() -> (Vec<f32>, Vec<f32>) {
    let mut rng = Rng(77);
    let scale = (0..KV_HEADS * D).map(|_| 2f32.powf(2.0 * rng.unit() as f32 - 1.0)).collect();
    (rng.normals(KV_HEADS * D), scale)
}
