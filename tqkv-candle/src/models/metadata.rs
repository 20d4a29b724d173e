//! A GGUF file's metadata, and a model's configuration out of them.

use super::architecture::{ARCHITECTURES, Architecture, Bias, Windows};
use super::config::{ModelConfig, expect_count, expect_layers, value};
use super::gguf::Value;
use super::rope::{Rope, RopeScaling, longrope_attention_factor, yarn_attention_factor};
use super::weights::Weights;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The metadata of a GGUF file: the model's configuration, the tokenizer, the chat template.
///
/// Each of these is nothing where there is no such key, and [`Error::FieldType`] where it holds something else.
#[derive(Debug, Clone)]
pub struct Metadata {
    path: PathBuf,
    values: BTreeMap<String, Value>,
}

impl Metadata {
    pub(crate) fn new(path: &Path, values: BTreeMap<String, Value>) -> Self {
        Self { path: path.into(), values }
    }

    /// Reads the header of a file.
    pub fn load(path: &Path) -> Result<Self> {
        Ok(Self::new(path, Weights::load_gguf(path)?.1))
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(found) = self.values.get(key) else { return Ok(None) };
        let wrong = || Error::FieldType { path: self.path.clone(), field: key.into(), got: shorten(found), expected };
        read(found).map(Some).ok_or_else(wrong)
    }

    /// A whole number of at least 0.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number of at least 0", |value| match value {
            Value::Integer(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f32>> {
        self.get(key, "a number", |value| match value {
            Value::Integer(n) => Some(*n as f32),
            Value::Float(n) => Some(*n as f32),
            _ => None,
        })
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a text", |value| match value {
            Value::Text(text) => Some(&text[..]),
            _ => None,
        })
    }

    /// A list of texts.
    pub fn texts(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key, "a list of texts", |value| match value {
            Value::Texts(texts) => Some(&texts[..]),
            _ => None,
        })
    }

    /// A list of whole numbers.
    pub fn integers(&self, key: &str) -> Result<Option<&[i64]>> {
        self.get(key, "a list of whole numbers", |value| match value {
            Value::Integers(list) => Some(&list[..]),
            _ => None,
        })
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<&[f64]>> {
        self.get(key, "a list of numbers", |value| match value {
            Value::Floats(list) => Some(&list[..]),
            _ => None,
        })
    }

    /// A token.
    pub fn token(&self, key: &str) -> Result<Option<u32>> {
        self.get(key, "a token", |value| match value {
            Value::Integer(n) => u32::try_from(*n).ok(),
            _ => None,
        })
    }
}

fn shorten(value: &Value) -> String {
    match value {
        Value::Integer(n) => n.to_string(),
        Value::Float(n) => n.to_string(),
        Value::Bool(flag) => flag.to_string(),
        Value::Text(text) => format!("{:?}", text.chars().take(80).collect::<String>()),
        Value::Integers(list) => format!("a list of {} whole numbers", list.len()),
        Value::Floats(list) => format!("a list of {} numbers", list.len()),
        Value::Bools(list) => format!("a list of {} truth values", list.len()),
        Value::Texts(list) => format!("a list of {} texts", list.len()),
        Value::Nested => "a list of lists".into(),
    }
}

/// What GGUF calls the fields of a config.json.
const KEYS: [(&str, &str); 20] = [
    ("num_hidden_layers", "block_count"),
    ("max_position_embeddings", "context_length"),
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("sliding_window", "attention.sliding_window"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("rope_theta", "rope.freq_base"),
    ("factor", "rope.scaling.factor"),
    ("original_max_position_embeddings", "rope.scaling.original_context_length"),
    ("attention_factor", "rope.scaling.attn_factor"),
    ("beta_fast", "rope.scaling.yarn_beta_fast"),
    ("beta_slow", "rope.scaling.yarn_beta_slow"),
    ("vocab_size", "vocab_size"),
    ("rope_type", "rope.scaling.type"),
    ("partial_rotary_factor", "rope.dimension_count"),
];

/// Keys of other models that would change the result, and the number that changes nothing besides 0 and false.
const REFUSED: [(&str, f32); 10] = [
    ("expert_count", 0.0),
    ("attention.alibi_bias_max", 0.0),
    ("attention.max_alibi_bias", 0.0),
    ("attention.clamp_kqv", 0.0),
    ("attention.clip_kqv", 0.0),
    ("attention.shared_kv_layers", 0.0),
    ("use_parallel_residual", 0.0),
    ("logit_scale", 1.0),
    ("residual_scale", 1.0),
    ("embedding_scale", 1.0),
];

/// The metadata under an architecture's name, by the names of config.json.
struct Keys<'a> {
    metadata: &'a Metadata,
    architecture: &'static Architecture,
}

impl Keys<'_> {
    fn key(&self, name: &str) -> String {
        let known = KEYS.iter().find(|(json, _)| *json == name).map_or(name, |(_, key)| key);
        format!("{}.{known}", self.architecture.gguf)
    }

    /// A whole number, or a list of one a layer that are all the same.
    fn count(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        if let Some(Value::Integers(list)) = self.metadata.values.get(&key)
            && let Some(one) = list.first().and_then(|&n| usize::try_from(n).ok())
            && list.iter().all(|n| *n == list[0])
        {
            return Ok(Some(one));
        }
        self.metadata.count(&key)
    }

    fn number(&self, name: &str) -> Result<Option<f32>> {
        self.metadata.number(&self.key(name))
    }

    /// A count that must be there.
    fn required(&self, name: &str) -> Result<usize> {
        let key = self.key(name);
        let missing = || Error::MissingField { path: self.metadata.path.clone(), field: key.clone() };
        expect_count(&key, self.count(name)?.ok_or_else(missing)?)
    }

    fn refuse(&self) -> Result<()> {
        let unsupported = |field: String, got: &Value, expected: String| {
            Err(Error::Unsupported { field, got: shorten(got), expected })
        };
        for (name, neutral) in REFUSED {
            let key = self.key(name);
            match self.metadata.values.get(&key) {
                None | Some(Value::Bool(false) | Value::Integer(0)) => {}
                Some(Value::Float(n)) if *n == 0.0 || *n as f32 == neutral => {}
                Some(got) => return unsupported(key, got, neutral.to_string()),
            }
        }
        if let Some(got) = self.metadata.count("split.count")?.filter(|&got| got > 1) {
            return unsupported("split.count".into(), &Value::Integer(got as i128), "1 (one file)".into());
        }
        let key = self.key("attention.causal");
        if let Some(got @ Value::Bool(false)) = self.metadata.values.get(&key) {
            return unsupported(key, got, "true".into());
        }
        Ok(())
    }
}

impl ModelConfig {
    /// What a GGUF file is a model of.
    pub(crate) fn from_gguf(metadata: &Metadata, weights: &mut Weights) -> Result<Self> {
        let keys = Keys { metadata, architecture: architecture(metadata)? };
        keys.refuse()?;
        let architecture = keys.architecture;
        let (hidden_size, heads) = (keys.required("hidden_size")?, keys.required("num_attention_heads")?);
        let layers = expect_layers(&keys.key("num_hidden_layers"), keys.required("num_hidden_layers")?)?;
        let head_dim = head_dim(&keys, hidden_size, heads)?;
        let context = keys.required("max_position_embeddings")?;
        let (rope, context) = rope(&keys, weights, head_dim, context)?;
        let local_rope = match architecture.local_rope_theta {
            Some(default) => {
                let own = keys.number("rope.freq_base_swa")?.or(keys.number("rope.local.freq_base")?);
                Some(Rope::new(head_dim, own.unwrap_or(default)))
            }
            None => None,
        };
        let bias = |bias: Bias, name: &str| match bias {
            Bias::Never => false,
            Bias::Always => true,
            Bias::Field(_) => weights.has(&format!("blk.0.{name}.bias")),
        };
        let capped = |name: &str, default: Option<f32>| -> Result<Option<f32>> {
            if architecture.own_fields.contains(&name) { Ok(keys.number(name)?.or(default)) } else { Ok(None) }
        };
        let token = |name: &str| metadata.token(&format!("tokenizer.ggml.{name}_token_id"));
        let vocab_size = vocab_size(&keys, weights, hidden_size)?;
        let scalar = match architecture.wide_scale_layers == Some(layers) {
            true => hidden_size as f32 / heads as f32,
            false => head_dim as f32,
        };
        let eos: Vec<u32> = [token("eos")?, token("eot")?, token("eom")?].into_iter().flatten().collect();
        let config = Self {
            architecture,
            vocab_size,
            hidden_size,
            intermediate_size: keys.required("intermediate_size")?,
            layers,
            heads,
            kv_heads: keys.count("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            activation: architecture.activation,
            rms_norm_eps: keys.number("rms_norm_eps")?.unwrap_or(architecture.defaults.rms_norm_eps),
            max_position_embeddings: context,
            rope,
            local_rope,
            windows: windows(&keys, layers, context)?,
            attention_scale: keys.number("attention.scale")?.unwrap_or(1.0 / scalar.sqrt()),
            attention_softcap: capped("attn_logit_softcapping", architecture.defaults.attention_softcap)?,
            logits_softcap: capped("final_logit_softcapping", architecture.defaults.logits_softcap)?,
            embedding_scale: if architecture.scaled_embeddings { (hidden_size as f32).sqrt() } else { 1.0 },
            tie_word_embeddings: !weights.has("output.weight"),
            qkv_bias: bias(architecture.qkv_bias, "attn_q"),
            output_bias: bias(architecture.output_bias, "attn_output"),
            mlp_bias: bias(architecture.mlp_bias, "ffn_down"),
            bos_token: token("bos")?.filter(|&token| (token as usize) < vocab_size),
            eos_tokens: eos,
        };
        config.check(&|name| keys.key(name))?;
        Ok(config)
    }
}

fn architecture(metadata: &Metadata) -> Result<&'static Architecture> {
    let field = "general.architecture";
    let missing = || Error::MissingField { path: metadata.path.clone(), field: field.into() };
    let got = metadata.text(field)?.ok_or_else(missing)?;
    ARCHITECTURES.into_iter().find(|a| a.gguf == got).ok_or_else(|| {
        let mut known: Vec<&str> = ARCHITECTURES.iter().map(|a| a.gguf).collect();
        known.dedup();
        let expected = format!("one of {}", known.join(", "));
        Error::Unsupported { field: field.into(), got: format!("{got:?}"), expected }
    })
}

fn head_dim(keys: &Keys, hidden_size: usize, heads: usize) -> Result<usize> {
    let head_dim = match keys.count("head_dim")? {
        Some(head_dim) => head_dim,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a multiple of {} ({heads})", keys.key("num_attention_heads"));
            return Err(value(&keys.key("hidden_size"), hidden_size, expected));
        }
    };
    match keys.count("attention.value_length")? {
        Some(got) if got != head_dim => Err(Error::Unsupported {
            field: keys.key("attention.value_length"),
            got: got.to_string(),
            expected: format!("{head_dim} as in the keys"),
        }),
        _ => Ok(head_dim),
    }
}

/// As many tokens as the embedding has rows.
fn vocab_size(keys: &Keys, weights: &Weights, hidden_size: usize) -> Result<usize> {
    let name = "token_embd.weight";
    match weights.shape(name) {
        Some(&[rows, _]) => expect_count(&keys.key("vocab_size"), rows),
        Some(other) => {
            let got = other.to_vec();
            Err(Error::TensorShape { name: name.into(), got, expected: vec![0, hidden_size] })
        }
        None => Err(Error::MissingTensor { name: name.into(), expected: vec![0, hidden_size] }),
    }
}

fn windows(keys: &Keys, layers: usize, context: usize) -> Result<Vec<Option<usize>>> {
    // 0 says none, and a window that covers the whole context hides nothing.
    let own = keys.count("sliding_window")?.filter(|&window| window != 0);
    let (window, every) = match keys.architecture.windows {
        // Mistral's files say that they are Llama's.
        Windows::Never | Windows::All => (own, usize::MAX),
        Windows::AllBut(every) => (own.or(keys.architecture.defaults.sliding_window), every),
        Windows::Late => (own, 0),
    };
    let window = window.filter(|&window| window < context);
    match (window, every) {
        (Some(got), 0) => Err(Error::Unsupported {
            field: keys.key("sliding_window"),
            got: got.to_string(),
            expected: "0, as nothing says which layers it is for,".into(),
        }),
        _ => Ok((0..layers).map(|layer| window.filter(|_| !(layer + 1).is_multiple_of(every))).collect()),
    }
}

/// The rotary embedding, and the longest context that it is made for.
fn rope(keys: &Keys, weights: &mut Weights, head_dim: usize, context: usize) -> Result<(Rope, usize)> {
    let theta = keys.number("rope_theta")?.or(keys.number("rope.global.freq_base")?);
    let dim = keys.count("partial_rotary_factor")?.unwrap_or(head_dim);
    let mut rope = Rope::new(dim, theta.unwrap_or(keys.architecture.defaults.rope_theta));
    let original = keys.count("original_max_position_embeddings")?.unwrap_or(context);
    let factor = keys.number("factor")?.or(keys.number("rope.scale_linear")?);
    let kind_key = keys.key("rope_type");
    let kind = keys.metadata.text(&kind_key)?;
    let own_attention_factor = keys.number("attention_factor")?;

    let divisors = |name: &str, weights: &mut Weights| -> Result<Option<Vec<f32>>> {
        if !weights.has(name) {
            return Ok(None);
        }
        Ok(Some(weights.vector(name, dim / 2)?.to_vec1()?))
    };
    if let Some(short) = divisors("rope_factors_short.weight", weights)? {
        // Those for longer contexts are left: keys once cached cannot be turned again.
        divisors("rope_factors_long.weight", weights)?;
        let stretched = context as f32 / original as f32;
        let attention_factor = own_attention_factor.unwrap_or_else(|| longrope_attention_factor(stretched, original));
        rope.scaling = RopeScaling::Divisors { divisors: short, attention_factor };
        return Ok((rope, original.min(context)));
    }
    if let Some(divisors) = divisors("rope_freqs.weight", weights)? {
        rope.scaling = RopeScaling::Divisors { divisors, attention_factor: 1.0 };
        return Ok((rope, context));
    }
    rope.scaling = match (kind, factor) {
        (Some("none"), _) | (None, None) => RopeScaling::None,
        (Some("linear") | None, factor) => match factor.filter(|&f| f != 0.0) {
            Some(factor) => RopeScaling::Linear { factor },
            None => RopeScaling::None,
        },
        (Some("yarn"), Some(factor)) => RopeScaling::Yarn {
            factor,
            original_context: original,
            beta_fast: keys.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: keys.number("beta_slow")?.unwrap_or(1.0),
            truncate: true,
            attention_factor: own_attention_factor.unwrap_or(1.0) * yarn_attention_factor(factor, None, None),
        },
        (Some(got), _) => {
            let expected = "\"none\", \"linear\", \"yarn\" with a factor, or \"longrope\" with its tensors".into();
            return Err(Error::Unsupported { field: kind_key, got: format!("{got:?}"), expected });
        }
    };
    Ok((rope, context))
}
