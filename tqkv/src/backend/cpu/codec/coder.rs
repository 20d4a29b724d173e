//! Rows of one format, with the instruction set chosen when the program runs.

use super::tables::RowTables;
use super::{choose, encode, rotate};
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

    /// Stores the vector `v`, which is overwritten, as `codes` and `scales`.
    pub fn encode(&self, v: &mut [f32], codes: &mut [u8], scales: &mut [u8]) {
        if let Packing::Float(dtype) = self.row.packing() {
            return float::store(dtype, v, codes);
        }
        assert!(v.len() == self.d && codes.len() == self.row.row_bytes());
        assert!(scales.len() == self.row.scales_per_row() * self.row.scale_dtype().size());
        self.isa.run(Encode { tables: &self.tables, v, codes, scales });
    }

    /// Decodes consecutive rows into the rotated domain; without factors the levels alone.
    ///
    /// # Safety
    /// `codes` must be readable for 64 bytes past the last row.
    pub unsafe fn decode(&self, codes: *const u8, factors: Option<&[f32]>, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.d));
        assert!(factors.is_none_or(|f| f.len() == out.len() / self.d * self.row.scales_per_row()));
        self.isa.run(Decode { tables: &self.tables, codes, factors, out });
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
    v: &'a mut [f32],
    codes: &'a mut [u8],
    scales: &'a mut [u8],
}

impl Job for Encode<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        encode::encode(isa, self.tables, self.v, self.codes, self.scales);
    }
}

/// Made by `RowCoder::decode` alone, whose caller vouches for `codes`.
struct Decode<'a> {
    tables: &'a RowTables,
    codes: *const u8,
    factors: Option<&'a [f32]>,
    out: &'a mut [f32],
}

impl Job for Decode<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, isa: S) {
        // SAFETY: the promise made to `RowCoder::decode`.
        unsafe { choose::decode(isa, self.tables, self.codes, self.factors, self.out) }
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
