//! A task, done with an instruction set.

use super::task::{Partial, Task};
use super::tile::{ROWS, Tile};
use super::{few, many};
use crate::backend::cpu::isa::{Job, Simd};

pub(super) struct Attend<'a>(pub &'a Task<'a>);

impl Job for Attend<'_> {
    type Output = Partial;
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) -> Partial {
        let rows = self.0.seen.len();
        let (mut tile, mut partial) = (Tile::new(), Partial::new(rows, self.0.d()));
        if rows <= ROWS {
            few::few(isa, self.0, &mut tile, &mut partial);
        } else {
            many::many(isa, self.0, &mut tile, &mut partial);
        }
        partial
    }
}
