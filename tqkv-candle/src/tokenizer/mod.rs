//! Text to tokens and back.

mod chat;
mod contain;
mod directory;
mod gguf;
mod stream;
mod utf8;

pub use chat::{ChatTemplate, Message};
pub use gguf::GgufTokenizer;
pub use stream::Decoder;

use crate::error::{Error, Result};
use crate::models::{Metadata, ModelConfig};
use contain::contain;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use tokenizers::{
    Encoding, Model as _, NormalizerWrapper, OffsetType, PreTokenizer as _, PreTokenizerWrapper,
    Tokenizer as HfTokenizer,
};

/// A model's vocabulary.
pub enum Vocabulary {
    /// The 256 byte values; byte 0 starts a text.
    Bytes,
    /// What the model's files say.
    Tokenizer(Box<Tokenizer>),
}

/// A tokenizer of the `tokenizers` crate, whose panics are errors here.
pub struct Tokenizer {
    inner: HfTokenizer,
    /// Where it comes from.
    path: PathBuf,
    /// Added to a prompt where `inner` adds nothing itself.
    start: Option<u32>,
    end: Option<u32>,
    /// Those of `inner`, but without the space that some put before a text: for text that follows other text.
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    /// The source of the chat template.
    chat_template: Option<String>,
    /// Strings of tokens by the names that templates have for them: `bos_token` and the like.
    names: BTreeMap<&'static str, String>,
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
    /// Reads the tokenizer of a model: from its GGUF file, or from its directory. There `tokenizer.json` says it, and
    /// `tokenizer_config.json` whether prompts get a start and an end token, where `tokenizer.json` does not say. Without
    /// `tokenizer.json` the vocabulary is the 256 byte values, if the model has that many tokens.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Tokenizer`] for a file that is no tokenizer; [`Error::Json`], [`Error::FieldType`] and
    /// [`Error::ConfigValue`] for `tokenizer_config.json`; those of [`Metadata::load`] and [`Vocabulary::from_gguf`];
    /// [`Error::NoTokenizer`].
    pub fn load(path: &Path, config: &ModelConfig) -> Result<Self> {
        if path.is_file() {
            Self::from_gguf(GgufTokenizer::new(&Metadata::load(path)?)?, path)
        } else if path.join("tokenizer.json").exists() {
            Ok(Self::Tokenizer(Box::new(Tokenizer::load(path, config.bos_token)?)))
        } else if config.vocab_size == 256 {
            Ok(Self::Bytes)
        } else {
            Err(Error::NoTokenizer { dir: path.into(), vocab_size: config.vocab_size })
        }
    }

    /// Whether tokens are bytes.
    pub fn is_bytes(&self) -> bool {
        matches!(self, Self::Bytes)
    }

    /// The tokens of a prompt, with the start token where the vocabulary has one.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails on the text.
    pub fn encode_prompt(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok([0].into_iter().chain(text.bytes().map(u32::from)).collect()),
            Self::Tokenizer(tokenizer) => {
                let encoding = tokenizer.try_to(|inner| inner.encode(text, true))?;
                let tokens = encoding.get_ids().iter().copied();
                Ok(tokenizer.start.into_iter().chain(tokens).chain(tokenizer.end).collect())
            }
        }
    }

    /// The tokens of text that follows other text: without a start token, and without the space that SentencePiece's
    /// vocabularies put before a text.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails on the text.
    pub fn encode_continuation(&self, text: &str) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Tokenizer(tokenizer) => {
                let encoding = tokenizer.try_to(|inner| tokenizer.encode_continuation(inner, text))?;
                Ok(encoding.get_ids().into())
            }
        }
    }

    /// The tokens of a plain text, without a start token.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the text is not UTF-8 but must be, or the tokenizer fails on it.
    pub fn encode(&self, text: &[u8]) -> Result<Encoded> {
        match self {
            Self::Bytes => Ok(Encoded {
                tokens: text.iter().map(|&byte| byte.into()).collect(),
                spans: (0..text.len()).map(|i| i..i + 1).collect(),
            }),
            Self::Tokenizer(tokenizer) => {
                let text = std::str::from_utf8(text)
                    .map_err(|e| failed(&tokenizer.path, format!("the text is not UTF-8: {e}")))?;
                let encoding = tokenizer.try_to(|inner| inner.encode(text, false))?;
                let spans = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
                Ok(Encoded { tokens: encoding.get_ids().into(), spans })
            }
        }
    }

    /// The text of tokens. What is no UTF-8 becomes U+FFFD; special tokens, and tokens that a tokenizer does not know, have no
    /// text.
    ///
    /// # Errors
    /// [`Error::Token`] from 256 where tokens are bytes.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let mut decoder = self.decoder();
        let mut text = String::new();
        for &token in tokens {
            text += &decoder.push(token)?;
        }
        Ok(text + &decoder.finish())
    }

    /// The model's chat template.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`]; [`Error::ChatTemplate`] if it is no template.
    pub fn chat_template(&self) -> Result<ChatTemplate> {
        match self {
            Self::Bytes => Err(Error::NoChatTemplate { path: "a vocabulary of bytes".into() }),
            Self::Tokenizer(tokenizer) => tokenizer.chat_template(),
        }
    }

    /// Puts another chat template in place of the model's.
    pub fn set_chat_template(&mut self, source: String) {
        if let Self::Tokenizer(tokenizer) = self {
            tokenizer.chat_template = Some(source);
        }
    }

    /// The tokens of a conversation's text, as a [`ChatTemplate`] gives it: the template says where it begins.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if the tokenizer fails on the text.
    pub fn encode_chat(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encode(text.as_bytes())?.tokens)
    }

    /// A decoder for tokens that arrive one by one.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder::new(self)
    }
}

impl Tokenizer {
    /// `path` is for messages.
    fn new(inner: HfTokenizer, path: &Path) -> Result<Self> {
        let json = |e: serde_json::Error| failed(path, e.to_string());
        let normalizer = without_space(serde_json::to_value(inner.get_normalizer()).map_err(json)?);
        let pre_tokenizer = without_space(serde_json::to_value(inner.get_pre_tokenizer()).map_err(json)?);
        Ok(Self {
            path: path.into(),
            start: None,
            end: None,
            normalizer: serde_json::from_value(normalizer).map_err(json)?,
            pre_tokenizer: serde_json::from_value(pre_tokenizer).map_err(json)?,
            chat_template: None,
            names: BTreeMap::new(),
            inner,
        })
    }

    /// What the tokenizer does without failing.
    fn try_to<T>(&self, work: impl FnOnce(&HfTokenizer) -> tokenizers::Result<T>) -> Result<T> {
        contain(|| work(&self.inner))
            .map_err(|message| failed(&self.path, format!("the tokenizers crate panics: {message}")))?
            .map_err(|e| failed(&self.path, e.to_string()))
    }

    /// As the crate encodes, with the parts for text that follows other text.
    fn encode_continuation(&self, inner: &HfTokenizer, text: &str) -> tokenizers::Result<Encoding> {
        let mut pieces = inner.get_added_vocabulary().extract_and_normalize(self.normalizer.as_ref(), text);
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        inner.get_model().tokenize_in_pretokenized(&mut pieces, None)?;
        pieces.into_encoding(None, 0, OffsetType::Byte)
    }

    /// The string of a token, if it has one and is not special.
    fn text_token(&self, token: u32) -> Option<String> {
        let string = self.try_to(|inner| Ok(inner.id_to_token(token))).ok().flatten()?;
        (!self.inner.get_added_vocabulary().is_special_token(&string)).then_some(string)
    }
}

/// A normalizer or pre-tokenizer as JSON that puts no space before a text, and takes none away.
fn without_space(mut part: Value) -> Value {
    let (field, value) = match part["type"].as_str() {
        Some("Prepend") => return Value::Null,
        Some("Metaspace") => ("prepend_scheme", "never".into()),
        Some("ByteLevel") => ("add_prefix_space", false.into()),
        Some("Strip") => ("strip_left", false.into()),
        _ => ("", Value::Null),
    };
    if let Some(old) = part.get_mut(field) {
        *old = value;
    }
    for list in ["normalizers", "pretokenizers"] {
        if let Some(Value::Array(parts)) = part.get_mut(list) {
            *parts = parts.drain(..).map(without_space).filter(|part| !part.is_null()).collect();
        }
    }
    part
}

fn failed(path: &Path, message: String) -> Error {
    Error::Tokenizer { path: path.into(), message }
}
