//! `tqkv generate`

use crate::commands::snapshot::{Saved, fingerprint};
use crate::stream::stream;
use crate::{codecs, output};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv::{Codec, CodecPair, Device};
use tqkv_candle::{GenerateOptions, Llama, SequenceCache, StopReason, Vocabulary};

const DEFAULT_CODEC: CodecPair = CodecPair { key: Codec::tq(5), value: Codec::tq(4) };

/// Generates text with a Llama model on a compressed cache.
#[derive(clap::Args)]
pub struct Generate {
    /// Hugging Face directory of a Llama model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to continue; with --load it follows what was saved
    #[arg(long, value_name = "TEXT", required_unless_present = "load")]
    prompt: Option<String>,
    /// Codec of the cache: f32, f16, seed4, seed5, seed6, seed8, or kXvY with X bits for keys and Y for values (2 to 8)
    /// [default: k5v4, or that of the file to load]
    #[arg(long, value_name = "CODEC", value_parser = codecs::parse)]
    codec: Option<CodecPair>,
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 takes the likeliest token always; above, tokens are drawn
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,
    /// The same seed draws the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// Device of the cache: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    device: String,
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

#[derive(Serialize)]
struct Report {
    text: String,
    stop: &'static str,
    codec: String,
    device: String,
    prompt_tokens: usize,
    tokens: usize,
    prompt_tokens_per_second: f64,
    tokens_per_second: f64,
    cache_bytes: usize,
    cache_bytes_f16: usize,
}

impl Generate {
    pub fn run(self) -> Result<ExitCode> {
        // Before the work, which may take long.
        if self.max_tokens == 0 {
            bail!("--max-tokens is 0, expected at least 1");
        }
        if let Some(path) = &self.save {
            output::expect_replaceable(path)?;
        }
        let device = Device::open(&self.device)?;
        let model = Llama::load(&self.model).context("cannot load the model")?;
        let vocabulary = Vocabulary::load(&self.model, model.config())?;
        let model_id =
            if self.save.is_some() || self.load.is_some() { fingerprint(&self.model)? } else { String::new() };
        let prompt = self.prompt.as_deref().unwrap_or_default();
        let loaded = self.load.as_deref().map(Saved::open).transpose()?;
        let (mut tokens, codec, known) = match loaded {
            Some((Saved { mut tokens }, codec)) => {
                let known = tokens.len();
                tokens.extend(vocabulary.encode_continuation(prompt)?);
                (tokens, self.codec.unwrap_or(codec), known)
            }
            None => (vocabulary.encode_prompt(prompt)?, self.codec.unwrap_or(DEFAULT_CODEC), 0),
        };
        // Room for what can come, and not for the whole context.
        let capacity = tokens.len().saturating_add(self.max_tokens).min(model.config().max_position_embeddings);
        let config = model.config().cache_config().codec(codec).capacity(capacity);
        let mut cache = SequenceCache::new(&device, config, model.config())?;
        if let Some(path) = &self.load {
            cache.load(path, model_id.as_bytes()).with_context(|| path.display().to_string())?;
            // Logits are not saved: at least the last token runs again.
            cache.truncate(cache.tokens()?.min(tokens.len().saturating_sub(1)))?;
        }
        let prompt = tokens.get(cache.tokens()?..).unwrap_or_default();

        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            seed: self.seed,
            ..GenerateOptions::default()
        };
        let mut decoder = vocabulary.decoder();
        // What was written before may end within a character.
        for &token in &tokens[..known] {
            decoder.push(token)?;
        }
        let mut text = String::new();
        let generated = stream(&model, &mut cache, prompt, &options, decoder, |piece| {
            text.push_str(piece);
            if self.json { Ok(()) } else { output::print(piece) }
        })?;
        if let Some(path) = &self.save {
            tokens.extend(&generated.tokens);
            Saved { tokens }.write(&cache, path, &model_id)?;
        }

        // What f16 would take for as many pages.
        let held = cache.kv().usage().used;
        let bits = |codec: CodecPair| codec.bits_per_element(model.config().head_dim);
        let f16 = held as f64 / bits(codec)? * bits(CodecPair::both(Codec::F16))?;
        let report = Report {
            text,
            stop: match generated.stop {
                StopReason::MaxTokens => "max_tokens",
                StopReason::EndToken => "end_token",
                StopReason::ContextFull => "context_full",
                StopReason::Callback => "interrupted",
            },
            codec: codec.to_string(),
            device: device.to_string(),
            prompt_tokens: generated.prompt_tokens,
            tokens: generated.tokens.len(),
            prompt_tokens_per_second: generated.prompt_tokens_per_second(),
            tokens_per_second: generated.decode_tokens_per_second(),
            cache_bytes: held,
            cache_bytes_f16: f16.round() as usize,
        };
        if self.json {
            output::print_json(&report)?;
        } else {
            output::print("\n")?;
            output::note(&format!(
                "\n{} tokens after {} of the prompt ({}); {:.0} tokens/s (prompt {:.0}); cache {} in {} (f16 would take {})",
                report.tokens,
                report.prompt_tokens,
                report.stop,
                report.tokens_per_second,
                report.prompt_tokens_per_second,
                output::bytes(report.cache_bytes),
                report.codec,
                output::bytes(report.cache_bytes_f16),
            ));
        }
        Ok(ExitCode::SUCCESS)
    }
}
