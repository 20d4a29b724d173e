//! A piece of work, and what comes of it.

use super::query::QueryRows;
use crate::backend::cpu::codec::RowTables;
use crate::backend::cpu::rows::{PoolView, Run};
use crate::problem::Batch;

/// K or V of one KV head of the sequence.
pub(super) struct HeadRows<'a> {
    pub tables: &'a RowTables,
    pub rows: &'a PoolView<'a>,
    pub head: usize,
}

/// Attention of `seen.len()` rows over positions `start..end`.
pub(super) struct Task<'a> {
    /// Rows of D floats, in the rotated domain, each divided by its unit.
    pub q: &'a [f32],
    pub units: &'a [f64],
    /// Norms of the rows times their units.
    pub norms: &'a [f64],
    /// What is added to their scores before a softcap; without one it is left to the end.
    pub biases: &'a [f64],
    /// The positions that each row sees.
    pub seen: &'a [(usize, usize)],
    pub start: usize,
    pub end: usize,
    pub batch: &'a Batch,
    pub sequence: usize,
    pub key: HeadRows<'a>,
    pub value: HeadRows<'a>,
    /// The same rows as kernels read them.
    pub rows: &'a QueryRows,
    pub scale: f64,
    pub softcap: Option<f64>,
}

impl Task<'_> {
    /// Elements of a row.
    pub fn d(&self) -> usize {
        self.key.tables.d
    }

    /// Positions `from..to` counted from `start`, by runs of rows that lie one after the other, as those of a page mostly do: the
    /// first position, and the run.
    #[inline(always)]
    pub fn runs<'a>(
        &'a self,
        side: &'a HeadRows,
        start: usize,
        (from, to): (usize, usize),
    ) -> impl Iterator<Item = (usize, Run<'a>)> {
        let mut i = from;
        std::iter::from_fn(move || {
            if i == to {
                return None;
            }
            let (page, slot) = self.batch.locate(self.sequence, start + i);
            let most = side.rows.in_a_row((self.batch.page_size() - slot).min(to - i));
            let run = side.rows.run(side.rows.at(page, side.head, slot), most);
            i += run.rows;
            Some((i - run.rows, run))
        })
    }

    /// What up to four rows from `r` on see of the `count` positions from `start` on, counted from there.
    pub fn seen_of<const ROWS: usize>(&self, r: usize, start: usize, count: usize) -> [(usize, usize); ROWS] {
        let mut seen = [(0, 0); ROWS];
        for (seen, &(from, to)) in seen.iter_mut().zip(&self.seen[r..]) {
            *seen = (from.max(start) - start, to.min(start + count).saturating_sub(start));
        }
        seen
    }
}

/// What comes of it for each row.
pub(super) struct Partial {
    /// Σ p·v: rows of `width` floats as values are read, and of D in order in the end.
    pub out: Vec<f32>,
    pub width: usize,
    /// The largest score.
    pub max: Vec<f64>,
    /// Σ p = Σ exp(score - max).
    pub sum: Vec<f64>,
}

impl Partial {
    /// Of nothing.
    pub fn new(rows: usize, width: usize) -> Self {
        Partial { out: vec![0.0; rows * width], width, max: vec![f64::NEG_INFINITY; rows], sum: vec![0.0; rows] }
    }
}
