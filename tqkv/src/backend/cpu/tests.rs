//! Every instruction set that this machine has, against the oracle and the definition of each bit.

use super::Cpu;
use super::codec::{RowCoder, Vector};
use super::isa::Isa;
use crate::compute::{Buffer, DType, Device};
use crate::format::exact::Coder;
use crate::format::{Codec, Encoding, RowFormat};
use crate::ops::*;
use crate::reference;

fn device(isa: Isa, threads: usize) -> Device {
    Device::from_driver(Box::new(Cpu::with_isa(isa, threads).unwrap()))
}

/// Numbers near N(0, 1): sums of uniform ones.
fn random(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..12).map(|_| uniform()).sum()).collect()
}

fn codecs() -> Vec<Codec> {
    let native = (2..=8).map(Codec::tq);
    let seed = [2, 3, 4, 5, 6, 8].map(Codec::seed);
    [Codec::F32, Codec::F16].into_iter().chain(native).chain(seed).collect()
}

/// All codecs at all head dims that they have.
fn formats() -> impl Iterator<Item = RowFormat> {
    let dims = [16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 512, 576, 1024];
    dims.into_iter().flat_map(|d| codecs().into_iter().filter_map(move |c| RowFormat::new(c, d).ok()))
}

fn run(device: &Device, record: impl FnOnce(&mut crate::CommandEncoder) -> crate::Result<()>) {
    let mut encoder = device.encoder().unwrap();
    record(&mut encoder).unwrap();
    encoder.submit_and_wait().unwrap();
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn rotation_is_the_same_to_the_bit() {
    for row in formats().filter(RowFormat::is_rotated) {
        let d = row.head_dim();
        let x = random(5 * d, d as u64);
        for direction in [Direction::Forward, Direction::Inverse] {
            let mut want = x.clone();
            let definition = Coder::new(&row);
            want.chunks_mut(d).for_each(|v| match direction {
                Direction::Forward => definition.rotate(v),
                Direction::Inverse => definition.restore(v),
            });
            for isa in Isa::available() {
                let mut got = x.clone();
                RowCoder::new(&row, isa).rotate(direction, &mut got);
                assert_eq!(bits(&got), bits(&want), "{} {direction:?} {row:?}", isa.name());
            }
            for (x, got) in x.chunks(d).zip(want.chunks(d)) {
                let want = match direction {
                    Direction::Forward => reference::rotate(&row, x),
                    Direction::Inverse => reference::restore(&row, &x.iter().map(|&x| x as f64).collect::<Vec<_>>()),
                };
                // At most 10 + 1 rounded steps of values near 1, plus the reflection.
                got.iter().zip(want).for_each(|(&g, w)| assert!((g as f64 - w).abs() < 1e-5, "{row:?} {g} {w}"));
            }
        }
    }
}

#[test]
fn decoding_is_the_definition_to_the_bit() {
    for row in formats() {
        let (d, n) = (row.head_dim(), 3);
        let mut codes: Vec<u8> = random(n * row.row_bytes(), 7).iter().map(|x| (x * 1e4) as i32 as u8).collect();
        if row.codec().is_dense() {
            // Any bytes may be NaN, whose bits are nobody's business.
            codes.iter_mut().for_each(|b| *b &= 0x3f);
        }
        let factors: Vec<f32> = random(n * row.scales_per_row(), 9);
        for isa in Isa::available() {
            let coder = RowCoder::new(&row, isa);
            let mut padded = codes.clone();
            padded.resize(codes.len() + 64, 0xa5);
            for scaled in [false, true] {
                let mut out = vec![f32::NAN; n * d];
                let factors = (scaled && !factors.is_empty()).then_some(&factors[..]);
                // SAFETY: 64 bytes follow.
                unsafe { coder.decode(&[(padded.as_ptr(), n)], factors, &mut out) };
                let want: Vec<f32> = (0..n * d)
                    .map(|i| {
                        let row_codes = &codes[i / d * row.row_bytes()..][..row.row_bytes()];
                        let Some(book) = row.codebook() else {
                            return reference::dequantize(&row, row_codes, &[])[i % d];
                        };
                        let level = book.levels[row.get_code(row_codes, i % d) as usize];
                        factors.map_or(level, |f| level * f[i / (d / row.scales_per_row())])
                    })
                    .collect();
                assert_eq!(bits(&out), bits(&want), "{} {row:?}", isa.name());
            }
        }
    }
}

const ENCODINGS: [Encoding; 2] = [Encoding::Nearest, Encoding::Search];

type Encode<'a> = dyn Fn(&mut [f32], &mut [u8], &mut [u8]) + 'a;

/// The rows of `coder`, with codes chosen so.
fn encode_with(coder: &RowCoder, encoding: Encoding, v: &mut [f32], codes: &mut [u8], scales: &mut [u8]) {
    let room = &mut vec![f32::NAN; v.len()];
    coder.encode(Vector { v, room, encoding }, codes, scales);
}

#[test]
fn encoding_is_the_definition_to_the_bit() {
    for row in formats().filter(RowFormat::is_rotated) {
        let d = row.head_dim();
        let mut inputs: Vec<Vec<f32>> = (0..6).map(|i| random(d, i * 1000 + d as u64)).collect();
        inputs[1].iter_mut().for_each(|x| *x *= 1e-12);
        inputs[2].iter_mut().for_each(|x| *x *= 1e15);
        inputs[3].fill(0.0);
        inputs[4][d / 2] = 50.0;
        inputs.extend([vec![1.0; d], vec![f32::NAN; d], vec![f32::MAX; d]]);
        let encode = |encode: &Encode, x: &[f32]| {
            let (mut codes, mut scales) = (vec![0xee; row.row_bytes()], vec![0xee; row.bytes() - row.row_bytes()]);
            encode(&mut x.to_vec(), &mut codes, &mut scales);
            (codes, scales)
        };
        for (encoding, (i, x)) in ENCODINGS.into_iter().flat_map(|e| inputs.iter().enumerate().map(move |x| (e, x))) {
            let want = encode(&|v, c, s| Coder::new(&row).with_encoding(encoding).encode(v, c, s), x);
            for isa in Isa::available() {
                let got = encode(&|v, c, s| encode_with(&RowCoder::new(&row, isa), encoding, v, c, s), x);
                assert_eq!(got, want, "{} {row:?} {encoding:?} input {i}", isa.name());
            }
        }
    }
}

/// Streaming or not, in whatever order and type: the same values.
/// Elements that are infinite after the gain, and zeros, which are then not a number.
#[test]
fn gains_may_overflow() {
    let d = 512;
    for bits in [2, 3, 4, 5, 6, 8] {
        let row = RowFormat::new(Codec::seed(bits), d).unwrap().with_scale_factor_d512(f32::MAX).unwrap();
        let mut x = vec![0.0; d];
        x[3] = 0.1;
        Coder::new(&row).restore(&mut x);
        for v in [x, random(d, 1).iter().map(|x| x * 1e-3).collect()] {
            let (mut want, mut scales) = (vec![0; row.row_bytes()], [0; 8]);
            Coder::new(&row).encode(&mut v.clone(), &mut want, &mut scales);
            for isa in Isa::available() {
                let (mut got, mut got_scales) = (vec![0; row.row_bytes()], [0; 8]);
                encode_with(&RowCoder::new(&row, isa), Encoding::Nearest, &mut v.clone(), &mut got, &mut got_scales);
                assert_eq!((got, got_scales), (want.clone(), scales), "{} {bits}", isa.name());
            }
        }
    }
}

#[test]
fn large_outputs_are_the_same() {
    for isa in Isa::available() {
        let device = device(isa, 2);
        let row = RowFormat::new(Codec::tq(5), 128).unwrap();
        let (kv, n) = (2, 8192 + 3);
        let pool = PagePool::new(&device, row, kv, n, 1).unwrap();
        let x = device.upload(&random(n * kv * 128, 1), &[n, kv, 128]).unwrap();
        let batch = Batch::contiguous(&device, n, 0, n, n).unwrap();
        run(&device, |e| quantize(e, &[(&x, &pool)], &batch));
        let decode = |positions: std::ops::Range<usize>, order| {
            let shape = match order {
                RowOrder::HeadMajor => [kv, positions.len(), 128],
                RowOrder::TokenMajor => [positions.len(), kv, 128],
            };
            let out = device.zeros(DType::F32, &shape).unwrap();
            run(&device, |e| dequantize(e, &pool, &batch, 0, positions, Domain::Original, order, &out));
            out.read::<f32>().unwrap()
        };
        let (heads, tokens) = (decode(0..n, RowOrder::HeadMajor), decode(0..n, RowOrder::TokenMajor));
        let few = decode(5000..5100, RowOrder::HeadMajor);
        for h in 0..kv {
            for p in 0..n {
                let by_head = &heads[(h * n + p) * 128..][..128];
                assert!(by_head == &tokens[(p * kv + h) * 128..][..128]);
                assert!(!(5000..5100).contains(&p) || by_head == &few[(h * 100 + p - 5000) * 128..][..128]);
            }
        }
    }
}

struct Shape {
    kv_heads: usize,
    group: usize,
    first: usize,
    len: usize,
    new: usize,
    capacity: usize,
    page_size: usize,
}

/// A cache of one sequence with random content, and queries.
struct Case {
    key: PagePool,
    value: PagePool,
    batch: Batch,
    q: Vec<f32>,
    shape: Shape,
}

impl Case {
    fn new(device: &Device, key: RowFormat, value: RowFormat, shape: Shape) -> Self {
        let (d, kv) = (key.head_dim(), shape.kv_heads);
        let pages = shape.capacity / shape.page_size;
        // Backwards, so that neighbours are not neighbours in memory.
        let table: Vec<u32> = (0..pages as u32).rev().collect();
        let pool = |row, seed| {
            let pool = PagePool::new(device, row, kv, shape.page_size, pages).unwrap();
            let n = shape.len - shape.first;
            let x = device.upload(&random(n * kv * d, seed), &[n, kv, d]).unwrap();
            let span = Span { first: shape.first, len: shape.len, new: n, pages: &table };
            let batch = Batch::new(device, shape.page_size, &[span]).unwrap();
            run(device, |e| quantize(e, &[(&x, &pool)], &batch));
            pool
        };
        let (first, len, new) = (shape.first, shape.len, shape.new);
        let batch = Batch::new(device, shape.page_size, &[Span { first, len, new, pages: &table }]).unwrap();
        let q = random(new * kv * shape.group * d, 99);
        Case { key: pool(key, 1000), value: pool(value, 2000), batch, q, shape }
    }

    /// Out and lse of the device.
    fn run(&self, device: &Device, params: &AttentionParams) -> (Vec<f32>, Vec<f32>) {
        let (heads, d) = (self.shape.kv_heads * self.shape.group, self.key.row().head_dim());
        let shape = [self.shape.new, heads, d];
        let q = device.upload(&self.q, &shape).unwrap();
        let out = device.upload(&vec![f32::NAN; self.q.len()], &shape).unwrap();
        let lse = device.zeros(DType::F32, &shape[..2]).unwrap();
        run(device, |e| attention(e, &q, &self.key, &self.value, &self.batch, params, &out, Some(&lse)));
        (out.read().unwrap(), lse.read().unwrap())
    }

    fn decoded(&self, device: &Device, pool: &PagePool) -> Vec<f32> {
        let (n, d) = (self.shape.len - self.shape.first, self.key.row().head_dim());
        let out = device.zeros(DType::F32, &[self.shape.kv_heads, n, d]).unwrap();
        let positions = self.shape.first..self.shape.len;
        run(device, |e| dequantize(e, pool, &self.batch, 0, positions, Domain::Rotated, RowOrder::HeadMajor, &out));
        out.read().unwrap()
    }

    /// Compares with the oracle on the decoded rows.
    fn check(&self, device: &Device, params: &AttentionParams, sinks: Option<&[f32]>, name: &str) {
        let (got, lse) = self.run(device, params);
        let Shape { kv_heads, group, first, len, new, .. } = self.shape;
        let (d, n) = (self.key.row().head_dim(), len - first);
        let (keys, values) = (self.decoded(device, &self.key), self.decoded(device, &self.value));
        for (r, (got, q)) in got.chunks(d).zip(self.q.chunks(d)).enumerate() {
            let (head, position) = (r % (kv_heads * group), len - new + r / (kv_heads * group));
            let start = params.window.map_or(first, |w| first.max((position + 1).saturating_sub(w)));
            let end = if params.causal { position + 1 } else { len };
            let rows = |x| -> Vec<&[f32]> {
                let x: &[f32] = x;
                (start..end).map(|p| &x[(head / group * n + p - first) * d..][..d]).collect()
            };
            let query = reference::Query {
                q: &reference::rotate(self.key.row(), q).iter().map(|&x| x as f32).collect::<Vec<_>>(),
                scale: params.scale as f64,
                softcap: params.softcap.map(|c| c as f64),
                sink: sinks.map(|s| s[head] as f64),
            };
            let (want, want_lse) = reference::attention(&query, &rows(&keys), &rows(&values));
            let want = reference::restore(self.value.row(), &want);
            let norm = want.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error = got.iter().zip(&want).map(|(&g, w)| (g as f64 - w).powi(2)).sum::<f64>().sqrt();
            // What `Precision::Half` says.
            let largest = rows(&keys).iter().map(|k| norm_of(k)).fold(0.0, f64::max);
            let size = largest * norm_of(query.q) * query.scale.abs();
            let tolerance = match params.precision {
                Precision::Half => (if d < 64 { 1e-3 } else { 5e-4 }) * (size / 16.0).max(1.0),
                _ => 1e-5,
            };
            assert!(error <= tolerance * norm + 1e-30, "{name} row {r}: {error:e} of {norm:e}");
            let error = (lse[r] as f64 - want_lse).abs();
            assert!(error <= tolerance * want_lse.abs().max(1.0), "{name} lse {} {want_lse}", lse[r]);
        }
    }
}

fn norm_of(x: &[f32]) -> f64 {
    x.iter().map(|&x| x as f64 * x as f64).sum::<f64>().sqrt()
}

fn half(params: AttentionParams) -> AttentionParams {
    AttentionParams { precision: Precision::Half, ..params }
}

#[test]
fn attention_agrees_with_the_oracle() {
    let pairs = codecs().into_iter().map(|c| (c, c)).chain([(Codec::tq(5), Codec::tq(4)), (Codec::F16, Codec::tq(3))]);
    for (key, value) in pairs {
        for d in [16, 64, 80, 128, 512] {
            let (Ok(key), Ok(value)) = (RowFormat::new(key, d), RowFormat::new(value, d)) else { continue };
            for isa in Isa::available() {
                let device = device(isa, 1);
                for (group, new, window, causal) in
                    [(1, 1, None, true), (4, 3, Some(40), true), (3, 2, None, false), (6, 21, None, true)]
                {
                    let shape = Shape { kv_heads: 2, group, first: 0, len: 150, new, capacity: 160, page_size: 16 };
                    let case = Case::new(&device, key, value, shape);
                    let params = AttentionParams { window, causal, ..AttentionParams::for_head_dim(d) };
                    let name = format!("{} {key:?} {value:?} group {group}", isa.name());
                    case.check(&device, &params, None, &name);
                    case.check(&device, &half(params), None, &format!("{name} half"));
                }
            }
        }
    }
}

#[test]
fn rings_sinks_softcaps_and_large_scores() {
    for isa in Isa::available() {
        let device = device(isa, 1);
        let row = RowFormat::new(Codec::tq(4), 128).unwrap();
        let shape = Shape { kv_heads: 2, group: 4, first: 37, len: 101, new: 2, capacity: 64, page_size: 16 };
        let case = Case::new(&device, row, row, shape);
        let logits = random(8, 5);
        let sinks = device.upload(&logits, &[8]).unwrap();
        let plain = AttentionParams::for_head_dim(128);
        let sinks = AttentionParams { sink_logits: Some(sinks), ..plain.clone() };
        for (name, params, logits) in [
            ("ring", plain.clone(), None),
            ("ring and window", AttentionParams { window: Some(9), ..plain.clone() }, None),
            ("softcap", AttentionParams { softcap: Some(20.0), scale: 3.0, ..plain.clone() }, None),
            ("sinks", sinks, Some(&logits[..])),
            ("scores in the hundreds", AttentionParams { scale: 30.0, ..plain.clone() }, None),
            ("negative scale", AttentionParams { scale: -30.0, ..plain }, None),
        ] {
            case.check(&device, &params, logits, name);
            case.check(&device, &half(params), logits, &format!("{name} half"));
        }
    }
}

/// Words are as large as they may be: queries that are their keys, of one element or of all, and of every size; weights that are
/// all the same, or one and very many small ones.
#[test]
fn words_do_not_overflow() {
    for isa in Isa::available() {
        let device = device(isa, 1);
        for (bits, d, group) in
            [(2, 128, 1), (3, 128, 4), (4, 64, 4), (4, 1024, 2), (5, 80, 3), (6, 128, 6), (8, 1024, 1)]
        {
            let row = RowFormat::new(Codec::tq(bits), d).unwrap();
            let shape = Shape { kv_heads: 1, group, first: 0, len: 700, new: 1, capacity: 704, page_size: 64 };
            let mut case = Case::new(&device, row, row, shape);
            let keys = case.decoded(&device, &case.key);
            let key: Vec<f64> = keys[300 * d..][..d].iter().map(|&x| x as f64).collect();
            let aligned: Vec<f32> = reference::restore(&row, &key).iter().map(|&x| x as f32).collect();
            let mut one = vec![0.0; d];
            one[7] = 1.0;
            for (q, size) in [(&aligned, 1.0), (&aligned, 1e6), (&aligned, 1e-6), (&one, 1.0), (&one, 1e-20)] {
                case.q = (0..group).flat_map(|_| q.iter().map(|x| x * size)).collect();
                // Scores up to 6 at the key that the query is, so that many others count, and of nothing at all.
                let square: f64 = q.iter().map(|&x| x as f64 * x as f64).sum();
                for top in [0.0, 6.0, 40.0] {
                    let scale = top / (square.sqrt() * (d as f64).sqrt() * size as f64);
                    let params = half(AttentionParams::new(scale as f32));
                    case.check(
                        &device,
                        &params,
                        None,
                        &format!("{} tq{bits} D={d} size {size:e} top {top}", isa.name()),
                    );
                }
            }
        }
    }
}

#[test]
fn results_do_not_depend_on_threads() {
    let isa = Isa::available()[0];
    let row = RowFormat::new(Codec::tq(4), 64).unwrap();
    for new in [1, 40] {
        let results = [1, 2, 3, 7].map(|threads| {
            let device = device(isa, threads);
            let shape = Shape { kv_heads: 2, group: 4, first: 0, len: 3000, new, capacity: 3008, page_size: 64 };
            let case = Case::new(&device, row, row, shape);
            let plain = AttentionParams::for_head_dim(64);
            [plain.clone(), half(plain)].map(|params| {
                let (out, lse) = case.run(&device, &params);
                (bits(&out), bits(&lse))
            })
        });
        assert!(results.iter().all(|r| *r == results[0]));
    }
}

/// A NaN is heard by the queries that see it, and by no other.
#[test]
fn nan_is_loud_where_it_is_seen() {
    for isa in Isa::available() {
        let device = device(isa, 2);
        for (codec, side, precision) in [
            (Codec::tq(4), 0, Precision::OfQueries),
            (Codec::tq(4), 1, Precision::OfQueries),
            (Codec::tq(4), 0, Precision::Half),
            (Codec::tq(4), 1, Precision::Half),
            (Codec::F16, 0, Precision::OfQueries),
            (Codec::F16, 1, Precision::OfQueries),
        ] {
            let row = RowFormat::new(codec, 64).unwrap();
            let (n, bad) = (24, 10);
            let upload = |poison: bool| {
                let mut x = random(n * 64, 3);
                if poison {
                    x[bad * 64 + 5] = f32::NAN;
                }
                device.upload(&x, &[n, 1, 64]).unwrap()
            };
            let pools: [PagePool; 2] = std::array::from_fn(|_| PagePool::new(&device, row, 1, 32, 1).unwrap());
            let batch = Batch::contiguous(&device, 32, 0, n, n).unwrap();
            let (k, v) = (upload(side == 0), upload(side == 1));
            run(&device, |e| quantize(e, &[(&k, &pools[0]), (&v, &pools[1])], &batch));
            let q = device.upload(&random(n * 2 * 64, 4), &[n, 2, 64]).unwrap();
            let out = device.zeros(DType::F32, &[n, 2, 64]).unwrap();
            let lse = device.zeros(DType::F32, &[n, 2]).unwrap();
            let params = AttentionParams { window: Some(8), precision, ..AttentionParams::for_head_dim(64) };
            run(&device, |e| attention(e, &q, &pools[0], &pools[1], &batch, &params, &out, Some(&lse)));
            for (p, out) in out.read::<f32>().unwrap().chunks(128).enumerate() {
                let seen = (bad..bad + 8).contains(&p);
                assert_eq!(out.iter().any(|x| x.is_nan()), seen, "{} {codec} side {side} position {p}", isa.name());
            }
            for (i, lse) in lse.read::<f32>().unwrap().iter().enumerate() {
                assert_eq!(lse.is_nan(), side == 0 && (bad..bad + 8).contains(&(i / 2)), "{codec} lse {i}");
            }
        }
    }
}

#[test]
fn merging_keeps_nan() {
    let device = device(Isa::available()[0], 1);
    let part = |x: f32, lse: [f32; 2]| -> (Buffer, Buffer) {
        (device.upload(&[x; 32], &[2, 1, 16]).unwrap(), device.upload(&lse, &[2, 1]).unwrap())
    };
    let (a, b) = (part(1.0, [0.0, 1.0]), part(2.0, [f32::NAN, f32::NEG_INFINITY]));
    let (out, lse) = part(0.0, [0.0; 2]);
    run(&device, |e| merge(e, &[(&a.0, &a.1), (&b.0, &b.1)], &out, Some(&lse)));
    let (out, lse) = (out.read::<f32>().unwrap(), lse.read::<f32>().unwrap());
    assert!(out[..16].iter().all(|x| x.is_nan()) && lse[0].is_nan());
    assert!(out[16..].iter().all(|&x| x == 1.0) && lse[1] == 1.0);
}

#[test]
fn only_available_instructions_are_given() {
    assert!(matches!(Isa::named("sse9"), Err(crate::Error::DeviceUnavailable { .. })));
    assert_eq!(Isa::named("portable").unwrap().name(), "portable");
    let available: Vec<_> = Isa::available().into_iter().map(Isa::name).collect();
    for name in ["avx512", "avx2", "neon", "portable"] {
        assert_eq!(Isa::named(name).is_ok(), available.contains(&name), "{name}");
    }
}
