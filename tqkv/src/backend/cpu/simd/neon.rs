//! NEON: eight lanes, as two vectors of four. Codes of four bits are looked up in registers, others in memory.

use super::portable::Portable;
use super::{Simd, Table};
use std::arch::aarch64::*;

#[derive(Clone, Copy)]
pub(super) struct Neon;

type F = float32x4x2_t;

#[inline(always)]
unsafe fn lanes(n: int32x4x2_t) -> [i32; 8] {
    let mut out = [0; 8];
    unsafe {
        vst1q_s32(out.as_mut_ptr(), n.0);
        vst1q_s32(out.as_mut_ptr().add(4), n.1);
    }
    out
}

// SAFETY of the whole: intrinsics of the instruction set that the trait's contract demands, on pointers that it describes.
impl Simd for Neon {
    const LANES: usize = 8;
    type F = F;
    type I = int32x4x2_t;
    /// The bytes of sixteen levels, one register for each of the four bytes of a float; and all levels in memory.
    type Levels = (uint8x16x4_t, *const f32);

    #[inline(always)]
    unsafe fn splat(x: f32) -> F {
        unsafe { float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> F {
        unsafe { float32x4x2_t(vld1q_f32(from), vld1q_f32(from.add(4))) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: F) {
        unsafe {
            vst1q_f32(to, x.0);
            vst1q_f32(to.add(4), x.1);
        }
    }
    #[inline(always)]
    unsafe fn add(a: F, b: F) -> F {
        unsafe { float32x4x2_t(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn sub(a: F, b: F) -> F {
        unsafe { float32x4x2_t(vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn mul(a: F, b: F) -> F {
        unsafe { float32x4x2_t(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn xor(a: F, b: F) -> F {
        unsafe { float32x4x2_t(xor4(a.0, b.0), xor4(a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn fma(a: F, b: F, c: F) -> F {
        unsafe { float32x4x2_t(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)) }
    }
    #[inline(always)]
    unsafe fn round(x: F) -> F {
        unsafe { float32x4x2_t(vrndnq_f32(x.0), vrndnq_f32(x.1)) }
    }
    #[inline(always)]
    unsafe fn pow2(n: F) -> F {
        unsafe { float32x4x2_t(pow4(n.0), pow4(n.1)) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: F, limit: F, y: F) -> F {
        unsafe { float32x4x2_t(zero4(x.0, limit.0, y.0), zero4(x.1, limit.1, y.1)) }
    }
    #[inline(always)]
    unsafe fn swap<const H: usize>(x: F) -> F {
        unsafe {
            match H {
                1 => float32x4x2_t(vrev64q_f32(x.0), vrev64q_f32(x.1)),
                2 => float32x4x2_t(vextq_f32::<2>(x.0, x.0), vextq_f32::<2>(x.1, x.1)),
                _ => float32x4x2_t(x.1, x.0),
            }
        }
    }
    #[inline(always)]
    unsafe fn sum4(x: [F; 4], to: *mut f64) {
        unsafe {
            let (ab, cd) = (vpaddq_f64(wide(x[0]), wide(x[1])), vpaddq_f64(wide(x[2]), wide(x[3])));
            vst1q_f64(to, ab);
            vst1q_f64(to.add(2), cd);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> F {
        // Conversions from f16 are not stable for this architecture: by multiplication, as the portable path does it.
        let x = unsafe { super::portable::Portable::load_f16(from) };
        unsafe { Self::load(x.as_ptr()) }
    }
    #[inline(always)]
    unsafe fn count(x: F, bound: F, n: int32x4x2_t, step: i32) -> int32x4x2_t {
        unsafe { int32x4x2_t(count4(x.0, bound.0, n.0, step), count4(x.1, bound.1, n.1, step)) }
    }
    #[inline(always)]
    unsafe fn zeros() -> int32x4x2_t {
        unsafe { int32x4x2_t(vdupq_n_s32(0), vdupq_n_s32(0)) }
    }
    #[inline(always)]
    unsafe fn pairs(from: *const [f32; 2], n: int32x4x2_t) -> [F; 2] {
        unsafe {
            let [first, second] = Portable::pairs(from, lanes(n));
            [Self::load(first.as_ptr()), Self::load(second.as_ptr())]
        }
    }
    #[inline(always)]
    unsafe fn gather16(from: *const f32, n: int32x4x2_t) -> F {
        unsafe { Self::load(Portable::gather16(from, lanes(n)).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn integer(x: F) -> int32x4x2_t {
        unsafe {
            let (bits, base) = (Self::bits(x), vdupq_n_s32(super::INTEGERS));
            int32x4x2_t(vsubq_s32(bits.0, base), vsubq_s32(bits.1, base))
        }
    }
    #[inline(always)]
    unsafe fn bits(x: F) -> int32x4x2_t {
        unsafe { int32x4x2_t(vreinterpretq_s32_f32(x.0), vreinterpretq_s32_f32(x.1)) }
    }
    #[inline(always)]
    unsafe fn clamp(x: F, limit: F) -> F {
        unsafe {
            // Those of IEEE 754-2008: of a NaN and a number they give the number, so that what comes out is within the limits.
            let one = |x, limit| vminnmq_f32(vmaxnmq_f32(x, vnegq_f32(limit)), limit);
            float32x4x2_t(one(x.0, limit.0), one(x.1, limit.1))
        }
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, n: int32x4x2_t) {
        unsafe {
            let words = vcombine_s16(vmovn_s32(n.0), vmovn_s32(n.1));
            vst1_u8(to, vreinterpret_u8_s8(vmovn_s16(words)));
        }
    }
    #[inline(always)]
    unsafe fn stream(to: *mut f32, x: F) {
        unsafe { Self::store(to, x) }
    }
    #[inline(always)]
    unsafe fn levels<const BITS: usize>(table: &Table) -> Self::Levels {
        let table = table.levels.as_ptr();
        unsafe { (vld4q_u8(table.cast()), table) }
    }
    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(codes: *const u8, (low, table): &Self::Levels) -> F {
        unsafe {
            if BITS != 4 || BYTE {
                return Self::load(super::portable::Portable::decode::<BITS, BYTE>(codes, table).as_ptr());
            }
            let packed = vreinterpret_u8_u32(vld1_dup_u32(codes.cast()));
            let code = vzip1_u8(vand_u8(packed, vdup_n_u8(15)), vshr_n_u8::<4>(packed));
            // Each byte of the eight floats, then put together again.
            let (b0, b1) = (vqtbl1_u8(low.0, code), vqtbl1_u8(low.1, code));
            let (b2, b3) = (vqtbl1_u8(low.2, code), vqtbl1_u8(low.3, code));
            let (lower, upper) = (vzip_u8(b0, b1), vzip_u8(b2, b3));
            let half = |a: uint8x8_t, b: uint8x8_t| {
                let (a, b) = (vreinterpret_u16_u8(a), vreinterpret_u16_u8(b));
                let pair = vcombine_u16(vzip1_u16(a, b), vzip2_u16(a, b));
                vreinterpretq_f32_u16(pair)
            };
            float32x4x2_t(half(lower.0, upper.0), half(lower.1, upper.1))
        }
    }
}

#[inline(always)]
unsafe fn xor4(a: float32x4_t, b: float32x4_t) -> float32x4_t {
    unsafe { vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b))) }
}

#[inline(always)]
unsafe fn pow4(n: float32x4_t) -> float32x4_t {
    unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)))) }
}

#[inline(always)]
unsafe fn zero4(x: float32x4_t, limit: float32x4_t, y: float32x4_t) -> float32x4_t {
    unsafe { vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, limit))) }
}

#[inline(always)]
unsafe fn count4(x: float32x4_t, bound: float32x4_t, n: int32x4_t, step: i32) -> int32x4_t {
    unsafe { vaddq_s32(n, vandq_s32(vreinterpretq_s32_u32(vcgtq_f32(x, bound)), vdupq_n_s32(step))) }
}

/// Both halves of both vectors in f64, added to one.
#[inline(always)]
unsafe fn wide(x: F) -> float64x2_t {
    unsafe {
        let a = vaddq_f64(vcvt_f64_f32(vget_low_f32(x.0)), vcvt_high_f64_f32(x.0));
        vaddq_f64(a, vaddq_f64(vcvt_f64_f32(vget_low_f32(x.1)), vcvt_high_f64_f32(x.1)))
    }
}

super::kernels!(Neon, "neon", || std::arch::is_aarch64_feature_detected!("neon"), "neon");
