//! `config.json`: defaults, what is refused, Llama 3's rope scaling.

mod common;

use common::TinyModel;
use serde_json::{Value, json};
use std::path::Path;
use tqkv_candle::{Error, LlamaConfig};

fn parse(config: &Value) -> Result<LlamaConfig, Error> {
    LlamaConfig::parse(config.to_string().as_bytes(), Path::new("config.json"))
}

fn tiny() -> Value {
    TinyModel::new().config
}

fn with(field: &str, value: Value) -> Result<LlamaConfig, Error> {
    let mut config = tiny();
    config[field] = value;
    parse(&config)
}

fn without(field: &str) -> Result<LlamaConfig, Error> {
    let mut config = tiny();
    config.as_object_mut().unwrap().remove(field);
    parse(&config)
}

#[test]
fn defaults_are_those_of_transformers() {
    let config = parse(&json!({
        "vocab_size": 100, "hidden_size": 96, "intermediate_size": 10, "num_hidden_layers": 3,
        "num_attention_heads": 6, "max_position_embeddings": 512,
    }))
    .unwrap();
    assert_eq!((config.kv_heads, config.head_dim), (6, 16));
    assert_eq!((config.rope_theta, config.rms_norm_eps), (10_000.0, 1e-6));
    assert!(!config.tie_word_embeddings && !config.attention_bias && !config.mlp_bias);
    assert!(config.rope_scaling.is_none() && config.bos_token.is_none() && config.eos_tokens.is_empty());
}

#[test]
fn end_tokens_are_one_or_several() {
    assert_eq!(with("eos_token_id", json!(5)).unwrap().eos_tokens, [5]);
    assert_eq!(with("eos_token_id", json!([5, 7])).unwrap().eos_tokens, [5, 7]);
    assert!(matches!(with("eos_token_id", json!(256)), Err(Error::Token { got: 256, vocab_size: 256 })));
}

#[test]
fn llama3_scaling_by_hand() {
    // Llama 3.1 8B: head_dim 128, theta 500000, factor 8, low 1, high 4, original context 8192.
    let scaling = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 });
    let mut config = tiny();
    config["head_dim"] = json!(128);
    config["rope_theta"] = json!(500000.0);
    config["rope_scaling"] = scaling.clone();
    let frequencies = parse(&config).unwrap().inverse_frequencies();
    // Pair 0: wavelength 6.28 < 2048, kept: 1.
    // Pair 28: 500000^(-56/128) = 3.211446e-3, wavelength 1956.497 < 2048, kept.
    // Pair 29: 500000^(-58/128) = 2.616099e-3, wavelength 2401.738, smooth = (8192/2401.738 - 1)/3 = 0.803621:
    //   (1 - smooth) * f/8 + smooth * f = 2.616099e-3 * (0.0245474 + 0.803621) = 2.166571e-3.
    // Pair 35: 500000^(-70/128) = 7.644970e-4, wavelength 8218.7 > 8192, divided by 8: 9.556212e-5.
    // Pair 63: 500000^(-126/128) = 2.455141e-6, divided by 8: 3.068926e-7.
    let near = |i: usize, expected: f32| {
        let got: f32 = frequencies[i];
        assert!((got / expected - 1.0).abs() < 2e-6, "pair {i}: got {got:e}, expected {expected:e}");
    };
    near(0, 1.0);
    near(28, 3.211_446e-3);
    near(29, 2.166_571e-3);
    near(35, 9.556_212e-5);
    near(63, 3.068_926e-7);

    // The way transformers 5 writes it.
    let old = parse(&config).unwrap();
    config["rope_scaling"] = Value::Null;
    config.as_object_mut().unwrap().remove("rope_theta");
    config["rope_parameters"] = scaling;
    config["rope_parameters"]["rope_theta"] = json!(500000.0);
    assert_eq!(parse(&config).unwrap(), old);
}

#[test]
fn what_is_not_computed_is_refused() {
    for (field, value) in [
        ("model_type", json!("mistral")),
        ("architectures", json!(["Qwen2ForCausalLM"])),
        ("hidden_act", json!("gelu")),
        ("sliding_window", json!(4096)),
        ("sliding_window", json!(1)),
        ("quantization_config", json!({ "bits": 4 })),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_scaling", json!({ "rope_type": "yarn", "factor": 4.0 })),
        ("rope_scaling", json!({ "type": "linear", "factor": 4.0 })),
        ("rope_scaling", json!({ "factor": 4.0 })),
    ] {
        let error = with(field, value.clone()).unwrap_err();
        let Error::Unsupported { field: named, .. } = &error else { panic!("{field} {value}: {error}") };
        assert!(named.starts_with(field), "{error}");
    }
    assert!(with("sliding_window", Value::Null).is_ok());
    assert!(with("partial_rotary_factor", json!(1.0)).is_ok());
    assert!(with("rope_scaling", json!({ "rope_type": "default" })).is_ok());
}

#[test]
fn values_that_make_no_sense_are_refused() {
    for (field, value) in [
        ("vocab_size", json!(0)),
        ("num_hidden_layers", json!(0)),
        ("num_hidden_layers", json!(u64::MAX)),
        ("hidden_size", json!(u64::MAX)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(8)),
        ("head_dim", json!(0)),
        ("head_dim", json!(7)),
        ("head_dim", json!(100000)),
        ("max_position_embeddings", json!(0)),
        ("rope_theta", json!(0.0)),
        ("rope_theta", json!(-1.0)),
        ("rms_norm_eps", json!(-1.0)),
    ] {
        let error = with(field, value.clone()).unwrap_err();
        assert!(matches!(error, Error::ConfigValue { field: f, .. } if f == field), "{field} {value}: {error}");
    }
    let mut config = tiny();
    config["hidden_size"] = json!(33);
    config["head_dim"] = Value::Null;
    assert!(matches!(parse(&config), Err(Error::ConfigValue { field: "hidden_size", .. })));

    let good = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 });
    for (field, value) in [
        ("factor", json!(0.0)),
        ("low_freq_factor", json!(-1.0)),
        ("high_freq_factor", json!(1.0)),
        ("original_max_position_embeddings", json!(0)),
    ] {
        let mut scaling = good.clone();
        scaling[field] = value;
        let error = with("rope_scaling", scaling).unwrap_err();
        assert!(matches!(error, Error::ConfigValue { field: f, .. } if f.ends_with(field)), "{field}: {error}");
    }
}

#[test]
fn what_is_no_configuration_is_refused() {
    for text in ["", "{", "[]", "null", "\"llama\"", "{\"vocab_size\": \"many\"}", "{\"vocab_size\": -1}"] {
        let error = LlamaConfig::parse(text.as_bytes(), Path::new("config.json")).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{text}: {error}");
    }
    for field in ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"] {
        let error = without(field).unwrap_err();
        assert!(matches!(error, Error::Json { .. }) && error.to_string().contains(field), "{error}");
    }
    assert!(matches!(with("head_dim", json!(1.5)), Err(Error::Json { .. })));
    let missing = with("rope_scaling", json!({ "rope_type": "llama3", "factor": 8.0 }));
    assert!(matches!(missing, Err(Error::Json { .. })));
}
