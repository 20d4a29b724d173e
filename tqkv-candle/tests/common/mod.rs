//! A tiny Llama model with seeded random weights, written as Hugging Face directories of any kind.

#![allow(dead_code)] // Each test file uses a part of it.

pub mod architectures;

use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

pub const VOCAB: usize = 256;
pub const HIDDEN: usize = 32;
pub const INNER: usize = 48;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 4;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 64;

pub struct TinyModel {
    pub config: Value,
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    pub dtype: Dtype,
}

impl TinyModel {
    /// With tied embeddings, no biases, f32 weights.
    pub fn new() -> Self {
        let mut tiny = Self {
            config: json!({
                "architectures": ["LlamaForCausalLM"], "model_type": "llama",
                "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INNER,
                "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
                "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
                "max_position_embeddings": 64, "tie_word_embeddings": true,
                "bos_token_id": 0, "eos_token_id": null,
            }),
            tensors: BTreeMap::new(),
            dtype: Dtype::F32,
        };
        tiny.add("model.embed_tokens.weight", &[VOCAB, HIDDEN]);
        tiny.add("model.norm.weight", &[HIDDEN]);
        for i in 0..LAYERS {
            for (name, shape) in [
                ("input_layernorm", vec![HIDDEN]),
                ("post_attention_layernorm", vec![HIDDEN]),
                ("self_attn.q_proj", vec![HEADS * HEAD_DIM, HIDDEN]),
                ("self_attn.k_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
                ("self_attn.v_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
                ("self_attn.o_proj", vec![HIDDEN, HEADS * HEAD_DIM]),
                ("mlp.gate_proj", vec![INNER, HIDDEN]),
                ("mlp.up_proj", vec![INNER, HIDDEN]),
                ("mlp.down_proj", vec![HIDDEN, INNER]),
            ] {
                tiny.add(&format!("model.layers.{i}.{name}.weight"), &shape);
            }
        }
        tiny
    }

    /// With an output layer of its own, every bias, and Llama 3's rope scaling.
    pub fn with_everything() -> Self {
        let mut tiny = Self::new();
        tiny.config["tie_word_embeddings"] = json!(false);
        tiny.config["attention_bias"] = json!(true);
        tiny.config["mlp_bias"] = json!(true);
        tiny.config["rope_scaling"] = json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        });
        tiny.add("lm_head.weight", &[VOCAB, HIDDEN]);
        let biases: Vec<(String, usize)> = tiny
            .tensors
            .iter()
            .filter(|(name, _)| name.contains("_proj"))
            .map(|(name, (shape, _))| (name.replace(".weight", ".bias"), shape[0]))
            .collect();
        for (name, outputs) in biases {
            tiny.add(&name, &[outputs]);
        }
        tiny
    }

    /// Adds a tensor whose values depend on its name only.
    pub fn add(&mut self, name: &str, shape: &[usize]) {
        let seed = name.bytes().fold(7u64, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let scale = 1.5 / (*shape.last().unwrap() as f32).sqrt();
        // A multiple of 2^-6 below 4: 8 bits, so the same in f32, f16 and bf16.
        let mut value = |centre: f32| ((centre + scale * rng.random_range(-1.0..1.0f32)) * 64.0).round() / 64.0;
        let centre = if name.contains("norm") { 1.0 } else { 0.0 };
        let values = (0..shape.iter().product()).map(|_| value(centre)).collect();
        self.tensors.insert(name.into(), (shape.into(), values));
    }

    /// The bytes of a safetensors file with the tensors whose index is `part` modulo `parts`.
    pub fn safetensors(&self, part: usize, parts: usize) -> Vec<u8> {
        let data: Vec<(&String, &Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .skip(part)
            .step_by(parts)
            .map(|(name, (shape, values))| {
                let bytes = match self.dtype {
                    Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    Dtype::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
                    Dtype::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
                    Dtype::F64 => values.iter().flat_map(|&v| f64::from(v).to_le_bytes()).collect(),
                    other => panic!("{other:?}"),
                };
                (name, shape, bytes)
            })
            .collect();
        let views = data.iter().map(|(n, s, b)| (n, TensorView::new(self.dtype, s.to_vec(), b).unwrap()));
        safetensors::serialize(views, None).unwrap()
    }

    pub fn write(&self, dir: &Path) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        std::fs::write(dir.join("model.safetensors"), self.safetensors(0, 1)).unwrap();
    }

    pub fn write_sharded(&self, dir: &Path, parts: usize) {
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
        let shard = |part| format!("model-{:05}-of-{parts:05}.safetensors", part + 1);
        let map: BTreeMap<_, _> = self.tensors.keys().enumerate().map(|(i, n)| (n, shard(i % parts))).collect();
        let index = json!({ "metadata": {}, "weight_map": map });
        std::fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
        for part in 0..parts {
            std::fs::write(dir.join(shard(part)), self.safetensors(part, parts)).unwrap();
        }
    }
}
