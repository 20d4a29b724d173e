//! Attention of some rows of queries over some positions, generic over the instruction set.
//!
//! ```text
//! for each tile of positions:
//!     decode its keys and values to f32, levels only           once for all rows; if they are few, as they are used
//!     for each four rows:
//!         s = (q · levels) · key factor · scale                lanes summed in f32, then added in f64
//!         m' = max(m, s); p = exp(s - m'); sum, out shrink by exp(m - m')
//!         sum += p; out += (p · value factor) · levels
//! ```
//! Rounding in those f32 sums is about 6e-9 |q| |k|, so a score whose |q| |k| scale is large is computed again in f64.
//! What is decoded before it is used stays in the first-level cache. What is used next is asked for in the meantime: the
//! tile's values while its keys are gone through, and then the next tile's keys.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::memory::{Line, Rows};
use super::rows::RowCoder;
use super::simd::{Job, Simd};
use crate::compute::DType;
use crate::format::{MAX_HEAD_DIM, Packing, RowFormat, Scaling};
use crate::problem::Batch;

/// Positions of the largest tile; every tile is a multiple of 16.
const MAX_TILE: usize = 256;
/// Floats of a tile of keys: a quarter of a first-level cache.
const TILE_FLOATS: usize = 4096;
/// Where |q| |k| scale is above this, sums of f32 may move a weight by more than a few 1e-6.
const LARGE: f64 = 128.0;
/// Rows that share the registers.
const ROWS: usize = 4;

/// K or V of the sequence.
pub(crate) struct Source<'a> {
    pub coder: &'a RowCoder,
    pub codes: &'a Rows<'a>,
    pub scales: &'a Rows<'a>,
    /// Rows of a page: KV heads times positions.
    pub page_rows: usize,
    /// Rows of a page before those of this head.
    pub head_rows: usize,
}

/// Attention of `seen.len()` rows over positions `start..end`, and its result.
pub(crate) struct Task<'a> {
    /// Rows of D floats, in the rotated domain, each divided by its unit.
    pub q: &'a [f32],
    pub units: &'a [f64],
    /// Norms of the rows times their units.
    pub norms: &'a [f64],
    /// The positions that each row sees.
    pub seen: &'a [(usize, usize)],
    pub start: usize,
    pub end: usize,
    pub batch: &'a Batch,
    pub sequence: usize,
    pub key: Source<'a>,
    pub value: Source<'a>,
    pub scale: f64,
    pub softcap: Option<f64>,
    /// Σ p·v of each row.
    pub out: Vec<f32>,
    /// The largest score of each row, and Σ p = Σ exp(score - max).
    pub max: Vec<f64>,
    pub sum: Vec<f64>,
}

/// Scores, weights and factors of a tile.
#[repr(align(64))]
struct Tile {
    /// Where each row of K and V is: its codes, or its levels.
    keys: [*const u8; MAX_TILE],
    values: [*const u8; MAX_TILE],
    /// Rows of the pool that are used next: asked for as each position is gone through.
    ahead: [*const u8; MAX_TILE],
    scores: [[f64; MAX_TILE]; ROWS],
    weights: [[f32; MAX_TILE]; ROWS],
    key_factors: [f64; MAX_TILE],
    value_factors: [f32; MAX_TILE],
    /// |k| · scale, or near it.
    key_norms: [f32; MAX_TILE],
}

#[inline(always)]
pub(super) unsafe fn attend<S: Simd>(task: &mut Task) {
    let mut t = Tile {
        keys: [std::ptr::null(); MAX_TILE],
        values: [std::ptr::null(); MAX_TILE],
        ahead: [std::ptr::null(); MAX_TILE],
        scores: [[0.0; MAX_TILE]; ROWS],
        weights: [[0.0; MAX_TILE]; ROWS],
        key_factors: [0.0; MAX_TILE],
        value_factors: [0.0; MAX_TILE],
        key_norms: [0.0; MAX_TILE],
    };
    // SAFETY: the caller's.
    unsafe {
        if task.seen.len() <= ROWS {
            few::<S>(task, &mut t);
        } else {
            many::<S>(task, &mut t);
        }
    }
}

/// Up to four rows, in long tiles, so that it is rare to wait for a tile's weights. What must be decoded before it is used is
/// decoded in stretches.
#[inline(always)]
unsafe fn few<S: Simd>(task: &mut Task, t: &mut Tile) {
    let (m, d) = (task.seen.len(), task.key.coder.row.head_dim());
    let (key_bits, value_bits) = (bits::<S>(&task.key), bits::<S>(&task.value));
    let form = |bits: usize| match bits {
        0 => Form::Levels,
        3 => Form::Nibbles,
        _ => Form::Codes,
    };
    let (key_form, value_form) = (form(key_bits), form(value_bits));
    let stretch = |form: Form| if form == Form::Levels { decoded(d) } else { MAX_TILE };
    let (key_stretch, value_stretch) = (stretch(key_form), stretch(value_form));
    let held = |form: Form| match form {
        Form::Levels => lines(decoded(d) * d),
        Form::Nibbles => lines(MAX_TILE * d / 8),
        Form::Codes => lines(0),
    };
    let (mut keys, mut values) = (held(key_form), held(value_form));
    let (keys, values) = (bytemuck::cast_slice_mut(&mut keys), bytemuck::cast_slice_mut(&mut values));
    let mut q = lines(m * d);
    let q = &mut bytemuck::cast_slice_mut(&mut q)[..m * d];
    q.copy_from_slice(task.q);
    if (2..=4).contains(&key_bits) {
        q.chunks_exact_mut(RUN * S::LANES).for_each(|run| transpose(run, RUN));
    }
    let q = q.as_ptr();
    for start in (task.start..task.end).step_by(MAX_TILE) {
        let count = MAX_TILE.min(task.end - start);
        let seen = seen(task, 0, start, count);
        let within = |from: usize, to: usize| seen.map(|(a, b)| (a.max(from), b.min(to)));
        find_factors(task, t, start, count);
        look_ahead(task, &task.value, start, start + count, &mut t.ahead);
        // SAFETY: pointers to D floats a row within q and out; what is seen is within the tile.
        unsafe {
            for at in (0..count).step_by(key_stretch) {
                let end = count.min(at + key_stretch);
                find::<S>(task, &task.key, key_form, start, (at, end), keys, &mut t.keys);
                if key_form == Form::Levels {
                    ask::<S>(&t.ahead[at..end], task.value.coder.row.row_bytes());
                }
                if key_bits != HALF {
                    norms::<S>(task, t, (at, end));
                }
                score::<S>(task, t, key_bits, q, 0, &within(at, end)[..m]);
            }
            soften::<S>(task, t, 0, &seen[..m]);
            // Also of the task after this one, which the same thread is likely to do.
            let end = task.seen[m - 1].1;
            look_ahead(task, &task.key, start + count, end.min(start + count + MAX_TILE), &mut t.ahead);
            for at in (0..count).step_by(value_stretch) {
                let end = count.min(at + value_stretch);
                find::<S>(task, &task.value, value_form, start, (at, end), values, &mut t.values);
                if value_form == Form::Levels {
                    ask::<S>(&t.ahead[at..end], task.key.coder.row.row_bytes());
                }
                add_values::<S>(task, t, value_bits, 0, &within(at, end)[..m]);
            }
        }
    }
    if (2..=4).contains(&value_bits) {
        task.out.chunks_exact_mut(RUN * S::LANES).for_each(|run| transpose(run, S::LANES));
    }
}

/// More rows: short tiles, decoded once for all of them.
#[inline(always)]
unsafe fn many<S: Simd>(task: &mut Task, t: &mut Tile) {
    let (n, d) = (task.seen.len(), task.key.coder.row.head_dim());
    let tile = decoded(d);
    let (mut q, mut keys, mut values) = (lines(n * d), lines(tile * d), lines(tile * d));
    let (keys, values) = (bytemuck::cast_slice_mut(&mut keys), bytemuck::cast_slice_mut(&mut values));
    bytemuck::cast_slice_mut(&mut q)[..n * d].copy_from_slice(task.q);
    let q = q.as_ptr().cast::<f32>();
    for start in (task.start..task.end).step_by(tile) {
        let count = tile.min(task.end - start);
        find_factors(task, t, start, count);
        find::<S>(task, &task.key, Form::Levels, start, (0, count), keys, &mut t.keys);
        prefetch::<S>(task, &task.key, start + count, tile.min(task.end - start - count));
        find::<S>(task, &task.value, Form::Levels, start, (0, count), values, &mut t.values);
        prefetch::<S>(task, &task.value, start + count, tile.min(task.end - start - count));
        // SAFETY: rows r..r + m exist; the tile holds `count` positions.
        unsafe {
            norms::<S>(task, t, (0, count));
            for r in (0..n).step_by(ROWS) {
                let seen = &seen(task, r, start, count)[..ROWS.min(n - r)];
                score::<S>(task, t, 0, q.add(r * d), r, seen);
                soften::<S>(task, t, r, seen);
                add_values::<S>(task, t, 0, r, seen);
            }
        }
    }
}

/// What up to four rows from `r` on see of a tile.
fn seen(task: &Task, r: usize, start: usize, count: usize) -> [(usize, usize); ROWS] {
    let mut seen = [(0, 0); ROWS];
    for (seen, &(from, to)) in seen.iter_mut().zip(&task.seen[r..]) {
        *seen = (from.max(start) - start, to.min(start + count).saturating_sub(start));
    }
    seen
}

/// Runs a job for `rows` rows and codes of `bits`, one of those that `bits` gives.
#[inline(always)]
unsafe fn run<S: Simd, J: Job>(rows: usize, bits: usize, job: J) {
    // SAFETY: the caller's.
    unsafe {
        match rows {
            1 => run_width::<S, J, 1>(bits, job),
            2 => run_width::<S, J, 2>(bits, job),
            3 => run_width::<S, J, 3>(bits, job),
            _ => run_width::<S, J, 4>(bits, job),
        }
    }
}

#[inline(always)]
unsafe fn run_width<S: Simd, J: Job, const M: usize>(bits: usize, job: J) {
    // SAFETY: the caller's.
    unsafe {
        match bits {
            2 if S::NIBBLES >= 2 => S::call::<J, M, 2>(job),
            3 | 4 if S::NIBBLES >= 3 => S::call::<J, M, 4>(job),
            5 if S::LANES == 16 => S::call::<J, M, 5>(job),
            6 if S::LANES == 16 => S::call::<J, M, 6>(job),
            7 if S::LANES == 16 => S::call::<J, M, 7>(job),
            8 if S::LANES == 16 => S::call::<J, M, 8>(job),
            HALF if S::LANES == 16 => S::call::<J, M, HALF>(job),
            _ => S::call::<J, M, 0>(job),
        }
    }
}

/// Positions whose decoded keys, and as many values, stay in the first-level cache.
fn decoded(d: usize) -> usize {
    (TILE_FLOATS / d).next_multiple_of(16).min(64)
}

/// Floats that start where a cache's line does, as a vector across two costs two accesses; and a line that may be read after.
fn lines(floats: usize) -> Vec<Line> {
    vec![Line([0; 64]); floats / 16 + 1]
}

/// Vectors that are decoded from one register of codes: lane l holds elements 8 l to 8 l + 7 of a run, and vector c their
/// elements c.
const RUN: usize = 8;

/// A matrix of `columns` columns into one of as many rows.
fn transpose(x: &mut [f32], columns: usize) {
    let mut old = [0f32; RUN * 16];
    let (old, rows) = (&mut old[..x.len()], x.len() / columns);
    old.copy_from_slice(x);
    for (i, x) in x.iter_mut().enumerate() {
        *x = old[i % rows * columns + i / rows];
    }
}

/// The width of floats of 16 bits.
const HALF: usize = 16;

/// The width of codes or floats that are decoded as they are used; 0 for levels.
fn bits<S: Simd>(side: &Source) -> usize {
    let row = &side.coder.row;
    let whole = |elements: usize| row.head_dim().is_multiple_of(elements);
    // Four vectors at a time, sixteen sums and a codebook fill 32 registers.
    let four = S::LANES == 16 && whole(4 * S::LANES);
    match (row.packing(), row.bits()) {
        (Packing::Float(DType::F16), _) if four => HALF,
        _ if !has_one_factor(row) => 0,
        (Packing::Dense, bits @ (2 | 4)) | (Packing::Planes, bits) if bits <= S::NIBBLES && whole(RUN * S::LANES) => {
            bits
        }
        (Packing::Dense, bits @ 5..=8) | (Packing::Byte, bits @ 8) if four => bits,
        _ => 0,
    }
}

fn has_one_factor(row: &RowFormat) -> bool {
    matches!(row.scaling(), Scaling::Corrected | Scaling::Norm)
}

/// The factors of positions `start..start + count`.
#[inline(always)]
fn find_factors(task: &Task, t: &mut Tile, start: usize, count: usize) {
    let mut keys = [1f32; MAX_TILE];
    for (side, factors) in [(&task.key, &mut keys), (&task.value, &mut t.value_factors)] {
        if !has_one_factor(&side.coder.row) {
            factors[..count].fill(1.0);
            continue;
        }
        for (i, n, first) in pages(task, side, start, (0, count)) {
            side.coder.factors(side.scales.rows(first, n), &mut factors[i..i + n]);
        }
    }
    for (wide, &narrow) in t.key_factors.iter_mut().zip(&keys[..count]) {
        *wide = narrow as f64 * task.scale;
    }
}

/// Positions `from..to` of a tile, page by page, as rows of one page lie one after the other: the first position, how many,
/// and the first one's row. Not a function of a closure: that would not be compiled for the instruction set.
fn pages(
    task: &Task,
    side: &Source,
    start: usize,
    (from, to): (usize, usize),
) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut i = from;
    std::iter::from_fn(move || {
        if i == to {
            return None;
        }
        let (page, slot) = task.batch.locate(task.sequence, start + i);
        let n = (task.batch.page_size() - slot).min(to - i);
        i += n;
        Some((i - n, n, page * side.page_rows + side.head_rows + slot))
    })
}

/// How rows are found.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// As they are in the pool.
    Codes,
    /// Those of 3 bits.
    Nibbles,
    /// Decoded, without their factor if they have one.
    Levels,
}

/// The rows of positions `from..to` of a tile. What is not in the pool is in `decoded`.
#[inline(always)]
fn find<S: Simd>(
    task: &Task,
    side: &Source,
    form: Form,
    start: usize,
    (from, to): (usize, usize),
    decoded: &mut [f32],
    rows: &mut [*const u8; MAX_TILE],
) {
    let (d, bytes) = (side.coder.row.head_dim(), side.coder.row.row_bytes());
    for (i, n, first) in pages(task, side, start, (from, to)) {
        let codes = side.codes.padded(first, n);
        if form == Form::Levels {
            let levels = &mut decoded[(i - from) * d..][..n * d];
            // SAFETY: `padded` gives a pointer that is readable past the rows.
            unsafe {
                if side.coder.row.scaling() == Scaling::BlockRms {
                    // Several factors a row cannot be pulled out of its sums.
                    let mut wide = [0f32; MAX_TILE * 4];
                    let wide = &mut wide[..n * side.coder.row.scales_per_row()];
                    side.coder.factors(side.scales.rows(first, n), wide);
                    side.coder.decode(codes, Some(wide), levels);
                } else {
                    side.coder.decode(codes, None, levels);
                }
            }
            // After what is written through `levels`, which would end what these may read.
            (0..n).for_each(|j| rows[i + j] = levels[j * d..].as_ptr().cast());
        } else if form == Form::Nibbles {
            for j in 0..n {
                let row = codes.wrapping_add(j * bytes);
                let to = decoded[(i + j - from) * d / 8..][..d / 8].as_mut_ptr().cast::<u8>();
                for k in (0..d / 8).step_by(S::LANES) {
                    // SAFETY: D is a multiple of a run; a row of planes, and as many nibbles.
                    unsafe { S::nibbles([0, 1, 2].map(|plane| row.wrapping_add(plane * d / 8 + k)), to.add(4 * k)) };
                }
                rows[i + j] = to;
            }
        } else {
            (0..n).for_each(|j| rows[i + j] = codes.wrapping_add(j * bytes));
        }
    }
    // Whole vectors of keys are read.
    let last = rows[to - 1];
    rows[to..to.next_multiple_of(16)].fill(last);
}

/// Asks for the codes of positions `start..start + count` ahead of their use: short tiles are bursts from two places, which
/// hardware does not foresee.
#[inline(always)]
fn prefetch<S: Simd>(task: &Task, side: &Source, start: usize, count: usize) {
    let bytes = side.coder.row.row_bytes();
    for (_, n, first) in pages(task, side, start, (0, count)) {
        let codes = side.codes.padded(first, n);
        for line in (0..n * bytes).step_by(64) {
            S::prefetch(codes.wrapping_add(line));
        }
    }
}

/// Where the rows of positions `start..end` are.
#[inline(always)]
fn look_ahead(task: &Task, side: &Source, start: usize, end: usize, ahead: &mut [*const u8; MAX_TILE]) {
    let bytes = side.coder.row.row_bytes();
    for (i, n, first) in pages(task, side, start, (0, end - start)) {
        let codes = side.codes.padded(first, n);
        (0..n).for_each(|j| ahead[i + j] = codes.wrapping_add(j * bytes));
    }
}

/// Asks for rows of `bytes` ahead of their use.
#[inline(always)]
fn ask<S: Simd>(rows: &[*const u8], bytes: usize) {
    for &row in rows {
        for line in (0..bytes).step_by(64) {
            S::prefetch(row.wrapping_add(line));
        }
    }
}

/// The keys' norms, times scale. Levels have a norm near √D.
#[inline(always)]
unsafe fn norms<S: Simd>(task: &Task, t: &mut Tile, (from, to): (usize, usize)) {
    let d = task.key.coder.row.head_dim();
    if has_one_factor(&task.key.coder.row) {
        let root = (d as f64).sqrt();
        for (norm, factor) in t.key_norms[from..to].iter_mut().zip(&t.key_factors[from..to]) {
            *norm = (factor.abs() * root) as f32;
        }
        return;
    }
    for i in (from..to).step_by(4) {
        let mut squares = [0f64; 4];
        // SAFETY: four rows of D floats.
        unsafe {
            let mut sums = [S::splat(0.0); 4];
            for j in (0..d).step_by(S::LANES) {
                for m in 0..4 {
                    let k = S::load(t.keys[i + m].cast::<f32>().add(j));
                    sums[m] = S::fma(k, k, sums[m]);
                }
            }
            S::sum4(sums, squares.as_mut_ptr());
        }
        for (norm, square) in t.key_norms[i..].iter_mut().zip(squares) {
            *norm = norm_of(task, square);
        }
    }
}

/// A key's norm times scale, from its square in f32, where tiny elements' squares vanish.
#[inline(always)]
fn norm_of(task: &Task, square: f64) -> f32 {
    let vanished = task.key.coder.row.head_dim() as f64 * f32::MIN_POSITIVE as f64;
    ((square + vanished).sqrt() * task.scale.abs()) as f32
}

/// Scores of the queries of rows from `r` on with the keys that they see.
#[inline(always)]
unsafe fn score<S: Simd>(task: &Task, t: &mut Tile, bits: usize, q: *const f32, r: usize, seen: &[(usize, usize)]) {
    let (mut from, mut to) = (MAX_TILE, 0);
    for &(a, b) in seen.iter().filter(|(a, b)| a < b) {
        (from, to) = (from.min(a), to.max(b));
    }
    let d = task.key.coder.row.head_dim();
    // SAFETY: the caller's.
    unsafe {
        run::<S, _>(seen.len(), bits, Dots { task, tile: t, q, from, to });
        for (i, &seen) in seen.iter().enumerate().filter(|(_, (a, b))| a < b) {
            scale::<S>(task, t, bits, q.add(i * d), i, r + i, seen);
        }
    }
}

/// Dot products of M queries with keys `from..to`, and some around them.
struct Dots<'a> {
    task: &'a Task<'a>,
    tile: &'a mut Tile,
    q: *const f32,
    from: usize,
    to: usize,
}

impl Job for Dots<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, const M: usize, const BITS: usize>(self) {
        let Dots { task, tile: t, q, from, to } = self;
        // SAFETY: the caller's.
        unsafe {
            let levels = &S::levels::<BITS>(task.key.coder.table());
            let ahead = if BITS > 0 { task.value.coder.row.row_bytes() } else { 0 };
            // Sixteen sums fill half of 32 registers, eight half of 16.
            if S::LANES == 16 || M <= 2 {
                for i in (from / 4 * 4..to).step_by(4) {
                    ask::<S>(&t.ahead[i..i + 4], ahead);
                    dots::<S, M, 4, BITS>(task, q, t, levels, i);
                }
            } else {
                for i in (from / 2 * 2..to).step_by(2) {
                    ask::<S>(&t.ahead[i..i + 2], ahead);
                    dots::<S, M, 2, BITS>(task, q, t, levels, i);
                }
            }
        }
    }
}

/// N vectors of a row's levels, from vector `c` on, counted from element `j`.
#[inline(always)]
unsafe fn vectors<S: Simd, const N: usize, const BITS: usize>(
    row: *const u8,
    j: usize,
    c: usize,
    levels: &S::Levels,
) -> [S::F; N] {
    // SAFETY: the caller's.
    unsafe {
        let mut out = [S::splat(0.0); N];
        let first = j + c * S::LANES;
        // No closures: they would not be compiled for the instruction set.
        if BITS >= 5 && BITS <= 8 {
            // Four at a time.
            out.copy_from_slice(&S::decode4::<BITS, false>(row.add(first * BITS / 8), levels));
            return out;
        }
        for n in 0..N {
            let at = first + n * S::LANES;
            out[n] = match BITS {
                0 => S::load(row.cast::<f32>().add(at)),
                HALF => S::load_f16(row.cast::<u16>().add(at)),
                _ => S::decode_run::<BITS>(row.add(j * BITS / 8), c + n, levels),
            };
        }
        out
    }
}

/// Dot products of M queries with K keys from `at` on.
#[inline(always)]
unsafe fn dots<S: Simd, const M: usize, const K: usize, const BITS: usize>(
    task: &Task,
    q: *const f32,
    t: &mut Tile,
    levels: &S::Levels,
    at: usize,
) {
    let d = task.key.coder.row.head_dim();
    let keys: [_; K] = std::array::from_fn(|i| t.keys[at + i]);
    // SAFETY: the caller's.
    unsafe {
        let (mut sums, mut squares) = ([[S::splat(0.0); K]; M], [S::splat(0.0); 4]);
        match BITS {
            0 => {
                for j in (0..d).step_by(S::LANES) {
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 0, &mut sums);
                }
            }
            2..=4 => {
                for j in (0..d).step_by(RUN * S::LANES) {
                    // Not a loop: it would not be unrolled, and a shift needs to know how far.
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 0, &mut sums);
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 1, &mut sums);
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 2, &mut sums);
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 3, &mut sums);
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 4, &mut sums);
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 5, &mut sums);
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 6, &mut sums);
                    add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 7, &mut sums);
                }
            }
            _ => {
                for j in (0..d).step_by(4 * S::LANES) {
                    for i in 0..K {
                        let key = vectors::<S, 4, BITS>(keys[i], j, 0, levels);
                        for v in 0..4 {
                            for m in 0..M {
                                let query = S::load(q.add(m * d + j + v * S::LANES));
                                sums[m][i] = S::fma(query, key[v], sums[m][i]);
                            }
                            if BITS == HALF {
                                squares[i] = S::fma(key[v], key[v], squares[i]);
                            }
                        }
                    }
                }
            }
        }
        if BITS == HALF {
            // What `norms` does with levels.
            let mut norms = [0f64; 4];
            S::sum4(squares, norms.as_mut_ptr());
            for (norm, square) in t.key_norms[at..].iter_mut().zip(norms) {
                *norm = norm_of(task, square);
            }
        }
        let mut totals = [0f64; 16];
        for n in (0..M * K).step_by(4) {
            let mut four = [S::splat(0.0); 4];
            for i in 0..4 {
                if n + i < M * K {
                    four[i] = sums[(n + i) / K][(n + i) % K];
                }
            }
            S::sum4(four, totals.as_mut_ptr().add(n));
        }
        for m in 0..M {
            t.scores[m][at..at + K].copy_from_slice(&totals[m * K..][..K]);
        }
    }
}

/// The products of vector `c`, counted from element `j`.
#[inline(always)]
unsafe fn add_products<S: Simd, const M: usize, const K: usize, const BITS: usize>(
    q: *const f32,
    keys: &[*const u8; K],
    d: usize,
    levels: &S::Levels,
    j: usize,
    c: usize,
    sums: &mut [[S::F; K]; M],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut key = [S::splat(0.0); K];
        for i in 0..K {
            key[i] = vectors::<S, 1, BITS>(keys[i], j, c, levels)[0];
        }
        for m in 0..M {
            let query = S::load(q.add(m * d + j + c * S::LANES));
            for i in 0..K {
                sums[m][i] = S::fma(query, key[i], sums[m][i]);
            }
        }
    }
}

/// Dot products of row `row` (row `i` of the tile) into scores.
#[inline(always)]
unsafe fn scale<S: Simd>(
    task: &Task,
    t: &mut Tile,
    bits: usize,
    q: *const f32,
    i: usize,
    row: usize,
    (from, to): (usize, usize),
) {
    let (scores, factors, norms) = (&mut t.scores[i][from..to], &t.key_factors[from..to], &t.key_norms[from..to]);
    // An infinite norm is above any limit.
    let limit = ((LARGE / task.norms[row]) as f32).min(f32::MAX);
    let (unit, mut large) = (task.units[row], false);
    for ((s, factor), &norm) in scores.iter_mut().zip(factors).zip(norms) {
        *s *= factor * unit;
        large |= norm > limit || !s.is_finite();
    }
    if large {
        for (((s, factor), &norm), &key) in scores.iter_mut().zip(factors).zip(norms).zip(&t.keys[from..to]) {
            if norm > limit || !s.is_finite() {
                // SAFETY: the caller's.
                unsafe { run::<S, _>(1, bits, ExactDot { task, q, key, to: s }) }
                *s *= factor * unit;
            }
        }
    }
    if let Some(cap) = task.softcap {
        scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
    }
}

/// The dot product in f64.
struct ExactDot<'a> {
    task: &'a Task<'a>,
    q: *const f32,
    key: *const u8,
    to: &'a mut f64,
}

impl Job for ExactDot<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, const M: usize, const BITS: usize>(self) {
        let ExactDot { task, q, key, to } = self;
        let d = task.key.coder.row.head_dim();
        let (mut lanes, mut x) = ([0f64; 16], [0f32; MAX_HEAD_DIM]);
        // SAFETY: D floats and a row of as many elements.
        let q = unsafe {
            let levels = &S::levels::<BITS>(task.key.coder.table());
            let n = if BITS >= 5 { 4 } else { 1 };
            for j in (0..d).step_by(n * S::LANES) {
                let run = if BITS >= 2 && BITS <= 4 { RUN * S::LANES } else { n * S::LANES };
                let (first, x) = (j / run * run, x.as_mut_ptr().add(j));
                if n == 4 {
                    let four = vectors::<S, 4, BITS>(key, first, 0, levels);
                    for i in 0..4 {
                        S::store(x.add(i * S::LANES), four[i]);
                    }
                } else {
                    S::store(x, vectors::<S, 1, BITS>(key, first, (j - first) / S::LANES, levels)[0]);
                }
            }
            std::slice::from_raw_parts(q, d)
        };
        for (a, b) in q.chunks_exact(16).zip(x.chunks_exact(16)) {
            for ((l, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
                *l += a as f64 * b as f64;
            }
        }
        *to = lanes.iter().sum();
    }
}

/// Weights of rows from `r` on.
#[inline(always)]
unsafe fn soften<S: Simd>(task: &mut Task, t: &mut Tile, r: usize, seen: &[(usize, usize)]) {
    for (i, &seen) in seen.iter().enumerate().filter(|(_, (a, b))| a < b) {
        // SAFETY: the caller's.
        unsafe { soften_row::<S>(task, t, i, r + i, seen) }
    }
}

/// Scores of row `row` (row `i` of the tile) into weights, and its running softmax one tile further.
#[inline(always)]
unsafe fn soften_row<S: Simd>(task: &mut Task, t: &mut Tile, i: usize, row: usize, (from, to): (usize, usize)) {
    let (start, end) = (from / 16 * 16, to.next_multiple_of(16));
    let scores = &mut t.scores[i];
    scores[start..from].fill(f64::NEG_INFINITY);
    scores[to..end].fill(f64::NEG_INFINITY);
    // Lane by lane, so that it can be done in vectors; NaN loses here and wins in the sum.
    let mut lanes = [f64::NEG_INFINITY; 16];
    for s in scores[start..end].chunks_exact(16) {
        for (l, &s) in lanes.iter_mut().zip(s) {
            *l = if s > *l { s } else { *l };
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
    }
    let max = if lanes[0] > task.max[row] { lanes[0] } else { task.max[row] };
    let d = task.key.coder.row.head_dim();
    if max > task.max[row] {
        let shrink = (task.max[row] - max).exp();
        task.max[row] = max;
        task.sum[row] *= shrink;
        task.out[row * d..][..d].iter_mut().for_each(|o| *o *= shrink as f32);
    }
    // All scores may be minus infinity, which weighs nothing.
    let base = if max == f64::NEG_INFINITY { 0.0 } else { max };
    let weights = &mut t.weights[i];
    for (w, s) in weights[start..end].iter_mut().zip(&scores[start..end]) {
        *w = (s - base) as f32;
    }
    // SAFETY: start and end are multiples of every number of lanes, within the tile.
    unsafe {
        let mut sum = S::splat(0.0);
        for j in (start..end).step_by(S::LANES) {
            let w = weights.as_mut_ptr().add(j);
            let p = exp::<S>(S::load(w));
            sum = S::add(sum, p);
            S::store(w, S::mul(p, S::load(t.value_factors.as_ptr().add(j))));
        }
        let zero = S::splat(0.0);
        let mut total = [0f64; 4];
        S::sum4([sum, zero, zero, zero], total.as_mut_ptr());
        task.sum[row] += total[0];
    }
}

/// out += Σ weight · value for rows from `r` on.
#[inline(always)]
unsafe fn add_values<S: Simd>(task: &mut Task, t: &Tile, bits: usize, r: usize, seen: &[(usize, usize)]) {
    let d = task.key.coder.row.head_dim();
    // SAFETY: the caller's.
    unsafe {
        let out = task.out.as_mut_ptr().add(r * d);
        if seen.iter().all(|s| *s == seen[0]) {
            run::<S, _>(seen.len(), bits, Sums { task, tile: t, row: 0, seen: seen[0], out });
        } else {
            for (i, &seen) in seen.iter().enumerate() {
                run::<S, _>(1, bits, Sums { task, tile: t, row: i, seen, out: out.add(i * d) });
            }
        }
    }
}

/// The same for M rows of the tile, from `row` on, that see the same.
struct Sums<'a> {
    task: &'a Task<'a>,
    tile: &'a Tile,
    row: usize,
    seen: (usize, usize),
    out: *mut f32,
}

impl Job for Sums<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd, const M: usize, const BITS: usize>(self) {
        let Sums { task, tile: t, row: i, seen, out } = self;
        let d = task.key.coder.row.head_dim();
        let mut j = 0;
        // Four rows of as many vectors as leave half of the registers free.
        // SAFETY: the caller's.
        unsafe {
            let levels = &S::levels::<BITS>(task.value.coder.table());
            let ahead = task.key.coder.row.row_bytes();
            if (2..=4).contains(&BITS) {
                while j < d {
                    if S::LANES == 16 {
                        add_columns::<S, M, 4, BITS>(t, i, seen, d, j, 0, levels, ahead, out);
                        add_columns::<S, M, 4, BITS>(t, i, seen, d, j, 4, levels, ahead, out);
                    } else {
                        add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 0, levels, ahead, out);
                        add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 2, levels, ahead, out);
                        add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 4, levels, ahead, out);
                        add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 6, levels, ahead, out);
                    }
                    j += RUN * S::LANES;
                }
                return;
            }
            let wide = if S::LANES == 16 { 4 } else { 2 };
            while j + wide * S::LANES <= d {
                if S::LANES == 16 {
                    add_columns::<S, M, 4, BITS>(t, i, seen, d, j, 0, levels, ahead, out);
                } else {
                    add_columns::<S, M, 2, 0>(t, i, seen, d, j, 0, levels, ahead, out);
                }
                j += wide * S::LANES;
            }
            while BITS == 0 && j < d {
                add_columns::<S, M, 1, 0>(t, i, seen, d, j, 0, levels, ahead, out);
                j += S::LANES;
            }
        }
    }
}

/// The same for N vectors from vector `c` on, counted from element `j`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn add_columns<S: Simd, const M: usize, const N: usize, const BITS: usize>(
    t: &Tile,
    row: usize,
    (from, to): (usize, usize),
    d: usize,
    j: usize,
    c: usize,
    levels: &S::Levels,
    ahead: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let out = out.add(j + c * S::LANES);
        let mut sums = [[S::splat(0.0); N]; M];
        for m in 0..M {
            for n in 0..N {
                sums[m][n] = S::load(out.add(m * d + n * S::LANES));
            }
        }
        for i in from..to {
            if BITS > 0 && c == 0 && j == 0 {
                ask::<S>(&t.ahead[i..=i], ahead);
            }
            let value = vectors::<S, N, BITS>(*t.values.get_unchecked(i), j, c, levels);
            for m in 0..M {
                let weight = S::splat(*t.weights.get_unchecked(row + m).get_unchecked(i));
                for n in 0..N {
                    sums[m][n] = S::fma(weight, value[n], sums[m][n]);
                }
            }
        }
        for m in 0..M {
            for n in 0..N {
                S::store(out.add(m * d + n * S::LANES), sums[m][n]);
            }
        }
    }
}

/// e^x to 2 units in the last place for x ≤ 0; 0 below -87; NaN stays NaN.
///
/// x = n·ln 2 + r; e^r by Cephes' polynomial (S. Moshier, expf), 2^n by its exponent bits.
#[inline(always)]
unsafe fn exp<S: Simd>(x: S::F) -> S::F {
    // SAFETY: arithmetic only.
    unsafe {
        let n = S::round(S::mul(x, S::splat(std::f32::consts::LOG2_E)));
        // ln 2 in two parts, the first of few enough bits that n times it is exact.
        let r = S::fma(n, S::splat(-0.693_359_4), x);
        let r = S::fma(n, S::splat(2.121_944_4e-4), r);
        let mut p = S::splat(1.987_569_1e-4);
        p = S::fma(p, r, S::splat(1.398_2e-3));
        p = S::fma(p, r, S::splat(8.333_452e-3));
        p = S::fma(p, r, S::splat(4.166_579_6e-2));
        p = S::fma(p, r, S::splat(1.666_666_5e-1));
        p = S::fma(p, r, S::splat(0.5));
        let p = S::add(S::fma(p, S::mul(r, r), r), S::splat(1.0));
        S::zero_below(x, S::splat(-87.0), S::mul(p, S::pow2(n)))
    }
}
