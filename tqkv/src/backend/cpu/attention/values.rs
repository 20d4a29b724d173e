//! Weights times values.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::kernel::{ForOne, ForRows, Kernel};
use super::task::{Partial, Task};
use super::tile::{MAX_TILE, Tile, ask};
use super::words::{self, Units};
use crate::backend::cpu::codec::{Read, RowTables, Way};
use crate::backend::cpu::isa::Simd;

/// Prepares the weights of rows of the tile for values that are read this way; gives what a unit of each row and block
/// counts.
#[inline(always)]
pub(super) fn weigh<S: Simd>(isa: S, t: &mut Tile, way: Way, seen: &[(usize, usize)]) -> Units {
    let mut units = Units::default();
    if way.words().is_some() {
        let (from, to) = all_seen(seen);
        let within = (from / 16 * 16, to.next_multiple_of(16));
        for (row, &seen) in seen.iter().enumerate() {
            units[row] = words::weigh(isa, t, row, seen, within);
        }
    }
    units
}

/// From the first to the last position that any row sees.
#[inline(always)]
pub(super) fn all_seen(seen: &[(usize, usize)]) -> (usize, usize) {
    let some = seen.iter().filter(|(a, b)| a < b);
    let (from, to) = some.fold((MAX_TILE, 0), |(from, to), &(a, b)| (from.min(a), to.max(b)));
    (from.min(to), to)
}

/// out += Σ weight · value for rows from `r` on, whose values `find` has found and whose weights `weigh` has prepared.
#[inline(always)]
pub(super) fn add<S: Simd>(
    isa: S,
    task: &Task,
    t: &Tile,
    (way, units): (Way, Units),
    partial: &mut Partial,
    r: usize,
    seen: &[(usize, usize)],
) {
    let (tables, width) = (task.value.tables, partial.width);
    let ahead = if way.asks_ahead() { task.key.tables.row_bytes } else { 0 };
    let out = &mut partial.out[r * width..][..seen.len() * width];
    let rows = seen.len();
    if way.words().is_some() {
        let (from, to) = all_seen(seen);
        let kernel = words::Sums { tables, tile: t, from: from / 2 * 2, to, ahead, units, out, width };
        return way.visit_words(isa, ForRows { rows, kernel });
    }
    if seen.iter().all(|s| *s == seen[0]) {
        let kernel = Sums { tables, tile: t, row: 0, seen: seen[0], ahead, out };
        return way.visit(isa, ForRows { rows, kernel });
    }
    for (row, (&seen, out)) in seen.iter().zip(out.chunks_exact_mut(width)).enumerate() {
        way.visit(isa, ForOne(Sums { tables, tile: t, row, seen, ahead, out }));
    }
}

/// The same for M rows of the tile, from `row` on, that see the same.
struct Sums<'a> {
    tables: &'a RowTables,
    tile: &'a Tile,
    row: usize,
    seen: (usize, usize),
    /// Bytes of a key that is asked for with each position.
    ahead: usize,
    out: &'a mut [f32],
}

impl Kernel for Sums<'_> {
    #[inline(always)]
    fn run<S: Simd, R: Read, const M: usize>(mut self, isa: S) {
        let d = self.tables.d;
        assert!(self.out.len() == M * d && self.row + M <= self.tile.weights.len());
        let table = R::table(isa, self.tables);
        // As many vectors as leave half of the registers free for M = 4.
        let width = if S::LANES == 16 { 4 } else { 2 };
        if R::RUN == 1 {
            let mut j = 0;
            while j + width * S::LANES <= d {
                if S::LANES == 16 {
                    self.add_columns::<S, R, M, 4>(isa, &table, j, 0);
                } else {
                    self.add_columns::<S, R, M, 2>(isa, &table, j, 0);
                }
                j += width * S::LANES;
            }
            while j < d {
                self.add_columns::<S, R, M, 1>(isa, &table, j, 0);
                j += S::LANES;
            }
            return;
        }
        for j in (0..d).step_by(R::RUN * S::LANES) {
            // Not a loop: it would not be unrolled, and a shift needs to know how far.
            if S::LANES == 16 {
                self.add_columns::<S, R, M, 4>(isa, &table, j, 0);
                if R::RUN == 8 {
                    self.add_columns::<S, R, M, 4>(isa, &table, j, 4);
                }
            } else {
                self.add_columns::<S, R, M, 2>(isa, &table, j, 0);
                self.add_columns::<S, R, M, 2>(isa, &table, j, 2);
                if R::RUN == 8 {
                    self.add_columns::<S, R, M, 2>(isa, &table, j, 4);
                    self.add_columns::<S, R, M, 2>(isa, &table, j, 6);
                }
            }
        }
    }
}

impl Sums<'_> {
    /// The same for N vectors from vector `c` on, counted from element `j`.
    #[inline(always)]
    fn add_columns<S: Simd, R: Read, const M: usize, const N: usize>(
        &mut self,
        isa: S,
        table: &R::Table<'_, S>,
        j: usize,
        c: usize,
    ) {
        let (t, d, (from, to)) = (self.tile, self.tables.d, self.seen);
        // SAFETY: `find` has found the values that are seen; their vectors and those of M rows of out are within D elements; the
        // tile has weights of M rows from `row` on.
        unsafe {
            let out = self.out.as_mut_ptr().add(j + c * S::LANES);
            let mut sums = [[isa.splat(0.0); N]; M];
            for m in 0..M {
                for n in 0..N {
                    sums[m][n] = isa.load(out.add(m * d + n * S::LANES));
                }
            }
            for i in from..to {
                if R::IN_POOL && c == 0 && j == 0 {
                    ask(isa, &t.ahead[i..=i], self.ahead);
                }
                let value = R::vectors::<S, N>(isa, table, *t.values.get_unchecked(i), j, c);
                for m in 0..M {
                    let weight = isa.splat(*t.weights.get_unchecked(self.row + m).get_unchecked(i));
                    for n in 0..N {
                        sums[m][n] = isa.fma(weight, value[n], sums[m][n]);
                    }
                }
            }
            for m in 0..M {
                for n in 0..N {
                    isa.store(out.add(m * d + n * S::LANES), sums[m][n]);
                }
            }
        }
    }
}
