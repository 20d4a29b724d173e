//! `config.json` of a Llama model.

use crate::error::{Error, Result};
use crate::fields::{Fields, Found, shorten};
use serde_json::{Map, Value, json};
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
#[derive(Debug, Clone, PartialEq)]
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

/// A value of a field that changes nothing, besides null.
enum Neutral {
    /// None. An object or a list without anything in it says as little as null.
    Nothing,
    /// Any of these.
    Any(&'static [Literal]),
    /// A list of nothing but this.
    All(Literal),
}

/// A value as it stands in a file.
enum Literal {
    Flag(bool),
    Number(f64),
    Text(&'static str),
}

/// Fields that other models of the family use and that would change the result here: refused at every level unless neutral.
const REFUSED: [(&str, Neutral, &str); 39] = {
    use Literal::{Flag, Number, Text};
    use Neutral::{All, Any, Nothing};
    const OFF: Neutral = Any(&[Flag(false)]);
    const NONE: Neutral = Any(&[Number(0.0), Flag(false)]);
    const ONE: Neutral = Any(&[Number(1.0)]);
    [
        ("hidden_act", Any(&[Text("silu"), Text("swish")]), "\"silu\""),
        ("hidden_activation", Any(&[Text("silu"), Text("swish")]), "\"silu\""),
        ("sliding_window", Nothing, "null (no sliding window)"),
        ("use_sliding_window", OFF, "false"),
        ("attention_chunk_size", Nothing, "null (attention over the whole context)"),
        ("layer_types", All(Text("full_attention")), "\"full_attention\""),
        ("is_causal", Any(&[Flag(true)]), "true"),
        ("use_bidirectional_attention", OFF, "false"),
        ("is_encoder_decoder", OFF, "false"),
        ("add_cross_attention", OFF, "false"),
        ("cross_attention_layers", Nothing, "null or an empty list"),
        ("partial_rotary_factor", ONE, "1.0 (rotation of whole heads)"),
        ("rotary_pct", ONE, "1.0 (rotation of whole heads)"),
        ("no_rope_layers", All(Number(1.0)), "1 (rotary embeddings in every layer)"),
        ("no_rope_layer_interval", NONE, "0 (rotary embeddings in every layer)"),
        ("rope_interleave", OFF, "false"),
        ("rope_interleaved", OFF, "false"),
        ("position_embedding_type", Any(&[Text("rope"), Text("rotary")]), "\"rope\""),
        ("alibi", OFF, "false"),
        ("use_alibi", OFF, "false"),
        ("query_pre_attn_scalar", Nothing, "null (attention scaled by head_dim)"),
        ("attention_multiplier", Nothing, "null (attention scaled by head_dim)"),
        ("embedding_multiplier", ONE, "1.0"),
        ("residual_multiplier", ONE, "1.0"),
        ("logits_scaling", ONE, "1.0"),
        ("logit_scale", ONE, "1.0"),
        ("attn_logit_softcapping", Nothing, "null (attention without softcap)"),
        ("final_logit_softcapping", Nothing, "null (logits without softcap)"),
        ("clip_qkv", Nothing, "null"),
        ("use_qk_norm", OFF, "false"),
        ("qk_layernorm", OFF, "false"),
        ("use_parallel_residual", OFF, "false"),
        ("kv_lora_rank", NONE, "null (keys and values of full rank)"),
        ("num_kv_shared_layers", NONE, "0 (keys and values in every layer)"),
        ("num_local_experts", NONE, "0 (a dense feed-forward layer)"),
        ("num_experts", NONE, "0 (a dense feed-forward layer)"),
        ("n_routed_experts", NONE, "0 (a dense feed-forward layer)"),
        ("quantization_config", Nothing, "null (unquantized weights)"),
        ("compression_config", Nothing, "null (unquantized weights)"),
    ]
};

impl LlamaConfig {
    /// Reads `config.json`, and the end tokens of `generation_config.json` where there is one,
    /// from a model's directory.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        let mut config = Self::parse(&read(&path)?, &path)?;
        let path = dir.join("generation_config.json");
        if path.exists() {
            let json = parse_json(&read(&path)?, &path)?;
            if let Some(tokens) = Fields::new(&path, &json)?.tokens("eos_token_id")? {
                config.eos_tokens = tokens;
                config.check_tokens()?;
            }
        }
        Ok(config)
    }

    /// Parses the text of a `config.json`; `path` is for the error message.
    ///
    /// A field counts at any level: the top, `text_config`, and for rotary embeddings `rope_scaling` and
    /// `rope_parameters`.
    pub fn parse(json: &[u8], path: &Path) -> Result<Self> {
        let json = parse_json(json, path)?;
        let top = Fields::new(path, &json)?;
        let model = top.and(&top.within(&["text_config"])?);
        let rope = model.within(&["rope_scaling", "rope_parameters"])?;
        let everywhere = model.and(&rope);
        refuse_others(&top, &everywhere)?;
        let count = |name: &str| -> Result<usize> {
            let got = model.required(name, model.count(name)?)?;
            // The upper limit keeps every product of two of them far from overflow.
            if (1..=1 << 28).contains(&got) { Ok(got) } else { Err(value(name, got, "1 to 2^28")) }
        };
        let heads = count("num_attention_heads")?;
        let config = Self {
            vocab_size: count("vocab_size")?,
            hidden_size: count("hidden_size")?,
            intermediate_size: count("intermediate_size")?,
            layers: count("num_hidden_layers")?,
            heads,
            kv_heads: model.count("num_key_value_heads")?.unwrap_or(heads),
            head_dim: head_dim(&model, count("hidden_size")?, heads)?,
            rms_norm_eps: model.number("rms_norm_eps")?.unwrap_or(1e-6),
            max_position_embeddings: count("max_position_embeddings")?,
            rope_theta: everywhere.number("rope_theta")?.unwrap_or(10_000.0),
            rope_scaling: Llama3Rope::read(&rope)?,
            tie_word_embeddings: model.flag("tie_word_embeddings")?.unwrap_or(false),
            attention_bias: model.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: model.flag("mlp_bias")?.unwrap_or(false),
            bos_token: top.tokens("bos_token_id")?.and_then(|tokens| tokens.first().copied()),
            eos_tokens: top.tokens("eos_token_id")?.unwrap_or_default(),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        let Self { heads, kv_heads, head_dim, rope_theta, rms_norm_eps, .. } = *self;
        if kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err(value("num_key_value_heads", kv_heads, format!("a divisor of num_attention_heads ({heads})")));
        }
        if head_dim == 0 || head_dim > 1 << 16 || !head_dim.is_multiple_of(2) {
            return Err(value("head_dim", head_dim, "an even number from 2 to 65536"));
        }
        if !(rope_theta.is_finite() && rope_theta > 0.0) {
            return Err(value("rope_theta", rope_theta, "a finite number above 0"));
        }
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            return Err(value("rms_norm_eps", rms_norm_eps, "a finite number of at least 0"));
        }
        self.check_tokens()
    }

    fn check_tokens(&self) -> Result<()> {
        match self.bos_token.iter().chain(&self.eos_tokens).find(|&&t| t as usize >= self.vocab_size) {
            Some(&got) => Err(Error::Token { got, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
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

/// Fails for another model than Llama, and for what would change the result without being computed.
fn refuse_others(top: &Fields, everywhere: &Fields) -> Result<()> {
    if let Some(got) = top.text("model_type")?.filter(|&t| t != "llama") {
        return Err(unsupported("model_type", &got.into(), "\"llama\""));
    }
    if let Some((field, got)) = top.find("architectures")?.filter(|(_, a)| **a != json!(["LlamaForCausalLM"])) {
        return Err(unsupported(&field, got, "[\"LlamaForCausalLM\"]"));
    }
    for (name, neutral, expected) in &REFUSED {
        for (field, got) in everywhere.all(name) {
            if let Some((field, got)) = neutral.offence(field, got) {
                return Err(unsupported(&field, got, expected));
            }
        }
    }
    Ok(())
}

fn head_dim(model: &Fields, hidden_size: usize, heads: usize) -> Result<usize> {
    match model.count("head_dim")? {
        Some(head_dim) => Ok(head_dim),
        None if hidden_size.is_multiple_of(heads) => Ok(hidden_size / heads),
        None => {
            let expected = format!("a multiple of num_attention_heads ({heads}), as there is no head_dim");
            Err(value("hidden_size", hidden_size, expected))
        }
    }
}

impl Neutral {
    /// What of the field's value is not neutral.
    fn offence<'a>(&self, field: String, value: &'a Value) -> Option<Found<'a>> {
        let neutral = match self {
            Self::Nothing => {
                value.as_object().is_some_and(Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
            }
            Self::Any(literals) => literals.iter().any(|literal| literal.is(value)),
            Self::All(literal) => match value.as_array() {
                Some(list) => {
                    let (i, value) = list.iter().enumerate().find(|(_, value)| !literal.is(value))?;
                    return Some((format!("{field}[{i}]"), value));
                }
                None => false,
            },
        };
        (!neutral).then_some((field, value))
    }
}

impl Literal {
    fn is(&self, value: &Value) -> bool {
        match *self {
            Self::Flag(flag) => value.as_bool() == Some(flag),
            Self::Number(number) => value.as_f64() == Some(number),
            Self::Text(text) => value.as_str() == Some(text),
        }
    }
}

impl Llama3Rope {
    /// What the objects about rotary embeddings say.
    fn read(rope: &Fields) -> Result<Option<Self>> {
        if let Some((field, got)) = rope.objects().next() {
            return Err(unsupported(&field, got, "one kind of rotary embedding for all layers"));
        }
        // Older files call it "type".
        let (kind, old) = (rope.find("rope_type")?, rope.find("type")?);
        let Some((field, kind)) = kind.or(old) else {
            return match rope.find("factor")? {
                Some((field, got)) => Err(unsupported(&field, got, "null, as there is no rope_type")),
                None => Ok(None),
            };
        };
        match kind.as_str() {
            Some("default") => Ok(None),
            Some("llama3") => {
                let number = |name: &str| rope.required(name, rope.number(name)?);
                let original = "original_max_position_embeddings";
                let scaling = Self {
                    factor: number("factor")?,
                    low_freq_factor: number("low_freq_factor")?,
                    high_freq_factor: number("high_freq_factor")?,
                    original_max_position_embeddings: rope.required(original, rope.count(original)?)?,
                };
                scaling.check(rope)?;
                Ok(Some(scaling))
            }
            _ => Err(unsupported(&field, kind, "\"default\" or \"llama3\"")),
        }
    }

    fn check(&self, rope: &Fields) -> Result<()> {
        for (field, got) in [
            ("factor", self.factor),
            ("low_freq_factor", self.low_freq_factor),
            ("high_freq_factor", self.high_freq_factor),
        ] {
            if !(got.is_finite() && got > 0.0) {
                return Err(value(&rope.name(field), got, "a finite number above 0"));
            }
        }
        if self.high_freq_factor <= self.low_freq_factor {
            let expected = format!("more than low_freq_factor ({})", self.low_freq_factor);
            return Err(value(&rope.name("high_freq_factor"), self.high_freq_factor, expected));
        }
        if self.original_max_position_embeddings == 0 {
            return Err(value(&rope.name("original_max_position_embeddings"), 0, "at least 1"));
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

fn unsupported(field: &str, got: &Value, expected: &'static str) -> Error {
    Error::Unsupported { field: field.into(), got: shorten(got), expected: expected.into() }
}

fn value(field: &str, got: impl ToString, expected: impl Into<String>) -> Error {
    Error::ConfigValue { field: field.into(), got: got.to_string(), expected: expected.into() }
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}

pub(crate) fn parse_json(json: &[u8], path: &Path) -> Result<Value> {
    serde_json::from_slice(json).map_err(|source| Error::Json { path: path.into(), source })
}
