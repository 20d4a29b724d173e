//! Fields of a config.json that would change the result and that only some architectures know, if any here.

use super::architecture::Architecture;
use crate::error::{Error, Result};
use crate::fields::{Fields, Found, shorten};
use serde_json::{Map, Value};

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

/// Refused at every level unless neutral, or one of the architecture's own fields.
const REFUSED: [(&str, Neutral, &str); 39] = {
    use Literal::{Flag, Number, Text};
    use Neutral::{All, Any, Nothing};
    const OFF: Neutral = Any(&[Flag(false)]);
    const NONE: Neutral = Any(&[Number(0.0), Flag(false)]);
    const ONE: Neutral = Any(&[Number(1.0)]);
    [
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
        ("global_head_dim", Nothing, "null (heads of one size)"),
        ("num_global_key_value_heads", Nothing, "null (as many heads in every layer)"),
        ("num_local_experts", NONE, "0 (a dense feed-forward layer)"),
        ("num_experts", NONE, "0 (a dense feed-forward layer)"),
        ("n_routed_experts", NONE, "0 (a dense feed-forward layer)"),
        ("quantization_config", Nothing, "null (unquantized weights)"),
        ("compression_config", Nothing, "null (unquantized weights)"),
    ]
};

/// Fails for what would change the result without being computed.
pub(super) fn refuse(architecture: &Architecture, everywhere: &Fields) -> Result<()> {
    for name in ["hidden_act", "hidden_activation"] {
        for (field, got) in everywhere.all(name) {
            if !architecture.activation_names.iter().any(|name| got.as_str() == Some(name)) {
                return Err(unsupported(&field, got, &format!("{:?}", architecture.activation_names[0])));
            }
        }
    }
    for (name, neutral, expected) in REFUSED.iter().filter(|f| !architecture.own_fields.contains(&f.0)) {
        for (field, got) in everywhere.all(name) {
            if let Some((field, got)) = neutral.offence(field, got) {
                return Err(unsupported(&field, got, expected));
            }
        }
    }
    Ok(())
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

pub(super) fn unsupported(field: &str, got: &Value, expected: &str) -> Error {
    Error::Unsupported { field: field.into(), got: shorten(got), expected: expected.into() }
}
