//! Weights times values.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::kernel::{Kernel, for_one, for_rows};
use super::task::{Partial, Task};
use super::tile::{Tile, ask};
use crate::backend::cpu::codec::{Read, RowTables, Way};
use crate::backend::cpu::isa::Simd;

/// out += Σ weight · value for rows from `r` on, whose values `find` has found.
#[inline(always)]
pub(super) fn add<S: Simd>(
    isa: S,
    task: &Task,
    t: &Tile,
    way: Way,
    partial: &mut Partial,
    r: usize,
    seen: &[(usize, usize)],
) {
    let (d, tables, ahead) = (task.d(), task.value.tables, task.key.tables.row_bytes);
    let out = &mut partial.out[r * d..][..seen.len() * d];
    if seen.iter().all(|s| *s == seen[0]) {
        return for_rows(isa, way, seen.len(), Sums { tables, tile: t, row: 0, seen: seen[0], ahead, out });
    }
    for (row, (&seen, out)) in seen.iter().zip(out.chunks_exact_mut(d)).enumerate() {
        for_one(isa, way, Sums { tables, tile: t, row, seen, ahead, out });
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
