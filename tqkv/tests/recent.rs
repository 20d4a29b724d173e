//! Layers that store their newest positions apart: what truncation leaves of them, and what is refused. Random schedules, with sinks
//! and shifted channels too, are in `checks/tests/schedules.rs`.

mod support;

use support::*;
use tqkv::cache::{LayerKind, RECENT_SLACK, Recent, Sinks};
use tqkv::compute::DeviceKind;
use tqkv::ops::*;
use tqkv::{CacheConfig, CodecPair, DType, Device, Error, KvCache};

const D: usize = 64;
const KV_HEADS: usize = 2;
const HEADS: usize = 6;
const NEWEST: usize = 12;

fn pair(name: &str) -> CodecPair {
    name.parse().unwrap()
}

/// Keys and values of a position, the same whenever it is asked for.
fn token(seed: u64) -> [Vec<f32>; 2] {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9) + 5);
    [rng.normals(KV_HEADS * D), rng.normals(KV_HEADS * D)]
}

/// A truncated sequence goes on as the one that never had those tokens, to the last bit, up to the slack; then its own rows serve.
fn truncation_within_the_slack_makes_no_difference(device: &Device) {
    for (cut, same) in [(1, true), (RECENT_SLACK, true), (RECENT_SLACK + NEWEST + 30, false)] {
        let mut cache = KvCache::new(
            device,
            CacheConfig::new(1, KV_HEADS, D)
                .page_size(8)
                .codec(pair("k2v2"))
                .recent(Recent { positions: NEWEST, codec: pair("k8v8") }),
        )
        .unwrap();
        let (a, b) = (cache.add_sequence(), cache.add_sequence());
        let feed = |cache: &mut KvCache, id, range: std::ops::Range<u64>| {
            for t in range {
                let side = |side: usize| device.upload(&token(t)[side], &[1, KV_HEADS, D]).unwrap();
                run(device, |e| cache.append(e, 0, &[(id, 1)], &side(0), &side(1)));
            }
        };
        let len = 200u64;
        feed(&mut cache, a, 0..len);
        cache.truncate(a, len as usize - cut).unwrap();
        feed(&mut cache, b, 0..len - cut as u64);
        let q = device.upload(&Rng(3).normals(HEADS * D), &[1, HEADS, D]).unwrap();
        let attend = |cache: &mut KvCache, id| {
            let out = Guarded::new(device, DType::F32, &[1, HEADS, D]);
            let params = AttentionParams::for_head_dim(D);
            run(device, |e| cache.attend(e, 0, &[(id, 1)], &q, &out.buffer, None, &params));
            out.take()
        };
        assert_eq!(attend(&mut cache, a) == attend(&mut cache, b), same, "{cut} tokens cut");
        feed(&mut cache, a, 1000..1000 + NEWEST as u64);
        feed(&mut cache, b, 1000..1000 + NEWEST as u64);
        assert!(attend(&mut cache, a) == attend(&mut cache, b), "{cut} tokens cut, {NEWEST} later");
    }
}

/// What is stored in several places is one softmax, on every device as on the CPU: codecs, head dims, groups of heads, windows, caps, logits of sinks,
/// shifted channels; and sequences that have no other positions than their newest.
fn extents_are_one_softmax(device: &Device) {
    let cases = [
        ("k4v4", "f16", "k8v8", 128, 4, None, None),
        ("k4v4", "f16", "k8v8", 128, 8, Some(40), Some(20.0)),
        ("k3v3", "k8v8", "f16", 128, 4, None, Some(3.0)),
        ("k5v4", "f16", "k6v7", 64, 1, Some(100), None),
        ("k2v2", "k4v3", "k8v8", 96, 3, None, None),
        ("seed4", "f16", "seed4", 64, 5, None, None),
        ("f16", "f16", "f16", 80, 2, None, None),
        ("k8v8", "f16", "f32", 256, 4, None, None),
        ("k4v4", "f16", "k8v8", 512, 4, None, None),
    ];
    // A processor that plays a GPU is slow.
    let kinds = if device.info().kind == DeviceKind::Wgpu { 1 } else { 3 };
    for (own, first, newest, d, group, window, softcap) in cases {
        for (dtype, sinks, recent) in
            [(DType::F16, 1, 20), (DType::F32, 5, 33), (DType::F16, 0, 64)].into_iter().take(kinds)
        {
            let (kv_heads, lens) = (2, [300usize, 77, 1500, 9]);
            let (heads, n) = (kv_heads * group, lens.iter().sum::<usize>());
            let mut rng = Rng(d as u64 + group as u64);
            let (k, v) = (rng.normals(n * kv_heads * d), rng.normals(n * kv_heads * d));
            let q: Vec<f32> = rng.normals(lens.len() * heads * d).iter().map(|&x| rounded(dtype, 2.0 * x)).collect();
            let (logits, channels) = (rng.normals(heads), rng.normals(kv_heads * d));
            let [(want, want_lse), (got, got_lse)] = [&Device::cpu(), device].map(|device| {
                let config = CacheConfig::new(1, kv_heads, d).page_size(16).codec(pair(own));
                let config = config.sinks(Sinks { positions: sinks, codec: pair(first) });
                let config = config.recent(Recent { positions: recent, codec: pair(newest) });
                let config = window.map_or(config.clone(), |w| config.kind_at(0, LayerKind::Window(w)));
                let scale = channels.iter().map(|x: &f32| 0.5 + x.abs()).collect::<Vec<_>>();
                let config = if group == 4 { config.channels_at(0, channels.clone(), scale) } else { config };
                let mut cache = KvCache::new(device, config.capacity(4096)).unwrap();
                let tokens: Vec<_> = lens.iter().map(|&len| (cache.add_sequence(), len)).collect();
                let [k, v] = [&k, &v].map(|x| device.upload(x, &[n, kv_heads, d]).unwrap());
                let one_each: Vec<_> = tokens.iter().map(|t| (t.0, 1)).collect();
                // The CPU answers f32 queries exactly.
                let q_type = if device.info().kind == DeviceKind::Cpu { DType::F32 } else { dtype };
                let q = upload(device, q_type, &q, &[lens.len(), heads, d]);
                let out = Guarded::new(device, DType::F32, &[lens.len(), heads, d]);
                let lse = Guarded::new(device, DType::F32, &[lens.len(), heads]);
                let sink_logits = (group == 3).then(|| device.upload(&logits, &[heads]).unwrap());
                let params = AttentionParams { softcap, sink_logits, ..AttentionParams::for_head_dim(d) };
                run(device, |e| cache.append(e, 0, &tokens, &k, &v));
                run(device, |e| cache.attend(e, 0, &one_each, &q, &out.buffer, Some(&lse.buffer), &params));
                (out.take(), lse.take())
            });
            let name = format!("{own}+s{sinks}{first}+r{recent}{newest} D={d} group {group} {dtype}");
            let tolerance = 2.0 * attention_tolerance(device, dtype, DType::F32);
            for (i, (want, got)) in want.chunks(d).zip(got.chunks(d)).enumerate() {
                let want: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                let error = relative_error(got, &want);
                assert!(error <= tolerance, "{name}, sequence {} head {}: {error:e}", i / heads, i % heads);
                let (want, got) = (want_lse[i], got_lse[i]);
                assert!(
                    (got - want).abs() as f64 <= tolerance * want.abs().max(1.0) as f64,
                    "{name}: lse {got} {want}"
                );
            }
        }
    }
}

fn what_does_not_fit_is_said(device: &Device) {
    // More new tokens than there is room for as newest, while there is room for them as such.
    let recent = Recent { positions: 4, codec: pair("k8v8") };
    let base = CacheConfig::new(1, KV_HEADS, D).page_size(8).capacity(400).recent(recent).recent_capacity(104);
    let mut cache = KvCache::new(device, base.clone()).unwrap();
    let id = cache.add_sequence();
    let x = |n: usize| device.zeros(DType::F32, &[n, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    let refused = cache.append(&mut encoder, 0, &[(id, 105)], &x(105), &x(105));
    assert!(matches!(refused, Err(Error::OutOfPages { .. })), "{refused:?}");
    assert_eq!((cache.len(id), cache.usage().used), (Ok(0), 0));
    for _ in 0..20 {
        cache.append(&mut encoder, 0, &[(id, 16)], &x(16), &x(16)).unwrap();
    }
    assert_eq!(cache.len(id), Ok(320));
    // Snapshots keep caches apart that differ in what they store, or in how keys are shifted.
    let mut file = vec![];
    encoder.submit_and_wait().unwrap();
    cache.write_snapshot(&[(id, 320)], &mut file, b"m").unwrap();
    let ones = vec![1.0; KV_HEADS * D];
    for other in [
        base.clone().recent(Recent { positions: 5, ..recent }),
        base.clone().recent(Recent { codec: pair("k4v8"), ..recent }),
        base.clone().recent(Recent { positions: 0, ..recent }),
        base.clone().channels_at(0, ones.clone(), ones.clone()),
    ] {
        let refused = KvCache::new(device, other).unwrap().read_snapshot(&file[..], b"m");
        assert!(matches!(refused, Err(Error::Geometry { .. })), "{refused:?}");
    }
    assert!(KvCache::new(device, base.clone()).unwrap().read_snapshot(&file[..], b"m").is_ok());
    let short = base.clone().channels_at(0, ones[1..].to_vec(), ones.clone()).bytes();
    assert!(matches!(short, Err(Error::Shape { what: "shift", .. })), "{short:?}");
    let shared = CacheConfig::new(2, KV_HEADS, D).kind_at(1, LayerKind::Shared(0)).channels_at(1, ones.clone(), ones);
    assert!(matches!(shared.bytes(), Err(Error::SharedLayer { layer: 1, source_layer: 0 })));
    let none = base.recent_capacity(0).bytes();
    assert!(matches!(none, Err(Error::Zero { what: "recent_capacity" })), "{none:?}");
}

suite!(cpu, wgpu, cuda: (
    truncation_within_the_slack_makes_no_difference, extents_are_one_softmax, what_does_not_fit_is_said,
));
