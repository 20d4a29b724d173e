//! GGUF files: metadata, tokenizer, model.

use tqkv_candle::{GgufTokenizer, Metadata, Model, Vocabulary};

pub fn run(bytes: &[u8]) {
    super::in_folder(&[("model.gguf", bytes)], |folder| {
        let path = folder.join("model.gguf");
        let Ok(metadata) = Metadata::load(&path) else { return };
        if let Ok(vocabulary) = GgufTokenizer::new(&metadata).and_then(|gguf| Vocabulary::from_gguf(gguf, &path)) {
            super::tokenizer::use_vocabulary(&vocabulary);
        }
        drop(Model::load(&path));
    });
}

/// A value of the metadata.
enum Value<'a> {
    Count(u32),
    Float(f32),
    Text(&'a str),
    Texts(&'a [&'a str]),
    Floats(&'a [f32]),
    Kinds(&'a [i32]),
}

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

fn value(bytes: &mut Vec<u8>, key: &str, value: &Value) {
    text(bytes, key);
    let list = |bytes: &mut Vec<u8>, kind: u32, n: usize| {
        bytes.extend(9u32.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend((n as u64).to_le_bytes());
    };
    match value {
        Value::Count(n) => bytes.extend([4u32, *n].map(u32::to_le_bytes).concat()),
        Value::Float(x) => bytes.extend([6u32, x.to_bits()].map(u32::to_le_bytes).concat()),
        Value::Text(x) => {
            bytes.extend(8u32.to_le_bytes());
            text(bytes, x);
        }
        Value::Texts(all) => {
            list(bytes, 8, all.len());
            all.iter().for_each(|x| text(bytes, x));
        }
        Value::Floats(all) => {
            list(bytes, 6, all.len());
            all.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        }
        Value::Kinds(all) => {
            list(bytes, 5, all.len());
            all.iter().for_each(|x| bytes.extend(x.to_le_bytes()));
        }
    }
}

/// A file of these values and of f32 tensors of these shapes, innermost first.
fn file(values: &[(&str, Value)], tensors: &[(&str, &[u64])]) -> Vec<u8> {
    let mut bytes = b"GGUF".to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend([tensors.len() as u64, values.len() as u64].map(u64::to_le_bytes).concat());
    values.iter().for_each(|(key, v)| value(&mut bytes, key, v));
    let mut at = 0u64;
    for (name, shape) in tensors {
        text(&mut bytes, name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|n| bytes.extend(n.to_le_bytes()));
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(at.to_le_bytes());
        at += (4 * shape.iter().product::<u64>()).next_multiple_of(32);
    }
    bytes.resize(bytes.len().next_multiple_of(32) + at as usize, 0);
    bytes
}

pub fn seeds() -> Vec<Vec<u8>> {
    let model = [
        ("general.architecture", Value::Text("llama")),
        ("llama.block_count", Value::Count(1)),
        ("llama.context_length", Value::Count(32)),
        ("llama.embedding_length", Value::Count(16)),
        ("llama.feed_forward_length", Value::Count(16)),
        ("llama.attention.head_count", Value::Count(1)),
        ("llama.attention.head_count_kv", Value::Count(1)),
        ("llama.attention.layer_norm_rms_epsilon", Value::Float(1e-5)),
        ("llama.rope.freq_base", Value::Float(1e4)),
        ("llama.vocab_size", Value::Count(6)),
        ("tokenizer.ggml.model", Value::Text("llama")),
        ("tokenizer.ggml.tokens", Value::Texts(&["<unk>", "<s>", "</s>", "\u{2581}", "a", "\u{2581}a"])),
        ("tokenizer.ggml.scores", Value::Floats(&[0.0, 0.0, 0.0, -1.0, -2.0, -3.0])),
        ("tokenizer.ggml.token_type", Value::Kinds(&[2, 3, 3, 1, 1, 1])),
        ("tokenizer.ggml.bos_token_id", Value::Count(1)),
        ("tokenizer.ggml.eos_token_id", Value::Count(2)),
        ("tokenizer.chat_template", Value::Text("{% for m in messages %}{{ m.content }}{% endfor %}")),
    ];
    let tensors: [(&str, &[u64]); 11] = [
        ("token_embd.weight", &[16, 6]),
        ("output_norm.weight", &[16]),
        ("blk.0.attn_norm.weight", &[16]),
        ("blk.0.attn_q.weight", &[16, 16]),
        ("blk.0.attn_k.weight", &[16, 16]),
        ("blk.0.attn_v.weight", &[16, 16]),
        ("blk.0.attn_output.weight", &[16, 16]),
        ("blk.0.ffn_norm.weight", &[16]),
        ("blk.0.ffn_gate.weight", &[16, 16]),
        ("blk.0.ffn_up.weight", &[16, 16]),
        ("blk.0.ffn_down.weight", &[16, 16]),
    ];
    let bytes_bpe = [
        ("tokenizer.ggml.model", Value::Text("gpt2")),
        ("tokenizer.ggml.pre", Value::Text("smollm")),
        ("tokenizer.ggml.tokens", Value::Texts(&["a", "b", "ab", "<|e|>"])),
        ("tokenizer.ggml.token_type", Value::Kinds(&[1, 1, 1, 3])),
        ("tokenizer.ggml.merges", Value::Texts(&["a b"])),
    ];
    vec![file(&model, &tensors), file(&model, &[]), file(&bytes_bpe, &[])]
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_get_far() {
        let seeds = super::seeds();
        super::super::in_folder(&[("model.gguf", &seeds[0]), ("bpe.gguf", &seeds[2])], |folder| {
            let path = folder.join("model.gguf");
            super::Model::load(&path).map(drop).unwrap();
            for name in ["model.gguf", "bpe.gguf"] {
                let gguf = super::GgufTokenizer::new(&super::Metadata::load(&folder.join(name)).unwrap()).unwrap();
                super::Vocabulary::from_gguf(gguf, &path).unwrap();
            }
        });
    }
}
