//! Queries times keys.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::kernel::{ForRows, Kernel};
use super::query::ROWS;
use super::task::Task;
use super::tile::{Tile, ask};
use super::values::all_seen;
use super::words;
use crate::backend::cpu::codec::{Read, Way};
use crate::backend::cpu::isa::{Job, Simd};
use crate::format::MAX_HEAD_DIM;

/// Where |q| |k| scale is above this, sums of f32 may move a weight by more than a few 1e-6.
const LARGE: f64 = 128.0;
/// Where |q| |k| is above this, they may overflow.
const OVERFLOW: f64 = 1e37;

/// The keys' norms, times scale. Elements of a row that has one factor are of unit variance; other rows are decoded.
#[inline(always)]
pub(super) fn norms<S: Simd>(isa: S, task: &Task, t: &mut Tile, (from, to): (usize, usize)) {
    let d = task.d();
    if task.key.tables.scales_per_row == 1 {
        let root = (d as f64).sqrt();
        for (norm, factor) in t.key_norms[from..to].iter_mut().zip(&t.key_factors[from..to]) {
            *norm = (factor.abs() * root) as f32;
        }
        return;
    }
    for i in (from..to).step_by(4) {
        let mut sums = [isa.splat(0.0); 4];
        for j in (0..d).step_by(S::LANES) {
            for m in 0..4 {
                // SAFETY: four rows of D floats, as `find` gives whole vectors of keys.
                let k = unsafe { isa.load(t.keys[i + m].cast::<f32>().add(j)) };
                sums[m] = isa.fma(k, k, sums[m]);
            }
        }
        for (norm, square) in t.key_norms[i..].iter_mut().zip(isa.sum4(sums)) {
            *norm = norm_of(task, square);
        }
    }
}

/// A key's norm times scale, from its square in f32, where tiny elements' squares vanish.
#[inline(always)]
fn norm_of(task: &Task, square: f64) -> f32 {
    let vanished = task.d() as f64 * f32::MIN_POSITIVE as f64;
    ((square + vanished).sqrt() * task.scale.abs()) as f32
}

/// Scores of the queries of rows from `r` on with the keys that they see of the tile from `start` on, which `find` has found.
#[inline(always)]
pub(super) fn score<S: Simd>(
    isa: S,
    task: &Task,
    t: &mut Tile,
    way: Way,
    r: usize,
    (start, seen): (usize, &[(usize, usize)]),
) {
    let ((from, to), rows, q) = (all_seen(seen), seen.len(), task.rows);
    if way.words().is_some() {
        let ahead = if way.asks_ahead() { task.value.tables.row_bytes } else { 0 };
        let ((q, width), tables) = (q.words(r), task.key.tables);
        way.visit_words(isa, ForRows { rows, kernel: words::Dots { tables, tile: t, q, width, from, to, ahead } });
    } else {
        way.visit(isa, ForRows { rows, kernel: Dots { task, tile: t, q: q.floats(r), from, to } });
    }
    for (i, &seen) in seen.iter().enumerate().filter(|(_, (a, b))| a < b) {
        scale(isa, task, t, (i, r + i, q.units[r + i]), start, seen);
    }
}

/// Dot products of M queries with keys `from..to`, and some around them.
struct Dots<'a> {
    task: &'a Task<'a>,
    tile: &'a mut Tile,
    q: &'a [f32],
    from: usize,
    to: usize,
}

impl Kernel for Dots<'_> {
    #[inline(always)]
    fn run<S: Simd, R: Read, const M: usize>(mut self, isa: S) {
        assert!(self.q.len() >= M * self.task.d() && M <= ROWS);
        let table = R::table(isa, self.task.key.tables);
        let ahead = if R::IN_POOL { self.task.value.tables.row_bytes } else { 0 };
        // Sixteen sums fill half of 32 registers, eight half of 16.
        if S::LANES == 16 || M <= 2 {
            for i in (self.from / 4 * 4..self.to).step_by(4) {
                ask(isa, &self.tile.ahead[i..i + 4], ahead);
                self.dots::<S, R, M, 4>(isa, &table, i);
            }
        } else {
            for i in (self.from / 2 * 2..self.to).step_by(2) {
                ask(isa, &self.tile.ahead[i..i + 2], ahead);
                self.dots::<S, R, M, 2>(isa, &table, i);
            }
        }
    }
}

impl Dots<'_> {
    /// With K keys from `at` on.
    #[inline(always)]
    fn dots<S: Simd, R: Read, const M: usize, const K: usize>(&mut self, isa: S, table: &R::Table<'_, S>, at: usize) {
        let d = self.task.d();
        let mut sums = [[isa.splat(0.0); K]; M];
        let mut squares = [isa.splat(0.0); 4];
        for j in (0..d).step_by(R::RUN * S::LANES) {
            if R::GROUP > 1 {
                self.add_groups::<S, R, M, K>(isa, table, at, j, &mut sums, &mut squares);
                continue;
            }
            // Not a loop: it would not be unrolled, and a shift needs to know how far.
            self.add_vectors::<S, R, M, K>(isa, table, at, j, 0, &mut sums);
            if R::RUN == 8 {
                self.add_vectors::<S, R, M, K>(isa, table, at, j, 1, &mut sums);
                self.add_vectors::<S, R, M, K>(isa, table, at, j, 2, &mut sums);
                self.add_vectors::<S, R, M, K>(isa, table, at, j, 3, &mut sums);
                self.add_vectors::<S, R, M, K>(isa, table, at, j, 4, &mut sums);
                self.add_vectors::<S, R, M, K>(isa, table, at, j, 5, &mut sums);
                self.add_vectors::<S, R, M, K>(isa, table, at, j, 6, &mut sums);
                self.add_vectors::<S, R, M, K>(isa, table, at, j, 7, &mut sums);
            }
        }
        if R::SQUARES {
            for (norm, square) in self.tile.key_norms[at..].iter_mut().zip(isa.sum4(squares)) {
                *norm = norm_of(self.task, square);
            }
        }
        let mut totals = [0f64; 16];
        for n in (0..M * K).step_by(4) {
            let mut four = [isa.splat(0.0); 4];
            for i in 0..4 {
                if n + i < M * K {
                    four[i] = sums[(n + i) / K][(n + i) % K];
                }
            }
            totals[n..n + 4].copy_from_slice(&isa.sum4(four));
        }
        for m in 0..M {
            self.tile.scores[m][at..at + K].copy_from_slice(&totals[m * K..][..K]);
        }
    }

    /// The products of vector `c`, counted from element `j`: a vector of each key, and each query once for all of them.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn add_vectors<S: Simd, R: Read, const M: usize, const K: usize>(
        &self,
        isa: S,
        table: &R::Table<'_, S>,
        at: usize,
        j: usize,
        c: usize,
        sums: &mut [[S::F; K]; M],
    ) {
        let (d, q) = (self.task.d(), self.q.as_ptr());
        let mut key = [isa.splat(0.0); K];
        for i in 0..K {
            // SAFETY: `find` has found whole vectors of keys; their vectors are within D elements.
            key[i] = unsafe { R::vectors::<S, 1>(isa, table, *self.tile.keys.get_unchecked(at + i), j, c)[0] };
        }
        for m in 0..M {
            // SAFETY: within M rows of D floats.
            let query = unsafe { isa.load(q.add(m * d + j + c * S::LANES)) };
            for i in 0..K {
                sums[m][i] = isa.fma(query, key[i], sums[m][i]);
            }
        }
    }

    /// The products of the four vectors from element `j` on: all of a key, as together they fill enough registers.
    #[inline(always)]
    fn add_groups<S: Simd, R: Read, const M: usize, const K: usize>(
        &self,
        isa: S,
        table: &R::Table<'_, S>,
        at: usize,
        j: usize,
        sums: &mut [[S::F; K]; M],
        squares: &mut [S::F; 4],
    ) {
        let (d, q) = (self.task.d(), self.q.as_ptr());
        for i in 0..K {
            // SAFETY: as in `add_vectors`.
            let key = unsafe { R::vectors::<S, 4>(isa, table, *self.tile.keys.get_unchecked(at + i), j, 0) };
            for v in 0..4 {
                for m in 0..M {
                    // SAFETY: within M rows of D floats.
                    let query = unsafe { isa.load(q.add(m * d + j + v * S::LANES)) };
                    sums[m][i] = isa.fma(query, key[v], sums[m][i]);
                }
                if R::SQUARES {
                    squares[i] = isa.fma(key[v], key[v], squares[i]);
                }
            }
        }
    }
}

/// Dot products of row `row` (row `i` of the tile), which count in units, into scores.
#[inline(always)]
fn scale<S: Simd>(
    isa: S,
    task: &Task,
    t: &mut Tile,
    (i, row, unit): (usize, usize, f64),
    start: usize,
    (from, to): (usize, usize),
) {
    let (scores, factors, norms) = (&mut t.scores[i][from..to], &t.key_factors[from..to], &t.key_norms[from..to]);
    // Nor may sums overflow before they are scaled. An infinite norm is above any limit.
    let limit = ((LARGE.min(OVERFLOW * task.scale.abs()) / task.norms[row]) as f32).min(f32::MAX);
    let mut large = false;
    for ((s, factor), &norm) in scores.iter_mut().zip(factors).zip(norms) {
        *s = *s * factor * unit;
        large |= norm > limit;
    }
    if large {
        for (j, ((s, factor), _)) in scores.iter_mut().zip(factors).zip(norms).enumerate().filter(|x| *x.1.1 > limit) {
            *s = isa.run(ExactDot { task, row, position: start + from + j }) * factor * task.units[row];
        }
    }
    if let Some(cap) = task.softcap {
        let bias = task.biases[row];
        scores.iter_mut().for_each(|s| *s = cap * ((*s + bias) / cap).tanh());
    }
}

/// The dot product of a query and the key of a position, in f64, but for the key's factor if it has one.
struct ExactDot<'a> {
    task: &'a Task<'a>,
    row: usize,
    position: usize,
}

impl Job for ExactDot<'_> {
    type Output = f64;
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) -> f64 {
        let (task, d) = (self.task, self.task.d());
        let (tables, mut key, mut factors) = (task.key.tables, [0f32; MAX_HEAD_DIM], [0f32; 4]);
        for (_, run) in task.runs(&task.key, self.position, (0, 1)) {
            let factors = (tables.scales_per_row > 1).then(|| {
                tables.factors(run.scales, &mut factors[..tables.scales_per_row]);
                &factors[..tables.scales_per_row]
            });
            // SAFETY: a run is at a pointer that is readable for 64 bytes past its rows, of which there is one.
            unsafe { Way::Decoded.prepare(isa, tables, run.codes, factors, &mut key[..d]) };
        }
        let mut lanes = [0f64; 16];
        for (a, b) in task.q[self.row * d..][..d].chunks_exact(16).zip(key.chunks_exact(16)) {
            for ((l, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
                *l += a as f64 * b as f64;
            }
        }
        lanes.iter().sum()
    }
}
