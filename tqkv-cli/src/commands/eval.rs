//! `tqkv eval`

use crate::codecs::Compared;
use crate::language::{Center, Encode, Language};
use crate::{codecs, output, plot};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv::{Codec, CodecPair, Device};
use tqkv_candle::{
    Encoded, Fidelity, GenerateOptions, Haystack, SequenceCache, Windows, evaluate, find_needles, first_difference,
    run_freely,
};

/// Haystacks, each with a needle at every depth.
const HAYSTACKS: usize = 3;

/// What codecs cost a model's predictions of a text: bits a byte, divergence from the uncompressed cache.
///
/// The text is cut into windows from its beginning; the first token of each is replaced by the start token, and all
/// others are predicted. The first result is the uncompressed cache (f32) that the others are compared with.
#[derive(clap::Args)]
pub struct Eval {
    /// GGUF file, or Hugging Face directory
    #[arg(long, value_name = "PATH")]
    model: PathBuf,
    /// Text to predict
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    #[arg(long, value_name = "CODECS", value_delimiter = ',', value_parser = codecs::parse_compared, help = codecs::help())]
    codec: Option<Vec<Compared>>,
    /// Shifts and scales of the keys that `tqkv calibrate` measured, for all codecs but f32
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Without a calibration: subtract the mean of the keys of the first window, for all codecs but f32
    #[arg(long, value_enum, value_name = "OF", conflicts_with = "calibration")]
    center: Option<Center>,
    /// How codes are chosen
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    encode: Encode,
    /// Windows of the text [default: as many as it holds, at most 120]
    #[arg(long, value_name = "N")]
    windows: Option<usize>,
    /// Tokens of a window, at most one more than the model's context [default: the context, at most 2048]
    #[arg(long, value_name = "N", visible_alias = "window-tokens")]
    length: Option<usize>,
    /// Tell numbers at several depths of a window, ask for them at its end, and count how often each is the likeliest answer
    #[arg(long)]
    needle: bool,
    /// Depths of the needles, at even distances: 9 for every tenth of the window
    #[arg(long, value_name = "N", default_value_t = 9, requires = "needle")]
    depths: usize,
    /// Let the model write so many of its likeliest tokens after the beginning of each window (256 unless said otherwise), and
    /// look where they first differ from those with f16
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "256")]
    free_running: Option<usize>,
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
    /// In the long run, and for a sequence of a window's length.
    bits_per_element: f64,
    bits_at_length: f64,
    calibrated: bool,
    bits_per_byte: f64,
    /// Only where tokens are not bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    perplexity: Option<f64>,
    delta_percent: f64,
    kld: f64,
    /// 95 % intervals of the means.
    kld_interval: [f64; 2],
    kld_median: f64,
    kld_p99: f64,
    same_top1: f64,
    same_top1_interval: [f64; 2],
    #[serde(skip_serializing_if = "Option::is_none")]
    needles: Option<Vec<Depth>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_running: Option<FreeRunning>,
    windows: usize,
    device: String,
}

/// Needles at one depth.
#[derive(Serialize)]
struct Depth {
    depth: f64,
    needles: usize,
    found: usize,
    /// What an answer costs the model, on average.
    nats: f64,
}

/// Texts that the model wrote, beside those with f16.
#[derive(Serialize)]
struct FreeRunning {
    tokens: usize,
    texts: usize,
    identical: usize,
    /// Where each of the others first differs, in order.
    first_differences: Vec<usize>,
}

/// What is the same for all codecs.
struct Evaluation {
    language: Language,
    device: Device,
    windows: Windows,
    /// Tokens of the whole text, and what each begins with.
    text: Encoded,
    start: Option<u32>,
    length: usize,
    chunk: usize,
}

impl Eval {
    pub fn run(self) -> Result<ExitCode> {
        let (depths, most) = (self.depths, Haystack::MOST);
        ensure!((1..=most).contains(&depths), "--depths is {depths}, expected 1 to {most}");
        ensure!(self.free_running != Some(0), "--free-running is 0, expected at least 1");
        let device = Device::open(&self.device)?;
        let text = std::fs::read(&self.text).with_context(|| format!("cannot read {}", self.text.display()))?;
        // Before the work, which may take long.
        if let Some(path) = &self.plot {
            output::expect_writable(path)?;
        }
        let mut language = Language::load(&self.model, self.calibration.as_deref())?;
        language.encoding = self.encode.into();
        let reference = Compared::Cache(CodecPair::both(Codec::F32).into());
        let head_dim = language.model.config().head_dim;
        let usual = || codecs::usual(head_dim).into_iter().map(|codec| Compared::Cache(codec.into())).collect();
        let mut codecs = self.codec.clone().unwrap_or_else(usual);
        codecs.retain(|&codec| codec != reference);
        ensure!(self.plot.is_none() || !codecs.is_empty(), "--plot has nothing to draw: expected a codec besides f32");
        let evaluation = self.evaluation(language, device, &text)?;
        let haystacks = if self.needle { Some(evaluation.haystacks(depths)?) } else { None };
        if let Some(tokens) = self.free_running {
            let window = evaluation.windows.length();
            ensure!(tokens < window, "--free-running is {tokens}, expected less than the window's {window} tokens");
        }

        codecs.insert(0, reference);
        let mut rows = evaluation.predictions(&codecs)?;
        for (row, &codec) in rows.iter_mut().zip(&codecs) {
            row.needles = haystacks.as_ref().map(|haystacks| evaluation.find(codec, haystacks)).transpose()?;
        }
        if let Some(tokens) = self.free_running {
            let f16 = evaluation.write(Compared::Cache(CodecPair::both(Codec::F16).into()), tokens)?;
            for (row, &codec) in rows.iter_mut().zip(&codecs) {
                row.free_running = Some(compare(tokens, &f16, &evaluation.write(codec, tokens)?));
            }
        }
        self.print(&evaluation, &rows)?;
        if let Some(path) = &self.plot {
            let points: Vec<_> = rows
                .iter()
                .skip(1)
                .map(|row| plot::Point { name: &row.codec, bits: row.bits_per_element, kld: row.kld })
                .collect();
            let svg = plot::draw(&points)?;
            std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn evaluation(&self, mut language: Language, device: Device, text: &[u8]) -> Result<Evaluation> {
        let config = language.model.config();
        let text = language.vocabulary.encode(text)?;
        let length = self.length.unwrap_or(config.max_position_embeddings.min(2048));
        let count = self.windows.unwrap_or((text.tokens.len() / length.max(1)).clamp(1, 120));
        let start = language.start();
        let windows = Windows::new(&text, count, length, start)?;
        windows.expect_context(config.max_position_embeddings)?;
        let chunk = GenerateOptions::default().chunk;
        if let (Some(Center::Prompt), Some(window)) = (self.center, windows.iter().next()) {
            language.center_on(window)?;
        }
        Ok(Evaluation { language, device, windows, text, start, length, chunk })
    }

    fn print(&self, evaluation: &Evaluation, rows: &[Row]) -> Result<()> {
        if self.json {
            return rows.iter().try_for_each(output::print_json);
        }
        let measure = if evaluation.language.vocabulary.is_bytes() { "bits/byte" } else { "perplexity" };
        let header = [
            "codec",
            "bits/element",
            "at length",
            measure,
            "change of bits/byte",
            "KLD/token",
            "95 %",
            "median",
            "99 %",
            "same top-1",
        ];
        let cells = rows.iter().map(|row| {
            [
                row.codec.clone(),
                format!("{:.3}", row.bits_per_element),
                format!("{:.3}", row.bits_at_length),
                format!("{:.5}", row.perplexity.unwrap_or(row.bits_per_byte)),
                format!("{:+.3} %", row.delta_percent),
                format!("{:.6}", row.kld),
                format!("{:.6}–{:.6}", row.kld_interval[0], row.kld_interval[1]),
                format!("{:.6}", row.kld_median),
                format!("{:.6}", row.kld_p99),
                format!("{:.2} %", row.same_top1 * 100.0),
            ]
        });
        output::print(&output::table(header, cells))?;
        let (windows, length) = (&evaluation.windows, evaluation.length);
        let tokens = windows.len() * windows.run_length();
        let on = &evaluation.device;
        output::print(&format!("{} windows of {length} tokens, {tokens} predicted, on {on}\n", windows.len()))?;
        if self.needle {
            print_needles(rows)?;
        }
        if self.free_running.is_some() {
            print_free_running(rows)?;
        }
        Ok(())
    }
}

impl Evaluation {
    fn cache(&self, codec: Compared) -> Result<SequenceCache> {
        match codec {
            Compared::Cache(codec) => self.language.cache(&self.device, codec, self.length),
            Compared::Peer(peer) => {
                let model = self.language.model.config();
                let config = model.cache_config_for(1, self.length, self.chunk);
                Ok(SequenceCache::emulating(peer, config, model)?)
            }
        }
    }

    /// Bits an element: in the long run, and for a sequence of a window's length.
    fn bits(&self, codec: Compared) -> Result<[f64; 2]> {
        match codec {
            Compared::Cache(codec) => {
                let config = self.language.cache_config(codec, 1, self.length)?;
                Ok([config.bits_per_element(usize::MAX)?, config.bits_per_element(self.windows.run_length())?])
            }
            Compared::Peer(peer) => Ok([peer.bits_per_element(self.language.model.config().head_dim)?; 2]),
        }
    }

    /// How well tokens are predicted, by codec; the first is the reference.
    fn predictions(&self, codecs: &[Compared]) -> Result<Vec<Row>> {
        let mut caches = codecs.iter().map(|&codec| self.cache(codec)).collect::<Result<Vec<_>>>()?;
        let (reference, others) = caches.split_first_mut().context("no codecs")?;
        let bar = output::progress("windows", self.windows.len())?;
        let model = &self.language.model;
        let (baseline, others) = evaluate(model, reference, others, &self.windows, self.chunk, |done| {
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        let results = std::iter::once(baseline).chain(others);
        codecs.iter().zip(results).map(|(&codec, fidelity)| self.row(codec, &fidelity)).collect()
    }

    fn row(&self, codec: Compared, fidelity: &Fidelity) -> Result<Row> {
        let [bits_per_element, bits_at_length] = self.bits(codec)?;
        Ok(Row {
            codec: codec.to_string(),
            bits_per_element,
            bits_at_length,
            calibrated: matches!(codec, Compared::Cache(codec) if self.language.calibrates(codec)),
            bits_per_byte: fidelity.bits_per_byte(),
            perplexity: (!self.language.vocabulary.is_bytes()).then(|| fidelity.perplexity()),
            delta_percent: fidelity.delta_percent(),
            kld: fidelity.kld(),
            kld_interval: fidelity.kld_interval(),
            kld_median: fidelity.kld_median(),
            kld_p99: fidelity.kld_p99(),
            same_top1: fidelity.same_top1(),
            same_top1_interval: fidelity.same_top1_interval(),
            needles: None,
            free_running: None,
            windows: self.windows.len(),
            device: match codec {
                Compared::Cache(_) => self.device.to_string(),
                Compared::Peer(_) => Device::cpu().to_string(),
            },
        })
    }

    fn haystacks(&self, depths: usize) -> Result<Vec<Haystack>> {
        let (vocabulary, text) = (&self.language.vocabulary, &self.text.tokens);
        let hide = |round| Ok(Haystack::new(vocabulary, text, self.length, depths, round, self.start)?);
        (0..HAYSTACKS).map(hide).collect()
    }

    /// How many needles are found with a codec, by depth.
    fn find(&self, codec: Compared, haystacks: &[Haystack]) -> Result<Vec<Depth>> {
        let (mut cache, bar) = (self.cache(codec)?, output::progress("haystacks", haystacks.len())?);
        let mut depths: Vec<Depth> = vec![];
        for haystack in haystacks {
            for (i, found) in find_needles(&self.language.model, &mut cache, haystack, self.chunk)?.iter().enumerate() {
                if depths.len() == i {
                    depths.push(Depth { depth: found.depth, needles: 0, found: 0, nats: 0.0 });
                }
                depths[i].needles += 1;
                depths[i].found += usize::from(found.found);
                depths[i].nats += found.nats / haystacks.len() as f64;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(depths)
    }

    /// What the model writes with a codec after the beginning of each window.
    fn write(&self, codec: Compared, tokens: usize) -> Result<Vec<Vec<u32>>> {
        let (mut cache, bar) = (self.cache(codec)?, output::progress("texts", self.windows.len())?);
        let texts = self.windows.iter().map(|window| {
            let prompt = &window[..window.len() - tokens];
            bar.inc(1);
            Ok(run_freely(&self.language.model, &mut cache, prompt, tokens)?)
        });
        let texts = texts.collect();
        bar.finish_and_clear();
        texts
    }
}

fn compare(tokens: usize, expected: &[Vec<u32>], got: &[Vec<u32>]) -> FreeRunning {
    let mut first_differences: Vec<usize> =
        expected.iter().zip(got).filter_map(|(expected, got)| first_difference(expected, got)).collect();
    first_differences.sort_unstable();
    let identical = expected.len() - first_differences.len();
    FreeRunning { tokens, texts: expected.len(), identical, first_differences }
}

fn print_needles(rows: &[Row]) -> Result<()> {
    let cells = rows.iter().flat_map(|row| row.needles.iter().flatten().map(move |depth| (row, depth)));
    let cells = cells.map(|(row, depth)| {
        [
            row.codec.clone(),
            format!("{:.0} %", depth.depth * 100.0),
            format!("{} of {}", depth.found, depth.needles),
            format!("{:.4}", depth.nats),
        ]
    });
    output::print(&output::table(["codec", "depth", "found", "nats an answer"], cells))
}

fn print_free_running(rows: &[Row]) -> Result<()> {
    let runs = rows.iter().filter_map(|row| Some((row, row.free_running.as_ref()?)));
    let cells = runs.map(|(row, run)| {
        let at = |place: fn(&[usize]) -> Option<usize>| {
            place(&run.first_differences).map_or("-".to_owned(), |at| at.to_string())
        };
        [
            row.codec.clone(),
            format!("{} of {}", run.identical, run.texts),
            at(|all| all.first().copied()),
            at(|all| all.get(all.len() / 2).copied()),
        ]
    });
    let tokens = rows.iter().find_map(|row| Some(row.free_running.as_ref()?.tokens)).unwrap_or_default();
    output::print(&output::table(["codec", "same text as f16", "first difference", "median of them"], cells))?;
    output::print(&format!("{tokens} tokens written greedily after the beginning of each window\n"))
}
