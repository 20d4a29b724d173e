//! A code a byte.

use super::levels;
use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;

/// Decodes consecutive rows.
///
/// # Safety
/// `codes` must be readable for 64 bytes past the rows that `out` holds.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd>(
    isa: S,
    tables: &RowTables,
    codes: *const u8,
    factors: Option<&[f32]>,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match tables.row.bits() {
            2 => levels::decode::<S, 2, true>(isa, tables, codes, factors, out),
            3 => levels::decode::<S, 3, true>(isa, tables, codes, factors, out),
            4 => levels::decode::<S, 4, true>(isa, tables, codes, factors, out),
            5 => levels::decode::<S, 5, true>(isa, tables, codes, factors, out),
            6 => levels::decode::<S, 6, true>(isa, tables, codes, factors, out),
            7 => levels::decode::<S, 7, true>(isa, tables, codes, factors, out),
            _ => levels::decode::<S, 8, true>(isa, tables, codes, factors, out),
        }
    }
}

pub(super) fn pack(codes: &[u8], row: &mut [u8]) {
    row.copy_from_slice(codes);
}
