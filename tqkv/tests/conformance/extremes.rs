//! Attention where numbers are large, not finite, or not seen.

use super::*;

/// A query that sees something that is not a number gets nothing that is one, and neither does a merge; other heads, and the query
/// before it, get theirs.
pub fn what_is_not_a_number_stays_so(device: &Device) {
    let (d, kv_heads, heads, len, new) = (128, 2, 8, 40, 2);
    let mut rng = Rng(8);
    let codecs = [Codec::tq(4), Codec::tq(3), Codec::seed(4), Codec::F16];
    let types = [DType::F32, DType::F16];
    for (codec, dtype, (bad_key, bad_value, bad_query)) in codecs.into_iter().flat_map(|c| {
        let bad = [(true, false, false), (false, true, false), (false, false, true)];
        types.into_iter().flat_map(move |t| bad.into_iter().map(move |b| (c, t, b)))
    }) {
        let row = RowFormat::new(codec, d).unwrap();
        let mut vectors = |bad: bool, n: usize| {
            let mut x = rng.normals(n * d);
            // Of the last vector: it belongs to the last KV head, and the last query head.
            x[(n - 1) * d + 3] = if bad { f32::NAN } else { 1.0 };
            x
        };
        let (key, value) = (vectors(bad_key, len * kv_heads), vectors(bad_value, len * kv_heads));
        let q = upload(device, dtype, &vectors(bad_query, new * heads), &[new, heads, d]);
        let pools = [(&key, 0), (&value, 1)].map(|(x, _)| {
            let pool = new_pool(device, row, kv_heads, 64, 1).unwrap();
            let x = device.upload(x, &[len, kv_heads, d]).unwrap();
            run(device, |e| quantize(e, &[(&x, &pool)], &Batch::contiguous(device, 64, 0, len, len).unwrap()));
            pool
        });
        let batch = Batch::contiguous(device, 64, 0, len, new).unwrap();
        let params = AttentionParams::for_head_dim(d);
        let out = Guarded::new(device, DType::F32, &[new, heads, d]);
        let lse = Guarded::new(device, DType::F32, &[new, heads]);
        run(device, |e| attention(e, &q, &pools[0], &pools[1], &batch, &params, &out.buffer, Some(&lse.buffer)));
        let merged = Guarded::new(device, DType::F32, &[new, heads, d]);
        let parts = [(&out.buffer, &lse.buffer); 2];
        run(device, |e| merge(e, &parts, &merged.buffer, None));
        let name = format!("{codec} q {dtype}: key {bad_key} value {bad_value} query {bad_query}");
        let (out, lse, merged) = (out.take(), lse.take(), merged.take());
        for (r, lse) in lse.iter().enumerate() {
            let (query, head) = (r / heads, r % heads);
            let own = if bad_query { head == heads - 1 } else { head >= heads / 2 };
            // CUDA's tensor cores multiply a value by the weights of all queries, of which some are zero.
            if query == 0 && own && bad_value && device.info().kind == DeviceKind::Cuda && dtype != DType::F32 {
                continue;
            }
            let bad = query == new - 1 && own;
            for (i, x) in [&out, &merged].into_iter().flat_map(|x| x[r * d..][..d].iter().enumerate()) {
                // A dense row keeps its elements apart.
                let bad = bad && (i == 3 || codec != Codec::F16 || !bad_value);
                assert_eq!(x.is_nan(), bad, "{name}: query {query} head {head}");
            }
            assert_eq!(lse.is_nan(), bad && !bad_value, "{name}: query {query} head {head}, lse {lse}");
        }
    }
}

/// What is large or small on the way (a rotated query, a square, a product) but not in the end is as in f64.
pub fn queries_of_any_size(device: &Device) {
    let (heads, len) = (4, 70);
    // Sizes of queries and of keys.
    let sizes = [(1e37, 0.0), (1e37, 1.0), (1e9, 1e-9), (1e-30, 1e15), (1e30, 1e-30), (1e37, 1e-37), (1e-37, 1e37)];
    let codecs = [Codec::tq(3), Codec::tq(4), Codec::tq(8), Codec::seed(4), Codec::seed(5), Codec::F16, Codec::F32];
    for (codec, (d, (q_size, k_size))) in
        codecs.into_iter().flat_map(|c| [128, 512].into_iter().flat_map(move |d| sizes.map(|s| (c, (d, s)))))
    {
        let row = RowFormat::new(codec, d).unwrap();
        // What the codec cannot hold is another test's.
        let most = match row.codec() {
            Codec::F32 => f32::MAX,
            Codec::Seed { .. } => 1e16,
            _ => 1e4,
        };
        if k_size > most {
            continue;
        }
        // WGSL lets a GPU flush subnormal numbers, which many elements of such keys are.
        if device.info().kind == DeviceKind::Wgpu && codec == Codec::F32 && k_size < 1e-36 {
            continue;
        }
        let mut rng = Rng(9);
        let k: Vec<f32> = rng.normals(len * d).iter().map(|x| x * k_size).collect();
        let pools = [k, rng.normals(len * d)].map(|x| {
            let pool = new_pool(device, row, 1, len, 1).unwrap();
            let x = device.upload(&x, &[len, 1, d]).unwrap();
            run(device, |e| quantize(e, &[(&x, &pool)], &Batch::contiguous(device, len, 0, len, len).unwrap()));
            pool
        });
        // A query of equal elements is one large element after the rotation.
        let mut q: Vec<f32> = rng.normals(heads * d).iter().map(|x| x * q_size).collect();
        q[..d].fill(q_size);
        let batch = Batch::contiguous(device, len, 0, len, 1).unwrap();
        let params = AttentionParams::for_head_dim(d);
        let input = device.upload(&q, &[1, heads, d]).unwrap();
        let [out, keys, values] = [heads, len, len].map(|n| Guarded::new(device, DType::F32, &[1, n, d]));
        let lse = Guarded::new(device, DType::F32, &[1, heads]);
        run(device, |e| {
            for (pool, out) in pools.iter().zip([&keys, &values]) {
                dequantize(e, pool, &batch, 0, 0..len, Domain::Rotated, RowOrder::HeadMajor, &out.buffer)?;
            }
            attention(e, &input, &pools[0], &pools[1], &batch, &params, &out.buffer, Some(&lse.buffer))
        });
        let (keys, values, out, lse) = (keys.take(), values.take(), out.take(), lse.take());
        for (head, q) in q.chunks(d).enumerate() {
            let q: Vec<f32> = reference::rotate(&row, q).iter().map(|&x| x as f32).collect();
            let query = reference::Query { q: &q, scale: params.scale as f64, softcap: None, sink: None };
            let rows = |x| <[f32]>::chunks(x, d).collect::<Vec<_>>();
            let (want, want_lse) = reference::attention(&query, &rows(&keys), &rows(&values));
            let name = format!("{codec} D={d} queries of {q_size:e}, keys of {k_size:e}, head {head}");
            let tolerance = attention_tolerance(device, DType::F32, DType::F32);
            let error = relative_error(&out[head * d..][..d], &reference::restore(&row, &want));
            assert!(error <= tolerance, "{name}: {error:e}");
            let error = (lse[head] as f64 - want_lse).abs();
            assert!(error <= tolerance * want_lse.abs().max(1.0), "{name}: lse {} {want_lse}", lse[head]);
        }
    }
}

/// Scores of 1e8 and more, where f32 steps by more than exp can take: positions with the same key share the weight.
pub fn large_scores_share_the_weight(device: &Device) {
    let (d, most) = (64, 70);
    let mut rng = Rng(10);
    for (codec, size) in [
        (Codec::tq(4), 1e4),
        (Codec::tq(3), 1e4),
        (Codec::tq(8), 3e4),
        (Codec::seed(4), 3e4),
        (Codec::seed(8), 3e4),
        (Codec::F16, 3e4),
        (Codec::F32, 3e4),
        (Codec::seed(4), 1e9),
    ] {
        let row = RowFormat::new(codec, d).unwrap();
        let values = rng.normals(most * d);
        let pools = [vec![size; most * d], values].map(|x| {
            let pool = new_pool(device, row, 1, 16, 5).unwrap();
            let x = device.upload(&x, &[most, 1, d]).unwrap();
            let span = Span { first: 0, len: most, new: most, pages: &[3, 0, 4, 1, 2] };
            run(device, |e| quantize(e, &[(&x, &pool)], &Batch::new(device, 16, std::slice::from_ref(&span)).unwrap()));
            let batch = Batch::new(device, 16, &[span]).unwrap();
            let out = device.zeros(DType::F32, &[most, 1, d]).unwrap();
            let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
            run(device, |e| dequantize(e, &pool, &batch, 0, 0..most, domain, order, &out));
            (pool, out.read::<f32>().unwrap())
        });
        let [(key, keys), (value, values)] = &pools;
        let group = 3;
        for (n, dtype, sign, softcap) in [1, 5, most].into_iter().flat_map(|n| {
            let types = [DType::F32, DType::F16].into_iter().filter(move |&t| t == DType::F32 || size < 6e4);
            let signs = move |t| [1.0, -1.0].map(move |s| (n, t, s));
            types.flat_map(signs).flat_map(|(n, t, s)| [None, Some(50.0), Some(1e12)].map(move |c| (n, t, s, c)))
        }) {
            let q = upload(device, dtype, &vec![sign * size; group * d], &[1, group, d]);
            let span = Span { first: 0, len: n, new: 1, pages: &[3, 0, 4, 1, 2] };
            let batch = Batch::new(device, 16, &[span]).unwrap();
            let out = Guarded::new(device, DType::F32, &[1, group, d]);
            let lse = Guarded::new(device, DType::F32, &[1, group]);
            let params = AttentionParams { softcap, ..AttentionParams::for_head_dim(d) };
            run(device, |e| attention(e, &q, key, value, &batch, &params, &out.buffer, Some(&lse.buffer)));
            let mean: Vec<f64> =
                (0..d).map(|i| (0..n).map(|p| values[p * d + i] as f64).sum::<f64>() / n as f64).collect();
            let score = (0..d).map(|i| (sign * size) as f64 * keys[i] as f64).sum::<f64>() * params.scale as f64;
            let score = softcap.map_or(score, |c| c as f64 * (score / c as f64).tanh());
            let want = score + (n as f64).ln();
            let name = format!("{codec} {size:e} {n} positions, q {dtype} {sign}, softcap {softcap:?}");
            for (got, lse) in out.take().chunks(d).zip(lse.take()) {
                let error = relative_error(got, &mean);
                assert!(error <= attention_tolerance(device, dtype, DType::F32), "{name}: {error:e}");
                assert!((lse as f64 - want).abs() <= 2e-3 * want.abs(), "{name}: lse {lse} instead of {want}");
            }
        }
    }
}

/// Large scores that differ by less than f32 steps there: weights come of their differences none the less.
pub fn large_scores_are_told_apart(device: &Device) {
    // CUDA adds products of four elements in f32.
    if device.info().kind == DeviceKind::Cuda {
        return;
    }
    let (d, n) = (64, 300);
    let mut rng = Rng(11);
    for (codec, size) in [(Codec::tq(4), 1e4), (Codec::tq(8), 3e4), (Codec::seed(4), 3e4), (Codec::seed(6), 3e5)] {
        let row = RowFormat::new(codec, d).unwrap();
        let levels = &row.codebook().unwrap().levels;
        // Keys that differ in element 0 alone.
        let mut codes = vec![0; n * row.row_bytes()];
        for (p, bytes) in codes.chunks_mut(row.row_bytes()).enumerate() {
            let mut own: Vec<u16> = (0..d).map(|i| (i % levels.len()) as u16).collect();
            own[0] = ((p * 7) % levels.len()) as u16;
            row.pack(&own, bytes);
        }
        let scale = rounded(row.scale_dtype(), size);
        let decoded: Vec<_> = codes.chunks(row.row_bytes()).map(|c| reference::dequantize(&row, c, &[scale])).collect();
        let key = new_pool(device, row, 1, n, 1).unwrap();
        write_pool(&key, &codes, &vec![scale; n]);
        let value = Filled::new(device, &mut rng, RowFormat::new(Codec::tq(4), d).unwrap(), 1, n, 1);
        let keys: Vec<_> = decoded.iter().map(Vec::as_slice).collect();
        let values: Vec<_> = (0..n).map(|p| value.row(0, 0, p)).collect();
        for sign in [1.0, -1.0] {
            let mut q: Vec<f32> =
                (0..d).map(|i| sign * if i % 5 == 0 { -size } else { size } * (1 + i % 3) as f32).collect();
            q[0] = 4.0 / scale;
            for count in [5, 70, n] {
                let input = device.upload(&q, &[1, 1, d]).unwrap();
                let batch = Batch::contiguous(device, n, 0, count, 1).unwrap();
                let params = AttentionParams { domain: Domain::Rotated, ..AttentionParams::for_head_dim(d) };
                let out = Guarded::new(device, DType::F32, &[1, 1, d]);
                run(device, |e| attention(e, &input, &key, &value.pool, &batch, &params, &out.buffer, None));
                let query = reference::Query { q: &q, scale: params.scale as f64, softcap: None, sink: None };
                let (want, lse) = reference::attention(&query, &keys[..count], &values[..count]);
                let error = relative_error(&out.take(), &want);
                // Two floats hold 48 bits of a score, less what adding them up takes.
                let tolerance = 2e-5 + lse.abs() * 2f64.powi(-45);
                assert!(lse.abs() > 1e8, "the scores are not large: {lse}");
                assert!(error <= tolerance, "{codec} {size:e} {count} positions, scores near {lse:e}: {error:e}");
            }
        }
    }
}

/// What no query sees may be anything: rows outside windows, after the last position, and the rest of the pages.
pub fn what_is_not_seen_does_not_matter(device: &Device) {
    let (d, kv_heads, heads, page_size, len) = (64, 2, 4, 16, 150);
    let mut rng = Rng(12);
    for codec in [Codec::tq(4), Codec::tq(3), Codec::seed(8), Codec::F16, Codec::F32] {
        let row = RowFormat::new(codec, d).unwrap();
        let x = rng.normals(len * kv_heads * d);
        let x = device.upload(&x, &[len, kv_heads, d]).unwrap();
        let q = device.upload(&rng.normals(4 * heads * d), &[4, heads, d]).unwrap();
        let pages: Vec<u32> = (0..10).rev().collect();
        for (window, new) in [(Some(7), 1), (Some(33), 4), (None, 1)] {
            let mut results = vec![];
            for bad in [0u8, 0xff] {
                let pool = new_pool(device, row, kv_heads, page_size, 11).unwrap();
                let span = |first, new| [Span { first, len, new, pages: &pages }];
                run(device, |e| quantize(e, &[(&x, &pool)], &Batch::new(device, page_size, &span(0, len)).unwrap()));
                // All bits set is a NaN of every type.
                let seen = window.map_or(20, |w| len - new + 1 - w);
                for part in [Part::Codes, Part::Scales] {
                    edit_rows(&pool, part, |i, row| {
                        let (page, slot) = (i / (kv_heads * page_size), i % page_size);
                        let position = pages.iter().position(|&p| p as usize == page).map(|p| p * page_size + slot);
                        if position.is_none_or(|p| p < seen || p >= len) {
                            row.fill(bad);
                        }
                    });
                }
                let first = if window.is_none() { seen } else { 0 };
                let batch = Batch::new(device, page_size, &span(first, new)).unwrap();
                let params = AttentionParams { window, ..AttentionParams::for_head_dim(d) };
                let out = Guarded::new(device, DType::F32, &[new, heads, d]);
                let q = q.slice(0..new).unwrap();
                run(device, |e| attention(e, &q, &pool, &pool, &batch, &params, &out.buffer, None));
                results.push(out.take());
            }
            assert!(results[0].iter().all(|x| x.is_finite()), "{codec} window {window:?}");
            assert_eq!(results[0], results[1], "{codec} window {window:?}, {new} queries");
        }
    }
}
