//! A model's predictions of next tokens, as probabilities.

use crate::error::{Error, Result};
use crate::models::Model;
use candle_core::Tensor;
use rayon::prelude::*;

/// Logits that are held at a time: 64 MiB of them.
const LOGITS: usize = 1 << 24;

/// How many tokens' logits to compute at a time.
pub fn rows_at_once(model: &Model) -> usize {
    (LOGITS / model.config().vocab_size).max(1)
}

/// The logits of several tokens, and what it takes to make probabilities of them.
pub struct Prediction {
    logits: Vec<Vec<f32>>,
    rows: Vec<(f64, usize)>,
}

/// The logits of one token.
pub struct Row<'a> {
    logits: &'a [f32],
    log_sum: f64,
    /// The likeliest next token.
    pub top: usize,
}

impl Prediction {
    /// After hidden states, `[tokens, hidden_size]`, the first of which is at `position`.
    pub fn new(model: &Model, hidden: &Tensor, position: usize) -> Result<Self> {
        let logits: Vec<Vec<f32>> = model.logits(hidden)?.to_vec2()?;
        let rows = logits.par_iter().enumerate().map(|(i, row)| {
            let top = (0..row.len()).rev().max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap_or(0);
            let maximum = f64::from(row[top]);
            let sum: f64 = row.iter().map(|&l| (f64::from(l) - maximum).exp()).sum();
            if sum.is_finite() {
                Ok((maximum + sum.ln(), top))
            } else {
                Err(Error::NonFiniteLogits { position: position + i })
            }
        });
        Ok(Self { rows: rows.collect::<Result<_>>()?, logits })
    }

    pub fn row(&self, i: usize) -> Row<'_> {
        Row { logits: &self.logits[i], log_sum: self.rows[i].0, top: self.rows[i].1 }
    }
}

impl Row<'_> {
    pub fn log_probability(&self, token: usize) -> f64 {
        f64::from(self.logits[token]) - self.log_sum
    }

    /// Of `other` from this one.
    pub fn divergence(&self, other: &Self) -> f64 {
        (0..self.logits.len())
            .map(|t| {
                let (p, q) = (self.log_probability(t), other.log_probability(t));
                // A probability of 0 contributes 0, also where the other is 0 too.
                if p == f64::NEG_INFINITY { 0.0 } else { p.exp() * (p - q) }
            })
            .sum()
    }
}
