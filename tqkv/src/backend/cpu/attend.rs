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
//! The tile stays in the first-level cache, as do the rows of a decoding step.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::memory::{Line, Rows};
use super::rows::RowCoder;
use super::simd::Simd;
use crate::format::{MAX_HEAD_DIM, Packing, Scaling};
use crate::ops::Batch;

/// Positions of the largest tile; every tile is a multiple of 16.
const MAX_TILE: usize = 256;
/// Floats of a tile of keys: a quarter of a first-level cache.
const TILE_FLOATS: usize = 4096;
/// Where |q| |k| scale is above this, sums of f32 may move a weight by more than a few 1e-6.
const LARGE: f32 = 128.0;
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
    /// Rows of D floats, in the rotated domain.
    pub q: &'a [f32],
    /// Their norms.
    pub norms: &'a [f32],
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
    scores: [[f64; MAX_TILE]; ROWS],
    weights: [[f32; MAX_TILE]; ROWS],
    key_factors: [f64; MAX_TILE],
    value_factors: [f32; MAX_TILE],
    /// |k| · scale, or near it.
    key_norms: [f32; MAX_TILE],
}

#[inline(always)]
pub(super) unsafe fn attend<S: Simd>(task: &mut Task) {
    let (n, d) = (task.seen.len(), task.key.coder.row.head_dim());
    let (key_bits, value_bits) = (runs::<S>(&task.key, n), runs::<S>(&task.value, n));
    // Decoded rows must stay in the first-level cache; otherwise a long tile keeps waiting for its weights rare.
    let tile = if key_bits > 0 && value_bits > 0 { MAX_TILE } else { (TILE_FLOATS / d).next_multiple_of(16).min(64) };
    let mut q = lines(n * d);
    let q: &mut [f32] = bytemuck::cast_slice_mut(&mut q);
    q.copy_from_slice(task.q);
    if key_bits > 0 {
        q.chunks_exact_mut(RUN * S::LANES).for_each(|run| transpose(run, RUN));
    }
    // Levels, nibbles of 3-bit codes, or nothing.
    let held = |side: &Source, bits: usize| match (bits, side.coder.row.packing()) {
        (0, _) => tile * d,
        (_, Packing::Planes) => tile * d / 8,
        _ => 0,
    };
    let (mut keys, mut values) = (lines(held(&task.key, key_bits)), lines(held(&task.value, value_bits)));
    let (keys, values) = (bytemuck::cast_slice_mut(&mut keys), bytemuck::cast_slice_mut(&mut values));
    let mut t = Tile {
        keys: [std::ptr::null(); MAX_TILE],
        values: [std::ptr::null(); MAX_TILE],
        scores: [[0.0; MAX_TILE]; ROWS],
        weights: [[0.0; MAX_TILE]; ROWS],
        key_factors: [0.0; MAX_TILE],
        value_factors: [0.0; MAX_TILE],
        key_norms: [0.0; MAX_TILE],
    };
    for start in (task.start..task.end).step_by(tile) {
        let count = tile.min(task.end - start);
        let mut factors = [1f32; MAX_TILE];
        find::<S>(task, &task.key, key_bits, start, count, keys, &mut t.keys, &mut factors);
        let next = start + count;
        if key_bits == 0 {
            prefetch::<S>(task, &task.key, next, tile.min(task.end - next));
        }
        for (wide, &narrow) in t.key_factors.iter_mut().zip(&factors[..count]) {
            *wide = narrow as f64 * task.scale;
        }
        // SAFETY: `find` gives a multiple of four keys.
        unsafe { norms::<S>(task, &mut t, count) };
        find::<S>(task, &task.value, value_bits, start, count, values, &mut t.values, &mut t.value_factors);
        if value_bits == 0 {
            prefetch::<S>(task, &task.value, next, tile.min(task.end - next));
        }
        for r in (0..n).step_by(ROWS) {
            // SAFETY: rows r..r + 4 or up to n exist; the tile holds `count` positions.
            unsafe {
                let q = q.as_ptr().add(r * d);
                match n - r {
                    1 => rows::<S, 1>(task, &mut t, q, r, start, count, key_bits, value_bits),
                    2 => rows::<S, 2>(task, &mut t, q, r, start, count, key_bits, value_bits),
                    3 => rows::<S, 3>(task, &mut t, q, r, start, count, key_bits, value_bits),
                    _ => rows::<S, 4>(task, &mut t, q, r, start, count, key_bits, value_bits),
                }
            }
        }
    }
    if value_bits > 0 {
        task.out.chunks_exact_mut(RUN * S::LANES).for_each(|run| transpose(run, S::LANES));
    }
}

/// Floats that start where a cache's line does: a vector across two costs two accesses.
fn lines(floats: usize) -> Vec<Line> {
    vec![Line([0; 64]); floats / 16]
}

/// Vectors that are decoded from one register of codes: lane l holds elements 8 l to 8 l + 7 of a run, and vector c their
/// elements c.
const RUN: usize = 8;

/// The width of codes that are decoded as they are used, 2 or 4; 0 for levels. Rows of 3 bits become nibbles first.
fn runs<S: Simd>(side: &Source, n: usize) -> usize {
    let row = &side.coder.row;
    let whole = row.head_dim().is_multiple_of(RUN * S::LANES);
    let one_factor = matches!(row.scaling(), Scaling::Corrected | Scaling::Norm);
    match (row.packing(), row.bits()) {
        _ if n > ROWS || !whole || !one_factor => 0,
        (Packing::Dense, 2) if S::NIBBLES > 0 => 2,
        (Packing::Dense | Packing::Planes, bits @ (3 | 4)) if bits <= S::NIBBLES => 4,
        _ => 0,
    }
}

/// A matrix of `columns` columns into one of as many rows.
fn transpose(x: &mut [f32], columns: usize) {
    let mut old = [0f32; RUN * 16];
    let (old, rows) = (&mut old[..x.len()], x.len() / columns);
    old.copy_from_slice(x);
    for (i, x) in x.iter_mut().enumerate() {
        *x = old[i % rows * columns + i / rows];
    }
}

/// The rows of positions `start..start + count`, and the factor of each: levels if there are no `bits`, codes of 3 bits as
/// nibbles, other codes as they are. What is not in the pool is in `decoded`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn find<S: Simd>(
    task: &Task,
    side: &Source,
    bits: usize,
    start: usize,
    count: usize,
    decoded: &mut [f32],
    rows: &mut [*const u8; MAX_TILE],
    factors: &mut [f32; MAX_TILE],
) {
    let (page_size, d, bytes) = (task.batch.page_size(), side.coder.row.head_dim(), side.coder.row.row_bytes());
    let mut i = 0;
    while i < count {
        // Positions of one page lie one after the other.
        let (page, slot) = task.batch.locate(task.sequence, start + i);
        let n = (page_size - slot).min(count - i);
        let first = page * side.page_rows + side.head_rows + slot;
        let (codes, scales) = (side.codes.padded(first, n), side.scales.rows(first, n));
        match side.coder.row.scaling() {
            Scaling::None | Scaling::BlockRms => factors[i..i + n].fill(1.0),
            Scaling::Corrected | Scaling::Norm => side.coder.factors(scales, &mut factors[i..i + n]),
        }
        if bits == 0 {
            let levels = &mut decoded[i * d..][..n * d];
            (0..n).for_each(|j| rows[i + j] = levels[j * d..].as_ptr().cast());
            // SAFETY: `padded` gives a pointer that is readable past the rows.
            unsafe {
                if side.coder.row.scaling() == Scaling::BlockRms {
                    // Several factors a row cannot be pulled out of its sums.
                    let mut wide = [0f32; MAX_TILE * 4];
                    let wide = &mut wide[..n * side.coder.row.scales_per_row()];
                    side.coder.factors(scales, wide);
                    side.coder.decode(codes, Some(wide), levels);
                } else {
                    side.coder.decode(codes, None, levels);
                }
            }
        } else if side.coder.row.packing() == Packing::Planes {
            for j in 0..n {
                let (from, to) =
                    (codes.wrapping_add(j * bytes), decoded[(i + j) * d / 8..][..d / 8].as_mut_ptr().cast::<u8>());
                for k in (0..d / 8).step_by(S::LANES) {
                    let planes = [0, 1, 2].map(|plane| from.wrapping_add(plane * d / 8 + k));
                    // SAFETY: `padded` again; D is a multiple of a run.
                    unsafe { S::nibbles(planes, to.add(4 * k)) };
                }
                rows[i + j] = to;
            }
        } else {
            (0..n).for_each(|j| rows[i + j] = codes.wrapping_add(j * bytes));
        }
        i += n;
    }
    // Four keys at a time are read.
    let last = rows[count - 1];
    rows[count..count.next_multiple_of(4)].fill(last);
}

/// Asks for the codes of positions `start..start + count` ahead of their use. Short tiles are bursts from two places, which
/// hardware does not foresee; it does foresee long ones.
#[inline(always)]
fn prefetch<S: Simd>(task: &Task, side: &Source, start: usize, count: usize) {
    let (page_size, bytes) = (task.batch.page_size(), side.coder.row.row_bytes());
    let mut i = 0;
    while i < count {
        let (page, slot) = task.batch.locate(task.sequence, start + i);
        let n = (page_size - slot).min(count - i);
        let codes = side.codes.padded(page * side.page_rows + side.head_rows + slot, n);
        for line in (0..n * bytes).step_by(64) {
            S::prefetch(codes.wrapping_add(line));
        }
        i += n;
    }
}

/// The keys' norms, times scale. Levels have a norm near √D.
#[inline(always)]
unsafe fn norms<S: Simd>(task: &Task, t: &mut Tile, count: usize) {
    let d = task.key.coder.row.head_dim();
    if matches!(task.key.coder.row.scaling(), Scaling::Corrected | Scaling::Norm) {
        let root = (d as f64).sqrt();
        for (norm, factor) in t.key_norms.iter_mut().zip(&t.key_factors[..count]) {
            *norm = (factor.abs() * root) as f32;
        }
        return;
    }
    for i in (0..count).step_by(4) {
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
            *norm = (square.sqrt() * task.scale.abs()) as f32;
        }
    }
}

/// M rows from `r` on over one tile.
///
/// # Safety
/// See `attend`.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
unsafe fn rows<S: Simd, const M: usize>(
    task: &mut Task,
    t: &mut Tile,
    q: *const f32,
    r: usize,
    start: usize,
    count: usize,
    key_bits: usize,
    value_bits: usize,
) {
    let d = task.key.coder.row.head_dim();
    // What each row sees of the tile.
    let mut seen = [(0, 0); M];
    for i in 0..M {
        let (from, to) = task.seen[r + i];
        seen[i] = (from.max(start) - start, to.min(start + count).saturating_sub(start));
    }
    // SAFETY: pointers to D floats a row within q and out; what is seen is within the tile.
    unsafe {
        match key_bits {
            0 => score::<S, M, 0>(task, t, q, r, &seen),
            2 => score::<S, M, 2>(task, t, q, r, &seen),
            _ => score::<S, M, 4>(task, t, q, r, &seen),
        }
        let mut same = true;
        for i in 0..M {
            if seen[i].0 < seen[i].1 {
                soften::<S>(task, t, i, r + i, seen[i]);
            }
            same &= seen[i] == seen[0];
        }
        let out = task.out.as_mut_ptr().add(r * d);
        if same {
            match value_bits {
                0 => add_values::<S, M, 0>(task, t, 0, seen[0], out),
                2 => add_values::<S, M, 2>(task, t, 0, seen[0], out),
                _ => add_values::<S, M, 4>(task, t, 0, seen[0], out),
            }
        } else {
            for i in 0..M {
                match value_bits {
                    0 => add_values::<S, 1, 0>(task, t, i, seen[i], out.add(i * d)),
                    2 => add_values::<S, 1, 2>(task, t, i, seen[i], out.add(i * d)),
                    _ => add_values::<S, 1, 4>(task, t, i, seen[i], out.add(i * d)),
                }
            }
        }
    }
}

/// Scores of M queries with the keys that they see.
#[inline(always)]
unsafe fn score<S: Simd, const M: usize, const BITS: usize>(
    task: &Task,
    t: &mut Tile,
    q: *const f32,
    r: usize,
    seen: &[(usize, usize); M],
) {
    let (mut low, mut high) = (MAX_TILE, 0);
    for &(from, to) in seen.iter().filter(|(from, to)| from < to) {
        (low, high) = (low.min(from), high.max(to));
    }
    let d = task.key.coder.row.head_dim();
    // SAFETY: the caller's.
    unsafe {
        let levels = task.key.coder.levels();
        // Sixteen sums fill half of 32 registers, eight half of 16.
        if S::LANES == 16 || M <= 2 {
            for i in (low / 4 * 4..high).step_by(4) {
                dots::<S, M, 4, BITS>(q, t, d, levels, i);
            }
        } else {
            for i in (low / 2 * 2..high).step_by(2) {
                dots::<S, M, 2, BITS>(q, t, d, levels, i);
            }
        }
        for i in (0..M).filter(|&i| seen[i].0 < seen[i].1) {
            scale::<S, BITS>(task, t, q.add(i * d), i, r + i, seen[i]);
        }
    }
}

/// Vector `c` of a row from element `j` on: of the run of codes there, or of levels.
#[inline(always)]
unsafe fn vector<S: Simd, const BITS: usize>(row: *const u8, j: usize, c: usize, levels: *const f32) -> S::F {
    // SAFETY: the caller's.
    unsafe {
        match BITS {
            0 => S::load(row.cast::<f32>().add(j + c * S::LANES)),
            _ => S::decode_run::<BITS>(row.add(j * BITS / 8), c, levels),
        }
    }
}

/// Dot products of M queries with K keys from `at` on.
#[inline(always)]
unsafe fn dots<S: Simd, const M: usize, const K: usize, const BITS: usize>(
    q: *const f32,
    t: &mut Tile,
    d: usize,
    levels: *const f32,
    at: usize,
) {
    let keys: [_; K] = std::array::from_fn(|i| t.keys[at + i]);
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[S::splat(0.0); K]; M];
        if BITS == 0 {
            for j in (0..d).step_by(S::LANES) {
                add_products::<S, M, K, BITS>(q, &keys, d, levels, j, 0, &mut sums);
            }
        } else {
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

/// The products of vector `c` from element `j` on.
#[inline(always)]
unsafe fn add_products<S: Simd, const M: usize, const K: usize, const BITS: usize>(
    q: *const f32,
    keys: &[*const u8],
    d: usize,
    levels: *const f32,
    j: usize,
    c: usize,
    sums: &mut [[S::F; K]; M],
) {
    // SAFETY: the caller's.
    unsafe {
        let mut key = [S::splat(0.0); K];
        for i in 0..K {
            key[i] = vector::<S, BITS>(keys[i], j, c, levels);
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
unsafe fn scale<S: Simd, const BITS: usize>(
    task: &Task,
    t: &mut Tile,
    q: *const f32,
    i: usize,
    row: usize,
    (from, to): (usize, usize),
) {
    let (scores, factors, norms) = (&mut t.scores[i][from..to], &t.key_factors[from..to], &t.key_norms[from..to]);
    let limit = LARGE / task.norms[row];
    let mut large = false;
    for ((s, factor), &norm) in scores.iter_mut().zip(factors).zip(norms) {
        *s *= factor;
        large |= norm > limit;
    }
    if large {
        for (((s, factor), &norm), &key) in scores.iter_mut().zip(factors).zip(norms).zip(&t.keys[from..to]) {
            if norm > limit {
                // SAFETY: the caller's.
                *s = unsafe { exact_dot::<S, BITS>(task, q, key) } * factor;
            }
        }
    }
    if let Some(cap) = task.softcap {
        scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
    }
}

/// The dot product in f64.
#[inline(always)]
unsafe fn exact_dot<S: Simd, const BITS: usize>(task: &Task, q: *const f32, key: *const u8) -> f64 {
    let d = task.key.coder.row.head_dim();
    let vectors = if BITS == 0 { 1 } else { RUN };
    let (mut lanes, mut levels) = ([0f64; 16], [0f32; MAX_HEAD_DIM]);
    // SAFETY: D floats and a row of as many elements.
    let q = unsafe {
        for j in (0..d).step_by(S::LANES) {
            let first = j / (vectors * S::LANES) * (vectors * S::LANES);
            let x = vector::<S, BITS>(key, first, (j - first) / S::LANES, task.key.coder.levels());
            S::store(levels.as_mut_ptr().add(j), x);
        }
        std::slice::from_raw_parts(q, d)
    };
    for (a, b) in q.chunks_exact(16).zip(levels.chunks_exact(16)) {
        for ((l, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *l += a as f64 * b as f64;
        }
    }
    lanes.iter().sum()
}

/// Scores of row `row` (row `i` of the tile) into weights, and its running softmax one tile further.
#[inline(always)]
unsafe fn soften<S: Simd>(task: &mut Task, t: &mut Tile, i: usize, row: usize, (from, to): (usize, usize)) {
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

/// out += Σ weight · value for M rows with the same range.
#[inline(always)]
unsafe fn add_values<S: Simd, const M: usize, const BITS: usize>(
    task: &Task,
    t: &Tile,
    i: usize,
    seen: (usize, usize),
    out: *mut f32,
) {
    let d = task.key.coder.row.head_dim();
    let mut j = 0;
    // Four rows of as many vectors as leave half of the registers free.
    // SAFETY: the caller's.
    unsafe {
        let levels = task.value.coder.levels();
        if BITS > 0 {
            while j < d {
                if S::LANES == 16 {
                    add_columns::<S, M, 4, BITS>(t, i, seen, d, j, 0, levels, out);
                    add_columns::<S, M, 4, BITS>(t, i, seen, d, j, 4, levels, out);
                } else {
                    add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 0, levels, out);
                    add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 2, levels, out);
                    add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 4, levels, out);
                    add_columns::<S, M, 2, BITS>(t, i, seen, d, j, 6, levels, out);
                }
                j += RUN * S::LANES;
            }
            return;
        }
        let wide = if S::LANES == 16 { 4 } else { 2 };
        while j + wide * S::LANES <= d {
            if S::LANES == 16 {
                add_columns::<S, M, 4, 0>(t, i, seen, d, j, 0, levels, out);
            } else {
                add_columns::<S, M, 2, 0>(t, i, seen, d, j, 0, levels, out);
            }
            j += wide * S::LANES;
        }
        while j < d {
            add_columns::<S, M, 1, 0>(t, i, seen, d, j, 0, levels, out);
            j += S::LANES;
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
    levels: *const f32,
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
            let mut value = [S::splat(0.0); N];
            for n in 0..N {
                value[n] = vector::<S, BITS>(*t.values.get_unchecked(i), j, c + n, levels);
            }
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
