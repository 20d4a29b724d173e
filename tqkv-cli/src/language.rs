//! What `generate` and `chat` have in common: a model with its vocabulary, and text out of it.

use crate::codecs::Choice;
use crate::{codecs, interrupt, output};
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tqkv::cache::RECENT_SLACK;
use tqkv::format::Encoding;
use tqkv::{CacheConfig, Codec, CodecPair, Device, KvCache};
use tqkv_candle::{
    Calibration, Decoder, Draft, GenerateOptions, Generated, Model, SequenceCache, StopReason, TextProgress,
    Vocabulary, fingerprint, generate_text,
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
    /// Without a calibration: subtract the mean of the keys of the first prompt, which is read twice for that (its first 2048
    /// tokens). It is kept with what is saved
    #[arg(long, value_enum, value_name = "OF", conflicts_with = "calibration")]
    pub center: Option<Center>,
    /// How codes are chosen
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    pub encode: Encode,
    /// Device of the cache: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    pub device: String,
}

/// How codes are chosen.
#[derive(clap::ValueEnum, Clone, Copy, Debug, Default, PartialEq)]
pub enum Encode {
    /// The levels that are nearest to the elements
    #[default]
    Nearest,
    /// With the best of 13 gains: smaller errors, slower writing; on the CPU only
    Search,
}

impl From<Encode> for Encoding {
    fn from(encode: Encode) -> Self {
        match encode {
            Encode::Nearest => Encoding::Nearest,
            Encode::Search => Encoding::Search,
        }
    }
}

/// What the mean of the keys is taken from.
#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq)]
pub enum Center {
    /// The first prompt
    Prompt,
}

/// A small model that proposes what the large one checks.
#[derive(clap::Args)]
pub struct Drafting {
    /// Small model with the same vocabulary that proposes tokens, which the model checks several at a time: the same text, sooner
    /// if most proposals hold
    #[arg(long, value_name = "PATH")]
    draft: Option<PathBuf>,
    /// Tokens that are proposed at a time, 1 to 64
    #[arg(long, value_name = "N", default_value_t = 4, requires = "draft")]
    draft_tokens: usize,
}

impl Drafting {
    /// Whether there is one.
    pub fn drafts(&self) -> bool {
        self.draft.is_some()
    }

    /// With room for so many tokens of a text.
    pub fn load(&self, language: &Language, tokens: usize) -> Result<Option<Drafter>> {
        let Some(path) = &self.draft else { return Ok(None) };
        let small = Language::load(path, None).context("draft")?;
        for text in ["Text and (code): a[0] += 1;\n", "\u{e9}\u{4e2d}\u{1f600} 0123"] {
            let same = small.vocabulary.encode_prompt(text)? == language.vocabulary.encode_prompt(text)?;
            ensure!(same, "{} has another vocabulary than {}", path.display(), language.path.display());
        }
        let config = small.model.config();
        // Windows are kept whole, so that proposals can be taken back. Few bits would cost proposals.
        let cache = CacheConfig::new(config.layers, config.kv_heads, config.head_dim)
            .capacity(tokens.min(config.max_position_embeddings))
            .codec(CodecPair::both(Codec::F16));
        let cache = SequenceCache::new(&Device::cpu(), cache)?;
        Ok(Some(Drafter { model: small.model, cache, tokens: self.draft_tokens }))
    }
}

/// A small model with its cache.
pub struct Drafter {
    model: Model,
    pub cache: SequenceCache,
    tokens: usize,
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

    /// Strings that end the text.
    pub fn stop(&self) -> &[String] {
        &self.stop
    }

    /// `history` are the tokens before the prompt.
    pub fn options(&self, history: &[u32]) -> GenerateOptions {
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
    /// How its caches choose codes.
    pub encoding: Encoding,
    /// Whether the calibration was made of a prompt.
    centered: bool,
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
        Ok(Self { calibration, ..Self::new(path.into(), model, vocabulary) })
    }

    /// Without a calibration.
    pub fn new(path: PathBuf, model: Model, vocabulary: Vocabulary) -> Self {
        Self { path, model, vocabulary, calibration: None, encoding: Encoding::default(), centered: false }
    }

    /// Makes a calibration of the first prompt, unless there is one.
    pub fn center_on(&mut self, prompt: &[u32]) -> Result<()> {
        if self.calibration.is_none() {
            let spinner = output::spinner("looking at the prompt's keys");
            self.center_as(Calibration::of_prompt(&self.model, prompt).context("--center prompt")?);
            spinner.finish_and_clear();
        }
        Ok(())
    }

    /// Takes a calibration that was made of a prompt before.
    pub fn center_as(&mut self, calibration: Calibration) {
        (self.calibration, self.centered) = (Some(calibration), true);
    }

    /// The calibration, if it was made of a prompt.
    pub fn center(&self) -> Option<&Calibration> {
        self.calibration.as_ref().filter(|_| self.centered)
    }

    /// The token that a text begins with, where there is one.
    pub fn start(&self) -> Option<u32> {
        if self.vocabulary.is_bytes() { Some(0) } else { self.model.config().bos_token }
    }

    /// A cache with room for so many tokens.
    pub fn cache(&self, device: &Device, codec: impl Into<Choice>, tokens: usize) -> Result<SequenceCache> {
        let config = self.cache_config(codec.into(), 1, tokens)?;
        Ok(SequenceCache::new(device, config)?)
    }

    /// Whether a cache's keys are calibrated: f32 has nothing to gain.
    pub fn calibrates(&self, codec: Choice) -> bool {
        self.calibration.is_some() && codec != CodecPair::both(Codec::F32).into()
    }

    /// What a cache is with room for so many sequences of so many tokens.
    pub fn cache_config(&self, codec: Choice, sequences: usize, tokens: usize) -> Result<CacheConfig> {
        let step = GenerateOptions::default().chunk;
        let config = self.model.config().cache_config_for(sequences, tokens, step).sink_sequences(sequences);
        let plan = self.calibration.as_ref().and_then(Calibration::plan);
        let config = match (codec, plan) {
            (Choice::Codec(codec), _) => config.cache_codec(codec),
            (Choice::Auto, Some(plan)) => plan.apply(config)?,
            (Choice::Auto, None) => config.codec(codecs::RECOMMENDED),
        };
        let newest = config.layer_recent(0).map_or(1, |recent| recent.positions.saturating_add(RECENT_SLACK));
        let held = newest.saturating_add(step + config.positions_per_page());
        let page = config.positions_per_page();
        let held = held.min(tokens).max(1).div_ceil(page).saturating_mul(page);
        let config = config.recent_capacity(held.saturating_mul(sequences)).encoding(self.encoding);
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
        drafter: Option<&mut Drafter>,
        tokens: &[u32],
        drawing: &Drawing,
        decoder: Decoder<'_>,
        mut emit: impl FnMut(&str) -> Result<()>,
    ) -> Result<Answer> {
        let (history, prompt) = tokens.split_at(cache.tokens()?.min(tokens.len()));
        let options = drawing.options(history);
        let bar = (prompt.len() > options.chunk).then(|| output::progress("reading", prompt.len())).transpose()?;
        let (mut text, mut emitted) = (String::new(), Ok(()));
        let draft = drafter.map(|d| Draft::new(&d.model, &mut d.cache, d.tokens)).transpose()?;
        let (draft, stop) = (&mut { draft }, drawing.stop());
        let draft = draft.as_mut();
        let generated = generate_text(&self.model, cache, draft, prompt, &options, decoder, stop, |progress| {
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
        let report = self.report(cache.kv(), cache.tokens()?, text, &generated)?;
        let mut tokens = tokens[..history.len() + generated.prompt_tokens].to_vec();
        tokens.extend(&generated.tokens);
        Ok(Answer { tokens, report, emitted })
    }

    /// Of a text whose sequence has so many positions.
    pub fn report(&self, kv: &KvCache, positions: usize, text: String, generated: &Generated) -> Result<Report> {
        let (config, held) = (kv.config(), kv.usage().used);
        // What f16 would take for as many pages.
        let f16 = held as f64 * 16.0 / config.bits_per_element(positions)?;
        Ok(Report {
            text,
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
            cache_reserved_bytes: kv.bytes(),
            weight_bytes: self.model.weight_bytes(),
            peak_bytes: peak_bytes(),
            draft: (generated.drafted > 0).then(|| Drafted {
                proposed: generated.drafted,
                accepted: generated.accepted,
                acceptance: generated.accepted as f64 / generated.drafted as f64,
            }),
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
    /// Of all texts that were generated together.
    pub cache_bytes: usize,
    pub cache_bytes_f16: usize,
    /// What the cache took when it was made, for all that it has room for.
    pub cache_reserved_bytes: usize,
    pub weight_bytes: usize,
    /// The most memory that the program has had by then, where the system says it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peak_bytes: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub draft: Option<Drafted>,
}

/// What became of a draft's proposals.
#[derive(Serialize)]
pub struct Drafted {
    proposed: usize,
    accepted: usize,
    acceptance: f64,
}

/// The largest resident set so far.
fn peak_bytes() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

impl Report {
    /// A line beside the text.
    pub fn line(&self) -> String {
        let draft = self.draft.as_ref().map_or(String::new(), |d| {
            format!("; {} of {} drafted tokens held ({:.0} %)", d.accepted, d.proposed, d.acceptance * 100.0)
        });
        format!(
            "{} tokens after {} of the prompt ({}); {:.0} tokens/s (prompt {:.0}){draft}; cache {} in {} (f16 would take {})",
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
