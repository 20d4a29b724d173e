//! AVX-512 with VBMI and VNNI: sixteen lanes. A code of up to four bits becomes its level in one permutation; words of 16 bits are
//! multiplied two a lane.

use super::table::{LevelTable, code_bytes, code_shifts};
use super::token::{INTEGERS, Job, Simd, computes, token, touches};
use std::arch::x86_64::*;

token!(
    /// AVX-512 with the byte permutations of VBMI and the products of VNNI, as Ice Lake and Zen 4 have them.
    Avx512,
    ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512vnni", "fma"],
    is_x86_feature_detected
);

/// The element whose code must stand at each place so that interleaving bytes within 128-bit lanes, as `by_bytes` does it,
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

/// Words of the two halves of a vector by turns.
const BY_TURNS: [u16; 32] = {
    let (mut out, mut i) = ([0; 32], 0);
    while i < 32 {
        out[i] = (i / 2 + i % 2 * 16) as u16;
        i += 1;
    }
    out
};

/// Where 32 densely packed codes are: the two bytes that hold each, and the bit where it starts in them.
const fn spread_words<const BITS: usize>() -> ([u8; 64], [u16; 32]) {
    let (mut bytes, mut shifts, mut i) = ([0; 64], [0; 32], 0);
    while i < 32 {
        bytes[2 * i] = (i * BITS / 8) as u8;
        bytes[2 * i + 1] = (i * BITS / 8) as u8 + 1;
        shifts[i] = (i * BITS % 8) as u16;
        i += 1;
    }
    (bytes, shifts)
}

/// `_mm512_dpwssd_epi32` as assembly: the compiler takes the intrinsic apart into a product and a sum where it hopes that latency
/// matters, which makes two instructions of one.
///
/// # Safety
/// Needs the instructions.
#[target_feature(enable = "avx512f,avx512vnni")]
#[inline]
unsafe fn dpwssd(mut sum: __m512i, a: __m512i, b: __m512i) -> __m512i {
    // SAFETY: the caller has the instructions; only registers are used.
    unsafe {
        std::arch::asm!(
            "vpdpwssd {sum}, {a}, {b}",
            sum = inout(zmm_reg) sum,
            a = in(zmm_reg) a,
            b = in(zmm_reg) b,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

impl Avx512 {
    computes! {
        /// The levels of 64 codes in `ORDER`, one a byte.
        fn by_bytes<const BITS: usize>(self, code: __m512i, bytes: &[[__m512i; 2]; 4]) -> [__m512; 4] {
            // Codes below 128 mirror those above: the index counts from the middle, the sign goes in at the end.
            let negative = if BITS == 8 { !_mm512_movepi8_mask(code) } else { 0 };
            let index = _mm512_xor_si512(code, _mm512_maskz_set1_epi8(negative, 0x7f));
            let mut b = [index; 4];
            for (b, [low, high]) in b.iter_mut().zip(bytes) {
                *b = match BITS {
                    6 => _mm512_permutexvar_epi8(index, *low),
                    _ => _mm512_permutex2var_epi8(*low, index, *high),
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
        /// The levels of the low six bits.
        fn lookup64(self, code: __m512i, low: &[__m512]) -> __m512 {
            let upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(32));
            let (first, second) = (
                _mm512_permutex2var_ps(low[0], code, low[1]),
                _mm512_permutex2var_ps(low[2], code, low[3]),
            );
            _mm512_mask_blend_ps(upper, first, second)
        }
    }
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    const LOOK_UP: usize = 4;
    const WORDS: bool = true;
    type F = __m512;
    type I = __m512i;
    /// Up to 128 levels, and their bytes by plane.
    type Levels<'t> = ([__m512; 8], [[__m512i; 2]; 4]);

    #[inline(always)]
    fn run<J: Job>(self, job: J) -> J::Output {
        // SAFETY: the token proves that the instructions are there.
        unsafe { self.run_with(job) }
    }

    computes! {
        fn splat(self, x: f32) -> __m512 { _mm512_set1_ps(x) }
        fn add(self, a: __m512, b: __m512) -> __m512 { _mm512_add_ps(a, b) }
        fn sub(self, a: __m512, b: __m512) -> __m512 { _mm512_sub_ps(a, b) }
        fn mul(self, a: __m512, b: __m512) -> __m512 { _mm512_mul_ps(a, b) }
        fn xor(self, a: __m512, b: __m512) -> __m512 { _mm512_xor_ps(a, b) }
        fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 { _mm512_fmadd_ps(a, b, c) }
        fn round(self, x: __m512) -> __m512 {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        }
        fn pow2(self, n: __m512) -> __m512 { _mm512_scalef_ps(_mm512_set1_ps(1.0), n) }
        fn zero_below(self, x: __m512, limit: __m512, y: __m512) -> __m512 {
            _mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(x, limit), y)
        }
        fn clamp(self, x: __m512, limit: __m512) -> __m512 {
            _mm512_min_ps(_mm512_max_ps(x, _mm512_sub_ps(_mm512_setzero_ps(), limit)), limit)
        }
        fn swap<const H: usize>(self, x: __m512) -> __m512 {
            match H {
                1 => _mm512_permute_ps::<0b10_11_00_01>(x),
                2 => _mm512_permute_ps::<0b01_00_11_10>(x),
                4 => _mm512_shuffle_f32x4::<0b10_11_00_01>(x, x),
                _ => _mm512_shuffle_f32x4::<0b01_00_11_10>(x, x),
            }
        }
        fn sum4(self, x: [__m512; 4]) -> [f64; 4] {
            // Lanes [a, b, a, b], then [a, b, c, d], four times.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
            let abcd = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            let half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps::<1>(abcd));
            let wide = _mm512_cvtps_pd(half);
            let mut sums = [0.0; 4];
            let sum = _mm256_add_pd(_mm512_castpd512_pd256(wide), _mm512_extractf64x4_pd::<1>(wide));
            _mm256_storeu_pd(sums.as_mut_ptr(), sum);
            sums
        }

        fn integers(self, x: i32) -> __m512i { _mm512_set1_epi32(x) }
        fn bits(self, x: __m512) -> __m512i { _mm512_castps_si512(x) }
        fn integer(self, x: __m512) -> __m512i { _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(INTEGERS)) }
        fn count(self, x: __m512, bound: __m512, n: __m512i, step: i32) -> __m512i {
            let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(x, bound);
            _mm512_mask_add_epi32(n, above, n, _mm512_set1_epi32(step))
        }
        fn plus(self, x: __m512i, n: i32) -> __m512i { _mm512_add_epi32(x, _mm512_set1_epi32(n)) }
        fn and(self, a: __m512i, b: __m512i) -> __m512i { _mm512_and_si512(a, b) }
        fn or(self, a: __m512i, b: __m512i) -> __m512i { _mm512_or_si512(a, b) }
        fn left(self, x: __m512i, by: i32) -> __m512i { _mm512_sll_epi32(x, _mm_cvtsi32_si128(by)) }
        fn right(self, x: __m512i, by: i32) -> __m512i { _mm512_srl_epi32(x, _mm_cvtsi32_si128(by)) }
        fn look_up(self, levels: __m512, n: __m512i) -> __m512 { _mm512_permutexvar_ps(n, levels) }
        fn nearest(self, x: __m512) -> __m512i { _mm512_cvtps_epi32(x) }
        fn float(self, x: __m512i) -> __m512 { _mm512_cvtepi32_ps(x) }
        fn right_words(self, x: __m512i, by: i32) -> __m512i { _mm512_srl_epi16(x, _mm_cvtsi32_si128(by)) }
        fn look_up_words<const BITS: usize>(self, levels: &[__m512i; 4], n: __m512i) -> __m512i {
            if BITS <= 5 {
                return _mm512_permutexvar_epi16(n, levels[0]);
            }
            if BITS == 6 {
                return _mm512_permutex2var_epi16(levels[0], n, levels[1]);
            }
            // Codes of the lower half mirror those of the upper one: the index counts from the middle, the sign goes in at the end.
            let negative = _mm512_testn_epi16_mask(n, _mm512_set1_epi16(1 << (BITS - 1)));
            let index = _mm512_xor_si512(n, _mm512_maskz_set1_epi16(negative, (1 << (BITS - 1)) - 1));
            let mut level = _mm512_permutex2var_epi16(levels[0], index, levels[1]);
            if BITS == 8 {
                let upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(64));
                level = _mm512_mask_blend_epi16(upper, level, _mm512_permutex2var_epi16(levels[2], index, levels[3]));
            }
            _mm512_mask_sub_epi16(level, negative, _mm512_setzero_si512(), level)
        }
        fn dot_words(self, sum: __m512i, a: __m512i, b: __m512i) -> __m512i { dpwssd(sum, a, b) }
        fn pair_words(self, a: __m512i, b: __m512i) -> [__m512i; 2] {
            [_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)]
        }
        fn sum_quarters(self, x: [__m512; 4]) -> [f32; 16] {
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
            let (ab, cd) = (_mm512_castps_pd(ab), _mm512_castps_pd(cd));
            let (low, high) = (_mm512_unpacklo_pd(ab, cd), _mm512_unpackhi_pd(ab, cd));
            // By quarters, of each vector.
            let sums = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
            let by_vector = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
            let mut out = [0.0; 16];
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(by_vector, sums));
            out
        }
        fn pick_right(self, x: __m512i, from: __m512i, by: __m512i) -> __m512i {
            _mm512_srlv_epi32(_mm512_permutexvar_epi32(from, x), by)
        }
    }

    touches! {
        unsafe fn load(self, from: *const f32) -> __m512 { _mm512_loadu_ps(from) }
        unsafe fn load_f16(self, from: *const u16) -> __m512 { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
        unsafe fn load_bytes(self, from: *const u8) -> __m512i { _mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast())) }
        unsafe fn load_half_bytes(self, from: [*const u8; 2]) -> __m512i {
            let (low, high) = (_mm_loadl_epi64(from[0].cast()), _mm_loadl_epi64(from[1].cast()));
            _mm512_cvtepu8_epi32(_mm_unpacklo_epi64(low, high))
        }
        unsafe fn load_words(self, from: *const u8) -> __m512i { _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast())) }
        unsafe fn load_integers(self, from: *const u8) -> __m512i { _mm512_loadu_si512(from.cast()) }
        unsafe fn store(self, to: *mut f32, x: __m512) { _mm512_storeu_ps(to, x) }
        unsafe fn store_integers(self, to: *mut u8, x: __m512i) { _mm512_storeu_si512(to.cast(), x) }
        unsafe fn store_bytes(self, to: *mut u8, n: __m512i) { _mm_storeu_si128(to.cast(), _mm512_cvtepi32_epi8(n)) }
        unsafe fn stream(self, to: *mut f32, x: __m512) { _mm512_stream_ps(to, x) }
        unsafe fn store_words(self, to: *mut i16, x: __m512i) {
            _mm256_storeu_si256(to.cast(), _mm512_cvtsepi32_epi16(x))
        }
        unsafe fn load_bytes_as_words(self, from: *const u8) -> __m512i {
            _mm512_cvtepu8_epi16(_mm256_loadu_si256(from.cast()))
        }
        unsafe fn load_quarters(self, rows: [*const u8; 4]) -> __m512i {
            let first = _mm512_castsi128_si512(_mm_loadu_si128(rows[0].cast()));
            let two = _mm512_inserti32x4::<1>(first, _mm_loadu_si128(rows[1].cast()));
            let three = _mm512_inserti32x4::<2>(two, _mm_loadu_si128(rows[2].cast()));
            _mm512_inserti32x4::<3>(three, _mm_loadu_si128(rows[3].cast()))
        }
        unsafe fn load_quarters_as_words(self, rows: [*const u8; 4]) -> __m512i {
            let low = _mm_unpacklo_epi64(_mm_loadl_epi64(rows[0].cast()), _mm_loadl_epi64(rows[1].cast()));
            let high = _mm_unpacklo_epi64(_mm_loadl_epi64(rows[2].cast()), _mm_loadl_epi64(rows[3].cast()));
            _mm512_cvtepu8_epi16(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high))
        }
        unsafe fn load_paired_as_words(self, rows: [*const u8; 2]) -> __m512i {
            let (a, b) = (_mm_loadu_si128(rows[0].cast()), _mm_loadu_si128(rows[1].cast()));
            let (low, high) = (_mm_unpacklo_epi8(a, b), _mm_unpackhi_epi8(a, b));
            _mm512_cvtepu8_epi16(_mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high))
        }
        unsafe fn load_quarter(self, from: *const u8) -> __m512i {
            _mm512_broadcast_i32x4(_mm_loadu_si128(from.cast()))
        }
        unsafe fn load_paired(self, rows: [*const u8; 2]) -> __m512i {
            let first = _mm512_castsi256_si512(_mm256_loadu_si256(rows[0].cast()));
            let both = _mm512_inserti64x4::<1>(first, _mm256_loadu_si256(rows[1].cast()));
            _mm512_permutexvar_epi16(_mm512_loadu_si512(BY_TURNS.as_ptr().cast()), both)
        }
        unsafe fn pairs(self, from: *const [f32; 2], n: __m512i) -> [__m512; 2] {
            let from = from.cast::<f32>();
            [_mm512_i32gather_ps::<8>(n, from), _mm512_i32gather_ps::<8>(n, from.add(1))]
        }
        unsafe fn gather16(self, from: *const f32, n: __m512i) -> __m512 { _mm512_permutexvar_ps(n, _mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    fn fence(self) {
        // SAFETY: every processor of this architecture has it.
        unsafe { _mm_sfence() }
    }
    #[inline(always)]
    fn prefetch(self, line: *const u8) {
        // SAFETY: a hint, which may name any address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) }
    }

    #[inline(always)]
    fn levels<const BITS: usize>(self, table: &LevelTable) -> Self::Levels<'_> {
        // SAFETY: the token proves that the instructions are there; what is loaded is within the table, which is aligned.
        unsafe {
            let mut low = [_mm512_setzero_ps(); 8];
            let mut bytes = [[_mm512_setzero_si512(); 2]; 4];
            for i in 0..8 {
                low[i] = _mm512_load_ps(table.levels.as_ptr().add(16 * i));
                bytes[i / 2][i % 2] = _mm512_load_si512(table.bytes[i / 2].as_ptr().add(64 * (i % 2)).cast());
            }
            (low, bytes)
        }
    }

    #[inline(always)]
    fn word_levels<const BITS: usize>(self, table: &LevelTable) -> [__m512i; 4] {
        // From 7 bits on the upper half.
        let first = if BITS < 7 { 0 } else { 1 << (BITS - 1) };
        // SAFETY: the token proves that the instructions are there; 128 words from 0, 64 or 128 on are within the table.
        unsafe {
            let mut levels = [_mm512_setzero_si512(); 4];
            for (i, levels) in levels.iter_mut().enumerate() {
                *levels = _mm512_loadu_si512(table.words.as_ptr().add(first + 32 * i).cast());
            }
            levels
        }
    }
    #[inline(always)]
    unsafe fn spread_words<const BITS: usize>(self, codes: *const u8) -> __m512i {
        let (bytes, shifts) = const { &spread_words::<BITS>() };
        // SAFETY: the token proves that the instructions are there; the caller promises 64 bytes.
        unsafe {
            let row = _mm512_loadu_si512(codes.cast());
            let pairs = _mm512_permutexvar_epi8(_mm512_loadu_si512(bytes.as_ptr().cast()), row);
            _mm512_srlv_epi16(pairs, _mm512_loadu_si512(shifts.as_ptr().cast()))
        }
    }

    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(self, codes: *const u8, levels: &Self::Levels<'_>) -> __m512 {
        let low = &levels.0;
        // SAFETY: the token proves that the instructions are there; the caller promises 16 bytes.
        unsafe {
            if BITS == 8 {
                // The first of four vectors: 16 codes where ORDER has its first.
                let row = _mm512_castsi128_si512(_mm_loadu_si128(codes.cast()));
                let order = _mm512_loadu_si512(ORDER.as_ptr().cast());
                return self.by_bytes::<8>(_mm512_permutexvar_epi8(order, row), &levels.1)[0];
            }
            let code = if BYTE {
                _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.cast()))
            } else {
                let row = _mm512_broadcast_i32x4(_mm_loadu_si128(codes.cast()));
                let bytes = _mm512_loadu_si512(const { &code_bytes::<BITS, 64>() }.as_ptr().cast());
                let shifts = _mm512_loadu_si512(const { &code_shifts::<BITS, 16>() }.as_ptr().cast());
                _mm512_srlv_epi32(_mm512_shuffle_epi8(row, bytes), shifts)
            };
            match BITS {
                2..=4 => _mm512_permutexvar_ps(code, low[0]),
                5 => _mm512_permutex2var_ps(low[0], code, low[1]),
                6 => self.lookup64(code, &low[..4]),
                _ => {
                    let upper = _mm512_test_epi32_mask(code, _mm512_set1_epi32(64));
                    let a = self.lookup64(code, &low[..4]);
                    _mm512_mask_blend_ps(upper, a, self.lookup64(code, &low[4..]))
                }
            }
        }
    }

    /// From 6 bits on, levels are looked up byte by byte, 64 elements at a time.
    #[inline(always)]
    unsafe fn decode4<const BITS: usize, const BYTE: bool>(
        self,
        codes: *const u8,
        levels: &Self::Levels<'_>,
    ) -> [__m512; 4] {
        // SAFETY: the token proves that the instructions are there; the caller promises 64 bytes.
        unsafe {
            if BITS < 6 {
                let step = if BYTE { 16 } else { 2 * BITS };
                return [
                    self.decode::<BITS, BYTE>(codes, levels),
                    self.decode::<BITS, BYTE>(codes.add(step), levels),
                    self.decode::<BITS, BYTE>(codes.add(2 * step), levels),
                    self.decode::<BITS, BYTE>(codes.add(3 * step), levels),
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
            self.by_bytes::<BITS>(ordered, &levels.1)
        }
    }
}
