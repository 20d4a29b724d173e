//! A tiny model of every architecture, with weights from a formula that `golden/make.py` has too, as a Hugging Face
//! directory and as a GGUF file.

#![allow(dead_code)] // Each test file uses a part of it.

use candle_core::quantized::gguf_file::{self, Value as Meta};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::f64::consts::PI;
use std::path::{Path, PathBuf};

pub struct Tiny {
    pub name: String,
    pub config: Value,
    /// By their names in safetensors.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

pub fn golden(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(file)
}

/// All of `golden/tiny.json`.
pub fn all() -> Vec<Tiny> {
    let configs: Map<String, Value> = serde_json::from_slice(&std::fs::read(golden("tiny.json")).unwrap()).unwrap();
    configs.into_iter().map(|(name, config)| Tiny::new(name, config)).collect()
}

pub fn named(name: &str) -> Tiny {
    all().into_iter().find(|tiny| tiny.name == name).unwrap()
}

/// Multiples of 2^-10 that depend on the name alone.
fn formula(name: &str, shape: &[usize], centre: f64) -> Vec<f32> {
    let seed = name.bytes().fold(0xCBF2_9CE4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3));
    let scale = if shape.len() == 1 { 0.3 } else { 1.5 / (*shape.last().unwrap() as f64).sqrt() };
    let value = |i: u64| {
        let z = seed.wrapping_add(i.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        let unit = ((z ^ (z >> 31)) >> 40) as f64 / f64::from(1 << 24);
        (((2.0 * unit - 1.0) * scale * 1024.0 + 0.5).floor() / 1024.0 + centre) as f32
    };
    (1..=shape.iter().product::<usize>() as u64).map(value).collect()
}

impl Tiny {
    fn new(name: String, config: Value) -> Self {
        let mut tiny = Self { name, config, tensors: BTreeMap::new() };
        let [hidden, inner, vocab, heads, kv_heads, head_dim] = tiny.sizes();
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let kind = tiny.kind().to_owned();
        let flag = |field: &str| tiny.config[field].as_bool().unwrap_or(false);
        let (gemma, attention_bias) = (kind.starts_with("gemma"), flag("attention_bias"));
        let (qkv_bias, mlp_bias) = (kind == "qwen2" || attention_bias, flag("mlp_bias"));
        let tied = tiny.config["tie_word_embeddings"].as_bool().unwrap_or(gemma);
        let mut add = |name: String, shape: &[usize], bias: bool| {
            // Gemma's norms are kept less one.
            let centre = if name.contains("norm") && !gemma { 1.0 } else { 0.0 };
            let mut add = |name: String, shape: &[usize]| {
                let values = formula(&name, shape, centre);
                tiny.tensors.insert(name, (shape.into(), values));
            };
            add(format!("{name}.weight"), shape);
            if bias {
                add(format!("{name}.bias"), &shape[..1]);
            }
        };
        add("model.embed_tokens".into(), &[vocab, hidden], false);
        add("model.norm".into(), &[hidden], false);
        if !tied {
            add("lm_head".into(), &[vocab, hidden], false);
        }
        for i in 0..tiny.config["num_hidden_layers"].as_u64().unwrap() {
            let mut add = |name: &str, shape: &[usize], bias| add(format!("model.layers.{i}.{name}"), shape, bias);
            add("input_layernorm", &[hidden], false);
            add("post_attention_layernorm", &[hidden], false);
            if gemma {
                add("pre_feedforward_layernorm", &[hidden], false);
                add("post_feedforward_layernorm", &[hidden], false);
            }
            if kind == "qwen3" || kind == "gemma3_text" {
                add("self_attn.q_norm", &[head_dim], false);
                add("self_attn.k_norm", &[head_dim], false);
            }
            if kind == "phi3" {
                add("self_attn.qkv_proj", &[q + 2 * kv, hidden], false);
                add("mlp.gate_up_proj", &[2 * inner, hidden], false);
            } else {
                add("self_attn.q_proj", &[q, hidden], qkv_bias);
                add("self_attn.k_proj", &[kv, hidden], qkv_bias);
                add("self_attn.v_proj", &[kv, hidden], qkv_bias);
                add("mlp.gate_proj", &[inner, hidden], mlp_bias);
                add("mlp.up_proj", &[inner, hidden], mlp_bias);
            }
            add("self_attn.o_proj", &[hidden, q], attention_bias);
            add("mlp.down_proj", &[hidden, inner], mlp_bias);
        }
        tiny
    }

    fn kind(&self) -> &str {
        self.config["model_type"].as_str().unwrap()
    }

    fn number(&self, field: &str) -> Option<usize> {
        self.config[field].as_u64().map(|n| n as usize)
    }

    /// hidden_size, intermediate_size, vocab_size, heads, kv_heads, head_dim.
    pub fn sizes(&self) -> [usize; 6] {
        let number = |field: &str| self.number(field);
        let (hidden, heads) = (number("hidden_size").unwrap(), number("num_attention_heads").unwrap());
        let kv_heads = number("num_key_value_heads").unwrap_or(heads);
        let head_dim = number("head_dim").unwrap_or(hidden / heads);
        [hidden, number("intermediate_size").unwrap(), number("vocab_size").unwrap(), heads, kv_heads, head_dim]
    }

    /// As a Hugging Face directory.
    pub fn write(&self, dir: &Path) {
        self.write_as(dir, |name| name.into());
    }

    /// The same with other names of the tensors.
    pub fn write_as(&self, dir: &Path, rename: impl Fn(&str) -> String) {
        let data: Vec<(String, &Vec<usize>, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, (shape, values))| (rename(name), shape, values.iter().flat_map(|v| v.to_le_bytes()).collect()))
            .collect();
        let views = data.iter().map(|(n, s, b)| (n, TensorView::new(Dtype::F32, s.to_vec(), b).unwrap()));
        std::fs::write(dir.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
        std::fs::write(dir.join("config.json"), self.config.to_string()).unwrap();
    }

    /// As a GGUF file with matrices of this type, in the way of llama.cpp's converter.
    pub fn write_gguf(&self, path: &Path, dtype: GgmlDType) {
        let mut tensors = self.gguf_tensors();
        let metadata = self.gguf_metadata(&mut tensors);
        let tensors: Vec<(String, QTensor)> = tensors
            .into_iter()
            .map(|(name, (shape, values))| {
                let tensor = Tensor::from_vec(values, shape.clone(), &Device::Cpu).unwrap();
                let dtype = if shape.len() == 1 { GgmlDType::F32 } else { dtype };
                (name, QTensor::quantize(&tensor, dtype).unwrap())
            })
            .collect();
        let metadata: Vec<(&str, &Meta)> = metadata.iter().map(|(k, v)| (&k[..], v)).collect();
        let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(k, v)| (&k[..], v)).collect();
        gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    /// What the converter makes of the tensors.
    fn gguf_tensors(&self) -> BTreeMap<String, (Vec<usize>, Vec<f32>)> {
        let [.., head_dim] = self.sizes();
        let gemma = self.kind().starts_with("gemma");
        let interleaved = ["llama", "mistral"].contains(&self.kind());
        let convert = |(name, (shape, values)): (&String, &(Vec<usize>, Vec<f32>))| {
            let mut values = values.clone();
            if gemma && name.contains("norm") {
                values.iter_mut().for_each(|v| *v += 1.0);
            }
            if interleaved && (name.contains("q_proj") || name.contains("k_proj")) {
                let row = values.len() / shape[0];
                let source = |i: usize| i / head_dim * head_dim + i % head_dim / 2 + i % 2 * (head_dim / 2);
                values = (0..shape[0]).flat_map(|i| values[source(i) * row..][..row].to_vec()).collect();
            }
            (gguf_name(name, gemma), (shape.clone(), values))
        };
        self.tensors.iter().map(convert).collect()
    }

    fn gguf_metadata(&self, tensors: &mut BTreeMap<String, (Vec<usize>, Vec<f32>)>) -> Vec<(String, Meta)> {
        let [hidden, inner, _, heads, kv_heads, head_dim] = self.sizes();
        let arch = match self.kind() {
            "mistral" => "llama",
            "gemma3_text" => "gemma3",
            other => other,
        };
        let mut metadata = vec![("general.architecture".into(), Meta::String(arch.into()))];
        let mut set = |key: &str, value: Meta| metadata.push((format!("{arch}.{key}"), value));
        let int = |n: usize| Meta::U32(n as u32);
        let float = |value: &Value| Meta::F32(value.as_f64().unwrap() as f32);
        let c = &self.config;
        set("block_count", int(self.number("num_hidden_layers").unwrap()));
        set("context_length", int(self.number("max_position_embeddings").unwrap()));
        set("embedding_length", int(hidden));
        set("feed_forward_length", int(inner));
        set("attention.head_count", int(heads));
        set("attention.head_count_kv", int(kv_heads));
        set("attention.key_length", int(head_dim));
        set("attention.value_length", int(head_dim));
        set("attention.layer_norm_rms_epsilon", float(&c["rms_norm_eps"]));
        let part = c["partial_rotary_factor"].as_f64().unwrap_or(1.0);
        set("rope.dimension_count", int((head_dim as f64 * part) as usize));
        let scaling = [&c["rope_scaling"], &c["rope_parameters"]].into_iter().find(|s| s.is_object());
        let theta = scaling.and_then(|s| s.get("rope_theta")).unwrap_or(&c["rope_theta"]);
        set("rope.freq_base", float(theta));
        if self.kind() != "qwen2"
            && let Some(window) = self.number("sliding_window")
        {
            set("attention.sliding_window", int(window));
        }
        for field in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if c[field].is_number() {
                set(field, float(&c[field]));
            }
        }
        let Some(scaling) = scaling else { return metadata };
        let list = |value: &Value| -> Vec<f32> {
            value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
        };
        let mut add = |name: &str, values: Vec<f32>| tensors.insert(name.into(), (vec![values.len()], values));
        match scaling.get("rope_type").or(scaling.get("type")).unwrap().as_str().unwrap() {
            "llama3" => {
                add("rope_freqs.weight", llama3_divisors(scaling, theta.as_f64().unwrap(), head_dim));
            }
            "longrope" => {
                set(
                    "rope.scaling.original_context_length",
                    int(self.number("original_max_position_embeddings").unwrap()),
                );
                add("rope_factors_short.weight", list(&scaling["short_factor"]));
                add("rope_factors_long.weight", list(&scaling["long_factor"]));
            }
            kind => {
                set("rope.scaling.type", Meta::String(kind.into()));
                set("rope.scaling.factor", float(&scaling["factor"]));
                if let Some(original) = scaling["original_max_position_embeddings"].as_u64() {
                    set("rope.scaling.original_context_length", int(original as usize));
                }
            }
        }
        metadata
    }
}

fn gguf_name(name: &str, gemma: bool) -> String {
    let name = name.replace("model.embed_tokens.", "token_embd.").replace("model.norm.", "output_norm.");
    let name = name.replace("lm_head.", "output.").replace("model.layers.", "blk.");
    let mlp_norm = if gemma { "pre_feedforward_layernorm" } else { "post_attention_layernorm" };
    [
        ("input_layernorm", "attn_norm"),
        (mlp_norm, "ffn_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.qkv_proj", "attn_qkv"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.gate_up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ]
    .iter()
    .fold(name, |name, (from, to)| name.replace(from, to))
}

/// What llama.cpp's converter makes of Llama 3's scaling.
fn llama3_divisors(scaling: &Value, theta: f64, head_dim: usize) -> Vec<f32> {
    let get = |field: &str| scaling[field].as_f64().unwrap();
    let (factor, low, high) = (get("factor"), get("low_freq_factor"), get("high_freq_factor"));
    let original = get("original_max_position_embeddings");
    let divisor = |i: usize| {
        let wavelength = 2.0 * PI * theta.powf(2.0 * i as f64 / head_dim as f64);
        if wavelength < original / high {
            1.0
        } else if wavelength > original / low {
            factor
        } else {
            let smooth = (original / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..head_dim / 2).map(|i| divisor(i) as f32).collect()
}
