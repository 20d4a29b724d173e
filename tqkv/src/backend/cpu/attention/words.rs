//! Products of words: queries of 16 bits times keys, weights of 16 bits times values, summed in integers.
//!
//! A query's words are so small that the sums of their products with any key, of which each lane has one, fit 32 bits, and so are
//! a block's weights: nothing overflows, and the order of sums does not matter. What rounding leaves over of a weight is added to a
//! later one, so that the weights' sum is right however many small ones there are.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::kernel::WordKernel;
use super::query::{ROOM, ROWS, TINY, sum_and_largest};
use super::tile::{MAX_TILE, Tile, ask};
use crate::backend::cpu::codec::{RowTables, WORDS, Words};
use crate::backend::cpu::isa::Simd;

/// Positions whose weights have one unit, and whose products are summed in integers.
pub(super) const BLOCK: usize = 64;

/// What units of weights count, by row and block of the tile.
pub(super) type Units = [[f32; MAX_TILE / BLOCK]; ROWS];

/// Dot products of M queries with keys `from..to`, and some around them, into scores.
pub(super) struct Dots<'a> {
    pub tables: &'a RowTables,
    pub tile: &'a mut Tile,
    /// Rows of `width` words.
    pub q: &'a [i16],
    pub width: usize,
    pub from: usize,
    pub to: usize,
    /// Bytes of a value that is asked for with each key.
    pub ahead: usize,
}

impl WordKernel for Dots<'_> {
    #[inline(always)]
    fn run<S: Simd, W: Words, const M: usize>(mut self, isa: S) {
        assert!(self.q.len() >= M * self.width && M <= ROWS);
        let table = W::table(isa, self.tables);
        if W::QUARTERS {
            for at in (self.from / 8 * 8..self.to).step_by(8) {
                self.eight::<S, W, M>(isa, &table, at);
            }
            return;
        }
        for at in (self.from / 4 * 4..self.to).step_by(4) {
            ask(isa, &self.tile.ahead[at..at + 4], self.ahead);
            let mut sums = [[isa.integers(0); 4]; M];
            for group in 0..self.width / (W::GROUP * WORDS) {
                // Not a loop: a shift needs to know how far.
                self.add::<S, W, M, 0>(isa, &table, at, group, &mut sums);
                if W::GROUP > 1 {
                    self.add::<S, W, M, 1>(isa, &table, at, group, &mut sums);
                }
                if W::GROUP > 2 {
                    self.add::<S, W, M, 2>(isa, &table, at, group, &mut sums);
                    self.add::<S, W, M, 3>(isa, &table, at, group, &mut sums);
                }
            }
            for m in 0..M {
                let sums = &sums[m];
                let totals = isa.sum4([isa.float(sums[0]), isa.float(sums[1]), isa.float(sums[2]), isa.float(sums[3])]);
                self.tile.scores[m][at..at + 4].copy_from_slice(&totals);
            }
        }
    }
}

impl Dots<'_> {
    /// With eight keys, four in each vector.
    #[inline(always)]
    fn eight<S: Simd, W: Words, const M: usize>(&mut self, isa: S, table: &W::Table<'_, S>, at: usize) {
        ask(isa, &self.tile.ahead[at..at + 8], self.ahead);
        let mut sums = [[isa.integers(0); 2]; 4];
        for group in 0..self.width / (W::QUARTER_GROUP * 8) {
            self.add_quarters::<S, W, M, 0>(isa, table, at, group, &mut sums);
            self.add_quarters::<S, W, M, 1>(isa, table, at, group, &mut sums);
            self.add_quarters::<S, W, M, 2>(isa, table, at, group, &mut sums);
            self.add_quarters::<S, W, M, 3>(isa, table, at, group, &mut sums);
            if W::QUARTER_GROUP == 8 {
                self.add_quarters::<S, W, M, 4>(isa, table, at, group, &mut sums);
                self.add_quarters::<S, W, M, 5>(isa, table, at, group, &mut sums);
                self.add_quarters::<S, W, M, 6>(isa, table, at, group, &mut sums);
                self.add_quarters::<S, W, M, 7>(isa, table, at, group, &mut sums);
            }
        }
        for half in 0..2 {
            let totals = isa.sum_quarters([
                isa.float(sums[0][half]),
                isa.float(sums[1][half]),
                isa.float(sums[2][half]),
                isa.float(sums[3][half]),
            ]);
            for m in 0..M {
                for i in 0..4 {
                    self.tile.scores[m][at + 4 * half + i] = totals[4 * m + i] as f64;
                }
            }
        }
    }

    /// The products of vector `C` of a group of eight keys.
    #[inline(always)]
    fn add_quarters<S: Simd, W: Words, const M: usize, const C: usize>(
        &self,
        isa: S,
        table: &W::Table<'_, S>,
        at: usize,
        group: usize,
        sums: &mut [[S::I; 2]; 4],
    ) {
        let keys = self.tile.keys.as_ptr().wrapping_add(at);
        // SAFETY: `find` has found whole vectors of keys, and the group is one of theirs.
        let keys = unsafe {
            [
                W::quarters::<S, C>(isa, table, keys.cast::<[*const u8; 4]>().read(), group),
                W::quarters::<S, C>(isa, table, keys.add(4).cast::<[*const u8; 4]>().read(), group),
            ]
        };
        for m in 0..M {
            let word = m * self.width + (group * W::QUARTER_GROUP + C) * 8;
            // SAFETY: within M rows of `width` words.
            let query = unsafe { isa.load_quarter(self.q.as_ptr().add(word).cast()) };
            sums[m][0] = isa.dot_words(sums[m][0], query, keys[0]);
            sums[m][1] = isa.dot_words(sums[m][1], query, keys[1]);
        }
    }

    /// The products of vector `C` of a group: of each of four keys, and each query once for all of them.
    #[inline(always)]
    fn add<S: Simd, W: Words, const M: usize, const C: usize>(
        &self,
        isa: S,
        table: &W::Table<'_, S>,
        at: usize,
        group: usize,
        sums: &mut [[S::I; 4]; M],
    ) {
        let mut key = [isa.integers(0); 4];
        for i in 0..4 {
            // SAFETY: `find` has found whole vectors of keys, and the group is one of theirs.
            key[i] = unsafe { W::words::<S, C>(isa, table, *self.tile.keys.get_unchecked(at + i), group) };
        }
        for m in 0..M {
            let word = m * self.width + (group * W::GROUP + C) * WORDS;
            // SAFETY: within M rows of `width` words.
            let query = unsafe { isa.load_integers(self.q.as_ptr().add(word).cast()) };
            for i in 0..4 {
                sums[m][i] = isa.dot_words(sums[m][i], query, key[i]);
            }
        }
    }
}

/// The weights of a row of the tile as words, which are zero where it sees nothing; gives what a unit of each block's counts.
///
/// `within` is a range of whole vectors that holds what is seen.
#[inline(always)]
pub(super) fn weigh<S: Simd>(
    isa: S,
    t: &mut Tile,
    row: usize,
    (from, to): (usize, usize),
    within: (usize, usize),
) -> [f32; MAX_TILE / BLOCK] {
    let (weights, words) = (&mut t.weights[row], &mut t.words[row]);
    words[within.0..within.1].fill(0);
    let mut units = [0.0; MAX_TILE / BLOCK];
    if from >= to {
        return units;
    }
    let (start, end) = (from / 16 * 16, to.next_multiple_of(16));
    weights[start..from].fill(0.0);
    weights[to..end].fill(0.0);
    for (block, unit) in units.iter_mut().enumerate() {
        let (start, end) = (start.max(block * BLOCK), end.min((block + 1) * BLOCK));
        if start < end {
            *unit = weigh_block(isa, &weights[start..end], &mut words[start..end]);
        }
    }
    units
}

/// Weights as words; gives what a unit counts. What rounding leaves over goes to the next weight of the lane.
#[inline(always)]
fn weigh_block<S: Simd>(isa: S, weights: &[f32], words: &mut [i16]) -> f32 {
    let (sum, largest) = sum_and_largest(weights);
    if !sum.is_finite() {
        return f32::NAN;
    }
    let gain = (i16::MAX as f32 / largest.max(TINY)).min(ROOM / sum);
    let (scaled_by, mut left) = (isa.splat(gain), isa.splat(0.0));
    for j in (0..weights.len()).step_by(S::LANES) {
        // SAFETY: whole vectors of both.
        unsafe {
            let x = isa.fma(isa.load(weights.as_ptr().add(j)), scaled_by, left);
            let n = isa.nearest(x);
            left = isa.sub(x, isa.float(n));
            isa.store_words(words.as_mut_ptr().add(j), n);
        }
    }
    1.0 / gain
}

/// out += unit · Σ weight · value for M rows of the tile over positions `from..to`, in the order of sums.
pub(super) struct Sums<'a> {
    pub tables: &'a RowTables,
    pub tile: &'a Tile,
    /// Even, and one more row than the last is found.
    pub from: usize,
    pub to: usize,
    /// Bytes of a key that is asked for with each position.
    pub ahead: usize,
    pub units: Units,
    /// Rows of `width` floats.
    pub out: &'a mut [f32],
    pub width: usize,
}

impl WordKernel for Sums<'_> {
    #[inline(always)]
    fn run<S: Simd, W: Words, const M: usize>(mut self, isa: S) {
        assert!(self.out.len() == M * self.width && M <= ROWS && self.from.is_multiple_of(2));
        let table = W::table(isa, self.tables);
        for group in 0..self.width / (W::GROUP * WORDS) {
            match W::GROUP {
                1 => self.add::<S, W, M, 0, 1>(isa, &table, group),
                2 => self.add::<S, W, M, 0, 2>(isa, &table, group),
                _ => {
                    self.add::<S, W, M, 0, 2>(isa, &table, group);
                    self.add::<S, W, M, 2, 2>(isa, &table, group);
                }
            }
        }
    }
}

impl Sums<'_> {
    /// The same for N vectors of values from vector `C` of a group on.
    #[inline(always)]
    fn add<S: Simd, W: Words, const M: usize, const C: usize, const N: usize>(
        &mut self,
        isa: S,
        table: &W::Table<'_, S>,
        group: usize,
    ) {
        for block in self.from / BLOCK..self.to.div_ceil(BLOCK) {
            let (from, to) = (self.from.max(block * BLOCK), self.to.min((block + 1) * BLOCK));
            let sums = self.sums::<S, W, M, C, N>(isa, table, group, (from, to));
            let first = (group * W::GROUP + C) * WORDS;
            for m in 0..M {
                let unit = isa.splat(self.units[m][block] * self.tables.word());
                for n in 0..N {
                    for half in 0..2 {
                        // SAFETY: within M rows of `width` floats.
                        unsafe {
                            let out = self.out.as_mut_ptr().add(m * self.width + first + n * WORDS + half * WORDS / 2);
                            isa.store(out, isa.fma(isa.float(sums[m][n][half]), unit, isa.load(out)));
                        }
                    }
                }
            }
        }
    }

    /// Σ weight · value over positions `from..to`, of which the first is even.
    #[inline(always)]
    fn sums<S: Simd, W: Words, const M: usize, const C: usize, const N: usize>(
        &self,
        isa: S,
        table: &W::Table<'_, S>,
        group: usize,
        (from, to): (usize, usize),
    ) -> [[[S::I; 2]; N]; M] {
        let t = self.tile;
        let mut sums = [[[isa.integers(0); 2]; N]; M];
        for i in (from..to).step_by(2) {
            if group == 0 && C == 0 {
                ask(isa, &t.ahead[i..i + 2], self.ahead);
            }
            // SAFETY: `find` has found the values up to an even position, and the group is one of theirs.
            let rows = unsafe { [*t.values.get_unchecked(i), *t.values.get_unchecked(i + 1)] };
            let mut pairs = [[isa.integers(0); 2]; N];
            // SAFETY: as above.
            pairs[0] = unsafe { W::pairs::<S, C>(isa, table, rows, group) };
            if N == 2 {
                // SAFETY: as above.
                pairs[1] = unsafe { second::<S, W, C>(isa, table, rows, group) };
            }
            for m in 0..M {
                // SAFETY: two of the tile's words.
                let weights = unsafe { t.words.get_unchecked(m).as_ptr().add(i).cast::<i32>().read_unaligned() };
                let weights = isa.integers(weights);
                for n in 0..N {
                    for half in 0..2 {
                        sums[m][n][half] = isa.dot_words(sums[m][n][half], pairs[n][half], weights);
                    }
                }
            }
        }
        sums
    }
}

/// The vector after `C`, which is even.
///
/// # Safety
/// As for [`Words::pairs`].
#[inline(always)]
unsafe fn second<S: Simd, W: Words, const C: usize>(
    isa: S,
    table: &W::Table<'_, S>,
    rows: [*const u8; 2],
    group: usize,
) -> [S::I; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        match C {
            0 => W::pairs::<S, 1>(isa, table, rows, group),
            _ => W::pairs::<S, 3>(isa, table, rows, group),
        }
    }
}

/// Rows into words that are ready: each for itself, or in pairs; `rows` then point there.
pub(super) struct MakeReady<'a> {
    pub tables: &'a RowTables,
    /// An even number of found rows.
    pub rows: &'a mut [*const u8],
    pub in_pairs: bool,
    pub width: usize,
    pub room: &'a mut [i16],
}

impl WordKernel for MakeReady<'_> {
    #[inline(always)]
    fn run<S: Simd, W: Words, const M: usize>(self, isa: S) {
        assert!(self.room.len() >= self.rows.len() * self.width && self.rows.len().is_multiple_of(2));
        let table = W::table(isa, self.tables);
        let to = self.room.as_mut_ptr();
        for (i, rows) in self.rows.chunks_exact_mut(2).enumerate() {
            let to = to.wrapping_add(2 * i * self.width);
            for group in 0..self.width / (W::GROUP * WORDS) {
                let make = Make { rows: [rows[0], rows[1]], in_pairs: self.in_pairs, width: self.width, to, group };
                // SAFETY: `find` has found these rows, the group is one of theirs, and there is room for two rows of words.
                unsafe {
                    make.one::<S, W, 0>(isa, &table);
                    if W::GROUP > 1 {
                        make.one::<S, W, 1>(isa, &table);
                    }
                    if W::GROUP > 2 {
                        make.one::<S, W, 2>(isa, &table);
                        make.one::<S, W, 3>(isa, &table);
                    }
                }
            }
            let second = if self.in_pairs { 2 } else { 1 };
            (rows[0], rows[1]) =
                (to.cast_const().cast(), to.wrapping_add((2 - second) * self.width).cast_const().cast());
        }
    }
}

/// A group of two rows.
struct Make {
    rows: [*const u8; 2],
    in_pairs: bool,
    width: usize,
    to: *mut i16,
    group: usize,
}

impl Make {
    /// # Safety
    /// The rows are as for [`Words::pairs`], and `to` is writable for two rows of `width` words.
    #[inline(always)]
    unsafe fn one<S: Simd, W: Words, const C: usize>(&self, isa: S, table: &W::Table<'_, S>) {
        let at = (self.group * W::GROUP + C) * WORDS;
        // SAFETY: the caller's promise.
        unsafe {
            if self.in_pairs {
                let pairs = W::pairs::<S, C>(isa, table, self.rows, self.group);
                isa.store_integers(self.to.add(2 * at).cast(), pairs[0]);
                isa.store_integers(self.to.add(2 * at + WORDS).cast(), pairs[1]);
            } else {
                for (i, row) in self.rows.into_iter().enumerate() {
                    let words = W::words::<S, C>(isa, table, row, self.group);
                    isa.store_integers(self.to.add(i * self.width + at).cast(), words);
                }
            }
        }
    }
}
