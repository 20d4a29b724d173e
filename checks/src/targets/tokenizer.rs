//! Tokenizer files of a directory, behind what contains the panics of the crate that reads them.

use std::path::Path;
use tqkv_candle::{Message, ModelConfig, Vocabulary};

const CONFIG: &[u8] = br#"{"model_type":"llama","hidden_size":16,"intermediate_size":16,"num_hidden_layers":1,
"num_attention_heads":1,"num_key_value_heads":1,"vocab_size":6,"rms_norm_eps":1e-5,"max_position_embeddings":32,
"rope_theta":10000.0,"hidden_act":"silu","bos_token_id":1,"eos_token_id":2}"#;

pub fn run(bytes: &[u8]) {
    let [config, template, tokenizer] = super::parts::<3>(bytes);
    let files = [("tokenizer.json", tokenizer), ("tokenizer_config.json", config), ("chat_template.jinja", template)];
    // Files that are empty are not there.
    let files: Vec<_> = files.into_iter().filter(|(_, bytes)| !bytes.is_empty()).collect();
    let model = ModelConfig::parse(CONFIG, Path::new("config.json")).expect("a configuration");
    super::in_folder(&files, |folder| {
        if let Ok(vocabulary) = Vocabulary::load(folder, &model) {
            use_vocabulary(&vocabulary);
        }
    });
}

/// All that is done with a vocabulary; every answer is right that is one.
pub fn use_vocabulary(vocabulary: &Vocabulary) {
    for text in ["", "a", "ab a\u{2581} \u{e9}\u{1f600}\n\tabab 12 <s>"] {
        let mut tokens = vocabulary.encode_prompt(text).unwrap_or_default();
        tokens.extend(vocabulary.encode_continuation(text).unwrap_or_default());
        if let Ok(encoded) = vocabulary.encode(text.as_bytes()) {
            assert_eq!(encoded.tokens.len(), encoded.spans.len());
            tokens.extend(encoded.tokens);
        }
        tokens.extend([0, 1, 5, 255, u32::MAX]);
        drop(vocabulary.decode(&tokens));
    }
    drop(vocabulary.encode(b"\xff\xfe"));
    if let Ok(template) = vocabulary.chat_template() {
        let messages = [("system", "be brief"), ("user", "a{{b}}")];
        let messages = messages.map(|(role, content)| Message { role: role.into(), content: content.into() });
        drop(template.render(&messages, true));
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let bpe = br#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[{"id":0,"content":"<s>","single_word":false,
"lstrip":false,"rstrip":false,"normalized":false,"special":true}],"normalizer":{"type":"NFC"},"pre_tokenizer":{"type":"ByteLevel",
"add_prefix_space":false,"trim_offsets":true,"use_regex":true},"post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":
{"id":"<s>","type_id":0}},{"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},{"Sequence":{"id":"B","type_id":1}}],
"special_tokens":{"<s>":{"id":"<s>","ids":[0],"tokens":["<s>"]}}},"decoder":{"type":"ByteLevel","add_prefix_space":true,"trim_offsets":true,
"use_regex":true},"model":{"type":"BPE","dropout":null,"unk_token":null,"continuing_subword_prefix":null,"end_of_word_suffix":null,
"fuse_unk":false,"byte_fallback":false,"ignore_merges":false,"vocab":{"<s>":0,"a":1,"b":2,"ab":3},"merges":[["a","b"]]}}"#;
    let unigram = br#"{"version":"1.0","added_tokens":[],"normalizer":{"type":"Sequence","normalizers":[{"type":"Prepend","prepend":"_"},
{"type":"Replace","pattern":{"String":" "},"content":"_"}]},"pre_tokenizer":{"type":"Split","pattern":{"Regex":"\\s+|(?=a)"},"behavior":
"Isolated","invert":false},"post_processor":null,"decoder":{"type":"Sequence","decoders":[{"type":"Replace","pattern":{"String":"_"},
"content":" "},{"type":"ByteFallback"},{"type":"Fuse"},{"type":"Strip","content":" ","start":1,"stop":0}]},"model":{"type":"Unigram",
"unk_id":0,"vocab":[["<unk>",0.0],["a",-1.0],["_",-2.0]],"byte_fallback":false}}"#;
    let words = br#"{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"[UNK]":1},"unk_token":"[UNK]"},"pre_tokenizer":{"type":
"Metaspace","replacement":"_","prepend_scheme":"always","split":true}}"#;
    let config = br#"{"add_bos_token":true,"add_eos_token":false,"bos_token":{"content":"<s>"},"eos_token":"a","tokenizer_class":"LlamaTokenizer"}"#;
    let template = b"{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}>{% endif %}";
    let seed = |config: &[u8], template: &[u8], json: &[u8]| super::joined([config, template, json]);
    vec![seed(config, template, bpe), seed(b"", b"", unigram), seed(b"{}", b"{{ x }}", words), seed(b"", template, b"")]
}

#[cfg(test)]
mod tests {
    #[test]
    fn seeds_get_far() {
        let model = super::ModelConfig::parse(super::CONFIG, super::Path::new("config.json")).unwrap();
        for seed in &super::seeds()[..3] {
            let [_, _, tokenizer] = super::super::parts::<3>(seed);
            super::super::in_folder(&[("tokenizer.json", tokenizer)], |folder| {
                super::Vocabulary::load(folder, &model).map(drop).unwrap();
            });
        }
    }
}
