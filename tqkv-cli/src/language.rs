//! What `generate` and `chat` have in common: a model with its vocabulary, and text out of it.

use crate::codecs::Choice;
use crate::{codecs, interrupt, output};
use anyhow::{Context, Result, bail};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tqkv::cache::RECENT_SLACK;
use tqkv::{CacheConfig, Codec, CodecPair, Device};
use tqkv_candle::{
    Calibration, Decoder, GenerateOptions, Generated, Model, SequenceCache, StopReason, TextProgress, Vocabulary,
    fingerprint, generate_text,
};

/// The model, and what its cache is.
#[derive(clap::Args)]
pub struct Source {
    /// GGUF file, or Hugging Face directory
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Codec of the cache: f32, f16, seed4, seed5, seed6, seed8, or kXvY with X bits for keys and Y for values (2 to 8); the
    /// first N positions in another with +sN, the newest N with +rN, as in k4v4+s1f16+r64k8v8; auto is what the calibration found
    /// best, what the file to go on with has, or what is recommended
    #[arg(long, value_name = "CODEC", value_parser = codecs::parse_choice, default_value = "auto")]
    pub codec: Choice,
    /// Shifts and scales of the keys that `tqkv calibrate` measured
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Device of the cache: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    pub device: String,
}

/// How tokens are drawn, and when the text ends.
#[derive(clap::Args)]
pub struct Drawing {
    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub max_tokens: usize,
    /// 0 takes the likeliest token always; above, tokens are drawn
    #[arg(long, value_name = "T", default_value_t = 0.7)]
    temperature: f32,
    /// Draw from so many of the likeliest tokens only; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Draw from the likeliest tokens only that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f32,
    /// Draw from tokens only that are at least so many times as likely as the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f32,
    /// Make tokens that were there before less likely; 1 changes nothing
    #[arg(long, value_name = "R", default_value_t = 1.0)]
    repetition_penalty: f32,
    /// The same seed draws the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    seed: u64,
    /// End before this text comes; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
}

impl Drawing {
    /// Before the work, which may take long.
    pub fn check(&self) -> Result<()> {
        if self.max_tokens == 0 {
            bail!("--max-tokens is 0, expected at least 1");
        }
        if self.stop.iter().any(String::is_empty) {
            bail!("--stop is empty, expected a text");
        }
        tqkv_candle::Sampler::new(&self.options(&[]))?;
        Ok(())
    }

    /// `history` are the tokens before the prompt.
    fn options(&self, history: &[u32]) -> GenerateOptions {
        GenerateOptions {
            max_tokens: self.max_tokens,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            history: history.to_vec(),
            seed: self.seed,
            ..GenerateOptions::default()
        }
    }
}

/// A model with its vocabulary.
pub struct Language {
    pub path: PathBuf,
    pub model: Model,
    pub vocabulary: Vocabulary,
    pub calibration: Option<Calibration>,
}

impl Language {
    pub fn load(path: &Path, calibration: Option<&Path>) -> Result<Self> {
        // First, as it is small and may be another model's.
        let calibration = calibration.map(|file| {
            let calibration = Calibration::load(file)?;
            calibration.expect_model(&fingerprint(path)?).with_context(|| file.display().to_string())?;
            anyhow::Ok(calibration)
        });
        let calibration = calibration.transpose()?;
        let spinner = output::spinner("loading the model");
        let model = Model::load(path).context("cannot load the model")?;
        let vocabulary = Vocabulary::load(path, model.config())?;
        spinner.finish_and_clear();
        Ok(Self { path: path.into(), model, vocabulary, calibration })
    }

    /// The token that a text begins with, where there is one.
    pub fn start(&self) -> Option<u32> {
        if self.vocabulary.is_bytes() { Some(0) } else { self.model.config().bos_token }
    }

    /// A cache with room for so many tokens.
    pub fn cache(&self, device: &Device, codec: impl Into<Choice>, tokens: usize) -> Result<SequenceCache> {
        let config = self.cache_config(codec.into(), tokens)?;
        Ok(SequenceCache::new(device, config, self.model.config())?)
    }

    /// Whether a cache's keys are calibrated: f32 has nothing to gain.
    pub fn calibrates(&self, codec: Choice) -> bool {
        self.calibration.is_some() && codec != CodecPair::both(Codec::F32).into()
    }

    /// What such a cache is.
    pub fn cache_config(&self, codec: Choice, tokens: usize) -> Result<CacheConfig> {
        let step = GenerateOptions::default().chunk;
        // There is one sequence.
        let config = self.model.config().cache_config_for(1, tokens, step).sink_sequences(1);
        let plan = self.calibration.as_ref().and_then(Calibration::plan);
        let config = match (codec, plan) {
            (Choice::Codec(codec), _) => config.cache_codec(codec),
            (Choice::Auto, Some(plan)) => plan.apply(config)?,
            (Choice::Auto, None) => config.codec(codecs::RECOMMENDED),
        };
        let newest = config.layer_recent(0).map_or(1, |recent| recent.positions.saturating_add(RECENT_SLACK));
        let held = newest.saturating_add(step + config.positions_per_page());
        let config = config.recent_capacity(held.min(tokens).max(1));
        match &self.calibration {
            Some(calibration) if self.calibrates(codec) => Ok(calibration.apply(config)?),
            _ => Ok(config),
        }
    }

    /// Lets the model go on after `tokens`, of which the cache holds a beginning, and hands over the text as it comes. Ends
    /// when interrupted, and at `emit`'s first error, which is in the result.
    pub fn go_on(
        &self,
        cache: &mut SequenceCache,
        tokens: &[u32],
        drawing: &Drawing,
        decoder: Decoder<'_>,
        mut emit: impl FnMut(&str) -> Result<()>,
    ) -> Result<Answer> {
        let (history, prompt) = tokens.split_at(cache.tokens()?.min(tokens.len()));
        let options = drawing.options(history);
        let bar = (prompt.len() > options.chunk).then(|| output::progress("reading", prompt.len())).transpose()?;
        let (mut text, mut emitted) = (String::new(), Ok(()));
        let generated = generate_text(&self.model, cache, prompt, &options, decoder, &drawing.stop, |progress| {
            match progress {
                TextProgress::Prompt(done) => {
                    if let Some(bar) = &bar {
                        bar.set_position(done as u64);
                        if done == prompt.len() {
                            bar.finish_and_clear();
                        }
                    }
                }
                TextProgress::Text(piece) => {
                    text.push_str(piece);
                    if emitted.is_ok() && !piece.is_empty() {
                        emitted = emit(piece);
                    }
                }
            }
            if emitted.is_err() || interrupt::requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        })?;
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        let report = self.report(cache, &text, &generated)?;
        let mut tokens = tokens[..history.len() + generated.prompt_tokens].to_vec();
        tokens.extend(&generated.tokens);
        Ok(Answer { tokens, report, emitted })
    }

    fn report(&self, cache: &SequenceCache, text: &str, generated: &Generated) -> Result<Report> {
        let kv = cache.kv();
        let config = kv.config();
        let (positions, held) = (cache.tokens()?, kv.usage().used);
        // What f16 would take for as many pages.
        let f16 = held as f64 * 16.0 / config.bits_per_element(positions)?;
        Ok(Report {
            text: text.into(),
            stop: match generated.stop {
                StopReason::MaxTokens => "max_tokens",
                StopReason::EndToken => "end_token",
                StopReason::ContextFull => "context_full",
                StopReason::StopString => "stop_string",
                StopReason::Callback => "interrupted",
            },
            codec: name(config),
            device: kv.device().to_string(),
            prompt_tokens: generated.prompt_tokens,
            tokens: generated.tokens.len(),
            prompt_tokens_per_second: generated.prompt_tokens_per_second(),
            tokens_per_second: generated.decode_tokens_per_second(),
            cache_bytes: held,
            cache_bytes_f16: f16.round() as usize,
        })
    }
}

/// What going on brought.
pub struct Answer {
    /// All tokens that have run or were drawn; the cache may lack the last.
    pub tokens: Vec<u32>,
    pub report: Report,
    /// The first error of handing over text.
    pub emitted: Result<()>,
}

#[derive(Serialize)]
pub struct Report {
    pub text: String,
    pub stop: &'static str,
    pub codec: String,
    pub device: String,
    pub prompt_tokens: usize,
    pub tokens: usize,
    pub prompt_tokens_per_second: f64,
    pub tokens_per_second: f64,
    pub cache_bytes: usize,
    pub cache_bytes_f16: usize,
}

impl Report {
    /// A line beside the text.
    pub fn line(&self) -> String {
        format!(
            "{} tokens after {} of the prompt ({}); {:.0} tokens/s (prompt {:.0}); cache {} in {} (f16 would take {})",
            self.tokens,
            self.prompt_tokens,
            self.stop,
            self.tokens_per_second,
            self.prompt_tokens_per_second,
            output::bytes(self.cache_bytes),
            self.codec,
            output::bytes(self.cache_bytes_f16),
        )
    }
}

/// What a cache's codecs are called.
fn name(config: &CacheConfig) -> String {
    let codec = config.layer_cache_codec(0);
    let same = (1..config.layers()).all(|layer| config.layer_cache_codec(layer) == codec);
    if same { codec.to_string() } else { "by layer".into() }
}
