//! Vectors into codes and scales: to the last bit what `format::exact` says.

use super::tables::RowTables;
use super::{levels, pack, rotate};
use crate::backend::cpu::isa::Simd;
use crate::format::{Encoding, MAX_HEAD_DIM, Scaling, ZERO_NORM};
use crate::problem::Direction;
use half::f16;
use std::mem::MaybeUninit;

/// Elements that one scale of the seed codec covers at head_dim 512.
const RMS_BLOCK: usize = 256;

/// Vectors into bytes: in `v`, of D elements, which are overwritten, with room for as many.
pub(in crate::backend::cpu) struct Vector<'a> {
    pub v: &'a mut [f32],
    pub room: &'a mut [f32],
    pub encoding: Encoding,
}

/// Stores a vector as `codes` and `scales`.
#[inline(always)]
pub(super) fn encode<S: Simd>(isa: S, tables: &RowTables, vector: Vector, codes: &mut [u8], scales: &mut [u8]) {
    let (d, block, row, Vector { v, room, encoding }) = (tables.d, tables.block, &tables.row, vector);
    let root = (d as f32).sqrt();
    // Decoding may read 64 bytes past.
    let mut code = [0u8; MAX_HEAD_DIM + 64];
    rotate::rotate(isa, tables, Direction::Forward, v);
    match row.scaling() {
        Scaling::Norm => {
            let norm = sum_of_squares(isa, v, block).sqrt();
            assign(isa, tables, v, gain(norm, root), norm, &mut code);
            scales.copy_from_slice(&(if norm.is_finite() { norm } else { f32::NAN }).to_le_bytes());
        }
        Scaling::BlockRms => {
            for ((v, code), scale) in v.chunks(RMS_BLOCK).zip(code.chunks_mut(RMS_BLOCK)).zip(scales.chunks_mut(4)) {
                let rms = (sum_of_squares(isa, v, RMS_BLOCK) / RMS_BLOCK as f32).sqrt();
                assign(isa, tables, v, gain(rms, row.scale_factor_d512()), rms, code);
                scale.copy_from_slice(&(if rms.is_finite() { rms } else { f32::NAN }).to_le_bytes());
            }
        }
        Scaling::Corrected => {
            let norm = sum_of_squares(isa, v, block).sqrt();
            let usual = gain(norm, root);
            let gains = if has_gain(norm) { encoding.gains() } else { &[] };
            let (mut best, mut nearest, mut tried) = (usual, 0.0, gains.iter());
            // The last time with the best of those that were tried.
            let squares = loop {
                let factor = tried.next();
                let gain = factor.map_or(best, |factor| usual * factor);
                assign(isa, tables, v, gain, norm, &mut code);
                // SAFETY: D codes and 64 bytes more.
                unsafe { levels::decode::<S, true>(isa, tables, code.as_ptr(), None, room) };
                let squares = sum_of_products(isa, room, room, block);
                if factor.is_none() {
                    break squares;
                }
                let product = sum_of_products(isa, v, room, block) * usual;
                let near = product / squares * product;
                if near > nearest {
                    (best, nearest) = (gain, near);
                }
            };
            let scale = norm / squares.sqrt();
            let scale = if norm.is_finite() { f16::from_f32(scale) } else { f16::NAN };
            scales.copy_from_slice(&scale.to_le_bytes());
        }
        Scaling::None => unreachable!("dense floats have no codes"),
    }
    pack(row, &code[..d], codes);
}

/// What elements are multiplied with: `unit` / `norm`, the reciprocal first.
#[inline(always)]
fn gain(norm: f32, unit: f32) -> f32 {
    1.0 / norm * unit
}

/// Whether a vector of this norm is neither zero nor without a finite one.
#[inline(always)]
fn has_gain(norm: f32) -> bool {
    norm.is_finite() && norm > ZERO_NORM
}

/// Codes of `v` times `gain`. A zero vector gets the zero code, one that is not finite code 0.
#[inline(always)]
fn assign<S: Simd>(isa: S, tables: &RowTables, v: &[f32], gain: f32, norm: f32, codes: &mut [u8]) {
    let Some(book) = tables.row.codebook() else { unreachable!("codes have a codebook") };
    if !has_gain(norm) {
        return codes[..v.len()].fill(if norm.is_finite() { book.zero_code() as u8 } else { 0 });
    }
    let (bits, bounds, cells) = (tables.row.bits(), tables.bounds().as_ptr(), tables.cells());
    assert!(codes.len() >= v.len() && book.boundaries.len() + 1 == 1 << bits && v.len().is_multiple_of(16));
    let gain = isa.splat(gain);
    let (limit, per_unit, first) = (isa.splat(cells.limit), isa.splat(cells.per_unit), isa.splat(cells.first));
    for i in (0..v.len()).step_by(S::LANES) {
        // SAFETY: whole vectors, by the assertion.
        let x = isa.mul(unsafe { isa.load(v.as_ptr().add(i)) }, gain);
        // The number of boundaries below.
        let mut n = isa.integers(0);
        if bits <= 4 {
            // By bisection: boundaries are in registers.
            let mut step = 1 << (bits - 1);
            while step > 0 {
                // SAFETY: n is at most 15, and 16 more boundaries follow any of the first 15.
                n = isa.count(x, unsafe { isa.gather16(bounds.add(step - 1), n) }, n, step as i32);
                step /= 2;
            }
        } else {
            // Those below the cell, and one more if the cell's own is.
            let cell = isa.integer(isa.fma(isa.clamp(x, limit), per_unit, first));
            // SAFETY: within its limits an element is in a cell that the table has.
            let [bound, below] = unsafe { isa.pairs(cells.entries.as_ptr(), cell) };
            n = isa.count(x, bound, isa.bits(below), 1);
        }
        // SAFETY: there are as many codes as elements, by the assertion.
        unsafe { isa.store_bytes(codes.as_mut_ptr().add(i), n) };
    }
}

/// Σ v²; see [`sum_of_products`].
#[inline(always)]
fn sum_of_squares<S: Simd>(isa: S, v: &[f32], block: usize) -> f32 {
    sum_of_products(isa, v, v, block)
}

/// Σ v·w, summed in a fixed order so that every backend rounds alike: blocks first, one after the other, then halves
/// folded onto each other.
#[inline(always)]
fn sum_of_products<S: Simd>(isa: S, v: &[f32], w: &[f32], block: usize) -> f32 {
    let mut sums = [MaybeUninit::<f32>::uninit(); MAX_HEAD_DIM];
    let sums = sums.as_mut_ptr().cast::<f32>();
    assert!(block <= MAX_HEAD_DIM && block.is_power_of_two() && v.len() & (block - 1) == 0 && block >= 16);
    assert!(v.len() == w.len());
    // SAFETY: whole vectors within v and w, and within sums up to a block, which the first loop fills.
    unsafe {
        for j in (0..block).step_by(S::LANES) {
            let mut sum = isa.mul(isa.load(v.as_ptr().add(j)), isa.load(w.as_ptr().add(j)));
            for i in (block + j..v.len()).step_by(block) {
                sum = isa.add(sum, isa.mul(isa.load(v.as_ptr().add(i)), isa.load(w.as_ptr().add(i))));
            }
            isa.store(sums.add(j), sum);
        }
        let mut half = block / 2;
        while half >= S::LANES {
            for j in (0..half).step_by(S::LANES) {
                let to = sums.add(j);
                isa.store(to, isa.add(isa.load(to), isa.load(to.add(half))));
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
