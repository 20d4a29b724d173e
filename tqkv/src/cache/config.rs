//! What a cache is made for.

use super::extent::{Extent, LayerKind, Recent, Sinks};
use crate::error::{Error, Result, checked_product, to_u32};
use crate::format::{Codec, CodecPair, Encoding, RowFormat};
use crate::problem::{ChannelMap, check_geometry};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Shift and scale of the channels of a layer's keys (see [`ChannelMap`]), f32 \[kv_heads, head_dim\] each.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Channels {
    pub shift: Arc<[f32]>,
    pub scale: Arc<[f32]>,
}

impl Channels {
    /// What tells these values from others: XXH3 of all their bytes.
    pub fn digest(&self) -> u64 {
        let bytes = [&self.shift, &self.scale].into_iter().flat_map(|x| x.iter().flat_map(|x| x.to_le_bytes()));
        xxhash_rust::xxh3::xxh3_64(&bytes.collect::<Vec<u8>>())
    }
}

/// The KV heads of a layer and the elements of their vectors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Heads {
    /// How many.
    pub kv_heads: usize,
    /// Elements of a key.
    pub head_dim: usize,
    /// Elements of a value. No kernel takes other values than keys yet, so a cache must have `head_dim` here.
    pub value_dim: usize,
}

impl Heads {
    /// So many, with keys and values of `head_dim` elements.
    pub fn new(kv_heads: usize, head_dim: usize) -> Self {
        Heads { kv_heads, head_dim, value_dim: head_dim }
    }

    /// Values of other elements than keys.
    pub fn value_dim(self, value_dim: usize) -> Self {
        Heads { value_dim, ..self }
    }

    /// How a layer of these heads stores keys and values.
    pub(super) fn rows(self, codec: CodecPair) -> Result<[RowFormat; 2]> {
        Ok([RowFormat::new(codec.key, self.head_dim)?, RowFormat::new(codec.value, self.value_dim)?])
    }

    fn check(self) -> Result<()> {
        if self.kv_heads == 0 {
            return Err(Error::Zero { what: "kv_heads" });
        }
        if self.value_dim != self.head_dim {
            let expected = format!("{} as in the keys", self.head_dim);
            return Err(Error::Mismatch { what: "head_dim of the values", got: self.value_dim, expected });
        }
        Ok(())
    }
}

/// Geometry, codecs and layer kinds of a [`KvCache`](super::KvCache). Checked as a whole by [`CacheConfig::bytes`].
#[derive(Clone, Debug, PartialEq)]
pub struct CacheConfig {
    layers: usize,
    heads: Heads,
    heads_at: BTreeMap<usize, Heads>,
    channels_at: BTreeMap<usize, Channels>,
    encoding: Encoding,
    codec: CodecPair,
    codec_at: BTreeMap<usize, CodecPair>,
    kind_at: BTreeMap<usize, LayerKind>,
    sinks: Option<Sinks>,
    sinks_at: BTreeMap<usize, Sinks>,
    recent: Option<Recent>,
    recent_at: BTreeMap<usize, Recent>,
    page_size: usize,
    capacity: usize,
    window_capacity: Option<usize>,
    recent_capacity: Option<usize>,
    sink_sequences: Option<usize>,
}

impl CacheConfig {
    /// A cache for a model with so many layers, KV heads and elements a head: 4 bits on both sides, pages of 64
    /// positions, room for 4096, every layer full.
    pub fn new(layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        CacheConfig {
            layers,
            heads: Heads::new(kv_heads, head_dim),
            heads_at: BTreeMap::new(),
            channels_at: BTreeMap::new(),
            encoding: Encoding::default(),
            codec: CodecPair::both(Codec::tq(4)),
            codec_at: BTreeMap::new(),
            kind_at: BTreeMap::new(),
            sinks: None,
            sinks_at: BTreeMap::new(),
            recent: None,
            recent_at: BTreeMap::new(),
            page_size: 64,
            capacity: 4096,
            window_capacity: None,
            recent_capacity: None,
            sink_sequences: None,
        }
    }

    /// How codes are chosen when vectors are stored. It is no part of what a cache holds: snapshots and prefixes do not tell.
    ///
    /// ```
    /// use tqkv::{CacheConfig, Device, KvCache, format::Encoding};
    /// let config = CacheConfig::new(2, 2, 64).encoding(Encoding::Search);
    /// let cache = KvCache::new(&Device::cpu(), config)?;
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn encoding(mut self, encoding: Encoding) -> Self {
        self.encoding = encoding;
        self
    }

    /// The codecs of keys and values.
    pub fn codec(mut self, codec: CodecPair) -> Self {
        self.codec = codec;
        self
    }

    /// The codec of keys.
    pub fn key(mut self, codec: Codec) -> Self {
        self.codec.key = codec;
        self
    }

    /// The codec of values.
    pub fn value(mut self, codec: Codec) -> Self {
        self.codec.value = codec;
        self
    }

    /// Other heads in one layer, with elements of their own: Gemma 4, say, has layers of 256 and of 512. Layers that share have
    /// those of the other layer.
    pub fn heads_at(mut self, layer: usize, heads: Heads) -> Self {
        self.heads_at.insert(layer, heads);
        self
    }

    /// Shifts and scales the channels of one layer's keys before they are stored, in all that the layer stores: see
    /// [`ops::ChannelMap`](crate::ops::ChannelMap). Both are \[kv_heads, head_dim\]. `tqkv calibrate` measures them.
    ///
    /// ```
    /// use tqkv::{CacheConfig, Device, KvCache};
    /// let config = CacheConfig::new(1, 2, 64).channels_at(0, vec![0.5; 2 * 64], vec![2.0; 2 * 64]);
    /// let cache = KvCache::new(&Device::cpu(), config)?;
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn channels_at(mut self, layer: usize, shift: impl Into<Arc<[f32]>>, scale: impl Into<Arc<[f32]>>) -> Self {
        self.channels_at.insert(layer, Channels { shift: shift.into(), scale: scale.into() });
        self
    }

    /// Other codecs in one layer.
    pub fn codec_at(mut self, layer: usize, codec: CodecPair) -> Self {
        self.codec_at.insert(layer, codec);
        self
    }

    /// Other codecs in the first and the last `n` layers, which lose most by compression.
    pub fn codec_at_ends(mut self, n: usize, codec: CodecPair) -> Self {
        let n = n.min(self.layers);
        self.codec_at.extend((0..n).chain(self.layers - n..self.layers).map(|layer| (layer, codec)));
        self
    }

    /// What one layer keeps.
    pub fn kind_at(mut self, layer: usize, kind: LayerKind) -> Self {
        self.kind_at.insert(layer, kind);
        self
    }

    /// Keeps the first positions of every layer apart. Their pages are small: a sequence's sinks fill one, or pages of
    /// [`page_size`](CacheConfig::page_size) if they are more than that. Layers that share have those of the other layer.
    pub fn sinks(mut self, sinks: Sinks) -> Self {
        self.sinks = Some(sinks);
        self
    }

    /// Other sinks in one layer.
    pub fn sinks_at(mut self, layer: usize, sinks: Sinks) -> Self {
        self.sinks_at.insert(layer, sinks);
        self
    }

    /// Keeps the newest positions of every layer in codecs of their own, beside all. Layers that share have those of the other layer.
    ///
    /// ```
    /// use tqkv::{CacheConfig, cache::Recent};
    /// // Three bits for everything, eight for the newest 64 positions of each query.
    /// let recent = Recent { positions: 64, codec: "k8v8".parse()? };
    /// let config = CacheConfig::new(32, 8, 128).codec("k3v3".parse()?).recent(recent);
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn recent(mut self, recent: Recent) -> Self {
        self.recent = Some(recent);
        self
    }

    /// Other newest positions in one layer.
    pub fn recent_at(mut self, layer: usize, recent: Recent) -> Self {
        self.recent_at.insert(layer, recent);
        self
    }

    /// Positions that all sequences together can hold as their newest, rounded up to pages; if not set, as
    /// [`capacity`](CacheConfig::capacity), 4096 at most. A sequence needs its newest positions, [`RECENT_SLACK`](super::RECENT_SLACK) more, the tokens of
    /// its largest append, and a page.
    pub fn recent_capacity(mut self, positions: usize) -> Self {
        self.recent_capacity = Some(positions);
        self
    }

    /// Sequences that can hold sinks at a time, those counted once that share them; if not set, as many as
    /// [`capacity`](CacheConfig::capacity) has pages.
    pub fn sink_sequences(mut self, sequences: usize) -> Self {
        self.sink_sequences = Some(sequences);
        self
    }

    /// Positions of a page, a multiple of 8 (so that pages are whole words at every width).
    pub fn page_size(mut self, positions: usize) -> Self {
        self.page_size = positions;
        self
    }

    /// Positions that all sequences together can hold in a full layer, rounded up to pages.
    pub fn capacity(mut self, positions: usize) -> Self {
        self.capacity = positions;
        self
    }

    /// Positions that all sequences together can hold in a windowed layer, rounded up to pages; as
    /// [`capacity`](CacheConfig::capacity) if not set. A sequence needs its window, the tokens of its largest append, and
    /// a page.
    pub fn window_capacity(mut self, positions: usize) -> Self {
        self.window_capacity = Some(positions);
        self
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// KV heads of the layers that have none of their own ([`heads_at`](CacheConfig::heads_at)).
    pub fn kv_heads(&self) -> usize {
        self.heads.kv_heads
    }

    /// Elements of a vector in the layers that have no heads of their own.
    pub fn head_dim(&self) -> usize {
        self.heads.head_dim
    }

    /// The heads of a layer; of a shared one, those that it reads.
    pub fn layer_heads(&self, layer: usize) -> Heads {
        let layer = if let LayerKind::Shared(source) = self.layer_kind(layer) { source } else { layer };
        self.heads_at.get(&layer).copied().unwrap_or(self.heads)
    }

    pub(crate) fn encodes(&self) -> Encoding {
        self.encoding
    }

    /// The channels of a layer's keys, if they are shifted and scaled.
    pub(crate) fn layer_channels(&self, layer: usize) -> Option<&Channels> {
        self.channels_at.get(&layer)
    }

    /// Positions of a page.
    pub fn positions_per_page(&self) -> usize {
        self.page_size
    }

    /// The codecs of a layer.
    pub fn layer_codec(&self, layer: usize) -> CodecPair {
        self.codec_at.get(&layer).copied().unwrap_or(self.codec)
    }

    /// What a layer keeps.
    pub fn layer_kind(&self, layer: usize) -> LayerKind {
        self.kind_at.get(&layer).copied().unwrap_or(LayerKind::Full)
    }

    /// The sinks of a layer, if it holds any of its own.
    pub fn layer_sinks(&self, layer: usize) -> Option<Sinks> {
        let sinks = self.sinks_at.get(&layer).copied().or(self.sinks);
        sinks.filter(|s| s.positions > 0 && !matches!(self.layer_kind(layer), LayerKind::Shared(_)))
    }

    /// The newest positions that a layer stores a second time, if it does.
    pub fn layer_recent(&self, layer: usize) -> Option<Recent> {
        let recent = self.recent_at.get(&layer).copied().or(self.recent);
        recent.filter(|r| r.positions > 0 && !matches!(self.layer_kind(layer), LayerKind::Shared(_)))
    }

    /// What a layer stores: each extent with its codecs.
    pub(super) fn layer_extents(&self, layer: usize) -> Vec<(Extent, CodecPair)> {
        let own = (self.layer_codec(layer), self.layer_sinks(layer), self.layer_recent(layer));
        Extent::of(self.layer_kind(layer), own.0, own.1, own.2)
    }

    /// Pages of each layer's part of this extent.
    pub(super) fn pages(&self, extent: Extent) -> usize {
        let full = self.capacity.div_ceil(self.page_size);
        match extent {
            Extent::All => full,
            Extent::Newest(_) => self.window_capacity.map_or(full, |positions| positions.div_ceil(self.page_size)),
            Extent::First(sinks) => {
                let each = sinks.div_ceil(extent.page_size(self.page_size));
                self.sink_sequences.unwrap_or(full).saturating_mul(each)
            }
            Extent::Recent(_) => self.recent_capacity.unwrap_or(self.capacity.min(4096)).div_ceil(self.page_size),
        }
    }

    /// Bytes of the pages that the cache will take, before it is made.
    ///
    /// # Errors
    /// [`Error::Zero`] for a count or window of 0, [`Error::Bits`] and [`Error::HeadDim`] for a codec that does not fit,
    /// [`Error::Layer`] for settings of a layer that does not exist, [`Error::Mismatch`] for a page_size that is no multiple
    /// of 8 or a layer that shares with one that is not before it or is shared itself, [`Error::SharedLayer`] for channels of a
    /// shared layer and those of [`ChannelMap::new`](crate::ops::ChannelMap::new), [`Error::SizeOverflow`].
    ///
    /// ```
    /// use tqkv::CacheConfig;
    /// // 32 layers, 8 KV heads of 128, 4.125 bits an element, 131072 positions: 4.1 GiB.
    /// let bytes = CacheConfig::new(32, 8, 128).capacity(131_072).bytes()?;
    /// assert_eq!(bytes, 32 * 8 * 131_072 * 2 * (64 + 2));
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn bytes(&self) -> Result<usize> {
        let counts = [
            ("layers", self.layers),
            ("page_size", self.page_size),
            ("capacity", self.capacity),
            ("window_capacity", self.window_capacity.unwrap_or(1)),
            ("recent_capacity", self.recent_capacity.unwrap_or(1)),
            ("sink_sequences", self.sink_sequences.unwrap_or(1)),
        ];
        for (what, n) in counts {
            if n == 0 {
                return Err(Error::Zero { what });
            }
        }
        if !self.page_size.is_multiple_of(8) {
            let expected = "a multiple of 8".to_owned();
            return Err(Error::Mismatch { what: "page_size", got: self.page_size, expected });
        }
        let (codecs, kinds) = (self.codec_at.keys(), self.kind_at.keys());
        let special = codecs
            .chain(kinds)
            .chain(self.sinks_at.keys())
            .chain(self.heads_at.keys())
            .chain(self.channels_at.keys())
            .chain(self.recent_at.keys());
        let special: BTreeSet<usize> = special.copied().collect();
        if let Some(&layer) = special.iter().find(|&&l| l >= self.layers) {
            return Err(Error::Layer { got: layer, layers: self.layers });
        }
        let overflow = || Error::SizeOverflow { what: "cache size", limit: "isize" };
        // Layers without settings of their own are alike, however many.
        let usual = Extent::of(LayerKind::Full, self.codec, self.sinks, self.recent);
        let usual = self.layer_bytes(self.heads, self.codec, &usual)?;
        let mut total = checked_product("cache size", &[usual, self.layers - special.len()])?;
        for layer in special {
            self.check_kind(layer)?;
            let (heads, kind) = (self.layer_heads(layer), self.layer_kind(layer));
            if let Some(Channels { shift, scale }) = self.channels_at.get(&layer) {
                if let LayerKind::Shared(source_layer) = kind {
                    return Err(Error::SharedLayer { layer, source_layer });
                }
                ChannelMap::check(heads.kv_heads, heads.head_dim, shift, scale)?;
            }
            let bytes = self.layer_bytes(heads, self.layer_codec(layer), &self.layer_extents(layer))?;
            total = total.checked_add(bytes).filter(|&n| n <= isize::MAX as usize).ok_or_else(overflow)?;
        }
        Ok(total)
    }

    /// Fails unless a layer's kind, and its heads if it shares, can be.
    fn check_kind(&self, layer: usize) -> Result<()> {
        let shared = match self.layer_kind(layer) {
            LayerKind::Full => return Ok(()),
            LayerKind::Window(0) => return Err(Error::Zero { what: "window" }),
            LayerKind::Window(_) => return Ok(()),
            LayerKind::Shared(with) => with,
        };
        if shared >= layer || matches!(self.layer_kind(shared), LayerKind::Shared(_)) {
            let expected = format!("a layer before {layer} that holds positions of its own");
            return Err(Error::Mismatch { what: "shared layer", got: shared, expected });
        }
        let (own, read) = (self.heads_at.get(&layer), self.layer_heads(layer));
        if let Some(own) = own.filter(|own| **own != read) {
            let (what, got, expected) = match own.kv_heads == read.kv_heads {
                true => ("head_dim of a shared layer", own.head_dim, read.head_dim),
                false => ("kv_heads of a shared layer", own.kv_heads, read.kv_heads),
            };
            return Err(Error::Mismatch { what, got, expected: format!("{expected} as in layer {shared}") });
        }
        Ok(())
    }

    /// Bytes of a layer: none if it is shared, but its heads and codecs must exist.
    fn layer_bytes(&self, heads: Heads, codec: CodecPair, extents: &[(Extent, CodecPair)]) -> Result<usize> {
        heads.check()?;
        heads.rows(codec)?;
        let mut sum = 0usize;
        for &(extent, codec) in extents {
            let (pages, page_size) = (self.pages(extent), extent.page_size(self.page_size));
            to_u32("pages", pages)?;
            let rows = heads.rows(codec)?;
            let row = rows.iter().map(RowFormat::bytes).sum();
            let bytes = checked_product("cache size", &[pages, page_size, heads.kv_heads, row])?;
            rows.iter().try_for_each(|row| check_geometry(row, heads.kv_heads, page_size, pages))?;
            sum = sum.checked_add(bytes).ok_or(Error::SizeOverflow { what: "cache size", limit: "isize" })?;
        }
        Ok(sum)
    }
}
