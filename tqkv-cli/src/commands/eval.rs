//! `tqkv eval`

use crate::{codecs, output, plot};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv::{Codec, CodecPair, Device};
use tqkv_candle::{Fidelity, Llama, SequenceCache, Vocabulary, Windows, evaluate};

/// Tokens that run through the model at a time.
const CHUNK: usize = 512;

/// What codecs cost a model's predictions of a text: bits a byte, divergence from the uncompressed cache.
///
/// The text is cut into windows from its beginning; the first token of each is replaced by the start token, and all
/// others are predicted. The first result is the uncompressed cache (f32) that the others are compared with.
#[derive(clap::Args)]
pub struct Eval {
    /// Hugging Face directory of a Llama model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text to predict
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    #[arg(long, value_name = "CODECS", value_delimiter = ',', value_parser = codecs::parse, help = codecs::help())]
    codec: Option<Vec<CodecPair>>,
    /// Windows of the text [default: as many as it holds, at most 120]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Tokens of a window [default: the model's context, at most 2048]
    #[arg(long, value_name = "N")]
    window_tokens: Option<usize>,
    /// Device of the cache: cpu, wgpu, wgpu:N, cuda or cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    device: String,
    /// Print one JSON object a codec
    #[arg(long)]
    json: bool,
    /// Draw the divergence against the bits an element
    #[arg(long, value_name = "SVG")]
    plot: Option<PathBuf>,
}

#[derive(Serialize)]
struct Row {
    codec: String,
    bits_per_element: f64,
    bits_per_byte: f64,
    /// Only where tokens are not bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    perplexity: Option<f64>,
    delta_percent: f64,
    kld: f64,
    same_top1: f64,
    windows: usize,
    device: String,
}

impl Eval {
    pub fn run(self) -> Result<ExitCode> {
        let device = Device::open(&self.device)?;
        let text = std::fs::read(&self.text).with_context(|| format!("cannot read {}", self.text.display()))?;
        // Before the work, which may take long.
        if let Some(path) = &self.plot {
            output::expect_writable(path)?;
        }
        let model = Llama::load(&self.model).context("cannot load the model")?;
        let config = model.config();
        let vocabulary = Vocabulary::load(&self.model, config)?;
        let text = vocabulary.encode(&text)?;
        let length = self.window_tokens.unwrap_or(config.max_position_embeddings.min(2048));
        let count = self.windows.unwrap_or((text.tokens.len() / length.max(1)).clamp(1, 120));
        let start = if vocabulary.is_bytes() { Some(0) } else { config.bos_token };
        let windows = Windows::new(&text, count, length, start)?;
        windows.expect_context(config.max_position_embeddings)?;

        let cache = |codec| SequenceCache::new(&device, config.cache_config().codec(codec).capacity(length), config);
        let reference = CodecPair::both(Codec::F32);
        let mut codecs = self.codec.unwrap_or_else(|| codecs::usual(config.head_dim));
        codecs.retain(|&codec| codec != reference);
        ensure!(self.plot.is_none() || !codecs.is_empty(), "--plot has nothing to draw: expected a codec besides f32");
        let mut caches = codecs.iter().map(|&codec| cache(codec)).collect::<Result<Vec<_>, _>>()?;
        let bar = output::progress("windows", windows.len())?;
        let (baseline, results) = evaluate(&model, &mut cache(reference)?, &mut caches, &windows, CHUNK, |done| {
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();

        let row = |codec: CodecPair, fidelity: &Fidelity| -> Result<Row> {
            Ok(Row {
                codec: codec.to_string(),
                bits_per_element: codec.bits_per_element(config.head_dim)?,
                bits_per_byte: fidelity.bits_per_byte(),
                perplexity: (!vocabulary.is_bytes()).then(|| fidelity.perplexity()),
                delta_percent: fidelity.delta_percent(),
                kld: fidelity.kld(),
                same_top1: fidelity.same_top1(),
                windows: windows.len(),
                device: device.to_string(),
            })
        };
        let mut rows = vec![row(reference, &baseline)?];
        for (&codec, fidelity) in codecs.iter().zip(&results) {
            rows.push(row(codec, fidelity)?);
        }
        if self.json {
            rows.iter().try_for_each(output::print_json)?;
        } else {
            let measure = if vocabulary.is_bytes() { "bits/byte" } else { "perplexity" };
            let header = ["codec", "bits/element", measure, "change of bits/byte", "KLD/token", "same top-1"];
            let cells = rows.iter().map(|row| {
                [
                    row.codec.clone(),
                    format!("{:.3}", row.bits_per_element),
                    format!("{:.5}", row.perplexity.unwrap_or(row.bits_per_byte)),
                    format!("{:+.3} %", row.delta_percent),
                    format!("{:.6}", row.kld),
                    format!("{:.2} %", row.same_top1 * 100.0),
                ]
            });
            output::print(&output::table(header, cells))?;
            let tokens = baseline.tokens;
            output::print(&format!("{} windows of {length} tokens, {tokens} predicted, on {device}\n", windows.len()))?;
        }
        if let Some(path) = self.plot {
            let points: Vec<_> = rows
                .iter()
                .skip(1)
                .map(|row| plot::Point { name: &row.codec, bits: row.bits_per_element, kld: row.kld })
                .collect();
            let svg = plot::draw(&points)?;
            std::fs::write(&path, svg).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
