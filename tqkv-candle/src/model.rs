//! The Llama model, in f32 on the CPU.

use crate::cache::SequenceCache;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::weights::Weights;
use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_thd;
use std::path::Path;

/// A Llama model whose keys and values live in a [`SequenceCache`].
pub struct Llama {
    config: LlamaConfig,
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    output: Linear,
    inverse_frequencies: Tensor,
}

struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Linear {
    /// [inputs, outputs]: the files have them the other way round, which the product of a few tokens would turn each time.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Llama {
    /// Loads a Hugging Face directory: `config.json` and safetensors, sharded or not.
    pub fn load(dir: &Path) -> Result<Self> {
        // The configuration first: it is small and tells soonest that a model is not supported.
        let config = LlamaConfig::load(dir)?;
        Self::new(config, Weights::load(dir)?)
    }

    /// Builds a model from its parts. Each tensor must be there with the shape that the
    /// configuration implies, and no other.
    pub fn new(config: LlamaConfig, mut weights: Weights) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
        let embedding = weights.take("model.embed_tokens.weight", &[config.vocab_size, hidden])?;
        let mut layers = Vec::new();
        for i in 0..config.layers {
            let mut norm = |name: &str| weights.take(&format!("model.layers.{i}.{name}.weight"), &[hidden]);
            let (attention_norm, mlp_norm) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
            let mut linear = |name: &str, outputs, inputs, bias| {
                Linear::take(&mut weights, &format!("model.layers.{i}.{name}"), outputs, inputs, bias)
            };
            layers.push(Layer {
                attention_norm,
                q: linear("self_attn.q_proj", q, hidden, config.attention_bias)?,
                k: linear("self_attn.k_proj", kv, hidden, config.attention_bias)?,
                v: linear("self_attn.v_proj", kv, hidden, config.attention_bias)?,
                o: linear("self_attn.o_proj", hidden, q, config.attention_bias)?,
                mlp_norm,
                gate: linear("mlp.gate_proj", inner, hidden, config.mlp_bias)?,
                up: linear("mlp.up_proj", inner, hidden, config.mlp_bias)?,
                down: linear("mlp.down_proj", hidden, inner, config.mlp_bias)?,
            });
        }
        let norm = weights.take("model.norm.weight", &[hidden])?;
        let output = match config.tie_word_embeddings {
            true => Linear { weight: embedding.t()?, bias: None },
            false => Linear::take(&mut weights, "lm_head", config.vocab_size, hidden, false)?,
        };
        weights.finish(config.tie_word_embeddings)?;
        let inverse_frequencies = Tensor::new(config.inverse_frequencies(), &Device::Cpu)?;
        Ok(Self { config, embedding, layers, norm, output, inverse_frequencies })
    }

    /// What the model is.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// Runs `tokens` after what `cache` already holds, and appends them to it. Returns their final
    /// hidden states, `[tokens, hidden_size]`, for [`Llama::logits`].
    ///
    /// On an error the cache holds what it held before.
    pub fn forward(&self, tokens: &[u32], cache: &mut SequenceCache) -> Result<Tensor> {
        let start = cache.tokens()?;
        let limit = self.config.max_position_embeddings;
        if tokens.is_empty() {
            return Err(Error::NoTokens);
        }
        if tokens.len() > limit.saturating_sub(start) {
            return Err(Error::ContextOverflow { got: start.saturating_add(tokens.len()), limit });
        }
        if let Some(&got) = tokens.iter().find(|&&t| t as usize >= self.config.vocab_size) {
            return Err(Error::Token { got, vocab_size: self.config.vocab_size });
        }
        // On a thread of rayon's, so that the many small parallel loops within start without waking one each.
        let hidden = rayon::scope(|_| self.forward_layers(tokens, start, cache));
        if hidden.is_err() {
            cache.truncate(start)?;
        }
        hidden
    }

    fn forward_layers(&self, tokens: &[u32], start: usize, cache: &mut SequenceCache) -> Result<Tensor> {
        let LlamaConfig { heads, kv_heads, head_dim, rms_norm_eps, .. } = self.config;
        let count = tokens.len();
        let positions: Vec<f32> = (start..start + count).map(|p| p as f32).collect();
        let positions = Tensor::from_vec(positions, (count, 1), &Device::Cpu)?;
        let angles = positions.broadcast_mul(&self.inverse_frequencies.unsqueeze(0)?)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        let rotate = |x: Tensor, heads| -> Result<Tensor> {
            Ok(rope_thd(&x.reshape((1, count, heads, head_dim))?, &cos, &sin)?.squeeze(0)?)
        };

        let mut x = self.embedding.embedding(&Tensor::new(tokens, &Device::Cpu)?)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, rms_norm_eps)?;
            let q = rotate(layer.q.forward(&normed)?, heads)?;
            let k = rotate(layer.k.forward(&normed)?, kv_heads)?;
            let v = layer.v.forward(&normed)?.reshape((count, kv_heads, head_dim))?;
            let attended = cache.append_and_attend(i, &q, &k, &v)?.reshape((count, heads * head_dim))?;
            x = (x + layer.o.forward(&attended)?)?;

            let normed = rms_norm(&x, &layer.mlp_norm, rms_norm_eps)?;
            let gated = (silu(&layer.gate.forward(&normed)?)? * layer.up.forward(&normed)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        Ok(rms_norm(&x, &self.norm, rms_norm_eps)?)
    }

    /// The logits of the token that follows each hidden state, `[tokens, vocab_size]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.output.forward(hidden)
    }
}

impl Linear {
    fn take(weights: &mut Weights, name: &str, outputs: usize, inputs: usize, bias: bool) -> Result<Self> {
        let weight = weights.take(&format!("{name}.weight"), &[outputs, inputs])?.t()?.contiguous()?;
        let bias = bias.then(|| weights.take(&format!("{name}.bias"), &[outputs])).transpose()?;
        Ok(Self { weight, bias })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let y = x.matmul(&self.weight)?;
        Ok(match &self.bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        })
    }
}
