//! `tqkv generate`

use crate::{codecs, output};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv::{CodecPair, Device};
use tqkv_candle::{GenerateOptions, Llama, SequenceCache, StopReason, Vocabulary, generate};

/// Generates text with a Llama model on a compressed cache.
#[derive(clap::Args)]
pub struct Generate {
    /// Hugging Face directory of a Llama model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to continue
    #[arg(long, value_name = "TEXT")]
    prompt: String,
    /// Codec of the cache: f32, f16, seed4, seed5, seed6, seed8, or kXvY with X bits for keys and Y for values (2 to 8)
    #[arg(long, value_name = "CODEC", default_value = "k5v4", value_parser = codecs::parse)]
    codec: CodecPair,
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
        let device = Device::open(&self.device)?;
        let model = Llama::load(&self.model).context("cannot load the model")?;
        let vocabulary = Vocabulary::load(&self.model, model.config())?;
        let prompt = vocabulary.encode_prompt(&self.prompt)?;
        if self.max_tokens == 0 {
            bail!("--max-tokens is 0, expected at least 1");
        }
        // Room for what can come, and not for the whole context.
        let capacity = prompt.len().saturating_add(self.max_tokens).min(model.config().max_position_embeddings);
        let config = model.config().cache_config().codec(self.codec).capacity(capacity);
        let mut cache = SequenceCache::new(&device, config, model.config())?;

        let options = GenerateOptions {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            seed: self.seed,
            ..GenerateOptions::default()
        };
        let mut decoder = vocabulary.decoder();
        let mut text = String::new();
        let mut failure = None;
        let mut emit = |piece: String| {
            text.push_str(&piece);
            if self.json { Ok(()) } else { output::print(&piece) }
        };
        let generated = generate(&model, &mut cache, &prompt, &options, |token| {
            match decoder.push(token).map_err(anyhow::Error::from).and_then(&mut emit) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failure = Some(error);
                    ControlFlow::Break(())
                }
            }
        })?;
        if let Some(failure) = failure {
            return Err(failure);
        }
        emit(decoder.finish())?;

        // What f16 would take for as many pages.
        let held = cache.kv().used_bytes();
        let bits = |codec: CodecPair| codec.bits_per_element(model.config().head_dim);
        let f16 = held as f64 / bits(self.codec)? * bits(CodecPair::both(tqkv::Codec::F16))?;
        let report = Report {
            text,
            stop: match generated.stop {
                StopReason::MaxTokens => "max_tokens",
                StopReason::EndToken => "end_token",
                StopReason::ContextFull => "context_full",
                StopReason::Callback => "interrupted",
            },
            codec: self.codec.to_string(),
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
