//! Several texts, generated together.

use crate::codecs::Choice;
use crate::language::{Drawing, Language, Report};
use crate::{interrupt, output};
use anyhow::Result;
use std::ops::ControlFlow;
use tqkv::Device;
use tqkv_candle::{Attention, Progress, TextStream, generate_batch};

/// The texts after these prompts, on a cache that holds them all. Ends when interrupted.
pub fn generate(
    language: &Language,
    device: &Device,
    codec: Choice,
    drawing: &Drawing,
    prompts: &[Vec<u32>],
) -> Result<Vec<Report>> {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    let room = longest.saturating_add(drawing.max_tokens).min(language.model.config().max_position_embeddings);
    let mut attention = Attention::new(device, language.cache_config(codec, prompts.len(), room)?)?;
    let texts: Vec<_> = prompts.iter().map(|prompt| (attention.cache_mut().add_sequence(), &prompt[..])).collect();
    let mut streams = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        let mut decoder = language.vocabulary.decoder();
        for &token in prompt {
            decoder.push(token)?;
        }
        streams.push((TextStream::new(decoder, drawing.stop())?, String::new()));
    }
    let bar = output::progress("reading", prompts.iter().map(Vec::len).sum())?;
    let options = drawing.options(&[]);
    let generated = generate_batch(&language.model, &mut attention, &texts, &options, |i, progress| {
        let (stream, text) = &mut streams[i];
        match progress {
            Progress::Prompt(done) => {
                bar.set_position((prompts[..i].iter().map(Vec::len).sum::<usize>() + done) as u64);
            }
            Progress::Token(token) => {
                bar.finish_and_clear();
                *text += &stream.push(token);
            }
        }
        if stream.stopped() || interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    bar.finish_and_clear();
    let texts = texts.into_iter().zip(streams).zip(generated);
    texts
        .map(|(((sequence, _), (stream, mut text)), mut generated)| {
            let (rest, stopped) = stream.finish();
            text += &rest;
            generated.stop = stopped.unwrap_or(generated.stop);
            language.report(attention.cache(), attention.cache().len(sequence)?, text, &generated)
        })
        .collect()
}
