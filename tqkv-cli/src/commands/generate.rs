//! `tqkv generate`

use crate::language::{Drawing, Language, Source};
use crate::session::Session;
use crate::{interrupt, output};
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv::Device;
use tqkv_candle::fingerprint;

/// Generates text with a model on a compressed cache.
///
/// Ctrl-C ends the text at the next token; what there is by then is printed and saved.
#[derive(clap::Args)]
pub struct Generate {
    #[command(flatten)]
    source: Source,
    /// Text to continue; with --load it follows what was saved
    #[arg(long, value_name = "TEXT", required_unless_present = "load")]
    prompt: Option<String>,
    #[command(flatten)]
    drawing: Drawing,
    /// Save the cache and its tokens when done
    #[arg(long, value_name = "F")]
    save: Option<PathBuf>,
    /// Go on where a saved generation ended, on whatever device it ran
    #[arg(long, value_name = "F")]
    load: Option<PathBuf>,
    /// Print one JSON object instead of the text as it comes
    #[arg(long)]
    json: bool,
}

impl Generate {
    pub fn run(self) -> Result<ExitCode> {
        // Before the work, which may take long.
        self.drawing.check()?;
        if let Some(path) = &self.save {
            output::expect_replaceable(path)?;
        }
        let device = Device::open(&self.source.device)?;
        interrupt::watch()?;
        let language = Language::load(&self.source.model, self.source.calibration.as_deref())?;
        let vocabulary = &language.vocabulary;
        let keeps = self.save.is_some() || self.load.is_some();
        let model_id = if keeps { fingerprint(&language.path)? } else { String::new() };
        let prompt = self.prompt.as_deref().unwrap_or_default();
        let loaded = self.load.as_deref().map(Session::open).transpose()?;
        let codec = self.source.codec.or(loaded.as_ref().and_then(|(_, codec)| *codec));
        let tokens = match loaded {
            Some((Session { mut tokens, .. }, _)) => {
                tokens.extend(vocabulary.encode_continuation(prompt)?);
                tokens
            }
            None => vocabulary.encode_prompt(prompt)?,
        };
        // Room for what can come, and not for the whole context.
        let room = tokens.len().saturating_add(self.drawing.max_tokens);
        let room = room.min(language.model.config().max_position_embeddings);
        let mut cache = language.cache(&device, codec, room)?;
        if let Some(path) = &self.load {
            cache.load(path, model_id.as_bytes()).with_context(|| path.display().to_string())?;
            // Logits are not saved: at least the last token runs again.
            cache.truncate(cache.tokens()?.min(tokens.len().saturating_sub(1)))?;
        }
        let mut decoder = vocabulary.decoder();
        // What stands before may end within a character, and says whether a space before the first word is one.
        for &token in &tokens {
            decoder.push(token)?;
        }
        let answer = language.go_on(&mut cache, &tokens, &self.drawing, decoder, |piece| {
            if self.json { Ok(()) } else { output::print(piece) }
        })?;
        if let Some(path) = &self.save {
            Session { tokens: answer.tokens, messages: vec![] }.write(&cache, path, &model_id)?;
        }
        answer.emitted?;
        if self.json {
            output::print_json(&answer.report)?;
        } else {
            output::print("\n")?;
            output::note(&format!("\n{}", answer.report.line()));
        }
        Ok(ExitCode::SUCCESS)
    }
}
