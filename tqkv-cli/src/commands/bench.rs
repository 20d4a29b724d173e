//! `tqkv bench`

use crate::{codecs, output};
use anyhow::{Result, bail};
use clap::ValueEnum;
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::Serialize;
use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use tqkv::format::{Codec, CodecPair, RowFormat};
use tqkv::ops::{
    AttentionParams, Batch, Direction, Domain, PagePool, RowOrder, attention, dequantize, quantize, rotate,
};
use tqkv::{Buffer, CommandEncoder, DType, Device, reference};

const HEAD_DIM: usize = 128;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
const CONTEXTS: [usize; 2] = [4096, 32_768];
/// Positions that are encoded, decoded or rotated at a time.
const POSITIONS: usize = 4096;
/// Each run takes the next of several copies of its inputs. So many bytes together do not stay in any cache.
const COLD_BYTES: usize = 256 << 20;
/// Each operation runs for about so long, and at least so often.
const TIME: Duration = Duration::from_millis(600);
const RUNS: usize = 7;
/// What is further off than this is not worth timing.
const MAX_ERROR: f64 = 1e-4;

/// Times each operation with inputs that are in no cache, and checks what it computed.
///
/// Bytes are those of stored vectors, inputs and outputs that an operation must move; their share is of the bandwidth
/// that plain reading (attention) or copying (all else) reaches in the same process with as many threads.
#[derive(clap::Args)]
pub struct Bench {
    /// Device: cpu
    #[arg(long, value_name = "D", default_value = "cpu")]
    device: String,
    /// Operations, separated by commas
    #[arg(long, value_name = "OPS", value_delimiter = ',', value_enum,
          default_values_t = [Op::Quantize, Op::Dequantize, Op::Rotate, Op::Attention])]
    op: Vec<Op>,
    #[arg(long, value_name = "CODECS", value_delimiter = ',', value_parser = codecs::parse, help = codecs::HELP,
          default_values = ["f16", "seed4", "seed8", "k8v8", "k6v6", "k5v4", "k4v4", "k3v3", "k2v2"])]
    codec: Vec<CodecPair>,
    /// Threads [default: one a logical core]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print one JSON object a measurement
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Op {
    /// f32 vectors into the cache
    Quantize,
    /// The cache into f32 and f16
    Dequantize,
    /// Signs and transform of f32 vectors
    Rotate,
    /// One query over the cache
    Attention,
}

#[derive(Serialize)]
struct Row {
    op: &'static str,
    shape: String,
    codec: String,
    threads: usize,
    ms: f64,
    bytes: usize,
    gb_per_s: f64,
    share_of_bandwidth: f64,
    max_rel_error: f64,
}

impl Bench {
    pub fn run(self) -> Result<ExitCode> {
        if self.device != "cpu" {
            // For the error that a name of no device deserves.
            Device::open(&self.device)?;
            bail!("bench runs on cpu only, got {}", self.device);
        }
        let threads = match self.threads {
            Some(threads) => threads,
            None => std::thread::available_parallelism()?.get(),
        };
        let bench = Runner::new(threads, self.json)?;
        for &op in &self.op {
            match op {
                Op::Quantize => self.codec.iter().try_for_each(|&codec| bench.quantize(codec))?,
                Op::Dequantize => self.codec.iter().try_for_each(|&codec| bench.dequantize(codec))?,
                Op::Rotate => bench.rotate()?,
                Op::Attention => {
                    for positions in CONTEXTS {
                        self.codec.iter().try_for_each(|&codec| bench.attention(codec, positions))?;
                    }
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

struct Runner {
    device: Device,
    threads: usize,
    json: bool,
    /// Bytes a second of reading, and of reading and writing together.
    read: f64,
    copy: f64,
}

impl Runner {
    fn new(threads: usize, json: bool) -> Result<Self> {
        let device = Device::cpu_with_threads(threads)?;
        let mut runner = Self { device, threads, json, read: f64::NAN, copy: f64::NAN };
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
        let source = vec![1u64; COLD_BYTES / 8];
        let mut target = vec![2u64; COLD_BYTES / 8];
        let piece = source.len().div_ceil(threads * 16);
        let (time, sum) = time(|_| {
            pool.install(|| {
                Ok(source.par_chunks(piece).map(|c| c.iter().fold(0, |a: u64, b| a.wrapping_add(*b))).sum())
            })
        })?;
        let wrong: u64 = sum;
        runner.read = COLD_BYTES as f64 / time;
        let error = if wrong == source.len() as u64 { 0.0 } else { 1.0 };
        runner.report("read", "256 MiB".to_owned(), "-", time, COLD_BYTES, runner.read, error)?;
        let (time, ()) = time_copy(&pool, &source, &mut target, piece)?;
        runner.copy = 2.0 * COLD_BYTES as f64 / time;
        let error = if target == source { 0.0 } else { 1.0 };
        runner.report("copy", "256 MiB".to_owned(), "-", time, 2 * COLD_BYTES, runner.copy, error)?;
        Ok(runner)
    }

    #[allow(clippy::too_many_arguments)] // The fields of a row.
    fn report(
        &self,
        op: &'static str,
        shape: String,
        codec: &str,
        seconds: f64,
        bytes: usize,
        bandwidth: f64,
        max_rel_error: f64,
    ) -> Result<()> {
        if max_rel_error.is_nan() || max_rel_error > MAX_ERROR {
            bail!("{op} {codec} ({shape}) is off by {max_rel_error:e}, expected at most {MAX_ERROR:e}");
        }
        let speed = bytes as f64 / seconds;
        let row = Row {
            op,
            shape,
            codec: codec.to_owned(),
            threads: self.threads,
            ms: seconds * 1e3,
            bytes,
            gb_per_s: speed / 1e9,
            share_of_bandwidth: speed / bandwidth,
            max_rel_error,
        };
        if self.json {
            return output::print_json(&row);
        }
        output::print(&format!(
            "{:<14} {:<42} {:<6} {:>9.3} ms {:>7.2} GB/s {:>5.1} %   error {:.1e}\n",
            row.op,
            row.shape,
            row.codec,
            row.ms,
            row.gb_per_s,
            row.share_of_bandwidth * 100.0,
            row.max_rel_error
        ))
    }

    /// Runs what `record` records, again and again, with the number of the run.
    fn time(&self, record: impl Fn(usize, &mut CommandEncoder) -> tqkv::Result<()>) -> Result<f64> {
        let (seconds, ()) = time(|run| {
            let mut encoder = self.device.encoder()?;
            record(run, &mut encoder)?;
            Ok(encoder.submit_and_wait()?)
        })?;
        Ok(seconds)
    }

    fn once(&self, record: impl Fn(&mut CommandEncoder) -> tqkv::Result<()>) -> Result<()> {
        let mut encoder = self.device.encoder()?;
        record(&mut encoder)?;
        Ok(encoder.submit_and_wait()?)
    }

    /// So many buffers of the same random vectors that they do not fit the caches.
    fn inputs(&self, positions: usize) -> Result<(Vec<f32>, Vec<Buffer>)> {
        let x = gaussian(positions as u64, positions * KV_HEADS * HEAD_DIM);
        let copies = COLD_BYTES.div_ceil(x.len() * 4);
        let upload = || self.device.upload(&x, &[positions, KV_HEADS, HEAD_DIM]);
        let buffers = (0..copies).map(|_| upload()).collect::<tqkv::Result<_>>()?;
        Ok((x, buffers))
    }

    /// Caches with the same content, so many that reading them all does not stay in the processor's caches.
    fn pools(&self, x: &Buffer, row: RowFormat, positions: usize, copies: usize) -> Result<Vec<PagePool>> {
        let pool = || PagePool::new(&self.device, row, KV_HEADS, positions, 1);
        let first = pool()?;
        let batch = Batch::contiguous(&self.device, positions, 0, positions, positions)?;
        self.once(|encoder| quantize(encoder, &[(x, &first)], &batch))?;
        let (codes, scales) = (host(first.codes())?, first.scales().map(host).transpose()?);
        let mut pools = vec![first];
        for _ in 1..copies {
            let pool = pool()?;
            pool.codes().write_bytes(&codes)?;
            if let (Some(buffer), Some(scales)) = (pool.scales(), &scales) {
                buffer.write_bytes(scales)?;
            }
            pools.push(pool);
        }
        Ok(pools)
    }

    fn quantize(&self, codec: CodecPair) -> Result<()> {
        let (x, inputs) = self.inputs(POSITIONS)?;
        let pools = |codec| -> Result<Vec<PagePool>> {
            let row = RowFormat::new(codec, HEAD_DIM)?;
            let pool = |_| Ok(PagePool::new(&self.device, row, KV_HEADS, POSITIONS, 1)?);
            (0..inputs.len()).map(pool).collect()
        };
        let (keys, values) = (pools(codec.key)?, pools(codec.value)?);
        let batch = Batch::contiguous(&self.device, POSITIONS, 0, POSITIONS, POSITIONS)?;
        let seconds = self.time(|run, encoder| {
            let i = run % inputs.len();
            let other = &inputs[(i + 1) % inputs.len()];
            quantize(encoder, &[(&inputs[i], &keys[i]), (other, &values[i])], &batch)
        })?;
        let mut error = 0.0;
        for pool in [&keys[0], &values[0]] {
            let rows = Rows::new(pool)?;
            let errors = sampled_rows().map(|(position, head)| {
                let x = &x[(position * KV_HEADS + head) * HEAD_DIM..][..HEAD_DIM];
                quantize_error(&rows.row, x, &rows.decode(head, position))
            });
            error = largest(errors.chain([error]));
        }
        let bytes = 2 * x.len() * 4 + keys[0].bytes() + values[0].bytes();
        self.report("quantize", shape(POSITIONS), &codec.to_string(), seconds, bytes, self.copy, error)
    }

    fn dequantize(&self, codec: CodecPair) -> Result<()> {
        let (_, inputs) = self.inputs(POSITIONS)?;
        let pools = |codec| self.pools(&inputs[0], RowFormat::new(codec, HEAD_DIM)?, POSITIONS, inputs.len());
        let (keys, values) = (pools(codec.key)?, pools(codec.value)?);
        let batch = Batch::contiguous(&self.device, POSITIONS, 0, POSITIONS, 0)?;
        for (op, dtype) in [("dequantize_f32", DType::F32), ("dequantize_f16", DType::F16)] {
            let outputs = (0..2 * inputs.len())
                .map(|_| self.device.zeros(dtype, &[KV_HEADS, POSITIONS, HEAD_DIM]))
                .collect::<tqkv::Result<Vec<_>>>()?;
            let seconds = self.time(|run, encoder| {
                let i = run % inputs.len();
                [(&keys[i], &outputs[2 * i]), (&values[i], &outputs[2 * i + 1])].into_iter().try_for_each(
                    |(pool, out)| {
                        let order = RowOrder::HeadMajor;
                        dequantize(encoder, pool, &batch, 0, 0..POSITIONS, Domain::Rotated, order, out)
                    },
                )
            })?;
            let mut error = 0.0;
            for (pool, out) in [(&keys[0], &outputs[0]), (&values[0], &outputs[1])] {
                let rows = Rows::new(pool)?;
                let got: Vec<f32> = match dtype {
                    DType::F32 => out.read()?,
                    _ => out.read::<f16>()?.into_iter().map(f16::to_f32).collect(),
                };
                let errors = sampled_rows().map(|(position, head)| {
                    let got = &got[(head * POSITIONS + position) * HEAD_DIM..][..HEAD_DIM];
                    let round = |v: f32| if dtype == DType::F16 { f16::from_f32(v).to_f64() } else { v.into() };
                    relative(got, rows.decode(head, position).into_iter().map(round))
                });
                error = largest(errors.chain([error]));
            }
            let bytes = keys[0].bytes() + values[0].bytes() + 2 * outputs[0].bytes();
            self.report(op, shape(POSITIONS), &codec.to_string(), seconds, bytes, self.copy, error)?;
        }
        Ok(())
    }

    fn rotate(&self) -> Result<()> {
        let row = RowFormat::new(Codec::tq(4), HEAD_DIM)?;
        let (x, inputs) = self.inputs(POSITIONS)?;
        let out = inputs.iter().map(|x| self.device.zeros(DType::F32, x.shape())).collect::<tqkv::Result<Vec<_>>>()?;
        let seconds = self.time(|run, encoder| {
            let i = run % inputs.len();
            rotate(encoder, &row, Direction::Forward, &inputs[i], &out[i])
        })?;
        let got = out[0].read::<f32>()?;
        let error = sampled_rows().map(|(position, head)| {
            let start = (position * KV_HEADS + head) * HEAD_DIM;
            relative(&got[start..][..HEAD_DIM], reference::rotate(&row, &x[start..][..HEAD_DIM]))
        });
        self.report("rotate", shape(POSITIONS), "-", seconds, x.len() * 8, self.copy, largest(error))
    }

    fn attention(&self, codec: CodecPair, positions: usize) -> Result<()> {
        let device = &self.device;
        let (key, value) = (RowFormat::new(codec.key, HEAD_DIM)?, RowFormat::new(codec.value, HEAD_DIM)?);
        let vectors = |seed| {
            let x = gaussian(seed, positions * KV_HEADS * HEAD_DIM);
            device.upload(&x, &[positions, KV_HEADS, HEAD_DIM])
        };
        let bytes = positions * KV_HEADS * (key.bytes() + value.bytes());
        let copies = COLD_BYTES.div_ceil(bytes).max(2);
        let keys = self.pools(&vectors(1)?, key, positions, copies)?;
        let values = self.pools(&vectors(2)?, value, positions, copies)?;
        let q = gaussian(3, HEADS * HEAD_DIM);
        let q_buffer = device.upload(&q, &[1, HEADS, HEAD_DIM])?;
        let out = device.zeros(DType::F32, &[1, HEADS, HEAD_DIM])?;
        let batch = Batch::contiguous(device, positions, 0, positions, 1)?;
        let params = AttentionParams::for_head_dim(HEAD_DIM);
        let seconds = self.time(|run, encoder| {
            let i = run % copies;
            attention(encoder, &q_buffer, &keys[i], &values[i], &batch, &params, &out, None)
        })?;

        // One query head of each of four KV heads.
        let got = out.read::<f32>()?;
        let (key_rows, value_rows) = (Rows::new(&keys[0])?, Rows::new(&values[0])?);
        let error = [0, 11, 22, 31].map(|head| {
            let range = head * HEAD_DIM..(head + 1) * HEAD_DIM;
            let kv_head = head / (HEADS / KV_HEADS);
            let decode = |rows: &Rows| (0..positions).map(|p| rows.decode(kv_head, p)).collect::<Vec<_>>();
            let (k, v) = (decode(&key_rows), decode(&value_rows));
            let rotated: Vec<f32> = reference::rotate(&key, &q[range.clone()]).into_iter().map(|v| v as f32).collect();
            let query = reference::Query { q: &rotated, scale: f64::from(params.scale), softcap: None, sink: None };
            let (expected, _) = reference::attention(&query, &views(&k), &views(&v));
            relative(&got[range], reference::restore(&value, &expected))
        });
        let shape = format!("1 query, {HEADS}/{KV_HEADS} heads, D {HEAD_DIM}, {positions} positions");
        self.report("attention", shape, &codec.to_string(), seconds, bytes, self.read, largest(error.into_iter()))
    }
}

/// A pool's rows on the host.
struct Rows {
    row: RowFormat,
    positions: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Rows {
    fn new(pool: &PagePool) -> Result<Self> {
        let scales = match pool.scales() {
            None => vec![],
            Some(scales) if scales.dtype() == DType::F16 => {
                scales.read::<f16>()?.into_iter().map(f16::to_f32).collect()
            }
            Some(scales) => scales.read()?,
        };
        Ok(Self { row: *pool.row(), positions: pool.page_size(), codes: host(pool.codes())?, scales })
    }

    fn decode(&self, head: usize, position: usize) -> Vec<f32> {
        let (i, scales) = (head * self.positions + position, self.row.scales_per_row());
        let codes = &self.codes[i * self.row.row_bytes()..][..self.row.row_bytes()];
        reference::dequantize(&self.row, codes, &self.scales[i * scales..][..scales])
    }
}

fn host(buffer: &Buffer) -> Result<Vec<u8>> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.read_bytes(&mut bytes)?;
    Ok(bytes)
}

/// The median time of a run in seconds, and the last run's result.
fn time<T>(mut run: impl FnMut(usize) -> Result<T>) -> Result<(f64, T)> {
    // The first run is slower: pages are mapped, threads start.
    let mut last = black_box(run(0)?);
    let (started, mut times) = (Instant::now(), Vec::new());
    while times.len() < RUNS || started.elapsed() < TIME {
        let run_started = Instant::now();
        last = black_box(run(times.len() + 1)?);
        times.push(run_started.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok((times[times.len() / 2], last))
}

fn time_copy(pool: &rayon::ThreadPool, source: &[u64], target: &mut [u64], piece: usize) -> Result<(f64, ())> {
    time(|_| {
        pool.install(|| {
            target.par_chunks_mut(piece).zip(source.par_chunks(piece)).for_each(|(t, s)| t.copy_from_slice(s));
        });
        Ok(())
    })
}

fn views(rows: &[Vec<f32>]) -> Vec<&[f32]> {
    rows.iter().map(|row| &row[..]).collect()
}

fn shape(positions: usize) -> String {
    format!("{positions} positions, {KV_HEADS} heads, D {HEAD_DIM}")
}

/// Positions and heads that outputs are checked at, the last among them: the oracle is slow.
fn sampled_rows() -> impl Iterator<Item = (usize, usize)> {
    (0..POSITIONS)
        .step_by(64)
        .chain([POSITIONS - 1])
        .flat_map(|position| (0..KV_HEADS).map(move |head| (position, head)))
}

/// How far a stored vector is from what the oracle stores for `x`, both decoded.
fn quantize_error(row: &RowFormat, x: &[f32], got: &[f32]) -> f64 {
    let expected = match row.codec() {
        Codec::F32 => x.to_vec(),
        Codec::F16 => x.iter().map(|&v| f16::from_f32(v).to_f32()).collect(),
        _ => {
            let encoded = reference::quantize(row, x);
            let mut packed = vec![0; row.row_bytes()];
            row.pack(&encoded.codes, &mut packed);
            let mut decoded = reference::dequantize(row, &packed, &encoded.scales);
            // Where an element is as good as on a boundary, either code is right.
            for ((decoded, got), margin) in decoded.iter_mut().zip(got).zip(&encoded.margins) {
                if *margin < 1e-5 {
                    *decoded = *got;
                }
            }
            decoded
        }
    };
    relative(got, expected.into_iter().map(f64::from))
}

/// Norm of the difference divided by the expected vector's.
fn relative(got: &[f32], expected: impl IntoIterator<Item = f64>) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, expected) in got.iter().zip(expected) {
        error += (f64::from(got) - expected).powi(2);
        norm += expected * expected;
    }
    (error / norm).sqrt()
}

/// The largest of some errors; NaN if one is.
fn largest(errors: impl Iterator<Item = f64>) -> f64 {
    errors.fold(0.0, |max, e| if e > max || e.is_nan() { e } else { max })
}

/// Normal variates by Box and Muller.
fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut x = Vec::with_capacity(n + 1);
    while x.len() < n {
        let (u, v): (f32, f32) = (rng.random(), rng.random());
        let radius = (-2.0 * (1.0 - u).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * v).sin_cos();
        x.extend([radius * cos, radius * sin]);
    }
    x.truncate(n);
    x
}
