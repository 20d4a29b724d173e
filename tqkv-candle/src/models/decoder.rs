//! The one decoder that runs every architecture, in f32 on the CPU.

use super::architecture::{Activation, Name};
use super::config::ModelConfig;
use super::linear::{Linear, Matrix};
use super::metadata::Metadata;
use super::rope::Rope;
use super::weights::{Rows, Weights};
use crate::attention::{Attention, AttentionStep};
use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, silu};
use candle_nn::rotary_emb::rope_thd;
use std::path::Path;
use tqkv::SequenceId;

/// A language model whose keys and values live in a tqkv cache.
pub struct Model {
    config: ModelConfig,
    embedding: Matrix,
    layers: Vec<Layer>,
    norm: Tensor,
    output: Matrix,
    rope: Frequencies,
    local_rope: Option<Frequencies>,
}

struct Layer {
    attention_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    /// Of a head of queries, and of keys.
    head_norms: Option<[Tensor; 2]>,
    output: Linear,
    post_attention_norm: Option<Tensor>,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
    post_mlp_norm: Option<Tensor>,
}

/// A rotary embedding, ready to be computed.
struct Frequencies {
    /// `[1, dim/2]`.
    inverse: Tensor,
    /// On sines and cosines.
    factor: f64,
}

/// Cosines and sines of a step's positions, `[tokens, dim/2]` each.
type Angles = [Tensor; 2];

impl Model {
    /// Loads a GGUF file, or a Hugging Face directory: `config.json` and safetensors, sharded or not.
    pub fn load(path: &Path) -> Result<Self> {
        Self::load_as(path, |weights| weights)
    }

    /// The same, with all weights as f32. That takes more memory and time than quantized ones, and rounds nothing else.
    pub fn load_dequantized(path: &Path) -> Result<Self> {
        Self::load_as(path, Weights::dequantized)
    }

    fn load_as(path: &Path, how: impl Fn(Weights) -> Weights) -> Result<Self> {
        if path.is_file() {
            let (mut weights, values) = Weights::load_gguf(path)?;
            let config = ModelConfig::from_gguf(&Metadata::new(path, values), &mut weights)?;
            return Self::new(config, how(weights));
        }
        // The configuration first: it is small and tells soonest that a model is not supported.
        let config = ModelConfig::load(path)?;
        Self::new(config, how(Weights::load(path)?))
    }

    /// Builds a model from its parts. Each tensor must be there with the shape that the configuration implies, and no
    /// other.
    pub fn new(config: ModelConfig, weights: Weights) -> Result<Self> {
        let mut loader = Loader { config: &config, base: weights.base(), weights };
        let embedding = loader.embedding()?;
        let layers = (0..config.layers).map(|layer| loader.layer(layer)).collect::<Result<_>>()?;
        let norm = loader.final_norm()?;
        let output = if config.tie_word_embeddings { embedding.clone() } else { loader.output()? };
        loader.finish()?;
        let rope = Frequencies::new(&config.rope)?;
        let local_rope = config.local_rope.as_ref().map(Frequencies::new).transpose()?;
        Ok(Self { embedding, layers, norm, output, rope, local_rope, config })
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Bytes of the weight matrices, as they are kept. Norms and biases come to little besides.
    pub fn weight_bytes(&self) -> usize {
        let of_layer = |layer: &Layer| {
            let Layer { q, k, v, output, gate, up, down, .. } = layer;
            [q, k, v, output, gate, up, down].map(|linear| linear.matrix.bytes()).iter().sum::<usize>()
        };
        let output = if self.config.tie_word_embeddings { 0 } else { self.output.bytes() };
        self.embedding.bytes() + output + self.layers.iter().map(of_layer).sum::<usize>()
    }

    /// Runs `tokens` after what `cache` already holds, and appends them to it. Returns their final hidden states,
    /// `[tokens, hidden_size]`, for [`Model::logits`].
    ///
    /// On an error the cache holds what it held before.
    pub fn forward(&self, tokens: &[u32], cache: &mut SequenceCache) -> Result<Tensor> {
        let sequence = cache.sequence();
        self.forward_batch(&[(sequence, tokens)], cache.attention_mut())
    }

    /// Runs new tokens of several sequences in one step, each after what the cache holds of it, and appends them. Returns
    /// the final hidden states of all, `[tokens, hidden_size]`, one sequence's after the other's.
    ///
    /// On an error the cache holds what it held before.
    pub fn forward_batch(&self, new: &[(SequenceId, &[u32])], attention: &mut Attention) -> Result<Tensor> {
        let limit = self.config.max_position_embeddings;
        let mut starts = Vec::with_capacity(new.len());
        for &(sequence, tokens) in new {
            let start = attention.cache().len(sequence)?;
            if tokens.is_empty() {
                return Err(Error::NoTokens);
            }
            if tokens.len() > limit.saturating_sub(start) {
                return Err(Error::ContextOverflow { got: start.saturating_add(tokens.len()), limit });
            }
            if let Some(&got) = tokens.iter().find(|&&t| t as usize >= self.config.vocab_size) {
                return Err(Error::Token { got, vocab_size: self.config.vocab_size });
            }
            starts.push(start);
        }
        if new.is_empty() {
            return Err(Error::NoTokens);
        }
        let counts: Vec<_> = new.iter().map(|(sequence, tokens)| (*sequence, tokens.len())).collect();
        // Dropped on an error, and then the cache is as it was.
        let mut step = attention.step(&counts)?;
        // On a thread of rayon's, so that the many small parallel loops within start without waking one each.
        let hidden = rayon::scope(|_| self.forward_layers(new, &starts, &mut step))?;
        step.commit()?;
        Ok(hidden)
    }

    fn forward_layers(
        &self,
        new: &[(SequenceId, &[u32])],
        starts: &[usize],
        step: &mut AttentionStep,
    ) -> Result<Tensor> {
        let positions = new.iter().zip(starts).flat_map(|((_, tokens), &start)| start..start + tokens.len());
        let positions: Vec<f32> = positions.map(|p| p as f32).collect();
        let positions = Tensor::new(positions, &Device::Cpu)?.unsqueeze(1)?;
        let angles = self.rope.angles(&positions)?;
        let local = self.local_rope.as_ref().map(|rope| rope.angles(&positions)).transpose()?;

        let tokens: Vec<u32> = new.iter().flat_map(|n| n.1).copied().collect();
        let mut x = self.embedding.rows(&Tensor::new(tokens, &Device::Cpu)?)?;
        if self.config.embedding_scale != 1.0 {
            x = (x * f64::from(self.config.embedding_scale))?;
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let angles = local.as_ref().filter(|_| self.config.windows[i].is_some()).unwrap_or(&angles);
            let attended = self.attend(layer, i, &self.norm(&x, &layer.attention_norm)?, angles, step)?;
            x = (x + self.optional_norm(attended, &layer.post_attention_norm)?)?;
            let fed = self.feed_forward(layer, &self.norm(&x, &layer.mlp_norm)?)?;
            x = (x + self.optional_norm(fed, &layer.post_mlp_norm)?)?;
        }
        self.norm(&x, &self.norm)
    }

    /// Of one layer, from normalized states to what is added to the residual stream.
    fn attend(
        &self,
        layer: &Layer,
        number: usize,
        x: &Tensor,
        angles: &Angles,
        step: &mut AttentionStep,
    ) -> Result<Tensor> {
        let ModelConfig { heads, kv_heads, head_dim, .. } = self.config;
        let tokens = x.dim(0)?;
        let split = |y: Tensor, heads: usize| y.reshape((tokens, heads, head_dim));
        let [q, k, v] = Linear::forward_all([&layer.q, &layer.k, &layer.v], x)?;
        let (mut q, mut k, v) = (split(q, heads)?, split(k, kv_heads)?, split(v, kv_heads)?);
        if let Some([q_norm, k_norm]) = &layer.head_norms {
            (q, k) = (self.norm(&q, q_norm)?, self.norm(&k, k_norm)?);
        }
        let (q, k) = (rotate(&q, angles)?, rotate(&k, angles)?);
        let params = self.config.attention_params(number);
        let out = step.forward(number, &q, &k, &v, &params)?;
        layer.output.forward(&out.reshape((tokens, heads * head_dim))?)
    }

    fn feed_forward(&self, layer: &Layer, x: &Tensor) -> Result<Tensor> {
        let [gate, up] = Linear::forward_all([&layer.gate, &layer.up], x)?;
        let gate = match self.config.activation {
            Activation::Silu => silu(&gate)?,
            Activation::GeluTanh => gate.gelu()?,
        };
        layer.down.forward(&(gate * up)?)
    }

    fn norm(&self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        Ok(rms_norm(x, weight, self.config.rms_norm_eps)?)
    }

    fn optional_norm(&self, x: Tensor, weight: &Option<Tensor>) -> Result<Tensor> {
        weight.as_ref().map_or(Ok(x.clone()), |weight| self.norm(&x, weight))
    }

    /// The logits of the token that follows each hidden state, `[tokens, vocab_size]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.output.forward(hidden)?;
        Ok(match self.config.logits_softcap.map(f64::from) {
            Some(cap) => ((logits / cap)?.tanh()? * cap)?,
            None => logits,
        })
    }
}

impl Frequencies {
    fn new(rope: &Rope) -> Result<Self> {
        let inverse = Tensor::new(rope.inverse_frequencies(), &Device::Cpu)?.unsqueeze(0)?;
        Ok(Self { inverse, factor: rope.attention_factor().into() })
    }

    fn angles(&self, positions: &Tensor) -> Result<Angles> {
        let angles = positions.broadcast_mul(&self.inverse)?;
        let (cos, sin) = (angles.cos()?, angles.sin()?);
        Ok(if self.factor == 1.0 { [cos, sin] } else { [(cos * self.factor)?, (sin * self.factor)?] })
    }
}

/// Rotates the heads of `x`, `[tokens, heads, head_dim]`: all of their elements or the first.
fn rotate(x: &Tensor, [cos, sin]: &Angles) -> Result<Tensor> {
    let (head_dim, dim) = (x.dim(2)?, 2 * cos.dim(1)?);
    let rope = |x: &Tensor| rope_thd(&x.unsqueeze(0)?, cos, sin)?.squeeze(0);
    if dim == head_dim {
        return Ok(rope(x)?);
    }
    let rotated = rope(&x.narrow(2, 0, dim)?.contiguous()?)?;
    Ok(Tensor::cat(&[rotated, x.narrow(2, dim, head_dim - dim)?], 2)?)
}

/// Takes a model's tensors out of its files.
struct Loader<'a> {
    config: &'a ModelConfig,
    weights: Weights,
    /// What all names in safetensors begin with; nothing for GGUF.
    base: Option<&'static str>,
}

impl Loader<'_> {
    /// The full name of a layer's tensor, without its kind.
    fn name(&self, layer: usize, name: Name) -> String {
        match self.base {
            Some(base) => format!("{base}.layers.{layer}.{}", name.safetensors),
            None => format!("blk.{layer}.{}", name.gguf),
        }
    }

    fn embedding(&mut self) -> Result<Matrix> {
        let name = self.base.map_or("token_embd.weight".into(), |base| format!("{base}.embed_tokens.weight"));
        self.weights.table(&name, [self.config.vocab_size, self.config.hidden_size])
    }

    fn output(&mut self) -> Result<Matrix> {
        let name = if self.base.is_none() { "output.weight" } else { "lm_head.weight" };
        let name = match self.base {
            Some("language_model.model") => format!("language_model.{name}"),
            _ => name.into(),
        };
        self.weights.matrix(&name, [self.config.vocab_size, self.config.hidden_size], &Rows::All)
    }

    fn final_norm(&mut self) -> Result<Tensor> {
        let name = self.base.map_or("output_norm.weight".into(), |base| format!("{base}.norm.weight"));
        self.norm_weight(&name, self.config.hidden_size)
    }

    fn norm_weight(&mut self, name: &str, len: usize) -> Result<Tensor> {
        let weight = self.weights.vector(name, len)?;
        // GGUF's have been made whole.
        let whole = self.base.is_none() || !self.config.architecture.norms_less_one;
        Ok(if whole { weight } else { (weight + 1.0)? })
    }

    fn layer_norm(&mut self, layer: usize, name: Name, len: usize) -> Result<Tensor> {
        self.norm_weight(&format!("{}.weight", self.name(layer, name)), len)
    }

    fn layer(&mut self, layer: usize) -> Result<Layer> {
        let config = self.config;
        let ModelConfig { hidden_size: hidden, intermediate_size: inner, heads, kv_heads, head_dim, .. } = *config;
        let (names, post) = (&config.architecture.tensors, config.architecture.post_norms);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let [q, k, v] = match config.architecture.fused {
            true => self.fused(layer, names.qkv, hidden, [q, kv, kv])?,
            false => {
                let interleaved = self.base.is_none() && config.architecture.interleaved_in_gguf;
                let rows = || if interleaved { Rows::Interleaved { head_dim } } else { Rows::All };
                let bias = config.qkv_bias;
                [
                    self.linear(layer, names.q, [q, hidden], &rows(), bias)?,
                    self.linear(layer, names.k, [kv, hidden], &rows(), bias)?,
                    self.linear(layer, names.v, [kv, hidden], &Rows::All, bias)?,
                ]
            }
        };
        let [gate, up] = match config.architecture.fused {
            true => self.fused(layer, names.gate_up, hidden, [inner, inner])?,
            false => {
                let mut linear = |name| self.linear(layer, name, [inner, hidden], &Rows::All, config.mlp_bias);
                [linear(names.gate)?, linear(names.up)?]
            }
        };
        Ok(Layer {
            attention_norm: self.layer_norm(layer, names.attention_norm, hidden)?,
            q,
            k,
            v,
            head_norms: match config.architecture.qk_norms {
                true => Some([
                    self.layer_norm(layer, names.q_norm, head_dim)?,
                    self.layer_norm(layer, names.k_norm, head_dim)?,
                ]),
                false => None,
            },
            output: self.linear(layer, names.output, [hidden, heads * head_dim], &Rows::All, config.output_bias)?,
            post_attention_norm: match post {
                true => Some(self.layer_norm(layer, names.post_attention_norm, hidden)?),
                false => None,
            },
            mlp_norm: self.layer_norm(layer, names.mlp_norm, hidden)?,
            gate,
            up,
            down: self.linear(layer, names.down, [hidden, inner], &Rows::All, config.mlp_bias)?,
            post_mlp_norm: match post {
                true => Some(self.layer_norm(layer, names.post_mlp_norm, hidden)?),
                false => None,
            },
        })
    }

    fn linear(&mut self, layer: usize, name: Name, shape: [usize; 2], rows: &Rows, bias: bool) -> Result<Linear> {
        let name = self.name(layer, name);
        let matrix = self.weights.matrix(&format!("{name}.weight"), shape, rows)?;
        let bias = match bias {
            true => Some(self.weights.bias(&format!("{name}.bias"), shape[0], rows)?),
            false => None,
        };
        Ok(Linear { matrix, bias })
    }

    /// Several matrices that one tensor holds, one below the other.
    fn fused<const N: usize>(
        &mut self,
        layer: usize,
        name: Name,
        inputs: usize,
        outputs: [usize; N],
    ) -> Result<[Linear; N]> {
        let name = format!("{}.weight", self.name(layer, name));
        let shape = [outputs.iter().sum(), inputs];
        let mut end = 0;
        let mut matrices = Vec::with_capacity(N);
        for height in outputs {
            let rows = Rows::Range(end..end + height);
            end += height;
            matrices.push(Linear { matrix: self.weights.matrix(&name, shape, &rows)?, bias: None });
        }
        // There are as many as were asked for.
        matrices.try_into().map_err(|_| Error::MissingTensor { name, expected: shape.to_vec() })
    }

    /// Complains about tensors that are left.
    fn finish(self) -> Result<()> {
        let (tied, base) = (self.config.tie_word_embeddings, self.base);
        let wrapped = self.config.architecture.wrapper.is_some() && base.is_some_and(|base| base != "model");
        self.weights.finish(|name| {
            // Some files repeat the embedding as the output layer. Old ones hold the frequencies, which follow from the
            // configuration. Of a model of text and images only the text half is taken.
            tied && (name == "lm_head.weight" || name == "language_model.lm_head.weight")
                || name.ends_with(".rotary_emb.inv_freq")
                || wrapped && base.is_some_and(|base| !name.starts_with(base))
        })
    }
}
