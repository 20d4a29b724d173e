//! The cache's rules one by one. Random schedules are in `checks/tests/schedules.rs`.

mod rules;
#[path = "../support/mod.rs"]
mod support;

use support::*;
use tqkv::cache::{Heads, LayerKind, Side, Sinks};
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache, SequenceId};

const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const D: usize = 32;
const PAGE: usize = 8;
const WINDOW: usize = 12;
const LAYERS: usize = 9;
const CAPACITY: usize = 40 * PAGE;
const SINK_SEQUENCES: usize = 6;

/// Full layers of two codecs, a windowed one, one that shares with the first; a windowed and a full layer with sinks, less
/// than a page of them and more, and one that shares with the former; layers that see nothing but the token itself, one of
/// them its sinks too.
fn config() -> CacheConfig {
    CacheConfig::new(LAYERS, KV_HEADS, D)
        .codec("k5v4".parse().unwrap())
        .codec_at(1, "k3v8".parse().unwrap())
        .kind_at(2, LayerKind::Window(WINDOW))
        .kind_at(3, LayerKind::Shared(0))
        .kind_at(4, LayerKind::Window(WINDOW))
        .sinks_at(4, Sinks { positions: 5, codec: CodecPair::both(Codec::F16) })
        .sinks_at(5, Sinks { positions: 11, codec: "k8v8".parse().unwrap() })
        .kind_at(6, LayerKind::Shared(4))
        .kind_at(7, LayerKind::Window(1))
        .kind_at(8, LayerKind::Window(1))
        .sinks_at(8, Sinks { positions: 5, codec: CodecPair::both(Codec::F16) })
        .sink_sequences(SINK_SEQUENCES)
        .page_size(PAGE)
        .capacity(CAPACITY)
}

/// The layer whose positions a layer reads.
fn source(layer: usize) -> usize {
    if let LayerKind::Shared(source) = config().layer_kind(layer) { source } else { layer }
}

fn number(id: SequenceId) -> u64 {
    format!("{id:?}").chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
}
