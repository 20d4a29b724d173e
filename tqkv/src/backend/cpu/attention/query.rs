//! What is the same for all pieces of a unit: how rows are read, and its queries as kernels read them.

use crate::backend::cpu::codec::{RowTables, Way};
use crate::backend::cpu::isa::{Job, LARGEST_WORD, Simd};
use crate::backend::cpu::memory::{Line, lines};
use crate::format::MAX_HEAD_DIM;

/// Rows of queries that share the registers.
pub(super) const ROWS: usize = 4;

/// A unit's queries for keys that are read in some way: floats or words, in the order of its elements.
pub(super) struct QueryRows {
    pub key_way: Way,
    pub value_way: Way,
    lines: Vec<Line>,
    /// Elements of a row.
    width: usize,
    /// What a unit of each row counts: dot products are so many times too small.
    pub units: Vec<f64>,
    /// The element of each place of a row of sums, where values are words.
    pub sums: Vec<usize>,
}

/// Makes them of rows of D floats and the units of these.
pub(super) struct Prepare<'a> {
    pub q: &'a [f32],
    pub units: &'a [f64],
    pub keys: &'a RowTables,
    pub values: &'a RowTables,
    /// Whether the precision that is asked for allows words.
    pub words: bool,
}

impl Job for Prepare<'_> {
    type Output = QueryRows;
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) -> QueryRows {
        let (n, d) = (self.units.len(), self.keys.d);
        let (key_way, value_way) = if n <= ROWS {
            (Way::of_keys::<S>(&self.keys.row, self.words), Way::of_values::<S>(&self.values.row, self.words))
        } else {
            (Way::of_many::<S>(&self.keys.row, self.words), Way::of_many::<S>(&self.values.row, self.words))
        };
        let sums = value_way.words().map_or(vec![], |way| (0..way.width(d)).map(|at| way.element_of_sum(at)).collect());
        let width = key_way.width(d);
        let Some(way) = key_way.words() else {
            let mut lines = lines(n * d);
            let q = &mut bytemuck::cast_slice_mut(&mut lines)[..n * d];
            q.copy_from_slice(self.q);
            key_way.reorder::<S>(q);
            return QueryRows { key_way, value_way, lines, width, units: self.units.to_vec(), sums };
        };
        let order: Vec<usize> = (0..width).map(|at| way.element(at)).collect();
        let mut lines = lines(n * width / 2);
        let rows = bytemuck::cast_slice_mut::<_, i16>(&mut lines).chunks_exact_mut(width);
        let word = self.keys.word() as f64;
        let mut units = Vec::with_capacity(n);
        for ((row, q), unit) in rows.zip(self.q.chunks_exact(d)).zip(self.units) {
            units.push(as_words(isa, q, row, &order) * word * unit);
        }
        QueryRows { key_way, value_way, lines, width, units, sums }
    }
}

impl QueryRows {
    /// Rows from `r` on.
    pub fn floats(&self, r: usize) -> &[f32] {
        &bytemuck::cast_slice(&self.lines)[r * self.width..]
    }

    /// Rows from `r` on, if they are words, and their width.
    pub fn words(&self, r: usize) -> (&[i16], usize) {
        (&bytemuck::cast_slice(&self.lines)[r * self.width..], self.width)
    }

    /// Rows of sums of `width` elements into rows of D in order.
    #[inline(always)]
    pub fn restore<S: Simd>(&self, rows: &mut Vec<f32>, d: usize) {
        self.value_way.restore::<S>(rows);
        if self.sums.is_empty() {
            return;
        }
        let old = std::mem::take(rows);
        rows.resize(old.len() / self.sums.len() * d, 0.0);
        for (old, row) in old.chunks_exact(self.sums.len()).zip(rows.chunks_exact_mut(d)) {
            for (x, &element) in old.iter().zip(&self.sums) {
                if let Some(to) = row.get_mut(element) {
                    *to = *x;
                }
            }
        }
    }
}

/// The largest sum of words' sizes whose products with levels fit 32 bits, less one for each of as many words as there may be.
pub(super) const ROOM: f32 = (i32::MAX / LARGEST_WORD - MAX_HEAD_DIM as i32) as f32;

/// A query as words, `order` giving the element of each; gives what a unit of it counts.
#[inline(always)]
fn as_words<S: Simd>(isa: S, q: &[f32], words: &mut [i16], order: &[usize]) -> f64 {
    let (sum, largest) = sum_and_largest(q);
    if largest == 0.0 || !sum.is_finite() {
        words.fill(0);
        return if sum == 0.0 { 1.0 } else { f64::NAN };
    }
    // Words are summed in pairs, in four lanes or more.
    let mut lanes = [0f32; 4];
    for (at, x) in order.iter().enumerate().filter_map(|(at, &i)| Some((at, q.get(i)?))) {
        lanes[at / 2 % 4] += x.abs();
    }
    let gain = (i16::MAX as f32 / largest.max(TINY)).min(ROOM / lanes.into_iter().fold(0.0, f32::max));
    // One element more, for those that there are not.
    let mut in_order = [0i16; MAX_HEAD_DIM + 1];
    for i in (0..q.len()).step_by(S::LANES) {
        // SAFETY: whole vectors, as rows are multiples of 16.
        unsafe {
            let x = isa.mul(isa.load(q.as_ptr().add(i)), isa.splat(gain));
            isa.store_words(in_order.as_mut_ptr().add(i), isa.nearest(x));
        }
    }
    in_order[q.len()] = 0;
    for (word, &element) in words.iter_mut().zip(order) {
        *word = in_order[element.min(q.len())];
    }
    1.0 / gain as f64
}

/// Below this the gain that makes words would overflow.
pub(super) const TINY: f32 = 1e-33;

/// The sum of sizes, and the largest; of rows of whole vectors. The sum is not finite if any element is not.
#[inline(always)]
pub(super) fn sum_and_largest(x: &[f32]) -> (f32, f32) {
    let (mut sums, mut largest) = ([0f32; 16], [0f32; 16]);
    for x in x.chunks_exact(16) {
        for ((sum, largest), x) in sums.iter_mut().zip(&mut largest).zip(x) {
            *sum += x.abs();
            *largest = if x.abs() > *largest { x.abs() } else { *largest };
        }
    }
    (sums.iter().sum(), largest.iter().fold(0f32, |a, &b| a.max(b)))
}
