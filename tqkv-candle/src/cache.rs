//! The keys and values of one sequence: where the model meets tqkv.

use crate::attention::Attention;
use crate::error::Result;
use crate::eval::Peer;
use crate::models::ModelConfig;
use std::path::Path;
use tqkv::cache::Label;
use tqkv::{CacheConfig, Codec, CodecPair, Device, KvCache, SequenceId};

/// A [`KvCache`] that holds one sequence.
pub struct SequenceCache {
    attention: Attention,
    sequence: SequenceId,
}

impl SequenceCache {
    /// An empty cache; start from [`ModelConfig::cache_config`].
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        let mut attention = Attention::new(device, config)?;
        let sequence = attention.cache_mut().add_sequence();
        Ok(Self { attention, sequence })
    }

    /// An empty cache that stores rows as another project's format would give them back; `config` with codec f32.
    ///
    /// # Errors
    /// Those of [`SequenceCache::new`], and [`Error::PeerHeadDim`](crate::Error::PeerHeadDim).
    pub fn emulating(peer: Peer, config: CacheConfig, model: &ModelConfig) -> Result<Self> {
        peer.bits_per_element(model.head_dim)?;
        let mut cache = Self::new(&Device::cpu(), config.codec(CodecPair::both(Codec::F32)))?;
        cache.attention.set_tap(peer);
        Ok(cache)
    }

    /// The cache itself.
    pub fn kv(&self) -> &KvCache {
        self.attention.cache()
    }

    /// How many tokens the sequence has.
    pub fn tokens(&self) -> Result<usize> {
        Ok(self.kv().len(self.sequence)?)
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.attention.cache_mut().truncate(self.sequence, len)?)
    }

    /// Writes the sequence to a file; see [`KvCache::save`].
    pub fn save<'a>(&self, path: &Path, label: impl Into<Label<'a>>) -> Result<()> {
        Ok(self.kv().save(&[self.sequence], path, label)?)
    }

    /// Takes the sequence of a file in place of its own, whose pages it may use; see [`KvCache::load_into`]. On an error the
    /// cache holds what it held before.
    pub fn load(&mut self, path: &Path, fingerprint: &[u8]) -> Result<()> {
        Ok(self.attention.cache_mut().load_into(self.sequence, path, fingerprint)?)
    }

    /// The sequence.
    pub fn sequence(&self) -> SequenceId {
        self.sequence
    }

    pub(crate) fn attention_mut(&mut self) -> &mut Attention {
        &mut self.attention
    }
}
