//! AVX-512 with VBMI: sixteen lanes. A code of up to four bits becomes its level in one permutation.

use super::{Simd, Table};
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// The bytes of a row's next 16 that lanes find their codes in, for the in-lane byte shuffle; 0x80 gives zero.
const fn bytes<const BITS: usize>() -> [u8; 64] {
    let (mut out, mut i) = ([0x80u8; 64], 0);
    while i < 16 {
        out[4 * i] = (i * BITS / 8) as u8;
        if i * BITS % 8 + BITS > 8 {
            out[4 * i + 1] = (i * BITS / 8) as u8 + 1;
        }
        i += 1;
    }
    out
}

/// Where in those bytes they start.
const fn shifts<const BITS: usize>() -> [u32; 16] {
    let (mut out, mut i) = ([0; 16], 0);
    while i < 16 {
        out[i] = (i * BITS % 8) as u32;
        i += 1;
    }
    out
}

/// The element whose code must stand at each place so that interleaving bytes within 128-bit lanes, as `planes` does it,
/// gives four vectors in order.
const ORDER: [u8; 64] = {
    let (mut out, mut p) = ([0; 64], 0);
    while p < 64 {
        let (lane, vector, i) = (p / 16, p % 16 / 4, p % 4);
        out[p] = (16 * vector + 4 * lane + i) as u8;
        p += 1;
    }
    out
};

/// How densely packed codes get there: four elements' bytes into each 32 bits, and the bit where each code starts in its 64.
const fn spread<const BITS: usize>() -> ([u8; 64], [u8; 64]) {
    let (mut bytes, mut shifts, mut p) = ([0; 64], [0; 64], 0);
    while p < 64 {
        let start = ORDER[p / 4 * 4] as usize * BITS;
        bytes[p] = (start / 8 + p % 4) as u8;
        shifts[p] = (p % 8 / 4 * 32 + start % 8 + p % 4 * BITS) as u8;
        p += 1;
    }
    (bytes, shifts)
}

/// The levels of 64 codes in `ORDER`, one a byte.
#[inline(always)]
unsafe fn planes<const BITS: usize>(code: __m512i, planes: &[[__m512i; 2]; 4]) -> [__m512; 4] {
    unsafe {
        // Codes below 128 mirror those above: the index counts from the middle, the sign goes in at the end.
        let negative = if BITS == 8 { !_mm512_movepi8_mask(code) } else { 0 };
        let index = _mm512_xor_si512(code, _mm512_maskz_set1_epi8(negative, 0x7f));
        let mut b = [index; 4];
        for i in 0..4 {
            b[i] = match BITS {
                6 => _mm512_permutexvar_epi8(index, planes[i][0]),
                _ => _mm512_permutex2var_epi8(planes[i][0], index, planes[i][1]),
            };
        }
        b[3] = _mm512_or_si512(b[3], _mm512_maskz_set1_epi8(negative, -128));
        let (low, high) = (_mm512_unpacklo_epi8(b[0], b[1]), _mm512_unpackhi_epi8(b[0], b[1]));
        let (low2, high2) = (_mm512_unpacklo_epi8(b[2], b[3]), _mm512_unpackhi_epi8(b[2], b[3]));
        [
            _mm512_castsi512_ps(_mm512_unpacklo_epi16(low, low2)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(low, low2)),
            _mm512_castsi512_ps(_mm512_unpacklo_epi16(high, high2)),
            _mm512_castsi512_ps(_mm512_unpackhi_epi16(high, high2)),
        ]
    }
}

/// The levels of the low six bits.
#[inline(always)]
unsafe fn lookup64(code: __m512i, a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    unsafe {
        let upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
        _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(a, code, b), _mm512_permutex2var_ps(c, code, d))
    }
}

/// The nibbles of sixteen runs of eight codes of 3 bits.
#[inline(always)]
unsafe fn runs(planes: [*const u8; 3]) -> __m512i {
    unsafe {
        // No closures: they would not be compiled for this instruction set.
        let a = _mm512_cvtepu8_epi32(_mm_loadu_si128(planes[0].cast()));
        let b = _mm512_cvtepu8_epi32(_mm_loadu_si128(planes[1].cast()));
        let c = _mm512_cvtepu8_epi32(_mm_loadu_si128(planes[2].cast()));
        let rest = _mm512_or_si512(
            _mm512_and_si512(_mm512_srli_epi32::<3>(a), _mm512_set1_epi32(0x11)),
            _mm512_or_si512(
                _mm512_and_si512(_mm512_srli_epi32::<2>(b), _mm512_set1_epi32(0x22)),
                _mm512_and_si512(_mm512_srli_epi32::<1>(c), _mm512_set1_epi32(0x44)),
            ),
        );
        let low = _mm512_or_si512(a, _mm512_slli_epi32::<8>(b));
        let high = _mm512_or_si512(_mm512_slli_epi32::<16>(c), _mm512_slli_epi32::<24>(rest));
        _mm512_or_si512(low, high)
    }
}

// SAFETY of the whole: intrinsics of the instruction set that the trait's contract demands, on pointers that it describes.
impl Simd for Avx512 {
    const LANES: usize = 16;
    type F = __m512;
    type I = __m512i;
    /// Up to 128 levels, and their bytes by plane.
    type Levels = ([__m512; 8], [[__m512i; 2]; 4]);

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, x: __m512) {
        unsafe { _mm512_storeu_ps(to, x) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn xor(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_xor_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn round(x: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }
    #[inline(always)]
    unsafe fn pow2(n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(_mm512_set1_ps(1.0), n) }
    }
    #[inline(always)]
    unsafe fn zero_below(x: __m512, limit: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), y) }
    }
    #[inline(always)]
    unsafe fn swap<const H: usize>(x: __m512) -> __m512 {
        unsafe {
            match H {
                1 => _mm512_permute_ps::<0b10_11_00_01>(x),
                2 => _mm512_permute_ps::<0b01_00_11_10>(x),
                4 => _mm512_shuffle_f32x4::<0b10_11_00_01>(x, x),
                _ => _mm512_shuffle_f32x4::<0b01_00_11_10>(x, x),
            }
        }
    }
    #[inline(always)]
    unsafe fn sum4(x: [__m512; 4], to: *mut f64) {
        unsafe {
            // Lanes [a, b, a, b], then [a, b, c, d], four times.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
            let abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            let half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps::<1>(abcd));
            let wide = _mm512_cvtps_pd(half);
            _mm256_storeu_pd(to, _mm256_add_pd(_mm512_castpd512_pd256(wide), _mm512_extractf64x4_pd::<1>(wide)));
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
    const NIBBLES: usize = 4;
    #[inline(always)]
    unsafe fn decode_run<const BITS: usize>(codes: *const u8, c: usize, levels: &Self::Levels) -> __m512 {
        unsafe {
            let run = match BITS {
                2 => _mm512_cvtepu16_epi32(_mm256_loadu_si256(codes.cast())),
                _ => _mm512_loadu_si512(codes.cast()),
            };
            let code = _mm512_srlv_epi32(run, _mm512_set1_epi32((c * BITS) as i32));
            _mm512_permutexvar_ps(code, levels.0[0])
        }
    }
    #[inline(always)]
    unsafe fn count(x: __m512, bound: __m512, n: __m512i, step: i32) -> __m512i {
        unsafe {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, bound);
            _mm512_mask_add_epi32(n, above, n, _mm512_set1_epi32(step))
        }
    }
    #[inline(always)]
    unsafe fn zeros() -> __m512i {
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn pairs(from: *const [f32; 2], n: __m512i) -> [__m512; 2] {
        let from = from.cast::<f32>();
        unsafe { [_mm512_i32gather_ps::<8>(n, from), _mm512_i32gather_ps::<8>(n, from.add(1))] }
    }
    #[inline(always)]
    unsafe fn gather16(from: *const f32, n: __m512i) -> __m512 {
        unsafe { _mm512_permutexvar_ps(n, _mm512_loadu_ps(from)) }
    }
    #[inline(always)]
    unsafe fn integer(x: __m512) -> __m512i {
        unsafe { _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(super::INTEGERS)) }
    }
    #[inline(always)]
    unsafe fn bits(x: __m512) -> __m512i {
        unsafe { _mm512_castps_si512(x) }
    }
    #[inline(always)]
    unsafe fn clamp(x: __m512, limit: __m512) -> __m512 {
        unsafe { _mm512_min_ps(_mm512_max_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit) }
    }
    #[inline(always)]
    unsafe fn store_bytes(to: *mut u8, n: __m512i) {
        unsafe { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(n)) }
    }
    #[inline(always)]
    unsafe fn stream(to: *mut f32, x: __m512) {
        unsafe { _mm512_stream_ps(to, x) }
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
        unsafe {
            let mut low = [_mm512_setzero_ps(); 8];
            let mut planes = [[_mm512_setzero_si512(); 2]; 4];
            for i in 0..8 {
                low[i] = _mm512_load_ps(table.levels.as_ptr().add(16 * i));
                planes[i / 2][i % 2] = _mm512_load_si512(table.planes[i / 2].as_ptr().add(64 * (i % 2)).cast());
            }
            (low, planes)
        }
    }
    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(codes: *const u8, levels: &Self::Levels) -> __m512 {
        let low = &levels.0;
        unsafe {
            if BITS == 8 {
                // The first of four vectors: 16 codes where ORDER has its first.
                let row = _mm512_castsi128_si512(_mm_loadu_si128(codes.cast()));
                return planes::<8>(_mm512_permutexvar_epi8(_mm512_loadu_si512(ORDER.as_ptr().cast()), row), &levels.1)
                    [0];
            }
            let code = if BYTE {
                _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()))
            } else {
                let row = _mm512_broadcast_i32x4(_mm_loadu_si128(codes.cast()));
                let bytes = _mm512_loadu_si512(const { &bytes::<BITS>() }.as_ptr().cast());
                let shifts = _mm512_loadu_si512(const { &shifts::<BITS>() }.as_ptr().cast());
                _mm512_srlv_epi32(_mm512_shuffle_epi8(row, bytes), shifts)
            };
            match BITS {
                2..=4 => _mm512_permutexvar_ps(code, low[0]),
                5 => _mm512_permutex2var_ps(low[0], code, low[1]),
                6 => lookup64(code, low[0], low[1], low[2], low[3]),
                7 => {
                    let upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(64));
                    let a = lookup64(code, low[0], low[1], low[2], low[3]);
                    _mm512_mask_blend_ps(upper, a, lookup64(code, low[4], low[5], low[6], low[7]))
                }
                _ => unreachable!(),
            }
        }
    }

    #[inline(always)]
    unsafe fn nibbles(planes: [*const u8; 3], to: *mut u8) {
        unsafe { _mm512_storeu_si512(to.cast(), runs(planes)) }
    }
    #[inline(always)]
    unsafe fn decode_runs(planes: [*const u8; 3], levels: &Self::Levels) -> [__m512; 8] {
        unsafe {
            let runs = runs(planes);
            let shifts = _mm512_loadu_si512(
                const { &[0u32, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28] }.as_ptr().cast(),
            );
            // Two runs a vector.
            let halves =
                _mm512_loadu_si512(const { &[0u32, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1] }.as_ptr().cast());
            let mut out = [_mm512_setzero_ps(); 8];
            for (j, out) in out.iter_mut().enumerate() {
                let of = _mm512_add_epi32(halves, _mm512_set1_epi32(2 * j as i32));
                let code = _mm512_srlv_epi32(_mm512_permutexvar_epi32(of, runs), shifts);
                *out = _mm512_permutexvar_ps(code, levels.0[0]);
            }
            out
        }
    }

    /// From 6 bits on, levels are looked up byte by byte, 64 elements at a time.
    #[inline(always)]
    unsafe fn decode4<const BITS: usize, const BYTE: bool>(codes: *const u8, levels: &Self::Levels) -> [__m512; 4] {
        unsafe {
            if BITS < 6 {
                let step = if BYTE { 16 } else { 2 * BITS };
                return [
                    Self::decode::<BITS, BYTE>(codes, levels),
                    Self::decode::<BITS, BYTE>(codes.add(step), levels),
                    Self::decode::<BITS, BYTE>(codes.add(2 * step), levels),
                    Self::decode::<BITS, BYTE>(codes.add(3 * step), levels),
                ];
            }
            let row = _mm512_loadu_si512(codes.cast());
            let ordered = if BYTE || BITS == 8 {
                _mm512_permutexvar_epi8(_mm512_loadu_si512(ORDER.as_ptr().cast()), row)
            } else {
                let (bytes, shifts) = const { &spread::<BITS>() };
                let spread = _mm512_permutexvar_epi8(_mm512_loadu_si512(bytes.as_ptr().cast()), row);
                _mm512_multishift_epi64_epi8(_mm512_loadu_si512(shifts.as_ptr().cast()), spread)
            };
            planes::<BITS>(ordered, &levels.1)
        }
    }
}

super::kernels!(
    Avx512,
    "avx512",
    || {
        is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("fma")
    },
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,fma"
);
