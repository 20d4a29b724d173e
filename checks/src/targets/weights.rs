//! A model's configuration and its safetensors file.

use std::path::Path;
use tqkv_candle::{Model, ModelConfig, Weights};

pub fn run(bytes: &[u8]) {
    let [config, file] = super::parts::<2>(bytes);
    let config = ModelConfig::parse(config, Path::new("config.json"));
    if let Ok(config) = &config {
        drop(config.cache_config().bytes());
        (0..config.layers.min(8)).for_each(|layer| drop(config.attention_params(layer)));
    }
    let weights = Weights::parse(file, Path::new("model.safetensors"));
    if let (Ok(config), Ok(weights)) = (config, weights) {
        drop(Model::new(config, weights));
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let config = |more: &str| {
        format!(
            r#"{{"model_type":"llama","hidden_size":16,"intermediate_size":8,"num_hidden_layers":1,"num_attention_heads":1,"num_key_value_heads":1,"vocab_size":4,"rms_norm_eps":1e-5,"max_position_embeddings":32,"rope_theta":10000.0,"hidden_act":"silu"{more}}}"#
        )
    };
    let tensors: [(&str, &[usize]); 12] = [
        ("model.embed_tokens.weight", &[4, 16]),
        ("model.norm.weight", &[16]),
        ("lm_head.weight", &[4, 16]),
        ("model.layers.0.input_layernorm.weight", &[16]),
        ("model.layers.0.post_attention_layernorm.weight", &[16]),
        ("model.layers.0.self_attn.q_proj.weight", &[16, 16]),
        ("model.layers.0.self_attn.k_proj.weight", &[16, 16]),
        ("model.layers.0.self_attn.v_proj.weight", &[16, 16]),
        ("model.layers.0.self_attn.o_proj.weight", &[16, 16]),
        ("model.layers.0.mlp.gate_proj.weight", &[8, 16]),
        ("model.layers.0.mlp.up_proj.weight", &[8, 16]),
        ("model.layers.0.mlp.down_proj.weight", &[16, 8]),
    ];
    let zeros = [0u8; 1024];
    let views = tensors.map(|(name, shape)| {
        let n = shape.iter().product::<usize>();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F16, shape.to_vec(), &zeros[..2 * n]);
        (name, view.expect("as many bytes"))
    });
    let file = safetensors::serialize(views, None).expect("a file");
    let scaled = r#","rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":16}"#;
    let yarn = r#","rope_scaling":{"type":"yarn","factor":4.0,"original_max_position_embeddings":8},"tie_word_embeddings":true"#;
    let seed = |config: String, file: &[u8]| super::joined([config.as_bytes(), file]);
    let gemma = config(r#","head_dim":16,"sliding_window":8,"query_pre_attn_scalar":16"#)
        .replace("llama", "gemma3_text")
        .replace("silu", "gelu_pytorch_tanh");
    vec![seed(config(""), &file), seed(config(scaled), &[]), seed(config(yarn), &file), seed(gemma, &[])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_get_far() {
        let seeds = seeds();
        for seed in &seeds {
            let [config, _] = super::super::parts::<2>(seed);
            ModelConfig::parse(config, Path::new("config.json")).map(drop).unwrap();
        }
        let [config, file] = super::super::parts::<2>(&seeds[0]);
        let config = ModelConfig::parse(config, Path::new("config.json")).unwrap();
        Model::new(config, Weights::parse(file, Path::new("f")).unwrap()).map(drop).unwrap();
    }
}
