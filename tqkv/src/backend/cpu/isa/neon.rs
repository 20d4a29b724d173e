//! NEON: eight lanes, as two vectors of four. Codes of four bits are looked up in registers, others in memory.

use super::portable::Portable;
use super::table::LevelTable;
use super::token::{INTEGERS, Job, Simd, computes, token, touches};
use std::arch::aarch64::*;

token!(
    /// NEON, which almost every processor of this architecture has.
    Neon,
    ["neon"],
    is_aarch64_feature_detected
);

type F = float32x4x2_t;
type I = int32x4x2_t;

impl Neon {
    computes! {
        fn lanes(self, n: I) -> [i32; 8] {
            let mut out = [0; 8];
            vst1q_s32(out.as_mut_ptr(), n.0);
            vst1q_s32(out.as_mut_ptr().add(4), n.1);
            out
        }
        fn vector(self, x: [f32; 8]) -> F { float32x4x2_t(vld1q_f32(x.as_ptr()), vld1q_f32(x.as_ptr().add(4))) }
        fn xor4(self, a: float32x4_t, b: float32x4_t) -> float32x4_t {
            vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(a), vreinterpretq_u32_f32(b)))
        }
        fn pow4(self, n: float32x4_t) -> float32x4_t {
            vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127))))
        }
        fn zero4(self, x: float32x4_t, limit: float32x4_t, y: float32x4_t) -> float32x4_t {
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(x, limit)))
        }
        /// Those of IEEE 754-2008: of a NaN and a number they give the number, so that what comes out is within the limits.
        fn clamp4(self, x: float32x4_t, limit: float32x4_t) -> float32x4_t {
            vminnmq_f32(vmaxnmq_f32(x, vnegq_f32(limit)), limit)
        }
        fn count4(self, x: float32x4_t, bound: float32x4_t, n: int32x4_t, step: i32) -> int32x4_t {
            vaddq_s32(n, vandq_s32(vreinterpretq_s32_u32(vcgtq_f32(x, bound)), vdupq_n_s32(step)))
        }
        fn right4(self, x: int32x4_t, by: i32) -> int32x4_t {
            vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vdupq_n_s32(-by)))
        }
        /// Both halves of both vectors in f64, added to one.
        fn wide(self, x: F) -> float64x2_t {
            let a = vaddq_f64(vcvt_f64_f32(vget_low_f32(x.0)), vcvt_high_f64_f32(x.0));
            vaddq_f64(a, vaddq_f64(vcvt_f64_f32(vget_low_f32(x.1)), vcvt_high_f64_f32(x.1)))
        }
        /// Four floats of which these are the lower and the upper halves.
        fn halves(self, lower: uint8x8_t, upper: uint8x8_t) -> float32x4_t {
            let (lower, upper) = (vreinterpret_u16_u8(lower), vreinterpret_u16_u8(upper));
            vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(lower, upper), vzip2_u16(lower, upper)))
        }
        fn two_words(self, x: uint16x8_t) -> I {
            int32x4x2_t(
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(x))),
                vreinterpretq_s32_u32(vmovl_high_u16(x)),
            )
        }
    }
}

impl Simd for Neon {
    const LANES: usize = 8;
    type F = F;
    type I = I;
    /// The bytes of sixteen levels, one register for each of the four bytes of a float; and all levels in memory.
    type Levels<'t> = (uint8x16x4_t, &'t [f32; 256]);

    #[inline(always)]
    fn run<J: Job>(self, job: J) -> J::Output {
        // SAFETY: the token proves that the instructions are there.
        unsafe { self.run_with(job) }
    }

    computes! {
        fn splat(self, x: f32) -> F { float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x)) }
        fn add(self, a: F, b: F) -> F { float32x4x2_t(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1)) }
        fn sub(self, a: F, b: F) -> F { float32x4x2_t(vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1)) }
        fn mul(self, a: F, b: F) -> F { float32x4x2_t(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1)) }
        fn xor(self, a: F, b: F) -> F { float32x4x2_t(self.xor4(a.0, b.0), self.xor4(a.1, b.1)) }
        fn fma(self, a: F, b: F, c: F) -> F { float32x4x2_t(vfmaq_f32(c.0, a.0, b.0), vfmaq_f32(c.1, a.1, b.1)) }
        fn round(self, x: F) -> F { float32x4x2_t(vrndnq_f32(x.0), vrndnq_f32(x.1)) }
        fn pow2(self, n: F) -> F { float32x4x2_t(self.pow4(n.0), self.pow4(n.1)) }
        fn zero_below(self, x: F, limit: F, y: F) -> F {
            float32x4x2_t(self.zero4(x.0, limit.0, y.0), self.zero4(x.1, limit.1, y.1))
        }
        fn clamp(self, x: F, limit: F) -> F { float32x4x2_t(self.clamp4(x.0, limit.0), self.clamp4(x.1, limit.1)) }
        fn swap<const H: usize>(self, x: F) -> F {
            match H {
                1 => float32x4x2_t(vrev64q_f32(x.0), vrev64q_f32(x.1)),
                2 => float32x4x2_t(vextq_f32::<2>(x.0, x.0), vextq_f32::<2>(x.1, x.1)),
                _ => float32x4x2_t(x.1, x.0),
            }
        }
        fn sum4(self, x: [F; 4]) -> [f64; 4] {
            let ab = vpaddq_f64(self.wide(x[0]), self.wide(x[1]));
            let cd = vpaddq_f64(self.wide(x[2]), self.wide(x[3]));
            let mut sums = [0.0; 4];
            vst1q_f64(sums.as_mut_ptr(), ab);
            vst1q_f64(sums.as_mut_ptr().add(2), cd);
            sums
        }

        fn integers(self, x: i32) -> I { int32x4x2_t(vdupq_n_s32(x), vdupq_n_s32(x)) }
        fn bits(self, x: F) -> I { int32x4x2_t(vreinterpretq_s32_f32(x.0), vreinterpretq_s32_f32(x.1)) }
        fn integer(self, x: F) -> I {
            let (bits, base) = (self.bits(x), vdupq_n_s32(INTEGERS));
            int32x4x2_t(vsubq_s32(bits.0, base), vsubq_s32(bits.1, base))
        }
        fn count(self, x: F, bound: F, n: I, step: i32) -> I {
            int32x4x2_t(self.count4(x.0, bound.0, n.0, step), self.count4(x.1, bound.1, n.1, step))
        }
        fn plus(self, x: I, n: i32) -> I { int32x4x2_t(vaddq_s32(x.0, vdupq_n_s32(n)), vaddq_s32(x.1, vdupq_n_s32(n))) }
        fn and(self, a: I, b: I) -> I { int32x4x2_t(vandq_s32(a.0, b.0), vandq_s32(a.1, b.1)) }
        fn or(self, a: I, b: I) -> I { int32x4x2_t(vorrq_s32(a.0, b.0), vorrq_s32(a.1, b.1)) }
        fn left(self, x: I, by: i32) -> I {
            int32x4x2_t(vshlq_s32(x.0, vdupq_n_s32(by)), vshlq_s32(x.1, vdupq_n_s32(by)))
        }
        fn right(self, x: I, by: i32) -> I { int32x4x2_t(self.right4(x.0, by), self.right4(x.1, by)) }
    }

    touches! {
        unsafe fn load(self, from: *const f32) -> F { float32x4x2_t(vld1q_f32(from), vld1q_f32(from.add(4))) }
        // Conversions from f16 are not stable for this architecture: by multiplication, as the portable path does it.
        unsafe fn load_f16(self, from: *const u16) -> F { self.vector(Portable.load_f16(from)) }
        unsafe fn load_bytes(self, from: *const u8) -> I { self.two_words(vmovl_u8(vld1_u8(from))) }
        unsafe fn load_words(self, from: *const u8) -> I { self.two_words(vreinterpretq_u16_u8(vld1q_u8(from))) }
        unsafe fn load_integers(self, from: *const u8) -> I {
            int32x4x2_t(vreinterpretq_s32_u8(vld1q_u8(from)), vreinterpretq_s32_u8(vld1q_u8(from.add(16))))
        }
        unsafe fn store(self, to: *mut f32, x: F) {
            vst1q_f32(to, x.0);
            vst1q_f32(to.add(4), x.1);
        }
        unsafe fn store_integers(self, to: *mut u8, x: I) {
            vst1q_u8(to, vreinterpretq_u8_s32(x.0));
            vst1q_u8(to.add(16), vreinterpretq_u8_s32(x.1));
        }
        unsafe fn store_bytes(self, to: *mut u8, n: I) {
            let words = vcombine_s16(vmovn_s32(n.0), vmovn_s32(n.1));
            vst1_u8(to, vreinterpret_u8_s8(vmovn_s16(words)));
        }
        unsafe fn stream(self, to: *mut f32, x: F) { self.store(to, x) }
        unsafe fn pairs(self, from: *const [f32; 2], n: I) -> [F; 2] {
            let [first, second] = Portable.pairs(from, self.lanes(n));
            [self.vector(first), self.vector(second)]
        }
        unsafe fn gather16(self, from: *const f32, n: I) -> F { self.vector(Portable.gather16(from, self.lanes(n))) }
    }

    #[inline(always)]
    fn levels<const BITS: usize>(self, table: &LevelTable) -> Self::Levels<'_> {
        // SAFETY: the token proves that the instructions are there; the table has 256 levels, of which 16 are loaded.
        (unsafe { vld4q_u8(table.levels.as_ptr().cast()) }, &table.levels)
    }

    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(
        self,
        codes: *const u8,
        (low, table): &Self::Levels<'_>,
    ) -> F {
        // SAFETY: the token proves that the instructions are there; the caller promises 16 bytes.
        unsafe {
            if BITS != 4 || BYTE {
                return self.vector(Portable.decode::<BITS, BYTE>(codes, table));
            }
            let packed = vreinterpret_u8_u32(vld1_dup_u32(codes.cast()));
            let code = vzip1_u8(vand_u8(packed, vdup_n_u8(15)), vshr_n_u8::<4>(packed));
            // Each byte of the eight floats, then put together again.
            let (b0, b1) = (vqtbl1_u8(low.0, code), vqtbl1_u8(low.1, code));
            let (b2, b3) = (vqtbl1_u8(low.2, code), vqtbl1_u8(low.3, code));
            let (lower, upper) = (vzip_u8(b0, b1), vzip_u8(b2, b3));
            float32x4x2_t(self.halves(lower.0, upper.0), self.halves(lower.1, upper.1))
        }
    }
}
