//! Whole rows: rotate, encode and decode, generic over the instruction set. The arithmetic of each element is fixed to the last
//! bit (docs/format.md), whatever the number of lanes.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::float;
use super::simd::{Kernels, Simd, Table};
use crate::compute::DType;
use crate::format::{MAX_HEAD_DIM, Packing, RowFormat, Scaling, ZERO_NORM};
use crate::problem::Direction;
use half::f16;
use std::mem::MaybeUninit;

/// What the kernels need to know of a row format.
pub(crate) struct RowCoder {
    pub row: RowFormat,
    kernels: &'static Kernels,
    d: usize,
    block: usize,
    /// -0 where an element is negated, else 0; empty if none is.
    signs: Vec<f32>,
    /// Zeros for dense floats.
    table: Table,
}

impl RowCoder {
    pub fn new(row: &RowFormat, kernels: &'static Kernels) -> Self {
        let (d, words) = (row.head_dim(), row.signs());
        let negated = |i: usize| words[i / 32] >> (i % 32) & 1 == 1;
        let signs = match (0..d).any(negated) {
            true => (0..d).map(|i| if negated(i) { -0.0 } else { 0.0 }).collect(),
            false => vec![],
        };
        let table = Table::new(row.codebook());
        RowCoder { row: *row, kernels, d, block: row.block(), signs, table }
    }

    pub fn table(&self) -> &Table {
        &self.table
    }

    /// T·S·x or S·T·x in place, for consecutive rows.
    pub fn rotate(&self, direction: Direction, rows: &mut [f32]) {
        if self.row.is_rotated() {
            assert!(rows.len().is_multiple_of(self.d));
            // SAFETY: kernels are of this machine.
            unsafe { (self.kernels.rotate)(self, direction, rows) }
        }
    }

    /// Stores the vector `v`, which is overwritten, as `codes` and `scales`.
    pub fn encode(&self, v: &mut [f32], codes: &mut [u8], scales: &mut [u8]) {
        if let Packing::Float(dtype) = self.row.packing() {
            return float::store(dtype, v, codes);
        }
        assert!(v.len() == self.d && codes.len() == self.row.row_bytes());
        assert!(scales.len() == self.row.scales_per_row() * self.row.scale_dtype().size());
        // SAFETY: kernels are of this machine; lengths are as they must be.
        unsafe { (self.kernels.encode)(self, v, codes, scales) }
    }

    /// Copies floats in whole vectors of 16, past the caches where the machine can and the address allows.
    pub fn stream(&self, from: &[f32], to: &mut [f32]) {
        if !to.as_ptr().addr().is_multiple_of(64) || from.len() != to.len() || !from.len().is_multiple_of(16) {
            return to.copy_from_slice(from);
        }
        // SAFETY: kernels are of this machine; equally long, whole vectors, aligned.
        unsafe { (self.kernels.stream)(from, to.as_mut_ptr()) }
    }

    /// Decodes consecutive rows into the rotated domain; without factors the levels alone.
    ///
    /// # Safety
    /// `codes` must be readable for 64 bytes past the last row.
    pub unsafe fn decode(&self, codes: *const u8, factors: Option<&[f32]>, out: &mut [f32]) {
        assert!(out.len().is_multiple_of(self.d));
        assert!(factors.is_none_or(|f| f.len() == out.len() / self.d * self.row.scales_per_row()));
        // SAFETY: kernels are of this machine; the caller vouches for the codes.
        unsafe { (self.kernels.decode)(self, codes, factors, out) }
    }

    /// The factors that stored scales stand for: one for each scale.
    pub fn factors(&self, scales: &[u8], out: &mut [f32]) {
        float::load(self.row.scale_dtype(), scales, out);
        if self.row.scaling() != Scaling::Corrected {
            out.iter_mut().for_each(|x| *x = self.row.factor(*x));
        }
    }
}

#[inline(always)]
pub(super) unsafe fn rotate<S: Simd>(coder: &RowCoder, direction: Direction, rows: &mut [f32]) {
    let (d, block) = (coder.d, coder.block);
    for row in rows.chunks_exact_mut(d) {
        let x = row.as_mut_ptr();
        // SAFETY: whole vectors within the row, as D and its blocks are multiples of 16; signs has D elements or none.
        unsafe {
            if direction == Direction::Forward {
                negate::<S>(coder, x);
            }
            let mut b = 0;
            while b < d {
                transform::<S>(x.add(b), block);
                b += block;
            }
            if d > block {
                reflect::<S>(x, d, block);
            }
            if direction == Direction::Inverse {
                negate::<S>(coder, x);
            }
        }
    }
}

#[inline(always)]
unsafe fn negate<S: Simd>(coder: &RowCoder, x: *mut f32) {
    for i in (0..coder.signs.len()).step_by(S::LANES) {
        // SAFETY: as in `rotate`.
        unsafe { S::store(x.add(i), S::xor(S::load(x.add(i)), S::load(coder.signs.as_ptr().add(i)))) }
    }
}

/// The normalised Walsh-Hadamard transform of one block: strides 1, 2, 4 …, as many as possible in registers.
#[inline(always)]
unsafe fn transform<S: Simd>(x: *mut f32, block: usize) {
    let norm = 1.0 / (block as f32).sqrt();
    // SAFETY: as in `rotate`.
    unsafe {
        match block / S::LANES {
            1 => butterflies::<S, 1>(x, S::splat(norm)),
            2 => butterflies::<S, 2>(x, S::splat(norm)),
            4 => butterflies::<S, 4>(x, S::splat(norm)),
            8 => butterflies::<S, 8>(x, S::splat(norm)),
            _ => {
                for i in (0..block).step_by(8 * S::LANES) {
                    butterflies::<S, 8>(x.add(i), S::splat(1.0));
                }
                let mut h = 8 * S::LANES;
                while h < block {
                    let norm = S::splat(if 2 * h == block { norm } else { 1.0 });
                    for pair in (0..block).step_by(2 * h) {
                        for i in (pair..pair + h).step_by(S::LANES) {
                            let (a, b) = (S::load(x.add(i)), S::load(x.add(i + h)));
                            S::store(x.add(i), S::mul(S::add(a, b), norm));
                            S::store(x.add(i + h), S::mul(S::sub(a, b), norm));
                        }
                    }
                    h *= 2;
                }
            }
        }
    }
}

/// All strides below N vectors, then a multiplication.
#[inline(always)]
unsafe fn butterflies<S: Simd, const N: usize>(x: *mut f32, norm: S::F) {
    // SAFETY: as in `rotate`.
    unsafe {
        let mut v = [S::splat(0.0); N];
        for i in 0..N {
            let mut y = S::load(x.add(i * S::LANES));
            y = within::<S, 1>(y);
            y = within::<S, 2>(y);
            y = within::<S, 4>(y);
            if S::LANES > 8 {
                y = within::<S, 8>(y);
            }
            v[i] = y;
        }
        let mut h = 1;
        while h < N {
            for i in 0..N {
                if i & h == 0 {
                    (v[i], v[i + h]) = (S::add(v[i], v[i + h]), S::sub(v[i], v[i + h]));
                }
            }
            h *= 2;
        }
        for i in 0..N {
            S::store(x.add(i * S::LANES), S::mul(v[i], norm));
        }
    }
}

/// One stride within a vector: a + b below, a - b above, which is a + (-b) to the bit.
#[inline(always)]
unsafe fn within<S: Simd, const H: usize>(x: S::F) -> S::F {
    const fn upper<const H: usize>() -> [f32; 16] {
        let (mut out, mut i) = ([0.0; 16], 0);
        while i < 16 {
            if i & H != 0 {
                out[i] = -0.0;
            }
            i += 1;
        }
        out
    }
    // SAFETY: sixteen lanes are enough for every instruction set.
    unsafe { S::add(S::swap::<H>(x), S::xor(x, S::load(const { &upper::<H>() }.as_ptr()))) }
}

/// y[b] = x[b] - (2/m) Σ x over the m blocks.
#[inline(always)]
unsafe fn reflect<S: Simd>(x: *mut f32, d: usize, block: usize) {
    // SAFETY: as in `rotate`.
    unsafe {
        let factor = S::splat(2.0 / (d / block) as f32);
        for j in (0..block).step_by(S::LANES) {
            let mut sum = S::load(x.add(j));
            for i in (block + j..d).step_by(block) {
                sum = S::add(sum, S::load(x.add(i)));
            }
            sum = S::mul(sum, factor);
            for i in (j..d).step_by(block) {
                S::store(x.add(i), S::sub(S::load(x.add(i)), sum));
            }
        }
    }
}

/// Elements that one scale of the seed codec covers at head_dim 512.
const RMS_BLOCK: usize = 256;

#[inline(always)]
pub(super) unsafe fn encode<S: Simd>(coder: &RowCoder, v: &mut [f32], codes: &mut [u8], scales: &mut [u8]) {
    let (d, row) = (coder.d, &coder.row);
    let root = (d as f32).sqrt();
    // Decoding may read 64 bytes past.
    let mut code = [0u8; MAX_HEAD_DIM + 64];
    // SAFETY: v holds one row of D floats.
    unsafe {
        rotate::<S>(coder, Direction::Forward, v);
        match row.scaling() {
            Scaling::Norm => {
                let norm = sum_of_squares::<S>(v, coder.block).sqrt();
                assign::<S>(coder, v, root, norm, &mut code);
                scales.copy_from_slice(&(if norm.is_finite() { norm } else { f32::NAN }).to_le_bytes());
            }
            Scaling::BlockRms => {
                for ((v, code), scale) in
                    v.chunks_mut(RMS_BLOCK).zip(code.chunks_mut(RMS_BLOCK)).zip(scales.chunks_mut(4))
                {
                    let rms = (sum_of_squares::<S>(v, RMS_BLOCK) / RMS_BLOCK as f32).sqrt();
                    assign::<S>(coder, v, row.scale_factor_d512(), rms, code);
                    scale.copy_from_slice(&(if rms.is_finite() { rms } else { f32::NAN }).to_le_bytes());
                }
            }
            Scaling::Corrected => {
                let norm = sum_of_squares::<S>(v, coder.block).sqrt();
                assign::<S>(coder, v, root, norm, &mut code);
                levels_of::<S>(coder, &code, v);
                let scale = norm / sum_of_squares::<S>(v, coder.block).sqrt();
                let scale = if norm.is_finite() { f16::from_f32(scale) } else { f16::NAN };
                scales.copy_from_slice(&scale.to_le_bytes());
            }
            Scaling::None => unreachable!("dense floats have no codes"),
        }
    }
    match row.packing() {
        Packing::Byte => codes.copy_from_slice(&code[..d]),
        Packing::Planes => pack_planes(&code[..d], codes),
        _ => pack(&code[..d], row.bits(), codes),
    }
}

/// Codes of `v` scaled by `unit` / `norm`. A zero vector gets the zero code, one that is not finite code 0.
#[inline(always)]
unsafe fn assign<S: Simd>(coder: &RowCoder, v: &[f32], unit: f32, norm: f32, codes: &mut [u8]) {
    let Some(book) = coder.row.codebook() else { unreachable!("codes have a codebook") };
    if !norm.is_finite() || norm <= ZERO_NORM {
        return codes[..v.len()].fill(if norm.is_finite() { book.zero_code() as u8 } else { 0 });
    }
    let table = &coder.table;
    let (bits, bounds) = (coder.row.bits(), table.bounds.as_ptr());
    assert!(codes.len() >= v.len() && book.boundaries.len() + 1 == 1 << bits);
    let splat = |x: f32| unsafe { S::splat(x) };
    let gain = splat(1.0 / norm * unit);
    let (cells, entries) = table.cells();
    let (limit, per_unit, first) = (splat(cells.limit), splat(cells.per_unit), splat(cells.first));
    // SAFETY: whole vectors; n stays below the number of levels, and cells have numbers within their table.
    unsafe {
        for i in (0..v.len()).step_by(S::LANES) {
            let x = S::mul(S::load(v.as_ptr().add(i)), gain);
            // The number of boundaries below.
            let mut n = S::zeros();
            if bits <= 4 {
                // By bisection: boundaries are in registers.
                let mut step = 1 << (bits - 1);
                while step > 0 {
                    n = S::count(x, S::gather16(bounds.add(step - 1), n), n, step as i32);
                    step /= 2;
                }
            } else {
                // Those below the cell, and one more if the cell's own is.
                let cell = S::integer(S::fma(S::clamp(x, limit), per_unit, first));
                let [bound, below] = S::pairs(entries.as_ptr(), cell);
                n = S::count(x, bound, S::bits(below), 1);
            }
            S::store_bytes(codes.as_mut_ptr().add(i), n);
        }
    }
}

/// The levels of one row's codes, which are readable for 64 bytes past the last.
#[inline(always)]
unsafe fn levels_of<S: Simd>(coder: &RowCoder, codes: &[u8], out: &mut [f32]) {
    let codes = codes.as_ptr();
    // SAFETY: the caller's promise.
    unsafe {
        match coder.row.bits() {
            2 => levels::<S, 2, true>(coder, codes, None, out),
            3 => levels::<S, 3, true>(coder, codes, None, out),
            4 => levels::<S, 4, true>(coder, codes, None, out),
            5 => levels::<S, 5, true>(coder, codes, None, out),
            6 => levels::<S, 6, true>(coder, codes, None, out),
            7 => levels::<S, 7, true>(coder, codes, None, out),
            _ => levels::<S, 8, true>(coder, codes, None, out),
        }
    }
}

/// Σ v², summed in a fixed order so that every backend rounds alike: blocks first, one after the other, then halves
/// folded onto each other.
#[inline(always)]
unsafe fn sum_of_squares<S: Simd>(v: &[f32], block: usize) -> f32 {
    let mut sums = [MaybeUninit::<f32>::uninit(); MAX_HEAD_DIM];
    let sums = sums.as_mut_ptr().cast::<f32>();
    // SAFETY: whole vectors within v, and within sums up to a block, which the first loop fills.
    unsafe {
        for j in (0..block).step_by(S::LANES) {
            let x = S::load(v.as_ptr().add(j));
            let mut sum = S::mul(x, x);
            for i in (block + j..v.len()).step_by(block) {
                let x = S::load(v.as_ptr().add(i));
                sum = S::add(sum, S::mul(x, x));
            }
            S::store(sums.add(j), sum);
        }
        let mut half = block / 2;
        while half >= S::LANES {
            for j in (0..half).step_by(S::LANES) {
                let to = sums.add(j);
                S::store(to, S::add(S::load(to), S::load(to.add(half))));
            }
            half /= 2;
        }
        while half > 0 {
            for j in 0..half {
                *sums.add(j) += *sums.add(j + half);
            }
            half /= 2;
        }
        *sums
    }
}

/// Eight codes of `bits` bits each at a time: neighbours together, then pairs, then fours.
#[inline(always)]
fn pack(codes: &[u8], bits: usize, row: &mut [u8]) {
    for (eight, out) in codes.as_chunks::<8>().0.iter().zip(row.chunks_exact_mut(bits)) {
        let x = u64::from_le_bytes(*eight);
        let x = x & 0x00ff_00ff_00ff_00ff | (x >> 8 & 0x00ff_00ff_00ff_00ff) << bits;
        let x = x & 0x0000_ffff_0000_ffff | (x >> 16 & 0x0000_ffff_0000_ffff) << (2 * bits);
        let x = x & 0xffff_ffff | x >> 32 << (4 * bits);
        out.copy_from_slice(&x.to_le_bytes()[..bits]);
    }
}

/// Codes of 3 bits: of eight, six are nibbles of three bytes, and the other two these nibbles' top bits.
#[inline(always)]
fn pack_planes(codes: &[u8], row: &mut [u8]) {
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

#[inline(always)]
pub(super) unsafe fn stream<S: Simd>(from: &[f32], to: *mut f32) {
    for i in (0..from.len()).step_by(S::LANES) {
        // SAFETY: whole vectors and aligned, by the caller.
        unsafe { S::stream(to.add(i), S::load(from.as_ptr().add(i))) }
    }
    S::fence();
}

#[inline(always)]
pub(super) unsafe fn decode<S: Simd>(coder: &RowCoder, codes: *const u8, factors: Option<&[f32]>, out: &mut [f32]) {
    // SAFETY of all: the caller's promise about codes.
    unsafe {
        match (coder.row.packing(), coder.row.bits()) {
            (Packing::Float(DType::F32), _) => floats::<S, 4>(codes, out),
            (Packing::Float(_), _) => floats::<S, 2>(codes, out),
            (Packing::Byte, 2) => levels::<S, 2, true>(coder, codes, factors, out),
            (Packing::Byte, 3) => levels::<S, 3, true>(coder, codes, factors, out),
            (Packing::Byte, 5) => levels::<S, 5, true>(coder, codes, factors, out),
            (Packing::Byte, 6) => levels::<S, 6, true>(coder, codes, factors, out),
            (_, 2) => levels::<S, 2, false>(coder, codes, factors, out),
            (Packing::Planes, _) => planes::<S>(coder, codes, factors, out),
            (_, 4) => levels::<S, 4, false>(coder, codes, factors, out),
            (_, 5) => levels::<S, 5, false>(coder, codes, factors, out),
            (_, 6) => levels::<S, 6, false>(coder, codes, factors, out),
            (_, 7) => levels::<S, 7, false>(coder, codes, factors, out),
            _ => levels::<S, 8, false>(coder, codes, factors, out),
        }
    }
}

/// Dense rows are one run of floats of SIZE bytes.
#[inline(always)]
unsafe fn floats<S: Simd, const SIZE: usize>(from: *const u8, out: &mut [f32]) {
    for i in (0..out.len()).step_by(S::LANES) {
        // SAFETY: whole vectors, as rows are multiples of 16.
        unsafe {
            let x = if SIZE == 4 { S::load(from.cast::<f32>().add(i)) } else { S::load_f16(from.cast::<u16>().add(i)) };
            S::store(out.as_mut_ptr().add(i), x);
        }
    }
}

/// Rows of 3 bits.
#[inline(always)]
unsafe fn planes<S: Simd>(coder: &RowCoder, codes: *const u8, factors: Option<&[f32]>, out: &mut [f32]) {
    let plane = coder.d / 8;
    // SAFETY: the caller's promise about codes, which may be read 64 bytes past; whole vectors within a row.
    unsafe {
        let levels = S::levels::<3>(&coder.table);
        for (i, out) in out.chunks_exact_mut(coder.d).enumerate() {
            let factor = match factors {
                Some(factors) => S::splat(factors[i]),
                None => S::splat(1.0),
            };
            for first in (0..plane).step_by(S::LANES) {
                let at = codes.add(3 * i * plane + first);
                let x = S::decode_runs([at, at.add(plane), at.add(2 * plane)], &levels);
                // A count that is known keeps `x` in registers.
                for j in 0..8 {
                    if 8 * first + j * S::LANES < coder.d {
                        let x = if factors.is_some() { S::mul(x[j], factor) } else { x[j] };
                        S::store(out.as_mut_ptr().add(8 * first + j * S::LANES), x);
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn levels<S: Simd, const BITS: usize, const BYTE: bool>(
    coder: &RowCoder,
    mut codes: *const u8,
    factors: Option<&[f32]>,
    out: &mut [f32],
) {
    let step = S::LANES * if BYTE { 8 } else { BITS } / 8;
    // The elements of one factor; without factors those of a row.
    let segment = if factors.is_some() { coder.d / coder.row.scales_per_row() } else { coder.d };
    // SAFETY: the caller's promise about codes, which decode4 may read 64 bytes past; out holds whole segments.
    unsafe {
        let levels = S::levels::<BITS>(&coder.table);
        for (s, out) in out.chunks_exact_mut(segment).enumerate() {
            let factor = match factors {
                Some(factors) => S::splat(*factors.get_unchecked(s)),
                None => S::splat(1.0),
            };
            let (out, mut i) = (out.as_mut_ptr(), 0);
            while i + 4 * S::LANES <= segment {
                let x = S::decode4::<BITS, BYTE>(codes, &levels);
                for j in 0..4 {
                    let x = if factors.is_some() { S::mul(x[j], factor) } else { x[j] };
                    S::store(out.add(i + j * S::LANES), x);
                }
                (i, codes) = (i + 4 * S::LANES, codes.add(4 * step));
            }
            while i < segment {
                let x = S::decode::<BITS, BYTE>(codes, &levels);
                S::store(out.add(i), if factors.is_some() { S::mul(x, factor) } else { x });
                (i, codes) = (i + S::LANES, codes.add(step));
            }
        }
    }
}
