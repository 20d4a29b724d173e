//! Every architecture against `golden/make.py`, a forward pass in numpy that shares no code with this crate.

mod common;

use candle_core::quantized::GgmlDType;
use common::architectures::{Tiny, all, golden, named};
use safetensors::SafeTensors;
use std::path::Path;
use tempfile::tempdir;
use tqkv::{Device, SequenceId};
use tqkv_candle::{Attention, Model, SequenceCache};

fn tokens() -> Vec<u32> {
    (0..64).map(|i| i * 37 % 256).collect()
}

fn cache(model: &Model) -> SequenceCache {
    let config = model.config().cache_config().codec("f32".parse().unwrap());
    SequenceCache::new(&Device::cpu(), config).unwrap()
}

fn logits(model: &Model, chunk: usize) -> Vec<Vec<f32>> {
    let mut cache = cache(model);
    let run = |chunk: &[u32]| model.logits(&model.forward(chunk, &mut cache).unwrap()).unwrap().to_vec2().unwrap();
    tokens().chunks(chunk).flat_map(run).collect()
}

/// The reference's logits: every fifth column of 64 positions.
fn reference(name: &str) -> Vec<Vec<f32>> {
    let file = std::fs::read(golden("tiny.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&file).unwrap();
    let tensor = file.tensor(name).unwrap();
    let values: Vec<f32> = tensor.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    values.chunks(tensor.shape()[1]).map(Vec::from).collect()
}

/// The largest difference of a position's logits, beside its largest logit.
fn error(got: &[Vec<f32>], name: &str) -> f32 {
    let expected = reference(name);
    assert_eq!((got.len(), got[0].len().div_ceil(5)), (expected.len(), expected[0].len()));
    let of_row = |(got, expected): (&Vec<f32>, &Vec<f32>)| {
        let largest = expected.iter().fold(0f32, |m, v| m.max(v.abs()));
        let differences = got.iter().step_by(5).zip(expected).map(|(g, e)| (g - e).abs());
        differences.fold(0f32, |m, d| if d.is_nan() { f32::INFINITY } else { m.max(d) }) / largest
    };
    got.iter().zip(&expected).map(of_row).fold(0.0, f32::max)
}

/// f32 sums in another order; a wrong formula gives errors of the size of the logits.
const BOUND: f32 = 2e-5;

#[test]
fn every_architecture_from_safetensors() {
    for tiny in all() {
        let dir = tempdir().unwrap();
        tiny.write(dir.path());
        let model = Model::load(dir.path()).unwrap_or_else(|e| panic!("{}: {e}", tiny.name));
        for chunk in [64, 7, 1] {
            let error = error(&logits(&model, chunk), &tiny.name);
            assert!(error < BOUND, "{}, chunks of {chunk}: {error:e}", tiny.name);
        }
    }
}

#[test]
fn every_architecture_from_gguf() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    // Qwen 2's windows, which no key of GGUF says, are Qwen2-yarn's second layer's.
    for tiny in all().iter().filter(|tiny| tiny.name != "qwen2-yarn") {
        tiny.write_gguf(&path, GgmlDType::F32);
        let model = Model::load(&path).unwrap_or_else(|e| panic!("{}: {e}", tiny.name));
        let error = error(&logits(&model, 64), &tiny.name);
        assert!(error < BOUND, "{}: {error:e}", tiny.name);
    }
}

/// Weights that stay in blocks give what they stand for gives.
#[test]
fn quantized_weights_are_what_they_stand_for() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    for name in ["llama3", "qwen3", "gemma2", "gemma3", "phi3-longrope"] {
        for dtype in [GgmlDType::Q8_0, GgmlDType::Q4_1, GgmlDType::F16] {
            named(name).write_gguf(&path, dtype);
            let expected = logits(&Model::load_dequantized(&path).unwrap(), 64);
            let model = Model::load(&path).unwrap();
            // Many tokens at once and few go different ways.
            // Activations of few are rounded to 16 bits.
            for (chunk, bound) in [(64, 1e-4), (3, 1e-3)] {
                let got = logits(&model, chunk).concat();
                let error = got.iter().zip(expected.concat()).map(|(g, e)| (g - e).abs()).fold(0.0, f32::max);
                assert!(error < bound, "{name} {dtype:?}, chunks of {chunk}: {error:e}");
            }
            assert!(error(&expected, name) > if dtype == GgmlDType::F16 { 0.0 } else { 1e-3 }, "{name} {dtype:?}");
        }
    }
}

/// A model of text and images, of which the text half is taken.
#[test]
fn the_text_half_of_a_larger_model() {
    let mut tiny = named("gemma3");
    let text = std::mem::replace(
        &mut tiny.config,
        serde_json::json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "eos_token_id": [1, 106],
            "vision_config": { "hidden_size": 8, "num_hidden_layers": 1 },
        }),
    );
    tiny.config["text_config"] = text;
    tiny.config["text_config"].as_object_mut().unwrap().remove("architectures");
    tiny.tensors.insert("vision_tower.patch.weight".into(), (vec![2], vec![1.0, 2.0]));
    let old = |name: &str| if name.starts_with("model.") { format!("language_model.{name}") } else { name.into() };
    let new = |name: &str| match name.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None => format!("model.{name}"),
    };
    for rename in [&old as &dyn Fn(&str) -> String, &new] {
        let dir = tempdir().unwrap();
        tiny.write_as(dir.path(), rename);
        let model = Model::load(dir.path()).unwrap();
        assert!(error(&logits(&model, 64), "gemma3") < BOUND);
        assert_eq!(model.config().eos_tokens, [1, 106]);
    }
}

/// Sequences of different lengths in one step give what each gives by itself.
#[test]
fn several_sequences_in_one_step() {
    for name in ["llama", "mistral", "gemma3"] {
        let dir = tempdir().unwrap();
        named(name).write(dir.path());
        let model = Model::load(dir.path()).unwrap();
        let texts: Vec<Vec<u32>> = [20, 1, 33].map(|n| (0..n).map(|i| i * 11 % 256).collect()).into();
        let config = model.config().cache_config().codec("f32".parse().unwrap()).capacity(1024);
        let mut attention = Attention::new(&Device::cpu(), config).unwrap();
        let ids: Vec<SequenceId> = texts.iter().map(|_| attention.cache_mut().add_sequence()).collect();
        // The first and last begin in one step; the second joins with a token while the others go on.
        let mut got = vec![Vec::new(); 3];
        for step in [[15, 0, 20], [1, 1, 13], [4, 0, 0]] {
            let mut at = 0..0;
            let new: Vec<(usize, &[u32])> =
                (0..3).filter(|&i| step[i] > 0).map(|i| (i, &texts[i][got[i].len()..got[i].len() + step[i]])).collect();
            let batch: Vec<(SequenceId, &[u32])> = new.iter().map(|&(i, tokens)| (ids[i], tokens)).collect();
            let logits: Vec<Vec<f32>> =
                model.logits(&model.forward_batch(&batch, &mut attention).unwrap()).unwrap().to_vec2().unwrap();
            for (i, tokens) in new {
                at = at.end..at.end + tokens.len();
                got[i].extend_from_slice(&logits[at.clone()]);
            }
            assert_eq!(at.end, logits.len());
        }
        for (i, text) in texts.iter().enumerate() {
            let mut cache = cache(&model);
            let hidden = model.forward(text, &mut cache).unwrap();
            let expected: Vec<Vec<f32>> = model.logits(&hidden).unwrap().to_vec2().unwrap();
            let differences =
                got[i].concat().iter().zip(expected.concat()).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(got[i].len() == text.len() && differences < 1e-4, "{name}, sequence {i}: {differences}");
        }

        // A step that fails for one sequence leaves all as they were.
        let lens = || ids.iter().map(|&id| attention.cache().len(id).unwrap()).collect::<Vec<_>>();
        let before = lens();
        assert_eq!(before, [20, 1, 33]);
        let bad: [(SequenceId, &[u32]); 2] = [(ids[0], &[1, 2]), (ids[1], &[256])];
        assert!(model.forward_batch(&bad, &mut attention).is_err());
        let twice: [(SequenceId, &[u32]); 2] = [(ids[0], &[1, 2]), (ids[0], &[3])];
        assert!(model.forward_batch(&twice, &mut attention).is_err());
        assert!(model.forward_batch(&[], &mut attention).is_err());
        assert_eq!(ids.iter().map(|&id| attention.cache().len(id).unwrap()).collect::<Vec<_>>(), before);
    }
}

fn load_gguf(tiny: &Tiny, path: &Path) -> Model {
    tiny.write_gguf(path, GgmlDType::F32);
    Model::load(path).unwrap()
}

#[test]
fn gguf_says_what_config_json_says() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("tiny.gguf");
    for name in ["llama", "llama-linear", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"] {
        let tiny = named(name);
        tiny.write(dir.path());
        let (json, gguf) = (Model::load(dir.path()).unwrap(), load_gguf(&tiny, &path));
        assert_eq!(format!("{:?}", gguf.config()), format!("{:?}", json.config()), "{name}");
    }
}

/// Layers with a window take what the window needs, however long the context.
#[test]
fn windows_take_no_more_than_they_need() {
    let dir = tempdir().unwrap();
    named("gemma3").write(dir.path());
    let model = Model::load(dir.path()).unwrap();
    for step in [1, 8, 40] {
        let config = model.config().cache_config_for(1, 128, step).codec("f32".parse().unwrap()).page_size(8);
        let mut cache = SequenceCache::new(&Device::cpu(), config).unwrap();
        let expected = logits(&model, 64);
        let mut got = Vec::new();
        for chunk in tokens().chunks(step) {
            got.extend(model.logits(&model.forward(chunk, &mut cache).unwrap()).unwrap().to_vec2::<f32>().unwrap());
        }
        let error = got.concat().iter().zip(expected.concat()).map(|(g, e)| (g - e).abs()).fold(0.0, f32::max);
        assert!(error < 1e-4, "{step}: {error:e}");
    }
    // 6 layers of 7 have a window of 8: two pages of 64 positions a sequence, where the other has 16.
    let layer = model.config().cache_config().capacity(2 * 128).bytes().unwrap() / 7;
    assert_eq!(model.config().cache_config_for(2, 1024, 1).bytes().unwrap(), layer * 8 + 6 * layer);
}
