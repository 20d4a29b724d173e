//! What kernels look up for a row format, made once a process.

use crate::backend::cpu::float;
use crate::backend::cpu::isa::LevelTable;
use crate::format::tables::tables;
use crate::format::{Codec, RowFormat, Scaling};
use std::collections::HashMap;
use std::sync::{Arc, LazyLock, PoisonError, RwLock};

/// A row format and its tables.
pub(in crate::backend::cpu) struct RowTables {
    pub row: RowFormat,
    /// Elements of a row.
    pub d: usize,
    /// Elements of a block of the transform.
    pub block: usize,
    /// Bytes of a row.
    pub row_bytes: usize,
    pub scales_per_row: usize,
    made: Arc<Made>,
}

/// By codec and row_dim.
type ByRow = HashMap<(Codec, usize), Arc<Made>>;

struct Made {
    /// -0 where an element is negated, else 0; empty if none is.
    signs: Vec<f32>,
    levels: LevelTable,
    /// Decision boundaries; infinite after the last.
    bounds: [f32; 256],
    cells: CellTable,
}

/// Cells of the line of scaled elements: `format::Cells` with integers as the bits of floats. Empty without a codebook.
#[derive(Default)]
pub(super) struct CellTable {
    pub entries: Vec<[f32; 2]>,
    pub limit: f32,
    pub per_unit: f32,
    pub first: f32,
}

impl RowTables {
    pub fn new(row: &RowFormat) -> Self {
        let (d, block) = (row.row_dim(), row.block());
        RowTables {
            row: *row,
            d,
            block,
            row_bytes: row.row_bytes(),
            scales_per_row: row.scales_per_row(),
            made: Made::of(row),
        }
    }

    pub(super) fn signs(&self) -> &[f32] {
        &self.made.signs
    }

    pub(super) fn levels(&self) -> &LevelTable {
        &self.made.levels
    }

    /// What a unit of a level's word counts.
    pub fn word(&self) -> f32 {
        self.made.levels.word
    }

    pub(super) fn bounds(&self) -> &[f32; 256] {
        &self.made.bounds
    }

    pub(super) fn cells(&self) -> &CellTable {
        &self.made.cells
    }

    /// The factors that stored scales stand for: one for each scale.
    pub fn factors(&self, scales: &[u8], out: &mut [f32]) {
        float::load(self.row.scale_dtype(), scales, out);
        if self.row.scaling() != Scaling::Corrected {
            out.iter_mut().for_each(|x| *x = self.row.factor(*x));
        }
    }
}

impl Made {
    fn of(row: &RowFormat) -> Arc<Self> {
        static MADE: LazyLock<RwLock<ByRow>> = LazyLock::new(RwLock::default);
        let key = (row.codec(), row.row_dim());
        if let Some(made) = MADE.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return made.clone();
        }
        let made = Arc::new(Made::new(row));
        MADE.write().unwrap_or_else(PoisonError::into_inner).entry(key).or_insert(made).clone()
    }

    fn new(row: &RowFormat) -> Self {
        let tables = tables(row);
        let negated = |i: usize| tables.signs[i / 32] >> (i % 32) & 1 == 1;
        let signs = match (0..row.row_dim()).any(negated) {
            true => (0..row.row_dim()).map(|i| if negated(i) { -0.0 } else { 0.0 }).collect(),
            false => vec![],
        };
        let boundaries = tables.book.map_or(&[][..], |book| &book.boundaries);
        let bounds = std::array::from_fn(|i| boundaries.get(i).copied().unwrap_or(f32::INFINITY));
        let cells = tables.cells.as_ref().map_or_else(CellTable::default, |cells| CellTable {
            entries: cells.entries.iter().map(|&(bound, below)| [bound, f32::from_bits(below)]).collect(),
            limit: cells.limit,
            per_unit: cells.per_unit,
            first: cells.first,
        });
        Made { signs, levels: LevelTable::new(tables.book), bounds, cells }
    }
}
