//! Text as it is generated.

use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::generate::{GenerateOptions, Generated, Progress, StopReason, generate_with};
use crate::models::Model;
use crate::tokenizer::Decoder;
use std::ops::ControlFlow;

/// How far a generation of text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextProgress<'a> {
    /// So many tokens of the prompt have run.
    Prompt(usize),
    /// More text; empty where a token completes none.
    Text(&'a str),
}

/// Generates as [`generate_with`] does, and hands over text: each piece as soon as no later token can change it, and no
/// further than to the first of the strings in `stop`, at which the generation ends.
///
/// `decoder` has decoded what stands before the prompt, if the text goes on within a word or a character.
///
/// # Errors
/// Those of [`generate_with`], and [`Error::StopString`] for an empty one.
pub fn generate_text(
    model: &Model,
    cache: &mut SequenceCache,
    prompt: &[u32],
    options: &GenerateOptions,
    mut decoder: Decoder<'_>,
    stop: &[String],
    mut on_progress: impl FnMut(TextProgress<'_>) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut until = Until::new(stop)?;
    let mut generated = generate_with(model, cache, prompt, options, |progress| match progress {
        Progress::Prompt(done) => on_progress(TextProgress::Prompt(done)),
        // Every token was checked to be the model's, and the vocabulary is the model's too: else it has no text.
        Progress::Token(token) => {
            let text = until.push(&decoder.push(token).unwrap_or_default());
            let flow = on_progress(TextProgress::Text(&text));
            if until.found { ControlFlow::Break(()) } else { flow }
        }
    })?;
    let rest = decoder.finish();
    let rest = until.push(&rest) + &until.finish();
    if !rest.is_empty() {
        // The generation has ended.
        let _ = on_progress(TextProgress::Text(&rest));
    }
    if until.found {
        generated.stop = StopReason::StopString;
    }
    Ok(generated)
}

/// Text up to the first stop string.
struct Until<'a> {
    stop: &'a [String],
    /// What may be the beginning of a stop string.
    held: String,
    found: bool,
}

impl<'a> Until<'a> {
    fn new(stop: &'a [String]) -> Result<Self> {
        match stop.iter().any(String::is_empty) {
            true => Err(Error::StopString),
            false => Ok(Self { stop, held: String::new(), found: false }),
        }
    }

    /// The text that `piece` brings.
    fn push(&mut self, piece: &str) -> String {
        if self.found {
            return String::new();
        }
        self.held += piece;
        if let Some(at) = self.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.found = true;
            self.held.truncate(at);
            return std::mem::take(&mut self.held);
        }
        // The first place from where all is the beginning of a stop string.
        let begins = |at: &usize| self.stop.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let end = self.held.char_indices().map(|(at, _)| at).find(begins).unwrap_or(self.held.len());
        let rest = self.held.split_off(end);
        std::mem::replace(&mut self.held, rest)
    }

    /// What was held back, when no more comes.
    fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The pieces that come of pieces, the last of them in the end.
    fn pieces(stop: &[&str], text: &[&str]) -> (Vec<String>, bool) {
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let mut until = Until::new(&stop).unwrap();
        let mut pieces: Vec<String> = text.iter().map(|piece| until.push(piece)).collect();
        pieces.push(until.finish());
        (pieces, until.found)
    }

    #[test]
    fn text_comes_up_to_the_first_stop_string() {
        assert_eq!(pieces(&[], &["a", "b"]), (vec!["a".into(), "b".into(), String::new()], false));
        let user = ["\nUser:", "##"];
        let (text, found) = pieces(&user, &["Hi", "\n", "Us", "er", ": x", "y"]);
        assert_eq!((text, found), (["Hi", "", "", "", "", "", ""].map(String::from).to_vec(), true));
        let (text, found) = pieces(&user, &["a\nUse", "ful\n", "#", "end"]);
        assert_eq!((text, found), (["a", "\nUseful", "\n", "#end", ""].map(String::from).to_vec(), false));
        assert_eq!(pieces(&user, &["a## b\nUser:"]), (vec!["a".into(), String::new()], true));
        // A beginning within a beginning.
        assert_eq!(pieces(&["aab"], &["aa", "a", "b"]), (["", "a", "", ""].map(String::from).to_vec(), true));
        assert_eq!(pieces(&["\u{e9}x"], &["\u{e9}", "y\u{e9}"]).0, ["", "\u{e9}y", "\u{e9}"]);
        assert!(matches!(Until::new(&[String::new()]), Err(Error::StopString)));
    }
}
