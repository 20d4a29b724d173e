//! Rows of one format, with the instruction set chosen when the program runs.

use super::encode::Vector;
use super::tables::RowTables;
use super::{decode, encode, rotate};
use crate::backend::cpu::float;
use crate::backend::cpu::isa::{Isa, Job, Simd};
use crate::format::{Packing, RowFormat};
use crate::problem::Direction;
use std::ops::Deref;

/// Rotates, encodes and decodes rows.
pub(in crate::backend::cpu) struct RowCoder {
    isa: Isa,
    tables: RowTables,
}

impl Deref for RowCoder {
    type Target = RowTables;

    fn deref(&self) -> &RowTables {
        &self.tables
    }
}

impl RowCoder {
    pub fn new(row: &RowFormat, isa: Isa) -> Self {
        RowCoder { isa, tables: RowTables::new(row) }
    }

    /// T·S·x or S·T·x in place, for consecutive rows.
    pub fn rotate(&self, direction: Direction, rows: &mut [f32]) {
        if self.row.is_rotated() {
            assert!(rows.len().is_multiple_of(self.d));
            self.isa.run(Rotate { tables: &self.tables, direction, rows });
        }
    }

    /// Stores a vector as `codes` and `scales`.
    pub fn encode(&self, vector: Vector, codes: &mut [u8], scales: &mut [u8]) {
        if let Packing::Float(dtype) = self.row.packing() {
            return float::store(dtype, vector.v, codes);
        }
        assert!(vector.v.len() == self.d && vector.room.len() == self.d && codes.len() == self.row_bytes);
        assert!(scales.len() == self.scales_per_row * self.row.scale_dtype().size());
        self.isa.run(Encode { tables: &self.tables, vector, codes, scales });
    }

    /// Decodes rows into the rotated domain: runs of consecutive rows, each where its codes are and how many; and the factors of
    /// all.
    ///
    /// # Safety
    /// The codes of each run must be readable for 64 bytes past its last row.
    pub unsafe fn decode(&self, runs: &[(*const u8, usize)], factors: Option<&[f32]>, out: &mut [f32]) {
        let rows: usize = runs.iter().map(|run| run.1).sum();
        assert!(out.len() == rows * self.d);
        assert!(factors.is_none_or(|f| f.len() == rows * self.scales_per_row));
        self.isa.run(Decode { tables: &self.tables, runs, factors, out });
    }

    /// Copies floats in whole vectors of 16, past the caches where the machine can and the address allows.
    pub fn stream(&self, from: &[f32], to: &mut [f32]) {
        if !to.as_ptr().addr().is_multiple_of(64) || from.len() != to.len() || !from.len().is_multiple_of(16) {
            return to.copy_from_slice(from);
        }
        self.isa.run(Stream { from, to });
    }
}

struct Rotate<'a> {
    tables: &'a RowTables,
    direction: Direction,
    rows: &'a mut [f32],
}

impl Job for Rotate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        rotate::rotate(isa, self.tables, self.direction, self.rows);
    }
}

struct Encode<'a> {
    tables: &'a RowTables,
    vector: Vector<'a>,
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl Job for Encode<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        encode::encode(isa, self.tables, self.vector, self.codes, self.scales);
    }
}

/// Made by `RowCoder::decode` alone, whose caller vouches for the codes.
struct Decode<'a> {
    tables: &'a RowTables,
    runs: &'a [(*const u8, usize)],
    factors: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Job for Decode<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        let (d, scales) = (self.tables.d, self.tables.scales_per_row);
        let mut first = 0;
        for &(codes, rows) in self.runs {
            let factors = self.factors.map(|factors| &factors[first * scales..][..rows * scales]);
            let out = &mut self.out[first * d..][..rows * d];
            // SAFETY: the promise made to `RowCoder::decode`.
            unsafe { decode(isa, self.tables, codes, factors, out) };
            first += rows;
        }
    }
}

/// Equally long, whole vectors, `to` aligned to 64 bytes.
struct Stream<'a> {
    from: &'a [f32],
    to: &'a mut [f32],
}

impl Job for Stream<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        for i in (0..self.from.len()).step_by(S::LANES) {
            // SAFETY: as `RowCoder::stream` has checked.
            unsafe { isa.stream(self.to.as_mut_ptr().add(i), isa.load(self.from.as_ptr().add(i))) }
        }
        isa.fence();
    }
}
