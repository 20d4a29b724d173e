//! A piece of work, and what comes of it.

use crate::backend::cpu::codec::RowTables;
use crate::backend::cpu::memory::RowView;
use crate::problem::Batch;

/// K or V of one KV head of the sequence.
pub(super) struct HeadRows<'a> {
    pub tables: &'a RowTables,
    pub codes: &'a RowView<'a>,
    pub scales: &'a RowView<'a>,
    /// Rows of a page: KV heads times positions.
    pub page_rows: usize,
    /// Rows of a page before those of this head.
    pub first_row: usize,
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
    pub scale: f64,
    pub softcap: Option<f64>,
}

impl Task<'_> {
    /// Elements of a row.
    pub fn d(&self) -> usize {
        self.key.tables.d
    }

    /// Positions `from..to` counted from `start`, page by page, as rows of one page lie one after the other: the first
    /// position, how many, and the first one's row.
    pub fn pages(
        &self,
        side: &HeadRows,
        start: usize,
        (from, to): (usize, usize),
    ) -> impl Iterator<Item = (usize, usize, usize)> {
        let mut i = from;
        std::iter::from_fn(move || {
            if i == to {
                return None;
            }
            let (page, slot) = self.batch.locate(self.sequence, start + i);
            let n = (self.batch.page_size() - slot).min(to - i);
            i += n;
            Some((i - n, n, page * side.page_rows + side.first_row + slot))
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
    /// Σ p·v, D floats a row.
    pub out: Vec<f32>,
    /// The largest score.
    pub max: Vec<f64>,
    /// Σ p = Σ exp(score - max).
    pub sum: Vec<f64>,
}

impl Partial {
    /// Of nothing.
    pub fn new(rows: usize, d: usize) -> Self {
        Partial { out: vec![0.0; rows * d], max: vec![f64::NEG_INFINITY; rows], sum: vec![0.0; rows] }
    }
}
