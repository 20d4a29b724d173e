//! What attention knows of a codec.

use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;

/// Rows that a kernel multiplies as it reads them, from the pool or from where they were prepared. A type without values, so that
/// kernels are compiled for each.
///
/// Elements come as vectors without their row's factor, which kernels multiply sums with; a row that has one factor has elements
/// of unit variance. A vector may depend on any bytes of its row.
pub(in crate::backend::cpu) trait Read: 'static {
    /// Vectors of a run. A row is whole runs. Within a run the codec chooses the order of the elements (`Way::reorder`).
    const RUN: usize;
    /// Vectors that are decoded together, as one by one they would cost more.
    const GROUP: usize;
    /// Whether rows lie in the pool, so that those ahead are asked for while these are read.
    const IN_POOL: bool;
    /// Whether rows lie in the pool and have no factor that tells their norm: kernels sum their squares.
    const SQUARES: bool;
    /// What stays in registers.
    type Table<'t, S: Simd>: Copy;

    fn table<S: Simd>(isa: S, tables: &RowTables) -> Self::Table<'_, S>;

    /// N vectors from vector `c` on of the run that starts at element `first`; N is a multiple of `GROUP`, and past the run's end
    /// only where a run is one vector.
    ///
    /// # Safety
    /// `row` must be a row of this kind, readable for 64 bytes past its end; the vectors must be within it.
    unsafe fn vectors<S: Simd, const N: usize>(
        isa: S,
        table: &Self::Table<'_, S>,
        row: *const u8,
        first: usize,
        c: usize,
    ) -> [S::F; N];
}

/// What is done for rows of some kind.
pub(in crate::backend::cpu) trait Visit {
    type Output;
    fn visit<S: Simd, R: Read>(self, isa: S) -> Self::Output;
}

/// Elements of a vector of words.
pub(in crate::backend::cpu) const WORDS: usize = 32;

/// Rows of one packing, as words. A type without values, so that kernels are compiled for each.
pub(in crate::backend::cpu) trait Words: 'static {
    /// Vectors that are made from one vector of codes: 1, 2 or 4.
    const GROUP: usize;
    type Table<'t, S: Simd>: Copy;

    fn table<S: Simd>(isa: S, tables: &RowTables) -> Self::Table<'_, S>;

    /// Vector `C` of a group.
    ///
    /// # Safety
    /// `row` must be a row of this kind, readable for 64 bytes past its end, and `group` be one of its groups.
    unsafe fn words<S: Simd, const C: usize>(isa: S, table: &Self::Table<'_, S>, row: *const u8, group: usize) -> S::I;

    /// The same of two rows, paired.
    ///
    /// # Safety
    /// As for `words`, for both rows.
    #[inline(always)]
    unsafe fn pairs<S: Simd, const C: usize>(
        isa: S,
        table: &Self::Table<'_, S>,
        rows: [*const u8; 2],
        group: usize,
    ) -> [S::I; 2] {
        // Not with a closure, which would be a function without the instructions.
        // SAFETY: the caller's promise.
        let (a, b) = unsafe {
            (Self::words::<S, C>(isa, table, rows[0], group), Self::words::<S, C>(isa, table, rows[1], group))
        };
        isa.pair_words(a, b)
    }

    /// Whether keys are read four at a time, each in a quarter of a vector, which makes the sums of their lanes cheap: a vector is
    /// then eight elements of each.
    const QUARTERS: bool = false;
    /// Such vectors of a group.
    const QUARTER_GROUP: usize = Self::GROUP;

    /// Vector `C` of a group of four rows.
    ///
    /// # Safety
    /// As for `words`, for all rows.
    #[inline(always)]
    unsafe fn quarters<S: Simd, const C: usize>(
        _isa: S,
        _table: &Self::Table<'_, S>,
        _rows: [*const u8; 4],
        _group: usize,
    ) -> S::I {
        unreachable!("only where `QUARTERS` is set")
    }
}

/// What is done for rows of some packing.
pub(in crate::backend::cpu) trait VisitWords {
    type Output;
    fn visit<S: Simd, W: Words>(self, isa: S) -> Self::Output;
}
