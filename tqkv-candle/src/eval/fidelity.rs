//! Predictions with compressed caches beside those with a reference.

use super::bootstrap::interval;
use super::prediction::{Prediction, rows_at_once};
use super::windows::Windows;
use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::room;
use candle_core::IndexOp;
use rayon::prelude::*;

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
    divergence_median: f64,
    divergence_p99: f64,
    divergence_interval: [f64; 2],
    same_top1: usize,
    same_top1_interval: [f64; 2],
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

    /// Between which values this mean lies with a probability of 95 % (bootstrap over blocks of 64 tokens).
    pub fn kld_interval(&self) -> [f64; 2] {
        self.divergence_interval
    }

    /// Median of the same.
    pub fn kld_median(&self) -> f64 {
        self.divergence_median
    }

    /// What 99 in 100 of the same do not exceed.
    pub fn kld_p99(&self) -> f64 {
        self.divergence_p99
    }

    /// Share of the tokens where the likeliest one is the reference's.
    pub fn same_top1(&self) -> f64 {
        self.same_top1 as f64 / self.tokens as f64
    }

    /// Between which values this share lies with a probability of 95 %.
    pub fn same_top1_interval(&self) -> [f64; 2] {
        self.same_top1_interval
    }
}

/// The same while it is summed up.
#[derive(Default)]
struct Sums {
    fidelity: Fidelity,
    divergences: Vec<f64>,
    /// 1 where the likeliest token is the reference's, and 0.
    same: Vec<f64>,
}

impl Sums {
    /// Adds predictions of the tokens `next`.
    fn add(&mut self, next: &[u32], predicted: &Prediction, reference: &Prediction) {
        let row = |(row, &token): (usize, &u32)| {
            let (q, p) = (predicted.row(row), reference.row(row));
            let token = token as usize;
            (q.log_probability(token), p.log_probability(token), p.divergence(&q), q.top == p.top)
        };
        let rows: Vec<_> = next.par_iter().enumerate().map(row).collect();
        for (predicted, expected, divergence, same) in rows {
            self.fidelity.tokens += 1;
            self.fidelity.nats -= predicted;
            self.fidelity.reference_nats -= expected;
            self.fidelity.divergence += divergence;
            self.fidelity.same_top1 += usize::from(same);
            self.divergences.push(divergence);
            self.same.push(f64::from(u8::from(same)));
        }
    }

    fn finish(mut self) -> Fidelity {
        let (divergence_interval, same_top1_interval) = (interval(&self.divergences), interval(&self.same));
        self.divergences.sort_by(f64::total_cmp);
        let at_most = |percent: usize| {
            let rank = (self.divergences.len() * percent).div_ceil(100);
            self.divergences.get(rank.saturating_sub(1)).copied().unwrap_or_default()
        };
        Fidelity {
            divergence_median: at_most(50),
            divergence_p99: at_most(99),
            divergence_interval,
            same_top1_interval,
            ..self.fidelity
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
    // The reference first, as it is the first in the results.
    let mut caches: Vec<&mut SequenceCache> = std::iter::once(reference).chain(caches).collect();
    for cache in &caches {
        room::expect(cache, 0, windows.run_length(), chunk)?;
    }
    let mut sums: Vec<Sums> = caches.iter().map(|_| Sums::default()).collect();
    for (done, (window, bytes)) in windows.windows.iter().zip(&windows.bytes).enumerate() {
        for (cache, sums) in caches.iter_mut().zip(&mut sums) {
            cache.truncate(0)?;
            sums.fidelity.bytes += bytes;
        }
        // The last token is only predicted. Chunk by chunk for all caches, so that few hidden states are held.
        let (inputs, next) = (&window[..window.len() - 1], &window[1..]);
        for (i, (inputs, next)) in inputs.chunks(chunk).zip(next.chunks(chunk)).enumerate() {
            compare(model, &mut caches, &mut sums, i * chunk, inputs, next)?;
        }
        on_window(done + 1);
    }
    let mut results = sums.into_iter().map(Sums::finish);
    let baseline = results.next().unwrap_or_default();
    Ok((baseline, results.collect()))
}

/// Runs a chunk with every cache, and adds its predictions. Logits are computed for few tokens at a time: with a large
/// vocabulary they are most of what is held.
fn compare(
    model: &Model,
    caches: &mut [&mut SequenceCache],
    sums: &mut [Sums],
    start: usize,
    inputs: &[u32],
    next: &[u32],
) -> Result<()> {
    let hidden = caches.iter_mut().map(|cache| model.forward(inputs, cache)).collect::<Result<Vec<_>>>()?;
    let rows = rows_at_once(model);
    for (i, next) in next.chunks(rows).enumerate() {
        let range = i * rows..i * rows + next.len();
        let predict =
            |hidden: &candle_core::Tensor| Prediction::new(model, &hidden.i(range.clone())?, start + range.start);
        let mut expected = None;
        for (hidden, sums) in hidden.iter().zip(sums.iter_mut()) {
            let predicted = predict(hidden)?;
            sums.add(next, &predicted, expected.as_ref().unwrap_or(&predicted));
            expected.get_or_insert(predicted);
        }
    }
    Ok(())
}
