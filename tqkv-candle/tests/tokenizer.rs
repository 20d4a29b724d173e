//! Text to tokens and back, against the tokenizers crate where that is right.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;
use tokenizers::Tokenizer;
use tqkv_candle::{Encoded, Error, ModelConfig, Vocabulary};

const LLAMA2: &str = include_str!("../testdata/llama2.json");
const CUT: &str = include_str!("../testdata/cut-within-decoder.json");
const LONG_MERGE: &str = include_str!("../testdata/merge-longer-than-any-token.json");

/// Words, with a start token that prompts begin with.
const WORDS: &str = r#"{
    "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "decoder": null,
    "added_tokens": [{"id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
                      "rstrip": false, "normalized": false}],
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": {"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}},
    "model": {"type": "WordLevel", "vocab": {"<s>": 0, "?": 1, "red": 2, "fox": 3}, "unk_token": "?"}
}"#;

fn config(fields: Value) -> ModelConfig {
    let mut config = json!({
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
        "max_position_embeddings": 64,
    });
    for (field, value) in fields.as_object().unwrap() {
        config[field] = value.clone();
    }
    ModelConfig::parse(config.to_string().as_bytes(), Path::new("config.json")).unwrap()
}

/// What a directory with these files gives.
fn load(tokenizer: &str, tokenizer_config: Option<Value>) -> Result<Vocabulary, Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer).unwrap();
    if let Some(json) = tokenizer_config {
        std::fs::write(dir.path().join("tokenizer_config.json"), json.to_string()).unwrap();
    }
    Vocabulary::load(dir.path(), &config(json!({})))
}

fn streamed(vocabulary: &Vocabulary, tokens: &[u32]) -> String {
    let mut decoder = vocabulary.decoder();
    let mut text: String = tokens.iter().map(|&token| decoder.push(token).unwrap()).collect();
    text += &decoder.finish();
    text
}

/// What the crate itself makes of all tokens at once.
fn crates_own(tokenizer: &str, tokens: &[u32]) -> String {
    tokenizer.parse::<Tokenizer>().unwrap().decode(tokens, true).unwrap()
}

#[test]
fn bytes_are_streamed_as_whole_characters() {
    let bytes = "a\u{e9}\u{1f600}".bytes().chain(*b"\xff\xe2\x82c\xe2\x82");
    let tokens: Vec<u32> = bytes.clone().map(u32::from).collect();
    assert_eq!(streamed(&Vocabulary::Bytes, &tokens), String::from_utf8_lossy(&bytes.collect::<Vec<_>>()));
}

#[test]
fn a_tokenizer_is_used_where_there_is_one() {
    let vocabulary = load(WORDS, None).unwrap();
    assert_eq!(vocabulary.encode_prompt("red fox").unwrap(), [0, 2, 3]);
    assert_eq!(vocabulary.encode_continuation("red fox").unwrap(), [2, 3]);
    let encoded = vocabulary.encode("red  b\u{e4}r fox".as_bytes()).unwrap();
    assert_eq!(encoded, Encoded { tokens: vec![2, 1, 3], spans: vec![0..3, 5..9, 10..13] });
    // Special tokens, and those that it does not know, have no text.
    assert_eq!(streamed(&vocabulary, &[0, 2, 77, 3, u32::MAX, 3]), "red fox fox");
    assert!(matches!(vocabulary.encode(b"\xff"), Err(Error::Tokenizer { .. })));
}

#[test]
fn a_token_that_is_no_byte_is_an_error() {
    let result = Vocabulary::Bytes.decoder().push(256);
    assert!(matches!(result, Err(Error::Token { got: 256, vocab_size: 256 })));
}

#[test]
fn prompts_begin_with_the_start_byte_and_texts_do_not() {
    assert_eq!(Vocabulary::Bytes.encode_prompt("hi").unwrap(), [0, 104, 105]);
    assert_eq!(Vocabulary::Bytes.encode_continuation("hi").unwrap(), [104, 105]);
    let encoded = Vocabulary::Bytes.encode(b"hi").unwrap();
    assert_eq!(encoded, Encoded { tokens: vec![104, 105], spans: vec![0..1, 1..2] });
}

#[test]
fn bytes_that_are_no_text_do_not_end_a_stream() {
    let vocabulary = load(LLAMA2, None).unwrap();
    // `A`, a lone byte C3, `he`; and three bytes FF at the end.
    assert_eq!(streamed(&vocabulary, &[68, 198, 263]), "A\u{fffd}he");
    assert_eq!(streamed(&vocabulary, &[263, 258, 258, 258]), "he\u{fffd}\u{fffd}\u{fffd}");
    // A character in bytes comes with its last, and the text before it at once.
    let mut decoder = vocabulary.decoder();
    let pieces: Vec<String> = [260, 198, 172, 263].map(|token| decoder.push(token).unwrap()).into();
    assert_eq!(pieces, ["the", "", "\u{e9}", "he"]);
}

/// A tokenizer of these strings with this decoder.
fn with_decoder(strings: &[&str], decoder: &Value) -> String {
    let vocab: serde_json::Map<_, _> = strings.iter().enumerate().map(|(i, s)| ((*s).into(), i.into())).collect();
    let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": strings[0]});
    json!({"version": "1.0", "added_tokens": [], "pre_tokenizer": null, "decoder": decoder, "model": model}).to_string()
}

const STRINGS: [&str; 16] = [
    "?",
    "\u{2581}the",
    "he",
    "\u{2581}",
    "##ing",
    "play",
    ".",
    "'s",
    "end</w>",
    "<0x41>",
    "<0xE2>",
    "<0x82>",
    "<0xAC>",
    " ",
    "\u{e2}\u{122}\u{120}",
    "\u{120}a",
];

fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true})
}

/// Decoders, each with whether it gives bytes in a row another text than the crate does.
fn decoders() -> Vec<(Value, bool)> {
    let space = json!({"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "});
    let strip = |start, stop| json!({"type": "Strip", "content": " ", "start": start, "stop": stop});
    let sequence = |decoders: &[Value]| json!({"type": "Sequence", "decoders": decoders});
    let (fallback, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let metaspace =
        |scheme| json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": scheme, "split": true});
    vec![
        (Value::Null, false),
        (byte_level(), false),
        (json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), false),
        (json!({"type": "WordPiece", "prefix": "##", "cleanup": false}), false),
        (json!({"type": "BPEDecoder", "suffix": "</w>"}), false),
        (json!({"type": "CTC", "pad_token": "?", "word_delimiter_token": "he", "cleanup": true}), false),
        (metaspace("always"), false),
        (metaspace("never"), false),
        (sequence(&[space.clone(), fallback.clone(), fuse.clone(), strip(1, 0)]), true),
        (sequence(&[space.clone(), fallback.clone(), fuse.clone()]), true),
        (sequence(&[space.clone(), fuse.clone(), strip(2, 2)]), false),
        (sequence(&[sequence(&[fuse.clone(), space.clone()]), strip(1, 0)]), false),
        (sequence(&[byte_level(), strip(0, 1)]), false),
        (sequence(&[strip(1, 0), metaspace("first"), fuse]), false),
        (sequence(&[fallback, space]), true),
    ]
}

/// A text with the runs of byte tokens decoded as SentencePiece does, for those decoders that replace, fall back and strip.
fn sentence_piece(tokens: &[u32], strip: bool) -> String {
    let mut text = String::new();
    for run in tokens.chunk_by(|&a, &b| byte(a).is_some() && byte(b).is_some()) {
        let bytes: Vec<u8> = run.iter().filter_map(|&token| byte(token)).collect();
        if bytes.is_empty() {
            text += &STRINGS[run[0] as usize].replace('\u{2581}', " ");
        }
        for chunk in bytes.utf8_chunks() {
            text += chunk.valid();
            text += &"\u{fffd}".repeat(chunk.invalid().len());
        }
    }
    if strip { text.strip_prefix(' ').unwrap_or(&text).to_owned() } else { text }
}

fn byte(token: u32) -> Option<u8> {
    (9..13).contains(&token).then(|| [0x41, 0xe2, 0x82, 0xac][token as usize - 9])
}

proptest! {
    #[test]
    fn what_is_streamed_is_what_is_decoded_at_once(tokens in prop::collection::vec(0u32..16, 0..24)) {
        for (decoder, bytes_differ) in decoders() {
            let tokenizer = with_decoder(&STRINGS, &decoder);
            let vocabulary = load(&tokenizer, None).unwrap();
            let text = streamed(&vocabulary, &tokens);
            prop_assert_eq!(&text, &vocabulary.decode(&tokens).unwrap());
            // Where there is nothing but spaces to strip, or no token at all, the crate panics.
            let blank = tokens.iter().all(|token| [3, 13].contains(token));
            let has_bytes = tokens.iter().any(|&token| byte(token).is_some());
            if !(blank || bytes_differ && has_bytes) {
                prop_assert_eq!(&text, &crates_own(&tokenizer, &tokens), "{}", decoder);
            }
            if decoder["decoders"][2]["type"] == "Fuse" && bytes_differ {
                prop_assert_eq!(text, sentence_piece(&tokens, decoder["decoders"][3].is_object()));
            }
        }
    }

    #[test]
    fn any_tokens_of_a_byte_fallback_vocabulary_are_streamed(tokens in prop::collection::vec(0u32..300, 0..40)) {
        let vocabulary = load(LLAMA2, None).unwrap();
        let text = streamed(&vocabulary, &tokens);
        prop_assert_eq!(&text, &vocabulary.decode(&tokens).unwrap());
        let expected = crates_own(LLAMA2, &tokens);
        let valid = !expected.contains('\u{fffd}');
        prop_assert!(!valid || text == expected);
    }

    #[test]
    fn any_tokens_of_a_byte_level_vocabulary_are_streamed(tokens in prop::collection::vec(0u32..256, 0..40)) {
        let characters: Vec<String> = (0x21..0x7f).chain(0xa1..0xad).chain(0xae..0x144)
            .map(|c| char::from_u32(c).unwrap().to_string()).collect();
        let characters: Vec<&str> = characters.iter().map(String::as_str).collect();
        prop_assert_eq!(characters.len(), 256);
        let tokenizer = with_decoder(&characters, &byte_level());
        let vocabulary = load(&tokenizer, None).unwrap();
        prop_assert_eq!(streamed(&vocabulary, &tokens), crates_own(&tokenizer, &tokens));
    }
}

#[test]
fn bytes_at_the_end_of_a_byte_level_text_are_not_dropped() {
    let vocabulary = load(&with_decoder(&["h", "\u{ff}"], &byte_level()), None).unwrap();
    assert_eq!(streamed(&vocabulary, &[0, 1, 1, 1]), "h\u{fffd}\u{fffd}\u{fffd}");
}

#[test]
fn a_damaged_tokenizer_is_an_error_that_names_the_file() {
    // Cut anywhere; a byte changed anywhere.
    let cut = (0..LLAMA2.len()).step_by(97).map(|n| LLAMA2[..n].to_owned());
    let changed = (0..CUT.len()).step_by(13).map(|n| format!("{}]{}", &CUT[..n], &CUT[n + 1..]));
    for text in cut.chain(changed).chain([CUT.to_owned()]) {
        let error = load(&text, None).err().unwrap();
        assert!(matches!(&error, Error::Tokenizer { path, .. } if path.ends_with("tokenizer.json")), "{error}");
        assert!(error.to_string().contains("tokenizer.json: "), "{error}");
    }
}

#[test]
fn a_panic_of_the_crate_is_an_error_that_names_the_file() {
    let work = |text: &str| {
        let vocabulary = load(text, None)?;
        vocabulary.encode_prompt("q the cat")?;
        vocabulary.encode_continuation("q the cat")?;
        vocabulary.encode(b"q the cat")
    };
    let error = work(LONG_MERGE).err().unwrap();
    assert!(matches!(&error, Error::Tokenizer { path, .. } if path.ends_with("tokenizer.json")), "{error}");
    assert!(error.to_string().contains("panics"), "{error}");
    // A decoder that fails, here on strings shorter than what it takes off, is not asked.
    let strip = json!({"type": "Strip", "content": " ", "start": 3, "stop": 3});
    let vocabulary = load(&with_decoder(&["?", " ", "", "a  "], &strip), None).unwrap();
    assert_eq!(streamed(&vocabulary, &[1, 2, 3]), "a");
}

#[test]
fn a_start_token_is_added_where_only_the_configuration_says_so() {
    let mut words: Value = serde_json::from_str(WORDS).unwrap();
    let tokens = |tokenizer: &Value, config: Value| {
        load(&tokenizer.to_string(), Some(config)).unwrap().encode_prompt("red").unwrap()
    };
    let add =
        json!({"add_bos_token": true, "bos_token": "<s>", "add_eos_token": true, "eos_token": {"content": "fox"}});
    // The post-processor's word counts.
    assert_eq!(tokens(&words, add.clone()), [0, 2]);
    for nothing in [Value::Null, byte_level()] {
        words["post_processor"] = nothing;
        assert_eq!(tokens(&words, json!({})), [2]);
        assert_eq!(tokens(&words, add.clone()), [0, 2, 3]);
        assert_eq!(tokens(&words, json!({"add_bos_token": false, "bos_token": "<s>"})), [2]);
        assert_eq!(tokens(&words, json!({"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<s>"})), [0, 2]);
        let class = json!({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "add_bos_token": false});
        assert_eq!(tokens(&words, class), [2]);
        assert_eq!(tokens(&words, json!({"add_bos_token": null, "add_eos_token": null})), [2]);
    }
    let refused = |config: Value, field: &str| {
        let error = load(&words.to_string(), Some(config)).err();
        assert!(matches!(&error, Some(Error::ConfigValue { field: f, .. }) if f == field), "{error:?}");
    };
    refused(json!({"add_bos_token": "yes"}), "add_bos_token");
    refused(json!({"add_bos_token": true}), "bos_token");
    refused(json!({"add_bos_token": true, "bos_token": "<start>"}), "bos_token");
    refused(json!({"add_eos_token": true, "eos_token": 3}), "eos_token");
    assert!(matches!(load(&words.to_string(), Some(json!([]))), Err(Error::FieldType { .. })));

    // Without a name, the model's.
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("tokenizer.json"), words.to_string()).unwrap();
    std::fs::write(dir.path().join("tokenizer_config.json"), r#"{"add_bos_token": true}"#).unwrap();
    let vocabulary = Vocabulary::load(dir.path(), &config(json!({"bos_token_id": 3}))).unwrap();
    assert_eq!(vocabulary.encode_prompt("red").unwrap(), [3, 2]);
}

#[test]
fn text_that_goes_on_gets_no_space_before_it() {
    // The strings of a prompt's tokens, and of the same text that goes on.
    let strings = |tokenizer: &str, text: &str| {
        let (crates, vocabulary) = (tokenizer.parse::<Tokenizer>().unwrap(), load(tokenizer, None).unwrap());
        let strings = |tokens: Vec<u32>| tokens.iter().map(|&t| crates.id_to_token(t).unwrap()).collect::<String>();
        [vocabulary.encode_prompt(text), vocabulary.encode_continuation(text)].map(|tokens| strings(tokens.unwrap()))
    };
    assert_eq!(strings(LLAMA2, "he"), ["<s>\u{2581}he", "he"]);
    assert_eq!(strings(LLAMA2, " he</s>he")[1], "\u{2581}he</s>he");

    let metaspace = json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "first", "split": true});
    let whitespace = json!({"type": "WhitespaceSplit"});
    let mut word: Value = serde_json::from_str(LLAMA2).unwrap();
    word["normalizer"] = json!({"type": "Strip", "strip_left": true, "strip_right": false});
    for pre_tokenizer in [metaspace.clone(), json!({"type": "Sequence", "pretokenizers": [whitespace, metaspace]})] {
        word["pre_tokenizer"] = pre_tokenizer;
        assert_eq!(strings(&word.to_string(), "he"), ["<s>\u{2581}he", "he"]);
    }
    let mut bytes = word;
    bytes["pre_tokenizer"] = byte_level();
    bytes["model"]["vocab"]["\u{120}"] = 290.into();
    assert_eq!(strings(&bytes.to_string(), "he"), ["<s>\u{120}he", "he"]);
    assert_eq!(strings(&bytes.to_string(), " he")[1], "\u{120}he");
}
