//! Loading: dtypes, shards, tied and untied embeddings, and files that are truncated or lie.

mod common;

use common::{HIDDEN, TinyModel, VOCAB};
use safetensors::Dtype;
use serde_json::json;
use std::path::Path;
use tempfile::tempdir;
use tqkv_candle::{Error, Model, ModelConfig, SequenceCache, Vocabulary, Weights};

const TOKENS: [u32; 5] = [0, 72, 101, 108, 255];

fn logits(model: &Model) -> Vec<f32> {
    let mut cache = SequenceCache::new(&tqkv::Device::cpu(), model.config().cache_config()).unwrap();
    let hidden = model.forward(&TOKENS, &mut cache).unwrap();
    model.logits(&hidden).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn load(tiny: &TinyModel) -> Result<Model, Error> {
    let dir = tempdir().unwrap();
    tiny.write(dir.path());
    Model::load(dir.path())
}

fn load_error(tiny: &TinyModel) -> Error {
    load(tiny).err().unwrap()
}

#[test]
fn every_float_type_gives_the_same_model() {
    let mut tiny = TinyModel::with_everything();
    let expected = logits(&load(&tiny).unwrap());
    for dtype in [Dtype::F16, Dtype::BF16] {
        tiny.dtype = dtype;
        // The weights are the same numbers; they stay in 16 bits, and their products are summed up in another order.
        let got = logits(&load(&tiny).unwrap());
        let error = got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0.0, f32::max);
        assert!(error < 1e-5, "{dtype:?}: {error:e}");
    }
}

#[test]
fn shards_give_the_same_model() {
    for tiny in [TinyModel::new(), TinyModel::with_everything()] {
        let expected = logits(&load(&tiny).unwrap());
        for parts in [1, 3] {
            let dir = tempdir().unwrap();
            tiny.write_sharded(dir.path(), parts);
            assert!(logits(&Model::load(dir.path()).unwrap()) == expected, "{parts} parts");
        }
    }
}

#[test]
fn a_tied_model_may_repeat_its_output_layer() {
    let mut tiny = TinyModel::new();
    let expected = logits(&load(&tiny).unwrap());
    tiny.add("lm_head.weight", &[VOCAB, HIDDEN]);
    tiny.add("model.layers.0.self_attn.rotary_emb.inv_freq", &[32]);
    assert!(logits(&load(&tiny).unwrap()) == expected);
}

#[test]
fn missing_misshapen_and_foreign_tensors_are_named() {
    let names: Vec<String> = TinyModel::with_everything().tensors.into_keys().collect();
    for name in &names {
        let mut tiny = TinyModel::with_everything();
        tiny.tensors.remove(name);
        assert!(matches!(load_error(&tiny), Error::MissingTensor { name: n, .. } if n == *name));
    }
    for (name, shape) in [
        ("model.embed_tokens.weight", vec![HIDDEN, VOCAB]),
        ("model.norm.weight", vec![1, HIDDEN]),
        ("model.layers.1.self_attn.k_proj.weight", vec![0]),
        ("model.layers.1.mlp.down_proj.bias", vec![HIDDEN + 1]),
    ] {
        let mut tiny = TinyModel::with_everything();
        tiny.add(name, &shape);
        let error = load_error(&tiny);
        assert!(matches!(&error, Error::TensorShape { name: n, got, .. } if n == name && *got == shape), "{error}");
    }
    for name in ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.mlp.up_proj.weight"] {
        let mut tiny = TinyModel::new();
        tiny.add(name, &[HIDDEN]);
        assert!(matches!(load_error(&tiny), Error::UnexpectedTensor { name: n } if n == name));
    }
    // Biases that the configuration does not speak of.
    let mut tiny = TinyModel::with_everything();
    tiny.config["attention_bias"] = json!(false);
    assert!(matches!(load_error(&tiny), Error::UnexpectedTensor { name } if name.ends_with("self_attn.k_proj.bias")));
    let mut tiny = TinyModel::new();
    tiny.dtype = Dtype::F64;
    assert!(matches!(load_error(&tiny), Error::TensorDtype { got: Dtype::F64, .. }));
}

#[test]
fn truncated_and_lying_files_are_refused() {
    let path = Path::new("model.safetensors");
    let file = |header: &str, data: usize| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    let good = TinyModel::new().safetensors(0, 1);
    assert!(Weights::parse(&good, path).is_ok());
    let mut bad: Vec<Vec<u8>> = [0, 1, 7, 8, 9, 100, good.len() / 2, good.len() - 1].map(|n| good[..n].into()).into();
    bad.push([&good[..], &[0]].concat());
    bad.push([&u64::MAX.to_le_bytes()[..], &good[8..]].concat());
    bad.push([&0u64.to_le_bytes()[..], &good[8..]].concat());
    bad.push(file("{", 0));
    bad.push(file("\u{7f}", 0));
    for (shape, offsets, data) in [
        ("[4]", "[0,8]", 8),
        ("[2]", "[0,8]", 7),
        ("[2]", "[0,8]", 9),
        ("[2]", "[8,0]", 8),
        ("[2]", "[4,12]", 12),
        ("[18446744073709551615,18446744073709551615]", "[0,8]", 8),
        ("[4611686018427387904]", "[0,0]", 0),
        ("[-2]", "[0,8]", 8),
        ("[2]", "[0,18446744073709551615]", 8),
    ] {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
        bad.push(file(&header, data));
    }
    for bytes in bad {
        let error = Weights::parse(&bytes, path).err();
        assert!(matches!(error, Some(Error::Safetensors { .. })), "{:?}", &bytes[..bytes.len().min(150)]);
    }
}

#[test]
fn a_directory_that_is_no_model_is_refused() {
    let dir = tempdir().unwrap();
    assert!(matches!(Model::load(dir.path()), Err(Error::Read { .. })));
    assert!(matches!(Model::load(&dir.path().join("nothing")), Err(Error::Read { .. })));
    std::fs::write(dir.path().join("config.json"), TinyModel::new().config.to_string()).unwrap();
    assert!(matches!(Model::load(dir.path()), Err(Error::NoWeights { .. })));
}

#[test]
fn malformed_indexes_are_refused() {
    let dir = tempdir().unwrap();
    let tiny = TinyModel::new();
    tiny.write_sharded(dir.path(), 2);
    let index = dir.path().join("model.safetensors.index.json");
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let good = std::fs::read_to_string(&index).unwrap();
    let load = |text: &str| {
        std::fs::write(&index, text).unwrap();
        Model::load(dir.path()).err()
    };
    assert!(load(&good).is_none());
    for text in ["", "{"] {
        assert!(matches!(load(text), Some(Error::Json { .. })), "{text}");
    }
    assert!(matches!(load("[]"), Some(Error::FieldType { .. })));
    assert!(matches!(load("{}"), Some(Error::MissingField { field, .. }) if field == "weight_map"));
    for (text, named) in [(r#"{"weight_map": []}"#, "weight_map"), (r#"{"weight_map": {"a": 1}}"#, "weight_map.a")] {
        assert!(matches!(load(text), Some(Error::FieldType { field, .. }) if field == named), "{text}");
    }
    assert!(matches!(load(r#"{"weight_map": {}}"#), Some(Error::MissingTensor { .. })));
    for name in ["../model.safetensors", "/model.safetensors", "", "..", "a/b", "a/"] {
        let text = json!({ "weight_map": { "a": name } }).to_string();
        assert!(matches!(load(&text), Some(Error::ShardName { got, .. }) if got == name), "{name}");
    }
    assert!(matches!(load(&good.replace(second, "missing")), Some(Error::Read { .. })));
    // The index says that all is in one shard, and the other way round.
    assert!(matches!(load(&good.replace(second, first)), Some(Error::MissingTensor { .. })));
    let swapped = good.replace(first, "x").replace(second, first).replace('x', second);
    assert!(matches!(load(&swapped), Some(Error::ShardMismatch { .. })));
}

#[test]
fn without_a_tokenizer_only_bytes_are_a_vocabulary() {
    let dir = tempdir().unwrap();
    let mut config = TinyModel::new().config;
    let parse = |c: &serde_json::Value| ModelConfig::parse(c.to_string().as_bytes(), Path::new("")).unwrap();
    assert!(Vocabulary::load(dir.path(), &parse(&config)).unwrap().is_bytes());
    config["vocab_size"] = json!(257);
    let error = Vocabulary::load(dir.path(), &parse(&config)).err();
    assert!(matches!(error, Some(Error::NoTokenizer { vocab_size: 257, .. })));
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    assert!(matches!(Vocabulary::load(dir.path(), &parse(&config)), Err(Error::Tokenizer { .. })));
}

#[test]
fn a_tokenizer_neither_cuts_texts_nor_fills_them_up() {
    let dir = tempdir().unwrap();
    let config = ModelConfig::parse(TinyModel::new().config.to_string().as_bytes(), Path::new("")).unwrap();
    // As it was left by training on batches of texts of four tokens.
    let tokenizer = json!({
        "version": "1.0", "normalizer": null, "decoder": null, "post_processor": null, "added_tokens": [],
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "?"},
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"?": 0, "red": 1, "fox": 2}, "unk_token": "?"},
    });
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let vocabulary = Vocabulary::load(dir.path(), &config).unwrap();
    assert_eq!(vocabulary.encode_prompt("red fox red fox red fox").unwrap(), [1, 2, 1, 2, 1, 2]);
    assert_eq!(vocabulary.encode(b"red fox").unwrap().tokens, [1, 2]);
}
