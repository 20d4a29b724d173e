//! Rows of codes that each stand for a level by themselves.

use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;

/// Decodes consecutive rows of codes, one a byte or packed densely: levels, times their factors if given.
///
/// # Safety
/// `codes` must be readable for 64 bytes past the rows that `out` holds.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd, const BYTE: bool>(
    isa: S,
    tables: &RowTables,
    codes: *const u8,
    factors: Option<&[f32]>,
    out: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe {
        match tables.row.bits() {
            2 => decode_bits::<S, 2, BYTE>(isa, tables, codes, factors, out),
            3 if BYTE => decode_bits::<S, 3, BYTE>(isa, tables, codes, factors, out),
            4 => decode_bits::<S, 4, BYTE>(isa, tables, codes, factors, out),
            5 => decode_bits::<S, 5, BYTE>(isa, tables, codes, factors, out),
            6 => decode_bits::<S, 6, BYTE>(isa, tables, codes, factors, out),
            7 => decode_bits::<S, 7, BYTE>(isa, tables, codes, factors, out),
            8 => decode_bits::<S, 8, BYTE>(isa, tables, codes, factors, out),
            bits => unreachable!("no codec has rows of {bits} bits that are packed so"),
        }
    }
}

/// Rows whose codes have BITS bits.
///
/// # Safety
/// As [`decode`].
#[inline(always)]
unsafe fn decode_bits<S: Simd, const BITS: usize, const BYTE: bool>(
    isa: S,
    tables: &RowTables,
    mut codes: *const u8,
    factors: Option<&[f32]>,
    out: &mut [f32],
) {
    let step = S::LANES * if BYTE { 8 } else { BITS } / 8;
    // The elements of one factor; without factors those of a row.
    let segment = if factors.is_some() { tables.d / tables.scales_per_row } else { tables.d };
    let levels = isa.levels::<BITS>(tables.levels());
    for (s, out) in out.chunks_exact_mut(segment).enumerate() {
        let factor = isa.splat(factors.map_or(1.0, |factors| factors[s]));
        let (out, mut i) = (out.as_mut_ptr(), 0);
        // SAFETY: the caller's promise about codes; whole vectors within a segment, which is a multiple of 16.
        unsafe {
            while i + 4 * S::LANES <= segment {
                let x = isa.decode4::<BITS, BYTE>(codes, &levels);
                for j in 0..4 {
                    let x = if factors.is_some() { isa.mul(x[j], factor) } else { x[j] };
                    isa.store(out.add(i + j * S::LANES), x);
                }
                (i, codes) = (i + 4 * S::LANES, codes.add(4 * step));
            }
            while i < segment {
                let x = isa.decode::<BITS, BYTE>(codes, &levels);
                isa.store(out.add(i), if factors.is_some() { isa.mul(x, factor) } else { x });
                (i, codes) = (i + S::LANES, codes.add(step));
            }
        }
    }
}
