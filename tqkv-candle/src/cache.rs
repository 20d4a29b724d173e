//! The keys and values of one sequence. (Stand-in: uncompressed f32.)

use crate::config::LlamaConfig;
use crate::error::Result;
use candle_core::{D, Device, Tensor};

/// The cache of one sequence.
pub struct SequenceCache {
    layers: Vec<Option<(Tensor, Tensor)>>,
    len: usize,
}

impl SequenceCache {
    /// An empty cache for a model.
    pub fn new(config: &LlamaConfig) -> Result<Self> {
        Ok(Self { layers: vec![None; config.layers], len: 0 })
    }

    /// How many tokens it holds.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all tokens after the first `len`.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        for layer in &mut self.layers {
            *layer = match layer.take() {
                Some((k, v)) if len > 0 => Some((k.narrow(1, 0, len)?, v.narrow(1, 0, len)?)),
                _ => None,
            };
        }
        self.len = len;
        Ok(())
    }

    /// Appends `[tokens, kv_heads, head_dim]` and attends: `q` and result `[tokens, heads, head_dim]`.
    pub(crate) fn append_and_attend(&mut self, layer: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (count, heads, dim) = q.dims3()?;
        let (k, v) = (k.transpose(0, 1)?.contiguous()?, v.transpose(0, 1)?.contiguous()?);
        let (k, v) = match self.layers[layer].take() {
            Some((old_k, old_v)) => (Tensor::cat(&[&old_k, &k], 1)?, Tensor::cat(&[&old_v, &v], 1)?),
            None => (k, v),
        };
        let (kv_heads, len, _) = k.dims3()?;
        let group = heads / kv_heads;
        let q = (q.transpose(0, 1)?.contiguous()?.reshape((kv_heads, group * count, dim))? / (dim as f64).sqrt())?;
        let scores = q.matmul(&k.t()?)?;
        let mask: Vec<f32> = (0..group * count)
            .flat_map(|r| (0..len).map(move |p| if p <= len - count + r % count { 0.0 } else { f32::NEG_INFINITY }))
            .collect();
        let mask = Tensor::from_vec(mask, (1, group * count, len), &Device::Cpu)?;
        let p = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?;
        let out = p.matmul(&v)?.reshape((heads, count, dim))?.transpose(0, 1)?.contiguous()?;
        self.layers[layer] = Some((k, v));
        if layer + 1 == self.layers.len() {
            self.len = len;
        }
        Ok(out)
    }
}
