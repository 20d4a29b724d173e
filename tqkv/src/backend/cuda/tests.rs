//! Every specialisation compiles, for every architecture. NVRTC needs no GPU: `TQKV_NVRTC` may name its library.

use super::attention::{Shape, Variant, plain_source};
use super::nvrtc::{self, Source};
use super::rows::{QuantizeShape, dequantize_source, merge_source, quantize_source, rotate_source};
use super::tables::Cells;
use crate::compute::DType;
use crate::format::{Codec, RowFormat};
use crate::ops::Direction;
use rayon::prelude::*;

/// Architectures, and the shared memory that a block can have there.
const ARCHITECTURES: [(&str, usize); 6] = [
    ("sm_80", 163 << 10),
    ("sm_86", 99 << 10),
    ("sm_89", 99 << 10),
    ("sm_90a", 227 << 10),
    ("sm_100", 227 << 10),
    ("sm_120", 99 << 10),
];

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

/// Kernels over single rows: the same for every architecture.
fn row_sources(head_dims: &[usize]) -> Vec<Source> {
    let mut all = vec![merge_source(DType::F32), merge_source(DType::F16), merge_source(DType::BF16)];
    for &d in head_dims {
        for (i, row) in codecs(d).into_iter().enumerate() {
            let dtype = [DType::F32, DType::F16, DType::BF16][i % 3];
            let alignment = |aligned: bool| if aligned { 1 << row.row_bytes().trailing_zeros().min(4) } else { 1 };
            let cells = row.codebook().map(|b| Cells::new(&b.boundaries));
            for aligned in [true, false] {
                let side = QuantizeShape {
                    row: &row,
                    cells: cells.as_ref(),
                    input: dtype,
                    input_aligned: aligned as u32,
                    code_alignment: alignment(aligned),
                };
                all.push(quantize_source([side, side]));
            }
            for out in [DType::F32, DType::F16, DType::BF16] {
                all.push(dequantize_source(&row, out, 1, alignment(true)));
            }
            all.push(dequantize_source(&row, dtype, 0, 1));
            all.push(plain_source(&row, &row, dtype, dtype));
        }
        let row = RowFormat::new(Codec::tq(4), d).unwrap();
        all.push(rotate_source(&row, Direction::Forward, DType::F32, DType::F16, 1));
        all.push(rotate_source(&row, Direction::Inverse, DType::F16, DType::F32, 0));
    }
    all
}

/// The tensor-core attention kernel as this module would compile it for a device with so much shared memory.
fn attention_variants(head_dims: &[usize], shared_memory: usize) -> Vec<Variant> {
    const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
    let mut all = vec![];
    let mut add = |key, value, page_size, query_rows, q, out| {
        let shape = Shape { key, value, page_size, query_rows, q, out, aligned: true };
        all.extend(Variant::choose(&shape, shared_memory));
    };
    let pair = |k, v, d| (RowFormat::new(k, d).unwrap(), RowFormat::new(v, d).unwrap());
    for &d in head_dims {
        for row in codecs(d) {
            add(row, row, 16, 2, DType::F32, DType::F32);
            if d == 128 {
                add(row, row, 64, 4, DType::F16, DType::F16);
                add(row, row, 64, 64, DType::F16, DType::F16);
            }
        }
        for (k, v) in [(5, 4), (4, 3), (8, 2), (3, 7), (3, 3), (4, 4)].map(|(k, v)| pair(Codec::tq(k), Codec::tq(v), d)) {
            // Pages that hold no whole tile, and few, several and many query rows.
            add(k, v, 9, 3, DType::F32, DType::F32);
            for (page_size, query_rows) in [(16, 4), (16, 16), (16, 64), (64, 4), (64, 16), (64, 64)] {
                add(k, v, page_size, query_rows, DType::F32, DType::F32);
            }
        }
    }
    if head_dims.contains(&128) {
        for codec in [Codec::tq(4), Codec::seed(5), Codec::F16, Codec::tq(3)] {
            let (k, v) = pair(codec, codec, 128);
            FLOATS.iter().for_each(|&q| FLOATS.iter().for_each(|&out| add(k, v, 16, 72, q, out)));
        }
        for (k, v) in [
            (Codec::seed(8), Codec::tq(4)),
            (Codec::F16, Codec::tq(4)),
            (Codec::tq(6), Codec::F16),
            (Codec::F16, Codec::F16),
            (Codec::seed(5), Codec::seed(6)),
        ] {
            let (k, v) = pair(k, v, 128);
            for (page_size, query_rows) in [(9, 4), (9, 16), (16, 4), (16, 64), (64, 4), (64, 64)] {
                add(k, v, page_size, query_rows, DType::F32, DType::F32);
            }
        }
    }
    all
}

/// Compiles all of `sources`, keeps them in the cache, and returns failures and what spills registers.
fn compile(architecture: &str, sources: &[Source]) -> (Vec<String>, Vec<String>) {
    let nvrtc = nvrtc::load().expect("checked before");
    let results: Vec<_> = sources
        .par_iter()
        .map(|source| {
            let name = || format!("{architecture} {} {}", source.name, source.options.join(" "));
            let key = source.key(architecture, nvrtc.version);
            if super::cache::load(key).is_some() {
                return (None, None);
            }
            match nvrtc.compile(source, architecture) {
                Ok(compiled) => {
                    super::cache::store(key, &compiled.cubin);
                    let spills = compiled.log.lines().find(|l| l.contains("spill") && !l.contains(" 0 bytes spill stores"));
                    (None, spills.map(|l| format!("{}: {}", name(), l.trim())))
                }
                Err(e) => (Some(format!("{}: {e}", name())), None),
            }
        })
        .collect();
    let (failures, spills): (Vec<_>, Vec<_>) = results.into_iter().unzip();
    (failures.into_iter().flatten().collect(), spills.into_iter().flatten().collect())
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
    let head_dims = match std::env::var("TQKV_CUDA_HEAD_DIMS") {
        Ok(_) => chosen("TQKV_CUDA_HEAD_DIMS", &[64, 80, 96, 112, 128, 192, 256, 512, 576, 1024], |d| d.to_string()),
        // Each of the kernels' ways to lay out a row; all head dims take long.
        Err(_) => vec![80, 128],
    };
    let mut failures = vec![];
    for (architecture, shared_memory) in chosen("TQKV_CUDA_ARCHITECTURES", &ARCHITECTURES, |a| a.0.to_owned()) {
        let mut sources = row_sources(&head_dims);
        sources.extend(attention_variants(&head_dims, shared_memory).iter().map(Variant::source));
        let (failed, spills) = compile(architecture, &sources);
        println!("{architecture}: {} kernels, {} spill registers, {} fail", sources.len(), spills.len(), failed.len());
        spills.iter().for_each(|s| println!("  spills: {s}"));
        failures.extend(failed);
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
