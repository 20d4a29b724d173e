//! Rows of codes as words: levels in integers of 16 bits, whose products are twice as many an instruction as those of floats.
//!
//! A vector of words holds 32 elements. Rows are padded to whole groups: what is decoded past their end meets queries of zero,
//! or sums that nobody reads.

use super::interface::{VisitWords, WORDS, Words};
use super::planes::Planes;
use super::tables::RowTables;
use crate::backend::cpu::isa::{Simd, word_of_pair};
use crate::format::{Packing, RowFormat};

/// Codes of 2 bits, or nibbles, of four keys; a group is sixteen bytes of each.
pub(super) struct Quarters<const BITS: usize>;

impl<const BITS: usize> Words for Quarters<BITS> {
    const GROUP: usize = 16 / BITS;
    const QUARTERS: bool = true;
    type Table<'t, S: Simd> = [S::I; 4];

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> [S::I; 4] {
        isa.word_levels::<BITS>(tables.levels())
    }

    #[inline(always)]
    unsafe fn words<S: Simd, const C: usize>(_: S, _: &[S::I; 4], _: *const u8, _: usize) -> S::I {
        unreachable!("keys are read four at a time")
    }

    #[inline(always)]
    unsafe fn quarters<S: Simd, const C: usize>(isa: S, table: &[S::I; 4], rows: [*const u8; 4], group: usize) -> S::I {
        let at = 16 * group;
        // SAFETY: the caller's promise.
        let codes = unsafe { isa.load_quarters([rows[0].add(at), rows[1].add(at), rows[2].add(at), rows[3].add(at)]) };
        isa.look_up_words::<BITS>(table, shifted::<S, BITS, C>(isa, codes))
    }
}

/// Codes of 2 bits, or nibbles, of two values, paired before they are looked up; a group is 32 bytes of each, and two of a word's
/// codes are a pair of vectors.
pub(super) struct Paired<const BITS: usize>;

impl<const BITS: usize> Words for Paired<BITS> {
    const GROUP: usize = 8 / BITS;
    type Table<'t, S: Simd> = [S::I; 4];

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> [S::I; 4] {
        isa.word_levels::<BITS>(tables.levels())
    }

    #[inline(always)]
    unsafe fn words<S: Simd, const C: usize>(_: S, _: &[S::I; 4], _: *const u8, _: usize) -> S::I {
        unreachable!("values are read two at a time")
    }

    #[inline(always)]
    unsafe fn pairs<S: Simd, const C: usize>(
        isa: S,
        table: &[S::I; 4],
        rows: [*const u8; 2],
        group: usize,
    ) -> [S::I; 2] {
        // SAFETY: the caller's promise.
        let codes = unsafe { isa.load_paired([rows[0].add(32 * group), rows[1].add(32 * group)]) };
        let first = if C == 0 { codes } else { isa.right_words(codes, (2 * C * BITS) as i32) };
        let second = isa.right_words(codes, ((2 * C + 1) * BITS) as i32);
        [isa.look_up_words::<BITS>(table, first), isa.look_up_words::<BITS>(table, second)]
    }
}

/// PER codes of BITS bits in each byte; a group is 32 bytes.
pub(super) struct Bytes<const BITS: usize, const PER: usize>;

impl<const BITS: usize, const PER: usize> Words for Bytes<BITS, PER> {
    const GROUP: usize = PER;
    type Table<'t, S: Simd> = [S::I; 4];

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> [S::I; 4] {
        isa.word_levels::<BITS>(tables.levels())
    }

    #[inline(always)]
    unsafe fn words<S: Simd, const C: usize>(isa: S, table: &[S::I; 4], row: *const u8, group: usize) -> S::I {
        // SAFETY: the caller's promise.
        let codes = unsafe { isa.load_bytes_as_words(row.add(32 * group)) };
        isa.look_up_words::<BITS>(table, shifted::<S, BITS, C>(isa, codes))
    }
}

/// Nibbles, four a word; a group is 64 bytes.
pub(super) struct Nibbles;

impl Words for Nibbles {
    const GROUP: usize = 4;
    type Table<'t, S: Simd> = [S::I; 4];

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> [S::I; 4] {
        isa.word_levels::<4>(tables.levels())
    }

    #[inline(always)]
    unsafe fn words<S: Simd, const C: usize>(isa: S, table: &[S::I; 4], row: *const u8, group: usize) -> S::I {
        // SAFETY: the caller's promise.
        let codes = unsafe { isa.load_integers(row.add(64 * group)) };
        isa.look_up_words::<4>(table, shifted::<S, 4, C>(isa, codes))
    }
}

/// Code `C` of each word in its low bits.
#[inline(always)]
fn shifted<S: Simd, const BITS: usize, const C: usize>(isa: S, codes: S::I) -> S::I {
    if C == 0 { codes } else { isa.right_words(codes, (C * BITS) as i32) }
}

/// Codes of BITS bits one after the other; a group is one vector.
pub(super) struct Dense<const BITS: usize>;

impl<const BITS: usize> Words for Dense<BITS> {
    const GROUP: usize = 1;
    type Table<'t, S: Simd> = [S::I; 4];

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> [S::I; 4] {
        isa.word_levels::<BITS>(tables.levels())
    }

    #[inline(always)]
    unsafe fn words<S: Simd, const C: usize>(isa: S, table: &[S::I; 4], row: *const u8, group: usize) -> S::I {
        // SAFETY: the caller's promise.
        let codes = unsafe { isa.spread_words::<BITS>(row.add(4 * BITS * group)) };
        isa.look_up_words::<BITS>(table, codes)
    }
}

/// Rows that are words already: keys each for itself, values in pairs of rows, of which the first is pointed to.
pub(super) struct Ready;

impl Words for Ready {
    const GROUP: usize = 1;
    type Table<'t, S: Simd> = ();

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &RowTables) {}

    #[inline(always)]
    unsafe fn words<S: Simd, const C: usize>(isa: S, _: &(), row: *const u8, group: usize) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { isa.load_integers(row.add(64 * group)) }
    }

    #[inline(always)]
    unsafe fn pairs<S: Simd, const C: usize>(isa: S, _: &(), [row, _]: [*const u8; 2], group: usize) -> [S::I; 2] {
        // SAFETY: the caller's promise.
        unsafe { [isa.load_integers(row.add(128 * group)), isa.load_integers(row.add(128 * group + 64))] }
    }
}

/// How rows of a format become words.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::backend::cpu) enum WordWay {
    /// Keys by four, and values by two.
    Quarters2,
    Quarters4,
    Paired2,
    Paired4,
    QuarterPlanes,
    PairedPlanes,
    Nibbles,
    Bytes2,
    Bytes4,
    /// One code of up to five bits a byte.
    Bytes5,
    Bytes6,
    Bytes8,
    Dense2,
    Dense4,
    Dense5,
    Dense6,
    Dense7,
}

impl WordWay {
    /// For keys of which each is used a few times.
    pub fn of_keys<S: Simd>(row: &RowFormat) -> Option<Self> {
        Some(match (row.packing(), row.bits()) {
            _ if WordWay::of::<S>(row).is_none() => return None,
            (Packing::Dense, 4) => WordWay::Quarters4,
            (Packing::Planes, _) => WordWay::QuarterPlanes,
            (Packing::Dense, 2) => WordWay::Quarters2,
            _ => return WordWay::of::<S>(row),
        })
    }

    /// For values of which each is used a few times.
    pub fn of_values<S: Simd>(row: &RowFormat) -> Option<Self> {
        let whole = |elements: usize| row.row_dim().is_multiple_of(elements);
        Some(match (row.packing(), row.bits()) {
            _ if WordWay::of::<S>(row).is_none() => return None,
            (Packing::Planes, _) if whole(128) => WordWay::PairedPlanes,
            (Packing::Dense, 4) | (Packing::Planes, _) if whole(64) => WordWay::Paired4,
            (Packing::Dense, 2) if whole(128) => WordWay::Paired2,
            _ => return WordWay::of::<S>(row),
        })
    }

    /// Row by row; `None` if rows of this format are no words, or do not become words quickly.
    pub fn of<S: Simd>(row: &RowFormat) -> Option<Self> {
        if !S::WORDS || row.scales_per_row() != 1 {
            return None;
        }
        let whole = |elements: usize| row.row_dim().is_multiple_of(elements);
        Some(match (row.packing(), row.bits()) {
            // Planes are made nibbles first.
            (Packing::Dense, 4) | (Packing::Planes, _) if whole(4 * WORDS) => WordWay::Nibbles,
            (Packing::Dense, 4) | (Packing::Planes, _) if whole(2 * WORDS) => WordWay::Bytes4,
            (Packing::Dense, 4) | (Packing::Planes, _) => WordWay::Dense4,
            (Packing::Dense, 2) if whole(4 * WORDS) => WordWay::Bytes2,
            (Packing::Dense, 2) => WordWay::Dense2,
            (Packing::Dense, 5) => WordWay::Dense5,
            (Packing::Dense, 6) => WordWay::Dense6,
            (Packing::Dense, 7) => WordWay::Dense7,
            (Packing::Byte, ..=5) => WordWay::Bytes5,
            (Packing::Byte, 6) => WordWay::Bytes6,
            (Packing::Byte | Packing::Dense, 8) => WordWay::Bytes8,
            _ => return None,
        })
    }

    /// Vectors of a group.
    fn group(self) -> usize {
        match self {
            // In all vectors of a group there are 128 / BITS elements of each key.
            WordWay::Quarters4 => 1,
            WordWay::Quarters2 | WordWay::QuarterPlanes => 2,
            WordWay::Nibbles | WordWay::Bytes2 | WordWay::Paired2 | WordWay::PairedPlanes => 4,
            WordWay::Bytes4 | WordWay::Paired4 => 2,
            _ => 1,
        }
    }

    /// Elements of a row of `d` with its padding.
    pub fn width(self, d: usize) -> usize {
        d.next_multiple_of(self.group() * WORDS)
    }

    /// The element that word `at` of a row stands for; those from D on stand for none.
    pub fn element(self, at: usize) -> usize {
        if let WordWay::Quarters2 | WordWay::Quarters4 | WordWay::QuarterPlanes = self {
            let codes = if self == WordWay::Quarters4 { 4 } else { 8 };
            return at / (8 * codes) * (8 * codes) + at % 8 * codes + at / 8 % codes;
        }
        let (group, size) = (at / (self.group() * WORDS), self.group());
        let (vector, word) = (at / WORDS % size, at % WORDS);
        group * size * WORDS + word * size + vector
    }

    /// The element that place `at` of a row's sums stands for, as words are paired there.
    pub fn element_of_sum(self, at: usize) -> usize {
        if let WordWay::Paired2 | WordWay::Paired4 | WordWay::PairedPlanes = self {
            let codes = 2 * self.group();
            return at / (16 * codes) * (16 * codes) + at % 16 * codes + at / 16 % codes;
        }
        self.element(at / WORDS * WORDS + word_of_pair(at % WORDS))
    }

    /// Whether rows are nibbles, which planes are made first.
    pub fn reads_nibbles(self) -> bool {
        !matches!(self, WordWay::QuarterPlanes | WordWay::PairedPlanes)
    }

    /// Does it for the rows that are read this way.
    #[inline(always)]
    pub fn visit<S: Simd, V: VisitWords>(self, isa: S, visitor: V) -> V::Output {
        if !S::WORDS {
            unreachable!("`of` gives no way then");
        }
        match self {
            WordWay::Quarters2 => visitor.visit::<S, Quarters<2>>(isa),
            WordWay::Quarters4 => visitor.visit::<S, Quarters<4>>(isa),
            WordWay::Paired2 => visitor.visit::<S, Paired<2>>(isa),
            WordWay::Paired4 => visitor.visit::<S, Paired<4>>(isa),
            WordWay::QuarterPlanes | WordWay::PairedPlanes => visitor.visit::<S, Planes>(isa),
            WordWay::Nibbles => visitor.visit::<S, Nibbles>(isa),
            WordWay::Bytes2 => visitor.visit::<S, Bytes<2, 4>>(isa),
            WordWay::Bytes4 => visitor.visit::<S, Bytes<4, 2>>(isa),
            WordWay::Bytes5 => visitor.visit::<S, Bytes<5, 1>>(isa),
            WordWay::Bytes6 => visitor.visit::<S, Bytes<6, 1>>(isa),
            WordWay::Bytes8 => visitor.visit::<S, Bytes<8, 1>>(isa),
            WordWay::Dense2 => visitor.visit::<S, Dense<2>>(isa),
            WordWay::Dense4 => visitor.visit::<S, Dense<4>>(isa),
            WordWay::Dense5 => visitor.visit::<S, Dense<5>>(isa),
            WordWay::Dense6 => visitor.visit::<S, Dense<6>>(isa),
            WordWay::Dense7 => visitor.visit::<S, Dense<7>>(isa),
        }
    }
}
