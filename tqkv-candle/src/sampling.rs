//! Which token comes next.

use crate::draft::Proposal;
use crate::error::{Error, Result};
use crate::generate::GenerateOptions;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand::{Rng, SeedableRng};
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
        Some(self.propose(logits)?.token)
    }

    /// A token with what it is drawn from, or none if the logits have no finite maximum.
    pub(crate) fn propose(&mut self, logits: &[f32]) -> Option<Proposal> {
        let distribution = self.distribution(logits)?;
        let token = match distribution[..] {
            [(token, _)] => token,
            _ => {
                let weights = WeightedIndex::new(distribution.iter().map(|t| t.1)).ok()?;
                distribution[weights.sample(&mut self.rng)].0
            }
        };
        Some(Proposal { token, distribution })
    }

    /// A sampler of the same kind that draws otherwise, for proposals.
    pub(crate) fn for_drafts(&self) -> Self {
        let mut other = self.clone();
        other.rng.set_stream(1);
        other
    }

    /// Takes over which tokens another one has seen.
    pub(crate) fn see_what(&mut self, other: &Self) {
        self.seen.clone_from(&other.seen);
    }

    /// The token that comes after all, and whether it is the proposal: the token is distributed as [`Sampler::sample`]'s if the
    /// proposal was drawn from its distribution (arXiv:2211.17192). None if the logits have no finite maximum.
    pub(crate) fn judge(&mut self, logits: &[f32], proposal: &Proposal) -> Option<(u32, bool)> {
        let own = self.distribution(logits)?;
        let probability =
            |of: &[(u32, f64)], token: u32| of.binary_search_by_key(&token, |t| t.0).map_or(0.0, |i| of[i].1);
        let (p, q) = (probability(&own, proposal.token), probability(&proposal.distribution, proposal.token));
        if self.rng.random::<f64>() * q < p {
            return Some((proposal.token, true));
        }
        // What the proposals have too little of.
        let missing = own.iter().map(|&(token, p)| (p - probability(&proposal.distribution, token)).max(0.0));
        let missing: Vec<f64> = missing.collect();
        // Nothing is missing up to rounding: the distributions are the same.
        let weights = WeightedIndex::new(missing).or_else(|_| WeightedIndex::new(own.iter().map(|t| t.1))).ok()?;
        Some((own[weights.sample(&mut self.rng)].0, false))
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens that come of proposals from another distribution are distributed as without them.
    #[test]
    fn judged_proposals_keep_the_distribution() {
        let options = GenerateOptions { temperature: 1.0, top_k: 4, seed: 11, ..GenerateOptions::default() };
        let mut sampler = Sampler::new(&options).unwrap();
        let mut drafts = sampler.for_drafts();
        // Tokens that only one of them draws, and some that both draw.
        let own = [0.1f32, 0.4, 1e-9, 0.3, 0.2].map(f32::ln);
        let others = [0.5f32, 0.1, 0.2, 1e-9, 0.2].map(f32::ln);
        let (n, mut counts, mut held) = (40_000, [0; 5], 0);
        for _ in 0..n {
            let proposal = drafts.propose(&others).unwrap();
            let (token, holds) = sampler.judge(&own, &proposal).unwrap();
            assert!(!holds || token == proposal.token);
            counts[token as usize] += 1;
            held += usize::from(holds);
        }
        // Four standard deviations of the largest share.
        let near = |count: usize, share: f64| (count as f64 / n as f64 - share).abs() < 4.0 * (0.25 / n as f64).sqrt();
        assert!(counts.iter().zip([0.1, 0.4, 0.0, 0.3, 0.2]).all(|(&count, share)| near(count, share)), "{counts:?}");
        // The sum of the smaller probability of each token.
        assert!(near(held, 0.4), "{held}");
    }

    #[test]
    fn greedy_judgement_is_equality() {
        let mut sampler = Sampler::new(&GenerateOptions::default()).unwrap();
        for (token, expected) in [(1, (1, true)), (0, (1, false))] {
            let proposal = Proposal { token, distribution: vec![(token, 1.0)] };
            assert_eq!(sampler.judge(&[0.0, 2.0, 1.0], &proposal), Some(expected));
            assert_eq!(sampler.judge(&[0.0, f32::NAN], &proposal), None);
        }
    }
}
