//! A small run through everything of the CPU that is `unsafe`, made so that Miri and valgrind finish it: every codec, two
//! head_dims, two pages, attention with a window and sinks, a replay, borrowed memory.
//!
//! `cargo +nightly miri test -p tqkv --no-default-features --test miri`, with `MIRIFLAGS=-Zmiri-ignore-leaks` for rayon's threads and
//! `TQKV_CPU=portable`; see `docs/unsafe.md`.

use tqkv::cache::{LayerKind, Recent, Replay, Sinks};
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, DType, Device, KvCache};

const KV_HEADS: usize = 1;
const HEADS: usize = 2;
const PAGE: usize = 4;
const TOKENS: usize = 7;

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i as f32 * 0.73).sin()).collect()
}

fn codecs(head_dim: usize) -> Vec<Codec> {
    let native = (2..=8).map(Codec::tq);
    let seed = [2, 3, 4, 5, 6, 8].map(Codec::seed).into_iter();
    let all = native.chain(seed).chain([Codec::F16, Codec::F32]);
    all.filter(|&codec| RowFormat::new(codec, head_dim).is_ok()).collect()
}

/// Bytes that the caller owns, of which none may be read past the end.
fn borrowed(device: &Device, bytes: usize) -> Buffer {
    let mut words = vec![0u32; bytes.div_ceil(4)];
    let start = words.as_mut_ptr().cast();
    // SAFETY: the vector has as many bytes, and goes with the buffer.
    unsafe { Buffer::from_host_ptr(device, start, DType::U8, &[bytes], Box::new(words)) }.unwrap()
}

/// What was written comes back, and attention gives a mean of it.
fn round_trip(device: &Device, row: RowFormat, own: bool) {
    let d = row.head_dim();
    let pool = match own {
        true => PagePool::new(device, row, KV_HEADS, PAGE, 2).unwrap(),
        false => {
            let bytes = row.row_bytes().next_multiple_of(4) + row.scale_bytes().next_multiple_of(4);
            let strides = Strides { page: PAGE * bytes, head: bytes, row: bytes };
            let memory = borrowed(device, 2 * PAGE * bytes);
            let scales = memory.slice(row.row_bytes().next_multiple_of(4)..memory.len()).unwrap();
            let scales = (row.scale_bytes() > 0).then_some((&scales, strides));
            PagePool::strided(row, [2, KV_HEADS, PAGE], (&memory, strides), scales).unwrap()
        }
    };
    let batch = Batch::new(device, PAGE, &[Span { first: 0, len: TOKENS, new: TOKENS, pages: &[1, 0] }]).unwrap();
    let x = numbers(TOKENS * d);
    let given = device.upload(&x, &[TOKENS, KV_HEADS, d]).unwrap();
    let (decoded, out) = (
        device.zeros(DType::F32, &[TOKENS, KV_HEADS, d]).unwrap(),
        device.zeros(DType::F32, &[TOKENS, HEADS, d]).unwrap(),
    );
    let half: Vec<half::f16> = numbers(TOKENS * HEADS * d).into_iter().map(half::f16::from_f32).collect();
    let queries = device.upload(&half, &[TOKENS, HEADS, d]).unwrap();
    let logits = device.upload(&[0.5f32, -1.0], &[HEADS]).unwrap();
    let params = AttentionParams { window: Some(3), sink_logits: Some(logits), ..AttentionParams::for_head_dim(d) };
    let mut encoder = device.encoder().unwrap();
    quantize(&mut encoder, &[(&given, &pool)], &batch).unwrap();
    let order = RowOrder::TokenMajor;
    dequantize(&mut encoder, &pool, &batch, 0, 0..TOKENS, Domain::Original, order, &decoded).unwrap();
    attention(&mut encoder, &queries, &pool, &pool, &batch, &params, &out, None).unwrap();
    encoder.submit_and_wait().unwrap();
    let decoded = decoded.read::<f32>().unwrap();
    let (error, norm) = x.iter().zip(&decoded).fold((0.0, 0.0), |(e, n), (a, b)| (e + (a - b) * (a - b), n + a * a));
    // Two bits lose up to a third of a vector's squares.
    assert!(error < 0.4 * norm, "{row:?}: {error} of {norm}");
    assert!(out.read::<f32>().unwrap().iter().all(|x| x.is_finite() && x.abs() < 2.0));
}

#[test]
fn every_codec() {
    let device = Device::cpu_with_threads(1).unwrap();
    for head_dim in [16, 80] {
        for codec in codecs(head_dim) {
            let row = RowFormat::new(codec, head_dim).unwrap();
            round_trip(&device, row, true);
            round_trip(&device, row, false);
        }
    }
}

#[test]
fn a_cache_and_a_replay() {
    let device = Device::cpu_with_threads(1).unwrap();
    let pair = |name: &str| name.parse::<CodecPair>().unwrap();
    let config = CacheConfig::new(2, KV_HEADS, 16)
        .codec(pair("k3v4"))
        .kind_at(1, LayerKind::Window(3))
        .sinks(Sinks { positions: 2, codec: pair("f16") })
        .recent_at(0, Recent { positions: 2, codec: pair("k8v8") })
        .page_size(8)
        .capacity(32);
    let mut cache = KvCache::new(&device, config.clone()).unwrap();
    let id = cache.add_sequence();
    let x = device.upload(&numbers(3 * 16), &[3, KV_HEADS, 16]).unwrap();
    let q = device.upload(&numbers(3 * HEADS * 16), &[3, HEADS, 16]).unwrap();
    let out = device.zeros(DType::F32, &[3, HEADS, 16]).unwrap();
    let params = AttentionParams::for_head_dim(16);
    let mut replay = Replay::new(|step, encoder| {
        (0..2).try_for_each(|layer| step.append_and_attend(encoder, layer, &x, &x, &q, &out, None, &params))
    });
    for _ in 0..3 {
        replay.run(&mut cache, &[(id, 3)]).unwrap().wait().unwrap();
    }
    let twin = cache.fork(id).unwrap();
    replay.run(&mut cache, &[(twin, 3)]).unwrap().wait().unwrap();
    cache.truncate(twin, 11).unwrap();
    let mut file = vec![];
    cache.write_snapshot(&[(id, 9), (twin, 11)], &mut file, b"m").unwrap();
    let mut other = KvCache::new(&device, config).unwrap();
    let ids = other.read_snapshot(&file[..], b"m").unwrap();
    assert_eq!(ids.into_iter().map(|id| other.len(id).unwrap()).collect::<Vec<_>>(), [9, 11]);
    assert!(out.read::<f32>().unwrap().iter().all(|x| x.is_finite()));
}
