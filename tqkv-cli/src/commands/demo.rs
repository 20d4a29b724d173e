//! `tqkv demo`

use crate::{codecs, output};
use anyhow::Result;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use tqkv::{Codec, CodecPair, Device};
use tqkv_candle::{
    GenerateOptions, Llama, LlamaConfig, SequenceCache, TextProgress, Vocabulary, Weights, Windows, evaluate, generate,
    generate_text,
};

const CONFIG: &[u8] = include_bytes!("../../assets/byte-llama-4m/config.json");
const WEIGHTS: &[u8] = include_bytes!("../../assets/byte-llama-4m/model.safetensors");
/// Text that the model has not seen.
const HELD_OUT: &[u8] = include_bytes!("../../assets/heldout.txt");

const PROMPT: &str = "ROMEO:\n";
const SHOWN_TOKENS: usize = 480;
/// Tokens that each codec's speed is measured over, at the end of a full context.
const TIMED_TOKENS: usize = 128;

/// Generates text on a compressed cache and compares codecs, with a small model that is part of this program.
#[derive(clap::Args)]
pub struct Demo {
    /// Device of the cache: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    device: String,
}

impl Demo {
    pub fn run(self) -> Result<ExitCode> {
        let device = Device::open(&self.device)?;
        let config = LlamaConfig::parse(CONFIG, Path::new("byte-llama-4m/config.json"))?;
        let weights = Weights::parse(WEIGHTS, Path::new("byte-llama-4m/model.safetensors"))?;
        let model = Llama::new(config, weights)?;
        show_text(&model, &device)?;
        show_table(&model, &device)?;
        Ok(ExitCode::SUCCESS)
    }
}

fn cache(model: &Llama, device: &Device, codec: CodecPair) -> Result<SequenceCache> {
    let config = model.config();
    Ok(SequenceCache::new(device, config.cache_config().codec(codec), config)?)
}

fn show_text(model: &Llama, device: &Device) -> Result<()> {
    let codec = CodecPair::both(Codec::tq(4));
    let config = model.config();
    output::print(&format!(
        "byte-llama-4m ({} layers, {} KV heads of {}) writes on a {codec} cache on {device}:\n\n{PROMPT}",
        config.layers, config.kv_heads, config.head_dim
    ))?;
    let mut cache = cache(model, device, codec)?;
    let options = GenerateOptions { max_tokens: SHOWN_TOKENS, temperature: 0.6, seed: 2, ..GenerateOptions::default() };
    let prompt = Vocabulary::Bytes.encode_prompt(PROMPT)?;
    let decoder = Vocabulary::Bytes.decoder();
    let mut printed = Ok(());
    let generated = generate_text(model, &mut cache, &prompt, &options, decoder, &[], |progress| {
        if let TextProgress::Text(text) = progress {
            printed = output::print(text);
        }
        if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    printed?;
    output::print(&format!(
        "\n\n{} bytes at {:.0} a second\n\n",
        generated.tokens.len(),
        generated.decode_tokens_per_second()
    ))
}

fn show_table(model: &Llama, device: &Device) -> Result<()> {
    let codecs = codecs::USUAL.iter().map(|name| name.parse()).collect::<Result<Vec<CodecPair>, _>>()?;
    let length = model.config().max_position_embeddings;
    let text = Vocabulary::Bytes.encode(HELD_OUT)?;
    let windows = Windows::new(&text, text.tokens.len() / length, length, Some(0))?;

    let bar = output::progress("comparing codecs", windows.len() + codecs.len())?;
    let mut caches = codecs.iter().map(|&codec| cache(model, device, codec)).collect::<Result<Vec<_>>>()?;
    let mut reference = cache(model, device, CodecPair::both(Codec::F32))?;
    let (_, results) = evaluate(model, &mut reference, &mut caches, &windows, length, |_| bar.inc(1))?;

    let mut rows = Vec::new();
    for ((codec, cache), fidelity) in codecs.iter().zip(&mut caches).zip(results) {
        // A prompt that leaves just enough of the context.
        cache.truncate(0)?;
        let prompt = &text.tokens[..length - TIMED_TOKENS];
        let options = GenerateOptions { max_tokens: TIMED_TOKENS, ..GenerateOptions::default() };
        let generated = generate(model, cache, prompt, &options, |_| ControlFlow::Continue(()))?;
        bar.inc(1);
        rows.push([
            codec.to_string(),
            output::bytes(cache.kv().bytes()),
            format!("{:.3}", codec.bits_per_element(model.config().head_dim)?),
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
         the context\n",
        windows.len()
    ))
}
