//! Codes one after the other, bit by bit.

use super::interface::Read;
use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;

/// Eight codes of `bits` bits each at a time: neighbours together, then pairs, then fours.
#[inline(always)]
pub(super) fn pack(codes: &[u8], bits: usize, row: &mut [u8]) {
    for (eight, out) in codes.as_chunks::<8>().0.iter().zip(row.chunks_exact_mut(bits)) {
        let x = u64::from_le_bytes(*eight);
        let x = x & 0x00ff_00ff_00ff_00ff | (x >> 8 & 0x00ff_00ff_00ff_00ff) << bits;
        let x = x & 0x0000_ffff_0000_ffff | (x >> 16 & 0x0000_ffff_0000_ffff) << (2 * bits);
        let x = x & 0xffff_ffff | x >> 32 << (4 * bits);
        out.copy_from_slice(&x.to_le_bytes()[..bits]);
    }
}

/// Codes of 2 bits, or nibbles: eight vectors from one register of codes. Lane l holds elements 8 l to 8 l + 7 of a run, and
/// vector c their elements c.
pub(super) struct Runs<const BITS: usize>;

impl<const BITS: usize> Read for Runs<BITS> {
    const RUN: usize = 8;
    const GROUP: usize = 1;
    const IN_POOL: bool = true;
    const SQUARES: bool = false;
    type Table<'t, S: Simd> = S::F;

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> S::F {
        // SAFETY: the table is longer than any vector.
        unsafe { isa.load(tables.levels().levels.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn vectors<S: Simd, const N: usize>(
        isa: S,
        table: &S::F,
        row: *const u8,
        first: usize,
        c: usize,
    ) -> [S::F; N] {
        let mut out = [isa.splat(0.0); N];
        // SAFETY: the caller's promise; a run is LANES integers of 16 or 32 bits.
        let run = unsafe {
            let codes = row.add(first * BITS / 8);
            if BITS == 2 { isa.load_words(codes) } else { isa.load_integers(codes) }
        };
        for (n, out) in out.iter_mut().enumerate() {
            *out = isa.look_up(*table, isa.right(run, ((c + n) * BITS) as i32));
        }
        out
    }
}

/// Codes of more bits: four vectors at a time.
pub(super) struct Groups<const BITS: usize>;

impl<const BITS: usize> Read for Groups<BITS> {
    const RUN: usize = 4;
    const GROUP: usize = 4;
    const IN_POOL: bool = true;
    const SQUARES: bool = false;
    type Table<'t, S: Simd> = S::Levels<'t>;

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> S::Levels<'_> {
        isa.levels::<BITS>(tables.levels())
    }

    #[inline(always)]
    unsafe fn vectors<S: Simd, const N: usize>(
        isa: S,
        table: &S::Levels<'_>,
        row: *const u8,
        first: usize,
        c: usize,
    ) -> [S::F; N] {
        let mut out = [isa.splat(0.0); N];
        // SAFETY: the caller's promise.
        out.copy_from_slice(&unsafe { isa.decode4::<BITS, false>(row.add((first + c * S::LANES) * BITS / 8), table) });
        out
    }
}
