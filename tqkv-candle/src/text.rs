//! Text as it is generated.

use crate::cache::SequenceCache;
use crate::draft::Draft;
use crate::error::{Error, Result};
use crate::generate::{GenerateOptions, Generated, Progress, Run, StopReason};
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

/// The text of tokens that arrive one by one: each piece as soon as no later token can change it, and no further than to the
/// first of the stop strings.
pub struct TextStream<'a> {
    decoder: Decoder<'a>,
    until: Until<'a>,
}

impl<'a> TextStream<'a> {
    /// `decoder` has decoded what stands before, if the text goes on within a word or a character.
    ///
    /// # Errors
    /// [`Error::StopString`] for an empty one.
    pub fn new(decoder: Decoder<'a>, stop: &'a [String]) -> Result<Self> {
        Ok(Self { decoder, until: Until::new(stop)? })
    }

    /// The text that a token brings. A token that the vocabulary does not have brings none.
    pub fn push(&mut self, token: u32) -> String {
        self.until.push(&self.decoder.push(token).unwrap_or_default())
    }

    /// Whether a stop string came. There is no text after it.
    pub fn stopped(&self) -> bool {
        self.until.found
    }

    /// The text that was held back, when no more comes; and why the text ended, if a stop string ended it.
    pub fn finish(self) -> (String, Option<StopReason>) {
        let Self { decoder, mut until } = self;
        let rest = until.push(&decoder.finish());
        (rest + &until.finish(), until.found.then_some(StopReason::StopString))
    }
}

/// Generates as [`generate_with`](crate::generate_with) does, or with a draft, and hands over the text of a [`TextStream`]; the
/// generation ends at the first of the strings in `stop`.
///
/// # Errors
/// Those of [`generate_with`](crate::generate_with), and [`Error::StopString`] for an empty one.
#[allow(clippy::too_many_arguments)] // Each is a thing of its own.
pub fn generate_text(
    model: &Model,
    cache: &mut SequenceCache,
    draft: Option<&mut Draft<'_>>,
    prompt: &[u32],
    options: &GenerateOptions,
    decoder: Decoder<'_>,
    stop: &[String],
    mut on_progress: impl FnMut(TextProgress<'_>) -> ControlFlow<()>,
) -> Result<Generated> {
    let mut stream = TextStream::new(decoder, stop)?;
    let mut on_tokens = |progress| match progress {
        Progress::Prompt(done) => on_progress(TextProgress::Prompt(done)),
        Progress::Token(token) => {
            let flow = on_progress(TextProgress::Text(&stream.push(token)));
            if stream.stopped() { ControlFlow::Break(()) } else { flow }
        }
    };
    let mut generated = Run { model, draft, options }.generate(cache, prompt, &mut on_tokens)?;
    let (rest, stopped) = stream.finish();
    if !rest.is_empty() {
        // The generation has ended.
        let _ = on_progress(TextProgress::Text(&rest));
    }
    generated.stop = stopped.unwrap_or(generated.stop);
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
