//! A task, done with an instruction set.

use super::query::ROWS;
use super::task::{Partial, Task};
use super::tile::Tile;
use super::{few, many};
use crate::backend::cpu::isa::{Job, Simd};

pub(super) struct Attend<'a>(pub &'a Task<'a>);

impl Job for Attend<'_> {
    type Output = Partial;
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) -> Partial {
        let (mut tile, task) = (Tile::new(), self.0);
        if task.seen.len() <= ROWS { few::few(isa, task, &mut tile) } else { many::many(isa, task, &mut tile) }
    }
}
