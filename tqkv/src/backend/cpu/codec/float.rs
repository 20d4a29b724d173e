//! Rows of floats.

use super::interface::Read;
use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;

/// Decodes consecutive rows, which are one run of floats of SIZE bytes.
///
/// # Safety
/// `from` must be readable for as many floats as `out` holds.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd, const SIZE: usize>(isa: S, from: *const u8, out: &mut [f32]) {
    for i in (0..out.len()).step_by(S::LANES) {
        // SAFETY: the caller's promise; whole vectors, as rows are multiples of 16.
        unsafe {
            let x =
                if SIZE == 4 { isa.load(from.cast::<f32>().add(i)) } else { isa.load_f16(from.cast::<u16>().add(i)) };
            isa.store(out.as_mut_ptr().add(i), x);
        }
    }
}

/// Floats of 32 bits: what rows of any codec are once they are decoded.
pub(super) struct Decoded;

impl Read for Decoded {
    const RUN: usize = 1;
    const GROUP: usize = 1;
    const IN_POOL: bool = false;
    const SQUARES: bool = false;
    type Table<'t, S: Simd> = ();

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &RowTables) {}

    #[inline(always)]
    unsafe fn vectors<S: Simd, const N: usize>(isa: S, _: &(), row: *const u8, first: usize, c: usize) -> [S::F; N] {
        let mut out = [isa.splat(0.0); N];
        for (n, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *out = unsafe { isa.load(row.cast::<f32>().add(first + (c + n) * S::LANES)) };
        }
        out
    }
}

/// Floats of 16 bits, from the pool.
pub(super) struct Halves;

impl Read for Halves {
    const RUN: usize = 4;
    const GROUP: usize = 4;
    const IN_POOL: bool = true;
    const SQUARES: bool = true;
    type Table<'t, S: Simd> = ();

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &RowTables) {}

    #[inline(always)]
    unsafe fn vectors<S: Simd, const N: usize>(isa: S, _: &(), row: *const u8, first: usize, c: usize) -> [S::F; N] {
        let mut out = [isa.splat(0.0); N];
        for (n, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *out = unsafe { isa.load_f16(row.cast::<u16>().add(first + (c + n) * S::LANES)) };
        }
        out
    }
}
