//! Caches and batches as a whole.

use super::*;

/// Bytes of the positions that a sequence holds, by layer and side: decoded in the rotated domain, so bit-exact.
pub fn content(cache: &mut KvCache, seq: tqkv::SequenceId) -> Vec<Vec<u32>> {
    let device = cache.device().clone();
    let len = cache.len(seq).unwrap();
    let config = cache.config().clone();
    let mut all = vec![];
    for layer in 0..config.layers() {
        for side in [tqkv::cache::Side::Key, tqkv::cache::Side::Value] {
            let out = device.zeros(DType::F32, &[len, config.kv_heads(), config.head_dim()]).unwrap();
            let mut encoder = device.encoder().unwrap();
            let (domain, order) = (Domain::Rotated, RowOrder::TokenMajor);
            cache.dequantize(&mut encoder, layer, side, seq, 0..len, domain, order, &out).unwrap();
            encoder.submit_and_wait().unwrap();
            all.push(out.read::<f32>().unwrap().iter().map(|x| x.to_bits()).collect());
        }
    }
    all
}

pub fn a_truncated_cache_forgets(device: &Device) {
    let (layers, kv_heads, heads, d) = (2, 2, 4, 64);
    let config = CacheConfig::new(layers, kv_heads, d).codec("k5v4".parse().unwrap()).page_size(8).capacity(96);
    let config = config.codec_at(1, CodecPair::both(Codec::tq(3)));
    let mut rng = Rng(7);
    let step = |cache: &mut KvCache, tokens: &[(tqkv::SequenceId, usize)], seed: u64| -> Vec<f32> {
        let mut data = Rng(seed);
        let n: usize = tokens.iter().map(|t| t.1).sum();
        let mut outs = vec![];
        let mut encoder = device.encoder().unwrap();
        for layer in 0..layers {
            let k = device.upload(&data.normals(n * kv_heads * d), &[n, kv_heads, d]).unwrap();
            let v = device.upload(&data.normals(n * kv_heads * d), &[n, kv_heads, d]).unwrap();
            let q = device.upload(&data.normals(n * heads * d), &[n, heads, d]).unwrap();
            let out = device.zeros(DType::F32, &[n, heads, d]).unwrap();
            cache.append(&mut encoder, layer, tokens, &k, &v).unwrap();
            cache.attend(&mut encoder, layer, tokens, &q, &out, None, &AttentionParams::for_head_dim(d)).unwrap();
            outs.push(out);
        }
        encoder.submit_and_wait().unwrap();
        outs.iter().flat_map(|o| o.read::<f32>().unwrap()).collect()
    };
    let mut rolled = KvCache::new(device, config.clone()).unwrap();
    let mut straight = KvCache::new(device, config).unwrap();
    let (a, b) = (rolled.add_sequence(), straight.add_sequence());
    let other = rolled.add_sequence();
    for round in 0..12u64 {
        let n = 1 + rng.below(6);
        // Tokens that are rejected, and another sequence that takes pages in between.
        let rejected = 1 + rng.below(9);
        let len = rolled.len(a).unwrap();
        step(&mut rolled, &[(a, rejected)], 1000 + round);
        if round < 3 {
            step(&mut rolled, &[(other, 5)], 2000 + round);
        }
        rolled.truncate(a, len).unwrap();
        let got = step(&mut rolled, &[(a, n)], round);
        let want = step(&mut straight, &[(b, n)], round);
        assert_eq!(got, want, "round {round}");
        assert!(content(&mut rolled, a) == content(&mut straight, b), "round {round}");
    }
    rolled.free_sequence(a).unwrap();
    rolled.free_sequence(other).unwrap();
    assert_eq!(rolled.free_pages(), 12);
}

/// 64 sequences of 1 to 4096 positions, in a full layer and in one with a window and sinks.
pub fn a_batch_equals_its_sequences(device: &Device) {
    let (kv_heads, heads, d) = (1, 2, 64);
    let mut rng = Rng(8);
    let mut lens: Vec<usize> = (0..64).map(|_| 1 + rng.below(4096)).collect();
    (lens[17], lens[40]) = (1, 4096);
    let sinks = Sinks { positions: 4, codec: CodecPair::both(Codec::F16) };
    let config = CacheConfig::new(2, kv_heads, d).kind_at(1, LayerKind::Window(300)).sinks_at(1, sinks);
    let capacity = lens.iter().map(|n| n.next_multiple_of(64)).sum();
    let mut cache = KvCache::new(device, config.capacity(capacity)).unwrap();
    let tokens: Vec<_> = lens.iter().map(|&n| (cache.add_sequence(), n)).collect();
    let n: usize = lens.iter().sum();
    let (k, v) = (rng.normals(n * kv_heads * d), rng.normals(n * kv_heads * d));
    let (k, v) = (device.upload(&k, &[n, kv_heads, d]).unwrap(), device.upload(&v, &[n, kv_heads, d]).unwrap());
    let q = device.upload(&rng.normals(tokens.len() * heads * d), &[tokens.len(), heads, d]).unwrap();
    let params = AttentionParams::for_head_dim(d);
    let one_each: Vec<_> = tokens.iter().map(|t| (t.0, 1)).collect();
    for layer in 0..2 {
        let out = Guarded::new(device, DType::F32, &[tokens.len(), heads, d]);
        let lse = Guarded::new(device, DType::F32, &[tokens.len(), heads]);
        run(device, |e| {
            cache.append(e, layer, &tokens, &k, &v)?;
            cache.attend(e, layer, &one_each, &q, &out.buffer, Some(&lse.buffer), &params)
        });
        let (out, lse) = (out.take(), lse.take());
        for (i, &one) in one_each.iter().enumerate() {
            let single = Guarded::new(device, DType::F32, &[1, heads, d]);
            let single_lse = Guarded::new(device, DType::F32, &[1, heads]);
            let q = q.slice(i..i + 1).unwrap();
            run(device, |e| cache.attend(e, layer, &[one], &q, &single.buffer, Some(&single_lse.buffer), &params));
            let want: Vec<f64> = single.take().iter().map(|&x| x as f64).collect();
            let tolerance = 2.0 * attention_tolerance(device, DType::F32, DType::F32);
            let error = relative_error(&out[i * heads * d..][..heads * d], &want);
            assert!(error <= tolerance, "layer {layer}, sequence {i}: {error:e}");
            for (got, want) in lse[i * heads..].iter().zip(single_lse.take()) {
                assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "layer {layer}, sequence {i}");
            }
        }
    }
}

pub fn nothing_is_no_error(device: &Device) {
    let config = CacheConfig::new(1, 2, 64).capacity(64);
    let mut cache = KvCache::new(device, config).unwrap();
    let seq = cache.add_sequence();
    let none = device.zeros(DType::F32, &[0, 2, 64]).unwrap();
    let params = AttentionParams::for_head_dim(64);
    let out = device.zeros(DType::F32, &[0, 2, 64]).unwrap();
    run(device, |e| {
        cache.append(e, 0, &[(seq, 0)], &none, &none)?;
        cache.attend(e, 0, &[(seq, 0)], &none, &out, None, &params)
    });
    assert_eq!(cache.len(seq).unwrap(), 0);
    device.encoder().unwrap().submit_and_wait().unwrap();
    assert_eq!(device.zeros(DType::F32, &[3, 0]).unwrap().read::<f32>().unwrap(), [0f32; 0]);
}
