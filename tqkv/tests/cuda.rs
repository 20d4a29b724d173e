//! What is particular to CUDA's kernels: sums over parts, scores and scales that half precision does not hold. The CPU backend
//! takes the same tests, so that they are right where there is no GPU.

mod support;

use support::*;
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, Codec, DType, Device, reference};

const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

fn on_both(body: impl Fn(&Device)) {
    on("cpu", &body);
    on("cuda", &body);
}

/// A pool that holds `vectors` \[n, kv_heads, d\] from position 0 on, in pages of 64.
fn filled(device: &Device, row: RowFormat, kv_heads: usize, vectors: &[f32]) -> PagePool {
    let n = vectors.len() / kv_heads / row.head_dim();
    let pool = PagePool::new(device, row, kv_heads, 64, n.div_ceil(64)).unwrap();
    let x = device.upload(vectors, &[n, kv_heads, row.head_dim()]).unwrap();
    run(device, |e| quantize(e, &[(&x, &pool)], &batch(device, n, n)));
    pool
}

/// One sequence of `len` positions in pages of 64, `new` of them new.
fn batch(device: &Device, len: usize, new: usize) -> Batch {
    let pages: Vec<u32> = (0..len.div_ceil(64) as u32).collect();
    Batch::new(device, 64, &[Span { first: 0, len, new, pages: &pages }]).unwrap()
}

/// Output and lse of attention over all of a sequence.
fn attend(
    device: &Device,
    q: &Buffer,
    pools: [&PagePool; 2],
    batch: &Batch,
    params: &AttentionParams,
) -> (Vec<f32>, Vec<f32>) {
    let out = Guarded::new(device, DType::F32, q.shape());
    let lse = Guarded::new(device, DType::F32, &q.shape()[..2]);
    run(device, |e| attention(e, q, pools[0], pools[1], batch, params, &out.buffer, Some(&lse.buffer)));
    (out.take(), lse.take())
}

#[test]
fn what_a_part_without_positions_holds_does_not_matter() {
    on_both(|device| {
        let (d, never) = (72, f32::NEG_INFINITY);
        for dtype in FLOATS {
            let part =
                |x: f32, lse: f32| (upload(device, dtype, &vec![x; d], &[1, 1, d]), device.upload(&[lse], &[1, 1]));
            let merged = |parts: &[(f32, f32)]| {
                let parts: Vec<_> = parts.iter().map(|&(x, lse)| part(x, lse)).map(|(x, l)| (x, l.unwrap())).collect();
                let views: Vec<_> = parts.iter().map(|(x, lse)| (x, lse)).collect();
                let (out, lse) =
                    (Guarded::new(device, DType::F32, &[1, 1, d]), Guarded::new(device, DType::F32, &[1, 1]));
                run(device, |e| merge(e, &views, &out.buffer, Some(&lse.buffer)));
                (out.take(), lse.take()[0])
            };
            for nothing in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for parts in [[(nothing, never), (3.0, 1.5)], [(3.0, 1.5), (nothing, never)]] {
                    assert_eq!(merged(&parts), (vec![3.0; d], 1.5), "{dtype} {nothing}");
                }
                assert_eq!(merged(&[(nothing, never), (nothing, never)]), (vec![0.0; d], never), "{dtype} {nothing}");
            }
            // A part with positions stays what it is.
            let (out, lse) = merged(&[(f32::NAN, -1000.0), (3.0, 1.5)]);
            assert!(out.iter().all(|x| x.is_nan()) && lse == 1.5, "{dtype} {lse}");
            let (out, lse) = merged(&[(f32::NAN, f32::NAN), (3.0, 1.5)]);
            assert!(out.iter().all(|x| x.is_nan()) && lse.is_nan(), "{dtype} {lse}");
        }
    });
}

/// A block's warps each take some positions, here one tile: those that a query does not see add nothing to it, even if they hold no
/// numbers. (Of a tile that it sees in part they do, as `what_is_not_a_number_stays_so` of the conformance suite says.)
#[test]
fn sums_of_unseen_positions_do_not_matter() {
    on_both(|device| {
        let (d, len, new) = (128, 200, 32);
        for codec in [Codec::tq(4), Codec::tq(3), Codec::seed(4)] {
            let row = RowFormat::new(codec, d).unwrap();
            let mut rng = Rng(3);
            let key = filled(device, row, 1, &rng.normals(len * d));
            let mut values = rng.normals(len * d);
            values[(len - 1) * d..].fill(f32::NAN);
            let value = filled(device, row, 1, &values);
            for dtype in FLOATS {
                let q = upload(device, dtype, &rng.normals(new * d), &[new, 1, d]);
                let params = AttentionParams::for_head_dim(d);
                let (out, _) = attend(device, &q, [&key, &value], &batch(device, len, new), &params);
                for (i, out) in out.chunks(d).enumerate() {
                    // The last tile has 16 positions or 32.
                    if len - new + i < 192 {
                        assert!(out.iter().all(|x| x.is_finite()), "{codec} {dtype}: query {i}");
                    }
                }
                assert!(out[(new - 1) * d..].iter().all(|x| x.is_nan()), "{codec} {dtype}");
            }
        }
    });
}

/// What a pool holds, in the original domain.
fn decoded(device: &Device, pool: &PagePool, n: usize) -> Vec<f32> {
    let out = Guarded::new(device, DType::F32, &[n, pool.kv_heads(), pool.row().head_dim()]);
    let (all, order) = (batch(device, n, 1), RowOrder::TokenMajor);
    run(device, |e| dequantize(e, pool, &all, 0, 0..n, Domain::Original, order, &out.buffer));
    out.take()
}

/// Attention of one query a head over one KV head, against the judge.
fn check(
    device: &Device,
    row: RowFormat,
    q: &[f32],
    q_type: DType,
    keys: &[f32],
    values: &[f32],
    softcap: Option<f32>,
) {
    let d = row.head_dim();
    let (n, heads) = (keys.len() / d, q.len() / d);
    let (key, value) = (filled(device, row, 1, keys), filled(device, row, 1, values));
    let q: Vec<f32> = q.iter().map(|&x| rounded(q_type, x)).collect();
    let params = AttentionParams { softcap, ..AttentionParams::for_head_dim(d) };
    let on_device = upload(device, q_type, &q, &[1, heads, d]);
    let (out, lse) = attend(device, &on_device, [&key, &value], &batch(device, n, 1), &params);
    let (keys, values) = (decoded(device, &key, n), decoded(device, &value, n));
    let (keys, values): (Vec<_>, Vec<_>) = (keys.chunks(d).collect(), values.chunks(d).collect());
    let tolerance = attention_tolerance(device, q_type, DType::F32);
    for (head, q) in q.chunks(d).enumerate() {
        let query = reference::Query { q, scale: params.scale as f64, softcap: softcap.map(f64::from), sink: None };
        let (want, want_lse) = reference::attention(&query, &keys, &values);
        let name = format!(
            "{} {softcap:?} q {q_type} {} k {} v {}: {n} positions, head {head}",
            row.codec(),
            q[0],
            keys[0][0],
            values[0][0]
        );
        let error = relative_error(&out[head * d..][..d], &want);
        assert!(error <= tolerance, "{name}: {error:e}");
        let error = (lse[head] as f64 - want_lse).abs() / want_lse.abs().max(1.0);
        assert!(error <= tolerance, "{name}: lse {} {want_lse}", lse[head]);
    }
}

/// Equal keys and values give back that value, however large the scores and however large or small the values are.
#[test]
fn large_scores_and_scales_give_the_value() {
    on_both(|device| {
        let d = 64;
        for codec in [Codec::tq(3), Codec::tq(4), Codec::tq(8), Codec::seed(4), Codec::seed(6)] {
            let row = RowFormat::new(codec, d).unwrap();
            for (size, n) in [1.0, 1e4, 3e4].into_iter().flat_map(|s| [1, 5, 70, 700].map(|n| (s, n))) {
                // f16 scales are never too large for f16.
                let others: &[f32] = if matches!(codec, Codec::Seed { .. }) { &[1e-5, 1e6] } else { &[] };
                for &value in [size].iter().chain(others) {
                    for (heads, q_type) in [1, 8].into_iter().flat_map(|h| FLOATS.map(|t| (h, t))) {
                        let of = |x: f32, n: usize| vec![x; n * d];
                        check(device, row, &of(size, heads), q_type, &of(size, n), &of(value, n), None);
                    }
                }
            }
        }
    });
}

/// Many values that cancel: what is lost of each the same way would be most of the sum.
#[test]
fn many_values_cancel() {
    on_both(|device| {
        let (d, n, heads) = (64, 20_000, 4);
        for codec in [Codec::tq(4), Codec::tq(3), Codec::F16] {
            let mut rng = Rng(21);
            let mut vectors = |n: usize| rng.normals(n * d);
            check(
                device,
                RowFormat::new(codec, d).unwrap(),
                &vectors(heads),
                DType::F32,
                &vectors(n),
                &vectors(n),
                None,
            );
        }
    });
}

/// Caps far below scores, and far above them.
#[test]
fn softcaps_of_any_size() {
    on_both(|device| {
        let (d, n, heads) = (64, 90, 4);
        let mut rng = Rng(4);
        for codec in [Codec::tq(3), Codec::tq(8)] {
            let row = RowFormat::new(codec, d).unwrap();
            for q_type in FLOATS {
                for cap in [1e-2, 1.0, 30.0, 1e4, 1e6] {
                    let mut vectors = |n: usize| rng.normals(n * d);
                    check(device, row, &vectors(heads), q_type, &vectors(n), &vectors(n), Some(cap));
                }
                // Every score is far from zero: what is rounded of it does not matter.
                let keys: Vec<f32> = (0..n * d).map(|i| [1e4, 5e3, -1e4][i / d % 3]).collect();
                for cap in [1e-2, 30.0] {
                    check(device, row, &vec![1e4; heads * d], q_type, &keys, &rng.normals(n * d), Some(cap));
                }
            }
        }
    });
}

/// Values whose sizes lie far apart: at random, and such that f16 first holds their scales and then does not.
#[test]
fn values_of_very_different_sizes() {
    on_both(|device| {
        let (d, n) = (128, 700);
        for codec in [Codec::tq(4), Codec::seed(4), Codec::seed(5)] {
            let row = RowFormat::new(codec, d).unwrap();
            for (heads, random) in [(4, true), (8, true), (16, false), (32, false)] {
                let mut rng = Rng(heads as u64);
                let sizes: Vec<f32> = (0..n)
                    .map(|i| match (random, i % 32 < 16) {
                        (true, _) => 2f32.powi(rng.below(31) as i32 - 15),
                        (false, true) => 2000.0,
                        (false, false) => 20000.0,
                    })
                    .collect();
                let values: Vec<f32> = rng.normals(n * d).iter().zip(0..).map(|(x, i)| x * sizes[i / d]).collect();
                let q: Vec<f32> = rng.normals(heads * d).iter().map(|x| 3.0 * x).collect();
                for q_type in FLOATS {
                    check(device, row, &q, q_type, &rng.normals(n * d), &values, None);
                }
            }
        }
    });
}

/// A pool of random vectors, written by slots.
fn random_pool(
    device: &Device,
    rng: &mut Rng,
    row: RowFormat,
    kv_heads: usize,
    page_size: usize,
    pages: usize,
) -> PagePool {
    let (positions, d) = (pages * page_size, row.head_dim());
    let pool = PagePool::new(device, row, kv_heads, page_size, pages).unwrap();
    let x = upload(device, DType::F16, &rng.normals(positions * kv_heads * d), &[positions, kv_heads, d]);
    let slots: Vec<i64> = (0..positions as i64).collect();
    let slots = device.upload(&slots, &[positions]).unwrap();
    run(device, |e| quantize_at(e, &[(&x, &pool)], &slots, None));
    pool
}

/// What the device reads and plans for itself is what the host would have: one batch, whose tables and lengths change beneath it.
#[test]
fn batches_on_the_device_follow_its_memory() {
    on("cuda", |device| {
        let mut rng = Rng(11);
        let (page_size, width, most_new) = (16, 80, 3);
        for (sequences, kv_heads, group, window, d) in [
            (1, 8, 4, None, 128),
            (3, 2, 4, None, 64),
            (5, 1, 1, Some(100), 64),
            (40, 4, 4, None, 64),
            (300, 2, 2, Some(33), 64),
        ] {
            let row = RowFormat::new(Codec::tq(4), d).unwrap();
            let pages = sequences * 3 + width;
            let mut pool = || random_pool(device, &mut rng, row, kv_heads, page_size, pages);
            let (key, value) = (pool(), pool());
            let tokens = sequences * most_new;
            let heads = kv_heads * group;
            let zeros = |n: usize| device.zeros(DType::U32, &[n]).unwrap();
            let (entries, lens, starts) = (zeros(sequences * width), zeros(sequences), zeros(sequences + 1));
            let most = Bounds { sequences, tokens, new: most_new, len: width * page_size };
            let tables = DeviceTables { entries: &entries, width, stride: width, pages };
            let lengths = Lengths::Device { lens: &lens, starts: &starts, most };
            let batch = Batch::on_device(device, page_size, tables, lengths).unwrap();
            let params = AttentionParams { window, ..AttentionParams::for_head_dim(d) };
            for round in 0..8 {
                // Some with nothing new, some with nothing at all, some long.
                let spans: Vec<(usize, usize, Vec<u32>)> = (0..sequences)
                    .map(|_| {
                        let long = rng.below(4) == 0 || sequences < 4;
                        let len = rng.below(if long { width * page_size + 1 } else { 40 });
                        let new = if round == 0 { 1 } else { rng.below(most_new + 1) }.min(len);
                        let table = (0..len.div_ceil(page_size)).map(|_| rng.below(pages) as u32).collect();
                        (len, new, table)
                    })
                    .collect();
                let (mut all, mut starts_of) = (vec![u32::MAX; sequences * width], vec![0u32]);
                for (s, (_, new, table)) in spans.iter().enumerate() {
                    all[s * width..][..table.len()].copy_from_slice(table);
                    starts_of.push(starts_of[s] + *new as u32);
                }
                entries.write(&all).unwrap();
                lens.write(&spans.iter().map(|s| s.0 as u32).collect::<Vec<_>>()).unwrap();
                starts.write(&starts_of).unwrap();
                let q = upload(device, DType::F16, &rng.normals(tokens * heads * d), &[tokens, heads, d]);
                let (out, lse) = (
                    Guarded::new(device, DType::F32, &[tokens, heads, d]),
                    Guarded::new(device, DType::F32, &[tokens, heads]),
                );
                run(device, |e| {
                    refresh(e, &batch)?;
                    attention(e, &q, &key, &value, &batch, &params, &out.buffer, Some(&lse.buffer))
                });
                assert_eq!(batch.out_of_range().unwrap(), 0);

                let own = starts_of[sequences] as usize;
                let host: Vec<_> =
                    spans.iter().map(|(len, new, pages)| Span { first: 0, len: *len, new: *new, pages }).collect();
                let host = Batch::new(device, page_size, &host).unwrap();
                let (want, want_lse) = attend(device, &q.slice(0..own).unwrap(), [&key, &value], &host, &params);
                let (out, lse) = (out.take(), lse.take());
                for (t, (got, want)) in out.chunks(heads * d).zip(want.chunks(heads * d)).enumerate() {
                    let want: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                    let error = relative_error(got, &want);
                    assert!(error < 2e-3, "{sequences} sequences, round {round}, token {t}: {error:e}");
                }
                let off = lse.iter().zip(&want_lse).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(off < 2e-3, "{off}");
                // What no sequence owns is not written.
                assert!(out[own * heads * d..].iter().all(|x| x.is_nan()));
            }
            // What is out of range is counted, and not read: once, whatever is planned for.
            let q = upload(device, DType::F16, &rng.normals(tokens * heads * d), &[tokens, heads, d]);
            let other = AttentionParams { window: Some(7), ..params.clone() };
            let out = Guarded::new(device, DType::F32, &[tokens, heads, d]);
            run(device, |e| attention(e, &q, &key, &value, &batch, &other, &out.buffer, None));
            let mut all = vec![7u32; sequences * width];
            (all[0], all[1]) = (pages as u32, u32::MAX);
            entries.write(&all).unwrap();
            lens.write(&vec![33u32; sequences]).unwrap();
            starts.write(&(0..=sequences as u32).collect::<Vec<_>>()).unwrap();
            run(device, |e| refresh(e, &batch));
            assert_eq!(batch.out_of_range().unwrap(), 2);
            lens.write(&vec![(width * page_size + 1) as u32; sequences]).unwrap();
            starts.write(&vec![tokens as u32 + 1; sequences + 1]).unwrap();
            entries.write(&vec![0u32; sequences * width]).unwrap();
            run(device, |e| refresh(e, &batch));
            assert_eq!(batch.out_of_range().unwrap(), 2 + 2 * sequences);
            // Starts that are not in order: every other sequence ends before it begins.
            let crossed: Vec<u32> = (0..=sequences as u32).map(|s| s % 2 * most_new as u32).collect();
            starts.write(&crossed).unwrap();
            lens.write(&vec![33u32; sequences]).unwrap();
            run(device, |e| {
                refresh(e, &batch)?;
                attention(e, &q, &key, &value, &batch, &params, &out.buffer, None)
            });
            assert_eq!(batch.out_of_range().unwrap(), 2 + 2 * sequences + sequences / 2);
            assert!(out.take()[..most_new * heads * d].iter().all(|x| x.is_finite()));
        }
    });
}
