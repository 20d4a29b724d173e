//! Text generation, token by token.

use crate::attention::Attention;
use crate::cache::SequenceCache;
use crate::draft::{Draft, Proposal};
use crate::error::{Error, Result};
use crate::models::Model;
use crate::room;
use crate::sampling::Sampler;
use candle_core::IndexOp;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};
use tqkv::SequenceId;

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
    /// What the new tokens after the first took: each of them one run of the model, or several with a draft.
    pub decode_time: Duration,
    /// Tokens that a [`Draft`] proposed.
    pub drafted: usize,
    /// Those of them that the model took.
    pub accepted: usize,
}

impl Default for Generated {
    fn default() -> Self {
        Self {
            tokens: Vec::new(),
            stop: StopReason::Callback,
            prompt_tokens: 0,
            prompt_time: Duration::ZERO,
            decode_time: Duration::ZERO,
            drafted: 0,
            accepted: 0,
        }
    }
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
    Run { model, draft: None, options }.generate(cache, prompt, &mut on_progress)
}

/// The same with a small model that proposes tokens, which the large one checks several at a time. The text is distributed as
/// without it; where `options` take the likeliest token it is the same text, but where two tokens are as likely up to rounding.
///
/// The small model reads [`GenerateOptions::history`] and the prompt. Its proposals are its own draws with the same options.
///
/// # Errors
/// Those of [`generate_with`], for either model.
pub fn generate_with_draft(
    model: &Model,
    cache: &mut SequenceCache,
    draft: &mut Draft<'_>,
    prompt: &[u32],
    options: &GenerateOptions,
    mut on_progress: impl FnMut(Progress) -> ControlFlow<()>,
) -> Result<Generated> {
    Run { model, draft: Some(draft), options }.generate(cache, prompt, &mut on_progress)
}

type OnProgress<'a> = &'a mut dyn FnMut(Progress) -> ControlFlow<()>;

/// One generation of one text.
pub(crate) struct Run<'a, 'd> {
    pub model: &'a Model,
    pub draft: Option<&'a mut Draft<'d>>,
    pub options: &'a GenerateOptions,
}

impl Run<'_, '_> {
    pub fn generate(
        mut self,
        cache: &mut SequenceCache,
        prompt: &[u32],
        on_progress: OnProgress<'_>,
    ) -> Result<Generated> {
        let (model, options) = (self.model, self.options);
        let held = cache.tokens()?;
        let limit = model.config().max_position_embeddings.min(room::positions(cache)?);
        let mut writer = Writer::new(model, options, held, prompt, limit)?;
        check_prompt(model, held, prompt, options)?;
        room::expect(cache, held, prompt.len(), options.chunk)?;

        let started = Instant::now();
        let ran = self.prompt(cache, prompt, on_progress).or_else(|error| {
            cache.truncate(held)?;
            Err(error)
        });
        let (logits, prompt_tokens) = ran?;
        writer.generated.prompt_tokens = prompt_tokens;
        writer.generated.prompt_time = started.elapsed();
        let Some(logits) = logits else { return Ok(writer.generated) };

        let started = Instant::now();
        let mut known = [&options.history[..], prompt].concat();
        let mut tokens = if options.max_tokens == 0 { vec![] } else { vec![writer.draw(&logits)?] };
        writer.generated.stop = loop {
            if options.max_tokens == 0 {
                break StopReason::MaxTokens;
            }
            known.extend(&tokens);
            if let Some(stop) = tokens.into_iter().find_map(|token| writer.push(token, &mut *on_progress)) {
                break stop;
            }
            tokens = self.round(cache, &known, &mut writer)?;
        };
        writer.generated.decode_time = started.elapsed();
        // Proposals that hold may have run, though the text ends before them.
        cache.truncate(writer.ran().min(cache.tokens()?))?;
        Ok(writer.generated)
    }

    /// The logits after the prompt, unless `on_progress` ends it before; and how many tokens have run.
    fn prompt(
        &mut self,
        cache: &mut SequenceCache,
        prompt: &[u32],
        on_progress: OnProgress<'_>,
    ) -> Result<(Option<Vec<f32>>, usize)> {
        let (sequence, chunk) = (cache.sequence(), self.options.chunk);
        let on_chunk = |done| on_progress(Progress::Prompt(done));
        let ran = run_prompt(self.model, cache.attention_mut(), sequence, prompt, chunk, on_chunk)?;
        if let (Some(draft), (Some(_), _)) = (&mut self.draft, &ran) {
            draft.read(&[&self.options.history[..], prompt].concat(), chunk)?;
        }
        Ok(ran)
    }

    /// Runs the last of the known tokens, which the cache lacks, with what is proposed to follow it: the tokens that do follow.
    fn round(&mut self, cache: &mut SequenceCache, known: &[u32], writer: &mut Writer<'_>) -> Result<Vec<u32>> {
        let held = cache.tokens()?;
        let proposals = match &mut self.draft {
            Some(draft) => draft.propose(known, writer.left().saturating_sub(1), &writer.sampler, self.model)?,
            None => vec![],
        };
        let last = known.last().copied().ok_or(Error::NoTokens)?;
        let run: Vec<u32> = std::iter::once(last).chain(proposals.iter().map(|p| p.token)).collect();
        let rows = self.model.logits(&self.model.forward(&run, cache)?)?.to_vec2::<f32>()?;
        let tokens = writer.judge(&rows, &proposals, held)?;
        cache.truncate(held + tokens.len())?;
        if let Some(draft) = &mut self.draft {
            draft.keep(known.len() + tokens.len() - 1)?;
        }
        Ok(tokens)
    }
}

/// A text as it is generated.
pub(crate) struct Writer<'a> {
    model: &'a Model,
    max_tokens: usize,
    sampler: Sampler,
    /// Positions before the first new token, and how many there can be.
    start: usize,
    limit: usize,
    pub generated: Generated,
}

impl<'a> Writer<'a> {
    /// `limit` positions can be held.
    pub fn new(model: &'a Model, options: &GenerateOptions, held: usize, prompt: &[u32], limit: usize) -> Result<Self> {
        let mut sampler = Sampler::new(options)?;
        sampler.see(&options.history);
        sampler.see(prompt);
        let (start, max_tokens) = (held.saturating_add(prompt.len()), options.max_tokens);
        Ok(Self { model, max_tokens, sampler, start, limit, generated: Generated::default() })
    }

    /// The token that follows; `logits` are those of the last one.
    pub fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        let position = self.start + self.generated.tokens.len() - 1;
        let token = self.sampler.sample(logits).ok_or(Error::NonFiniteLogits { position })?;
        self.sampler.see(&[token]);
        Ok(token)
    }

    /// Which proposals hold, and the token that follows them; `rows` are the logits of the token at `position` and of each
    /// proposal.
    fn judge(&mut self, rows: &[Vec<f32>], proposals: &[Proposal], position: usize) -> Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(rows.len());
        self.generated.drafted += proposals.len();
        for (i, logits) in rows.iter().enumerate() {
            let drawn = match proposals.get(i) {
                Some(proposal) => self.sampler.judge(logits, proposal),
                None => self.sampler.sample(logits).map(|token| (token, false)),
            };
            let (token, holds) = drawn.ok_or(Error::NonFiniteLogits { position: position + i })?;
            self.sampler.see(&[token]);
            tokens.push(token);
            if !holds {
                break;
            }
            self.generated.accepted += 1;
        }
        Ok(tokens)
    }

    /// Positions before the first new token.
    pub fn start(&self) -> usize {
        self.start
    }

    /// How many more tokens can come.
    fn left(&self) -> usize {
        let tokens = self.generated.tokens.len();
        // The last one does not run.
        (self.max_tokens - tokens).min(self.limit + 1 - self.start - tokens)
    }

    /// Adds a token, unless it ends the text. Why the text ends, if it does.
    pub fn push(&mut self, token: u32, on_progress: OnProgress<'_>) -> Option<StopReason> {
        if self.model.config().eos_tokens.contains(&token) {
            return Some(StopReason::EndToken);
        }
        self.generated.tokens.push(token);
        if on_progress(Progress::Token(token)).is_break() {
            return Some(StopReason::Callback);
        }
        let tokens = self.generated.tokens.len();
        if tokens == self.max_tokens {
            return Some(StopReason::MaxTokens);
        }
        (self.start + tokens > self.limit).then_some(StopReason::ContextFull)
    }

    /// Positions that have run by the end: all, or all but the last.
    fn ran(&self) -> usize {
        let last = usize::from(self.generated.stop != StopReason::EndToken && !self.generated.tokens.is_empty());
        self.start + self.generated.tokens.len() - last
    }
}

/// Before any work is done, and not after the chunks that fit.
pub(crate) fn check_prompt(model: &Model, held: usize, prompt: &[u32], options: &GenerateOptions) -> Result<()> {
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
    match prompt.iter().find(|&&token| token as usize >= vocab_size) {
        Some(&got) => Err(Error::Token { got, vocab_size }),
        None => Ok(()),
    }
}

/// The logits after a prompt, which runs chunk by chunk; none if `on_chunk` ends it before. And how many tokens have run.
pub(crate) fn run_prompt(
    model: &Model,
    attention: &mut Attention,
    sequence: SequenceId,
    prompt: &[u32],
    chunk: usize,
    mut on_chunk: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<(Option<Vec<f32>>, usize)> {
    let mut done = 0usize;
    loop {
        let chunk = &prompt[done..prompt.len().min(done.saturating_add(chunk))];
        let hidden = model.forward_batch(&[(sequence, chunk)], attention)?;
        done += chunk.len();
        let stop = on_chunk(done).is_break();
        if done == prompt.len() {
            // Only the last token's are used, and with a large vocabulary all would be much work.
            let logits: Vec<f32> = model.logits(&hidden.i(chunk.len() - 1..)?)?.flatten_all()?.to_vec1()?;
            if logits.iter().any(|l| l.is_nan()) {
                return Err(Error::NonFiniteLogits { position: attention.cache().len(sequence)?.saturating_sub(1) });
            }
            return Ok(((!stop).then_some(logits), done));
        }
        if stop {
            return Ok((None, done));
        }
    }
}
