//! Text to tokens and back.

use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use std::ops::Range;
use std::path::Path;
use tokenizers::tokenizer::DecodeStream;
use tokenizers::{
    DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    Tokenizer as HfTokenizer,
};

/// A model's vocabulary.
pub enum Vocabulary {
    /// The 256 byte values; byte 0 starts a text.
    Bytes,
    /// What `tokenizer.json` says.
    Tokenizer(Box<HfTokenizer>),
}

/// Tokens of a text, and where in the text each one stands.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Encoded {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// For each token the bytes of the text that it stands for.
    pub spans: Vec<Range<usize>>,
}

impl Vocabulary {
    /// Reads `tokenizer.json` from a model's directory. Without one the vocabulary is the 256 byte
    /// values, if the model has that many tokens.
    pub fn load(dir: &Path, config: &LlamaConfig) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if path.exists() {
            let bytes = crate::config::read(&path)?;
            let mut tokenizer = HfTokenizer::from_bytes(bytes)
                .map_err(|e| Error::Tokenizer { message: format!("{}: {e}", path.display()) })?;
            // Some files say how training cut and filled up its texts. As in transformers, that is no part of the vocabulary.
            tokenizer.with_padding(None);
            tokenizer.with_truncation(None).map_err(tokenizer_error)?;
            Ok(Self::Tokenizer(Box::new(tokenizer)))
        } else if config.vocab_size == 256 {
            Ok(Self::Bytes)
        } else {
            Err(Error::NoTokenizer { dir: dir.into(), vocab_size: config.vocab_size })
        }
    }

    /// Whether tokens are bytes.
    pub fn is_bytes(&self) -> bool {
        matches!(self, Self::Bytes)
    }

    /// The tokens of a prompt, with the start token where the vocabulary has one.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok([0].into_iter().chain(text.bytes().map(u32::from)).collect()),
            Self::Tokenizer(tokenizer) => Ok(tokenizer.encode(text, true).map_err(tokenizer_error)?.get_ids().into()),
        }
    }

    /// The tokens of a plain text, without special ones.
    pub fn encode(&self, text: &[u8]) -> Result<Encoded> {
        match self {
            Self::Bytes => Ok(Encoded {
                tokens: text.iter().map(|&byte| byte.into()).collect(),
                spans: (0..text.len()).map(|i| i..i + 1).collect(),
            }),
            Self::Tokenizer(tokenizer) => {
                let text = std::str::from_utf8(text)
                    .map_err(|e| Error::Tokenizer { message: format!("the text is not UTF-8: {e}") })?;
                let encoding = tokenizer.encode(text, false).map_err(tokenizer_error)?;
                let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
                Ok(Encoded { tokens: encoding.get_ids().into(), spans })
            }
        }
    }

    /// A decoder for tokens that arrive one by one.
    pub fn decoder(&self) -> Decoder<'_> {
        match self {
            Self::Bytes => Decoder(Kind::Bytes(Vec::new())),
            Self::Tokenizer(tokenizer) => Decoder(Kind::Tokenizer(tokenizer.decode_stream(true))),
        }
    }
}

/// Turns tokens into text as they arrive, holding back what is no whole character yet.
pub struct Decoder<'a>(Kind<'a>);

// One value a generation: its size does not matter.
#[allow(clippy::large_enum_variant)]
enum Kind<'a> {
    /// The bytes held back.
    Bytes(Vec<u8>),
    Tokenizer(
        DecodeStream<'a, ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, PostProcessorWrapper, DecoderWrapper>,
    ),
}

impl Decoder<'_> {
    /// The text that `token` completes, possibly empty. What is no UTF-8 becomes U+FFFD.
    pub fn push(&mut self, token: u32) -> Result<String> {
        match &mut self.0 {
            Kind::Bytes(held) => {
                held.push(u8::try_from(token).map_err(|_| Error::Token { got: token, vocab_size: 256 })?);
                let mut text = String::new();
                let mut used = 0;
                for chunk in held.utf8_chunks() {
                    text.push_str(chunk.valid());
                    used += chunk.valid().len();
                    // Only the last chunk can be the beginning of a character.
                    let incomplete = used + chunk.invalid().len() == held.len()
                        && std::str::from_utf8(chunk.invalid()).is_err_and(|e| e.error_len().is_none());
                    if !chunk.invalid().is_empty() && !incomplete {
                        text.push(char::REPLACEMENT_CHARACTER);
                        used += chunk.invalid().len();
                    }
                }
                held.drain(..used);
                Ok(text)
            }
            Kind::Tokenizer(stream) => Ok(stream.step(token).map_err(tokenizer_error)?.unwrap_or_default()),
        }
    }

    /// The text for bytes still held back when no more tokens come.
    pub fn finish(self) -> String {
        match self.0 {
            Kind::Bytes(held) => String::from_utf8_lossy(&held).into_owned(),
            Kind::Tokenizer(_) => String::new(),
        }
    }
}

fn tokenizer_error(error: tokenizers::Error) -> Error {
    Error::Tokenizer { message: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_streamed_as_whole_characters() {
        let text = "a\u{e9}\u{20ac}\u{1f600}b";
        let mut decoder = Vocabulary::Bytes.decoder();
        let pieces: Vec<String> = text.bytes().map(|b| decoder.push(b.into()).unwrap()).collect();
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|p| p.chars().count() <= 1));
        assert_eq!(decoder.finish(), "");
    }

    #[test]
    fn what_is_no_utf8_is_replaced() {
        let bytes = b"a\xffb\xe2\x82c\xe2\x82";
        let mut decoder = Vocabulary::Bytes.decoder();
        let mut text: String = bytes.iter().map(|&b| decoder.push(b.into()).unwrap()).collect();
        text += &decoder.finish();
        assert_eq!(text, String::from_utf8_lossy(bytes));
    }

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

    #[test]
    fn a_tokenizer_is_used_where_there_is_one() {
        let vocabulary = Vocabulary::Tokenizer(Box::new(WORDS.parse().unwrap()));
        assert_eq!(vocabulary.encode_prompt("red fox").unwrap(), [0, 2, 3]);
        let encoded = vocabulary.encode("red  b\u{e4}r fox".as_bytes()).unwrap();
        assert_eq!(encoded, Encoded { tokens: vec![2, 1, 3], spans: vec![0..3, 5..9, 10..13] });
        let mut decoder = vocabulary.decoder();
        let text: String = [0, 2, 3, 3].map(|token| decoder.push(token).unwrap()).concat();
        assert_eq!(text + &decoder.finish(), "red fox fox");
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
        let encoded = Vocabulary::Bytes.encode(b"hi").unwrap();
        assert_eq!(encoded, Encoded { tokens: vec![104, 105], spans: vec![0..1, 1..2] });
    }
}
