//! Plain Rust, for every machine; the compiler makes of it what vectors the target always has.

use super::table::LevelTable;
use super::token::{INTEGERS, Job, Simd};

/// What every machine has.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Portable;

type F = [f32; 8];
type I = [i32; 8];

#[inline(always)]
fn map2<T: Copy>(a: [T; 8], b: [T; 8], f: impl Fn(T, T) -> T) -> [T; 8] {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(never)] // As for other instruction sets: a function of its own.
fn run_with<J: Job>(job: J) -> J::Output {
    job.run(Portable)
}

impl Simd for Portable {
    const LANES: usize = 8;
    type F = F;
    type I = I;
    type Levels<'t> = &'t [f32; 256];

    #[inline(always)]
    fn run<J: Job>(self, job: J) -> J::Output {
        run_with(job)
    }

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        [x; 8]
    }
    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        map2(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn xor(self, a: F, b: F) -> F {
        map2(a, b, |a, b| f32::from_bits(a.to_bits() ^ b.to_bits()))
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    fn round(self, x: F) -> F {
        // Adding 1.5 · 2^23 leaves no bits for a fraction; |x| < 2^22 here.
        const MAGIC: f32 = 12_582_912.0;
        x.map(|x| (x + MAGIC) - MAGIC)
    }
    #[inline(always)]
    fn pow2(self, n: F) -> F {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) << 23) as u32))
    }
    #[inline(always)]
    fn zero_below(self, x: F, limit: F, y: F) -> F {
        std::array::from_fn(|i| if x[i] < limit[i] { 0.0 } else { y[i] })
    }
    #[inline(always)]
    fn clamp(self, x: F, limit: F) -> F {
        map2(x, limit, |x, limit| x.max(-limit).min(limit))
    }
    #[inline(always)]
    fn swap<const H: usize>(self, x: F) -> F {
        std::array::from_fn(|i| x[i ^ H])
    }
    #[inline(always)]
    fn sum4(self, x: [F; 4]) -> [f64; 4] {
        x.map(|x| {
            let half: [f64; 4] = std::array::from_fn(|i| x[i] as f64 + x[i + 4] as f64);
            (half[0] + half[2]) + (half[1] + half[3])
        })
    }

    #[inline(always)]
    fn integers(self, x: i32) -> I {
        [x; 8]
    }
    #[inline(always)]
    fn bits(self, x: F) -> I {
        x.map(|x| x.to_bits() as i32)
    }
    #[inline(always)]
    fn integer(self, x: F) -> I {
        x.map(|x| (x.to_bits() as i32).wrapping_sub(INTEGERS))
    }
    #[inline(always)]
    fn count(self, x: F, bound: F, n: I, step: i32) -> I {
        std::array::from_fn(|i| n[i] + if x[i] > bound[i] { step } else { 0 })
    }
    #[inline(always)]
    fn plus(self, x: I, n: i32) -> I {
        x.map(|x| x.wrapping_add(n))
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        map2(a, b, |a, b| a & b)
    }
    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        map2(a, b, |a, b| a | b)
    }
    #[inline(always)]
    fn left(self, x: I, by: i32) -> I {
        x.map(|x| x << by)
    }
    #[inline(always)]
    fn right(self, x: I, by: i32) -> I {
        x.map(|x| (x as u32 >> by) as i32)
    }

    #[inline(always)]
    unsafe fn load(self, from: *const f32) -> F {
        // SAFETY: eight readable lanes by contract.
        unsafe { from.cast::<F>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_f16(self, from: *const u16) -> F {
        // SAFETY: eight readable lanes by contract.
        let x = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        x.map(f32_of_f16)
    }
    #[inline(always)]
    unsafe fn load_bytes(self, from: *const u8) -> I {
        // SAFETY: eight readable bytes by contract.
        let x = unsafe { from.cast::<[u8; 8]>().read_unaligned() };
        x.map(i32::from)
    }
    #[inline(always)]
    unsafe fn load_words(self, from: *const u8) -> I {
        // SAFETY: sixteen readable bytes by contract.
        let x = unsafe { from.cast::<[[u8; 2]; 8]>().read_unaligned() };
        x.map(|x| u16::from_le_bytes(x).into())
    }
    #[inline(always)]
    unsafe fn load_integers(self, from: *const u8) -> I {
        // SAFETY: 32 readable bytes by contract.
        let x = unsafe { from.cast::<[[u8; 4]; 8]>().read_unaligned() };
        x.map(i32::from_le_bytes)
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32, x: F) {
        // SAFETY: eight writable lanes by contract.
        unsafe { to.cast::<F>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn store_integers(self, to: *mut u8, x: I) {
        // SAFETY: 32 writable bytes by contract.
        unsafe { to.cast::<[[u8; 4]; 8]>().write_unaligned(x.map(i32::to_le_bytes)) }
    }
    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut u8, n: I) {
        // SAFETY: eight writable bytes by contract.
        unsafe { to.cast::<[u8; 8]>().write_unaligned(n.map(|n| n as u8)) }
    }
    #[inline(always)]
    unsafe fn stream(self, to: *mut f32, x: F) {
        // SAFETY: as `store`.
        unsafe { self.store(to, x) }
    }

    #[inline(always)]
    unsafe fn pairs(self, from: *const [f32; 2], n: I) -> [F; 2] {
        // SAFETY: indices within the table by contract.
        [0, 1].map(|i| n.map(|n| unsafe { (*from.add(n as usize))[i] }))
    }
    #[inline(always)]
    unsafe fn gather16(self, from: *const f32, n: I) -> F {
        // SAFETY: indices within the table by contract.
        n.map(|n| unsafe { *from.add(n as usize) })
    }

    #[inline(always)]
    fn levels<const BITS: usize>(self, table: &LevelTable) -> &[f32; 256] {
        &table.levels
    }
    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(self, codes: *const u8, levels: &&[f32; 256]) -> F {
        let width = if BYTE { 8 } else { BITS };
        // SAFETY: 16 readable bytes by contract.
        let octet = u64::from_le(unsafe { codes.cast::<u64>().read_unaligned() });
        std::array::from_fn(|i| levels[(octet >> (i * width)) as usize & ((1 << BITS) - 1)])
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
