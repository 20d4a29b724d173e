//! Tokens to text as they arrive.

use super::contain::contain;
use super::utf8::{Replace, Utf8};
use super::{Tokenizer, Vocabulary};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::LazyLock;
use tokenizers::decoders::bpe::BPEDecoder;
use tokenizers::decoders::strip::Strip;
use tokenizers::{Decoder as _, DecoderWrapper};

/// Turns tokens into text as they arrive, and holds back only what later tokens can still change.
///
/// All that [`push`](Decoder::push) and [`finish`](Decoder::finish) return, one after the other, is what
/// [`Vocabulary::decode`] returns for the same tokens.
pub struct Decoder<'a>(Kind<'a>);

enum Kind<'a> {
    Bytes(Utf8),
    Tokenizer { tokenizer: &'a Tokenizer, steps: Vec<Step<'a>> },
}

impl<'a> Decoder<'a> {
    pub(super) fn new(vocabulary: &'a Vocabulary) -> Self {
        Self(match vocabulary {
            Vocabulary::Bytes => Kind::Bytes(Utf8::new(Replace::Sequence)),
            Vocabulary::Tokenizer(tokenizer) => {
                Kind::Tokenizer { tokenizer, steps: steps(tokenizer.inner.get_decoder()) }
            }
        })
    }

    /// The text that `token` completes, possibly empty. What is no UTF-8 becomes U+FFFD; special tokens, and tokens that a
    /// tokenizer does not know, have no text.
    ///
    /// # Errors
    /// [`Error::Token`] from 256 where tokens are bytes; a tokenizer takes every token.
    pub fn push(&mut self, token: u32) -> Result<String> {
        match &mut self.0 {
            Kind::Bytes(utf8) => {
                let byte = u8::try_from(token).map_err(|_| Error::Token { got: token, vocab_size: 256 })?;
                Ok(utf8.push(&[byte]))
            }
            Kind::Tokenizer { tokenizer, steps } => {
                let mut text = String::new();
                if let Some(token) = tokenizer.text_token(token) {
                    run(steps, token, &mut text);
                }
                Ok(text)
            }
        }
    }

    /// The text held back, when no more tokens come.
    pub fn finish(self) -> String {
        match self.0 {
            Kind::Bytes(mut utf8) => utf8.finish(),
            Kind::Tokenizer { mut steps, .. } => {
                let mut text = String::new();
                let mut rest = &mut steps[..];
                while let Some((step, next)) = rest.split_first_mut() {
                    step.finish(&mut |token| run(next, token, &mut text));
                    rest = next;
                }
                text
            }
        }
    }
}

/// What a tokenizer's decoder does, one step after the other: each takes strings, at first those of the tokens, and gives
/// strings to the next. The last one's are the text.
enum Step<'a> {
    /// No decoder: the tokens are words.
    Words { first: bool },
    /// A decoder that looks at one string, and at whether it is the first.
    Each { decoder: &'a DecoderWrapper, first: bool },
    /// A decoder that looks at whether a string is the last.
    Last { decoder: &'a BPEDecoder, held: Option<String> },
    /// `<0xNN>` are bytes. Unlike the crate's own step, which makes nothing but U+FFFD of bytes in a row unless all of them
    /// are UTF-8, and like SentencePiece, this keeps the characters among them.
    ByteFallback(Utf8),
    /// Every character is a byte.
    ByteLevel(Utf8),
    /// Characters at the ends of each string.
    StripEach(&'a Strip),
    /// Characters at the ends of the whole text.
    StripText { content: char, start: usize, stop: usize, held: usize },
    /// Steps that look at the whole: a text, or strings if not `fused`.
    Whole { decoders: Vec<&'a DecoderWrapper>, fused: bool, held: Vec<String> },
}

/// The steps of a decoder.
fn steps(decoder: Option<&DecoderWrapper>) -> Vec<Step<'_>> {
    let Some(decoder) = decoder else { return vec![Step::Words { first: true }] };
    let mut decoders = Vec::new();
    flatten(decoder, &mut decoders);
    // Whether what follows sees one string, the whole text, of which fragments arrive.
    let mut fused = false;
    let mut steps = Vec::new();
    for (i, &decoder) in decoders.iter().enumerate() {
        match decoder {
            DecoderWrapper::Fuse(_) => fused = true,
            DecoderWrapper::ByteLevel(_) if !fused => {
                steps.push(Step::ByteLevel(Utf8::new(Replace::Sequence)));
                fused = true;
            }
            DecoderWrapper::ByteFallback(_) if !fused => steps.push(Step::ByteFallback(Utf8::new(Replace::Byte))),
            &DecoderWrapper::Strip(Strip { content, start, stop, .. }) if fused => {
                steps.push(Step::StripText { content, start, stop, held: 0 });
            }
            DecoderWrapper::Strip(strip) => steps.push(Step::StripEach(strip)),
            DecoderWrapper::BPE(decoder) if !fused => steps.push(Step::Last { decoder, held: None }),
            DecoderWrapper::Replace(_) | DecoderWrapper::Metaspace(_) | DecoderWrapper::WordPiece(_) if !fused => {
                steps.push(Step::Each { decoder, first: true });
            }
            _ => {
                steps.push(Step::Whole { decoders: decoders[i..].to_vec(), fused, held: Vec::new() });
                break;
            }
        }
    }
    steps
}

fn flatten<'a>(decoder: &'a DecoderWrapper, into: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => sequence.get_decoders().iter().for_each(|d| flatten(d, into)),
        decoder => into.push(decoder),
    }
}

/// Hands a string to the first step, what comes of it to the second, and so on.
fn run(steps: &mut [Step], token: String, text: &mut String) {
    match steps.split_first_mut() {
        None => text.push_str(&token),
        Some((step, next)) => step.push(token, &mut |token| run(next, token, text)),
    }
}

impl Step<'_> {
    fn push(&mut self, token: String, emit: &mut dyn FnMut(String)) {
        match self {
            Self::Words { first } => emit(if std::mem::take(first) { token } else { format!(" {token}") }),
            Self::Each { decoder, first } => {
                let neighbour = (!std::mem::take(first)).then(String::new);
                let strings = neighbour.into_iter().chain([token.clone()]).collect();
                emit(apply(|| decoder.decode_chain(strings)).and_then(|mut s| s.pop()).unwrap_or(token));
            }
            Self::Last { decoder, held } => {
                if let Some(token) = held.replace(token) {
                    let strings = vec![token.clone(), String::new()];
                    emit(apply(|| decoder.decode_chain(strings)).map_or(token, |s| s.concat()));
                }
            }
            Self::ByteFallback(utf8) => match fallback_byte(&token) {
                Some(byte) => emit(utf8.push(&[byte])),
                None => {
                    emit(utf8.finish());
                    emit(token);
                }
            },
            Self::ByteLevel(utf8) => {
                let bytes: Option<Vec<u8>> = token.chars().map(|c| BYTES.get(&c).copied()).collect();
                emit(utf8.push(&bytes.unwrap_or(token.into_bytes())));
            }
            Self::StripEach(strip) => emit(stripped(strip, &token)),
            Self::StripText { content, start, stop, held } => {
                let kept = token.trim_start_matches(|c| {
                    let strip = *start > 0 && c == *content;
                    *start = if strip { *start - 1 } else { 0 };
                    strip
                });
                // What is held back is so many times the character.
                let text: String = std::iter::repeat_n(*content, *held).chain(kept.chars()).collect();
                *held = text.chars().rev().take(*stop).take_while(|c| c == content).count();
                emit(text[..text.len() - *held * content.len_utf8()].to_owned());
            }
            Self::Whole { held, .. } => held.push(token),
        }
    }

    fn finish(&mut self, emit: &mut dyn FnMut(String)) {
        match self {
            Self::Last { decoder, held } => {
                if let Some(token) = held.take() {
                    emit(apply(|| decoder.decode_chain(vec![token.clone()])).map_or(token, |s| s.concat()));
                }
            }
            Self::ByteFallback(utf8) | Self::ByteLevel(utf8) => emit(utf8.finish()),
            Self::Whole { decoders, fused, held } if !held.is_empty() => {
                let strings = if *fused { vec![held.concat()] } else { std::mem::take(held) };
                let decoded = decoders.iter().try_fold(strings.clone(), |s, d| apply(|| d.decode_chain(s)));
                emit(decoded.unwrap_or(strings).concat());
            }
            // The character held back at the end of the text is what is stripped there.
            Self::Words { .. }
            | Self::Each { .. }
            | Self::StripEach(_)
            | Self::StripText { .. }
            | Self::Whole { .. } => {}
        }
    }
}

/// What a step of the crate gives; none if it fails, so that a stream goes on with what it had.
fn apply<T>(decode: impl FnOnce() -> tokenizers::Result<T>) -> Option<T> {
    contain(decode).ok()?.ok()
}

/// The byte that `<0xNN>` stands for.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}

/// A string without up to so many of a character at its ends.
fn stripped(strip: &Strip, token: &str) -> String {
    let count = |n, chars: &mut dyn Iterator<Item = char>| chars.take(n).take_while(|&c| c == strip.content).count();
    let kept = &token[count(strip.start, &mut token.chars()) * strip.content.len_utf8()..];
    kept[..kept.len() - count(strip.stop, &mut kept.chars().rev()) * strip.content.len_utf8()].to_owned()
}

/// The bytes that characters stand for in a byte-level vocabulary: printable ones themselves, the others those from U+0100.
static BYTES: LazyLock<HashMap<char, u8>> = LazyLock::new(|| {
    let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let (printed, others): (Vec<u8>, Vec<u8>) = (0..=255).partition(printable);
    let others = ('\u{100}'..).zip(others);
    printed.into_iter().map(|b| (char::from(b), b)).chain(others).collect()
});
