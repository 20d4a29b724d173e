//! Text generation, token by token.

use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::model::Llama;
use crate::room;
use candle_core::IndexOp;
use rand::SeedableRng;
use rand::distr::Distribution;
use rand::distr::weighted::WeightedIndex;
use rand_chacha::ChaCha8Rng;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// At most so many tokens.
    pub max_tokens: usize,
    /// 0 takes the likeliest token always; above, tokens are drawn, the more freely the higher.
    pub temperature: f32,
    /// The same seed draws the same tokens, on every machine where the logits are the same.
    pub seed: u64,
    /// Tokens of the prompt that run through the model at a time.
    pub chunk: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_tokens: 256, temperature: 0.0, seed: 0, chunk: 512 }
    }
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// As many tokens as asked for.
    MaxTokens,
    /// The model said that the text is over.
    EndToken,
    /// The model's context or the cache is full.
    ContextFull,
    /// The caller's callback said so.
    Callback,
}

/// What a generation brought.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The new tokens, without the end token.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// What the prompt took.
    pub prompt_time: Duration,
    /// What the new tokens after the first took: each of them one run of the model.
    pub decode_time: Duration,
}

impl Generated {
    /// Tokens of the prompt a second.
    pub fn prompt_tokens_per_second(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// New tokens a second, the first left out: it comes with the prompt.
    pub fn decode_tokens_per_second(&self) -> f64 {
        rate(self.tokens.len().saturating_sub(1), self.decode_time)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// Runs the prompt, then one token after the other, and hands each new one to `on_token`.
///
/// `cache` may hold tokens already; the prompt follows them.
///
/// # Errors
/// [`Error::Temperature`], [`Error::NoTokens`], [`Error::ChunkSize`]; [`Error::ContextOverflow`] and
/// [`tqkv::Error::OutOfPages`] for a prompt that the model's context or the cache has no room for; [`Error::Token`] for one
/// with tokens that the model does not have; [`Error::NonFiniteLogits`]; those of the cache and of candle. After an error
/// with the prompt the cache holds what it held before.
pub fn generate(
    model: &Llama,
    cache: &mut SequenceCache,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut sampler = Sampler::new(options.temperature, options.seed)?;
    let context = model.config().max_position_embeddings;
    if prompt.is_empty() {
        return Err(Error::NoTokens);
    }
    if options.chunk == 0 {
        return Err(Error::ChunkSize);
    }
    // Before any work is done, and not after the chunks that fit.
    let held = cache.tokens()?;
    if prompt.len() > context.saturating_sub(held) {
        return Err(Error::ContextOverflow { got: held.saturating_add(prompt.len()), limit: context });
    }
    let vocab_size = model.config().vocab_size;
    if let Some(&got) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(Error::Token { got, vocab_size });
    }
    room::expect(cache, held, prompt.len(), options.chunk)?;
    let limit = context.min(room::positions(cache)?);

    let started = Instant::now();
    let mut logits = run_prompt(model, cache, prompt, options.chunk).or_else(|error| {
        cache.truncate(held)?;
        Err(error)
    })?;
    let prompt_time = started.elapsed();

    let started = Instant::now();
    let mut tokens = Vec::new();
    let stop = loop {
        if tokens.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        let position = held + prompt.len() + tokens.len() - 1;
        let token = sampler.sample(&logits).ok_or(Error::NonFiniteLogits { position })?;
        if model.config().eos_tokens.contains(&token) {
            break StopReason::EndToken;
        }
        tokens.push(token);
        if on_token(token).is_break() {
            break StopReason::Callback;
        }
        if tokens.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        if position + 1 == limit {
            break StopReason::ContextFull;
        }
        logits = model.logits(&model.forward(&[token], cache)?)?.flatten_all()?.to_vec1()?;
    };
    Ok(Generated { tokens, stop, prompt_tokens: prompt.len(), prompt_time, decode_time: started.elapsed() })
}

/// The logits after a prompt, which runs chunk by chunk.
fn run_prompt(model: &Llama, cache: &mut SequenceCache, prompt: &[u32], chunk: usize) -> Result<Vec<f32>> {
    let mut logits: Vec<f32> = Vec::new();
    for chunk in prompt.chunks(chunk) {
        let hidden = model.forward(chunk, cache)?;
        // Only the last token's are used, and with a large vocabulary all would be much work.
        logits = model.logits(&hidden.i(chunk.len() - 1..)?)?.flatten_all()?.to_vec1()?;
    }
    if logits.iter().any(|l| l.is_nan()) {
        return Err(Error::NonFiniteLogits { position: cache.tokens()?.saturating_sub(1) });
    }
    Ok(logits)
}

/// Picks tokens.
struct Sampler {
    temperature: f32,
    // ChaCha's stream is fixed by its definition, unlike that of `StdRng`.
    rng: ChaCha8Rng,
}

impl Sampler {
    fn new(temperature: f32, seed: u64) -> Result<Self> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(Error::Temperature { got: temperature });
        }
        Ok(Self { temperature, rng: ChaCha8Rng::seed_from_u64(seed) })
    }

    /// A token, or none if the logits have no finite maximum.
    fn sample(&mut self, logits: &[f32]) -> Option<u32> {
        if logits.iter().any(|l| l.is_nan()) {
            return None;
        }
        // The first of equal maxima, so that greedy decoding does not depend on the iteration.
        let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]))?;
        let maximum = logits[best];
        if !maximum.is_finite() {
            return None;
        }
        let token = if self.temperature == 0.0 {
            best
        } else {
            let weights = logits.iter().map(|l| f64::from((l - maximum) / self.temperature).exp());
            WeightedIndex::new(weights).ok()?.sample(&mut self.rng)
        };
        u32::try_from(token).ok()
    }
}
