//! What a cache is made for.

use crate::error::{Error, Result, checked_product, to_u32};
use crate::format::{Codec, CodecPair, RowFormat};
use crate::ops::check_geometry;
use std::collections::BTreeMap;

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

/// Geometry, codecs and layer kinds of a [`KvCache`](super::KvCache). Checked as a whole by [`CacheConfig::bytes`].
#[derive(Clone, Debug, PartialEq)]
pub struct CacheConfig {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    codec: CodecPair,
    codec_at: BTreeMap<usize, CodecPair>,
    kind_at: BTreeMap<usize, LayerKind>,
    page_size: usize,
    capacity: usize,
    window_capacity: Option<usize>,
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
            page_size: 64,
            capacity: 4096,
            window_capacity: None,
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

    /// Pages of each layer of this kind.
    pub(super) fn pages(&self, kind: LayerKind) -> usize {
        let positions = match kind {
            LayerKind::Full => self.capacity,
            LayerKind::Window(_) => self.window_capacity.unwrap_or(self.capacity),
            LayerKind::Shared(_) => 0,
        };
        positions.div_ceil(self.page_size)
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
        if let Some(&layer) = self.codec_at.keys().chain(self.kind_at.keys()).find(|&&l| l >= self.layers) {
            return Err(Error::Layer { got: layer, layers: self.layers });
        }
        let overflow = || Error::SizeOverflow { what: "cache size", limit: "isize" };
        let bytes_of = |kind: LayerKind, pair: CodecPair, layers: usize| {
            let (key, value) = (RowFormat::new(pair.key, self.head_dim)?, RowFormat::new(pair.value, self.head_dim)?);
            to_u32("pages", self.pages(kind))?;
            let factors = [self.pages(kind), self.page_size, self.kv_heads, key.bytes() + value.bytes(), layers];
            let bytes = checked_product("cache size", &factors)?;
            for row in [key, value] {
                // A shared layer has no pages of its own.
                check_geometry(&row, self.kv_heads, self.page_size, self.pages(kind).max(1))?;
            }
            Ok(bytes)
        };
        // Layers without settings of their own are alike, however many.
        let special: std::collections::BTreeSet<usize> =
            self.codec_at.keys().chain(self.kind_at.keys()).copied().collect();
        let mut total = bytes_of(LayerKind::Full, self.codec, self.layers - special.len())?;
        for layer in special {
            match self.layer_kind(layer) {
                LayerKind::Shared(with) if with >= layer || matches!(self.layer_kind(with), LayerKind::Shared(_)) => {
                    let expected = format!("a layer before {layer} that holds positions of its own");
                    return Err(Error::Mismatch { what: "shared layer", got: with, expected });
                }
                LayerKind::Window(0) => return Err(Error::Zero { what: "window" }),
                kind => {
                    let bytes = bytes_of(kind, self.layer_codec(layer), 1)?;
                    total = total.checked_add(bytes).filter(|&n| n <= isize::MAX as usize).ok_or_else(overflow)?;
                }
            }
        }
        Ok(total)
    }
}
