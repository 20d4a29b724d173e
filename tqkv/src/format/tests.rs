//! The codec against its definition: packing bit by bit, codebooks against theory, transform and scales through the
//! reference and the CPU, and the tables of `docs/format.md`.

use super::*;
use crate::compute::{Buffer, Device};
use crate::error::Error;
use crate::ops::{self, Batch, Direction, Domain, PagePool, RowOrder, Span};
use crate::reference;
use half::f16;
use proptest::prelude::*;
use rayon::prelude::*;

const HEAD_DIMS: [usize; 9] = [64, 80, 96, 112, 128, 192, 256, 512, 576];

/// Mean squared error of the optimal quantizer of a standard normal variable with 2 to 8 bits.
const OPTIMAL_MSE: [f64; 7] = [0.117482, 0.0345478, 0.00950101, 0.00250467, 0.00064424, 0.000163478, 0.0000411851];

/// SplitMix64 and Box-Muller: the same samples everywhere.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    fn normal_pair(&mut self) -> (f32, f32) {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * self.unit()).sin_cos();
        ((radius * cos) as f32, (radius * sin) as f32)
    }

    fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal_pair().0).collect()
    }
}

/// Every codec with codes that exists at a head_dim.
fn codecs(head_dim: usize) -> Vec<RowFormat> {
    let all = (2..=8).map(Codec::tq).chain((2..=8).map(Codec::seed));
    all.filter_map(|codec| RowFormat::new(codec, head_dim).ok()).collect()
}

proptest! {
    #[test]
    fn packing_has_an_inverse(steps in 1usize..=MAX_HEAD_DIM / ROW_STEP, seed: u64) {
        let d = steps * ROW_STEP;
        let mut rng = Rng(seed);
        for row in codecs(d) {
            let levels = 1u64 << row.bits();
            let codes: Vec<u16> = (0..d).map(|_| (rng.next() % levels) as u16).collect();
            // What the row held before must not show.
            let (mut packed, mut again) = (vec![0u8; row.row_bytes()], vec![0xffu8; row.row_bytes()]);
            row.pack(&codes, &mut packed);
            row.pack(&codes, &mut again);
            prop_assert_eq!(&packed, &again);
            let unpacked: Vec<u16> = (0..d).map(|i| row.get_code(&packed, i)).collect();
            prop_assert_eq!(&unpacked, &codes, "{}", row.codec());
        }
    }

    /// Bit j of element i is bit i·b + j of the row, counted from the least significant bit of its first byte; in planes, where
    /// a table of eight elements' bits says.
    #[test]
    fn packing_is_as_documented(steps in 1usize..=MAX_HEAD_DIM / ROW_STEP, seed: u64) {
        let d = steps * ROW_STEP;
        let mut rng = Rng(seed);
        for row in codecs(d) {
            let packed: Vec<u8> = (0..row.row_bytes()).map(|_| rng.next() as u8).collect();
            let b = row.bits();
            // (plane, bit of the byte) of bit j of elements 6 and 7 of eight.
            let top = [[(0, 3), (1, 3), (2, 3)], [(0, 7), (1, 7), (2, 7)]];
            for i in 0..d {
                let place = |j: usize| match (row.packing(), i % 8) {
                    (Packing::Byte, _) => i * 8 + j,
                    (Packing::Planes, e @ 6..) => top[e - 6][j].0 * d + i / 8 * 8 + top[e - 6][j].1,
                    (Packing::Planes, e) => e / 2 * d + i / 8 * 8 + e % 2 * 4 + j,
                    _ => i * b + j,
                };
                let bit = |j| u16::from(packed[place(j) / 8] >> (place(j) % 8) & 1);
                let code = (0..b).map(|j| bit(j) << j).sum::<u16>();
                prop_assert_eq!(row.get_code(&packed, i), code, "{} element {}", row.codec(), i);
            }
        }
    }
}

/// The worked example of `docs/format.md`.
#[test]
fn the_worked_example_holds() {
    let row = RowFormat::new(Codec::tq(3), 16).unwrap();
    let mut packed = [0; 6];
    row.pack(&[5, 2, 7, 0, 1, 6, 3, 4, 0, 0, 0, 0, 0, 0, 0, 7], &mut packed);
    assert_eq!(packed, [0x2d, 0x80, 0x0f, 0x80, 0xe1, 0x80]);
    let row = RowFormat::new(Codec::seed(4), 16).unwrap();
    let mut packed = [0; 8];
    row.pack(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0], &mut packed);
    assert_eq!(packed, [0x21, 0x43, 0x65, 0x87, 0xa9, 0xcb, 0xed, 0x0f]);
}

fn density(x: f64) -> f64 {
    (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt()
}

/// E[(x - level(x))²] for a standard normal x, by Simpson's rule cell by cell; 10 stands for infinity.
fn mean_squared_error(book: &Codebook) -> f64 {
    let edge = |i: usize| match i {
        0 => -10.0,
        i if i == book.levels.len() => 10.0,
        i => book.boundaries[i - 1] as f64,
    };
    let cell = |i: usize| {
        let (a, b, level, n) = (edge(i), edge(i + 1), book.levels[i] as f64, 200);
        let h = (b - a) / n as f64;
        let sum: f64 = (0..=n)
            .map(|k| {
                let x = a + h * k as f64;
                let weight = if k == 0 || k == n { 1.0 } else { 2.0 + 2.0 * (k % 2) as f64 };
                weight * density(x) * (x - level).powi(2)
            })
            .sum();
        sum * h / 3.0
    };
    (0..book.levels.len()).map(cell).sum()
}

fn book(codec: Codec) -> &'static Codebook {
    RowFormat::new(codec, 128).unwrap().codebook().unwrap()
}

/// Kernels that look up half a codebook take it for granted.
#[test]
fn codebooks_are_sorted_and_symmetric() {
    for row in codecs(128) {
        let Codebook { levels, boundaries } = row.codebook().unwrap();
        assert_eq!((levels.len(), boundaries.len()), (1 << row.bits(), (1 << row.bits()) - 1));
        assert!(levels.windows(2).all(|w| w[0] < w[1]) && boundaries.windows(2).all(|w| w[0] < w[1]));
        assert!(levels.iter().zip(levels.iter().rev()).all(|(a, b)| *a == -b), "{}", row.codec());
        assert_eq!(boundaries[boundaries.len() / 2], 0.0);
        for (w, &b) in levels.windows(2).zip(boundaries) {
            assert_eq!(b, (w[0] + w[1]) * 0.5);
        }
    }
}

#[test]
fn native_codebooks_are_optimal() {
    for (bits, optimal) in (2..=8).zip(OPTIMAL_MSE) {
        let mse = mean_squared_error(book(Codec::tq(bits)));
        assert!((mse / optimal - 1.0).abs() < 1e-3, "{bits} bits: {mse:e} instead of {optimal:e}");
    }
    let (native, seed) = (mean_squared_error(book(Codec::tq(8))), mean_squared_error(book(Codec::seed(8))));
    assert!(native <= 0.7 * seed, "{native:e} {seed:e}");
}

#[test]
fn native_codebooks_are_optimal_on_ten_million_samples() {
    const CHUNKS: u64 = 100;
    let books: Vec<_> = (2..=8).map(|bits| book(Codec::tq(bits))).collect();
    let sums = (0..CHUNKS)
        .into_par_iter()
        .map(|chunk| {
            let mut rng = Rng(chunk << 32);
            let mut sums = [0f64; 7];
            for _ in 0..10_000_000 / CHUNKS / 2 {
                let pair = rng.normal_pair();
                for x in [pair.0, pair.1] {
                    for (sum, book) in sums.iter_mut().zip(&books) {
                        *sum += (x - book.levels[book.code(x) as usize]).powi(2) as f64;
                    }
                }
            }
            sums
        })
        .reduce(|| [0.0; 7], |a, b| std::array::from_fn(|i| a[i] + b[i]));
    for ((bits, sum), optimal) in (2..=8).zip(sums).zip(OPTIMAL_MSE) {
        let mse = sum / 1e7;
        assert!((mse / optimal - 1.0).abs() < 0.01, "{bits} bits: {mse:e} instead of {optimal:e}");
    }
}

#[test]
fn codes_count_boundaries() {
    for row in codecs(128) {
        let book = row.codebook().unwrap();
        let last = (book.levels.len() - 1) as u16;
        for (i, &b) in book.boundaries.iter().enumerate() {
            assert_eq!((book.code(b), book.code(b.next_up())), (i as u16, i as u16 + 1), "strictly greater");
        }
        assert_eq!((book.code(f32::NEG_INFINITY), book.code(f32::INFINITY), book.code(f32::NAN)), (0, last, 0));
        assert_eq!((book.code(0.0), book.code(-0.0)), (book.zero_code(), book.zero_code()));
    }
}

/// SplitMix64 seeded with "tqkv sg1".
#[test]
fn native_signs_are_as_documented() {
    let mut rng = Rng(u64::from_le_bytes(*b"tqkv sg1"));
    let expected: Vec<u32> = (0..MAX_HEAD_DIM / 64)
        .flat_map(|_| {
            let bits = rng.next();
            [bits as u32, (bits >> 32) as u32]
        })
        .collect();
    for d in HEAD_DIMS {
        assert_eq!(RowFormat::new(Codec::tq(4), d).unwrap().signs()[..], expected);
    }
    assert_eq!(expected[..4], NATIVE_SIGNS_OF_THE_DOC);
    assert_eq!(RowFormat::new(Codec::seed(4), 128).unwrap().signs(), [0; 32]);
}

/// The first words, as `docs/format.md` prints them.
const NATIVE_SIGNS_OF_THE_DOC: [u32; 4] = [0xd874_47fa, 0xe85b_ff04, 0x2d6f_ed4d, 0x0f05_94ec];

/// Runs one vector through the CPU's transform.
fn rotated(device: &Device, row: &RowFormat, direction: Direction, x: &[f32]) -> Vec<f32> {
    let x = device.upload(x, &[x.len() / row.head_dim(), row.head_dim()]).unwrap();
    let mut encoder = device.encoder().unwrap();
    ops::rotate(&mut encoder, row, direction, &x, &x).unwrap();
    encoder.submit_and_wait().unwrap();
    x.read().unwrap()
}

fn norm<T: Copy + Into<f64>>(x: &[T]) -> f64 {
    x.iter().map(|&v| v.into().powi(2)).sum::<f64>().sqrt()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| (a as f64 - b as f64).powi(2)).sum::<f64>().sqrt()
}

#[test]
fn the_transform_is_its_own_inverse_and_keeps_norms() {
    let device = Device::cpu();
    let mut rng = Rng(2);
    for d in (1..=MAX_HEAD_DIM / ROW_STEP).map(|n| n * ROW_STEP) {
        for codec in [Codec::tq(4), Codec::seed(4)] {
            let Ok(row) = RowFormat::new(codec, d) else { continue };
            let x = rng.normals(d);
            let there = reference::rotate(&row, &x);
            let back: Vec<f32> = reference::restore(&row, &there).iter().map(|&v| v as f32).collect();
            assert!(distance(&back, &x) < 1e-6 * norm(&x), "{codec} {d}: reference");
            assert!((norm(&there) / norm(&x) - 1.0).abs() < 1e-12, "{codec} {d}: reference's norm");

            // log2(D) + 2 ≤ 12 roundings of 2^-24 each way.
            let there_cpu = rotated(&device, &row, Direction::Forward, &x);
            let back = rotated(&device, &row, Direction::Inverse, &there_cpu);
            assert!(distance(&back, &x) < 2e-6 * norm(&x), "{codec} {d}: CPU");
            assert!((norm(&there_cpu) / norm(&x) - 1.0).abs() < 1e-6, "{codec} {d}: CPU's norm");
        }
    }
}

/// One position of one head, stored and decoded again.
fn round_trip(device: &Device, row: &RowFormat, x: &[f32], domain: Domain) -> Vec<f32> {
    round_trip_with(Encoding::Nearest, device, row, x, domain)
}

fn round_trip_with(encoding: Encoding, device: &Device, row: &RowFormat, x: &[f32], domain: Domain) -> Vec<f32> {
    let (n, d) = (x.len() / row.head_dim(), row.head_dim());
    let pool = PagePool::new(device, *row, 1, n, 1).unwrap().with_encoding(encoding).unwrap();
    let batch = Batch::contiguous(device, n, 0, n, n).unwrap();
    let x = device.upload(x, &[n, 1, d]).unwrap();
    let out = device.zeros(DType::F32, &[n, 1, d]).unwrap();
    let mut encoder = device.encoder().unwrap();
    ops::quantize(&mut encoder, &[(&x, &pool)], &batch).unwrap();
    ops::dequantize(&mut encoder, &pool, &batch, 0, 0..n, domain, RowOrder::TokenMajor, &out).unwrap();
    encoder.submit_and_wait().unwrap();
    out.read().unwrap()
}

#[test]
fn decoded_vectors_keep_their_norm() {
    let device = Device::cpu();
    let mut rng = Rng(3);
    for d in HEAD_DIMS {
        for bits in 2..=8 {
            let row = RowFormat::new(Codec::tq(bits), d).unwrap();
            // Scales are normal f16 numbers for elements from 1e-4 to 6e4.
            for size in [1e-3, 1.0, 1e4] {
                let x: Vec<f32> = rng.normals(8 * d).iter().map(|v| v * size).collect();
                let y = round_trip(&device, &row, &x, Domain::Original);
                for (x, y) in x.chunks(d).zip(y.chunks(d)) {
                    // f16 rounds by 2^-11 at most.
                    let ratio = norm(y) / norm(x);
                    assert!((ratio - 1.0).abs() < 4.9e-4, "tq{bits} {d}: {ratio}");
                }
            }
        }
    }
}

/// Searched rows keep their norm too, none has a larger error, and the errors of all together are at most these parts of the others.
#[test]
fn searched_rows_are_nearer() {
    let (device, mut rng) = (Device::cpu(), Rng(4));
    for (bits, d, part) in [(2, 64, 0.99), (3, 64, 0.92), (4, 64, 0.82), (4, 128, 0.88), (5, 128, 0.82), (8, 64, 0.76)]
    {
        let row = RowFormat::new(Codec::tq(bits), d).unwrap();
        let x = rng.normals(400 * d);
        let [near, searched] = [Encoding::Nearest, Encoding::Search]
            .map(|encoding| round_trip_with(encoding, &device, &row, &x, Domain::Original));
        let (mut errors, mut searched_errors) = (0.0, 0.0);
        for ((x, near), searched) in x.chunks(d).zip(near.chunks(d)).zip(searched.chunks(d)) {
            assert!((norm(searched) / norm(x) - 1.0).abs() < 4.9e-4, "tq{bits} {d}");
            let (error, less) = (distance(x, near).powi(2), distance(x, searched).powi(2));
            // The scale's rounding is an error that the search does not know of.
            assert!(less < error * 1.01 + 4.9e-4f64.powi(2) * norm(x).powi(2), "tq{bits} {d}: {less} {error}");
            (errors, searched_errors) = (errors + error, searched_errors + less);
        }
        assert!(searched_errors < part * errors, "tq{bits} {d}: {}", searched_errors / errors);
    }
}

/// What f16 scales can hold: see "Range" of `docs/format.md`.
#[test]
fn scales_end_where_f16_does() {
    let device = Device::cpu();
    let row = RowFormat::new(Codec::tq(4), 64).unwrap();
    let mut rng = Rng(4);
    let x = rng.normals(64);
    let scaled = |s: f32| x.iter().map(|v| v * s).collect::<Vec<_>>();
    let large = round_trip(&device, &row, &scaled(1e6), Domain::Rotated);
    assert!(large.iter().all(|v| v.is_infinite()));
    let small = round_trip(&device, &row, &scaled(1e-9), Domain::Rotated);
    assert!(small.iter().all(|v| *v == 0.0));
    for zero in [0.0, 1e-12] {
        assert!(round_trip(&device, &row, &scaled(zero), Domain::Rotated).iter().all(|v| *v == 0.0));
    }
}

/// One element far above the rest is what keys of real models look like, and what a transform is for: within 1.1 times
/// the error that Gaussian vectors have at this width.
#[test]
fn outlier_channels_cost_little() {
    let device = Device::cpu();
    let mut rng = Rng(5);
    for d in [64, 80, 96, 112, 128, 192, 256, 576] {
        for (bits, optimal) in (2..=8).zip(OPTIMAL_MSE) {
            let row = RowFormat::new(Codec::tq(bits), d).unwrap();
            let mut x = rng.normals(200 * d);
            for (i, x) in x.chunks_mut(d).enumerate() {
                x[(i * 7) % d] *= 30.0;
            }
            let y = round_trip(&device, &row, &x, Domain::Original);
            let mse =
                x.chunks(d).zip(y.chunks(d)).map(|(x, y)| (distance(x, y) / norm(x)).powi(2)).sum::<f64>() / 200.0;
            assert!(mse <= 1.1 * optimal, "tq{bits} {d}: {:.3} times the Gaussian error", mse / optimal);
        }
    }
}

#[test]
fn names_are_read_and_written() {
    for name in ["f32", "f16", "seed4", "seed5", "seed6", "seed8", "k2v8", "k5v4", "k8v2"] {
        assert_eq!(name.parse::<CodecPair>().unwrap().to_string(), name);
    }
    for name in ["", "f64", "seed", "seed3", "seed7", "seed48", "k1v4", "k9v4", "k4v", "k44v4", "K4v4", "tq4", "k4v4 "]
    {
        assert_eq!(name.parse::<CodecPair>(), Err(Error::UnknownCodec { got: name.to_owned() }));
    }
}

#[test]
fn codecs_exist_where_documented() {
    let exists = |codec, d| RowFormat::new(codec, d).is_ok();
    for d in 0..=2 * MAX_HEAD_DIM {
        let native = (1..=MAX_HEAD_DIM).contains(&d);
        let seed = [16, 32, 64, 128, 256, 512].contains(&d);
        for bits in 0..=u8::MAX {
            assert_eq!(exists(Codec::tq(bits), d), native && (2..=8).contains(&bits));
            assert_eq!(exists(Codec::seed(bits), d), seed && matches!(bits, 2..=6 | 8));
        }
        assert_eq!((exists(Codec::F32, d), exists(Codec::F16, d)), (native, native));
    }
}

const DOC: &str = include_str!("../../../docs/format.md");

/// Cells of the table under this heading.
fn table(heading: &str) -> Vec<Vec<&'static str>> {
    let (_, section) = DOC.split_once(&format!("\n{heading}\n")).unwrap_or_else(|| panic!("no section {heading:?}"));
    let lines = section.lines().skip_while(|l| !l.starts_with('|')).take_while(|l| l.starts_with('|'));
    lines.map(|l| l.trim_matches('|').split('|').map(str::trim).collect()).collect()
}

#[test]
fn the_documented_sizes_are_true() {
    let table = table("## Sizes");
    let head_dims: Vec<usize> = table[0][1..].iter().map(|c| c.parse().unwrap()).collect();
    assert_eq!(head_dims, HEAD_DIMS);
    let mut seen = vec![];
    for line in &table[2..] {
        let codec = match line[0].trim_matches('`') {
            "f32" => Codec::F32,
            "f16" => Codec::F16,
            name => match (name.strip_prefix("seed"), name.strip_prefix("tq")) {
                (Some(bits), _) => Codec::seed(bits.parse().unwrap()),
                (_, Some(bits)) => Codec::tq(bits.parse().unwrap()),
                _ => panic!("unknown codec {name}"),
            },
        };
        for (cell, d) in line[1..].iter().zip(HEAD_DIMS) {
            let expected = match RowFormat::new(codec, d) {
                Ok(row) => format!("{} + {}", row.row_bytes(), row.bytes() - row.row_bytes()),
                Err(_) => "–".to_owned(),
            };
            assert_eq!(*cell, expected, "{codec} at {d}");
        }
        seen.push(codec);
    }
    let all = [2, 3, 4, 5, 6, 7, 8].map(Codec::tq).into_iter().chain([2, 3, 4, 5, 6, 8].map(Codec::seed));
    assert_eq!(seen, all.chain([Codec::F16, Codec::F32]).collect::<Vec<_>>());
}

#[test]
fn the_documented_errors_are_true() {
    for line in &table("## Codebooks")[2..] {
        let bits: u8 = line[0].parse().unwrap();
        let near = |cell: &str, codec| {
            let (said, is): (f64, f64) = (cell.parse().unwrap(), mean_squared_error(book(codec)));
            assert!((said / is - 1.0).abs() < 1e-3, "{codec}: {said:e}, but {is:e}");
        };
        near(line[1], Codec::tq(bits));
        match line[2] {
            "–" => assert_eq!(bits, 7),
            cell => near(cell, Codec::seed(bits)),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Encoding and decoding through random paged or ring caches equals the reference, element by element.
    #[test]
    fn any_cache_equals_the_reference(
        steps in 1usize..=40, bits in 2u8..=8, seed_codec: bool, kv_heads in 1usize..4, page_size in 1usize..6,
        pages in 1usize..5, first in 0usize..50, new in 1usize..12, seed: u64,
    ) {
        let device = Device::cpu();
        let mut rng = Rng(seed);
        let codec = if seed_codec { Codec::seed(if bits == 7 { 8 } else { bits }) } else { Codec::tq(bits) };
        let d = if seed_codec { 16 << (steps % 6) } else { steps * ROW_STEP };
        let row = RowFormat::new(codec, d).unwrap();
        let new = new.min(pages * page_size);
        let mut table: Vec<u32> = (0..pages as u32 + 2).collect();
        (1..table.len()).rev().for_each(|i| table.swap(i, (rng.next() % (i as u64 + 1)) as usize));
        table.truncate(pages);
        let span = Span { first, len: first + new, new, pages: &table };
        let batch = Batch::new(&device, page_size, &[span]).unwrap();
        let pool = PagePool::new(&device, row, kv_heads, page_size, pages + 2).unwrap();
        let x = rng.normals(new * kv_heads * d);
        let input = device.upload(&x, &[new, kv_heads, d]).unwrap();
        let out = device.upload(&vec![f32::NAN; x.len()], &[new, kv_heads, d]).unwrap();
        let mut encoder = device.encoder().unwrap();
        ops::quantize(&mut encoder, &[(&input, &pool)], &batch).unwrap();
        let positions = first..first + new;
        ops::dequantize(
            &mut encoder, &pool, &batch, 0, positions, Domain::Rotated, RowOrder::TokenMajor, &out,
        ).unwrap();
        encoder.submit_and_wait().unwrap();

        let (codes, decoded) = (pool.codes().read::<u8>().unwrap(), out.read::<f32>().unwrap());
        let scales = read_scales(pool.scales().unwrap());
        let mut touched = vec![false; (pages + 2) * kv_heads * page_size];
        for (r, (x, decoded)) in x.chunks(d).zip(decoded.chunks(d)).enumerate() {
            let (position, head) = (first + r / kv_heads, r % kv_heads);
            let slot = position % (pages * page_size);
            let index = (table[slot / page_size] as usize * kv_heads + head) * page_size + slot % page_size;
            touched[index] = true;
            let (stored, n) = (&codes[index * row.row_bytes()..][..row.row_bytes()], row.scales_per_row());
            let stored_scales = &scales[index * n..][..n];
            let oracle = reference::quantize(&row, x);
            let mut same = true;
            for (i, (&code, &margin)) in oracle.codes.iter().zip(&oracle.margins).enumerate() {
                same &= row.get_code(stored, i) == code;
                prop_assert!(row.get_code(stored, i) == code || margin < 1e-5, "{} {} element {}", codec, d, i);
            }
            for (&got, &want) in stored_scales.iter().zip(&oracle.scales) {
                // One step of f16 (2^-10) if rounding fell on the other side; 1e-6 for f32.
                let tolerance = if row.scale_dtype() == DType::F16 { 9.8e-4 } else { 1e-6 };
                prop_assert!(!same || (got - want).abs() <= tolerance * want, "{} {} scale {} {}", codec, d, got, want);
            }
            let bits = |v: &[f32]| v.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            prop_assert_eq!(bits(decoded), bits(&reference::dequantize(&row, stored, stored_scales)));
        }
        // Nothing else was written.
        for (index, _) in touched.iter().enumerate().filter(|(_, touched)| !**touched) {
            prop_assert!(codes[index * row.row_bytes()..][..row.row_bytes()].iter().all(|&b| b == 0));
        }
    }
}

fn read_scales(scales: &Buffer) -> Vec<f32> {
    match scales.dtype() {
        DType::F16 => scales.read::<f16>().unwrap().into_iter().map(f16::to_f32).collect(),
        _ => scales.read().unwrap(),
    }
}
