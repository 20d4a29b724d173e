//! `config.json`: defaults, what is refused, Llama 3's rope scaling.

mod common;

use common::TinyModel;
use serde_json::{Value, json};
use std::path::Path;
use tqkv_candle::{Error, ModelConfig, RopeScaling};

fn parse(config: &Value) -> Result<ModelConfig, Error> {
    ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json"))
}

fn tiny() -> Value {
    TinyModel::new().config
}

fn with(field: &str, value: Value) -> Result<ModelConfig, Error> {
    let mut config = tiny();
    config[field] = value;
    parse(&config)
}

fn without(field: &str) -> Result<ModelConfig, Error> {
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
    assert_eq!((config.rope.theta, config.rope.dim, config.rms_norm_eps), (10_000.0, 16, 1e-6));
    assert!(!config.tie_word_embeddings && !config.qkv_bias && !config.output_bias && !config.mlp_bias);
    assert!(config.rope.scaling == RopeScaling::None && config.bos_token.is_none() && config.eos_tokens.is_empty());
}

#[test]
fn end_tokens_are_one_or_several() {
    assert_eq!(with("eos_token_id", json!(5)).unwrap().eos_tokens, [5]);
    assert_eq!(with("eos_token_id", json!([5, 7])).unwrap().eos_tokens, [5, 7]);
    assert!(matches!(with("eos_token_id", json!(256)), Err(Error::Token { got: 256, vocab_size: 256 })));
    // Some files say -1 for none.
    assert_eq!(with("eos_token_id", json!(-1)).unwrap().eos_tokens, [0u32; 0]);
    assert_eq!(with("eos_token_id", json!([5, -1])).unwrap().eos_tokens, [5]);
    assert_eq!(with("bos_token_id", json!(-1)).unwrap().bos_token, None);
    for wrong in [json!(-2), json!(1.5), json!("</s>"), json!([5, [6]]), json!({})] {
        let error = with("eos_token_id", wrong.clone()).unwrap_err();
        assert!(matches!(&error, Error::FieldType { field, .. } if field == "eos_token_id"), "{wrong}: {error}");
        let expected = format!("eos_token_id is {wrong}, expected a token, a list of tokens, or -1 for none");
        assert!(error.to_string().ends_with(&expected), "{error}");
    }
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
    let frequencies = parse(&config).unwrap().rope.inverse_frequencies();
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
        ("architectures", json!(["BertForMaskedLM"])),
        ("architectures", json!(["LlamaForCausalLM", "Qwen2ForCausalLM"])),
        ("hidden_act", json!("gelu")),
        ("sliding_window", json!(4096)),
        ("sliding_window", json!(1)),
        ("quantization_config", json!({ "bits": 4 })),
        ("partial_rotary_factor", json!(0.5)),
        ("rope_scaling", json!({ "rope_type": "dynamic", "factor": 4.0 })),
        ("rope_scaling", json!({ "type": "longrope", "long_factor": [1.0] })),
        ("rope_scaling", json!({ "factor": 4.0 })),
        ("rope_scaling", json!({ "rope_type": 7 })),
        ("rope_parameters", json!({ "rope_type": "default", "partial_rotary_factor": 0.5 })),
        ("rope_parameters", json!({ "full_attention": { "rope_type": "default" } })),
        ("layer_types", json!(["full_attention", "sliding_attention"])),
        ("layer_types", json!("sliding_attention")),
        ("no_rope_layers", json!([1, 0])),
        ("num_local_experts", json!(8)),
        ("num_experts", json!(1)),
        ("attn_logit_softcapping", json!(50.0)),
        ("attention_chunk_size", json!(8192)),
        ("embedding_multiplier", json!(12.0)),
        ("rope_interleave", json!(true)),
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
fn a_field_counts_wherever_it_stands() {
    for (field, refused) in [
        ("partial_rotary_factor", json!(0.5)),
        ("sliding_window", json!(512)),
        ("layer_types", json!(["full_attention", "linear_attention"])),
        ("hidden_act", json!("gelu")),
    ] {
        for level in ["text_config", "rope_parameters", "rope_scaling"] {
            let error = with(level, json!({ field: refused })).unwrap_err();
            let Error::Unsupported { field: named, .. } = &error else { panic!("{level} {field}: {error}") };
            assert!(named.starts_with(&format!("{level}.{field}")), "{error}");
        }
    }
    let mut nested = tiny();
    nested["text_config"] = json!({ "rope_scaling": { "rope_type": "dynamic", "factor": 4.0 } });
    let error = parse(&nested).unwrap_err().to_string();
    assert!(error.contains("text_config.rope_scaling.rope_type is \"dynamic\""), "{error}");

    // What is obeyed is obeyed at every level, and nothing may be said twice differently.
    for level in ["text_config", "rope_parameters", "rope_scaling"] {
        let mut config = tiny();
        config.as_object_mut().unwrap().remove("rope_theta");
        config[level] = json!({ "rope_theta": 5e5 });
        assert_eq!(parse(&config).unwrap().rope.theta, 5e5, "{level}");
        config["rope_theta"] = json!(500_000);
        assert_eq!(parse(&config).unwrap().rope.theta, 5e5, "{level}");
        config["rope_theta"] = json!(1e4);
        let error = parse(&config).unwrap_err();
        assert!(matches!(error, Error::FieldConflict { .. }), "{error}");
        assert_eq!(error.to_string(), format!("config: rope_theta is 10000.0, but {level}.rope_theta is 500000.0"));
    }
    for field in ["attention_bias", "mlp_bias"] {
        let mut config = tiny();
        config["text_config"] = json!({ field: true });
        let config = parse(&config).unwrap();
        assert!(config.output_bias ^ config.mlp_bias, "{field}");
    }
}

#[test]
fn what_changes_nothing_is_accepted() {
    for (field, value) in [
        ("layer_types", json!(["full_attention", "full_attention"])),
        ("no_rope_layers", json!([1, 1])),
        ("num_local_experts", json!(0)),
        ("quantization_config", json!({})),
        ("use_sliding_window", json!(false)),
        ("hidden_act", json!("swish")),
        ("attention_bias", Value::Null),
        ("mlp_bias", Value::Null),
        ("tie_word_embeddings", Value::Null),
        ("sliding_window", Value::Null),
        ("rope_scaling", json!({})),
        ("rope_scaling", json!({ "rope_type": "default", "factor": null })),
        ("rope_parameters", json!({ "rope_type": "default", "partial_rotary_factor": 1.0, "rope_theta": 10000 })),
        ("text_config", json!({ "partial_rotary_factor": 1 })),
        ("partial_rotary_factor", json!(1.0)),
        ("embedding_multiplier", json!(1)),
        ("cross_attention_layers", json!([])),
    ] {
        let mut plain = tiny();
        plain[field] = Value::Null;
        assert_eq!(with(field, value.clone()).unwrap(), parse(&plain).unwrap(), "{field} {value}");
    }
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
        assert!(matches!(&error, Error::ConfigValue { field: f, .. } if f == field), "{field} {value}: {error}");
    }
    let mut config = tiny();
    config["hidden_size"] = json!(33);
    config["head_dim"] = Value::Null;
    assert!(matches!(parse(&config), Err(Error::ConfigValue { field, .. }) if field == "hidden_size"));

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
        assert!(matches!(&error, Error::ConfigValue { field: f, .. } if f.ends_with(field)), "{field}: {error}");
    }
}

#[test]
fn what_is_no_configuration_is_refused() {
    for text in ["", "{", "[1"] {
        let error = ModelConfig::parse(text.as_bytes(), Path::new("config.json")).unwrap_err();
        assert!(matches!(error, Error::Json { .. }), "{text}: {error}");
    }
    for text in ["[]", "null", "\"llama\""] {
        let error = ModelConfig::parse(text.as_bytes(), Path::new("config.json")).unwrap_err();
        assert!(matches!(error, Error::FieldType { .. }), "{text}: {error}");
    }
}

#[test]
fn messages_name_the_field() {
    for field in ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"] {
        for error in [without(field), with(field, Value::Null)].map(Result::unwrap_err) {
            assert_eq!(error.to_string(), format!("config.json: {field} is missing"));
        }
    }
    for (field, value, expected) in [
        ("vocab_size", json!("many"), "vocab_size is \"many\", expected a whole number of at least 0"),
        ("vocab_size", json!(-1), "vocab_size is -1, expected a whole number of at least 0"),
        ("head_dim", json!(1.5), "head_dim is 1.5, expected a whole number of at least 0"),
        ("rope_theta", json!("big"), "rope_theta is \"big\", expected a number"),
        ("tie_word_embeddings", json!(1), "tie_word_embeddings is 1, expected true or false"),
        ("model_type", json!(["llama"]), "model_type is [\"llama\"], expected a text"),
        ("rope_scaling", json!("llama3"), "rope_scaling is \"llama3\", expected an object"),
        ("text_config", json!([]), "text_config is [], expected an object"),
    ] {
        let error = with(field, value).unwrap_err();
        assert_eq!(error.to_string(), format!("config.json: {expected}"));
    }
    let missing = with("rope_scaling", json!({ "rope_type": "llama3", "factor": 8.0 })).unwrap_err();
    assert_eq!(missing.to_string(), "config.json: rope_scaling.low_freq_factor is missing");
    let one = with("layer_types", json!(["full_attention", "sliding_attention"])).unwrap_err();
    let expected = "config: layer_types[1] is \"sliding_attention\", but only \"full_attention\" is supported";
    assert_eq!(one.to_string(), expected);
}

#[test]
fn generation_config_names_its_field_too() {
    let dir = tempfile::tempdir().unwrap();
    TinyModel::new().write(dir.path());
    let load = |text: &str| {
        std::fs::write(dir.path().join("generation_config.json"), text).unwrap();
        ModelConfig::load(dir.path())
    };
    assert_eq!(load(r#"{"eos_token_id": [3, 4]}"#).unwrap().eos_tokens, [3, 4]);
    assert_eq!(load(r#"{"eos_token_id": -1}"#).unwrap().eos_tokens, [0u32; 0]);
    assert!(matches!(load(r#"{"eos_token_id": 256}"#), Err(Error::Token { got: 256, .. })));
    let error = load(r#"{"eos_token_id": "x"}"#).unwrap_err().to_string();
    assert!(error.contains("generation_config.json: eos_token_id is \"x\""), "{error}");
}
