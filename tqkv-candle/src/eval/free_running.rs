//! Text that a model writes by itself.

use crate::cache::SequenceCache;
use crate::error::Result;
use crate::generate::{GenerateOptions, generate};
use crate::models::Model;
use std::ops::ControlFlow;

/// The likeliest `tokens` after a prompt, or fewer where the model ends the text. The cache is emptied before.
///
/// # Errors
/// Those of [`generate`].
pub fn run_freely(model: &Model, cache: &mut SequenceCache, prompt: &[u32], tokens: usize) -> Result<Vec<u32>> {
    cache.truncate(0)?;
    let options = GenerateOptions { max_tokens: tokens, ..GenerateOptions::default() };
    Ok(generate(model, cache, prompt, &options, |_| ControlFlow::Continue(()))?.tokens)
}

/// Where two texts begin to differ, or one ends before the other; none if they are the same.
pub fn first_difference(a: &[u32], b: &[u32]) -> Option<usize> {
    let common = a.iter().zip(b).take_while(|(a, b)| a == b).count();
    (common < a.len().max(b.len())).then_some(common)
}
