//! Every specialisation compiles, for every architecture. NVRTC needs no GPU: `TQKV_NVRTC` may name its library.

use super::attention::{Shape, Tiles, Variant, expand_key, plain_key, plain_rows, prefill_key, refresh_key};
use super::kernel::KernelKey;
use super::nvrtc::{self, Source};
use super::rows::{InputShape, dequantize_key, merge_key, quantize_key, rotate_key};
use super::tables::Grid;
use crate::compute::{DType, Device};
use crate::format::Cells;
use crate::format::{Codec, RowFormat};
use crate::ops::{AttentionParams, Batch, Direction, PagePool, Span, attention, quantize};
use rayon::prelude::*;
use std::process::Command;

/// Architectures, and the shared memory that a block can have there.
const ARCHITECTURES: [(&str, usize); 6] = [
    ("sm_80", 163 << 10),
    ("sm_86", 99 << 10),
    ("sm_89", 99 << 10),
    ("sm_90a", 227 << 10),
    ("sm_100", 227 << 10),
    ("sm_120", 99 << 10),
];

const ARCHITECTURES_VARIABLE: &str = "TQKV_CUDA_ARCHITECTURES";

/// The list or, if the variable is set, what it names of it (separated by commas).
fn chosen<T: Copy>(variable: &str, all: &[T], name: impl Fn(T) -> String) -> Vec<T> {
    match std::env::var(variable) {
        Ok(wanted) => all.iter().copied().filter(|&x| wanted.split(',').any(|w| w == name(x))).collect(),
        Err(_) => all.to_vec(),
    }
}

fn codecs(head_dim: usize) -> Vec<RowFormat> {
    let native = (2..=8).map(Codec::tq);
    let seed = [2, 3, 4, 5, 6, 8].map(Codec::seed).into_iter();
    native.chain(seed).chain([Codec::F16, Codec::F32]).filter_map(|c| RowFormat::new(c, head_dim).ok()).collect()
}

/// Of codecs that differ in a number only, one: kernels take long to compile.
fn one_of_each_kind(row: &RowFormat) -> bool {
    [Codec::tq(3), Codec::tq(4), Codec::tq(8), Codec::seed(5), Codec::F16].contains(&row.codec())
}

/// Kernels over single rows: the same for every architecture.
fn row_kernels(head_dims: &[usize]) -> Vec<KernelKey> {
    let mut all = vec![merge_key(DType::F32), merge_key(DType::F16), merge_key(DType::BF16), refresh_key()];
    for &d in head_dims {
        for (i, row) in codecs(d).into_iter().enumerate() {
            let dtype = [DType::F32, DType::F16, DType::BF16][i % 3];
            let alignment = |aligned: bool| if aligned { 1 << row.row_bytes().trailing_zeros().min(4) } else { 1 };
            let cells = row.codebook().map(|b| Cells::new(&b.boundaries));
            let grid = cells.as_ref().and_then(|cells| Grid::new(&row, cells));
            // Odd addresses take other code, the same way at every head_dim.
            for aligned in [true, false].into_iter().filter(|&a| a || matches!(d, 80 | 128)) {
                let side = InputShape {
                    row: &row,
                    cells: cells.as_ref(),
                    grid: grid.as_ref(),
                    input: dtype,
                    input_aligned: aligned as u32,
                    code_alignment: alignment(aligned),
                };
                all.push(quantize_key(&[[side, side]]));
                if aligned && matches!(d, 80 | 128) {
                    all.push(quantize_key(&[[side, side]; 2]));
                }
            }
            for out in [DType::F32, DType::F16, DType::BF16] {
                all.push(dequantize_key(&row, out, 1, d, alignment(true)));
            }
            if matches!(d, 80 | 128) {
                all.push(dequantize_key(&row, dtype, 0, d, 1));
            }
            let shape = Shape {
                key: row,
                value: row,
                page_size: 16,
                near: [None; 2],
                query_rows: 2,
                q: dtype,
                out: dtype,
                original: true,
                aligned: true,
                short: true,
            };
            let mut plain = |dtype, wanted| {
                let alignments = [alignment(wanted > 1); 2];
                all.push(plain_key([&row; 2], alignments, [dtype; 2], true, plain_rows(d, wanted)));
            };
            if Variant::choose(&shape, usize::MAX).is_none() {
                plain(DType::F16, 1);
            }
            [4, 8].into_iter().for_each(|wanted| plain(DType::F32, wanted));
        }
        let row = RowFormat::new(Codec::tq(4), d).unwrap();
        all.push(rotate_key(&row, Direction::Forward, DType::F32, DType::F16, 1));
        all.push(rotate_key(&row, Direction::Inverse, DType::F16, DType::F32, 0));
    }
    all
}

/// The tensor-core attention kernel as this module would compile it for a device with so much shared memory.
fn attention_variants(head_dims: &[usize], shared_memory: usize) -> Vec<Variant> {
    const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    let mut all = vec![];
    let mut add = |key, value, page_size, query_rows, q, out| {
        // One query of long contexts, several of short ones.
        let (original, aligned, short) = (true, true, query_rows > 4);
        let shape = Shape { key, value, near: [None; 2], page_size, query_rows, q, out, original, aligned, short };
        all.extend(Variant::choose(&shape, shared_memory));
    };
    let pair = |k, v, d| (RowFormat::new(k, d).unwrap(), RowFormat::new(v, d).unwrap());
    for &d in head_dims {
        for row in codecs(d) {
            add(row, row, 64, 4, DType::F16, DType::F16);
            if one_of_each_kind(&row) {
                add(row, row, 64, 4, DType::F32, DType::F32);
            }
            if matches!(d, 80 | 128) {
                // Pages that hold no whole tile; several and many query rows.
                add(row, row, 9, 1, DType::F16, DType::F16);
                add(row, row, 64, 8, DType::F16, DType::F16);
                add(row, row, 64, 16, DType::F16, DType::F16);
                add(row, row, 64, 64, DType::F16, DType::F16);
            }
        }
        for (k, v) in [(5, 4), (4, 3), (8, 2)].map(|(k, v)| pair(Codec::tq(k), Codec::tq(v), d)) {
            add(k, v, 64, 4, DType::F16, DType::F16);
        }
    }
    for d in [128].into_iter().filter(|d| head_dims.contains(d)) {
        for codec in [Codec::tq(4), Codec::seed(5), Codec::F16, Codec::tq(3)] {
            let (k, v) = pair(codec, codec, d);
            for q in [DType::F16, DType::BF16] {
                FLOATS.iter().for_each(|&out| add(k, v, 16, 72, q, out));
            }
        }
    }
    all
}

/// The kernels for prompts, which only one architecture has.
fn prompt_kernels(head_dims: &[usize]) -> Vec<KernelKey> {
    let mut all = vec![];
    // One of each width of products, and the longest.
    for d in head_dims.iter().copied().chain([64, 256]) {
        for (i, row) in codecs(d).into_iter().filter(one_of_each_kind).enumerate() {
            let tiles = Tiles::of(&row, &row).unwrap();
            all.push(expand_key([&row; 2], [1 << row.row_bytes().trailing_zeros().min(4); 2], &tiles));
            if i < 2 {
                let q = [DType::F16, DType::BF16][i];
                all.push(prefill_key([&row; 2], [q, q], true, &tiles));
            }
        }
    }
    all
}

/// Those that `TQKV_CUDA_HEAD_DIMS` names, or the usual ones.
fn head_dims(usual: &[usize]) -> Vec<usize> {
    match std::env::var("TQKV_CUDA_HEAD_DIMS") {
        Ok(named) => named.split(',').filter_map(|d| d.parse().ok()).collect(),
        Err(_) => usual.to_vec(),
    }
}

/// Compiles all of `sources`, keeps them in the cache, and returns failures and what spills registers.
fn compile(architecture: &str, sources: &[Source]) -> (Vec<String>, Vec<String>) {
    let nvrtc = nvrtc::load().expect("checked before");
    let results: Vec<_> = sources
        .iter()
        .map(|source| {
            let name = || format!("{architecture} {} {}", source.name, source.options.join(" "));
            let key = source.key(architecture, nvrtc.version);
            if super::cache::load(key).is_some() {
                return (None, None);
            }
            match nvrtc.compile(source, architecture) {
                Ok(compiled) => {
                    super::cache::store(key, &compiled.cubin);
                    let spills =
                        compiled.log.lines().find(|l| l.contains("spill") && !l.contains(" 0 bytes spill stores"));
                    (None, spills.map(|l| format!("{}: {}", name(), l.trim())))
                }
                Err(e) => (Some(format!("{}: {e}", name())), None),
            }
        })
        .collect();
    let (failures, spills): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    (failures.into_iter().flatten().collect(), spills.into_iter().flatten().collect())
}

/// The integers that attention has for the levels of 3 bits (codec/planes.cuh) are those of the codebook, and its bytes theirs.
#[test]
fn integer_levels_are_the_codebooks() {
    let levels = &RowFormat::new(Codec::tq(3), 128).unwrap().codebook().unwrap().levels;
    let (high, low) = ([0xf2d3b181u32, 0x7f4f2d0e], [0x8962b000u32, 0x00509e77]);
    let text = include_str!("kernels/codec/planes.cuh");
    assert!(text.contains("LEVEL_BYTES = {0xf2d3b181, 0x7f4f2d0e, 0x8962b000, 0x00509e77}"));
    for (i, level) in levels.iter().enumerate() {
        let byte = |words: [u32; 2]| words[i / 4].to_le_bytes()[i % 4] as i8 as i32;
        let integer = byte(high) * 256 + byte(low);
        assert!((level / levels[7] * 32512.0 - integer as f32).abs() < 0.5, "{i}: {integer} {level}");
    }
}

/// `TQKV_CUDA_ARCHITECTURES=sm_90a` and `TQKV_CUDA_HEAD_DIMS=64,128` leave out the rest. What is compiled stays in the disk
/// cache, so that a second run, and a GPU of that architecture, find it.
#[test]
fn every_specialisation_compiles() {
    if let Err(reason) = nvrtc::load() {
        let required = std::env::var("TQKV_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == "nvrtc"), "TQKV_REQUIRE names nvrtc: {reason}");
        eprintln!("SKIPPED: compiling CUDA kernels: {reason}");
        return;
    }
    let architectures = chosen(ARCHITECTURES_VARIABLE, &ARCHITECTURES, |a| a.0.to_owned());
    if let [(architecture, shared_memory)] = architectures[..] {
        return compiles_for(architecture, shared_memory);
    }
    // NVRTC compiles one kernel at a time in a process, so every architecture has a process of its own: this test again.
    let failures: Vec<_> = architectures
        .par_iter()
        .filter_map(|(architecture, _)| {
            let test = "backend::cuda::tests::every_specialisation_compiles";
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", test, "--nocapture"])
                .env(ARCHITECTURES_VARIABLE, architecture)
                .output()
                .unwrap();
            let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
            let (out, err) = (text(&output.stdout), text(&output.stderr));
            out.lines().filter(|line| line.contains("sm_")).for_each(|line| println!("{line}"));
            (!output.status.success()).then(|| format!("{architecture}: {out}{err}"))
        })
        .collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn compiles_for(architecture: &str, shared_memory: usize) {
    // By default each of the kernels' ways to lay out a row; all head dims take long.
    let head_dims = head_dims(&[80, 128]);
    let mut kernels = row_kernels(&head_dims);
    kernels.extend(attention_variants(&head_dims, shared_memory).iter().map(|variant| variant.key));
    if architecture == "sm_90a" {
        kernels.extend(prompt_kernels(&head_dims));
    }
    let sources: Vec<_> = kernels.iter().map(KernelKey::source).collect();
    let (failures, spills) = compile(architecture, &sources);
    println!("{architecture}: {} kernels, {} spill registers, {} fail", sources.len(), spills.len(), failures.len());
    spills.iter().for_each(|s| println!("  spills: {s}"));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The judge of f16 products: the CPU backend, over the same bytes. The conformance suite has mostly f32 queries, whose products are exact.
#[test]
fn tensor_cores_are_close_to_the_cpu() {
    let Ok(device) = Device::open("cuda") else {
        let required = std::env::var("TQKV_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|r| r == "cuda"), "TQKV_REQUIRE names cuda");
        eprintln!("SKIPPED: tensor cores: no CUDA device");
        return;
    };
    let cpu = Device::cpu();
    let mut state = 1u64;
    let mut normal = move || {
        let mut unit = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) as f32 + 0.5) / (1u64 << 31) as f32
        };
        (-2.0 * unit().ln()).sqrt() * (std::f32::consts::TAU * unit()).cos()
    };
    let mut worst = (0.0, String::new());
    let mut failures = vec![];
    for d in head_dims(&[64, 80, 96, 112, 128, 192, 256, 512, 576]) {
        let mixed = [(5, 4), (4, 3), (8, 2)].map(|(k, v)| (Codec::tq(k), Codec::tq(v)));
        let mixed = mixed.map(|(k, v)| (RowFormat::new(k, d).unwrap(), RowFormat::new(v, d).unwrap()));
        for (case, (key, value)) in codecs(d).into_iter().map(|c| (c, c)).chain(mixed).enumerate() {
            if key.codec() == Codec::F32 {
                continue;
            }
            // Rows of one to four tensor-core tiles, pages that hold tiles and such that do not.
            let kinds = [(4, 1), (1, 1), (3, 5), (8, 4)];
            let (group, new) = kinds[if matches!(d, 80 | 128) { case % 4 } else { 0 }];
            let page = if group == 1 { 9 } else { 64 };
            let (kv_heads, lens) = (2usize, [700usize, 33, 64 + new]);
            let heads = kv_heads * group;
            let used: Vec<usize> = lens.iter().map(|n| n.div_ceil(page)).collect();
            let total: usize = used.iter().sum();
            let mut pages = (0..total as u32).rev();
            let tables: Vec<Vec<u32>> = used.iter().map(|&n| pages.by_ref().take(n).collect()).collect();
            let n: usize = lens.iter().sum();
            let kv: Vec<f32> = (0..n * kv_heads * d).map(|_| normal()).collect();
            let q: Vec<half::f16> = (0..lens.len() * new * heads * d).map(|_| half::f16::from_f32(normal())).collect();
            let mut params = AttentionParams::for_head_dim(d);
            params.window = (case % 3 == 1).then_some(100);
            params.softcap = (case % 3 == 2).then_some(10.0);
            let (mut pools, mut outs) = (vec![], vec![]);
            for device in [&cpu, &device] {
                let own = [key, value].map(|row| PagePool::new(device, row, kv_heads, page, total).unwrap());
                let batch = |new: Option<usize>| {
                    let span = |(&len, pages): (&usize, _)| Span { first: 0, len, new: new.unwrap_or(len), pages };
                    let tables = tables.iter().map(Vec::as_slice);
                    Batch::new(device, page, &lens.iter().zip(tables).map(span).collect::<Vec<_>>()).unwrap()
                };
                let x = device.upload(&kv, &[n, kv_heads, d]).unwrap();
                let q = device.upload(&q, &[lens.len() * new, heads, d]).unwrap();
                let out = device.zeros(DType::F16, q.shape()).unwrap();
                let mut encoder = device.encoder().unwrap();
                quantize(&mut encoder, &[(&x, &own[0]), (&x, &own[1])], &batch(None)).unwrap();
                attention(&mut encoder, &q, &own[0], &own[1], &batch(Some(new)), &params, &out, None).unwrap();
                encoder.submit_and_wait().unwrap();
                outs.push(out.read::<half::f16>().unwrap().iter().map(|x| x.to_f32()).collect::<Vec<_>>());
                pools.push(own);
            }
            let name = format!("{}/{} D={d} group {group} new {new}", key.codec(), value.codec());
            for (a, b) in pools[0].iter().zip(&pools[1]) {
                assert!(a.codes().read::<u8>().unwrap() == b.codes().read::<u8>().unwrap(), "{name}: bytes differ");
            }
            for (want, got) in outs[0].chunks(d).zip(outs[1].chunks(d)) {
                let norm = want.iter().map(|w| w * w).sum::<f32>().sqrt();
                let error = want.iter().zip(got).map(|(w, g)| (w - g).powi(2)).sum::<f32>().sqrt() / norm;
                if error.is_nan() || error > worst.0 {
                    worst = (error, name.clone());
                }
                // Queries (of more than four rows), levels and weights are rounded to f16, which has 11 bits: see docs/accuracy.md.
                // Then outputs are.
                if error.is_nan() || error > 1e-3 + 2f32.powi(-11) {
                    failures.push(format!("{name}: {error:e}"));
                }
            }
        }
    }
    println!("largest error {:.1e}: {}", worst.0, worst.1);
    assert!(failures.is_empty(), "{} of them, first {:?}", failures.len(), &failures[..failures.len().min(20)]);
}
