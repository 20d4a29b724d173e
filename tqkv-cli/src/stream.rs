//! Text as it is generated.

use anyhow::Result;
use std::ops::ControlFlow;
use tqkv_candle::{Decoder, GenerateOptions, Generated, Llama, SequenceCache, generate};

/// Generates, and hands every piece of text to `emit` as soon as it is whole. `emit`'s first error ends the generation.
pub fn stream(
    model: &Llama,
    cache: &mut SequenceCache,
    prompt: &[u32],
    options: &GenerateOptions,
    mut decoder: Decoder,
    mut emit: impl FnMut(&str) -> Result<()>,
) -> Result<Generated> {
    let mut emitted = Ok(());
    let generated = generate(model, cache, prompt, options, |token| {
        emitted = decoder.push(token).map_err(anyhow::Error::from).and_then(|text| emit(&text));
        if emitted.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    emitted?;
    emit(&decoder.finish())?;
    Ok(generated)
}
