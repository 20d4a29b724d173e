//! What configurations of the architectures say, in all the ways that files say it.

mod common;

use common::architectures::{golden, named};
use serde_json::{Map, Value, json};
use std::path::Path;
use tqkv_candle::{Activation, Error, ModelConfig, Rope, RopeScaling};

fn parse(config: &Value) -> Result<ModelConfig, Error> {
    ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json"))
}

/// The tiny configuration of this name, with these fields besides; a field that is the text "absent" is taken out.
fn with(name: &str, fields: Value) -> Result<ModelConfig, Error> {
    let mut config = named(name).config;
    for (field, value) in fields.as_object().unwrap() {
        match value == "absent" {
            true => drop(config.as_object_mut().unwrap().remove(field)),
            false => config[field] = value.clone(),
        }
    }
    parse(&config)
}

fn windows(name: &str, fields: Value) -> Vec<Option<usize>> {
    with(name, fields).unwrap_or_else(|e| panic!("{name}: {e}")).windows
}

#[test]
fn windows_by_layer() {
    assert_eq!(windows("llama", json!({})), [None; 2]);
    assert_eq!(windows("mistral", json!({})), [Some(8); 3]);
    // A null says that there is none, and no field means 4096.
    assert_eq!(windows("mistral", json!({ "sliding_window": null })), [None; 3]);
    let long = json!({ "sliding_window": "absent", "max_position_embeddings": 8192 });
    assert_eq!(windows("mistral", long), [Some(4096); 3]);
    // A window that covers the whole context is none.
    assert_eq!(windows("mistral", json!({ "sliding_window": 128 })), [None; 3]);
    assert_eq!(windows("qwen2", json!({})), [None; 2]);
    assert_eq!(windows("qwen2", json!({ "use_sliding_window": true })), [None, Some(64)]);
    let types = json!({ "use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"] });
    assert_eq!(windows("qwen2", types), [Some(64), None]);
    assert_eq!(windows("gemma2", json!({})), [Some(8), None, Some(8)]);
    let gemma3 = windows("gemma3", json!({}));
    assert_eq!(gemma3.iter().map(Option::is_some).collect::<Vec<_>>(), [true, true, true, true, true, false, true]);
    assert_eq!(gemma3, windows("gemma3", json!({ "sliding_window_pattern": "absent" })));
    assert_eq!(windows("gemma3", json!({ "sliding_window_pattern": 2 }))[..3], [Some(8), None, Some(8)]);
    assert_eq!(windows("phi3", json!({})), [Some(20); 2]);
    assert_eq!(windows("phi3", json!({ "sliding_window": "absent" })), [None; 2]);
}

#[test]
fn windows_that_make_no_sense_are_refused() {
    let message = |name: &str, fields: Value| with(name, fields).unwrap_err().to_string();
    assert!(message("mistral", json!({ "sliding_window": 0 })).contains("sliding_window is 0, expected at least 1"));
    let short = json!({ "layer_types": ["full_attention"] });
    assert!(message("gemma2", short).contains("only a list of 3 (num_hidden_layers) is supported"));
    let chunked = json!({ "layer_types": ["full_attention", "chunked_attention", "full_attention"] });
    assert!(message("gemma2", chunked).contains("layer_types[1] is \"chunked_attention\""));
    let none = json!({ "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": false });
    assert!(message("qwen3", none).contains("sliding_window is missing"));
    assert!(message("gemma3", json!({ "sliding_window_pattern": 0 })).contains("sliding_window_pattern is 0"));
}

#[test]
fn rotary_embeddings_of_two_kinds() {
    // As transformers 5 writes them.
    let nested = json!({
        "rope_theta": "absent", "rope_local_base_freq": "absent", "rope_scaling": "absent",
        "rope_parameters": {
            "full_attention": { "rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 10000.0 },
        },
    });
    let (old, new) = (with("gemma3", json!({})).unwrap(), with("gemma3", nested.clone()).unwrap());
    assert_eq!(old, new);
    let mut expected = Rope::new(32, 1e6);
    expected.scaling = RopeScaling::Linear { factor: 8.0 };
    assert_eq!((&new.rope, &new.local_rope), (&expected, &Some(Rope::new(32, 1e4))));
    assert_eq!((new.layer_rope(5).theta, new.layer_rope(0).theta), (1e6, 1e4));
    // Without any of it: the defaults of transformers.
    let bare = json!({ "rope_theta": "absent", "rope_local_base_freq": "absent", "rope_scaling": "absent" });
    let bare = with("gemma3", bare).unwrap();
    assert_eq!((bare.rope, bare.local_rope), (Rope::new(32, 1e6), Some(Rope::new(32, 1e4))));
    // Elsewhere all layers have one kind.
    let error = with("qwen3", json!({ "rope_parameters": nested["rope_parameters"] })).unwrap_err();
    assert!(error.to_string().contains("rope_parameters.full_attention is"), "{error}");
}

#[test]
fn yarn_by_hand() {
    let config = with("qwen2-yarn", json!({})).unwrap();
    let frequencies = config.rope.inverse_frequencies();
    // 8 pairs, base 10000, original context 32: pair(32 turns) = 16 ln(32/(64 pi))/(2 ln 10000) = -1.596, pair(1 turn) =
    // 16 ln(32/(2 pi))/(2 ln 10000) = 1.414. From 0 to 2: pair 0 kept, pair 1 half of each, the rest divided by 4.
    let plain = |i: i32| 10f32.powf(-0.5 * i as f32);
    for (i, expected) in [(0, 1.0), (1, plain(1) * 0.625), (2, plain(2) / 4.0), (7, plain(7) / 4.0)] {
        assert!((frequencies[i] / expected - 1.0).abs() < 1e-6, "pair {i}: {}", frequencies[i]);
    }
    assert!((config.rope.attention_factor() - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
    let own = json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0, "attention_factor": 1.5 } });
    assert_eq!(with("qwen2-yarn", own).unwrap().rope.attention_factor(), 1.5);
}

#[test]
fn longrope_is_for_the_original_context() {
    let config = with("phi3-longrope", json!({})).unwrap();
    assert_eq!((config.max_position_embeddings, config.rope.dim), (96, 12));
    let factor = (1.0 + (1024f32 / 96.0).ln() / 96f32.ln()).sqrt();
    assert!((config.rope.attention_factor() - factor).abs() < 1e-6);
    let short =
        json!({ "rope_scaling": { "type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [1.0, 2.0] } });
    let error = with("phi3-longrope", short).unwrap_err().to_string();
    assert!(error.contains("rope_scaling.short_factor is a list of 2, expected 6"), "{error}");
}

#[test]
fn defaults_of_gemma() {
    let bare = json!({ "query_pre_attn_scalar": "absent", "attn_logit_softcapping": "absent",
        "final_logit_softcapping": "absent", "head_dim": "absent" });
    let config = with("gemma2", bare).unwrap();
    assert_eq!((config.head_dim, config.attention_scale), (256, 1.0 / 16.0));
    assert_eq!((config.attention_softcap, config.logits_softcap), (Some(50.0), Some(30.0)));
    assert!(config.tie_word_embeddings && config.embedding_scale == 8.0);
    assert_eq!(config.activation, Activation::GeluTanh);
    // A null says that there is none.
    let none = with("gemma2", json!({ "attn_logit_softcapping": null, "final_logit_softcapping": null })).unwrap();
    assert_eq!((none.attention_softcap, none.logits_softcap), (None, None));
    let scaled = with("gemma2", json!({ "query_pre_attn_scalar": 144 })).unwrap();
    assert_eq!(scaled.attention_scale, 1.0 / 12.0);
    for (field, value) in [("query_pre_attn_scalar", json!(0)), ("attn_logit_softcapping", json!(-1.0))] {
        let error = with("gemma2", json!({ field: value })).unwrap_err();
        assert!(matches!(&error, Error::ConfigValue { field: f, .. } if f == field), "{error}");
    }
}

/// What one architecture reads is refused where another does not compute it.
#[test]
fn fields_of_other_architectures_are_refused() {
    for (name, field, value) in [
        ("llama", "sliding_window", json!(8)),
        ("llama", "attn_logit_softcapping", json!(50.0)),
        ("mistral", "query_pre_attn_scalar", json!(64)),
        ("qwen3", "partial_rotary_factor", json!(0.5)),
        ("gemma3", "attn_logit_softcapping", json!(50.0)),
        ("gemma2", "use_bidirectional_attention", json!(true)),
        ("gemma2", "hidden_activation", json!("silu")),
        ("phi3", "hidden_act", json!("gelu")),
        ("qwen2", "num_experts", json!(60)),
        ("gemma3", "global_head_dim", json!(512)),
    ] {
        let error = with(name, json!({ field: value })).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { field: f, .. } if f == field), "{name}: {error}");
    }
    for model_type in ["gemma4", "mixtral", "phi", "qwen2_moe"] {
        let error = with("llama", json!({ "model_type": model_type, "architectures": "absent" })).unwrap_err();
        let expected = format!("config: model_type is {model_type:?}, but only one of llama, mistral, qwen2, qwen3,");
        assert!(error.to_string().starts_with(&expected), "{error}");
    }
}

/// Every tiny configuration says which architecture it is, with `model_type` alone and with the class alone.
#[test]
fn either_name_is_enough() {
    let configs: Map<String, Value> = serde_json::from_slice(&std::fs::read(golden("tiny.json")).unwrap()).unwrap();
    for (name, config) in configs {
        let whole = parse(&config).unwrap();
        assert_eq!(whole.architecture(), config["model_type"], "{name}");
        for field in ["model_type", "architectures"] {
            assert_eq!(with(&name, json!({ field: "absent" })).unwrap(), whole, "{name} without {field}");
        }
    }
}
