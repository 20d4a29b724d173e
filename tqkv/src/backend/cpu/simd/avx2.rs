//! AVX2 with FMA and F16C: eight lanes. Codes of up to four bits are looked up in registers, wider ones in memory.

use super::{Simd, Table};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// The bytes that lanes find their codes in, for `_mm256_shuffle_epi8`; 0x80 gives zero.
const fn bytes<const BITS: usize>() -> [u8; 32] {
    let (mut out, mut i) = ([0x80u8; 32], 0);
    while i < 8 {
        out[4 * i] = (i * BITS / 8) as u8;
        if i * BITS % 8 + BITS > 8 {
            out[4 * i + 1] = (i * BITS / 8) as u8 + 1;
        }
        i += 1;
    }
    out
}

/// Where in those bytes they start.
const fn shifts<const BITS: usize>() -> [u32; 8] {
    let (mut out, mut i) = ([0; 8], 0);
    while i < 8 {
        out[i] = (i * BITS % 8) as u32;
        i += 1;
    }
    out
}

/// Widens a vector and adds its halves.
#[inline(always)]
unsafe fn wide(x: __m256) -> __m256d {
    unsafe {
        let (low, high) = (_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        _mm256_add_pd(_mm256_cvtps_pd(low), _mm256_cvtps_pd(high))
    }
}

// SAFETY of the whole: intrinsics of the instruction set that the trait's contract demands, on pointers that it describes.
impl Simd for Avx2 {
    const LANES: usize = 8;
    type F = __m256;
    type I = __m256i;
    type Levels = ([__m256; 2], *const f32);

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m256 {
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m256) {
        unsafe { _mm256_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn xor(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_xor_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn round(x: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    unsafe fn pow2(n: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m256, limit: __m256, y: __m256) -> __m256 {
        unsafe { _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, limit), y) }
    }
    #[inline(always)]
    unsafe fn swap<const H: usize>(x: __m256) -> __m256 {
        unsafe {
            match H {
                1 => _mm256_permute_ps::<0b10_11_00_01>(x),
                2 => _mm256_permute_ps::<0b01_00_11_10>(x),
                _ => _mm256_permute2f128_ps::<1>(x, x),
            }
        }
    }
    #[inline(always)]
    unsafe fn sum4(x: [__m256; 4], to: *mut f64) {
        unsafe {
            // [a02.., b.., a13.., b..] and the same of c and d; then both halves of each together.
            let ab = _mm256_hadd_pd(wide(x[0]), wide(x[1]));
            let cd = _mm256_hadd_pd(wide(x[2]), wide(x[3]));
            let low = _mm256_permute2f128_pd::<0x20>(ab, cd);
            let high = _mm256_permute2f128_pd::<0x31>(ab, cd);
            _mm256_storeu_pd(to, _mm256_add_pd(low, high));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn count(x: __m256, bound: __m256, n: __m256i, step: i32) -> __m256i {
        unsafe {
            let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, bound));
            _mm256_add_epi32(n, _mm256_and_si256(above, _mm256_set1_epi32(step)))
        }
    }
    #[inline(always)]
    unsafe fn zeros() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn gather(from: *const f32, n: __m256i) -> __m256 {
        unsafe { _mm256_i32gather_ps::<4>(from, n) }
    }
    #[inline(always)]
    unsafe fn gather16(from: *const f32, n: __m256i) -> __m256 {
        unsafe {
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), n);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from.add(8)), n);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(n)))
        }
    }
    #[inline(always)]
    unsafe fn integer(x: __m256) -> __m256i {
        unsafe { _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(super::INTEGERS)) }
    }
    #[inline(always)]
    unsafe fn bits(x: __m256) -> __m256i {
        unsafe { _mm256_castps_si256(x) }
    }
    #[inline(always)]
    unsafe fn clamp(x: __m256, limit: __m256) -> __m256 {
        unsafe { _mm256_min_ps(_mm256_max_ps(x, _mm256_sub_ps(_mm256_setzero_ps(), limit)), limit) }
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, n: __m256i) {
        unsafe {
            let words = _mm_packus_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256::<1>(n));
            _mm_storel_epi64(to.cast(), _mm_packus_epi16(words, words));
        }
    }
    #[inline(always)]
    unsafe fn stream(to: *mut f32, x: __m256) {
        unsafe { _mm256_stream_ps(to, x) }
    }
    #[inline(always)]
    fn fence() {
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    fn prefetch(line: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }
    #[inline(always)]
    unsafe fn levels<const BITS: usize>(table: &Table) -> Self::Levels {
        let table = table.levels.as_ptr();
        unsafe { ([_mm256_loadu_ps(table), _mm256_loadu_ps(table.add(8))], table) }
    }
    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(codes: *const u8, (low, table): &Self::Levels) -> __m256 {
        unsafe {
            let code = if BYTE || BITS == 8 {
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.cast()))
            } else {
                let row = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.cast()));
                let bytes = _mm256_loadu_si256(const { &bytes::<BITS>() }.as_ptr().cast());
                let shifts = _mm256_loadu_si256(const { &shifts::<BITS>() }.as_ptr().cast());
                _mm256_srlv_epi32(_mm256_shuffle_epi8(row, bytes), shifts)
            };
            match BITS {
                2 | 3 => _mm256_permutevar8x32_ps(low[0], code),
                4 => {
                    let (a, b) = (_mm256_permutevar8x32_ps(low[0], code), _mm256_permutevar8x32_ps(low[1], code));
                    _mm256_blendv_ps(a, b, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(code)))
                }
                _ => {
                    let code = _mm256_and_si256(code, _mm256_set1_epi32((1 << BITS) - 1));
                    _mm256_i32gather_ps::<4>(*table, code)
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn decode_runs(planes: [*const u8; 3], (low, _): &Self::Levels) -> [__m256; 8] {
        unsafe {
            // No closures: they would not be compiled for this instruction set.
            let a = _mm256_cvtepu8_epi32(_mm_loadl_epi64(planes[0].cast()));
            let b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(planes[1].cast()));
            let c = _mm256_cvtepu8_epi32(_mm_loadl_epi64(planes[2].cast()));
            let rest = _mm256_or_si256(
                _mm256_and_si256(_mm256_srli_epi32::<3>(a), _mm256_set1_epi32(0x11)),
                _mm256_or_si256(
                    _mm256_and_si256(_mm256_srli_epi32::<2>(b), _mm256_set1_epi32(0x22)),
                    _mm256_and_si256(_mm256_srli_epi32::<1>(c), _mm256_set1_epi32(0x44)),
                ),
            );
            let first = _mm256_or_si256(a, _mm256_slli_epi32::<8>(b));
            let last = _mm256_or_si256(_mm256_slli_epi32::<16>(c), _mm256_slli_epi32::<24>(rest));
            let runs = _mm256_or_si256(first, last);
            let shifts = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
            let mut out = [_mm256_setzero_ps(); 8];
            for (j, out) in out.iter_mut().enumerate() {
                let run = _mm256_permutevar8x32_epi32(runs, _mm256_set1_epi32(j as i32));
                *out = _mm256_permutevar8x32_ps(low[0], _mm256_srlv_epi32(run, shifts));
            }
            out
        }
    }
}

super::kernels!(
    Avx2,
    "avx2",
    || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"),
    "avx2,fma,f16c"
);
