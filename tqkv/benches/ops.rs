//! The operations on the CPU: `cargo bench -p tqkv -- attention/32768`. `TQKV_CPU` chooses the instructions.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use tqkv::format::{CodecPair, RowFormat};
use tqkv::ops::*;
use tqkv::{Buffer, CommandEncoder, DType, Device, Result};

const HEAD_DIM: usize = 128;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;

/// Numbers near N(0, 1).
fn random(device: &Device, shape: &[usize]) -> Buffer {
    let mut state = shape.len() as u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    let x: Vec<f32> = (0..shape.iter().product()).map(|_| (0..4).map(|_| uniform()).sum::<f32>() * 1.7).collect();
    device.upload(&x, shape).unwrap()
}

fn run(device: &Device, record: impl FnOnce(&mut CommandEncoder) -> Result<()>) {
    let mut encoder = device.encoder().unwrap();
    record(&mut encoder).unwrap();
    encoder.submit_and_wait().unwrap();
}

fn pool(device: &Device, codec: tqkv::Codec, positions: usize) -> PagePool {
    let pool = PagePool::new(device, RowFormat::new(codec, HEAD_DIM).unwrap(), KV_HEADS, positions, 1).unwrap();
    let x = random(device, &[positions, KV_HEADS, HEAD_DIM]);
    let batch = Batch::contiguous(device, positions, 0, positions, positions).unwrap();
    run(device, |e| quantize(e, &[(&x, &pool)], &batch));
    pool
}

/// One query over a context, and a prefill.
fn attention_(c: &mut Criterion) {
    let device = Device::cpu();
    for (positions, new) in [(4096, 1), (32_768, 1), (2048, 2048)] {
        let name = if new == 1 { format!("attention/{positions}") } else { format!("prefill/{new}") };
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        for name in ["f32", "f16", "seed4", "seed8", "k8v8", "k6v6", "k5v4", "k4v4", "k3v3", "k2v2"] {
            let pair: CodecPair = name.parse().unwrap();
            let (key, value) = (pool(&device, pair.key, positions), pool(&device, pair.value, positions));
            let batch = Batch::contiguous(&device, positions, 0, positions, new).unwrap();
            let q = random(&device, &[new, HEADS, HEAD_DIM]);
            let out = device.zeros(DType::F32, q.shape()).unwrap();
            let params = AttentionParams::for_head_dim(HEAD_DIM);
            group.throughput(Throughput::Bytes((key.bytes() + value.bytes()) as u64));
            group.bench_function(BenchmarkId::from_parameter(name), |b| {
                b.iter(|| run(&device, |e| attention(e, &q, &key, &value, &batch, &params, black_box(&out), None)));
            });
        }
    }
}

/// Rows in and out of the cache, and the transform by itself; throughput in bytes of f32.
fn rows(c: &mut Criterion) {
    let (device, positions) = (Device::cpu(), 8192);
    let x = random(&device, &[positions, KV_HEADS, HEAD_DIM]);
    let out = device.zeros(DType::F32, &[KV_HEADS, positions, HEAD_DIM]).unwrap();
    let batch = Batch::contiguous(&device, positions, 0, positions, positions).unwrap();
    for name in ["seed4", "seed8", "k8v8", "k5v5", "k4v4", "k3v3", "k2v2"] {
        let pool = pool(&device, name.parse::<CodecPair>().unwrap().key, positions);
        let mut group = c.benchmark_group("rows");
        group.throughput(Throughput::Bytes(x.bytes() as u64));
        group.bench_function(BenchmarkId::new("quantize", name), |b| {
            b.iter(|| run(&device, |e| quantize(e, &[(&x, &pool)], &batch)));
        });
        for (what, domain) in [("dequantize", Domain::Rotated), ("restore", Domain::Original)] {
            group.bench_function(BenchmarkId::new(what, name), |b| {
                let (all, order) = (0..positions, RowOrder::HeadMajor);
                b.iter(|| run(&device, |e| dequantize(e, &pool, &batch, 0, all.clone(), domain, order, &out)));
            });
        }
    }
    let mut group = c.benchmark_group("rows");
    let row = RowFormat::new(tqkv::Codec::tq(4), HEAD_DIM).unwrap();
    let rotated = device.zeros(DType::F32, x.shape()).unwrap();
    group.throughput(Throughput::Bytes(x.bytes() as u64));
    group.bench_function("rotate", |b| {
        b.iter(|| run(&device, |e| rotate(e, &row, Direction::Forward, &x, black_box(&rotated))));
    });
}

criterion_group!(benches, attention_, rows);
criterion_main!(benches);
