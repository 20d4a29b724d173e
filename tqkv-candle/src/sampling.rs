//! Which token comes next.

use crate::error::{Error, Result};
use crate::generate::GenerateOptions;
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_chacha::ChaCha8Rng;
use std::collections::HashSet;

/// Draws tokens from logits, as [`GenerateOptions`] say.
///
/// As in transformers, the repetition penalty changes the logits, the temperature divides them, and of the probabilities
/// that they give those of `top_k`, then of `top_p`, then of `min_p` are kept.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f32,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f32,
    /// Tokens that were there before.
    seen: HashSet<u32>,
    // ChaCha's stream is fixed by its definition, unlike that of `StdRng`.
    rng: ChaCha8Rng,
}

impl Sampler {
    /// # Errors
    /// [`Error::Temperature`] and [`Error::Sampling`].
    pub fn new(options: &GenerateOptions) -> Result<Self> {
        let GenerateOptions { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = *options;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::Temperature { got: temperature });
        }
        let refused = |option, got, expected| Err(Error::Sampling { option, got, expected });
        if !(top_p > 0.0 && top_p <= 1.0) {
            return refused("top_p", top_p, "above 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&min_p) {
            return refused("min_p", min_p, "from 0 to 1");
        }
        if !(repetition_penalty.is_finite() && repetition_penalty > 0.0) {
            return refused("repetition_penalty", repetition_penalty, "a finite number above 0");
        }
        Ok(Self {
            temperature,
            top_k,
            top_p: top_p.into(),
            min_p: min_p.into(),
            repetition_penalty,
            seen: HashSet::new(),
            rng: ChaCha8Rng::seed_from_u64(seed),
        })
    }

    /// Counts tokens as there already, for the repetition penalty.
    pub fn see(&mut self, tokens: &[u32]) {
        // Nobody asks otherwise.
        if self.repetition_penalty != 1.0 {
            self.seen.extend(tokens);
        }
    }

    /// A token, or none if the logits have no finite maximum.
    pub fn sample(&mut self, logits: &[f32]) -> Option<u32> {
        let (tokens, weights): (Vec<u32>, Vec<f64>) = self.distribution(logits)?.into_iter().unzip();
        match tokens[..] {
            [token] => Some(token),
            _ => Some(tokens[WeightedIndex::new(weights).ok()?.sample(&mut self.rng)]),
        }
    }

    /// The tokens that can be drawn, in order, with their probabilities. None if the logits have no finite maximum.
    pub fn distribution(&self, logits: &[f32]) -> Option<Vec<(u32, f64)>> {
        if logits.iter().any(|l| l.is_nan()) {
            return None;
        }
        let penalized = |token: u32, logit: f32| match self.seen.contains(&token) {
            true if logit < 0.0 => logit * self.repetition_penalty,
            true => logit / self.repetition_penalty,
            false => logit,
        };
        let logits = || (0..).zip(logits).map(|(token, &logit)| (token, penalized(token, logit)));
        // The first of equal maxima, so that greedy decoding does not depend on the iteration.
        let (best, maximum) = logits().reduce(|a, b| if b.1 > a.1 { b } else { a })?;
        if !maximum.is_finite() {
            return None;
        }
        if self.temperature == 0.0 {
            return Some(vec![(best, 1.0)]);
        }
        let weight = |logit: f32| f64::from((logit - maximum) / self.temperature).exp();
        let mut tokens: Vec<(u32, f64)> = logits().map(|(token, logit)| (token, weight(logit))).collect();
        self.keep_top_k(&mut tokens);
        self.keep_top_p(&mut tokens);
        // The best token's weight is 1.
        tokens.retain(|t| t.1 >= self.min_p);
        tokens.sort_unstable_by_key(|t| t.0);
        let sum: f64 = tokens.iter().map(|t| t.1).sum();
        tokens.iter_mut().for_each(|t| t.1 /= sum);
        Some(tokens)
    }

    /// The likeliest `top_k`.
    fn keep_top_k(&self, tokens: &mut Vec<(u32, f64)>) {
        if (1..tokens.len()).contains(&self.top_k) {
            tokens.select_nth_unstable_by(self.top_k - 1, likelier);
            tokens.truncate(self.top_k);
        }
    }

    /// The likeliest that together have the probability `top_p`.
    fn keep_top_p(&self, tokens: &mut Vec<(u32, f64)>) {
        if self.top_p < 1.0 {
            let sum: f64 = tokens.iter().map(|t| t.1).sum();
            // All that are less likely together are less than what is cut off: they need not be sorted.
            let least = sum * (1.0 - self.top_p) / tokens.len() as f64;
            tokens.retain(|t| t.1 >= least);
            tokens.sort_unstable_by(likelier);
            let mut before = 0.0;
            let kept = tokens.iter().take_while(|t| {
                let missing = before < self.top_p * sum;
                before += t.1;
                missing
            });
            let kept = kept.count();
            tokens.truncate(kept);
        }
    }
}

/// Of equals the first.
fn likelier(a: &(u32, f64), b: &(u32, f64)) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}
