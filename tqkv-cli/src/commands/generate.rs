//! `tqkv generate`

use crate::language::{Drafting, Drawing, Language, Report, Source};
use crate::session::Session;
use crate::{batch, interrupt, output};
use anyhow::{Context, Result, ensure};
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
    /// Text to continue; with --load it follows what was saved. Given several times, the texts are generated together, in one
    /// batch
    #[arg(long, value_name = "TEXT")]
    prompt: Vec<String>,
    /// File with a text to continue, as --prompt
    #[arg(long, value_name = "FILE")]
    prompt_file: Vec<PathBuf>,
    #[command(flatten)]
    drafting: Drafting,
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
        let prompts = self.prompts()?;
        let device = Device::open(&self.source.device)?;
        interrupt::watch()?;
        let mut language = Language::load(&self.source.model, self.source.calibration.as_deref())?;
        language.encoding = self.source.encode.into();
        match &prompts[..] {
            [] => self.one(&mut language, &device, "")?,
            [prompt] => self.one(&mut language, &device, prompt)?,
            _ => {
                let encode = |prompt: &String| language.vocabulary.encode_prompt(prompt);
                let prompts = prompts.iter().map(encode).collect::<Result<Vec<_>, _>>()?;
                if self.source.center.is_some() {
                    language.center_on(&prompts[0])?;
                }
                let reports = batch::generate(&language, &device, self.source.codec, &self.drawing, &prompts)?;
                reports.iter().try_for_each(|report| self.print(report))?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What to continue; nothing only with something to load.
    fn prompts(&self) -> Result<Vec<String>> {
        let mut prompts = self.prompt.clone();
        for path in &self.prompt_file {
            prompts.push(std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?);
        }
        let alone = self.load.is_some() || self.save.is_some() || self.drafting.drafts();
        ensure!(!prompts.is_empty() || self.load.is_some(), "expected --prompt, --prompt-file or --load");
        ensure!(prompts.len() < 2 || !alone, "several prompts cannot be combined with --load, --save and --draft");
        Ok(prompts)
    }

    fn one(&self, language: &mut Language, device: &Device, prompt: &str) -> Result<()> {
        let keeps = self.save.is_some() || self.load.is_some();
        let model_id = if keeps { fingerprint(&language.path)? } else { String::new() };
        let loaded = self.load.as_deref().map(Session::open).transpose()?;
        let codec = self.source.codec.or(loaded.as_ref().and_then(|(_, codec)| *codec));
        let tokens = match loaded {
            Some((session, _)) => {
                let center = session.center()?;
                ensure!(center.is_some() || self.source.center.is_none(), "--center: what was saved has no center");
                center.into_iter().for_each(|center| language.center_as(center));
                [session.tokens, language.vocabulary.encode_continuation(prompt)?].concat()
            }
            None => language.vocabulary.encode_prompt(prompt)?,
        };
        if self.source.center.is_some() {
            language.center_on(&tokens)?;
        }
        let language = &*language;
        // Room for what can come, and not for the whole context.
        let room = tokens.len().saturating_add(self.drawing.max_tokens);
        let room = room.min(language.model.config().max_position_embeddings);
        let mut drafter = self.drafting.load(language, room)?;
        let mut cache = language.cache(device, codec, room)?;
        if let Some(path) = &self.load {
            cache.load(path, model_id.as_bytes()).with_context(|| path.display().to_string())?;
            // Logits are not saved: at least the last token runs again.
            cache.truncate(cache.tokens()?.min(tokens.len().saturating_sub(1)))?;
        }
        let mut decoder = language.vocabulary.decoder();
        // What stands before may end within a character, and says whether a space before the first word is one.
        for &token in &tokens {
            decoder.push(token)?;
        }
        let answer = language.go_on(&mut cache, drafter.as_mut(), &tokens, &self.drawing, decoder, |piece| {
            if self.json { Ok(()) } else { output::print(piece) }
        })?;
        if let Some(path) = &self.save {
            let session = Session::new(answer.tokens, vec![]).centered(language.center())?;
            session.write(&cache, path, &model_id)?;
        }
        answer.emitted?;
        if self.json {
            return output::print_json(&answer.report);
        }
        output::print("\n")?;
        output::note(&format!("\n{}", answer.report.line()));
        Ok(())
    }

    /// A whole text, after the others of its batch.
    fn print(&self, report: &Report) -> Result<()> {
        if self.json {
            return output::print_json(report);
        }
        output::print(&format!("{}\n\n", report.text))?;
        output::note(&format!("{}\n", report.line()));
        Ok(())
    }
}
