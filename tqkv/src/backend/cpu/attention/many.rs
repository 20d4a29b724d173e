//! More rows of queries than share the registers.

use super::task::{Partial, Task};
use super::tile::{ROWS, Tile, find, lines, prefetch, stretch};
use super::{scores, softmax, values};
use crate::backend::cpu::codec::Way;
use crate::backend::cpu::isa::Simd;

/// In short tiles, decoded once for all of them.
#[inline(always)]
pub(super) fn many<S: Simd>(isa: S, task: &Task, t: &mut Tile, partial: &mut Partial) {
    let (n, d, way) = (task.seen.len(), task.d(), Way::Decoded);
    let tile = stretch(way.prepared_bytes(d));
    let (mut q, mut keys, mut values) = (lines(n * d), lines(tile * d), lines(tile * d));
    let (keys, values) = (bytemuck::cast_slice_mut(&mut keys), bytemuck::cast_slice_mut(&mut values));
    let q = &mut bytemuck::cast_slice_mut::<_, f32>(&mut q)[..n * d];
    q.copy_from_slice(task.q);
    for start in (task.start..task.end).step_by(tile) {
        let count = tile.min(task.end - start);
        let ahead = tile.min(task.end - start - count);
        t.find_factors(task, start, count);
        find(isa, task, (&task.key, way), start, (0, count), keys, &mut t.keys);
        prefetch(isa, task, &task.key, start + count, ahead);
        find(isa, task, (&task.value, way), start, (0, count), values, &mut t.values);
        prefetch(isa, task, &task.value, start + count, ahead);
        scores::norms(isa, task, t, (0, count));
        for r in (0..n).step_by(ROWS) {
            let seen = &task.seen_of::<ROWS>(r, start, count)[..ROWS.min(n - r)];
            scores::score(isa, task, t, way, &q[r * d..], r, seen);
            softmax::soften(isa, task, t, partial, r, seen);
            values::add(isa, task, t, way, partial, r, seen);
        }
    }
}
