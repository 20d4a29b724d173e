//! `tqkv bench`

mod bandwidth;
mod check;
mod clock;
mod meter;
mod operations;
mod shape;
mod step;

use crate::codecs;
use anyhow::{Result, ensure};
use clap::ValueEnum;
use meter::Meter;
use shape::Shape;
use std::process::ExitCode;
use tqkv::cache::CacheCodec;
use tqkv::compute::DeviceKind;
use tqkv::format::CodecPair;
use tqkv::{DType, Device};

/// Times each operation with inputs that are in no cache, and checks what it computed.
///
/// Bytes are those of stored vectors, inputs and outputs that an operation must move; their share is of the bandwidth
/// that plain reading (attention) or copying (all else) reaches on the device in the same process. On a GPU times are by its own clock:
/// the median of bursts of many operations (on CUDA each burst is a graph), and beside it the mean of 0.3 seconds without a pause. f16 is the cache that is not
/// compressed.
#[derive(clap::Args)]
pub struct Bench {
    /// Device: cpu, wgpu, wgpu:N, cuda, cuda:N
    #[arg(long, value_name = "D", default_value = "cpu")]
    device: String,
    /// Operations, separated by commas
    #[arg(long, value_name = "OPS", value_delimiter = ',', value_enum, default_values_t = Op::value_variants().to_vec())]
    op: Vec<Op>,
    #[arg(long, value_name = "CODECS", value_delimiter = ',', value_parser = codecs::parse, help = codecs::HELP,
          default_values = ["f16", "seed4", "seed8", "k8v8", "k6v6", "k5v4", "k4v4", "k4v3", "k3v3", "k2v2"])]
    codec: Vec<CacheCodec>,
    /// What attention runs over, separated by commas: BATCHxHEADS/KV_HEADSxHEAD_DIMxCONTEXT, as 8x32/8x128x32768. A context of
    /// 128-16384 means lengths between these, log-uniform [default: several, by device]
    #[arg(long, value_name = "SHAPES", value_delimiter = ',', value_parser = str::parse::<Shape>)]
    shape: Vec<Shape>,
    /// Positions that are encoded, decoded or rotated at a time [default: 4096 on a processor, 32768 on a GPU]
    #[arg(long, value_name = "N")]
    positions: Option<usize>,
    /// Attention over the shapes of models that people run in place of --shape: heads, head_dim and their ratio
    #[arg(long, conflicts_with = "shape")]
    models: bool,
    /// New tokens of prefill, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [operations::PREFILL])]
    prompt: Vec<usize>,
    /// Tokens before those of prefill, separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [0])]
    history: Vec<usize>,
    /// Sequences of prefill, each of which has its prompt and its history
    #[arg(long, value_name = "N", default_value_t = 1)]
    sequences: usize,
    /// Type of the queries of attention and prefill [default: f16 on CUDA, else f32]. f16 allows half precision, which is faster on
    /// CUDA and on a processor with AVX-512
    #[arg(long, value_name = "TYPE", value_delimiter = ',', value_enum)]
    query: Vec<Query>,
    /// Where attention finds page tables and lengths. On the device they are read and planned for by `refresh`, which is timed too
    #[arg(long, value_name = "PLACE", value_enum, default_value = "host")]
    tables: Tables,
    /// MiB of inputs that are used in turn: more than the device's caches hold
    #[arg(long, value_name = "MIB", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    cold: u16,
    /// Layers of a step
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..))]
    layers: u16,
    /// Threads, on the CPU [default: one a logical core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object a measurement
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Op {
    /// Vectors into the cache, K and V
    Quantize,
    /// One new token a sequence into the cache, K and V
    Append,
    /// The cache into f32 and f16, still rotated
    Dequantize,
    /// The cache into f32 and f16, as the model's own vectors
    Restore,
    /// Signs and transform of f32 vectors
    Rotate,
    /// One query a sequence over the cache
    Attention,
    /// New tokens with a causal mask, encoding included; on the CPU also candle's dense f32
    Prefill,
    /// A decoding step of all layers: append and attend, one token a sequence, by the clock of the host
    Step,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Tables {
    Host,
    Device,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Query {
    F32,
    F16,
}

impl Bench {
    pub fn run(self) -> Result<ExitCode> {
        let device = match (self.device.as_str(), self.threads) {
            ("cpu", Some(threads)) => Device::cpu_with_threads(threads)?,
            (name, None) => Device::open(name)?,
            (name, Some(_)) => anyhow::bail!("--threads is for the cpu, got --device {name}"),
        };
        let gpu = device.info().is_gpu;
        let positions = self.positions.unwrap_or(if gpu { 32_768 } else { 4096 });
        ensure!(positions > 0, "--positions is 0, expected at least 1");
        let given = !self.shape.is_empty();
        ensure!(!self.prompt.contains(&0), "--prompt is 0, expected at least 1");
        ensure!(self.sequences > 0, "--sequences is 0, expected at least 1");
        let shapes = match self.shape {
            _ if self.models => model_shapes(gpu),
            shapes if shapes.is_empty() => default_shapes(&device, gpu),
            shapes => shapes,
        };
        let meter = Meter::new(device, usize::from(self.cold) << 20, self.json)?;
        let pairs = self.codec.iter().map(|&codec| match CacheCodec::from(codec.all) == codec {
            true => Ok(codec.all),
            false => Err(anyhow::anyhow!(
                "{codec} stores positions a second time, expected one of a kind for all but --op step"
            )),
        });
        let pairs = match self.op[..] {
            [Op::Step] => vec![],
            _ => pairs.collect::<Result<Vec<CodecPair>>>()?,
        };
        let queries = self.query.iter().map(|query| match query {
            Query::F32 => DType::F32,
            Query::F16 => DType::F16,
        });
        let queries: Vec<DType> = if self.query.is_empty() { vec![meter.query_dtype()] } else { queries.collect() };
        for &op in &self.op {
            match op {
                Op::Quantize => pairs.iter().try_for_each(|&codec| meter.quantize(codec, positions))?,
                Op::Append => pairs.iter().try_for_each(|&codec| meter.append(codec))?,
                Op::Dequantize => pairs.iter().try_for_each(|&codec| meter.dequantize(codec, positions))?,
                Op::Restore => pairs.iter().try_for_each(|&codec| meter.restore(codec, positions))?,
                Op::Rotate => meter.rotate(positions)?,
                Op::Attention => {
                    for (shape, &codec) in shapes.iter().flat_map(|shape| pairs.iter().map(move |codec| (shape, codec)))
                    {
                        queries.iter().try_for_each(|&query| meter.attention(codec, shape, query, self.tables))?;
                    }
                }
                Op::Step => {
                    let shapes = if given { shapes.clone() } else { step_shapes(gpu) };
                    for shape in &shapes {
                        let layers = usize::from(self.layers);
                        self.codec.iter().try_for_each(|&codec| meter.step(codec, shape, layers))?;
                    }
                }
                Op::Prefill => {
                    for (&prompt, &history) in self.prompt.iter().flat_map(|n| self.history.iter().map(move |h| (n, h)))
                    {
                        for (&codec, &query) in pairs.iter().flat_map(|codec| queries.iter().map(move |q| (codec, q))) {
                            meter.prefill(codec, (self.sequences, prompt, history), query)?;
                        }
                    }
                    if meter.device.info().kind == DeviceKind::Cpu && self.prompt.contains(&operations::PREFILL) {
                        meter.candle_prefill()?;
                    }
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn step_shapes(gpu: bool) -> Vec<Shape> {
    let names: &[&str] = match gpu {
        true => &["1x32/8x128x1024", "1x32/8x128x32768", "8x32/8x128x8192", "64x32/8x128x2048"],
        false => &["1x32/8x128x1024", "1x32/8x128x4096"],
    };
    parsed(names)
}

/// SmolLM2, Llama 3.2 1B, Llama 3 8B, Qwen2.5 7B, Qwen3 14B, Phi 3, Gemma 3 270M and Gemma 2.
fn model_shapes(gpu: bool) -> Vec<Shape> {
    let models = [("9/3x64", 1), ("32/8x64", 1), ("32/8x128", 1), ("28/4x128", 1), ("40/8x128", 1), ("32/32x96", 4)];
    let models = models.into_iter().chain([("4/1x256", 1), ("16/8x256", 2)]);
    let (batch, context) = if gpu { (8, 32_768) } else { (1, 8192) };
    // Shorter where there are many heads, on a GPU, as its memory holds several caches.
    let name =
        |(heads, shorter): (&str, usize)| format!("{batch}x{heads}x{}", if gpu { context / shorter } else { context });
    models.map(|model| name(model).parse().expect("a shape that a test parses")).collect()
}

fn default_shapes(device: &Device, gpu: bool) -> Vec<Shape> {
    let names: &[&str] = match device.info().kind {
        _ if !gpu => &["1x32/8x128x4096", "1x32/8x128x32768"],
        DeviceKind::Cuda => &[
            "8x32/8x128x32768",
            "1x32/8x128x131072",
            "32x32/8x128x8192",
            "8x64/8x128x32768",
            "8x16/8x256x16384",
            "1x32/8x128x8192",
            "64x32/8x128x128-16384",
        ],
        _ => &["1x32/8x128x8192", "1x32/8x128x131072", "8x32/8x128x8192"],
    };
    parsed(names)
}

fn parsed(names: &[&str]) -> Vec<Shape> {
    names.iter().map(|name| name.parse().expect("a shape that a test parses")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_shapes_parse() {
        for gpu in [false, true] {
            assert!(default_shapes(&Device::cpu(), gpu).len() > 1 && step_shapes(gpu).len() > 1);
            assert_eq!(model_shapes(gpu).len(), 8);
        }
    }
}
