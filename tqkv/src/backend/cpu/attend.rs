//! Attention of some rows of queries over some positions, generic over the instruction set.
//!
//! ```text
//! for each tile of positions:
//!     decode its keys and values to f32, levels only           once for all rows
//!     for each four rows:
//!         s = (q · levels) · key factor · scale                lanes summed in f32, then added in f64
//!         m' = max(m, s); p = exp(s - m'); sum, out shrink by exp(m - m')
//!         sum += p; out += (p · value factor) · levels
//! ```
//! Rounding in those f32 sums is about 6e-9 |q| |k|, so a score whose |q| |k| scale is large is computed again in f64.
//! The tile stays in the first-level cache, as do the rows of a decoding step.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::memory::Rows;
use super::rows::RowCoder;
use super::simd::Simd;
use crate::format::Scaling;
use crate::ops::Batch;

/// Positions of the largest tile; every tile is a multiple of 16.
const MAX_TILE: usize = 64;
/// Floats of a tile of keys: a quarter of a first-level cache.
const TILE_FLOATS: usize = 4096;
/// Where |q| |k| scale is above this, sums of f32 may move a weight by more than a few 1e-6.
const LARGE: f32 = 256.0;
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
    let tile = (TILE_FLOATS / d).next_multiple_of(16).min(MAX_TILE);
    // The lines of keys and values start where caches' lines do.
    let (mut keys, mut values) = (vec![0f32; tile * d], vec![0f32; tile * d]);
    let mut t = Tile {
        scores: [[0.0; MAX_TILE]; ROWS],
        weights: [[0.0; MAX_TILE]; ROWS],
        key_factors: [0.0; MAX_TILE],
        value_factors: [0.0; MAX_TILE],
        key_norms: [0.0; MAX_TILE],
    };
    for start in (task.start..task.end).step_by(tile) {
        let count = tile.min(task.end - start);
        let mut factors = [1f32; MAX_TILE];
        decode(task, &task.key, start, count, &mut keys, &mut factors);
        let next = start + count;
        prefetch::<S>(task, &task.key, next, tile.min(task.end - next));
        for (wide, &narrow) in t.key_factors.iter_mut().zip(&factors) {
            *wide = narrow as f64 * task.scale;
        }
        // SAFETY: the tile holds a multiple of four keys.
        unsafe { norms::<S>(task, &mut t, count, &keys) };
        decode(task, &task.value, start, count, &mut values, &mut t.value_factors);
        prefetch::<S>(task, &task.value, next, tile.min(task.end - next));
        for r in (0..n).step_by(ROWS) {
            // SAFETY: rows r..r + 4 or up to n exist; the tile holds `tile` decoded positions.
            unsafe {
                match n - r {
                    1 => rows::<S, 1>(task, &mut t, r, start, count, &keys, &values),
                    2 => rows::<S, 2>(task, &mut t, r, start, count, &keys, &values),
                    3 => rows::<S, 3>(task, &mut t, r, start, count, &keys, &values),
                    _ => rows::<S, 4>(task, &mut t, r, start, count, &keys, &values),
                }
            }
        }
    }
}

/// Levels of positions `start..start + count`, and the factor of each.
fn decode(task: &Task, side: &Source, start: usize, count: usize, levels: &mut [f32], factors: &mut [f32; MAX_TILE]) {
    let (page_size, d) = (task.batch.page_size(), side.coder.row.head_dim());
    let mut i = 0;
    while i < count {
        // Positions of one page lie one after the other.
        let (page, slot) = task.batch.locate(task.sequence, start + i);
        let n = (page_size - slot).min(count - i);
        let first = page * side.page_rows + side.head_rows + slot;
        let out = &mut levels[i * d..][..n * d];
        let (codes, scales) = (side.codes.padded(first, n), side.scales.rows(first, n));
        // SAFETY: `padded` gives a pointer that is readable past the rows.
        unsafe {
            match side.coder.row.scaling() {
                Scaling::None => side.coder.decode(codes, None, out),
                // Several factors a row cannot be pulled out of its sums.
                Scaling::BlockRms => {
                    let mut wide = [0f32; MAX_TILE * 4];
                    let wide = &mut wide[..n * side.coder.row.scales_per_row()];
                    side.coder.factors(scales, wide);
                    side.coder.decode(codes, Some(wide), out);
                }
                Scaling::Corrected | Scaling::Norm => {
                    side.coder.factors(scales, &mut factors[i..i + n]);
                    side.coder.decode(codes, None, out);
                }
            }
        }
        if matches!(side.coder.row.scaling(), Scaling::None | Scaling::BlockRms) {
            factors[i..i + n].fill(1.0);
        }
        i += n;
    }
}

/// Asks for the codes of positions `start..start + count` ahead of their use. Tiles are short bursts from two places,
/// which hardware does not foresee.
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
unsafe fn norms<S: Simd>(task: &Task, t: &mut Tile, count: usize, keys: &[f32]) {
    let d = task.key.coder.row.head_dim();
    if matches!(task.key.coder.row.scaling(), Scaling::Corrected | Scaling::Norm) {
        let root = (d as f64).sqrt();
        for (norm, factor) in t.key_norms.iter_mut().zip(&t.key_factors) {
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
                    let k = S::load(keys.as_ptr().add((i + m) * d + j));
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
unsafe fn rows<S: Simd, const M: usize>(
    task: &mut Task,
    t: &mut Tile,
    r: usize,
    start: usize,
    count: usize,
    keys: &[f32],
    values: &[f32],
) {
    let d = task.key.coder.row.head_dim();
    // What each row sees of the tile.
    let mut seen = [(0, 0); M];
    let (mut low, mut high) = (count, 0);
    for i in 0..M {
        let (from, to) = task.seen[r + i];
        seen[i] = (from.max(start) - start, to.min(start + count).saturating_sub(start));
        if seen[i].0 < seen[i].1 {
            (low, high) = (low.min(seen[i].0), high.max(seen[i].1));
        }
    }
    // SAFETY: pointers to D floats a row within q, out, keys and values; low and high are within the tile.
    unsafe {
        let q = task.q.as_ptr().add(r * d);
        let scores = &mut t.scores[..M];
        let mut i = low / 4 * 4;
        while i < high {
            let k = keys.as_ptr().add(i * d);
            // Sixteen sums fill half of 32 registers, eight half of 16.
            if S::LANES == 16 {
                dots::<S, M>(q, k, d, scores, i);
            } else {
                match M {
                    1 => dots::<S, 1>(q, k, d, scores, i),
                    2 => dots::<S, 2>(q, k, d, scores, i),
                    3 => {
                        dots::<S, 2>(q, k, d, scores, i);
                        dots::<S, 1>(q.add(2 * d), k, d, &mut scores[2..], i);
                    }
                    _ => {
                        dots::<S, 2>(q, k, d, scores, i);
                        dots::<S, 2>(q.add(2 * d), k, d, &mut scores[2..], i);
                    }
                }
            }
            i += 4;
        }
        let mut same = true;
        for i in 0..M {
            if seen[i].0 < seen[i].1 {
                scale(task, t, i, r + i, seen[i], keys);
                soften::<S>(task, t, i, r + i, seen[i]);
            }
            same &= seen[i] == seen[0];
        }
        let out = task.out.as_mut_ptr().add(r * d);
        if same {
            add_values::<S, M>(t, 0, seen[0], values.as_ptr(), d, out);
        } else {
            for i in 0..M {
                add_values::<S, 1>(t, i, seen[i], values.as_ptr(), d, out.add(i * d));
            }
        }
    }
}

/// Dot products of M queries with four keys.
#[inline(always)]
unsafe fn dots<S: Simd, const M: usize>(
    q: *const f32,
    k: *const f32,
    d: usize,
    scores: &mut [[f64; MAX_TILE]],
    at: usize,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[S::splat(0.0); 4]; M];
        for j in (0..d).step_by(S::LANES) {
            let mut key = [S::splat(0.0); 4];
            for i in 0..4 {
                key[i] = S::load(k.add(i * d + j));
            }
            for m in 0..M {
                let query = S::load(q.add(m * d + j));
                for i in 0..4 {
                    sums[m][i] = S::fma(query, key[i], sums[m][i]);
                }
            }
        }
        for m in 0..M {
            S::sum4(sums[m], scores.get_unchecked_mut(m).as_mut_ptr().add(at));
        }
    }
}

/// Dot products of row `row` (row `i` of the tile) into scores.
#[inline(always)]
fn scale(task: &Task, t: &mut Tile, i: usize, row: usize, (from, to): (usize, usize), keys: &[f32]) {
    let (scores, factors, norms) = (&mut t.scores[i][from..to], &t.key_factors[from..to], &t.key_norms[from..to]);
    let limit = LARGE / task.norms[row];
    let mut large = false;
    for ((s, factor), &norm) in scores.iter_mut().zip(factors).zip(norms) {
        *s *= factor;
        large |= norm > limit;
    }
    if large {
        let d = task.key.coder.row.head_dim();
        let keys = keys.chunks_exact(d).skip(from);
        for (((s, factor), &norm), key) in scores.iter_mut().zip(factors).zip(norms).zip(keys) {
            if norm > limit {
                *s = exact_dot(&task.q[row * d..][..d], key) * factor;
            }
        }
    }
    if let Some(cap) = task.softcap {
        scores.iter_mut().for_each(|s| *s = cap * (*s / cap).tanh());
    }
}

#[inline(always)]
fn exact_dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
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
    let max = lanes.iter().fold(task.max[row], |m, &l| if l > m { l } else { m });
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
unsafe fn add_values<S: Simd, const M: usize>(
    t: &Tile,
    i: usize,
    (from, to): (usize, usize),
    values: *const f32,
    d: usize,
    out: *mut f32,
) {
    // Four rows of as many vectors as leave half of the registers free.
    let (wide, mut j) = (if S::LANES == 16 { 4 } else { 2 }, 0);
    // SAFETY: the caller's.
    unsafe {
        while j + wide * S::LANES <= d {
            if S::LANES == 16 {
                add_columns::<S, M, 4>(t, i, from, to, values.add(j), d, out.add(j));
            } else {
                add_columns::<S, M, 2>(t, i, from, to, values.add(j), d, out.add(j));
            }
            j += wide * S::LANES;
        }
        while j < d {
            add_columns::<S, M, 1>(t, i, from, to, values.add(j), d, out.add(j));
            j += S::LANES;
        }
    }
}

#[inline(always)]
unsafe fn add_columns<S: Simd, const M: usize, const N: usize>(
    t: &Tile,
    row: usize,
    from: usize,
    to: usize,
    values: *const f32,
    d: usize,
    out: *mut f32,
) {
    // SAFETY: the caller's.
    unsafe {
        let mut sums = [[S::splat(0.0); N]; M];
        for m in 0..M {
            for n in 0..N {
                sums[m][n] = S::load(out.add(m * d + n * S::LANES));
            }
        }
        let mut i = from;
        while i < to {
            let mut value = [S::splat(0.0); N];
            for n in 0..N {
                value[n] = S::load(values.add(i * d + n * S::LANES));
            }
            for m in 0..M {
                let weight = S::splat(*t.weights.get_unchecked(row + m).get_unchecked(i));
                for n in 0..N {
                    sums[m][n] = S::fma(weight, value[n], sums[m][n]);
                }
            }
            i += 1;
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
