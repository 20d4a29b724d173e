//! The keys and values of one sequence: where the model meets tqkv.

use crate::config::LlamaConfig;
use crate::error::Result;
use candle_core::Tensor;
use std::path::Path;
use tqkv::cache::Label;
use tqkv::ops::AttentionParams;
use tqkv::{CacheConfig, DType, Device, KvCache, SequenceId};

impl LlamaConfig {
    /// A cache for this model: 4 bits on both sides, room for the model's whole context. Change what differs.
    pub fn cache_config(&self) -> CacheConfig {
        CacheConfig::new(self.layers, self.kv_heads, self.head_dim).capacity(self.max_position_embeddings)
    }
}

/// A [`KvCache`] that holds one sequence.
pub struct SequenceCache {
    cache: KvCache,
    sequence: SequenceId,
    params: AttentionParams,
}

impl SequenceCache {
    /// An empty cache; start from [`LlamaConfig::cache_config`].
    pub fn new(device: &Device, config: CacheConfig, model: &LlamaConfig) -> Result<Self> {
        let mut cache = KvCache::new(device, config)?;
        let sequence = cache.add_sequence();
        Ok(Self { cache, sequence, params: AttentionParams::for_head_dim(model.head_dim) })
    }

    /// The cache itself.
    pub fn kv(&self) -> &KvCache {
        &self.cache
    }

    /// How many tokens the sequence has.
    pub fn tokens(&self) -> Result<usize> {
        Ok(self.cache.len(self.sequence)?)
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        Ok(self.cache.truncate(self.sequence, len)?)
    }

    /// Writes the sequence to a file; see [`KvCache::save`].
    pub fn save<'a>(&self, path: &Path, label: impl Into<Label<'a>>) -> Result<()> {
        Ok(self.cache.save(&[self.sequence], path, label)?)
    }

    /// Takes the sequence of a file in place of its own, whose pages it may use; see [`KvCache::load_into`]. On an error the
    /// cache holds what it held before.
    pub fn load(&mut self, path: &Path, fingerprint: &[u8]) -> Result<()> {
        Ok(self.cache.load_into(self.sequence, path, fingerprint)?)
    }

    /// Stores the keys and values of new tokens in one layer, `[tokens, kv_heads, head_dim]`, and attends with their
    /// queries, `[tokens, heads, head_dim]`, over all that the layer then holds.
    pub(crate) fn append_and_attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let device = self.cache.device();
        let upload = |x: &Tensor| Ok::<_, crate::Error>(device.upload(&x.flatten_all()?.to_vec1::<f32>()?, x.dims())?);
        let (q_buffer, k, v) = (upload(q)?, upload(k)?, upload(v)?);
        let out = device.zeros(DType::F32, q.dims())?;
        let new = [(self.sequence, q.dim(0)?)];
        let mut encoder = device.encoder()?;
        self.cache.append(&mut encoder, layer, &new, &k, &v)?;
        self.cache.attend(&mut encoder, layer, &new, &q_buffer, &out, None, &self.params)?;
        encoder.submit_and_wait()?;
        Ok(Tensor::from_vec(out.read::<f32>()?, q.dims(), q.device())?)
    }
}
