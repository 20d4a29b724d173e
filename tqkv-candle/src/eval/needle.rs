//! Facts told in a long text, and asked for at its end.

use super::prediction::{Prediction, rows_at_once};
use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::room;
use crate::tokenizer::Vocabulary;
use candle_core::IndexOp;
use std::ops::Range;

/// What a number is told of. They have few words in common, so that small models do not take one for another.
const FACTS: [&str; 9] = [
    "combination of the blue safe",
    "telephone number of the bakery",
    "price of the golden violin",
    "altitude of the observatory",
    "serial number of the locomotive",
    "length of the longest poem",
    "distance to the lighthouse",
    "weight of the whale",
    "population of the island",
];

/// A long text in which numbers are told at several depths, each of something else, and asked for at the end.
#[derive(Debug, Clone, PartialEq)]
pub struct Haystack {
    /// Text, questions and answers.
    tokens: Vec<u32>,
    /// Where the questions begin.
    questions: usize,
    needles: Vec<Needle>,
}

/// A number in a [`Haystack`].
#[derive(Debug, Clone, PartialEq)]
struct Needle {
    depth: f64,
    /// Where its answer stands.
    answer: Range<usize>,
}

/// How well a number was found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Where it was told: 0 is the beginning of the text before the questions, 1 its end.
    pub depth: f64,
    /// Whether every token of the answer is the likeliest.
    pub found: bool,
    /// What the answer costs the model, in nats.
    pub nats: f64,
}

impl Haystack {
    /// Most numbers in one text.
    pub const MOST: usize = FACTS.len();

    /// Hides `needles` numbers at even distances in the beginning of `text`, so that there are `length` tokens in all, with the
    /// questions. They begin with `start`. Each `round` has other numbers, and tells them of other things at each depth.
    ///
    /// # Errors
    /// [`Error::Needles`]; [`Error::TextTooShort`]; [`Error::WindowLength`] if there is no room for anything else; those of the
    /// vocabulary.
    pub fn new(
        vocabulary: &Vocabulary,
        text: &[u32],
        length: usize,
        needles: usize,
        round: usize,
        start: Option<u32>,
    ) -> Result<Self> {
        if !(1..=Self::MOST).contains(&needles) {
            return Err(Error::Needles { got: needles, most: Self::MOST });
        }
        let encode = |text: String| vocabulary.encode_continuation(&text);
        let (mut told, mut asked) = (vec![], vec![]);
        for i in 0..needles {
            let (fact, number) = (FACTS[(i + round % FACTS.len()) % FACTS.len()], number(i, round));
            told.push(encode(format!("\nThe {fact} is {number}.\n"))?);
            asked.push([encode(format!("\nWhat is the {fact}? The {fact} is"))?, encode(format!(" {number}"))?]);
        }
        let others = start.iter().len() + told.iter().chain(asked.iter().flatten()).map(Vec::len).sum::<usize>();
        let hay = length.checked_sub(others).filter(|&hay| hay > 0).ok_or(Error::WindowLength { got: length })?;
        if text.len() < hay {
            return Err(Error::TextTooShort { got: text.len(), expected: hay, windows: 1, length: hay });
        }
        let depth = |i: usize| (i + 1) as f64 / (needles + 1) as f64;
        let (mut tokens, mut before) = (Vec::from_iter(start), 0);
        for (i, told) in told.iter().enumerate() {
            let here = (hay as f64 * depth(i)).round() as usize;
            tokens.extend(&text[before..here]);
            tokens.extend(told);
            before = here;
        }
        tokens.extend(&text[before..hay]);
        let (questions, mut needles) = (tokens.len(), vec![]);
        for (i, [question, answer]) in asked.iter().enumerate() {
            tokens.extend(question);
            needles.push(Needle { depth: depth(i), answer: tokens.len()..tokens.len() + answer.len() });
            tokens.extend(answer);
        }
        Ok(Self { tokens, questions, needles })
    }

    /// The tokens: text, questions and answers.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }
}

/// A number of five digits, another one for each needle of a few thousand rounds.
fn number(needle: usize, round: usize) -> usize {
    10_000 + (round % 5000 * FACTS.len() + needle + 1) * 47_293 % 90_000
}

/// Runs the text and the questions, each after the right answers of those before it, and looks at what the model predicts in
/// place of the answers. The cache is emptied before.
///
/// # Errors
/// As [`evaluate`](super::evaluate).
pub fn find_needles(model: &Model, cache: &mut SequenceCache, haystack: &Haystack, chunk: usize) -> Result<Vec<Found>> {
    if chunk == 0 {
        return Err(Error::ChunkSize);
    }
    // The last token is only predicted.
    let (run, limit) = (haystack.tokens.len() - 1, model.config().max_position_embeddings);
    if run > limit {
        return Err(Error::ContextOverflow { got: run, limit });
    }
    room::expect(cache, 0, run, chunk)?;
    cache.truncate(0)?;
    let (text, questions) = haystack.tokens[..run].split_at(haystack.questions);
    for chunk in text.chunks(chunk) {
        model.forward(chunk, cache)?;
    }
    let found = |needle: &Needle| Found { depth: needle.depth, found: true, nats: 0.0 };
    let mut all: Vec<Found> = haystack.needles.iter().map(found).collect();
    let mut position = text.len();
    for chunk in questions.chunks(chunk.min(rows_at_once(model))) {
        let hidden = model.forward(chunk, cache)?;
        let predicted = Prediction::new(model, &hidden.i(..)?, position)?;
        for (found, needle) in all.iter_mut().zip(&haystack.needles) {
            // What follows a token of this chunk.
            let here = position + 1..position + 1 + chunk.len();
            for at in needle.answer.clone().filter(|at| here.contains(at)) {
                let (row, next) = (predicted.row(at - 1 - position), haystack.tokens[at] as usize);
                found.found &= row.top == next;
                found.nats -= row.log_probability(next);
            }
        }
        position += chunk.len();
    }
    Ok(all)
}
