//! Something told early in a long text, and asked for at its end.

use super::prediction::Prediction;
use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::room;
use crate::tokenizer::Vocabulary;
use candle_core::IndexOp;

/// A text in which a number is told and asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Needle {
    /// Where it is told: 0 is at the text's beginning, 1 at its end.
    pub depth: f64,
    /// The text, the question and the answer.
    tokens: Vec<u32>,
    /// How many tokens the answer has.
    answer: usize,
}

/// How well a needle was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Whether every token of the answer is the likeliest.
    pub found: bool,
    /// What the answer costs the model, in nats.
    pub nats: f64,
}

impl Needle {
    /// Hides `number` in the beginning of `text`, so that there are `length` tokens in all. They begin with `start`.
    ///
    /// # Errors
    /// [`Error::TextTooShort`]; [`Error::WindowLength`] if there is no room for anything else; those of the vocabulary.
    pub fn hide(
        vocabulary: &Vocabulary,
        text: &[u32],
        length: usize,
        depth: f64,
        number: u32,
        start: Option<u32>,
    ) -> Result<Self> {
        let told = format!("\nThe secret number is {number}. Remember it: the secret number is {number}.\n");
        let told = vocabulary.encode_continuation(&told)?;
        let asked = vocabulary.encode_continuation("\nWhat is the secret number? The secret number is")?;
        let answer = vocabulary.encode_continuation(&format!(" {number}"))?;
        let others = told.len() + asked.len() + answer.len() + start.iter().len();
        let hay = length.checked_sub(others).filter(|&hay| hay > 0).ok_or(Error::WindowLength { got: length })?;
        if text.len() < hay {
            return Err(Error::TextTooShort { got: text.len(), expected: hay, windows: 1, length: hay });
        }
        let (before, after) = text[..hay].split_at((hay as f64 * depth.clamp(0.0, 1.0)).round() as usize);
        let tokens = start.iter().chain(before).chain(&told).chain(after).chain(&asked).chain(&answer);
        Ok(Self { depth, tokens: tokens.copied().collect(), answer: answer.len() })
    }

    /// The tokens: text, question and answer.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// Runs the text and the question, and looks at what the model then predicts. The cache is emptied before.
///
/// # Errors
/// As [`evaluate`](super::evaluate).
pub fn find_needle(model: &Model, cache: &mut SequenceCache, needle: &Needle, chunk: usize) -> Result<Found> {
    if chunk == 0 {
        return Err(Error::ChunkSize);
    }
    // The last token is only predicted.
    let (run, limit) = (needle.tokens.len() - 1, model.config().max_position_embeddings);
    if run > limit {
        return Err(Error::ContextOverflow { got: run, limit });
    }
    room::expect(cache, 0, run, chunk)?;
    cache.truncate(0)?;
    // The question's last token predicts the answer's first.
    let (before, rest) = needle.tokens[..run].split_at(run - needle.answer);
    for chunk in before.chunks(chunk) {
        model.forward(chunk, cache)?;
    }
    let mut found = Found { found: true, nats: 0.0 };
    for (i, (&token, &next)) in rest.iter().zip(&needle.tokens[before.len() + 1..]).enumerate() {
        let hidden = model.forward(&[token], cache)?;
        let predicted = Prediction::new(model, &hidden.i(..)?, before.len() + i)?;
        let row = predicted.row(0);
        found.found &= row.top == next as usize;
        found.nats -= row.log_probability(next as usize);
    }
    Ok(found)
}
