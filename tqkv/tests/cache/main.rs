//! The cache's rules one by one. Random schedules are in `checks/tests/schedules.rs`.

mod rules;
#[path = "../support/mod.rs"]
mod support;

use proptest::prelude::*;
use std::collections::HashMap;
use support::*;
use tqkv::cache::{Heads, LayerKind, Side, Sinks};
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache, SequenceId, reference};

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

/// The oldest position, sinks apart, that a layer's query at `position` sees.
fn window_start(layer: usize, position: usize) -> usize {
    match config().layer_kind(source(layer)) {
        LayerKind::Window(window) => (position + 1).saturating_sub(window),
        _ => 0,
    }
}

/// Rolling back to `len` may fail only because a window has dropped positions that the next token would see: there must be
/// some.
fn expect_dropped(error: &Error, len: usize) {
    let Error::Positions { start, first, .. } = *error else { panic!("{error}") };
    assert!(start < len && start < first, "{error}: nothing stands in the way of {len}");
}

/// How many first positions a layer keeps apart.
fn sinks(layer: usize) -> usize {
    config().layer_sinks(source(layer)).map_or(0, |s| s.positions)
}

/// How a layer stores one side of a position.
fn row(layer: usize, side: Side, position: usize) -> RowFormat {
    let sinks = config().layer_sinks(layer).filter(|s| position < s.positions);
    let pair = sinks.map_or(config().layer_codec(layer), |s| s.codec);
    RowFormat::new(if side == Side::Key { pair.key } else { pair.value }, D).unwrap()
}

fn number(id: SequenceId) -> u64 {
    format!("{id:?}").chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
}
