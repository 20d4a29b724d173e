//! What a compressed cache does to a model's predictions.

use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::room;
use crate::tokenizer::Encoded;
use candle_core::{IndexOp, Tensor};

/// A text cut into windows of equal length, one after the other from its beginning.
#[derive(Debug, Clone, PartialEq)]
pub struct Windows {
    length: usize,
    /// Each begins with the start token, where the model has one.
    windows: Vec<Vec<u32>>,
    /// Bytes of text that the predicted tokens of all windows stand for.
    bytes: Vec<usize>,
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

/// Sums over the predictions made with one cache, beside those with the reference cache.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Fidelity {
    /// Tokens predicted.
    pub tokens: usize,
    /// Bytes of text that they stand for.
    pub bytes: usize,
    nats: f64,
    reference_nats: f64,
    divergence: f64,
    same_top1: usize,
}

impl Fidelity {
    /// Bits that the model spends on a byte of the text.
    pub fn bits_per_byte(&self) -> f64 {
        self.nats / std::f64::consts::LN_2 / self.bytes as f64
    }

    /// Perplexity of a token.
    pub fn perplexity(&self) -> f64 {
        (self.nats / self.tokens as f64).exp()
    }

    /// Change in bits a byte against the reference, in percent.
    pub fn delta_percent(&self) -> f64 {
        (self.nats / self.reference_nats - 1.0) * 100.0
    }

    /// Mean Kullback-Leibler divergence of a token's prediction from the reference's, in nats.
    pub fn kld(&self) -> f64 {
        self.divergence / self.tokens as f64
    }

    /// Share of the tokens where the likeliest one is the reference's.
    pub fn same_top1(&self) -> f64 {
        self.same_top1 as f64 / self.tokens as f64
    }

    /// Adds predictions of the tokens `next`; `predicted` and `reference` are logits.
    fn add(&mut self, next: &[u32], predicted: &Prediction, reference: &Prediction) {
        for (row, &token) in next.iter().enumerate() {
            let (q, p) = (predicted.row(row), reference.row(row));
            self.tokens += 1;
            self.nats -= q.log_probability(token as usize);
            self.reference_nats -= p.log_probability(token as usize);
            self.divergence += p.divergence(&q);
            self.same_top1 += usize::from(q.top == p.top);
        }
    }
}

/// Runs every window through the model, with the reference cache and with each of `caches`, and
/// compares their predictions. Returns the reference compared with itself, and each of the others.
/// The caches are emptied for each window. `on_window` is called after each with the number done.
///
/// # Errors
/// [`Error::ChunkSize`]; [`Error::ContextOverflow`] and [`tqkv::Error::OutOfPages`] for windows that the model's context or
/// one of the caches has no room for: all of these before anything is changed. [`Error::NonFiniteLogits`]; those of the caches
/// and of candle.
pub fn evaluate(
    model: &Model,
    reference: &mut SequenceCache,
    caches: &mut [SequenceCache],
    windows: &Windows,
    chunk: usize,
    mut on_window: impl FnMut(usize),
) -> Result<(Fidelity, Vec<Fidelity>)> {
    if chunk == 0 {
        return Err(Error::ChunkSize);
    }
    windows.expect_context(model.config().max_position_embeddings)?;
    for cache in caches.iter().chain([&*reference]) {
        room::expect(cache, 0, windows.run_length(), chunk)?;
    }
    let mut baseline = Fidelity::default();
    let mut results = vec![Fidelity::default(); caches.len()];
    for (done, (window, bytes)) in windows.windows.iter().zip(&windows.bytes).enumerate() {
        reference.truncate(0)?;
        baseline.bytes += bytes;
        for (cache, fidelity) in caches.iter_mut().zip(&mut results) {
            cache.truncate(0)?;
            fidelity.bytes += bytes;
        }
        // The last token is only predicted. Chunk by chunk for all caches, so that the logits of
        // no more than a chunk are held.
        let (inputs, next) = (&window[..window.len() - 1], &window[1..]);
        for (inputs, next) in inputs.chunks(chunk).zip(next.chunks(chunk)) {
            let expected = Prediction::run(model, inputs, reference)?;
            baseline.add(next, &expected, &expected);
            for (cache, fidelity) in caches.iter_mut().zip(&mut results) {
                fidelity.add(next, &Prediction::run(model, inputs, cache)?, &expected);
            }
        }
        on_window(done + 1);
    }
    Ok((baseline, results))
}

/// The logits of several tokens, and what it takes to make probabilities of them.
struct Prediction {
    logits: Vec<Vec<f32>>,
    rows: Vec<(f64, usize)>,
}

/// The logits of one token.
struct Row<'a> {
    logits: &'a [f32],
    log_sum: f64,
    top: usize,
}

impl Prediction {
    fn run(model: &Model, tokens: &[u32], cache: &mut SequenceCache) -> Result<Self> {
        let start = cache.tokens()?;
        Self::new(&model.logits(&model.forward(tokens, cache)?)?, start)
    }

    fn new(logits: &Tensor, start: usize) -> Result<Self> {
        let logits: Vec<Vec<f32>> = logits.i(..)?.to_vec2()?;
        let mut rows = Vec::with_capacity(logits.len());
        for (i, row) in logits.iter().enumerate() {
            let top = (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
            let maximum = f64::from(row[top]);
            let sum: f64 = row.iter().map(|&l| (f64::from(l) - maximum).exp()).sum();
            if !sum.is_finite() {
                return Err(Error::NonFiniteLogits { position: start + i });
            }
            rows.push((maximum + sum.ln(), top));
        }
        Ok(Self { logits, rows })
    }

    fn row(&self, i: usize) -> Row<'_> {
        Row { logits: &self.logits[i], log_sum: self.rows[i].0, top: self.rows[i].1 }
    }
}

impl Row<'_> {
    fn log_probability(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }

    /// Of `other` from this one.
    fn divergence(&self, other: &Self) -> f64 {
        (0..self.logits.len())
            .map(|t| {
                let (p, q) = (self.log_probability(t), other.log_probability(t));
                // A probability of 0 contributes 0, also where the other is 0 too.
                if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
            })
            .sum()
    }
}
