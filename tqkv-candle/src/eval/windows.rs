//! Texts in pieces of equal length.

use crate::error::{Error, Result};
use crate::tokenizer::Encoded;

/// A text cut into windows of equal length, one after the other from its beginning.
#[derive(Debug, Clone, PartialEq)]
pub struct Windows {
    length: usize,
    /// Each begins with the start token, where the model has one.
    pub(super) windows: Vec<Vec<u32>>,
    /// Bytes of text that the predicted tokens of all windows stand for.
    pub(super) bytes: Vec<usize>,
}

impl Windows {
    /// The first `count` windows of `length` tokens. Their first tokens are replaced by `start`.
    pub fn new(text: &Encoded, count: usize, length: usize, start: Option<u32>) -> Result<Self> {
        if count == 0 {
            return Err(Error::NoWindows);
        }
        if length < 2 {
            return Err(Error::WindowLength { got: length });
        }
        let expected = count.saturating_mul(length);
        if text.tokens.len() < expected {
            return Err(Error::TextTooShort { got: text.tokens.len(), expected, windows: count, length });
        }
        let mut windows: Vec<Vec<u32>> = text.tokens.chunks_exact(length).take(count).map(Vec::from).collect();
        if let Some(start) = start {
            for window in &mut windows {
                window[0] = start;
            }
        }
        let bytes = text.spans.chunks_exact(length).take(count);
        let bytes = bytes.map(|spans| spans[length - 1].end.saturating_sub(spans[0].end)).collect();
        Ok(Self { length, windows, bytes })
    }

    /// How many windows there are.
    pub fn len(&self) -> usize {
        self.windows.len()
    }

    /// Always false: there is at least one.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty()
    }

    /// The tokens of each.
    pub fn iter(&self) -> impl Iterator<Item = &[u32]> {
        self.windows.iter().map(Vec::as_slice)
    }

    /// Tokens of a window.
    pub fn length(&self) -> usize {
        self.length
    }

    /// Tokens of a window that run through the model: the last is only predicted.
    pub fn run_length(&self) -> usize {
        self.length - 1
    }

    /// Whether a model's context is long enough.
    ///
    /// # Errors
    /// [`Error::ContextOverflow`].
    pub fn expect_context(&self, limit: usize) -> Result<()> {
        let got = self.run_length();
        if got > limit { Err(Error::ContextOverflow { got, limit }) } else { Ok(()) }
    }
}
