//! What is timed.

use super::Tables;
use super::check::{Rows, attention_error, floats, largest, quantize_error, relative};
use super::meter::{Limit, Measurement, Meter, Products};
use super::shape::{Caches, Shape};
use anyhow::{Context, Result};
use candle_core::Tensor;
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tqkv::compute::DeviceKind;
use tqkv::format::{Codec, CodecPair, RowFormat};
use tqkv::ops::{
    AttentionParams, Batch, Direction, Domain, PagePool, RowOrder, attention, dequantize, quantize, refresh, rotate,
};
use tqkv::{Buffer, DType, reference};

/// For all but attention, whose shape can be chosen.
const HEAD_DIM: usize = 128;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;
/// Sequences that get one token.
const APPENDED: usize = 8;
/// New tokens of a prefill.
pub(super) const PREFILL: usize = 2048;
/// Positions of a page on a GPU; on a processor a cache is one page.
const PAGE_SIZE: usize = 64;
/// Tokens of random vectors from which caches are filled.
pub(super) const FILL: usize = 8192;

/// f32 sums, and codes or outputs that f16 and bf16 round.
const F32_TOLERANCE: f64 = 1e-4;
const HALF_TOLERANCE: f64 = 2e-3;

impl Meter {
    fn kind(&self) -> DeviceKind {
        self.device.info().kind
    }

    /// What models hand over on such a device: K and V, and queries.
    fn input_dtype(&self) -> DType {
        if self.kind() == DeviceKind::Cpu { DType::F32 } else { DType::BF16 }
    }

    pub(super) fn query_dtype(&self) -> DType {
        if self.kind() == DeviceKind::Cuda { DType::F16 } else { DType::F32 }
    }

    /// Random vectors on the device, and what was rounded to its type.
    pub(super) fn vectors(&self, seed: u64, shape: &[usize], dtype: DType) -> Result<(Vec<f32>, Buffer)> {
        // First, as it says what is too much.
        let buffer = self.device.zeros(dtype, shape)?;
        let mut x = gaussian(seed, buffer.len());
        match dtype {
            DType::BF16 => buffer.write(&rounded(&mut x, bf16::from_f32, bf16::to_f32))?,
            DType::F16 => buffer.write(&rounded(&mut x, f16::from_f32, f16::to_f32))?,
            _ => buffer.write(&x)?,
        }
        Ok((x, buffer))
    }

    /// So many buffers of the same random vectors that they do not fit the caches.
    fn inputs(&self, positions: usize, dtype: DType) -> Result<(Vec<f32>, Vec<Buffer>)> {
        let shape = [positions, KV_HEADS, HEAD_DIM];
        let (x, first) = self.vectors(positions as u64, &shape, dtype)?;
        let mut buffers = vec![first];
        for _ in 1..self.cold_bytes.div_ceil(buffers[0].bytes()).max(2) {
            let another = self.device.zeros(dtype, &shape)?;
            self.once(|encoder| tqkv::ops::copy(encoder, &buffers[0], &another))?;
            buffers.push(another);
        }
        Ok((x, buffers))
    }

    /// From what models hand over, and from f32.
    pub fn quantize(&self, codec: CodecPair, positions: usize) -> Result<()> {
        let mut dtypes = vec![self.input_dtype(), DType::F32];
        dtypes.dedup();
        dtypes.into_iter().try_for_each(|dtype| self.quantize_from(dtype, codec, positions))
    }

    fn quantize_from(&self, dtype: DType, codec: CodecPair, positions: usize) -> Result<()> {
        let (x, inputs) = self.inputs(positions, dtype)?;
        let pools = |codec| -> Result<Vec<PagePool>> {
            let row = RowFormat::new(codec, HEAD_DIM)?;
            (0..inputs.len()).map(|_| Ok(PagePool::new(&self.device, row, KV_HEADS, positions, 1)?)).collect()
        };
        let (keys, values) = (pools(codec.key)?, pools(codec.value)?);
        let batch = Batch::contiguous(&self.device, positions, 0, positions, positions)?;
        let timing = self.time(|run, encoder| {
            let i = run % inputs.len();
            let other = &inputs[(i + 1) % inputs.len()];
            quantize(encoder, &[(&inputs[i], &keys[i]), (other, &values[i])], &batch)
        })?;
        let mut error = 0.0;
        for pool in [&keys[0], &values[0]] {
            let rows = Rows::new(pool, &[0])?;
            let errors = sampled(positions).map(|(position, head)| {
                let x = &x[(position * KV_HEADS + head) * HEAD_DIM..][..HEAD_DIM];
                quantize_error(pool.row(), x, &rows.decode(head, position))
            });
            error = largest(errors.chain([error]));
        }
        let bytes = 2 * inputs[0].bytes() + keys[0].bytes() + values[0].bytes();
        let (shape, codec) = (rows_shape(positions, inputs[0].dtype()), codec.to_string());
        let (limit, tolerance) = (Limit::Copy, F32_TOLERANCE);
        self.report(Measurement {
            op: "quantize",
            shape,
            codec,
            timing,
            bytes,
            limit,
            error,
            tolerance,
            products: None,
        })
    }

    pub fn append(&self, codec: CodecPair) -> Result<()> {
        let (x, input) = self.vectors(1, &[APPENDED, KV_HEADS, HEAD_DIM], self.input_dtype())?;
        let pool = |codec| -> Result<PagePool> {
            Ok(PagePool::new(&self.device, RowFormat::new(codec, HEAD_DIM)?, KV_HEADS, PAGE_SIZE, APPENDED)?)
        };
        let (key, value) = (pool(codec.key)?, pool(codec.value)?);
        let pages: Vec<u32> = (0..APPENDED as u32).collect();
        let span = |page| tqkv::ops::Span { first: 0, len: PAGE_SIZE, new: 1, pages: std::slice::from_ref(page) };
        let batch = Batch::new(&self.device, PAGE_SIZE, &pages.iter().map(span).collect::<Vec<_>>())?;
        let timing = self.time(|_, encoder| quantize(encoder, &[(&input, &key), (&input, &value)], &batch))?;
        let mut error = 0.0;
        for pool in [&key, &value] {
            let rows = Rows::new(pool, &pages)?;
            let errors = (0..APPENDED * KV_HEADS).map(|i| {
                let position = (i / KV_HEADS + 1) * PAGE_SIZE - 1;
                quantize_error(pool.row(), &x[i * HEAD_DIM..][..HEAD_DIM], &rows.decode(i % KV_HEADS, position))
            });
            error = largest(errors.chain([error]));
        }
        let rows = APPENDED * KV_HEADS;
        let bytes = 2 * input.bytes() + rows * (key.row().bytes() + value.row().bytes());
        let shape = format!("{APPENDED}x1x{KV_HEADS}x{HEAD_DIM} {}", input.dtype());
        let (codec, limit, tolerance) = (codec.to_string(), Limit::Copy, F32_TOLERANCE);
        self.report(Measurement { op: "append", shape, codec, timing, bytes, limit, error, tolerance, products: None })
    }

    pub fn dequantize(&self, codec: CodecPair, positions: usize) -> Result<()> {
        self.decode(codec, positions, Domain::Rotated)
    }

    pub fn restore(&self, codec: CodecPair, positions: usize) -> Result<()> {
        self.decode(codec, positions, Domain::Original)
    }

    fn decode(&self, codec: CodecPair, positions: usize, domain: Domain) -> Result<()> {
        let (_, x) = self.vectors(positions as u64, &[positions, KV_HEADS, HEAD_DIM], self.input_dtype())?;
        let (key, value) = (RowFormat::new(codec.key, HEAD_DIM)?, RowFormat::new(codec.value, HEAD_DIM)?);
        // Even the smaller of the outputs does not stay in a cache.
        let copies = self.cold_bytes.div_ceil(2 * x.len() * 2).max(2);
        let pools = |row| (0..copies).map(|_| Ok(PagePool::new(&self.device, row, KV_HEADS, positions, 1)?)).collect();
        let (keys, values): (Result<Vec<_>>, Result<Vec<_>>) = (pools(key), pools(value));
        let (keys, values) = (keys?, values?);
        let filling = Batch::contiguous(&self.device, positions, 0, positions, positions)?;
        for (key, value) in keys.iter().zip(&values) {
            self.once(|encoder| quantize(encoder, &[(&x, key), (&x, value)], &filling))?;
        }
        let batch = Batch::contiguous(&self.device, positions, 0, positions, 0)?;
        let names = match domain {
            Domain::Rotated => ["dequantize_f32", "dequantize_f16"],
            Domain::Original => ["restore_f32", "restore_f16"],
        };
        for (op, dtype) in names.into_iter().zip([DType::F32, DType::F16]) {
            let outputs = (0..2 * copies)
                .map(|_| self.device.zeros(dtype, &[KV_HEADS, positions, HEAD_DIM]))
                .collect::<tqkv::Result<Vec<_>>>()?;
            let timing = self.time(|run, encoder| {
                let i = run % copies;
                [(&keys[i], &outputs[2 * i]), (&values[i], &outputs[2 * i + 1])].into_iter().try_for_each(
                    |(pool, out)| dequantize(encoder, pool, &batch, 0, 0..positions, domain, RowOrder::HeadMajor, out),
                )
            })?;
            let mut error = 0.0;
            for (pool, out) in [(&keys[0], &outputs[0]), (&values[0], &outputs[1])] {
                let (rows, got) = (Rows::new(pool, &[0])?, floats(out)?);
                let errors = sampled(positions).map(|(position, head)| {
                    let got = &got[(head * positions + position) * HEAD_DIM..][..HEAD_DIM];
                    let decoded = rows.decode(head, position);
                    match domain {
                        Domain::Original => {
                            let y: Vec<f64> = decoded.into_iter().map(f64::from).collect();
                            relative(got, reference::restore(pool.row(), &y))
                        }
                        Domain::Rotated if dtype == DType::F16 => {
                            relative(got, decoded.into_iter().map(|v| f16::from_f32(v).to_f64()))
                        }
                        Domain::Rotated => relative(got, decoded.into_iter().map(f64::from)),
                    }
                });
                error = largest(errors.chain([error]));
            }
            let bytes = keys[0].bytes() + values[0].bytes() + 2 * outputs[0].bytes();
            let (shape, codec, limit) = (rows_shape(positions, dtype), codec.to_string(), Limit::Copy);
            let tolerance = match (domain, dtype) {
                (Domain::Rotated, _) => 0.0,
                (Domain::Original, DType::F32) => F32_TOLERANCE,
                _ => HALF_TOLERANCE,
            };
            self.report(Measurement { op, shape, codec, timing, bytes, limit, error, tolerance, products: None })?;
        }
        Ok(())
    }

    pub fn rotate(&self, positions: usize) -> Result<()> {
        let row = RowFormat::new(Codec::tq(4), HEAD_DIM)?;
        let (x, inputs) = self.inputs(positions, DType::F32)?;
        let out = inputs.iter().map(|x| self.device.zeros(DType::F32, x.shape())).collect::<tqkv::Result<Vec<_>>>()?;
        let timing = self.time(|run, encoder| {
            let i = run % inputs.len();
            rotate(encoder, &row, Direction::Forward, &inputs[i], &out[i])
        })?;
        let got = out[0].read::<f32>()?;
        let error = largest(sampled(positions).map(|(position, head)| {
            let start = (position * KV_HEADS + head) * HEAD_DIM;
            relative(&got[start..][..HEAD_DIM], reference::rotate(&row, &x[start..][..HEAD_DIM]))
        }));
        let (shape, codec) = (rows_shape(positions, DType::F32), "-".to_owned());
        let (bytes, limit, tolerance) = (x.len() * 8, Limit::Copy, F32_TOLERANCE);
        self.report(Measurement { op: "rotate", shape, codec, timing, bytes, limit, error, tolerance, products: None })
    }

    pub fn attention(&self, codec: CodecPair, shape: &Shape, query: DType, tables: Tables) -> Result<()> {
        let (_, x) = self.vectors(1, &[FILL, shape.kv_heads, shape.head_dim], DType::F32)?;
        // Before the caches, which take long to fill: it fails if there are too many heads.
        let q_shape = [shape.batch, shape.heads, shape.head_dim];
        let (q, q_buffer) = self.vectors(3, &q_shape, query)?;
        // A cache of one sequence can be one page, as long as it.
        let contiguous = self.kind() == DeviceKind::Cpu && shape.batch == 1;
        let page_size = if contiguous { shape.context.1 } else { PAGE_SIZE };
        let caches = Caches::new(self, shape, codec, page_size, &x)?;
        let batches = match tables {
            Tables::Host => caches.batches(&self.device, shape, 1)?,
            Tables::Device => caches.batches_on_device(&self.device, shape)?,
        };
        let out = self.device.zeros(query, &q_shape)?;
        let params = AttentionParams::for_head_dim(shape.head_dim);
        let run = |i: usize, encoder: &mut _| {
            attention(encoder, &q_buffer, &caches.key, &caches.value, &batches[i % batches.len()], &params, &out, None)
        };
        let name = match tables {
            Tables::Host => "attention",
            Tables::Device => {
                for (i, batch) in batches.iter().enumerate() {
                    self.once(|encoder| refresh(encoder, batch).and_then(|()| run(i, encoder)))?;
                }
                self.refresh(&batches, codec, shape)?;
                "attention_tables"
            }
        };
        let timing = self.time(run)?;
        self.once(|encoder| run(0, encoder))?;
        let error = attention_error(&caches, shape, 1, &params, &q, &floats(&out)?)?;
        let (bytes, limit, tolerance) = (caches.bytes, Limit::Read, attention_tolerance(query));
        let products = Some(Products { query, flops: shape.flops(1) });
        let (shape, codec) = (shape.to_string(), codec.to_string());
        self.report(Measurement { op: name, shape, codec, timing, bytes, limit, error, tolerance, products })
    }

    /// What a step costs besides where its tables and lengths are on the device.
    fn refresh(&self, batches: &[Batch], codec: CodecPair, shape: &Shape) -> Result<()> {
        let timing = self.time(|i, encoder| refresh(encoder, &batches[i % batches.len()]))?;
        let entries: usize = shape.lens().iter().map(|len| len.div_ceil(PAGE_SIZE)).sum();
        let (shape, codec, bytes, limit) = (shape.to_string(), codec.to_string(), 8 * entries, Limit::Copy);
        let (error, tolerance, products) = (0.0, 0.0, None);
        self.report(Measurement { op: "refresh", shape, codec, timing, bytes, limit, error, tolerance, products })
    }

    /// New tokens of each of some sequences behind a history, with a causal mask.
    pub fn prefill(
        &self,
        codec: CodecPair,
        (sequences, prompt, history): (usize, usize, usize),
        query: DType,
    ) -> Result<()> {
        let shape = prefill_shape(sequences, prompt, history)?;
        let tokens = sequences.checked_mul(prompt).context("--sequences and --prompt together are too many")?;
        let (_, x) = self.vectors(1, &[tokens, KV_HEADS, HEAD_DIM], self.input_dtype())?;
        let (_, fill) = self.vectors(1, &[FILL, KV_HEADS, HEAD_DIM], DType::F32)?;
        let contiguous = self.kind() == DeviceKind::Cpu && sequences == 1;
        let page_size = if contiguous { shape.context.1 } else { PAGE_SIZE };
        let caches = Caches::new(self, &shape, codec, page_size, &fill)?;
        let batches = caches.batches(&self.device, &shape, prompt)?;
        let q_shape = [tokens, HEADS, HEAD_DIM];
        let (q, q_buffer) = self.vectors(3, &q_shape, query)?;
        let out = self.device.zeros(query, &q_shape)?;
        let params = AttentionParams::for_head_dim(HEAD_DIM);
        let run = |i: usize, encoder: &mut _| {
            let batch = &batches[i % batches.len()];
            quantize(encoder, &[(&x, &caches.key), (&x, &caches.value)], batch)?;
            attention(encoder, &q_buffer, &caches.key, &caches.value, batch, &params, &out, None)
        };
        let timing = self.time(run)?;
        self.once(|encoder| run(0, encoder))?;
        let error = attention_error(&caches, &shape, prompt, &params, &q, &floats(&out)?)?;
        let bytes = 2 * x.bytes() + caches.bytes + 2 * out.bytes();
        let (limit, tolerance) = (Limit::Copy, attention_tolerance(query));
        let products = Some(Products { query, flops: shape.flops(prompt) });
        let name = if history == 0 { shape.to_string() } else { format!("{shape}, {prompt} new") };
        let (shape, codec) = (name, codec.to_string());
        self.report(Measurement { op: "prefill", shape, codec, timing, bytes, limit, error, tolerance, products })
    }

    /// The same over dense f32 with candle's matrix products, as its models do it, on all of the processor's threads.
    pub fn candle_prefill(&self) -> Result<()> {
        if self.device.info().threads != Some(std::thread::available_parallelism()?.get()) {
            return Ok(());
        }
        let shape = prefill_shape(1, PREFILL, 0)?;
        let cpu = &candle_core::Device::Cpu;
        let tensor = |seed, heads| -> Result<Tensor> {
            let x = gaussian(seed, PREFILL * heads * HEAD_DIM);
            Ok(Tensor::from_vec(x, (PREFILL, heads, HEAD_DIM), cpu)?.transpose(0, 1)?.contiguous()?)
        };
        let (q, k, v) = (tensor(1, HEADS)?, tensor(2, KV_HEADS)?, tensor(3, KV_HEADS)?);
        let hidden = |i: usize| if i % PREFILL > i / PREFILL { f32::NEG_INFINITY } else { 0.0 };
        let mask = Tensor::from_vec((0..PREFILL * PREFILL).map(hidden).collect(), (PREFILL, PREFILL), cpu)?;
        let repeat = |x: &Tensor| -> candle_core::Result<Tensor> {
            let each = (KV_HEADS, HEADS / KV_HEADS, PREFILL, HEAD_DIM);
            x.unsqueeze(1)?.expand(each)?.reshape((HEADS, PREFILL, HEAD_DIM))
        };
        let scale = 1.0 / (HEAD_DIM as f64).sqrt();
        let timing = self.time_host(|_| {
            let scores = (q.matmul(&repeat(&k)?.t()?)? * scale)?.broadcast_add(&mask)?;
            let out = candle_nn::ops::softmax_last_dim(&scores)?.matmul(&repeat(&v)?)?;
            std::hint::black_box(out);
            Ok(())
        })?;
        let bytes = 4 * PREFILL * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS);
        let (shape, codec) = (shape.to_string(), "f32".to_owned());
        let (limit, error, tolerance) = (Limit::Copy, 0.0, 0.0);
        self.report(Measurement {
            op: "prefill_candle",
            shape,
            codec,
            timing,
            bytes,
            limit,
            error,
            tolerance,
            products: None,
        })
    }
}

pub(super) fn attention_tolerance(query: DType) -> f64 {
    if query == DType::F32 { F32_TOLERANCE } else { HALF_TOLERANCE }
}

fn prefill_shape(sequences: usize, prompt: usize, history: usize) -> Result<Shape> {
    let context = prompt.checked_add(history).context("--prompt and --history together are too long")?;
    format!("{sequences}x{HEADS}/{KV_HEADS}x{HEAD_DIM}x{context}").parse()
}

/// Positions x heads x head_dim.
fn rows_shape(positions: usize, dtype: DType) -> String {
    format!("{positions}x{KV_HEADS}x{HEAD_DIM} {dtype}")
}

/// Positions and heads that outputs are checked at, the last among them: the oracle is slow.
fn sampled(positions: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..positions)
        .step_by(positions.div_ceil(64))
        .chain([positions - 1])
        .flat_map(|position| (0..KV_HEADS).map(move |head| (position, head)))
}

/// Numbers in a narrower type; `x` becomes what they are.
fn rounded<T: Copy>(x: &mut [f32], narrow: impl Fn(f32) -> T, widen: impl Fn(T) -> f32) -> Vec<T> {
    let narrowed = x.iter().map(|&x| narrow(x)).collect::<Vec<_>>();
    x.iter_mut().zip(&narrowed).for_each(|(x, &n)| *x = widen(n));
    narrowed
}

/// So many normal variates are different; then they repeat, with a period that no shape divides.
const DISTINCT: usize = (1 << 20) - 3;

/// Normal variates by Box and Muller.
fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut x = Vec::with_capacity(n + 1);
    while x.len() < n.min(DISTINCT) {
        let (u, v): (f32, f32) = (rng.random(), rng.random());
        let radius = (-2.0 * (1.0 - u).ln()).sqrt();
        let (sin, cos) = (std::f32::consts::TAU * v).sin_cos();
        x.extend([radius * cos, radius * sin]);
    }
    x.truncate(n.min(DISTINCT));
    x.into_iter().cycle().take(n).collect()
}
