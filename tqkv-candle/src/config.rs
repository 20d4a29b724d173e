//! `config.json` of a Llama model.

use crate::error::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};
use std::path::Path;

/// What `config.json` says about a Llama model, checked and with the defaults filled in.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LlamaConfig {
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
    /// Added to the mean square before its root is taken.
    pub rms_norm_eps: f32,
    /// Longest context that the model was made for.
    pub max_position_embeddings: usize,
    /// Base of the rotary embedding's frequencies.
    pub rope_theta: f32,
    /// Rescaling of those frequencies, if any.
    pub rope_scaling: Option<Llama3Rope>,
    /// Whether the output layer is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether the attention's four projections have a bias.
    pub attention_bias: bool,
    /// Whether the feed-forward layer's three projections have a bias.
    pub mlp_bias: bool,
    /// The token that starts a text.
    pub bos_token: Option<u32>,
    /// The tokens that end a text.
    pub eos_tokens: Vec<u32>,
}

/// Llama 3's rescaling of the rotary frequencies (`rope_type` "llama3"): long wavelengths are
/// stretched by `factor`, short ones kept, with a smooth transition between.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[non_exhaustive]
pub struct Llama3Rope {
    /// How much the long wavelengths are stretched.
    pub factor: f32,
    /// Wavelengths above the original context divided by this are stretched fully.
    pub low_freq_factor: f32,
    /// Wavelengths below the original context divided by this are kept.
    pub high_freq_factor: f32,
    /// The context that the model was first trained at.
    pub original_max_position_embeddings: usize,
}

/// The fields as they stand in the file.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rms_norm_eps: Option<f32>,
    max_position_embeddings: usize,
    hidden_act: Option<String>,
    rope_theta: Option<f32>,
    rope_scaling: Option<Map<String, Value>>,
    // What transformers 5 writes instead of the two above.
    rope_parameters: Option<Map<String, Value>>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Tokens>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// One token or several: both occur.
#[derive(Deserialize)]
#[serde(untagged)]
enum Tokens {
    One(u32),
    Many(Vec<u32>),
}

/// Fields that other models of the family use and that would change the result here: refused unless
/// null or the number that changes nothing.
const REFUSED: [(&str, Option<f64>, &str); 8] = [
    ("sliding_window", None, "no sliding window"),
    ("quantization_config", None, "unquantized weights"),
    ("partial_rotary_factor", Some(1.0), "rotation of whole heads (1.0)"),
    ("attn_logit_softcapping", None, "attention without softcap"),
    ("final_logit_softcapping", None, "logits without softcap"),
    ("num_local_experts", None, "a dense feed-forward layer"),
    ("layer_types", None, "full attention in every layer"),
    ("no_rope_layers", None, "rotary embeddings in every layer"),
];

impl LlamaConfig {
    /// Reads `config.json`, and the end tokens of `generation_config.json` where there is one,
    /// from a model's directory.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::parse(&read(&path)?, &path)?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            #[derive(Deserialize)]
            struct Generation {
                eos_token_id: Option<Tokens>,
            }
            let generation: Generation = parse_json(&read(&path)?, &path)?;
            if let Some(tokens) = generation.eos_token_id {
                config.eos_tokens = tokens.into();
            }
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`; `path` is for the error message.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let raw: Raw = parse_json(json, path)?;
        let json_error = |cause| Error::Json { path: path.into(), cause };

        let unsupported =
            |field: &str, got: String, expected| Error::Unsupported { field: field.into(), got, expected };
        if let Some(got) = raw.model_type.filter(|t| t != "llama") {
            return Err(unsupported("model_type", format!("{got:?}"), "\"llama\""));
        }
        if let Some(got) = raw.architectures.filter(|a| a != &["LlamaForCausalLM"]) {
            return Err(unsupported("architectures", format!("{got:?}"), "[\"LlamaForCausalLM\"]"));
        }
        if let Some(got) = raw.hidden_act.filter(|a| a != "silu") {
            return Err(unsupported("hidden_act", format!("{got:?}"), "\"silu\""));
        }
        for (field, neutral, expected) in REFUSED {
            let got = raw.others.get(field).filter(|v| !v.is_null());
            if let Some(got) = got.filter(|v| neutral.is_none() || v.as_f64() != neutral) {
                return Err(unsupported(field, got.to_string(), expected));
            }
        }

        let mut rope_theta = raw.rope_theta;
        let mut rope_scaling = None;
        for (field, rope) in [("rope_scaling", raw.rope_scaling), ("rope_parameters", raw.rope_parameters)] {
            let Some(rope) = rope else { continue };
            if let Some(theta) = rope.get("rope_theta") {
                rope_theta = Some(f32::deserialize(theta).map_err(json_error)?);
            }
            // Older files call it "type".
            match rope.get("rope_type").or(rope.get("type")).unwrap_or(&Value::Null) {
                Value::Null => {
                    return Err(unsupported(field, Value::Object(rope).to_string(), "a rope_type"));
                }
                Value::String(t) if t == "default" => {}
                Value::String(t) if t == "llama3" => {
                    let scaling = Llama3Rope::deserialize(Value::Object(rope)).map_err(json_error)?;
                    scaling.check()?;
                    rope_scaling = Some(scaling);
                }
                other => {
                    let field = format!("{field}.rope_type");
                    return Err(unsupported(&field, other.to_string(), "\"default\" or \"llama3\""));
                }
            }
        }

        let heads = raw.num_attention_heads;
        for (field, got) in [
            ("vocab_size", raw.vocab_size),
            ("hidden_size", raw.hidden_size),
            ("intermediate_size", raw.intermediate_size),
            ("num_hidden_layers", raw.num_hidden_layers),
            ("num_attention_heads", heads),
            ("max_position_embeddings", raw.max_position_embeddings),
        ] {
            // The upper limit keeps every product of two of them far from overflow.
            if !(1..=1 << 28).contains(&got) {
                return Err(value(field, got, "1 to 2^28"));
            }
        }
        let kv_heads = raw.num_key_value_heads.unwrap_or(heads);
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(value("num_key_value_heads", kv_heads, format!("a divisor of num_attention_heads ({heads})")));
        }
        let head_dim = match raw.head_dim {
            Some(head_dim) => head_dim,
            None if raw.hidden_size.is_multiple_of(heads) => raw.hidden_size / heads,
            None => {
                let expected = format!("a multiple of num_attention_heads ({heads}), as there is no head_dim");
                return Err(value("hidden_size", raw.hidden_size, expected));
            }
        };
        if head_dim == 0 || head_dim > 1 << 16 || !head_dim.is_multiple_of(2) {
            return Err(value("head_dim", head_dim, "an even number from 2 to 65536"));
        }
        let rope_theta = rope_theta.unwrap_or(10_000.0);
        if !(rope_theta.is_finite() && rope_theta > 0.0) {
            return Err(value("rope_theta", rope_theta, "a finite number above 0"));
        }
        let rms_norm_eps = raw.rms_norm_eps.unwrap_or(1e-6);
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            return Err(value("rms_norm_eps", rms_norm_eps, "a finite number of at least 0"));
        }
        let eos_tokens = raw.eos_token_id.map(Vec::from).unwrap_or_default();
        if let Some(&got) = raw.bos_token_id.iter().chain(&eos_tokens).find(|&&t| t as usize >= raw.vocab_size) {
            return Err(Error::Token { got, vocab_size: raw.vocab_size });
        }
        Ok(Self {
            vocab_size: raw.vocab_size,
            hidden_size: raw.hidden_size,
            intermediate_size: raw.intermediate_size,
            layers: raw.num_hidden_layers,
            heads,
            kv_heads,
            head_dim,
            rms_norm_eps,
            max_position_embeddings: raw.max_position_embeddings,
            rope_theta,
            rope_scaling,
            tie_word_embeddings: raw.tie_word_embeddings,
            attention_bias: raw.attention_bias,
            mlp_bias: raw.mlp_bias,
            bos_token: raw.bos_token_id,
            eos_tokens,
        })
    }

    /// The angle that each pair of a head's elements turns by from one position to the next,
    /// computed in f32 as the models' authors do.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        (0..self.head_dim / 2)
            .map(|i| 1.0 / self.rope_theta.powf((2 * i) as f32 / self.head_dim as f32))
            .map(|frequency| self.rope_scaling.as_ref().map_or(frequency, |scaling| scaling.apply(frequency)))
            .collect()
    }
}

impl Llama3Rope {
    fn check(&self) -> Result<()> {
        for (field, got) in [
            ("rope_scaling.factor", self.factor),
            ("rope_scaling.low_freq_factor", self.low_freq_factor),
            ("rope_scaling.high_freq_factor", self.high_freq_factor),
        ] {
            if !(got.is_finite() && got > 0.0) {
                return Err(value(field, got, "a finite number above 0"));
            }
        }
        if self.high_freq_factor <= self.low_freq_factor {
            let expected = format!("more than low_freq_factor ({})", self.low_freq_factor);
            return Err(value("rope_scaling.high_freq_factor", self.high_freq_factor, expected));
        }
        if self.original_max_position_embeddings == 0 {
            return Err(value("rope_scaling.original_max_position_embeddings", 0, "at least 1"));
        }
        Ok(())
    }

    fn apply(&self, frequency: f32) -> f32 {
        let original = self.original_max_position_embeddings as f32;
        let wavelength = 2.0 * std::f32::consts::PI / frequency;
        if wavelength > original / self.low_freq_factor {
            frequency / self.factor
        } else if wavelength < original / self.high_freq_factor {
            frequency
        } else {
            let smooth =
                (original / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - smooth) * frequency / self.factor + smooth * frequency
        }
    }
}

impl From<Tokens> for Vec<u32> {
    fn from(tokens: Tokens) -> Self {
        match tokens {
            Tokens::One(token) => vec![token],
            Tokens::Many(tokens) => tokens,
        }
    }
}

fn value(field: &'static str, got: impl ToString, expected: impl Into<String>) -> Error {
    Error::ConfigValue { field, got: got.to_string(), expected: expected.into() }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|cause| Error::Read { path: path.into(), cause })
}

pub(crate) fn parse_json<T: serde::de::DeserializeOwned>(json: &[u8], path: &Path) -> Result<T> {
    serde_json::from_slice(json).map_err(|cause| Error::Json { path: path.into(), cause })
}
