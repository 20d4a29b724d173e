//! The operations against a device's bandwidth, measured in the same run: `ops_bench [DEVICE] [SCALE]`.
//!
//! Times are the device's: from the hand-over to the end, and differences between submissions of many and of few operations. Buffers are larger than caches. Attention is compared with float64. SCALE divides the sizes.

use std::time::Instant;
use tqkv::compute::KernelSource;
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, Codec, CommandEncoder, DType, Device, Result};

const READ: &str = "
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<u32>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  var sum = vec4(0u);
  for (var i = id.x; i < arrayLength(&x); i += 1048576u) { sum ^= x[i]; }
  if (all(sum == vec4(1u, 2u, 3u, 4u))) { y[0] = 1u; }
}";

const COPY: &str = "
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  for (var i = id.x; i < arrayLength(&x); i += 1048576u) { y[i] = x[i]; }
}";

/// Seconds of one operation, the median of some differences.
fn time(device: &Device, mut op: impl FnMut(&mut CommandEncoder, usize) -> Result<()>) -> Result<f64> {
    let mut run = |n: usize| -> Result<f64> {
        let mut encoder = device.encoder()?;
        (0..n).try_for_each(|i| op(&mut encoder, i))?;
        let submitted = encoder.submit()?;
        let start = Instant::now();
        submitted.wait()?;
        Ok(start.elapsed().as_secs_f64())
    };
    let once = run(2)?.min(run(2)?) / 2.0;
    let n = ((0.03 / once) as usize).clamp(2, 100);
    let mut times = (0..5).map(|_| Ok((run(3 * n)? - run(n)?) / (2 * n) as f64)).collect::<Result<Vec<_>>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[2])
}

fn report(what: &str, seconds: f64, bytes: usize, peak: f64) {
    let rate = bytes as f64 / seconds;
    println!("{what:<44} {:>9.1} us {:>8.1} GB/s {:>6.1} %", seconds * 1e6, rate / 1e9, 100.0 * rate / peak);
}

fn noise(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    // The sum of four uniform numbers is normal enough.
    (0..n).map(|_| next() + next() + next() + next()).collect()
}

fn filled(device: &Device, row: RowFormat, kv_heads: usize, x: &Buffer) -> Result<PagePool> {
    let tokens = x.shape()[0];
    let pool = PagePool::new(device, row, kv_heads, tokens, 1)?;
    let mut encoder = device.encoder()?;
    quantize(&mut encoder, &[(x, &pool)], &Batch::contiguous(device, tokens, 0, tokens, tokens)?)?;
    encoder.submit_and_wait()?;
    Ok(pool)
}

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let device = Device::open(&args.next().unwrap_or_else(|| "wgpu".to_owned()))?;
    let scale: usize = args.next().and_then(|s| s.parse().ok()).unwrap_or(1);
    println!("{:?}", device.info());
    let (d, kv_heads, heads) = (128, 8, 32);

    let bytes = (1 << 30) / scale;
    let x = device.upload(&noise(bytes / 4), &[bytes / 4])?;
    let y = device.zeros(DType::F32, &[bytes / 4])?;
    let commanded = 2.0 * bytes as f64 / time(&device, |e, _| copy(e, &x, &y))?;
    device.kernels().register("copy", KernelSource::Wgsl(COPY.to_owned()));
    let copying = 2.0 * bytes as f64 / time(&device, |e, _| e.dispatch("copy", [4096, 1, 1], &[&x, &y], &[]))?;
    println!("copy {:.1} GB/s (read and written), by copy command {:.1}", copying / 1e9, commanded / 1e9);
    let copying = copying.max(commanded);
    device.kernels().register("read", KernelSource::Wgsl(READ.to_owned()));
    let reading = bytes as f64 / time(&device, |e, _| e.dispatch("read", [4096, 1, 1], &[&x, &y], &[]))?;
    println!("read {:.1} GB/s", reading / 1e9);
    drop((x, y));

    let tokens = (64 << 20) / d / kv_heads / scale;
    let x = device.upload(&noise(tokens * kv_heads * d), &[tokens, kv_heads, d])?;
    for codec in [Codec::tq(4), Codec::seed(4), Codec::tq(3), Codec::tq(5), Codec::tq(8)] {
        let row = RowFormat::new(codec, d)?;
        let pools = [filled(&device, row, kv_heads, &x)?, filled(&device, row, kv_heads, &x)?];
        let batch = Batch::contiguous(&device, tokens, 0, tokens, 0)?;
        for dtype in [DType::F16, DType::F32] {
            for domain in [Domain::Rotated, Domain::Original] {
                let out = device.zeros(dtype, &[kv_heads, tokens, d])?;
                let seconds = time(&device, |e, i| {
                    dequantize(e, &pools[i % 2], &batch, 0, 0..tokens, domain, RowOrder::HeadMajor, &out)
                })?;
                let bytes = tokens * kv_heads * (row.bytes() + d * dtype.size());
                report(&format!("dequantize {codec} -> {dtype} {domain:?}"), seconds, bytes, copying);
            }
        }
    }
    drop(x);

    let tokens = 32768 / scale;
    let x = device.upload(&noise(tokens * kv_heads * d), &[tokens, kv_heads, d])?;
    let halves: Vec<half::f16> = noise(tokens * kv_heads * d).into_iter().map(half::f16::from_f32).collect();
    let halves = device.upload(&halves, &[tokens, kv_heads, d])?;
    for codec in [Codec::tq(4), Codec::seed(4), Codec::tq(8), Codec::F16] {
        let row = RowFormat::new(codec, d)?;
        let pools =
            [PagePool::new(&device, row, kv_heads, tokens, 1)?, PagePool::new(&device, row, kv_heads, tokens, 1)?];
        let batch = Batch::contiguous(&device, tokens, 0, tokens, tokens)?;
        for x in [&x, &halves] {
            let seconds = time(&device, |e, i| quantize(e, &[(x, &pools[i % 2])], &batch))?;
            let bytes = tokens * kv_heads * (row.bytes() + d * x.dtype().size());
            report(&format!("quantize {} -> {codec} {tokens}x{kv_heads}x{d}", x.dtype()), seconds, bytes, copying);
        }
    }
    let out = device.zeros(DType::F32, x.shape())?;
    let row = RowFormat::new(Codec::tq(4), d)?;
    let seconds = time(&device, |e, _| rotate(e, &row, Direction::Forward, &x, &out))?;
    report("rotate f32", seconds, 2 * x.bytes(), copying);

    for tokens in [131_072 / scale, 8192 / scale] {
        let x = noise(tokens * kv_heads * d);
        let x = device.upload(&x, &[tokens, kv_heads, d])?;
        let q = noise(heads * d);
        let query = device.upload(&q, &[1, heads, d])?;
        for (k, v) in [
            (Codec::tq(4), Codec::tq(4)),
            (Codec::tq(5), Codec::tq(4)),
            (Codec::tq(3), Codec::tq(3)),
            (Codec::tq(8), Codec::tq(8)),
            (Codec::seed(4), Codec::seed(4)),
            (Codec::F16, Codec::F16),
        ] {
            let (k_row, v_row) = (RowFormat::new(k, d)?, RowFormat::new(v, d)?);
            let keys = [filled(&device, k_row, kv_heads, &x)?, filled(&device, k_row, kv_heads, &x)?];
            let values = [filled(&device, v_row, kv_heads, &x)?, filled(&device, v_row, kv_heads, &x)?];
            let batch = Batch::contiguous(&device, tokens, 0, tokens, 1)?;
            let params = AttentionParams::for_head_dim(d);
            let out = device.zeros(DType::F32, &[1, heads, d])?;
            let seconds =
                time(&device, |e, i| attention(e, &query, &keys[i % 2], &values[i % 2], &batch, &params, &out, None))?;
            let bytes = tokens * kv_heads * (k_row.bytes() + v_row.bytes());
            report(&format!("attention {k}/{v} 32/8 heads, {tokens} positions"), seconds, bytes, reading);
            if k == Codec::tq(4) {
                println!("  error against float64: {:.2e}", error(&keys[0], &values[0], &q, heads, &out)?);
            }
        }
    }
    Ok(())
}

/// The relative difference to float64 over what the cache decodes to, for the first heads.
fn error(key: &PagePool, value: &PagePool, q: &[f32], heads: usize, out: &Buffer) -> Result<f64> {
    let device = key.codes().device();
    let (tokens, d) = (key.page_size(), key.row().head_dim());
    let batch = Batch::contiguous(device, tokens, 0, tokens, 0)?;
    let decoded = |pool: &PagePool| -> Result<Vec<f32>> {
        let out = device.zeros(DType::F32, &[pool.kv_heads(), tokens, d])?;
        let mut encoder = device.encoder()?;
        dequantize(&mut encoder, pool, &batch, 0, 0..tokens, Domain::Original, RowOrder::HeadMajor, &out)?;
        encoder.submit_and_wait()?;
        out.slice(0..1)?.read()
    };
    let (keys, values) = (decoded(key)?, decoded(value)?);
    let (keys, values): (Vec<&[f32]>, Vec<&[f32]>) = (keys.chunks(d).collect(), values.chunks(d).collect());
    let (mut off, mut norm) = (0.0, 0.0);
    for head in 0..heads / key.kv_heads() {
        let query = tqkv::reference::Query {
            q: &q[head * d..][..d],
            scale: 1.0 / (d as f64).sqrt(),
            softcap: None,
            sink: None,
        };
        let want = tqkv::reference::attention(&query, &keys, &values).0;
        for (got, want) in out.slice(0..1)?.reshape(&[heads, d])?.slice(head..head + 1)?.read::<f32>()?.iter().zip(want)
        {
            off += (*got as f64 - want).powi(2);
            norm += want * want;
        }
    }
    Ok((off / norm).sqrt())
}
