//! Several texts at a time.

use crate::attention::Attention;
use crate::error::{Error, Result};
use crate::generate::{GenerateOptions, Generated, Progress, StopReason, Writer, check_prompt, run_prompt};
use crate::models::Model;
use std::ops::ControlFlow;
use std::time::Instant;
use tqkv::SequenceId;

/// Runs the prompts, one after the other, then the newest tokens of all texts in one step, until all have ended: each text is
/// the one that [`generate_with`](crate::generate_with) gives for its prompt with the same options. `on_progress` is told which
/// text it is; where it breaks within a prompt all end, with a token that text.
///
/// Each prompt follows what its sequence holds. A text that has ended stays in the cache.
///
/// # Errors
/// Those of [`generate_with`](crate::generate_with); [`tqkv::Error::OutOfPages`] also for tokens that the cache has no room for.
/// After an error with the prompts the sequences hold what they held before.
pub fn generate_batch(
    model: &Model,
    attention: &mut Attention,
    prompts: &[(SequenceId, &[u32])],
    options: &GenerateOptions,
    mut on_progress: impl FnMut(usize, Progress) -> ControlFlow<()>,
) -> Result<Vec<Generated>> {
    let mut writers = Vec::with_capacity(prompts.len());
    for &(sequence, prompt) in prompts {
        let held = attention.cache().len(sequence)?;
        check_prompt(model, held, prompt, options)?;
        writers.push(Writer::new(model, options, held, prompt, model.config().max_position_embeddings)?);
    }
    let first = run_prompts(model, attention, prompts, options, &mut writers, &mut on_progress).or_else(|error| {
        for (&(sequence, prompt), writer) in prompts.iter().zip(&writers) {
            attention.cache_mut().truncate(sequence, writer.start() - prompt.len())?;
        }
        Err(error)
    })?;
    let started = Instant::now();
    let mut active = vec![];
    let mut add = |text: usize, token: u32, writers: &mut [Writer], active: &mut Vec<(usize, u32)>| {
        match writers[text].push(token, &mut |progress| on_progress(text, progress)) {
            Some(stop) => writers[text].generated.stop = stop,
            None => active.push((text, token)),
        }
        writers[text].generated.decode_time = started.elapsed();
    };
    first.into_iter().for_each(|(text, token)| add(text, token, &mut writers, &mut active));
    while !active.is_empty() {
        let step: Vec<_> = active.iter().map(|(text, token)| (prompts[*text].0, std::slice::from_ref(token))).collect();
        let rows = model.logits(&model.forward_batch(&step, attention)?)?.to_vec2::<f32>()?;
        for ((text, _), logits) in std::mem::take(&mut active).into_iter().zip(rows) {
            let token = writers[text].draw(&logits)?;
            add(text, token, &mut writers, &mut active);
        }
    }
    Ok(writers.into_iter().map(|writer| writer.generated).collect())
}

/// The first token of each text; none if `on_progress` breaks or there are to be none.
fn run_prompts(
    model: &Model,
    attention: &mut Attention,
    prompts: &[(SequenceId, &[u32])],
    options: &GenerateOptions,
    writers: &mut [Writer],
    on_progress: &mut impl FnMut(usize, Progress) -> ControlFlow<()>,
) -> Result<Vec<(usize, u32)>> {
    let mut first = vec![];
    for (text, (&(sequence, prompt), writer)) in prompts.iter().zip(&mut *writers).enumerate() {
        let started = Instant::now();
        let on_chunk = |done| on_progress(text, Progress::Prompt(done));
        let (logits, ran) = run_prompt(model, attention, sequence, prompt, options.chunk, on_chunk)?;
        (writer.generated.prompt_tokens, writer.generated.prompt_time) = (ran, started.elapsed());
        let Some(logits) = logits else { return Ok(vec![]) };
        match options.max_tokens {
            0 => writer.generated.stop = StopReason::MaxTokens,
            _ => first.push((text, writer.draw(&logits)?)),
        }
    }
    match prompts.is_empty() {
        true => Err(Error::NoTokens),
        false => Ok(first),
    }
}
