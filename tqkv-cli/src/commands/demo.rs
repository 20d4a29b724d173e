//! `tqkv demo`

use crate::codecs::Choice;
use crate::language::Language;
use crate::{codecs, output};
use anyhow::Result;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tqkv::{Codec, CodecPair, Device};
use tqkv_candle::{
    GenerateOptions, Model, ModelConfig, SequenceCache, TextProgress, Vocabulary, Weights, Windows, evaluate, generate,
    generate_text,
};

const CONFIG: &[u8] = include_bytes!("../../assets/byte-llama-4m/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../assets/byte-llama-4m/model.safetensors");
/// Text that the model has not seen.
const HELD_OUT: &[u8] = include_bytes!("../../assets/heldout.txt");

/// Tokens that codecs are compared over at a time, at most.
const WINDOW: usize = 1024;
const PROMPT: &str = "ROMEO:\n";
const SHOWN_TOKENS: usize = 480;
/// Tokens that each codec's speed is measured over, at the end of a full window.
const TIMED_TOKENS: usize = 128;

/// Generates text on a compressed cache and compares codecs, with a small model that is part of this program or with one of
/// your own.
#[derive(clap::Args)]
pub struct Demo {
    /// GGUF file, or Hugging Face directory [default: the model that is part of this program]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,
    /// Device of the cache: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    device: String,
}

impl Demo {
    pub fn run(self) -> Result<ExitCode> {
        let device = Device::open(&self.device)?;
        let language = self.model.map_or_else(built_in, |path| Language::load(&path, None))?;
        show_text(&language, &device)?;
        show_table(&language, &device)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn built_in() -> Result<Language> {
    let config = ModelConfig::parse(CONFIG, Path::new("byte-llama-4m/config.json"))?;
    let weights = Weights::parse(WEIGHTS, Path::new("byte-llama-4m/model.safetensors"))?;
    let model = Model::new(config, weights)?;
    Ok(Language::new("byte-llama-4m".into(), model, Vocabulary::Bytes))
}

/// Tokens of a window.
fn length(language: &Language) -> usize {
    language.model.config().max_position_embeddings.min(WINDOW)
}

fn cache(language: &Language, device: &Device, codec: impl Into<Choice>) -> Result<SequenceCache> {
    language.cache(device, codec, length(language))
}

fn show_text(language: &Language, device: &Device) -> Result<()> {
    let codec = CodecPair::both(Codec::tq(4));
    let (model, vocabulary) = (&language.model, &language.vocabulary);
    let config = model.config();
    output::print(&format!(
        "{} ({} layers, {} KV heads of {}) writes on a {codec} cache on {device}:\n\n{PROMPT}",
        language.path.display(),
        config.layers,
        config.kv_heads,
        config.head_dim
    ))?;
    let mut cache = cache(language, device, codec)?;
    let options = GenerateOptions { max_tokens: SHOWN_TOKENS, temperature: 0.6, seed: 2, ..GenerateOptions::default() };
    let prompt = vocabulary.encode_prompt(PROMPT)?;
    let mut printed = Ok(());
    let generated = generate_text(model, &mut cache, None, &prompt, &options, vocabulary.decoder(), &[], |progress| {
        if let (TextProgress::Text(text), true) = (progress, printed.is_ok()) {
            printed = output::print(text);
        }
        if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    printed?;
    let what = if vocabulary.is_bytes() { "bytes" } else { "tokens" };
    let (tokens, rate) = (generated.tokens.len(), generated.decode_tokens_per_second());
    output::print(&format!("\n\n{tokens} {what} at {rate:.0} a second\n\n"))
}

fn show_table(language: &Language, device: &Device) -> Result<()> {
    let (model, config) = (&language.model, language.model.config());
    let codecs = codecs::usual(config.head_dim);
    let text = language.vocabulary.encode(HELD_OUT)?;
    let length = length(language).min(text.tokens.len());
    let start = language.start();
    let windows = Windows::new(&text, text.tokens.len() / length.max(1), length, start)?;

    let bar = output::progress("comparing codecs", windows.len() + codecs.len())?;
    let mut caches = codecs.iter().map(|&codec| cache(language, device, codec)).collect::<Result<Vec<_>>>()?;
    let mut reference = cache(language, device, CodecPair::both(Codec::F32))?;
    let chunk = GenerateOptions::default().chunk;
    let (_, results) = evaluate(model, &mut reference, &mut caches, &windows, chunk, |_| bar.inc(1))?;

    let mut rows = Vec::new();
    for ((codec, cache), fidelity) in codecs.iter().zip(&mut caches).zip(results) {
        // A prompt that leaves just enough of the window.
        cache.truncate(0)?;
        let prompt = &text.tokens[..length - TIMED_TOKENS.min(length / 2)];
        let options = GenerateOptions { max_tokens: length - prompt.len(), ..GenerateOptions::default() };
        let generated = generate(model, cache, prompt, &options, |_| ControlFlow::Continue(()))?;
        bar.inc(1);
        rows.push([
            codec.to_string(),
            output::bytes(cache.kv().bytes()),
            format!("{:.3}", codec.all.bits_per_element(config.head_dim)?),
            format!("{:.6}", fidelity.kld()),
            format!("{:.2} %", fidelity.same_top1() * 100.0),
            format!("{:.0}", generated.decode_tokens_per_second()),
        ]);
    }
    bar.finish_and_clear();
    let header = ["codec", "cache", "bits/element", "KLD/token", "same top-1", "tokens/s"];
    output::print(&output::table(header, rows))?;
    output::print(&format!(
        "cache: {length} tokens; KLD and top-1: against f32, over {} windows of unseen text; tokens/s: near the end of \
         the window\n",
        windows.len()
    ))
}
