//! Codecs: how rows are rotated, encoded, decoded, and read by attention. Each packing is a file, and this is the one place that
//! tells them apart.

mod coder;
mod dense;
mod encode;
mod float;
mod interface;
mod levels;
mod planes;
mod rotate;
mod tables;
mod words;

pub(super) use coder::RowCoder;
pub(super) use encode::Vector;
pub(super) use interface::{Read, Visit, VisitWords, WORDS, Words};
pub(super) use tables::RowTables;
pub(super) use words::WordWay;

use crate::backend::cpu::isa::{Job, Simd};
use crate::format::{DType, Packing, RowFormat};

/// Decodes consecutive rows into the rotated domain: elements times their factors, one for each scale, or without any.
///
/// # Safety
/// `codes` must be readable for 64 bytes past the rows that `out` holds.
#[inline(always)]
unsafe fn decode<S: Simd>(isa: S, tables: &RowTables, codes: *const u8, factors: Option<&[f32]>, out: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match tables.row.packing() {
            Packing::Float(DType::F32) => float::decode::<S, 4>(isa, codes, out),
            Packing::Float(_) => float::decode::<S, 2>(isa, codes, out),
            Packing::Byte => levels::decode::<S, true>(isa, tables, codes, factors, out),
            Packing::Planes => planes::decode(isa, tables, codes, factors, out),
            Packing::Dense => levels::decode::<S, false>(isa, tables, codes, factors, out),
        }
    }
}

/// Packs a code a byte, each below 2^bits, into a row.
#[inline(always)]
fn pack(row: &RowFormat, codes: &[u8], out: &mut [u8]) {
    match row.packing() {
        Packing::Byte => out.copy_from_slice(codes),
        Packing::Planes => planes::pack(codes, out),
        Packing::Dense => dense::pack(codes, row.bits(), out),
        Packing::Float(_) => unreachable!("floats have no codes"),
    }
}

/// How attention reads rows of a format with an instruction set.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Way {
    /// From the pool: runs of 2 bits or nibbles, groups of more, floats of 16 bits.
    Runs2,
    Runs4,
    Groups5,
    Groups6,
    Groups7,
    Groups8,
    Halves,
    /// Runs of nibbles, made of planes.
    Planes,
    /// Decoded to f32.
    Decoded,
    /// As words, from the pool, or from nibbles that are made of planes; and decoded to words.
    Words(WordWay),
    PlaneWords(WordWay),
    ReadyWords(WordWay),
}

impl Way {
    /// For up to four rows of queries; `words` says whether their precision allows words.
    pub fn of_keys<S: Simd>(row: &RowFormat, words: bool) -> Self {
        Way::of::<S>(row, WordWay::of_keys::<S>(row).filter(|_| words))
    }

    /// As `of_keys`.
    pub fn of_values<S: Simd>(row: &RowFormat, words: bool) -> Self {
        Way::of::<S>(row, WordWay::of_values::<S>(row).filter(|_| words))
    }

    /// What words are made from, row by row, for many rows of queries.
    pub fn of_rows<S: Simd>(row: &RowFormat) -> Self {
        Way::of::<S>(row, WordWay::of::<S>(row))
    }

    fn of<S: Simd>(row: &RowFormat, words: Option<WordWay>) -> Self {
        if let Some(way) = words {
            let nibbles = row.packing() == Packing::Planes && way.reads_nibbles();
            return if nibbles { Way::PlaneWords(way) } else { Way::Words(way) };
        }
        let runs = row.row_dim().is_multiple_of(8 * S::LANES);
        // Four vectors at a time, sixteen sums and a codebook fill 32 registers.
        let groups = S::LANES == 16 && row.row_dim().is_multiple_of(4 * S::LANES);
        match (row.packing(), row.bits()) {
            (Packing::Float(DType::F16), _) if groups => Way::Halves,
            // Several factors a row cannot be pulled out of its sums.
            _ if row.scales_per_row() != 1 => Way::Decoded,
            (Packing::Planes, _) if runs && S::LOOK_UP >= 3 => Way::Planes,
            (Packing::Dense, 2) if runs && S::LOOK_UP >= 2 => Way::Runs2,
            (Packing::Dense, 4) if runs && S::LOOK_UP >= 4 => Way::Runs4,
            (Packing::Dense, 5) if groups => Way::Groups5,
            (Packing::Dense, 6) if groups => Way::Groups6,
            (Packing::Dense, 7) if groups => Way::Groups7,
            (Packing::Dense | Packing::Byte, 8) if groups => Way::Groups8,
            _ => Way::Decoded,
        }
    }

    /// For more rows of queries, all of which read what was decoded once.
    pub fn of_many<S: Simd>(row: &RowFormat, words: bool) -> Self {
        WordWay::of::<S>(row).filter(|_| words).map_or(Way::Decoded, Way::ReadyWords)
    }

    /// How words are made, if rows are read as words.
    pub fn words(self) -> Option<WordWay> {
        match self {
            Way::Words(way) | Way::PlaneWords(way) | Way::ReadyWords(way) => Some(way),
            _ => None,
        }
    }

    /// Elements of a row of D as kernels read it.
    pub fn width(self, d: usize) -> usize {
        self.words().map_or(d, |way| way.width(d))
    }

    /// Bytes of a row of D elements once it is prepared; 0 if it is read from the pool.
    pub fn prepared_bytes(self, d: usize) -> usize {
        match self {
            Way::Decoded => 4 * d,
            Way::Planes | Way::PlaneWords(_) => d / 2,
            Way::ReadyWords(way) => 2 * way.width(d),
            _ => 0,
        }
    }

    /// Prepares consecutive rows: `to` takes `prepared_bytes` for each.
    ///
    /// # Safety
    /// `codes` must be readable for 64 bytes past as many rows.
    #[inline(always)]
    pub unsafe fn prepare<S: Simd>(
        self,
        isa: S,
        tables: &RowTables,
        codes: *const u8,
        factors: Option<&[f32]>,
        to: &mut [f32],
    ) {
        isa.run(Prepare { way: self, tables, codes, factors, to });
    }

    /// Whether rows lie in the pool, so that those ahead are asked for while these are read.
    pub fn asks_ahead(self) -> bool {
        !matches!(self, Way::Decoded | Way::ReadyWords(_))
    }

    /// Whether kernels sum the squares of rows as they read them.
    pub fn sums_squares(self) -> bool {
        self == Way::Halves
    }

    fn has_runs(self) -> bool {
        matches!(self, Way::Runs2 | Way::Runs4 | Way::Planes)
    }

    /// Elements of rows into the order in which vectors of such rows come.
    pub fn reorder<S: Simd>(self, rows: &mut [f32]) {
        if self.has_runs() {
            rows.chunks_exact_mut(8 * S::LANES).for_each(|run| transpose(run, 8));
        }
    }

    /// Undoes `reorder`.
    pub fn restore<S: Simd>(self, rows: &mut [f32]) {
        if self.has_runs() {
            rows.chunks_exact_mut(8 * S::LANES).for_each(|run| transpose(run, S::LANES));
        }
    }

    /// Does it for the rows that are read this way.
    #[inline(always)]
    pub fn visit<S: Simd, V: Visit>(self, isa: S, visitor: V) -> V::Output {
        match self {
            Way::Runs2 if S::LOOK_UP >= 2 => visitor.visit::<S, dense::Runs<2>>(isa),
            Way::Runs4 | Way::Planes if S::LOOK_UP >= 3 => visitor.visit::<S, dense::Runs<4>>(isa),
            Way::Groups5 if S::LANES == 16 => visitor.visit::<S, dense::Groups<5>>(isa),
            Way::Groups6 if S::LANES == 16 => visitor.visit::<S, dense::Groups<6>>(isa),
            Way::Groups7 if S::LANES == 16 => visitor.visit::<S, dense::Groups<7>>(isa),
            Way::Groups8 if S::LANES == 16 => visitor.visit::<S, dense::Groups<8>>(isa),
            Way::Halves if S::LANES == 16 => visitor.visit::<S, float::Halves>(isa),
            _ => visitor.visit::<S, float::Decoded>(isa),
        }
    }

    /// Does it for the rows that are read this way, as words.
    #[inline(always)]
    pub fn visit_words<S: Simd, V: VisitWords>(self, isa: S, visitor: V) -> V::Output {
        match self {
            Way::Words(way) | Way::PlaneWords(way) => way.visit(isa, visitor),
            _ if S::WORDS => visitor.visit::<S, words::Ready>(isa),
            _ => unreachable!("`WordWay::of` gives no way then"),
        }
    }
}

/// Made by `Way::prepare` alone, whose caller vouches for the codes. A function of its own, so that attention is not one with it.
struct Prepare<'a> {
    way: Way,
    tables: &'a RowTables,
    codes: *const u8,
    factors: Option<&'a [f32]>,
    to: &'a mut [f32],
}

impl Job for Prepare<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        let Prepare { way, tables, codes, factors, to } = self;
        // SAFETY: the promise made to `Way::prepare`.
        unsafe {
            match way {
                Way::Planes | Way::PlaneWords(_) => {
                    planes::prepare(isa, codes, tables.d, bytemuck::cast_slice_mut(to));
                }
                _ => decode(isa, tables, codes, factors, to),
            }
        }
    }
}

/// A matrix of `columns` columns into one of as many rows.
fn transpose(x: &mut [f32], columns: usize) {
    let mut old = [0f32; 8 * 16];
    let (old, rows) = (&mut old[..x.len()], x.len() / columns);
    old.copy_from_slice(x);
    for (i, x) in x.iter_mut().enumerate() {
        *x = old[i % rows * columns + i / rows];
    }
}
