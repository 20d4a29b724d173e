//! Up to four rows of queries.

use super::query::ROWS;
use super::task::{Partial, Task};
use super::tile::{MAX_TILE, Tile, ask, find, stretch};
use super::{scores, softmax, values};
use crate::backend::cpu::isa::Simd;
use crate::backend::cpu::memory::lines;

/// In long tiles, so that it is rare to wait for a tile's weights. What must be prepared before it is used is prepared in
/// stretches.
#[inline(always)]
pub(super) fn few<S: Simd>(isa: S, task: &Task, t: &mut Tile) -> Partial {
    let (m, d) = (task.seen.len(), task.d());
    let (key_way, value_way) = (task.rows.key_way, task.rows.value_way);
    let mut partial = Partial::new(m, value_way.width(d));
    let (key_bytes, value_bytes) = (key_way.prepared_bytes(d), value_way.prepared_bytes(d));
    let (key_stretch, value_stretch) = (stretch(key_bytes), stretch(value_bytes));
    let (mut keys, mut values) = (lines(key_stretch * key_bytes / 4), lines(value_stretch * value_bytes / 4));
    let (keys, values) = (bytemuck::cast_slice_mut(&mut keys), bytemuck::cast_slice_mut(&mut values));
    for start in (task.start..task.end).step_by(MAX_TILE) {
        let count = MAX_TILE.min(task.end - start);
        let seen = task.seen_of::<ROWS>(0, start, count);
        t.find_factors(task, start, count);
        t.look_ahead(task, &task.value, start, start + count);
        for at in (0..count).step_by(key_stretch) {
            let end = count.min(at + key_stretch);
            find(isa, task, (&task.key, key_way), start, (at, end), keys, &mut t.keys);
            if !key_way.asks_ahead() {
                ask(isa, &t.ahead[at..end], task.value.tables.row_bytes);
            }
            if !key_way.sums_squares() {
                scores::norms(isa, task, t, (at, end));
            }
            scores::score(isa, task, t, key_way, 0, (start, &within(&seen, at, end)[..m]));
        }
        softmax::soften(isa, t, &mut partial, 0, &seen[..m]);
        let units = values::weigh(isa, t, value_way, &seen[..m]);
        // Also of the task after this one, which the same thread is likely to do.
        let end = task.seen[m - 1].1;
        t.look_ahead(task, &task.key, start + count, end.min(start + count + MAX_TILE));
        for at in (0..count).step_by(value_stretch) {
            let end = count.min(at + value_stretch);
            find(isa, task, (&task.value, value_way), start, (at, end), values, &mut t.values);
            if !value_way.asks_ahead() {
                ask(isa, &t.ahead[at..end], task.key.tables.row_bytes);
            }
            values::add(isa, task, t, (value_way, units), &mut partial, 0, &within(&seen, at, end)[..m]);
        }
    }
    task.rows.restore::<S>(&mut partial.out, d);
    partial
}

/// What is seen of positions `from..to`.
fn within(seen: &[(usize, usize); ROWS], from: usize, to: usize) -> [(usize, usize); ROWS] {
    seen.map(|(a, b)| (a.max(from), b.min(to)))
}
