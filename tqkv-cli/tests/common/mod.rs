//! What the tests of the program share.
#![allow(dead_code)] // Not every test uses all of it.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

pub const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/byte-llama-4m");
pub const LLAMA2: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tqkv-candle/testdata/llama2.json");

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tqkv"));
    command.args(arguments);
    command
}

pub fn run(arguments: &[&str]) -> Output {
    command(arguments).output().unwrap()
}

/// A run that must succeed.
pub fn run_ok(arguments: &[&str]) -> Output {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

/// Standard output of a run that must succeed.
pub fn stdout(arguments: &[&str]) -> String {
    String::from_utf8(run_ok(arguments).stdout).unwrap()
}

/// The objects that a run prints.
pub fn json(arguments: &[&str]) -> Vec<Value> {
    stdout(arguments).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Runs what must fail with an error that has all of `words`, print no result, and not panic.
pub fn fails(arguments: &[&str], words: &[&str]) {
    let output = run(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && !error.contains("panicked"), "{arguments:?}: {error}");
    assert!(output.stdout.is_empty(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
    for word in words {
        assert!(error.contains(word), "{arguments:?}: {word:?} is not in {error:?}");
    }
}

/// A file of the folder that `TQKV_MODELS` names. Without it the test is skipped, unless `TQKV_REQUIRE` has "models".
pub fn real_model(file: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("TQKV_MODELS");
    let path = folder.map(|folder| Path::new(&folder).join(file)).filter(|path| path.exists());
    if path.is_none() {
        let required = std::env::var("TQKV_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "models"));
        assert!(!required, "TQKV_REQUIRE names models, but TQKV_MODELS has no {file}");
        eprintln!("SKIPPED: TQKV_MODELS names no folder with {file}");
    }
    path
}

/// Writes a model of one layer without sense.
pub fn write_model(dir: &Path, vocab: usize, head_dim: usize) {
    let config = serde_json::json!({
        "vocab_size": vocab, "hidden_size": head_dim, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": true,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let matrices = [("self_attn.q_proj", [head_dim, head_dim]), ("self_attn.k_proj", [head_dim, head_dim])];
    let matrices = matrices.into_iter().chain([("self_attn.v_proj", [head_dim, head_dim])]);
    let matrices = matrices.chain([("self_attn.o_proj", [head_dim, head_dim]), ("mlp.gate_proj", [8, head_dim])]);
    let matrices = matrices.chain([("mlp.up_proj", [8, head_dim]), ("mlp.down_proj", [head_dim, 8])]);
    let mut tensors: Vec<(String, Vec<usize>)> =
        matrices.map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape.to_vec())).collect();
    for norm in ["model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm", "model.norm"] {
        tensors.push((format!("{norm}.weight"), vec![head_dim]));
    }
    tensors.push(("model.embed_tokens.weight".into(), vec![vocab, head_dim]));
    let mut state = 1u32;
    let mut data = |shape: &[usize]| -> Vec<u8> {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state as f32 / u32::MAX as f32 - 0.5
        };
        (0..shape.iter().product()).flat_map(|_| next().to_le_bytes()).collect()
    };
    let data: Vec<_> = tensors.iter().map(|(name, shape)| (name, shape, data(shape))).collect();
    let view =
        |shape: &[usize], data| safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.into(), data);
    let views = data.iter().map(|(name, shape, data)| (name, view(shape, data).unwrap()));
    std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}
