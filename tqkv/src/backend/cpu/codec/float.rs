//! Rows of floats.

use super::interface::Read;
use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;

/// A vector of floats of SIZE bytes.
///
/// # Safety
/// They must be readable from float `i` on.
#[inline(always)]
unsafe fn load<S: Simd, const SIZE: usize>(isa: S, from: *const u8, i: usize) -> S::F {
    // SAFETY: the caller's promise.
    unsafe { if SIZE == 4 { isa.load(from.cast::<f32>().add(i)) } else { isa.load_f16(from.cast::<u16>().add(i)) } }
}

/// Decodes consecutive rows, which are one run of floats of SIZE bytes.
///
/// # Safety
/// `from` must be readable for as many floats as `out` holds.
#[inline(always)]
pub(super) unsafe fn decode<S: Simd, const SIZE: usize>(isa: S, from: *const u8, out: &mut [f32]) {
    for i in (0..out.len()).step_by(S::LANES) {
        // SAFETY: the caller's promise; whole vectors, as rows are multiples of 16.
        unsafe { isa.store(out.as_mut_ptr().add(i), load::<S, SIZE>(isa, from, i)) };
    }
}

/// Floats of 32 bits: what rows of any codec are once they are decoded.
pub(super) type Decoded = Floats<4>;

/// Floats of 16 bits, from the pool.
pub(super) type Halves = Floats<2>;

/// Floats of SIZE bytes.
pub(super) struct Floats<const SIZE: usize>;

impl<const SIZE: usize> Read for Floats<SIZE> {
    const RUN: usize = if SIZE == 2 { 4 } else { 1 };
    const GROUP: usize = Self::RUN;
    const IN_POOL: bool = SIZE == 2;
    const SQUARES: bool = SIZE == 2;
    type Table<'t, S: Simd> = ();

    #[inline(always)]
    fn table<S: Simd>(_: S, _: &RowTables) {}

    #[inline(always)]
    unsafe fn vectors<S: Simd, const N: usize>(isa: S, _: &(), row: *const u8, first: usize, c: usize) -> [S::F; N] {
        let mut out = [isa.splat(0.0); N];
        for (n, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            *out = unsafe { load::<S, SIZE>(isa, row, first + (c + n) * S::LANES) };
        }
        out
    }
}
