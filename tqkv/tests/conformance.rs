//! One suite for every backend: written once over `Device`, stamped onto each by a line at the end.
//!
//! The judge is `tqkv::reference`. Outputs start as NaN between guards; pools start as garbage.

mod support;

use std::collections::HashMap;
use support::pools::*;
use support::*;
use tqkv::cache::{LayerKind, Sinks};
use tqkv::compute::DeviceKind;
use tqkv::format::{MAX_HEAD_DIM, RowFormat};
use tqkv::ops::*;
use tqkv::{CacheConfig, Codec, CodecPair, DType, Device, KvCache, reference};

const HEAD_DIMS: [usize; 10] = [64, 80, 96, 112, 128, 192, 256, 512, 576, MAX_HEAD_DIM];
const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Every codec that exists at a head_dim.
fn codecs(head_dim: usize) -> Vec<Codec> {
    let native = (2..=8).map(Codec::tq);
    let seed = [2, 3, 4, 5, 6, 8].map(Codec::seed).into_iter();
    let all = native.chain(seed).chain([Codec::F16, Codec::F32]);
    all.filter(|&c| RowFormat::new(c, head_dim).is_ok()).collect()
}

/// A pool of random codes and plausible scales, and what the reference decodes from it.
struct Filled {
    pool: PagePool,
    /// Decoded rows by pool index (page · kv_heads + head) · page_size + slot.
    rows: Vec<Vec<f32>>,
}

impl Filled {
    fn new(device: &Device, rng: &mut Rng, row: RowFormat, kv_heads: usize, page_size: usize, pages: usize) -> Filled {
        Self::spread(device, rng, row, kv_heads, page_size, pages, 0)
    }

    /// Scales over so many powers of two, up and down.
    fn spread(
        device: &Device,
        rng: &mut Rng,
        row: RowFormat,
        kv_heads: usize,
        page_size: usize,
        pages: usize,
        octaves: usize,
    ) -> Filled {
        let n = pages * kv_heads * page_size;
        let codes: Vec<u8> = match row.codec() {
            Codec::F32 => bytemuck::cast_slice(&rng.normals(n * row.head_dim())).to_vec(),
            Codec::F16 => {
                let values = rng.normals(n * row.head_dim());
                values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
            }
            _ => rng.bytes(n * row.row_bytes()),
        };
        let spr = row.scales_per_row();
        // Scales of vectors whose elements are near 1.
        let unit = match row.codec() {
            Codec::Seed { .. } if row.head_dim() <= 256 => (row.head_dim() as f32).sqrt(),
            _ => 1.0,
        };
        let scales: Vec<f32> = (0..n * spr)
            .map(|_| {
                let scale = unit * (0.5 + rng.unit() as f32);
                let octave = if octaves > 0 { rng.below(2 * octaves + 1) as i32 - octaves as i32 } else { 0 };
                rounded(row.scale_dtype(), scale * 2f32.powi(octave))
            })
            .collect();
        let rows = (0..n)
            .map(|i| {
                reference::dequantize(&row, &codes[i * row.row_bytes()..][..row.row_bytes()], &scales[i * spr..][..spr])
            })
            .collect();
        let pool = new_pool(device, row, kv_heads, page_size, pages).unwrap();
        write_pool(&pool, &codes, &scales);
        Filled { pool, rows }
    }

    fn row(&self, page: usize, head: usize, slot: usize) -> &[f32] {
        &self.rows[(page * self.pool.kv_heads() + head) * self.pool.page_size() + slot]
    }
}

/// Sequences over pages in a scrambled order, with what the reference needs to find a position.
struct Layout {
    page_size: usize,
    pages: usize,
    /// (first, len, new, pages)
    spans: Vec<(usize, usize, usize, Vec<u32>)>,
}

impl Layout {
    /// Each sequence gets the pages that its positions need, scattered over the pool.
    fn paged(rng: &mut Rng, page_size: usize, lens: &[(usize, usize)]) -> Layout {
        let total: usize = lens.iter().map(|(len, _)| len.div_ceil(page_size)).sum();
        let pages = total + 3;
        let mut order: Vec<u32> = (0..pages as u32).collect();
        for i in (1..pages).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let mut order = order.into_iter();
        let spans = lens
            .iter()
            .map(|&(len, new)| (0, len, new, order.by_ref().take(len.div_ceil(page_size)).collect()))
            .collect();
        Layout { page_size, pages, spans }
    }

    /// One sequence in a contiguous ring.
    fn ring(capacity: usize, first: usize, len: usize, new: usize) -> Layout {
        Layout { page_size: capacity, pages: 1, spans: vec![(first, len, new, vec![0])] }
    }

    fn batch(&self, device: &Device) -> Batch {
        let spans: Vec<_> = self
            .spans
            .iter()
            .map(|(first, len, new, pages)| Span { first: *first, len: *len, new: *new, pages })
            .collect();
        Batch::new(device, self.page_size, &spans).unwrap()
    }

    fn tokens(&self) -> usize {
        self.spans.iter().map(|s| s.2).sum()
    }

    fn locate(&self, sequence: usize, position: usize) -> (usize, usize) {
        let pages = &self.spans[sequence].3;
        let slot = position % (pages.len() * self.page_size);
        (pages[slot / self.page_size] as usize, slot % self.page_size)
    }
}

fn rotation_matches_the_definition(device: &Device) {
    let mut rng = Rng(1);
    for d in HEAD_DIMS {
        for codec in [Codec::tq(4), Codec::seed(4), Codec::F16] {
            let Ok(row) = RowFormat::new(codec, d) else { continue };
            let n = 5;
            for dtype in FLOATS {
                let x: Vec<f32> = rng.normals(n * d).iter().map(|&x| rounded(dtype, x)).collect();
                let input = upload(device, dtype, &x, &[n, d]);
                let (rotated, restored) =
                    (Guarded::new(device, DType::F32, &[n, d]), Guarded::new(device, dtype, &[n, d]));
                run(device, |e| {
                    rotate(e, &row, Direction::Forward, &input, &rotated.buffer)?;
                    rotate(e, &row, Direction::Inverse, &rotated.buffer, &restored.buffer)?;
                    rotate(e, &row, Direction::Forward, &input, &input)
                });
                // log2(D) + 1 ≤ 11 roundings of 2^-24, and the type's own.
                let own = match dtype {
                    DType::F16 => 2f64.powi(-11),
                    DType::BF16 => 2f64.powi(-8),
                    _ => 0.0,
                };
                let (rotated, restored, in_place) = (rotated.take(), restored.take(), download(&input));
                for i in 0..n {
                    let at = i * d..(i + 1) * d;
                    let want = reference::rotate(&row, &x[at.clone()]);
                    let name = format!("{codec} D={d} {dtype}");
                    assert!(relative_error(&rotated[at.clone()], &want) < 1e-6, "{name}");
                    assert!(relative_error(&in_place[at.clone()], &want) < 1e-6 + own, "{name} in place");
                    let back: Vec<f64> = x[at.clone()].iter().map(|&x| x as f64).collect();
                    assert!(relative_error(&restored[at], &back) < 1e-6 + own, "{name} back");
                }
            }
        }
    }
}

fn quantize_writes_the_codes(device: &Device) {
    let mut rng = Rng(2);
    let (mut elements, mut differ) = (0usize, 0usize);
    for d in HEAD_DIMS {
        for (c, codec) in codecs(d).into_iter().enumerate() {
            let row = RowFormat::new(codec, d).unwrap();
            let dtype = FLOATS[c % 3];
            let kv_heads = 1 + c % 3;
            let layout = if c % 2 == 0 {
                Layout::paged(&mut rng, 4, &[(9, 5), (3, 3), (6, 0)])
            } else {
                Layout::ring(7, 2, 9, 4)
            };
            let batch = layout.batch(device);
            let n = layout.tokens() * kv_heads;
            let mut x = rng.normals(n * d);
            // Vectors of very different size, an outlier, and zeros.
            x[..d].iter_mut().for_each(|x| *x *= 300.0);
            x[d..2 * d].iter_mut().for_each(|x| *x *= 1e-3);
            x[2 * d] = 40.0;
            x[3 * d..4 * d].fill(0.0);
            let x: Vec<f32> = x.iter().map(|&x| rounded(dtype, x)).collect();

            // Two pools, as K and V; garbage that must stay where nothing is written.
            let filled = [0, 1].map(|_| Filled::new(device, &mut rng, row, kv_heads, layout.page_size, layout.pages));
            let before = filled.each_ref().map(|f| pool_codes(&f.pool));
            let input = upload(device, dtype, &x, &[layout.tokens(), kv_heads, d]);
            let flipped: Vec<f32> = x.iter().map(|x| -x).collect();
            let second = upload(device, dtype, &flipped, &[layout.tokens(), kv_heads, d]);
            run(device, |e| quantize(e, &[(&input, &filled[0].pool), (&second, &filled[1].pool)], &batch));

            for (side, (filled, x)) in filled.iter().zip([&x, &flipped]).enumerate() {
                let codes = pool_codes(&filled.pool);
                let scales = pool_scales(&filled.pool);
                let mut written = HashMap::new();
                let mut token = 0;
                for (s, (_, len, new, _)) in layout.spans.iter().enumerate() {
                    for position in len - new..*len {
                        let (page, slot) = layout.locate(s, position);
                        for head in 0..kv_heads {
                            let index = (page * kv_heads + head) * layout.page_size + slot;
                            written.insert(index, &x[(token * kv_heads + head) * d..][..d]);
                        }
                        token += 1;
                    }
                }
                for (index, got) in codes.chunks(row.row_bytes()).enumerate() {
                    let name = format!("{codec} D={d} {dtype} side {side} row {index}");
                    let Some(x) = written.get(&index) else {
                        assert!(got == &before[side][index * row.row_bytes()..][..row.row_bytes()], "{name} untouched");
                        continue;
                    };
                    if codec.is_dense() {
                        let want: Vec<f32> =
                            x.iter().map(|&x| if codec == Codec::F16 { rounded(DType::F16, x) } else { x }).collect();
                        assert!(reference::dequantize(&row, got, &[]) == want, "{name}");
                        continue;
                    }
                    let want = reference::quantize(&row, x);
                    for i in 0..d {
                        elements += 1;
                        if row.get_code(got, i) != want.codes[i] {
                            differ += 1;
                            assert!(want.margins[i] < 1e-5, "{name} element {i}");
                        }
                    }
                    for (j, want) in want.scales.iter().enumerate() {
                        let got = scales[index * row.scales_per_row() + j];
                        // One step of f16, or the rounding of a sum of D squares in f32.
                        let tolerance = if row.scale_dtype() == DType::F16 { 1e-3 } else { 1e-6 };
                        assert!((got - want).abs() <= tolerance * want.abs() + 1e-7, "{name} scale {got} {want}");
                    }
                }
            }
            // The bytes of the CPU's own pools are the definition; CUDA and foreign pools must give the same.
            if device.info().kind == DeviceKind::Cuda || are_foreign() {
                let cpu = Device::cpu();
                let pool = PagePool::new(&cpu, row, kv_heads, layout.page_size, layout.pages).unwrap();
                let scales = pool_scales(&filled[0].pool);
                write_pool(&pool, &before[0], &scales);
                let input = upload(&cpu, dtype, &x, &[layout.tokens(), kv_heads, d]);
                run(&cpu, |e| quantize(e, &[(&input, &pool)], &layout.batch(&cpu)));
                let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect::<Vec<_>>();
                let same = pool_codes(&pool) == pool_codes(&filled[0].pool) && bits(pool_scales(&pool)) == bits(scales);
                assert!(same, "{codec} D={d} {dtype}: bytes differ from the CPU's");
            }
        }
    }
    // Only vectors that the judge rounds otherwise at a boundary may differ.
    assert!(differ as f64 <= 1e-5 * elements as f64, "{differ} of {elements} codes differ");
}

fn codes_are_the_cpus(device: &Device) {
    let (tokens, kv_heads, d) = (2048, 4, 128);
    let cpu = Device::cpu();
    let (mut elements, mut differ) = (0usize, 0usize);
    for codec in [Codec::tq(4), Codec::tq(8), Codec::seed(6)] {
        let row = RowFormat::new(codec, d).unwrap();
        let x = Rng(9).normals(tokens * kv_heads * d);
        let bytes = [device, &cpu].map(|device| {
            let pool = new_pool(device, row, kv_heads, tokens, 1).unwrap();
            let batch = Batch::contiguous(device, tokens, 0, tokens, tokens).unwrap();
            let x = device.upload(&x, &[tokens, kv_heads, d]).unwrap();
            run(device, |e| quantize(e, &[(&x, &pool)], &batch));
            pool_codes(&pool)
        });
        for (a, b) in bytes[0].chunks(row.row_bytes()).zip(bytes[1].chunks(row.row_bytes())) {
            elements += d;
            if a != b {
                differ += (0..d).filter(|&i| row.get_code(a, i) != row.get_code(b, i)).count();
            }
        }
    }
    println!("{differ} of {elements} codes differ from the CPU's");
    assert!((differ as f64) < 1e-6 * elements as f64, "{differ} of {elements} codes differ");
}

fn vectors_that_are_not_finite_decode_to_nan(device: &Device) {
    for codec in [Codec::tq(3), Codec::tq(8), Codec::seed(4), Codec::seed(5)] {
        for d in [64, 512] {
            let row = RowFormat::new(codec, d).unwrap();
            let mut x = Rng(3).normals(4 * d);
            x[5] = f32::NAN;
            x[d + 7] = f32::INFINITY;
            x[2 * d + 9] = f32::NEG_INFINITY;
            let pool = new_pool(device, row, 1, 8, 1).unwrap();
            let batch = Batch::contiguous(device, 8, 0, 4, 4).unwrap();
            let input = device.upload(&x, &[4, 1, d]).unwrap();
            let out = Guarded::new(device, DType::F32, &[4, 1, d]);
            run(device, |e| {
                quantize(e, &[(&input, &pool)], &batch)?;
                dequantize(e, &pool, &batch, 0, 0..4, Domain::Original, RowOrder::TokenMajor, &out.buffer)
            });
            let got = out.take();
            assert!(got[..d].iter().all(|x| x.is_nan()), "NaN in, {codec} D={d}");
            assert!(got[d..2 * d].iter().all(|x| x.is_nan()), "infinity in, {codec} D={d}");
            assert!(got[2 * d..3 * d].iter().all(|x| x.is_nan()), "-infinity in, {codec} D={d}");
            assert!(got[3 * d..].iter().all(|x| x.is_finite()), "its neighbour, {codec} D={d}");
        }
    }
}

/// Scales of f16 that overflow: see "Range" in docs/format.md.
fn infinite_scales_decode_to_what_is_not_finite(device: &Device) {
    for (codec, d) in [(Codec::tq(2), 64), (Codec::tq(3), 80), (Codec::tq(4), 128), (Codec::tq(8), 512)] {
        let row = RowFormat::new(codec, d).unwrap();
        // One element, equal elements, a random vector; and one that is as usual.
        let mut x = vec![0.0; d];
        x[d / 3] = -1e7;
        x.resize(2 * d, 1e6);
        x.extend(Rng(4).normals(d).iter().map(|x| x * 1e6));
        x.extend(Rng(5).normals(d));
        let pool = new_pool(device, row, 1, 8, 1).unwrap();
        let batch = Batch::contiguous(device, 8, 0, 4, 4).unwrap();
        let input = device.upload(&x, &[4, 1, d]).unwrap();
        let usual = new_pool(device, row, 1, 8, 1).unwrap();
        let q = device.upload(&Rng(6).normals(4 * d), &[4, 1, d]).unwrap();
        let [rotated, original, out] = [0; 3].map(|_| Guarded::new(device, DType::F32, &[4, 1, d]));
        let params = AttentionParams { window: Some(1), ..AttentionParams::for_head_dim(d) };
        run(device, |e| {
            quantize(e, &[(&input, &pool), (&q, &usual)], &batch)?;
            dequantize(e, &pool, &batch, 0, 0..4, Domain::Rotated, RowOrder::TokenMajor, &rotated.buffer)?;
            dequantize(e, &pool, &batch, 0, 0..4, Domain::Original, RowOrder::TokenMajor, &original.buffer)?;
            // Each query sees its own position.
            attention(e, &q, &usual, &pool, &batch, &params, &out.buffer, None)
        });
        let (codes, rotated) = (pool_codes(&pool), rotated.take());
        for (i, x) in rotated[..3 * d].iter().enumerate() {
            let code = row.get_code(&codes[i / d * row.row_bytes()..][..row.row_bytes()], i % d);
            assert_eq!(*x, row.codebook().unwrap().levels[code as usize] * f32::INFINITY, "{codec} D={d} element {i}");
        }
        for x in [&original.take(), &out.take()] {
            assert!(x[..3 * d].iter().all(|x| !x.is_finite()), "{codec} D={d}");
            assert!(x[3 * d..].iter().all(|x| x.is_finite()), "{codec} D={d}: its neighbour");
        }
    }
}

fn dequantize_is_bit_exact(device: &Device) {
    let mut rng = Rng(4);
    for d in HEAD_DIMS {
        for (c, codec) in codecs(d).into_iter().enumerate() {
            let row = RowFormat::new(codec, d).unwrap();
            let kv_heads = 1 + c % 3;
            let layout =
                if c % 2 == 0 { Layout::paged(&mut rng, 4, &[(5, 1), (11, 2)]) } else { Layout::ring(9, 4, 13, 1) };
            let filled = Filled::new(device, &mut rng, row, kv_heads, layout.page_size, layout.pages);
            let batch = layout.batch(device);
            let sequence = layout.spans.len() - 1;
            let (first, len) = (layout.spans[sequence].0, layout.spans[sequence].1);
            let list: Vec<u32> = (0..6).map(|_| (first + rng.below(len - first)) as u32).collect();
            let wanted = [Positions::Range(first..len), Positions::Range(len - 1..len), Positions::List(list)];
            for (w, positions) in wanted.into_iter().enumerate() {
                let n = positions.len();
                let at = |i: usize| match &positions {
                    Positions::Range(r) => r.start + i,
                    Positions::List(l) => l[i] as usize,
                };
                let dtype = FLOATS[(c + w) % 3];
                for order in [RowOrder::TokenMajor, RowOrder::HeadMajor] {
                    let shape = match order {
                        RowOrder::TokenMajor => [n, kv_heads, d],
                        RowOrder::HeadMajor => [kv_heads, n, d],
                    };
                    let (rotated, restored) =
                        (Guarded::new(device, dtype, &shape), Guarded::new(device, DType::F32, &shape));
                    run(device, |e| {
                        let p = positions.clone();
                        dequantize(
                            e,
                            &filled.pool,
                            &batch,
                            sequence,
                            p.clone(),
                            Domain::Rotated,
                            order,
                            &rotated.buffer,
                        )?;
                        dequantize(e, &filled.pool, &batch, sequence, p, Domain::Original, order, &restored.buffer)
                    });
                    let (rotated, restored) = (rotated.take(), restored.take());
                    for i in 0..n {
                        let (page, slot) = layout.locate(sequence, at(i));
                        for head in 0..kv_heads {
                            let r = if order == RowOrder::TokenMajor { i * kv_heads + head } else { head * n + i };
                            let want = filled.row(page, head, slot);
                            let name = format!("{codec} D={d} {dtype} {order:?} position {} head {head}", at(i));
                            for (got, &want) in rotated[r * d..][..d].iter().zip(want) {
                                assert_eq!(got.to_bits(), rounded(dtype, want).to_bits(), "{name}");
                            }
                            let exact: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                            let want = reference::restore(&row, &exact);
                            assert!(relative_error(&restored[r * d..][..d], &want) < 1e-6, "{name} restored");
                        }
                    }
                }
            }
        }
    }
}

/// One case of attention; `..BASE` fills in what a case does not change.
#[derive(Clone)]
struct Case {
    key: Codec,
    value: Codec,
    head_dim: usize,
    kv_heads: usize,
    group: usize,
    page_size: usize,
    /// (len, new) of each sequence; or one ring.
    lens: &'static [(usize, usize)],
    ring: Option<(usize, usize, usize, usize)>,
    causal: bool,
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: bool,
    domain: Domain,
    q: DType,
    out: DType,
    /// Powers of two over which the values' scales lie, up and down.
    octaves: usize,
}

const BASE: Case = Case {
    key: Codec::tq(4),
    value: Codec::tq(4),
    head_dim: 128,
    kv_heads: 2,
    group: 4,
    page_size: 16,
    lens: &[(75, 1)],
    ring: None,
    causal: true,
    window: None,
    softcap: None,
    sinks: false,
    domain: Domain::Original,
    q: DType::F32,
    out: DType::F32,
    octaves: 0,
};

fn attention_of_every_codec(device: &Device) {
    let mut cases = vec![BASE];
    // With itself at every head_dim, small.
    for head_dim in HEAD_DIMS {
        for codec in codecs(head_dim) {
            cases.push(Case { key: codec, value: codec, head_dim, group: 2, lens: &[(37, 1)], ..BASE });
        }
    }
    // Mixed codecs.
    for (key, value) in [
        (Codec::tq(5), Codec::tq(4)),
        (Codec::tq(4), Codec::tq(3)),
        (Codec::tq(8), Codec::tq(2)),
        (Codec::seed(8), Codec::tq(4)),
        (Codec::F16, Codec::tq(4)),
        (Codec::tq(6), Codec::F16),
        (Codec::F32, Codec::seed(4)),
    ] {
        cases.push(Case { key, value, ..BASE });
    }
    // Values of every size that a scale can tell: the largest is near f16's.
    for value in [Codec::tq(4), Codec::tq(3), Codec::tq(8), Codec::seed(4), Codec::seed(5)] {
        for (octaves, q) in [(3, DType::F16), (15, DType::F16), (15, DType::BF16), (15, DType::F32)] {
            let lens = &[(700, 1), (20, 4), (300, 1)];
            cases.push(Case { value, octaves, q, lens, sinks: octaves == 3, ..BASE });
        }
    }
    attention_is_close_to_float64(device, cases);
}

fn attention_of_every_shape(device: &Device) {
    let mut cases = vec![];
    // Groups of query heads.
    for group in [1, 2, 3, 5, 7, 8, 12, 16, 20] {
        cases.push(Case { group, ..BASE });
    }
    // Lengths around tiles and pages, several sequences, several queries.
    for lens in [
        &[(1, 1)][..],
        &[(2, 2)],
        &[(15, 1), (16, 1), (17, 1)],
        &[(63, 1), (64, 1), (65, 1), (128, 1)],
        &[(300, 1)],
        &[(1, 1), (500, 1), (33, 1), (256, 1)],
        &[(20, 4), (7, 7), (90, 2)],
        &[(40, 16)],
        &[(70, 33), (5, 0), (64, 1)],
        &[(150, 150)],
    ] {
        for page_size in [16, 64] {
            cases.push(Case { lens, page_size, ..BASE });
        }
        cases.push(Case { lens, key: Codec::tq(3), value: Codec::tq(3), head_dim: 64, group: 1, page_size: 4, ..BASE });
        cases.push(Case { lens, key: Codec::tq(5), value: Codec::tq(4), head_dim: 80, group: 3, ..BASE });
        cases.push(Case { lens, key: Codec::F16, value: Codec::F16, ..BASE });
    }
    // Rings, contiguous, of sizes that align with nothing; the last one at the last positions that there are.
    let end = (1 << 31) - (1 << 16);
    let last = (77, end - 77, end, 70);
    for ring in [(12, 4, 16, 1), (12, 0, 9, 1), (50, 31, 81, 3), (77, 700, 770, 70), (64, 64, 128, 1), last] {
        for window in [None, Some(7)] {
            cases.push(Case { ring: Some(ring), window, ..BASE });
            cases.push(Case { ring: Some(ring), window, key: Codec::seed(5), value: Codec::seed(6), ..BASE });
            cases.push(Case {
                ring: Some(ring),
                window,
                key: Codec::tq(3),
                value: Codec::tq(7),
                head_dim: 112,
                ..BASE
            });
        }
        cases.push(Case { ring: Some(ring), q: DType::F16, ..BASE });
    }
    attention_is_close_to_float64(device, cases);
}

fn attention_with_every_option(device: &Device) {
    let mut cases = vec![];
    // Windows, softcap, sinks, no mask, rotated domain, types; over several lengths and queries.
    let lens: &[_] = &[(90, 3), (30, 1), (200, 18)];
    for key in [Codec::tq(4), Codec::seed(5), Codec::F16, Codec::tq(3)] {
        let base = Case { key, value: key, lens, ..BASE };
        for window in [1, 5, 16, 64, 1000] {
            cases.push(Case { window: Some(window), ..base.clone() });
            cases.push(Case { window: Some(window), causal: false, ..base.clone() });
        }
        cases.push(Case { causal: false, ..base.clone() });
        cases.push(Case { softcap: Some(2.0), ..base.clone() });
        cases.push(Case { softcap: Some(20.0), sinks: true, window: Some(30), ..base.clone() });
        cases.push(Case { sinks: true, ..base.clone() });
        cases.push(Case { domain: Domain::Rotated, ..base.clone() });
        for q in FLOATS {
            for out in FLOATS {
                cases.push(Case { q, out, ..base.clone() });
            }
        }
    }
    attention_is_close_to_float64(device, cases);
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Case {
            key,
            value,
            head_dim,
            kv_heads,
            group,
            page_size,
            lens,
            ring,
            causal,
            window,
            softcap,
            sinks,
            octaves,
            ..
        } = self;
        write!(
            f,
            "{key}/{value} D={head_dim} {kv_heads}x{group} heads, pages of {page_size}, (len, new) {lens:?}, ring {ring:?}, \
             causal {causal}, window {window:?}, softcap {softcap:?}, sinks {sinks}, octaves {octaves}, {:?}, q {}, out {}",
            self.domain, self.q, self.out
        )
    }
}

fn attention_is_close_to_float64(device: &Device, cases: Vec<Case>) {
    let mut rng = Rng(5);
    let mut worst: (f64, String) = (0.0, String::new());
    for case in cases {
        let (d, kv_heads, heads) = (case.head_dim, case.kv_heads, case.kv_heads * case.group);
        let layout = match case.ring {
            Some((capacity, first, len, new)) => Layout::ring(capacity, first, len, new),
            None => Layout::paged(&mut rng, case.page_size, case.lens),
        };
        let (key_row, value_row) = (RowFormat::new(case.key, d).unwrap(), RowFormat::new(case.value, d).unwrap());
        let key = Filled::new(device, &mut rng, key_row, kv_heads, layout.page_size, layout.pages);
        let value = Filled::spread(device, &mut rng, value_row, kv_heads, layout.page_size, layout.pages, case.octaves);
        let batch = layout.batch(device);
        let tokens = layout.tokens();
        let q: Vec<f32> = rng.normals(tokens * heads * d).iter().map(|&x| rounded(case.q, x)).collect();
        let sinks = rng.normals(heads);
        let mut params = AttentionParams::for_head_dim(d);
        params.causal = case.causal;
        params.window = case.window;
        params.softcap = case.softcap;
        params.domain = case.domain;
        params.sink_logits = case.sinks.then(|| device.upload(&sinks, &[heads]).unwrap());
        let input = upload(device, case.q, &q, &[tokens, heads, d]);
        let out = Guarded::new(device, case.out, &[tokens, heads, d]);
        let lse = Guarded::new(device, DType::F32, &[tokens, heads]);
        run(device, |e| attention(e, &input, &key.pool, &value.pool, &batch, &params, &out.buffer, Some(&lse.buffer)));
        let (out, lse) = (out.take(), lse.take());

        let mut token = 0;
        for (s, &(first, len, new, _)) in layout.spans.iter().enumerate() {
            for i in 0..new {
                let own = len - new + i;
                let start = case.window.map_or(first, |w| first.max((own + 1).saturating_sub(w)));
                let end = if case.causal { own + 1 } else { len };
                for (head, &sink) in sinks.iter().enumerate() {
                    let (mut keys, mut values) = (vec![], vec![]);
                    for (page, slot) in (start..end).map(|p| layout.locate(s, p)) {
                        keys.push(key.row(page, head / case.group, slot));
                        values.push(value.row(page, head / case.group, slot));
                    }
                    let r = token * heads + head;
                    let given = &q[r * d..][..d];
                    let rotated: Vec<f32> = match case.domain {
                        Domain::Rotated => given.to_vec(),
                        Domain::Original => reference::rotate(&key_row, given).iter().map(|&x| x as f32).collect(),
                    };
                    let query = reference::Query {
                        q: &rotated,
                        scale: params.scale as f64,
                        softcap: case.softcap.map(f64::from),
                        sink: case.sinks.then_some(sink as f64),
                    };
                    let (want, want_lse) = reference::attention(&query, &keys, &values);
                    let want = match case.domain {
                        Domain::Rotated => want,
                        Domain::Original => reference::restore(&value_row, &want),
                    };
                    let tolerance = attention_tolerance(device, case.q, case.out);
                    let error = relative_error(&out[r * d..][..d], &want);
                    assert!(
                        error <= tolerance,
                        "{case}: sequence {s} query {i} head {head}: {error:e} > {tolerance:e}"
                    );
                    let lse_error = (lse[r] as f64 - want_lse).abs() / want_lse.abs().max(1.0);
                    assert!(
                        lse_error <= tolerance,
                        "{case}: sequence {s} query {i} head {head}: lse {} {want_lse}",
                        lse[r]
                    );
                    if case.out == DType::F32 && error > worst.0 {
                        worst = (error, format!("{case}"));
                    }
                }
                token += 1;
            }
        }
    }
    println!("largest error {:.2e}: {}", worst.0, worst.1);
}

/// A query that sees something that is not a number gets nothing that is one, and neither does a merge; other heads, and the query
/// before it, get theirs.
fn what_is_not_a_number_stays_so(device: &Device) {
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
fn queries_of_any_size(device: &Device) {
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

fn merged_parts_equal_the_whole(device: &Device) {
    let mut rng = Rng(6);
    let (d, kv_heads, heads, len) = (128, 2, 8, 100);
    let row = RowFormat::new(Codec::tq(4), d).unwrap();
    let key = Filled::new(device, &mut rng, row, kv_heads, 128, 1);
    let value = Filled::new(device, &mut rng, row, kv_heads, 128, 1);
    let q = device.upload(&rng.normals(heads * d), &[1, heads, d]).unwrap();
    let params = AttentionParams { causal: false, ..AttentionParams::for_head_dim(d) };
    // [0, 40), [40, 41) and [41, 100) against [0, 100), and a part that saw nothing.
    let part = |first: usize, len: usize| {
        let (out, lse) =
            (Guarded::new(device, DType::F32, &[1, heads, d]), Guarded::new(device, DType::F32, &[1, heads]));
        let batch = Batch::contiguous(device, 128, first, len, 1).unwrap();
        run(device, |e| attention(e, &q, &key.pool, &value.pool, &batch, &params, &out.buffer, Some(&lse.buffer)));
        (out, lse)
    };
    let (whole, whole_lse) = part(0, len);
    let parts = [part(0, 40), part(40, 41), part(41, len)];
    let nothing = (
        device.upload(&vec![0f32; heads * d], &[1, heads, d]).unwrap(),
        device.upload(&vec![f32::NEG_INFINITY; heads], &[1, heads]).unwrap(),
    );
    for dtype in FLOATS {
        let out = Guarded::new(device, dtype, &[1, heads, d]);
        let lse = Guarded::new(device, DType::F32, &[1, heads]);
        let mut views: Vec<_> = parts.iter().map(|(o, l)| (&o.buffer, &l.buffer)).collect();
        views.insert(1, (&nothing.0, &nothing.1));
        run(device, |e| merge(e, &views, &out.buffer, Some(&lse.buffer)));
        let want: Vec<f64> = whole.take().iter().map(|&x| x as f64).collect();
        let tolerance = 2.0 * attention_tolerance(device, DType::F32, dtype);
        assert!(relative_error(&out.take(), &want) <= tolerance, "{dtype}");
        let want: Vec<f64> = whole_lse.take().iter().map(|&x| x as f64).collect();
        assert!(relative_error(&lse.take(), &want) <= 1e-5);
    }
    let (out, lse) = (Guarded::new(device, DType::F32, &[1, heads, d]), Guarded::new(device, DType::F32, &[1, heads]));
    run(device, |e| merge(e, &[(&nothing.0, &nothing.1)], &out.buffer, Some(&lse.buffer)));
    assert!(out.take().iter().all(|&x| x == 0.0) && lse.take().iter().all(|&x| x == f32::NEG_INFINITY));
}

/// A part without positions, whose lse is -∞, may hold anything; a part with positions that is no number stays none.
fn merge_passes_over_empty_parts(device: &Device) {
    let (heads, d) = (2, 64);
    let part = |dtype: DType, x: f32, lse: f32| {
        (
            upload(device, dtype, &vec![x; heads * d], &[1, heads, d]),
            device.upload(&vec![lse; heads], &[1, heads]).unwrap(),
        )
    };
    let none = f32::NEG_INFINITY;
    let anything = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0];
    // Parts as (value, lse), and what they give.
    /// (value, lse) of the parts, and those of the whole.
    type Parts = (Vec<(f32, f32)>, f32, f32);
    let mut cases: Vec<Parts> = vec![
        (vec![(f32::NAN, none), (f32::INFINITY, none)], 0.0, none),
        (vec![(f32::NAN, none)], 0.0, none),
        (vec![(f32::NAN, -2.0), (3.0, 1.5)], f32::NAN, 1.5 + (-3.5f32).exp().ln_1p()),
        // Its weight is 0, and none the less it has been seen.
        (vec![(f32::NAN, -200.0), (3.0, 1.5)], f32::NAN, 1.5),
        (vec![(5.0, f32::NAN), (3.0, 1.5)], f32::NAN, f32::NAN),
        (vec![(5.0, f32::NAN), (f32::NAN, none)], f32::NAN, f32::NAN),
        (vec![(3.0, -3.4e38), (f32::NAN, none)], 3.0, -3.4e38),
    ];
    for x in anything {
        cases.push((vec![(x, none), (3.0, 1.5)], 3.0, 1.5));
        cases.push((vec![(3.0, -1e30), (x, none)], 3.0, -1e30));
    }
    // More than any kernel takes at once, empty ones first, last and in between.
    let many = |i: usize| if i % 12 == 7 { (3.0, 1.5) } else { (anything[i % 4], none) };
    cases.push(((0..24).map(many).collect(), 3.0, 1.5 + 2f32.ln()));
    cases.push(((0..24).map(|i| (anything[i % 4], none)).collect(), 0.0, none));
    for (parts, want, want_lse) in cases {
        for dtype in FLOATS {
            let held: Vec<_> = parts.iter().map(|&(x, lse)| part(dtype, x, lse)).collect();
            let views: Vec<_> = held.iter().map(|(o, l)| (o, l)).collect();
            let out = Guarded::new(device, DType::F32, &[1, heads, d]);
            let lse = Guarded::new(device, DType::F32, &[1, heads]);
            run(device, |e| merge(e, &views, &out.buffer, Some(&lse.buffer)));
            let same = |got: f32, want: f32| {
                got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= 1e-6 * want.abs()
            };
            let (out, lse) = (out.take(), lse.take());
            let name = format!("{dtype} {parts:?}");
            assert!(out.iter().all(|&x| same(x, want)), "{name}: {} instead of {want}", out[0]);
            assert!(lse.iter().all(|&x| same(x, want_lse)), "{name}: lse {} instead of {want_lse}", lse[0]);
        }
    }
}

/// Scores of 1e8 and more, where f32 steps by more than exp can take: positions with the same key share the weight.
fn large_scores_share_the_weight(device: &Device) {
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
fn large_scores_are_told_apart(device: &Device) {
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
fn what_is_not_seen_does_not_matter(device: &Device) {
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

/// Bytes of the positions that a sequence holds, by layer and side: decoded in the rotated domain, so bit-exact.
fn content(cache: &mut KvCache, seq: tqkv::SequenceId) -> Vec<Vec<u32>> {
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

fn a_truncated_cache_forgets(device: &Device) {
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
fn a_batch_equals_its_sequences(device: &Device) {
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

fn nothing_is_no_error(device: &Device) {
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

/// A page of 16 positions in some order, of which 37 hold random vectors, for a head_dim that is no multiple of 16.
struct Odd {
    row: RowFormat,
    batch: Batch,
    key: PagePool,
    value: PagePool,
    /// What was stored, [kv_heads][positions], in the rotated domain.
    keys: Vec<Vec<Vec<f32>>>,
    values: Vec<Vec<Vec<f32>>>,
}

const ODD_LEN: usize = 37;
const ODD_HEADS: (usize, usize) = (2, 6);

impl Odd {
    fn new(device: &Device, row: RowFormat, rng: &mut Rng) -> Odd {
        let (d, kv_heads, pages) = (row.head_dim(), ODD_HEADS.0, [2, 0, 1]);
        let span = |new| Span { first: 0, len: ODD_LEN, new, pages: &pages };
        let all = Batch::new(device, 16, &[span(ODD_LEN)]).unwrap();
        let [key, value] = [0, 1].map(|_| new_pool(device, row, kv_heads, 16, 3).unwrap());
        let [k, v] = [0, 1].map(|_| rng.normals(ODD_LEN * kv_heads * d));
        let [x, y] = [&k, &v].map(|x| device.upload(x, &[ODD_LEN, kv_heads, d]).unwrap());
        run(device, |e| quantize(e, &[(&x, &key), (&y, &value)], &all));
        let stored = |pool: &PagePool, x: &[f32]| -> Vec<Vec<Vec<f32>>> {
            let (codes, scales) = (pool_codes(pool), pool_scales(pool));
            let (mut error, mut norm) = (0.0, 0.0);
            let rows = (0..kv_heads).map(|head| {
                let row_at = |p: usize| {
                    let i = (pages[p / 16] as usize * kv_heads + head) * 16 + p % 16;
                    let (bytes, n) = (row.row_bytes(), row.scales_per_row());
                    let decoded = reference::dequantize(&row, &codes[i * bytes..][..bytes], &scales[i * n..][..n]);
                    let restored = reference::restore(&row, &decoded.iter().map(|&x| x as f64).collect::<Vec<_>>());
                    let x = &x[(p * kv_heads + head) * d..][..d];
                    error += x.iter().zip(&restored).map(|(&x, y)| (x as f64 - y).powi(2)).sum::<f64>();
                    norm += x.iter().map(|&x| (x as f64).powi(2)).sum::<f64>();
                    decoded
                };
                (0..ODD_LEN).map(row_at).collect()
            });
            let rows = rows.collect();
            // 4^-bits is below the optimal quantizer's error by a factor of 1.9 at 2 bits and 2.7 at 8.
            let most = if row.bits() >= 16 { 1e-6 } else { 4.0 * 4f64.powi(-(row.bits() as i32)) };
            assert!(error / norm < most, "{} D={d}: {} of {most}", row.codec(), error / norm);
            rows
        };
        let (keys, values) = (stored(&key, &k), stored(&value, &v));
        Odd { row, batch: Batch::new(device, 16, &[span(2)]).unwrap(), key, value, keys, values }
    }

    /// What the query of the i-th of two new tokens must give, in the model's own domain.
    fn want(&self, q: &[f32], i: usize, head: usize) -> Vec<f64> {
        let rotated: Vec<f32> = reference::rotate(&self.row, q).iter().map(|&x| x as f32).collect();
        let scale = 1.0 / (self.row.head_dim() as f64).sqrt();
        let query = reference::Query { q: &rotated, scale: scale as f32 as f64, softcap: None, sink: None };
        let (seen, kv_head) = (ODD_LEN - 1 + i, head / (ODD_HEADS.1 / ODD_HEADS.0));
        let [k, v] = [&self.keys, &self.values]
            .map(|all| -> Vec<&[f32]> { all[kv_head][..seen].iter().map(Vec::as_slice).collect() });
        let (out, _) = reference::attention(&query, &k, &v);
        reference::restore(&self.row, &out)
    }
}

fn head_dims_that_are_no_multiple_of_16(device: &Device) {
    let mut rng = Rng(11);
    for d in [8, 20, 100] {
        for codec in codecs(d) {
            let row = RowFormat::new(codec, d).unwrap();
            let (odd, w, (kv_heads, heads)) = (Odd::new(device, row, &mut rng), row.row_dim(), ODD_HEADS);
            let [rotated, restored] = [w, d].map(|n| Guarded::new(device, DType::F32, &[kv_heads, ODD_LEN, n]));
            run(device, |e| {
                for (domain, out) in [(Domain::Rotated, &rotated), (Domain::Original, &restored)] {
                    let order = RowOrder::HeadMajor;
                    dequantize(e, &odd.key, &odd.batch, 0, 0..ODD_LEN, domain, order, &out.buffer)?;
                }
                Ok(())
            });
            let (rotated, restored) = (rotated.take(), restored.take());
            for (i, want) in odd.keys.iter().flatten().enumerate() {
                assert_eq!(&rotated[i * w..][..w], want, "{codec} D={d} row {i}");
                let want = reference::restore(&row, &want.iter().map(|&x| x as f64).collect::<Vec<_>>());
                assert!(relative_error(&restored[i * d..][..d], &want) < 1e-6, "{codec} D={d} row {i} restored");
            }
            for dtype in FLOATS {
                let q: Vec<f32> = rng.normals(2 * heads * d).iter().map(|&x| rounded(dtype, x)).collect();
                let input = upload(device, dtype, &q, &[2, heads, d]);
                let [out, back] = [0, 1].map(|_| Guarded::new(device, DType::F32, &[2, heads, d]));
                let [turned, turned_out] = [0, 1].map(|_| Guarded::new(device, DType::F32, &[2, heads, w]));
                let params = AttentionParams::for_head_dim(d);
                let in_rotated = AttentionParams { domain: Domain::Rotated, ..params.clone() };
                run(device, |e| {
                    let (key, value, batch) = (&odd.key, &odd.value, &odd.batch);
                    attention(e, &input, key, value, batch, &params, &out.buffer, None)?;
                    rotate(e, &row, Direction::Forward, &input, &turned.buffer)?;
                    attention(e, &turned.buffer, key, value, batch, &in_rotated, &turned_out.buffer, None)?;
                    rotate(e, &row, Direction::Inverse, &turned_out.buffer, &back.buffer)
                });
                turned.take();
                for (name, out, q_dtype) in [("", out.take(), dtype), ("rotated", back.take(), DType::F32)] {
                    for (j, q) in q.chunks(d).enumerate() {
                        let want = odd.want(q, j / heads, j % heads);
                        let error = relative_error(&out[j * d..][..d], &want);
                        let most = attention_tolerance(device, q_dtype, DType::F32);
                        assert!(error <= most, "{codec} D={d} {dtype} {name} query {j}: {error:e}");
                    }
                }
            }
        }
    }
}

macro_rules! suite {
    ($($device:ident),*) => { $(
        mod $device {
            suite!(@tests $device: rotation_matches_the_definition, quantize_writes_the_codes, codes_are_the_cpus,
                vectors_that_are_not_finite_decode_to_nan, infinite_scales_decode_to_what_is_not_finite, dequantize_is_bit_exact,
                attention_of_every_codec, attention_of_every_shape, attention_with_every_option, queries_of_any_size,
                what_is_not_a_number_stays_so, what_is_not_seen_does_not_matter, large_scores_share_the_weight,
                large_scores_are_told_apart, merge_passes_over_empty_parts, merged_parts_equal_the_whole,
                a_truncated_cache_forgets, a_batch_equals_its_sequences,
                head_dims_that_are_no_multiple_of_16, nothing_is_no_error);
        }
    )* };
    (@tests $device:ident: $($test:ident),*) => { $(
        #[test]
        fn $test() {
            super::on(stringify!($device), super::$test);
        }
    )* };
}

suite!(cpu, wgpu, cuda);

/// On the CPU, with pools in memory that is borrowed, of strides that are not tqkv's.
mod cpu_foreign {
    macro_rules! tests {
        ($($test:ident),*) => { $(
            #[test]
            fn $test() {
                super::use_foreign_pools();
                super::on("cpu", super::$test);
            }
        )* };
    }
    tests!(
        quantize_writes_the_codes,
        codes_are_the_cpus,
        vectors_that_are_not_finite_decode_to_nan,
        infinite_scales_decode_to_what_is_not_finite,
        dequantize_is_bit_exact,
        attention_of_every_codec,
        attention_of_every_shape,
        attention_with_every_option,
        queries_of_any_size,
        what_is_not_a_number_stays_so,
        what_is_not_seen_does_not_matter,
        large_scores_share_the_weight,
        large_scores_are_told_apart,
        merged_parts_equal_the_whole,
        a_batch_equals_its_sequences,
        head_dims_that_are_no_multiple_of_16
    );
}

/// The kernels that use subgroups, on a device that has none.
#[cfg(feature = "wgpu")]
#[test]
fn wgpu_without_subgroups() {
    on("wgpu", |_| {
        let (device, queue) = engine();
        // SAFETY: the queue is the device's, which nothing else uses.
        let device = unsafe { Device::from_wgpu(device, queue) }.unwrap();
        merged_parts_equal_the_whole(&device);
        large_scores_share_the_weight(&device);
        large_scores_are_told_apart(&device);
        a_batch_equals_its_sequences(&device);
        a_truncated_cache_forgets(&device);
    });
}
