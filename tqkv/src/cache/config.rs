//! What a cache is made for.

use crate::error::{Error, Result, checked_product, to_u32};
use crate::format::{Codec, CodecPair, RowFormat};
use std::collections::BTreeMap;

/// Geometry and codecs of a [`KvCache`](super::KvCache). Checked as a whole by [`CacheConfig::bytes`].
#[derive(Clone, Debug, PartialEq)]
pub struct CacheConfig {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    codec: CodecPair,
    by_layer: BTreeMap<usize, CodecPair>,
    pub(super) page_size: usize,
    capacity: usize,
}

impl CacheConfig {
    /// A cache for a model with so many layers, KV heads and elements a head: 4 bits on both sides, pages of 64
    /// positions, room for 4096.
    pub fn new(layers: usize, kv_heads: usize, head_dim: usize) -> Self {
        CacheConfig {
            layers,
            kv_heads,
            head_dim,
            codec: CodecPair::both(Codec::tq(4)),
            by_layer: BTreeMap::new(),
            page_size: 64,
            capacity: 4096,
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
        self.by_layer.insert(layer, codec);
        self
    }

    /// Positions of a page.
    pub fn page_size(mut self, positions: usize) -> Self {
        self.page_size = positions;
        self
    }

    /// Positions that all sequences together can hold, rounded up to pages.
    pub fn capacity(mut self, positions: usize) -> Self {
        self.capacity = positions;
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

    /// The codecs of a layer.
    pub fn codec_of(&self, layer: usize) -> CodecPair {
        self.by_layer.get(&layer).copied().unwrap_or(self.codec)
    }

    pub(super) fn pages(&self) -> usize {
        self.capacity.div_ceil(self.page_size)
    }

    /// Bytes that the cache will take, before it is made.
    ///
    /// # Errors
    /// [`Error::Zero`] for a count of 0, [`Error::Bits`] and [`Error::HeadDim`] for a codec that does not fit,
    /// [`Error::Layer`] for codecs of a layer that does not exist, [`Error::SizeOverflow`].
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
        ];
        for (what, n) in counts {
            if n == 0 {
                return Err(Error::Zero { what });
            }
        }
        if let Some((&layer, _)) = self.by_layer.iter().find(|(l, _)| **l >= self.layers) {
            return Err(Error::Layer { got: layer, layers: self.layers });
        }
        to_u32("pages", self.pages())?;
        let rows = checked_product("cache size", &[self.pages(), self.page_size, self.kv_heads])?;
        // All layers that name no codecs of their own are alike.
        let mut row_bytes = 0usize;
        let plain = self.layers - self.by_layer.len();
        for (pair, layers) in self.by_layer.values().map(|p| (p, 1)).chain([(&self.codec, plain)]) {
            let (key, value) = (RowFormat::new(pair.key, self.head_dim)?, RowFormat::new(pair.value, self.head_dim)?);
            let bytes = checked_product("cache size", &[key.bytes() + value.bytes(), layers])?;
            row_bytes =
                row_bytes.checked_add(bytes).ok_or(Error::SizeOverflow { what: "cache size", limit: "isize" })?;
        }
        checked_product("cache size", &[rows, row_bytes])
    }
}
