//! Codes of 3 bits in three planes: of eight, six are nibbles of three bytes, and the other two these nibbles' top bits.

use super::interface::Words;
use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;

/// The nibbles of `LANES` runs of eight codes, from their bytes in the three planes. Their top bits may be anything.
///
/// # Safety
/// The planes must be readable for `LANES` bytes.
#[inline(always)]
unsafe fn nibbles<S: Simd>(isa: S, planes: [*const u8; 3]) -> S::I {
    // SAFETY: the caller's promise.
    unsafe { join(isa, [isa.load_bytes(planes[0]), isa.load_bytes(planes[1]), isa.load_bytes(planes[2])]) }
}

/// The same from bytes as integers.
#[inline(always)]
fn join<S: Simd>(isa: S, [a, b, c]: [S::I; 3]) -> S::I {
    let rest = isa.or(
        isa.and(isa.right(a, 3), isa.integers(0x11)),
        isa.or(isa.and(isa.right(b, 2), isa.integers(0x22)), isa.and(isa.right(c, 1), isa.integers(0x44))),
    );
    isa.or(isa.or(a, isa.left(b, 8)), isa.or(isa.left(c, 16), isa.left(rest, 24)))
}

/// Rewrites consecutive rows of `d` codes as d / 2 bytes of nibbles each, as many as `to` takes.
///
/// # Safety
/// `rows` must be as many rows, readable for 64 bytes past their end.
#[inline(always)]
pub(super) unsafe fn prepare<S: Simd>(isa: S, rows: *const u8, d: usize, to: &mut [u8]) {
    let (plane, bytes) = (d / 8, to.len());
    let to = to.as_mut_ptr();
    if 2 * plane == S::LANES && bytes.is_multiple_of(d) {
        // Two rows fill a vector.
        for i in (0..bytes / (d / 2)).step_by(2) {
            // SAFETY: the caller's promise; two rows of nibbles are a vector.
            unsafe {
                let row = rows.add(3 * i * plane);
                let halves = [0, 1, 2].map(|p| [row.add(p * plane), row.add((3 + p) * plane)]);
                let [a, b, c] = halves;
                let x = join(isa, [isa.load_half_bytes(a), isa.load_half_bytes(b), isa.load_half_bytes(c)]);
                isa.store_integers(to.add(4 * i * plane), x);
            }
        }
        return;
    }
    for i in 0..bytes / (d / 2) {
        for k in (0..plane).step_by(S::LANES) {
            let at = 4 * (i * plane + k);
            // SAFETY: the caller's promise; within each plane, and past the last one by less than a vector.
            unsafe {
                let row = rows.add(3 * i * plane + k);
                let x = nibbles(isa, [row, row.add(plane), row.add(2 * plane)]);
                if at + 4 * S::LANES <= bytes {
                    // What is past a row's end is overwritten with the next one.
                    isa.store_integers(to.add(at), x);
                } else {
                    let mut last = [0u8; 64];
                    isa.store_integers(last.as_mut_ptr(), x);
                    last.as_ptr().copy_to_nonoverlapping(to.add(at), bytes - at);
                }
            }
        }
    }
}

/// The levels of `LANES` runs, in order.
///
/// # Safety
/// The planes must be readable for 64 bytes.
#[inline(always)]
unsafe fn runs<S: Simd>(isa: S, planes: [*const u8; 3], low: S::F, levels: &S::Levels<'_>) -> [S::F; 8] {
    // SAFETY: the caller's promise.
    let nibbles = unsafe { nibbles(isa, planes) };
    let mut out = [isa.splat(0.0); 8];
    if S::LOOK_UP >= 3 {
        // SAFETY: sixteen integers are enough for every instruction set.
        let (shifts, of) =
            unsafe { (isa.load_integers(SHIFTS.as_ptr().cast()), isa.load_integers(OF.as_ptr().cast())) };
        // So many runs a vector.
        let mut j = 0;
        while j < 8 {
            let of = isa.plus(of, (j * S::LANES / 8) as i32);
            out[j] = isa.look_up(low, isa.pick_right(nibbles, of, shifts));
            j += 1;
        }
    } else {
        // Half of it is the 64 bytes that may be read.
        let mut codes = [0u8; 128];
        // SAFETY: 4 · LANES bytes are written, and 64 more can be read.
        unsafe {
            isa.store_integers(codes.as_mut_ptr(), nibbles);
            out[..4].copy_from_slice(&isa.decode4::<4, false>(codes.as_ptr(), levels));
            out[4..].copy_from_slice(&isa.decode4::<4, false>(codes.as_ptr().add(2 * S::LANES), levels));
        }
    }
    out
}

/// Where the eight nibbles of a run start, and the run of each lane.
const SHIFTS: [u32; 16] = [0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28];
const OF: [u32; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1];

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
    let (d, plane) = (tables.d, tables.d / 8);
    let levels = isa.levels::<3>(tables.levels());
    // SAFETY: the table is longer than any vector.
    let low = unsafe { isa.load(tables.levels().levels.as_ptr()) };
    for (i, out) in out.chunks_exact_mut(d).enumerate() {
        let factor = isa.splat(factors.map_or(1.0, |factors| factors[i]));
        for first in (0..plane).step_by(S::LANES) {
            // SAFETY: the caller's promise about codes; whole vectors within a row.
            unsafe {
                let at = codes.add(3 * i * plane + first);
                let x = runs(isa, [at, at.add(plane), at.add(2 * plane)], low, &levels);
                // A count that is known keeps `x` in registers.
                for j in 0..8 {
                    if 8 * first + j * S::LANES < d {
                        let x = if factors.is_some() { isa.mul(x[j], factor) } else { x[j] };
                        isa.store(out.as_mut_ptr().add(8 * first + j * S::LANES), x);
                    }
                }
            }
        }
    }
}

#[inline(always)]
pub(super) fn pack(codes: &[u8], row: &mut [u8]) {
    let (first, rest) = row.split_at_mut(codes.len() / 8);
    let (second, third) = rest.split_at_mut(codes.len() / 8);
    for (i, eight) in codes.as_chunks::<8>().0.iter().enumerate() {
        let x = u64::from_le_bytes(*eight);
        // Neighbours as nibbles of one byte, in every other byte.
        let pairs = x | x >> 4;
        let last = pairs >> 48;
        first[i] = (pairs | (last & 0x11) << 3) as u8;
        second[i] = (pairs >> 16 | (last >> 1 & 0x11) << 3) as u8;
        third[i] = (pairs >> 32 | (last >> 2 & 0x11) << 3) as u8;
    }
}

/// Codes of 3 bits in planes; a group is 128 elements of two values or 64 of four keys.
pub(super) struct Planes;

/// Code `c` of eight in the low bits of words, from the words that hold their bytes of the three planes; others follow it there.
#[inline(always)]
fn of_planes<S: Simd>(isa: S, [a, b, c]: [S::I; 3], code: usize) -> S::I {
    let nibbles = match code / 2 {
        0 => a,
        1 => b,
        2 => c,
        _ => {
            let (a, b) = (isa.and(isa.right_words(a, 3), isa.integers(0x11_0011)), isa.right_words(b, 2));
            let (b, c) = (isa.and(b, isa.integers(0x22_0022)), isa.right_words(c, 1));
            isa.or(isa.or(a, b), isa.and(c, isa.integers(0x44_0044)))
        }
    };
    if code.is_multiple_of(2) { nibbles } else { isa.right_words(nibbles, 4) }
}

impl Words for Planes {
    const GROUP: usize = 4;
    const QUARTERS: bool = true;
    const QUARTER_GROUP: usize = 8;
    /// Levels, and bytes of a plane.
    type Table<'t, S: Simd> = ([S::I; 4], usize);

    #[inline(always)]
    fn table<S: Simd>(isa: S, tables: &RowTables) -> Self::Table<'_, S> {
        (isa.word_levels::<3>(tables.levels()), tables.d / 8)
    }

    #[inline(always)]
    unsafe fn words<S: Simd, const C: usize>(_: S, _: &Self::Table<'_, S>, _: *const u8, _: usize) -> S::I {
        unreachable!("rows are read several at a time")
    }

    #[inline(always)]
    unsafe fn pairs<S: Simd, const C: usize>(
        isa: S,
        &(ref levels, plane): &Self::Table<'_, S>,
        [a, b]: [*const u8; 2],
        group: usize,
    ) -> [S::I; 2] {
        // SAFETY: the caller's promise.
        let planes = unsafe {
            let (a, b) = (a.add(16 * group), b.add(16 * group));
            [
                isa.load_paired_as_words([a, b]),
                isa.load_paired_as_words([a.add(plane), b.add(plane)]),
                isa.load_paired_as_words([a.add(2 * plane), b.add(2 * plane)]),
            ]
        };
        [
            isa.look_up_words::<3>(levels, of_planes(isa, planes, 2 * C)),
            isa.look_up_words::<3>(levels, of_planes(isa, planes, 2 * C + 1)),
        ]
    }

    #[inline(always)]
    unsafe fn quarters<S: Simd, const C: usize>(
        isa: S,
        &(ref levels, plane): &Self::Table<'_, S>,
        [a, b, c, d]: [*const u8; 4],
        group: usize,
    ) -> S::I {
        let at = 8 * group;
        // SAFETY: the caller's promise.
        let planes = unsafe {
            let (a, b, c, d) = (a.add(at), b.add(at), c.add(at), d.add(at));
            let second = 2 * plane;
            [
                isa.load_quarters_as_words([a, b, c, d]),
                isa.load_quarters_as_words([a.add(plane), b.add(plane), c.add(plane), d.add(plane)]),
                isa.load_quarters_as_words([a.add(second), b.add(second), c.add(second), d.add(second)]),
            ]
        };
        isa.look_up_words::<3>(levels, of_planes(isa, planes, C))
    }
}
