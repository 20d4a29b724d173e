//! Plain Rust, for every machine; the compiler makes of it what vectors the target always has.

use super::{Simd, Table};

#[derive(Clone, Copy)]
pub(super) struct Portable;

type F = [f32; 8];

#[inline(always)]
fn map2(a: F, b: F, f: impl Fn(f32, f32) -> f32) -> F {
    std::array::from_fn(|i| f(a[i], b[i]))
}

impl Simd for Portable {
    const LANES: usize = 8;
    type F = F;
    type I = [i32; 8];
    type Levels = *const f32;

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        [x; 8]
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> F {
        // SAFETY: eight readable lanes by contract.
        unsafe { from.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: F) {
        // SAFETY: eight writable lanes by contract.
        unsafe { to.cast::<F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    unsafe fn xor(a: F, b: F) -> F {
        map2(a, b, |a, b| f32::from_bits(a.to_bits() ^ b.to_bits()))
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn round(x: F) -> F {
        // Adding 1.5 · 2^23 leaves no bits for a fraction; |x| < 2^22 here.
        const MAGIC: f32 = 12_582_912.0;
        x.map(|x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    unsafe fn pow2(n: F) -> F {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    unsafe fn zero_below(x: F, limit: F, y: F) -> F {
        std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { y[i] })
    }
    #[inline(always)]
    unsafe fn swap<const H: usize>(x: F) -> F {
        std::array::from_fn(|i| x[i ^ H])
    }
    #[inline(always)]
    unsafe fn sum4(x: [F; 4], to: *mut f64) {
        for (i, x) in x.iter().enumerate() {
            let half: [f64; 4] = std::array::from_fn(|i| x[i] as f64 + x[i + 4] as f64);
            // SAFETY: four writable sums by contract.
            unsafe { to.add(i).write((half[0] + half[2]) + (half[1] + half[3])) }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> F {
        // SAFETY: eight readable lanes by contract.
        let x = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        x.map(f32_of_f16)
    }
    #[inline(always)]
    unsafe fn count(x: F, bound: F, n: [i32; 8], step: i32) -> [i32; 8] {
        std::array::from_fn(|i| n[i] + if x[i] > bound[i] { step } else { 0 })
    }
    #[inline(always)]
    unsafe fn zeros() -> [i32; 8] {
        [0; 8]
    }
    #[inline(always)]
    unsafe fn pairs(from: *const [f32; 2], n: [i32; 8]) -> [F; 2] {
        // SAFETY: indices within the table by contract.
        [0, 1].map(|i| n.map(|n| unsafe { (*from.add(n as usize))[i] }))
    }
    #[inline(always)]
    unsafe fn gather16(from: *const f32, n: [i32; 8]) -> F {
        // SAFETY: indices within the table by contract.
        n.map(|n| unsafe { *from.add(n as usize) })
    }
    #[inline(always)]
    unsafe fn integer(x: F) -> [i32; 8] {
        x.map(|x| (x.to_bits() as i32).wrapping_sub(super::INTEGERS))
    }
    #[inline(always)]
    unsafe fn bits(x: F) -> [i32; 8] {
        x.map(|x| x.to_bits() as i32)
    }
    #[inline(always)]
    unsafe fn clamp(x: F, limit: F) -> F {
        std::array::from_fn(|i| x[i].max(-limit[i]).min(limit[i]))
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, n: [i32; 8]) {
        // SAFETY: eight writable bytes by contract.
        unsafe { to.cast::<[u8; 8]>().write_unaligned(n.map(|n| n as u8)) }
    }
    #[inline(always)]
    unsafe fn stream(to: *mut f32, x: F) {
        // SAFETY: as `store`.
        unsafe { Self::store(to, x) }
    }
    #[inline(always)]
    unsafe fn levels<const BITS: usize>(table: &Table) -> *const f32 {
        table.levels.as_ptr()
    }
    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(codes: *const u8, levels: &*const f32) -> F {
        let width = if BYTE { 8 } else { BITS };
        // SAFETY: 16 readable bytes by contract; the table has 256 entries.
        unsafe {
            let octet = u64::from_le(codes.cast::<u64>().read_unaligned());
            std::array::from_fn(|i| *levels.add((octet >> (i * width)) as usize & ((1 << BITS) - 1)))
        }
    }
}

/// Exact, and without a branch that depends on the machine: the bits moved, the exponent rebased by a multiplication
/// (subnormals come out right), infinity and NaN set apart.
#[inline(always)]
fn f32_of_f16(x: u16) -> f32 {
    let (sign, magnitude) = ((x as u32 & 0x8000) << 16, (x as u32 & 0x7fff) << 13);
    let value = f32::from_bits(magnitude) * f32::from_bits(0x7780_0000); // 2^112
    let bits = if x & 0x7c00 == 0x7c00 { magnitude | 0x7f80_0000 } else { value.to_bits() };
    f32::from_bits(bits | sign)
}

super::kernels!(Portable, "portable", || true);

#[cfg(test)]
mod tests {
    #[test]
    fn every_f16_converts_exactly() {
        for bits in 0..=u16::MAX {
            let (got, want) = (super::f32_of_f16(bits), half::f16::from_bits(bits).to_f32());
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{bits:#x}: {got} {want}");
        }
    }
}
