//! Tokenizers of GGUF files, against what `golden/tokenizers.py` computed.

use std::path::{Path, PathBuf};
use tqkv_candle::{Error, GgufTokenizer, Metadata, Vocabulary};

/// A file of the folder that `TQKV_MODELS` names. Without it the test is skipped, unless `TQKV_REQUIRE` has "models".
fn model(file: &str) -> Option<PathBuf> {
    let folder = std::env::var_os("TQKV_MODELS");
    let path = folder.map(|folder| Path::new(&folder).join(file)).filter(|path| path.exists());
    if path.is_none() {
        let required = std::env::var("TQKV_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "models"));
        assert!(!required, "TQKV_REQUIRE names models, but TQKV_MODELS has no {file}");
        eprintln!("SKIPPED: TQKV_MODELS names no folder with {file}");
    }
    path
}

fn agrees(name: &str, file: &str, start: Option<u32>) {
    let Some(path) = model(file) else { return };
    let golden: serde_json::Value = serde_json::from_str(include_str!("golden/tokenizers.json")).unwrap();
    let lines: Vec<String> = serde_json::from_value(golden["lines"].clone()).unwrap();
    let expected: Vec<Vec<u32>> = serde_json::from_value(golden[name].clone()).unwrap();
    assert_eq!((lines.len(), expected.len()), (200, 200));
    let gguf = GgufTokenizer::new(&Metadata::load(&path).unwrap()).unwrap();
    let special = |token: u32| gguf.token_types.as_ref().unwrap()[token as usize] == 3;
    let vocabulary = Vocabulary::from_gguf(gguf.clone(), &path).unwrap();
    for (line, expected) in lines.iter().zip(&expected) {
        assert_eq!(&vocabulary.encode(line.as_bytes()).unwrap().tokens, expected, "{line:?}");
        assert_eq!(&vocabulary.encode_continuation(line).unwrap(), expected, "{line:?}");
        let prompt: Vec<u32> = start.into_iter().chain(expected.iter().copied()).collect();
        assert_eq!(vocabulary.encode_prompt(line).unwrap(), prompt, "{line:?}");
        // And back, where no special token is lost, and no other sign stands for a space.
        if !expected.iter().any(|&token| special(token)) && !line.contains('\u{2581}') {
            assert_eq!(&vocabulary.decode(expected).unwrap(), line);
        }
    }
}

#[test]
fn smollm2_agrees_on_every_line() {
    agrees("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", None);
}

#[test]
fn gemma3_agrees_on_every_line() {
    agrees("gemma3", "gemma-3-270m-q4_k_m.gguf", Some(2));
}

fn load(gguf: &GgufTokenizer) -> Result<Vocabulary, Error> {
    Vocabulary::from_gguf(gguf.clone(), Path::new("model.gguf"))
}

/// SentencePiece with a space before texts, as Llama 2 has it.
fn sentence_piece() -> GgufTokenizer {
    let tokens = [
        "<unk>",
        "<s>",
        "</s>",
        "<0x0A>",
        "<0xC3>",
        "<0xA9>",
        "\u{2581}",
        "h",
        "e",
        "he",
        "\u{2581}he",
        "el",
        "l",
        "<x>",
    ];
    let scores = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -9.0, -9.0, -9.0, -2.0, -3.0, -1.0, -9.0, 0.0];
    GgufTokenizer {
        model: "llama".into(),
        tokens: tokens.map(String::from).to_vec(),
        scores: Some(scores.to_vec()),
        token_types: Some(vec![2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1, 4]),
        bos: Some(1),
        eos: Some(2),
        unk: Some(0),
        ..GgufTokenizer::default()
    }
}

/// Byte-level BPE of a few letters.
fn byte_level() -> GgufTokenizer {
    let tokens = ["<|end|>", "a", "b", "1", "\u{120}", "'", "s", "ab", "\u{120}ab", "11", "'s", "\u{c3}", "\u{a9}"];
    let merges = ["a b", "\u{120} ab", "1 1", "' s"];
    GgufTokenizer {
        model: "gpt2".into(),
        pre: Some("gpt-2".into()),
        tokens: tokens.map(String::from).to_vec(),
        token_types: Some([3].into_iter().chain([1; 12]).collect()),
        merges: Some(merges.map(String::from).to_vec()),
        bos: Some(0),
        eos: Some(0),
        ..GgufTokenizer::default()
    }
}

#[test]
fn scores_say_what_is_merged_first() {
    let vocabulary = load(&sentence_piece()).unwrap();
    // `el` before `he`; bytes where there is no token; the start token unless the file says no.
    assert_eq!(vocabulary.encode_prompt("he hel").unwrap(), [1, 10, 6, 7, 11]);
    assert_eq!(vocabulary.encode_continuation("he\u{e9}\n<x>he").unwrap(), [9, 4, 5, 3, 13, 9]);
    assert_eq!(vocabulary.encode_prompt("z").unwrap(), [1, 6, 0]);
    assert_eq!(vocabulary.decode(&[1, 10, 10, 4, 5, 4, 13]).unwrap(), "he he\u{e9}\u{fffd}<x>");
    let gguf = GgufTokenizer { add_bos: Some(false), add_eos: Some(true), ..sentence_piece() };
    assert_eq!(load(&gguf).unwrap().encode_prompt("he").unwrap(), [10, 2]);
    let gguf = GgufTokenizer { add_space_prefix: Some(false), ..sentence_piece() };
    assert_eq!(load(&gguf).unwrap().encode_prompt("he").unwrap(), [1, 9]);
    assert_eq!(load(&gguf).unwrap().decode(&[10, 10]).unwrap(), " he he");
}

#[test]
fn texts_are_cut_as_the_file_says() {
    let encode = |pre: &str, text: &str| {
        let gguf = GgufTokenizer { pre: Some(pre.into()), ..byte_level() };
        load(&gguf).unwrap().encode_prompt(text).unwrap()
    };
    assert_eq!(encode("gpt-2", "ab ab's11<|end|>"), [7, 8, 10, 9, 0]);
    assert_eq!(encode("smollm", "ab 11"), [7, 4, 3, 3]);
    assert_eq!(encode("qwen2", "11"), [3, 3]);
    // Composed: e and an accent are two bytes.
    assert_eq!(encode("qwen2", "\u{e9}"), [11, 12]);
    // Begins with the start token without being told.
    assert_eq!(encode("llama-bpe", "11's"), [0, 9, 10]);
    let gguf = GgufTokenizer { add_bos: Some(false), pre: Some("llama-bpe".into()), ..byte_level() };
    assert_eq!(load(&gguf).unwrap().encode_prompt("11").unwrap(), [9]);
    // Every pattern compiles.
    for pre in ["default", "gpt-2", "smollm", "llama3", "dbrx", "qwen2", "tekken", "gpt-4o"] {
        assert!(encode(pre, "ab 'b\n 1a  b").len() > 5, "{pre}");
    }
}

#[test]
fn metadata_that_lies_is_refused() {
    let refused = |gguf: GgufTokenizer, words: &str| {
        let error = load(&gguf).err().unwrap_or_else(|| panic!("{words}"));
        assert!(matches!(error, Error::Tokenizer { .. }), "{error}");
        let text = error.to_string();
        assert!(text.starts_with("model.gguf: ") && text.contains(words), "{text}");
    };
    refused(GgufTokenizer { model: "t5".into(), ..byte_level() }, "tokenizer.ggml.model is \"t5\"");
    refused(GgufTokenizer { pre: Some("x".into()), ..byte_level() }, "tokenizer.ggml.pre is \"x\"");
    refused(GgufTokenizer { tokens: vec![], ..byte_level() }, "tokens has 0 values");
    refused(GgufTokenizer { token_types: Some(vec![1]), ..byte_level() }, "token_type has 1 values, expected 13");
    refused(GgufTokenizer { scores: Some(vec![]), ..sentence_piece() }, "scores has 0 values, expected 14");
    refused(GgufTokenizer { scores: None, ..sentence_piece() }, "scores is missing");
    refused(GgufTokenizer { merges: None, ..byte_level() }, "merges is missing");
    refused(GgufTokenizer { bos: Some(13), ..byte_level() }, "bos_token_id is 13, expected less than 13");
    refused(GgufTokenizer { unk: Some(u32::MAX), ..sentence_piece() }, "unknown_token_id is 4294967295");
    refused(GgufTokenizer { bos: None, add_bos: Some(true), ..byte_level() }, "there is no bos_token_id");
    refused(GgufTokenizer { add_space_prefix: Some(true), ..byte_level() }, "add_space_prefix is true");
    for (merge, words) in
        [("ab", "two strings"), ("a 1", "no token"), ("ab \u{120}ab", "no token"), ("a  ", "no token")]
    {
        refused(GgufTokenizer { merges: Some(vec![merge.into()]), ..byte_level() }, words);
    }
    // Strings that occur twice, are empty, or are no bytes are odd, but no more than that.
    let mut odd = byte_level();
    odd.tokens[12] = "a".into();
    odd.tokens[11] = String::new();
    odd.token_types.as_mut().unwrap()[11] = 3;
    let vocabulary = load(&odd).unwrap();
    assert_eq!(vocabulary.encode_prompt("ab a").unwrap(), [7, 4, 1]);
    assert_eq!(vocabulary.decode(&[12, 11, 7]).unwrap().chars().last(), Some('b'));
}
