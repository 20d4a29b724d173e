//! More rows of queries than share the registers.

use super::kernel::ForOne;
use super::query::ROWS;
use super::task::{HeadRows, Partial, Task};
use super::tile::{MAX_TILE, Tile, find, prefetch, stretch};
use super::words::MakeReady;
use super::{scores, softmax, values};
use crate::backend::cpu::codec::Way;
use crate::backend::cpu::isa::Simd;
use crate::backend::cpu::memory::{Line, lines};

/// In short tiles, decoded once for all of them.
#[inline(always)]
pub(super) fn many<S: Simd>(isa: S, task: &Task, t: &mut Tile) -> Partial {
    let (n, d) = (task.seen.len(), task.d());
    let (key_way, value_way) = (task.rows.key_way, task.rows.value_way);
    let (key, value) = (Decoded::new::<S>(&task.key, key_way), Decoded::new::<S>(&task.value, value_way));
    let mut partial = Partial::new(n, value_way.width(d));
    let tile = stretch(key_way.prepared_bytes(d).max(value_way.prepared_bytes(d)));
    let (mut keys, mut values) = (key.room(tile), value.room(tile));
    for start in (task.start..task.end).step_by(tile) {
        let count = tile.min(task.end - start);
        let ahead = tile.min(task.end - start - count);
        t.find_factors(task, start, count);
        key.decode(isa, task, (start, count), false, &mut keys, &mut t.keys);
        prefetch(isa, task, &task.key, start + count, ahead);
        value.decode(isa, task, (start, count), true, &mut values, &mut t.values);
        prefetch(isa, task, &task.value, start + count, ahead);
        scores::norms(isa, task, t, (0, count));
        for r in (0..n).step_by(ROWS) {
            let seen = &task.seen_of::<ROWS>(r, start, count)[..ROWS.min(n - r)];
            scores::score(isa, task, t, key_way, r, (start, seen));
            softmax::soften(isa, t, &mut partial, r, seen);
            let units = values::weigh(isa, t, value_way, seen);
            values::add(isa, task, t, (value_way, units), &mut partial, r, seen);
        }
    }
    task.rows.restore::<S>(&mut partial.out, d);
    partial
}

/// K or V, decoded tile by tile.
struct Decoded<'a> {
    side: &'a HeadRows<'a>,
    way: Way,
    /// How rows are found.
    found: Way,
}

impl<'a> Decoded<'a> {
    fn new<S: Simd>(side: &'a HeadRows<'a>, way: Way) -> Self {
        let found = if way.words().is_some() { Way::of_rows::<S>(&side.tables.row) } else { way };
        Decoded { side, way, found }
    }

    /// For a tile of decoded rows, and for what they are decoded from if that is prepared.
    fn room(&self, tile: usize) -> [Vec<Line>; 2] {
        let d = self.side.tables.d;
        let found = if self.found == self.way { 0 } else { self.found.prepared_bytes(d) };
        [lines(tile * self.way.prepared_bytes(d) / 4), lines(tile * found / 4)]
    }

    /// Decodes positions `start..start + count`, words of values in pairs.
    #[inline(always)]
    fn decode<S: Simd>(
        &self,
        isa: S,
        task: &Task,
        (start, count): (usize, usize),
        in_pairs: bool,
        [room, found]: &mut [Vec<Line>; 2],
        rows: &mut [*const u8; MAX_TILE],
    ) {
        let Some(way) = self.way.words() else {
            let room = bytemuck::cast_slice_mut(room);
            return find(isa, task, (self.side, self.way), start, (0, count), room, rows);
        };
        find(isa, task, (self.side, self.found), start, (0, count), bytemuck::cast_slice_mut(found), rows);
        let (tables, width) = (self.side.tables, way.width(self.side.tables.d));
        let count = count.next_multiple_of(2);
        let room = bytemuck::cast_slice_mut(room);
        self.found.visit_words(isa, ForOne(MakeReady { tables, rows: &mut rows[..count], in_pairs, width, room }));
        // Four keys are read at a time.
        let last = rows[count - 1];
        rows[count..count.next_multiple_of(16)].fill(last);
    }
}
