//! Text generation, token by token.

use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::models::Model;
use crate::room;
use crate::sampling::Sampler;
use candle_core::IndexOp;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// How to generate.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// At most so many tokens.
    pub max_tokens: usize,
    /// 0 takes the likeliest token always; above, tokens are drawn, the more freely the higher.
    pub temperature: f32,
    /// Only so many of the likeliest tokens are drawn from; all if 0.
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability are drawn from; all if 1.
    pub top_p: f32,
    /// Only tokens that are at least so many times as likely as the likeliest are drawn from; all if 0.
    pub min_p: f32,
    /// The logits of tokens that were there before are divided by this if positive, multiplied if negative; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Tokens before the prompt that count as there before too.
    pub history: Vec<u32>,
    /// The same seed draws the same tokens, on every machine where the logits are the same.
    pub seed: u64,
    /// Tokens of the prompt that run through the model at a time.
    pub chunk: usize,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self {
            max_tokens: 256,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            history: Vec::new(),
            seed: 0,
            chunk: 512,
        }
    }
}

/// How far a generation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// So many tokens of the prompt have run.
    Prompt(usize),
    /// The next token.
    Token(u32),
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
    /// A stop string came.
    StopString,
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
    /// Tokens of the prompt that ran: all of them, unless the callback ended the generation before.
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

/// Runs the prompt, then one token after the other, and hands each new one to `on_token`, as [`generate_with`] does.
///
/// # Errors
/// Those of [`generate_with`].
pub fn generate(
    model: &Model,
    cache: &mut SequenceCache,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_token: impl FnMut(u32) -> ControlFlow<()>,
) -> Result<Generated> {
    generate_with(model, cache, prompt, options, |progress| match progress {
        Progress::Prompt(_) => ControlFlow::Continue(()),
        Progress::Token(token) => on_token(token),
    })
}

/// Runs the prompt, chunk by chunk, then one token after the other; calls `on_progress` after each chunk and with each new
/// token, and ends where that says so.
///
/// `cache` may hold tokens already; the prompt follows them.
///
/// # Errors
/// [`Error::Temperature`], [`Error::Sampling`], [`Error::NoTokens`], [`Error::ChunkSize`]; [`Error::ContextOverflow`] and
/// [`tqkv::Error::OutOfPages`] for a prompt that the model's context or the cache has no room for; [`Error::Token`] for one
/// with tokens that the model does not have; [`Error::NonFiniteLogits`]; those of the cache and of candle. After an error
/// with the prompt the cache holds what it held before.
pub fn generate_with(
    model: &Model,
    cache: &mut SequenceCache,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut sampler = Sampler::new(options)?;
    let held = cache.tokens()?;
    check_prompt(model, cache, held, prompt, options)?;
    let limit = model.config().max_position_embeddings.min(room::positions(cache)?);
    sampler.see(&options.history);
    sampler.see(prompt);

    let started = Instant::now();
    let logits = run_prompt(model, cache, prompt, options.chunk, |done| on_progress(Progress::Prompt(done)));
    let (logits, prompt_tokens) = logits.or_else(|error| {
        cache.truncate(held)?;
        Err(error)
    })?;
    let prompt_time = started.elapsed();
    let mut generated = Generated {
        tokens: Vec::new(),
        stop: StopReason::Callback,
        prompt_tokens,
        prompt_time,
        decode_time: Duration::ZERO,
    };
    let Some(mut logits) = logits else { return Ok(generated) };

    let started = Instant::now();
    let tokens = &mut generated.tokens;
    generated.stop = loop {
        if tokens.len() == options.max_tokens {
            break StopReason::MaxTokens;
        }
        let position = held + prompt.len() + tokens.len() - 1;
        let token = sampler.sample(&logits).ok_or(Error::NonFiniteLogits { position })?;
        if model.config().eos_tokens.contains(&token) {
            break StopReason::EndToken;
        }
        tokens.push(token);
        sampler.see(&[token]);
        if on_progress(Progress::Token(token)).is_break() {
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
    generated.decode_time = started.elapsed();
    Ok(generated)
}

/// Before any work is done, and not after the chunks that fit.
fn check_prompt(
    model: &Model,
    cache: &SequenceCache,
    held: usize,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Result<()> {
    if prompt.is_empty() {
        return Err(Error::NoTokens);
    }
    if options.chunk == 0 {
        return Err(Error::ChunkSize);
    }
    let limit = model.config().max_position_embeddings;
    if prompt.len() > limit.saturating_sub(held) {
        return Err(Error::ContextOverflow { got: held.saturating_add(prompt.len()), limit });
    }
    let vocab_size = model.config().vocab_size;
    if let Some(&got) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(Error::Token { got, vocab_size });
    }
    room::expect(cache, held, prompt.len(), options.chunk)
}

/// The logits after a prompt, which runs chunk by chunk; none if `on_chunk` ends it before. And how many tokens have run.
fn run_prompt(
    model: &Model,
    cache: &mut SequenceCache,
    prompt: &[u32],
    chunk: usize,
    mut on_chunk: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<(Option<Vec<f32>>, usize)> {
    let mut done = 0usize;
    loop {
        let chunk = &prompt[done..prompt.len().min(done.saturating_add(chunk))];
        let hidden = model.forward(chunk, cache)?;
        done += chunk.len();
        let stop = on_chunk(done).is_break();
        if done == prompt.len() {
            // Only the last token's are used, and with a large vocabulary all would be much work.
            let logits: Vec<f32> = model.logits(&hidden.i(chunk.len() - 1..)?)?.flatten_all()?.to_vec1()?;
            if logits.iter().any(|l| l.is_nan()) {
                return Err(Error::NonFiniteLogits { position: cache.tokens()?.saturating_sub(1) });
            }
            return Ok(((!stop).then_some(logits), done));
        }
        if stop {
            return Ok((None, done));
        }
    }
}
