//! Scores into weights, tile by tile.

use super::task::Partial;
use super::tile::Tile;
use crate::backend::cpu::isa::Simd;

/// Weights of rows from `r` on, from their scores in the tile.
#[inline(always)]
pub(super) fn soften<S: Simd>(isa: S, t: &mut Tile, partial: &mut Partial, r: usize, seen: &[(usize, usize)]) {
    for (i, &seen) in seen.iter().enumerate().filter(|(_, (a, b))| a < b) {
        soften_row(isa, t, partial, (i, r + i), seen);
    }
}

/// Scores of row `row` (row `i` of the tile) into weights, and its running softmax one tile further.
#[inline(always)]
fn soften_row<S: Simd>(
    isa: S,
    t: &mut Tile,
    partial: &mut Partial,
    (i, row): (usize, usize),
    (from, to): (usize, usize),
) {
    let (start, end) = (from / 16 * 16, to.next_multiple_of(16));
    let scores = &mut t.scores[i];
    scores[start..from].fill(f64::NEG_INFINITY);
    scores[to..end].fill(f64::NEG_INFINITY);
    let largest = largest(&scores[start..end]);
    let max = if largest > partial.max[row] { largest } else { partial.max[row] };
    if max > partial.max[row] {
        let shrink = (partial.max[row] - max).exp();
        partial.max[row] = max;
        partial.sum[row] *= shrink;
        let width = partial.width;
        partial.out[row * width..][..width].iter_mut().for_each(|o| *o *= shrink as f32);
    }
    // All scores may be minus infinity, which weighs nothing.
    let base = if max == f64::NEG_INFINITY { 0.0 } else { max };
    let (weights, factors) = (&mut t.weights[i][start..end], &t.value_factors[start..end]);
    for (w, s) in weights.iter_mut().zip(&scores[start..end]) {
        *w = (s - base) as f32;
    }
    let mut sum = isa.splat(0.0);
    for j in (0..weights.len()).step_by(S::LANES) {
        // SAFETY: whole vectors of both, as they are multiples of 16.
        unsafe {
            let w = weights.as_mut_ptr().add(j);
            let p = exp(isa, isa.load(w));
            sum = isa.add(sum, p);
            isa.store(w, isa.mul(p, isa.load(factors.as_ptr().add(j))));
        }
    }
    let zero = isa.splat(0.0);
    partial.sum[row] += isa.sum4([sum, zero, zero, zero])[0];
}

/// Lane by lane, so that it can be done in vectors; NaN loses here and wins in the sum.
#[inline(always)]
fn largest(scores: &[f64]) -> f64 {
    let mut lanes = [f64::NEG_INFINITY; 16];
    for s in scores.chunks_exact(16) {
        for (l, &s) in lanes.iter_mut().zip(s) {
            *l = if s > *l { s } else { *l };
        }
    }
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            lanes[i] = if lanes[i + half] > lanes[i] { lanes[i + half] } else { lanes[i] };
        }
    }
    lanes[0]
}

/// e^x to 2 units in the last place for x ≤ 0; 0 below -87; NaN stays NaN.
///
/// x = n·ln 2 + r; e^r by Cephes' polynomial (S. Moshier, expf), 2^n by its exponent bits.
#[inline(always)]
fn exp<S: Simd>(isa: S, x: S::F) -> S::F {
    let n = isa.round(isa.mul(x, isa.splat(std::f32::consts::LOG2_E)));
    // ln 2 in two parts, the first of few enough bits that n times it is exact.
    let r = isa.fma(n, isa.splat(-0.693_359_4), x);
    let r = isa.fma(n, isa.splat(2.121_944_4e-4), r);
    let mut p = isa.splat(1.987_569_1e-4);
    p = isa.fma(p, r, isa.splat(1.398_2e-3));
    p = isa.fma(p, r, isa.splat(8.333_452e-3));
    p = isa.fma(p, r, isa.splat(4.166_579_6e-2));
    p = isa.fma(p, r, isa.splat(1.666_666_5e-1));
    p = isa.fma(p, r, isa.splat(0.5));
    let p = isa.add(isa.fma(p, isa.mul(r, r), r), isa.splat(1.0));
    isa.zero_below(x, isa.splat(-87.0), isa.mul(p, isa.pow2(n)))
}
