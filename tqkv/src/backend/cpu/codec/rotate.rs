//! Signs, Walsh-Hadamard transform and reflection of rows of floats. The arithmetic of each element is fixed to the last bit
//! (docs/format.md), whatever the number of lanes.

#![allow(clippy::needless_range_loop)] // Indices below a constant, so that arrays stay in registers.

use super::tables::RowTables;
use crate::backend::cpu::isa::Simd;
use crate::problem::Direction;

/// T·S·x or S·T·x in place, for consecutive rows.
#[inline(always)]
pub(super) fn rotate<S: Simd>(isa: S, tables: &RowTables, direction: Direction, rows: &mut [f32]) {
    let (d, block) = (tables.d, tables.block);
    for row in rows.chunks_exact_mut(d) {
        if direction == Direction::Forward {
            negate(isa, tables, row);
        }
        // Neither `chunks_exact` nor `step_by`, which divide.
        let mut b = 0;
        while b < d {
            transform(isa, &mut row[b..b + block]);
            b += block;
        }
        if d > block {
            reflect(isa, row, block);
        }
        if direction == Direction::Inverse {
            negate(isa, tables, row);
        }
    }
}

#[inline(always)]
fn negate<S: Simd>(isa: S, tables: &RowTables, row: &mut [f32]) {
    let (signs, x) = (tables.signs(), row.as_mut_ptr());
    assert!(signs.len() <= row.len());
    for i in (0..signs.len()).step_by(S::LANES) {
        // SAFETY: whole vectors of both, as rows are multiples of 16.
        unsafe { isa.store(x.add(i), isa.xor(isa.load(x.add(i)), isa.load(signs.as_ptr().add(i)))) }
    }
}

/// The normalised Walsh-Hadamard transform of one block: strides 1, 2, 4 …, as many as possible in registers.
#[inline(always)]
fn transform<S: Simd>(isa: S, block: &mut [f32]) {
    let norm = 1.0 / (block.len() as f32).sqrt();
    match block.len() / S::LANES {
        1 => butterflies::<S, 1>(isa, block, norm),
        2 => butterflies::<S, 2>(isa, block, norm),
        4 => butterflies::<S, 4>(isa, block, norm),
        8 => butterflies::<S, 8>(isa, block, norm),
        _ => {
            for x in block.chunks_exact_mut(8 * S::LANES) {
                butterflies::<S, 8>(isa, x, 1.0);
            }
            let mut h = 8 * S::LANES;
            while h < block.len() {
                let norm = isa.splat(if 2 * h == block.len() { norm } else { 1.0 });
                for pair in block.chunks_exact_mut(2 * h) {
                    let x = pair.as_mut_ptr();
                    for i in (0..h).step_by(S::LANES) {
                        // SAFETY: whole vectors of each half of the pair.
                        unsafe {
                            let (a, b) = (isa.load(x.add(i)), isa.load(x.add(i + h)));
                            isa.store(x.add(i), isa.mul(isa.add(a, b), norm));
                            isa.store(x.add(i + h), isa.mul(isa.sub(a, b), norm));
                        }
                    }
                }
                h *= 2;
            }
        }
    }
}

/// All strides below N vectors, then a multiplication.
#[inline(always)]
fn butterflies<S: Simd, const N: usize>(isa: S, x: &mut [f32], norm: f32) {
    assert!(x.len() == N * S::LANES);
    let (x, norm) = (x.as_mut_ptr(), isa.splat(norm));
    let mut v = [isa.splat(0.0); N];
    for i in 0..N {
        // SAFETY: N vectors, by the assertion.
        let mut y = unsafe { isa.load(x.add(i * S::LANES)) };
        y = within::<S, 1>(isa, y);
        y = within::<S, 2>(isa, y);
        y = within::<S, 4>(isa, y);
        if S::LANES > 8 {
            y = within::<S, 8>(isa, y);
        }
        v[i] = y;
    }
    let mut h = 1;
    while h < N {
        for i in 0..N {
            if i & h == 0 {
                (v[i], v[i + h]) = (isa.add(v[i], v[i + h]), isa.sub(v[i], v[i + h]));
            }
        }
        h *= 2;
    }
    for i in 0..N {
        // SAFETY: N vectors, by the assertion.
        unsafe { isa.store(x.add(i * S::LANES), isa.mul(v[i], norm)) };
    }
}

/// One stride within a vector: a + b below, a - b above, which is a + (-b) to the bit.
#[inline(always)]
fn within<S: Simd, const H: usize>(isa: S, x: S::F) -> S::F {
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
    let upper = unsafe { isa.load(const { &upper::<H>() }.as_ptr()) };
    isa.add(isa.swap::<H>(x), isa.xor(x, upper))
}

/// y[b] = x[b] - (2/m) Σ x over the m blocks.
#[inline(always)]
fn reflect<S: Simd>(isa: S, row: &mut [f32], block: usize) {
    let (d, x) = (row.len(), row.as_mut_ptr());
    let factor = isa.splat(2.0 / (d / block) as f32);
    for j in (0..block).step_by(S::LANES) {
        // SAFETY: whole vectors within the row, as d is a multiple of the block, and that of 16.
        unsafe {
            let mut sum = isa.load(x.add(j));
            for i in (block + j..d).step_by(block) {
                sum = isa.add(sum, isa.load(x.add(i)));
            }
            sum = isa.mul(sum, factor);
            for i in (j..d).step_by(block) {
                isa.store(x.add(i), isa.sub(isa.load(x.add(i)), sum));
            }
        }
    }
}
