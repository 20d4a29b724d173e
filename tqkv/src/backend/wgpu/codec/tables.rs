//! What kernels look up of a codec: signs, levels, boundaries, and cells that spare the search for a code.

use super::key::Stored;
use crate::backend::wgpu::wgsl::builder::Builder;
use crate::format::RowFormat;

/// Vectors of four words that signs take.
const SIGNS: usize = 8;

/// The tables of a row that has a codebook, as [`declare_all`] declares them.
pub fn words(row: &RowFormat) -> Vec<u32> {
    let Some(book) = row.codebook() else { return vec![0; 4] };
    // Above the last boundary there is none.
    let bounds = book.boundaries.iter().copied().chain([f32::MAX]);
    let floats = book.levels.iter().copied().chain(bounds);
    row.signs().into_iter().chain(floats.map(f32::to_bits)).chain(CellTable::new(row).cells).collect()
}

/// Declares the binding `{p}_tables`: signs and levels.
pub fn declare(b: &mut Builder, s: &Stored, p: &str) {
    b.tables(&format!("{p}_tables"), &[("signs", "u32", SIGNS), ("levels", "f32", s.book_vectors())]);
}

/// The same, and what finds codes.
pub fn declare_all(b: &mut Builder, s: &Stored, p: &str) {
    let (levels, cells) = (s.book_vectors(), CellTable::new(&s.format()).cells.len() / 4);
    let fields =
        [("signs", "u32", SIGNS), ("levels", "f32", levels), ("bounds", "f32", levels), ("cells", "u32", cells)];
    b.tables(&format!("{p}_tables"), &fields);
}

/// Equal cells over the boundaries, so narrow that each holds one at most: the cell of an element, and one comparison, give
/// its code.
pub(super) struct CellTable {
    /// An element's cell is the last cell · (element · scale + shift), rounded, where what is in brackets is between 0 and 1.
    pub scale: f32,
    pub shift: f32,
    pub last: f32,
    /// By cell: how many boundaries lie in cells before it.
    pub cells: Vec<u32>,
}

impl CellTable {
    pub fn new(row: &RowFormat) -> Self {
        let bounds = row.codebook().map_or(&[][..], |book| &book.boundaries);
        let (Some(&low), Some(&high)) = (bounds.first(), bounds.last()) else {
            return CellTable { scale: 1.0, shift: 0.0, last: 1.0, cells: vec![0; 4] };
        };
        let gap = bounds.windows(2).map(|w| w[1] - w[0]).fold(f32::INFINITY, f32::min);
        let mut scale = 1.01 / gap;
        loop {
            // The lowest boundary lies in cell 1.
            let shift = 0.87 - low * scale;
            let cell = |b: f32| (b * scale + shift + 0.5) as u32;
            // No boundary so near a cell's edge that a device's rounding could move it into another.
            let clear = bounds.iter().all(|&b| (1e-3..=0.999).contains(&(b * scale + shift + 0.5).fract()));
            if clear && bounds.windows(2).all(|w| cell(w[0]) != cell(w[1])) {
                let last = (cell(high) + 1) as f32;
                let before = |i| bounds.iter().filter(|&&b| cell(b) < i).count() as u32;
                // A power of two, so that a mask keeps whatever comes within the table.
                let cells = (0..(cell(high) + 2).next_power_of_two().max(4)).map(before).collect();
                return CellTable { scale: scale / last, shift: shift / last, last, cells };
            }
            scale *= 1.003;
        }
    }
}
