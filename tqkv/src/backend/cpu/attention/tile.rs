//! Some consecutive positions: where their rows are, their factors, scores and weights.

use super::query::ROWS;
use super::task::{HeadRows, Task};
use crate::backend::cpu::codec::Way;
use crate::backend::cpu::isa::Simd;
use crate::backend::cpu::rows::Run;

/// Positions of the largest tile; every tile is a multiple of 16.
pub(super) const MAX_TILE: usize = 256;
/// Bytes of prepared keys, and as many of values: a quarter of a first-level cache.
const PREPARED_BYTES: usize = 16 << 10;

#[repr(align(64))]
pub(super) struct Tile {
    /// Where each row of K and V is: in the pool, or prepared. Those that `find` has set are readable until what it was given is
    /// written or dropped.
    pub keys: [*const u8; MAX_TILE],
    pub values: [*const u8; MAX_TILE],
    /// Rows of the pool that are used next: asked for as each position is gone through.
    pub ahead: [*const u8; MAX_TILE],
    pub scores: [[f64; MAX_TILE]; ROWS],
    pub weights: [[f32; MAX_TILE]; ROWS],
    /// Weights as words.
    pub words: [[i16; MAX_TILE]; ROWS],
    pub key_factors: [f64; MAX_TILE],
    pub value_factors: [f32; MAX_TILE],
    /// |k| · scale, or near it.
    pub key_norms: [f32; MAX_TILE],
}

impl Tile {
    #[inline(always)] // Or it would be copied.
    pub fn new() -> Self {
        Tile {
            keys: [std::ptr::null(); MAX_TILE],
            values: [std::ptr::null(); MAX_TILE],
            ahead: [std::ptr::null(); MAX_TILE],
            scores: [[0.0; MAX_TILE]; ROWS],
            weights: [[0.0; MAX_TILE]; ROWS],
            words: [[0; MAX_TILE]; ROWS],
            key_factors: [0.0; MAX_TILE],
            value_factors: [0.0; MAX_TILE],
            key_norms: [0.0; MAX_TILE],
        }
    }

    /// The factors of positions `start..start + count`.
    #[inline(always)]
    pub fn find_factors(&mut self, task: &Task, start: usize, count: usize) {
        let mut keys = [1f32; MAX_TILE];
        for (side, factors) in [(&task.key, &mut keys), (&task.value, &mut self.value_factors)] {
            if side.tables.scales_per_row != 1 {
                // None, or already in the decoded rows.
                factors[..count].fill(1.0);
                continue;
            }
            for (i, run) in task.runs(side, start, (0, count)) {
                side.tables.factors(run.scales, &mut factors[i..i + run.rows]);
            }
        }
        for (wide, &narrow) in self.key_factors.iter_mut().zip(&keys[..count]) {
            *wide = narrow as f64 * task.scale;
        }
    }

    /// Where the rows of positions `start..end` are in the pool.
    #[inline(always)]
    pub fn look_ahead(&mut self, task: &Task, side: &HeadRows, start: usize, end: usize) {
        let bytes = side.tables.row_bytes;
        for (i, run) in task.runs(side, start, (0, end - start)) {
            (0..run.rows).for_each(|j| self.ahead[i + j] = run.codes.wrapping_add(j * bytes));
        }
    }
}

/// Positions whose rows of so many bytes, once prepared, stay in the first-level cache.
pub(super) fn stretch(prepared_bytes: usize) -> usize {
    match prepared_bytes {
        0 => MAX_TILE,
        bytes => (PREPARED_BYTES / bytes).next_multiple_of(16).min(MAX_TILE),
    }
}

/// Finds the rows of positions `from..to` of the tile from `start` on, prepared in `room` if they are read so.
#[inline(always)]
pub(super) fn find<S: Simd>(
    isa: S,
    task: &Task,
    (side, way): (&HeadRows, Way),
    start: usize,
    (from, to): (usize, usize),
    room: &mut [f32],
    rows: &mut [*const u8; MAX_TILE],
) {
    let (tables, d) = (side.tables, side.tables.d);
    let prepared = way.prepared_bytes(d) / 4;
    // Several factors a row cannot be pulled out of its sums.
    let mut wide = if tables.scales_per_row > 1 { vec![0f32; (to - from) * tables.scales_per_row] } else { vec![] };
    for (i, Run { rows: n, codes, scales }) in task.runs(side, start, (from, to)) {
        if prepared == 0 {
            (0..n).for_each(|j| rows[i + j] = codes.wrapping_add(j * tables.row_bytes));
            continue;
        }
        let room = &mut room[(i - from) * prepared..][..n * prepared];
        let factors = (tables.scales_per_row > 1).then(|| &mut wide[..n * tables.scales_per_row]);
        let factors = factors.map(|factors| {
            tables.factors(scales, factors);
            &*factors
        });
        // SAFETY: a run is at a pointer that is readable for 64 bytes past the rows.
        unsafe { way.prepare(isa, tables, codes, factors, room) };
        // After what is written through `room`, which would end what these may read.
        (0..n).for_each(|j| rows[i + j] = room[j * prepared..].as_ptr().cast());
    }
    // Whole vectors of keys are read.
    let last = rows[to - 1];
    rows[to..to.next_multiple_of(16)].fill(last);
}

/// Asks for rows of `bytes` ahead of their use.
#[inline(always)]
pub(super) fn ask<S: Simd>(isa: S, rows: &[*const u8], bytes: usize) {
    for &row in rows {
        for line in (0..bytes).step_by(64) {
            isa.prefetch(row.wrapping_add(line));
        }
    }
}

/// Asks for the codes of positions `start..start + count` ahead of their use: short tiles are bursts from two places, which
/// hardware does not foresee.
#[inline(always)]
pub(super) fn prefetch<S: Simd>(isa: S, task: &Task, side: &HeadRows, start: usize, count: usize) {
    let bytes = side.tables.row_bytes;
    for (_, run) in task.runs(side, start, (0, count)) {
        for line in (0..run.rows * bytes).step_by(64) {
            isa.prefetch(run.codes.wrapping_add(line));
        }
    }
}
