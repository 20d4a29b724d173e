//! What a model is, whatever kind of file said it.

use super::architecture::{Activation, Architecture};
use super::rope::Rope;
use crate::error::{Error, Result};
use tqkv::CacheConfig;
use tqkv::cache::LayerKind;
use tqkv::ops::{AttentionParams, Precision};

/// What a model is: read from a `config.json` or from a GGUF file's metadata, checked, with the defaults filled in.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ModelConfig {
    pub(crate) architecture: &'static Architecture,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the gated feed-forward layer.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a head; even.
    pub head_dim: usize,
    /// The function within the feed-forward layer.
    pub activation: Activation,
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f32,
    /// Longest context that the model was made for.
    pub max_position_embeddings: usize,
    /// The rotary embedding.
    pub rope: Rope,
    /// The rotary embedding of the layers with a window, where it is another one.
    pub local_rope: Option<Rope>,
    /// For each layer how many of the newest positions it sees; all if `None`.
    pub windows: Vec<Option<usize>>,
    /// Factor on the product of query and key.
    pub attention_scale: f32,
    /// Scores become c·tanh(score/c).
    pub attention_softcap: Option<f32>,
    /// Logits become c·tanh(logit/c).
    pub logits_softcap: Option<f32>,
    /// Factor on the embeddings.
    pub embedding_scale: f32,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the query, key and value projections have a bias.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward layer's three projections have a bias.
    pub mlp_bias: bool,
    /// The token that starts a text.
    pub bos_token: Option<u32>,
    /// The tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// The names that a kind of file has for the fields that are checked.
pub(crate) type FieldNames<'a> = &'a dyn Fn(&str) -> String;

impl ModelConfig {
    /// The architecture's name, as in `model_type`.
    pub fn architecture(&self) -> &'static str {
        self.architecture.model_type
    }

    /// A cache for this model: 4 bits on both sides, room for the model's whole context, windows where the model has them.
    /// Change what differs.
    pub fn cache_config(&self) -> CacheConfig {
        let config = CacheConfig::new(self.layers, self.kv_heads, self.head_dim).capacity(self.max_position_embeddings);
        self.windows.iter().enumerate().fold(config, |config, (layer, window)| match window {
            Some(window) => config.kind_at(layer, LayerKind::Window(*window)),
            None => config,
        })
    }

    /// The same with room for so many sequences of so many positions each, where no step appends more than `step` tokens to
    /// one of them: layers with a window then take no more than that needs.
    pub fn cache_config_for(&self, sequences: usize, positions: usize, step: usize) -> CacheConfig {
        let config = self.cache_config();
        let page = config.positions_per_page();
        let pages = |positions: usize| positions.div_ceil(page).saturating_mul(page).saturating_mul(sequences);
        let config = config.capacity(pages(positions));
        match self.windows.iter().flatten().max() {
            // The oldest position that is seen may be the last of its page.
            Some(window) => {
                let held = window.saturating_add(step).saturating_add(page);
                config.window_capacity(pages(held.min(positions)))
            }
            None => config,
        }
    }

    /// What a layer's attention computes.
    pub fn attention_params(&self, layer: usize) -> AttentionParams {
        let mut params = AttentionParams::new(self.attention_scale);
        params.softcap = self.attention_softcap;
        params.window = self.windows.get(layer).copied().flatten();
        // Far below what any codec loses, and faster on a CPU.
        params.precision = Precision::Half;
        params
    }

    /// A layer's rotary embedding.
    pub fn layer_rope(&self, layer: usize) -> &Rope {
        let windowed = self.windows.get(layer).is_some_and(Option::is_some);
        self.local_rope.as_ref().filter(|_| windowed).unwrap_or(&self.rope)
    }

    /// Fails for values that make no sense. `name` gives a config.json's field the name that it has in the model's file.
    pub(crate) fn check(&self, name: FieldNames) -> Result<()> {
        let Self { heads, kv_heads, head_dim, rms_norm_eps, .. } = *self;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of {} ({heads})", name("num_attention_heads"));
            return Err(value(&name("num_key_value_heads"), kv_heads, expected));
        }
        if head_dim == 0 || head_dim > 1 << 16 || !head_dim.is_multiple_of(2) {
            return Err(value(&name("head_dim"), head_dim, "an even number from 2 to 65536"));
        }
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            return Err(value(&name("rms_norm_eps"), rms_norm_eps, "a finite number of at least 0"));
        }
        for rope in [Some(&self.rope), self.local_rope.as_ref()].into_iter().flatten() {
            if rope.dim == 0 || rope.dim > head_dim || !rope.dim.is_multiple_of(2) {
                let expected = format!("an even number from 2 to head_dim ({head_dim})");
                return Err(value("the number of rotated elements", rope.dim, expected));
            }
            rope.check(name)?;
        }
        for (field, got) in
            [("attn_logit_softcapping", self.attention_softcap), ("final_logit_softcapping", self.logits_softcap)]
        {
            if let Some(got) = got.filter(|got| !(got.is_finite() && *got > 0.0)) {
                return Err(value(&name(field), got, "a finite number above 0"));
            }
        }
        if self.windows.contains(&Some(0)) {
            return Err(value(&name("sliding_window"), 0, "at least 1"));
        }
        self.check_tokens()
    }

    pub(crate) fn check_tokens(&self) -> Result<()> {
        match self.bos_token.iter().chain(&self.eos_tokens).find(|&&t| t as usize >= self.vocab_size) {
            Some(&got) => Err(Error::Token { got, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }
}

/// The number of layers, for each of which something is allocated.
pub(crate) fn expect_layers(field: &str, got: usize) -> Result<usize> {
    if (1..=1 << 16).contains(&got) { Ok(got) } else { Err(value(field, got, "1 to 65536")) }
}

/// A count. The upper limit keeps every product of two of them far from overflow.
pub(crate) fn expect_count(field: &str, got: usize) -> Result<usize> {
    if (1..=1 << 28).contains(&got) { Ok(got) } else { Err(value(field, got, "1 to 2^28")) }
}

pub(crate) fn value(field: &str, got: impl ToString, expected: impl Into<String>) -> Error {
    Error::ConfigValue { field: field.into(), got: got.to_string(), expected: expected.into() }
}
