//! Every specialisation compiles, for every architecture. NVRTC needs no GPU: `TQKV_NVRTC` may name its library.

use super::attention::{Shape, Variant, plain_source};
use super::nvrtc::{self, Source};
use super::rows::{QuantizeShape, dequantize_source, merge_source, quantize_source, rotate_source};
use super::tables::Cells;
use crate::compute::{DType, Device, KernelSource};
use crate::format::{Codec, RowFormat};
use crate::ops::{
    AttentionParams, Batch, Direction, Domain, PagePool, RowOrder, Span, attention, dequantize, quantize,
};
use rayon::prelude::*;
use std::time::Instant;

/// Architectures, and the shared memory that a block can have there.
const ARCHITECTURES: [(&str, usize); 6] = [
    ("sm_80", 163 << 10),
    ("sm_86", 99 << 10),
    ("sm_89", 99 << 10),
    ("sm_90a", 227 << 10),
    ("sm_100", 227 << 10),
    ("sm_120", 99 << 10),
];

/// The list or, if the variable is set, what it names of it (separated by commas).
fn chosen<T: Copy>(variable: &str, all: &[T], name: impl Fn(T) -> String) -> Vec<T> {
    match std::env::var(variable) {
        Ok(wanted) => all.iter().copied().filter(|&x| wanted.split(',').any(|w| w == name(x))).collect(),
        Err(_) => all.to_vec(),
    }
}

fn codecs(head_dim: usize) -> Vec<RowFormat> {
    let native = (2..=8).map(Codec::tq);
    let seed = [2, 3, 4, 5, 6, 8].map(Codec::seed).into_iter();
    native.chain(seed).chain([Codec::F16, Codec::F32]).filter_map(|c| RowFormat::new(c, head_dim).ok()).collect()
}

/// Kernels over single rows: the same for every architecture.
fn row_sources(head_dims: &[usize]) -> Vec<Source> {
    let mut all = vec![merge_source(DType::F32), merge_source(DType::F16), merge_source(DType::BF16)];
    for &d in head_dims {
        for (i, row) in codecs(d).into_iter().enumerate() {
            let dtype = [DType::F32, DType::F16, DType::BF16][i % 3];
            let alignment = |aligned: bool| if aligned { 1 << row.row_bytes().trailing_zeros().min(4) } else { 1 };
            let cells = row.codebook().map(|b| Cells::new(&b.boundaries));
            // Odd addresses take other code, the same way at every head_dim.
            for aligned in [true, false].into_iter().filter(|&a| a || matches!(d, 80 | 128)) {
                let side = QuantizeShape {
                    row: &row,
                    cells: cells.as_ref(),
                    input: dtype,
                    input_aligned: aligned as u32,
                    code_alignment: alignment(aligned),
                };
                all.push(quantize_source([side, side]));
            }
            for out in [DType::F32, DType::F16, DType::BF16] {
                all.push(dequantize_source(&row, out, 1, alignment(true)));
            }
            if matches!(d, 80 | 128) {
                all.push(dequantize_source(&row, dtype, 0, 1));
            }
            let shape =
                Shape { key: row, value: row, page_size: 16, query_rows: 2, q: dtype, out: dtype, aligned: true };
            if d == 128 || Variant::choose(&shape, usize::MAX).is_none() {
                all.push(plain_source(&row, &row, DType::F32, DType::F32));
            }
        }
        let row = RowFormat::new(Codec::tq(4), d).unwrap();
        all.push(rotate_source(&row, Direction::Forward, DType::F32, DType::F16, 1));
        all.push(rotate_source(&row, Direction::Inverse, DType::F16, DType::F32, 0));
    }
    all
}

/// The tensor-core attention kernel as this module would compile it for a device with so much shared memory.
fn attention_variants(head_dims: &[usize], shared_memory: usize) -> Vec<Variant> {
    const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    let mut all = vec![];
    let mut add = |key, value, page_size, query_rows, q, out| {
        let shape = Shape { key, value, page_size, query_rows, q, out, aligned: true };
        all.extend(Variant::choose(&shape, shared_memory));
    };
    let pair = |k, v, d| (RowFormat::new(k, d).unwrap(), RowFormat::new(v, d).unwrap());
    for &d in head_dims {
        for row in codecs(d) {
            add(row, row, 16, 2, DType::F32, DType::F32);
            if d == 128 {
                add(row, row, 64, 4, DType::F16, DType::F16);
                add(row, row, 64, 64, DType::F16, DType::F16);
            }
        }
        let pairs = [(5, 4), (4, 3), (8, 2), (3, 7), (3, 3), (4, 4)].map(|(k, v)| pair(Codec::tq(k), Codec::tq(v), d));
        for (k, v) in pairs.into_iter().filter(|_| matches!(d, 64 | 80 | 112 | 128)) {
            // Pages that hold no whole tile, and few, several and many query rows.
            add(k, v, 9, 3, DType::F32, DType::F32);
            for (page_size, query_rows) in [(16, 4), (16, 16), (16, 64), (64, 4), (64, 16), (64, 64)] {
                add(k, v, page_size, query_rows, DType::F32, DType::F32);
            }
        }
    }
    if head_dims.contains(&128) {
        for codec in [Codec::tq(4), Codec::seed(5), Codec::F16, Codec::tq(3)] {
            let (k, v) = pair(codec, codec, 128);
            FLOATS.iter().for_each(|&q| FLOATS.iter().for_each(|&out| add(k, v, 16, 72, q, out)));
        }
        for (k, v) in [
            (Codec::seed(8), Codec::tq(4)),
            (Codec::F16, Codec::tq(4)),
            (Codec::tq(6), Codec::F16),
            (Codec::F16, Codec::F16),
            (Codec::seed(5), Codec::seed(6)),
        ] {
            let (k, v) = pair(k, v, 128);
            for (page_size, query_rows) in [(9, 4), (9, 16), (16, 4), (16, 64), (64, 4), (64, 64)] {
                add(k, v, page_size, query_rows, DType::F32, DType::F32);
            }
        }
    }
    all
}

/// Compiles all of `sources`, keeps them in the cache, and returns failures and what spills registers.
fn compile(architecture: &str, sources: &[Source]) -> (Vec<String>, Vec<String>) {
    let nvrtc = nvrtc::load().expect("checked before");
    let results: Vec<_> = sources
        .par_iter()
        .map(|source| {
            let name = || format!("{architecture} {} {}", source.name, source.options.join(" "));
            let key = source.key(architecture, nvrtc.version);
            if super::cache::load(key).is_some() {
                return (None, None);
            }
            match nvrtc.compile(source, architecture) {
                Ok(compiled) => {
                    super::cache::store(key, &compiled.cubin);
                    let spills =
                        compiled.log.lines().find(|l| l.contains("spill") && !l.contains(" 0 bytes spill stores"));
                    (None, spills.map(|l| format!("{}: {}", name(), l.trim())))
                }
                Err(e) => (Some(format!("{}: {e}", name())), None),
            }
        })
        .collect();
    let (failures, spills): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    (failures.into_iter().flatten().collect(), spills.into_iter().flatten().collect())
}

/// `TQKV_CUDA_ARCHITECTURES=sm_90a` and `TQKV_CUDA_HEAD_DIMS=64,128` leave out the rest. What is compiled stays in the disk
/// cache, so that a second run, and a GPU of that architecture, find it.
#[test]
fn every_specialisation_compiles() {
    if let Err(reason) = nvrtc::load() {
        let required = std::env::var("TQKV_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == "nvrtc"), "TQKV_REQUIRE names nvrtc: {reason}");
        eprintln!("SKIPPED: compiling CUDA kernels: {reason}");
        return;
    }
    let head_dims = match std::env::var("TQKV_CUDA_HEAD_DIMS") {
        Ok(_) => chosen("TQKV_CUDA_HEAD_DIMS", &[64, 80, 96, 112, 128, 192, 256, 512, 576, 1024], |d| d.to_string()),
        // Each of the kernels' ways to lay out a row; all head dims take long.
        Err(_) => vec![80, 128],
    };
    let mut failures = vec![];
    for (architecture, shared_memory) in chosen("TQKV_CUDA_ARCHITECTURES", &ARCHITECTURES, |a| a.0.to_owned()) {
        let mut sources = row_sources(&head_dims);
        sources.extend(attention_variants(&head_dims, shared_memory).iter().map(Variant::source));
        let (failed, spills) = compile(architecture, &sources);
        println!("{architecture}: {} kernels, {} spill registers, {} fail", sources.len(), spills.len(), failed.len());
        spills.iter().for_each(|s| println!("  spills: {s}"));
        failures.extend(failed);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// Seconds of one of `repeats` operations that are submitted together, the best of five submissions.
fn time(device: &Device, repeats: usize, record: impl Fn(&mut crate::CommandEncoder) -> crate::Result<()>) -> f64 {
    let once = |n: usize| {
        let mut encoder = device.encoder().unwrap();
        (0..n).for_each(|_| record(&mut encoder).unwrap());
        let start = Instant::now();
        encoder.submit_and_wait().unwrap();
        start.elapsed().as_secs_f64() / n as f64
    };
    once(2);
    (0..5).map(|_| once(repeats)).fold(f64::INFINITY, f64::min)
}

/// Numbers for a developer, not a check: `cargo test --release -- --ignored --nocapture kernels_in_numbers`.
#[test]
#[ignore = "measures; needs a GPU"]
fn kernels_in_numbers() {
    let device = Device::open("cuda").unwrap();
    println!("{:?}", device.info());
    let read = r#"
        extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* x, uint4* y, unsigned n) {
            uint4 sum = make_uint4(0, 0, 0, 0);
            unsigned step = gridDim.x * 512;
            #pragma unroll 8
            for (unsigned i = blockIdx.x * 512 + threadIdx.x; i < n; i += step) {
                uint4 v = x[i];
                sum.x ^= v.x, sum.y ^= v.y, sum.z ^= v.z, sum.w ^= v.w;
            }
            if (sum.x == 0x12345 && sum.y == 0x54321) y[0] = sum;
        }"#;
    device.kernels().register("read_all", KernelSource::Cuda(read.to_owned()));
    let bytes = 1usize << 30;
    let big = device.zeros(DType::U8, &[bytes]).unwrap();
    let sink = device.zeros(DType::U8, &[16]).unwrap();
    let n = (bytes / 16) as u32;
    let t = time(&device, 10, |e| e.dispatch("read_all", [132 * 4, 1, 1], &[&big, &sink], &[n]));
    let bandwidth = bytes as f64 / t;
    println!("read: {:.2} TB/s", bandwidth / 1e12);
    let report = |name: &str, bytes: usize, t: f64| {
        let speed = bytes as f64 / t;
        println!("{name}: {:.4} ms, {:.2} TB/s, {:.0} % of reading", t * 1e3, speed / 1e12, 100.0 * speed / bandwidth);
    };

    let (tokens, heads, d, page) = (32768usize, 8usize, 128usize, 64usize);
    let pages: Vec<u32> = (0..(tokens / page) as u32).rev().collect();
    let batch = Batch::new(&device, page, &[Span { first: 0, len: tokens, new: tokens, pages: &pages }]).unwrap();
    // Some pattern that is no constant.
    let noise: Vec<half::bf16> = (0..tokens * heads * d)
        .map(|i| half::bf16::from_f32(((i * 2_654_435_761) % 1000) as f32 / 250.0 - 2.0))
        .collect();
    let (k, v) =
        (device.upload(&noise, &[tokens, heads, d]).unwrap(), device.upload(&noise, &[tokens, heads, d]).unwrap());
    for codec in [Codec::tq(4), Codec::tq(3), Codec::tq(8), Codec::seed(4)] {
        let row = RowFormat::new(codec, d).unwrap();
        let pools = [0, 1].map(|_| PagePool::new(&device, row, heads, page, tokens / page).unwrap());
        let moved = 2 * tokens * heads * (2 * d + row.bytes());
        let t = time(&device, 30, |e| quantize(e, &[(&k, &pools[0]), (&v, &pools[1])], &batch));
        report(&format!("quantize {codec} K and V from bf16"), moved, t);
        for dtype in [DType::F16, DType::F32] {
            let out = device.zeros(dtype, &[tokens, heads, d]).unwrap();
            let heads_first = out.reshape(&[heads, tokens, d]).unwrap();
            for (domain, order) in [
                (Domain::Rotated, RowOrder::TokenMajor),
                (Domain::Original, RowOrder::TokenMajor),
                (Domain::Original, RowOrder::HeadMajor),
            ] {
                let out = if order == RowOrder::TokenMajor { &out } else { &heads_first };
                let t = time(&device, 30, |e| dequantize(e, &pools[0], &batch, 0, 0..tokens, domain, order, out));
                let moved = tokens * heads * (row.bytes() + d * dtype.size());
                report(&format!("dequantize {codec} to {dtype} {domain:?} {order:?}"), moved, t);
            }
        }
    }
    for (key, value) in [(4, 4), (3, 3), (8, 8)] {
        let sequences = 8;
        let pools = [key, value].map(|bits| {
            let row = RowFormat::new(Codec::tq(bits), d).unwrap();
            PagePool::new(&device, row, heads, page, sequences * tokens / page).unwrap()
        });
        let each = tokens / page;
        let tables: Vec<Vec<u32>> =
            (0..sequences).map(|s| (0..each).map(|i| (i * sequences + s) as u32).collect()).collect();
        let spans: Vec<_> = tables.iter().map(|t| Span { first: 0, len: tokens, new: 1, pages: t }).collect();
        let batch = Batch::new(&device, page, &spans).unwrap();
        let q = device.upload(&vec![half::f16::ONE; sequences * 4 * heads * d], &[sequences, 4 * heads, d]).unwrap();
        let out = device.zeros(DType::F16, &[sequences, 4 * heads, d]).unwrap();
        let params = AttentionParams::for_head_dim(d);
        let t = time(&device, 30, |e| attention(e, &q, &pools[0], &pools[1], &batch, &params, &out, None));
        report(&format!("attention k{key}v{value}, 8 x 32768"), pools.iter().map(PagePool::bytes).sum(), t);
        let t = time(&device, 30, |e| {
            let spans = &spans[..1];
            let batch = Batch::new(&device, page, spans)?;
            attention(e, &q.slice(0..1)?, &pools[0], &pools[1], &batch, &params, &out.slice(0..1)?, None)
        });
        println!("  1 x 32768 with a new batch each: {:.4} ms", t * 1e3);
    }
}
