//! What a cache is made for.

use crate::error::{Error, Result, checked_product, to_u32};
use crate::format::{Codec, CodecPair, RowFormat};
use crate::problem::{Visible, check_geometry};
use std::collections::{BTreeMap, BTreeSet};

/// Which positions a layer keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerKind {
    /// All.
    Full,
    /// The newest so many that a query sees, its own among them; pages that no later query can see are freed.
    Window(usize),
    /// None of its own: it reads those of an earlier layer, which must not be shared itself.
    Shared(usize),
}

/// The first positions of a layer kept apart: in codecs of their own, never dropped, and seen by every later query whatever
/// the window (attention sinks; Xiao et al., arXiv:2309.17453).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sinks {
    /// How many; none if 0.
    pub positions: usize,
    /// How they are stored.
    pub codec: CodecPair,
}

/// Which positions of a sequence a group of layers holds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Extent {
    All,
    /// A window: the newest so many, and what else their pages hold.
    Newest(usize),
    /// Sinks: the first so many.
    First(usize),
}

impl Extent {
    /// The parts of a layer: its positions, and its sinks if it has any.
    pub fn of(kind: LayerKind, sinks: usize) -> impl Iterator<Item = Extent> {
        let own = match kind {
            LayerKind::Full => Some(Extent::All),
            LayerKind::Window(window) => Some(Extent::Newest(window)),
            LayerKind::Shared(_) => None,
        };
        own.into_iter().chain((own.is_some() && sinks > 0).then_some(Extent::First(sinks)))
    }

    /// One past the newest position held of a sequence of so many.
    pub fn end(self, len: usize) -> usize {
        if let Extent::First(sinks) = self { len.min(sinks) } else { len }
    }

    /// The oldest position that the next token of a sequence of so many looks back to.
    pub fn seen(self, len: usize) -> usize {
        let window = if let Extent::Newest(window) = self { Some(window) } else { None };
        Visible { causal: true, window }.oldest(len).min(len)
    }

    /// Whether the next token of a sequence of so many sees none of them: then none needs to be there.
    pub fn sees_nothing(self, len: usize) -> bool {
        self.seen(len) >= self.end(len)
    }

    /// Positions of a page where a page of all positions has `page_size`: a sequence's sinks fill one, if they fit. Even, so
    /// that pages are whole words.
    pub fn page_size(self, page_size: usize) -> usize {
        match self {
            Extent::First(sinks) => sinks.min(page_size).checked_next_multiple_of(2).unwrap_or(page_size),
            _ => page_size,
        }
    }
}

/// Geometry, codecs and layer kinds of a [`KvCache`](super::KvCache). Checked as a whole by [`CacheConfig::bytes`].
#[derive(Clone, Debug, PartialEq)]
pub struct CacheConfig {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    codec: CodecPair,
    codec_at: BTreeMap<usize, CodecPair>,
    kind_at: BTreeMap<usize, LayerKind>,
    sinks: Option<Sinks>,
    sinks_at: BTreeMap<usize, Sinks>,
    page_size: usize,
    capacity: usize,
    window_capacity: Option<usize>,
    sink_sequences: Option<usize>,
}

impl CacheConfig {
    /// A cache for a model with so many layers, KV heads and elements a head: 4 bits on both sides, pages of 64
    /// positions, room for 4096, every layer full.
    pub fn new(layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        CacheConfig {
            layers,
            kv_heads,
            head_dim,
            codec: CodecPair::both(Codec::tq(4)),
            codec_at: BTreeMap::new(),
            kind_at: BTreeMap::new(),
            sinks: None,
            sinks_at: BTreeMap::new(),
            page_size: 64,
            capacity: 4096,
            window_capacity: None,
            sink_sequences: None,
        }
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

    /// KV heads.
    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    /// Elements of a vector.
    pub fn head_dim(&self) -> usize {
        self.head_dim
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
        }
    }

    /// Bytes that the cache will take, before it is made.
    ///
    /// # Errors
    /// [`Error::Zero`] for a count or window of 0, [`Error::Bits`] and [`Error::HeadDim`] for a codec that does not fit,
    /// [`Error::Layer`] for settings of a layer that does not exist, [`Error::Mismatch`] for a page_size that is no multiple
    /// of 8 or a layer that shares with one that is not before it or is shared itself, [`Error::SizeOverflow`].
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
            ("kv_heads", self.kv_heads),
            ("page_size", self.page_size),
            ("capacity", self.capacity),
            ("window_capacity", self.window_capacity.unwrap_or(1)),
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
        let special: BTreeSet<usize> =
            self.codec_at.keys().chain(self.kind_at.keys()).chain(self.sinks_at.keys()).copied().collect();
        if let Some(&layer) = special.iter().find(|&&l| l >= self.layers) {
            return Err(Error::Layer { got: layer, layers: self.layers });
        }
        let overflow = || Error::SizeOverflow { what: "cache size", limit: "isize" };
        let part = |extent: Extent, pair: CodecPair| {
            let (pages, page_size) = (self.pages(extent), extent.page_size(self.page_size));
            to_u32("pages", pages)?;
            let (key, value) = (RowFormat::new(pair.key, self.head_dim)?, RowFormat::new(pair.value, self.head_dim)?);
            let bytes = checked_product("cache size", &[pages, page_size, self.kv_heads, key.bytes() + value.bytes()])?;
            for row in [key, value] {
                check_geometry(&row, self.kv_heads, page_size, pages)?;
            }
            Ok(bytes)
        };
        let bytes_of = |kind: LayerKind, codec: CodecPair, sinks: Option<Sinks>| {
            // A shared layer takes nothing, but its codecs must exist.
            for codec in [codec.key, codec.value] {
                RowFormat::new(codec, self.head_dim)?;
            }
            Extent::of(kind, sinks.map_or(0, |s| s.positions)).try_fold(0usize, |sum, extent| {
                let codec = if let (Extent::First(_), Some(s)) = (extent, sinks) { s.codec } else { codec };
                sum.checked_add(part(extent, codec)?).ok_or_else(overflow)
            })
        };
        // Layers without settings of their own are alike, however many.
        let usual = bytes_of(LayerKind::Full, self.codec, self.sinks)?;
        let mut total = checked_product("cache size", &[usual, self.layers - special.len()])?;
        for layer in special {
            match self.layer_kind(layer) {
                LayerKind::Shared(with) if with >= layer || matches!(self.layer_kind(with), LayerKind::Shared(_)) => {
                    let expected = format!("a layer before {layer} that holds positions of its own");
                    return Err(Error::Mismatch { what: "shared layer", got: with, expected });
                }
                LayerKind::Window(0) => return Err(Error::Zero { what: "window" }),
                kind => {
                    let bytes = bytes_of(kind, self.layer_codec(layer), self.layer_sinks(layer))?;
                    total = total.checked_add(bytes).filter(|&n| n <= isize::MAX as usize).ok_or_else(overflow)?;
                }
            }
        }
        Ok(total)
    }
}
