//! AVX2 with FMA and F16C: eight lanes. Levels of up to three bits are looked up in a register, those of four to seven bits
//! byte by byte in several, those of eight in memory.

use super::table::{LevelTable, code_bytes, code_shifts};
use super::token::{INTEGERS, Job, Simd, computes, token, touches};
use std::arch::x86_64::*;

token!(
    /// AVX2, FMA and F16C: x86-64 since 2013.
    Avx2,
    ["avx2", "fma", "f16c"],
    is_x86_feature_detected
);

/// The bytes of 32 nibbles, each as the lower half of 16 bits, so that interleaving bytes within 128-bit lanes gives four
/// vectors in order.
const fn pairs() -> [u8; 32] {
    let (mut out, mut i) = ([0x80u8; 32], 0);
    while i < 16 {
        let (lane, vector) = (i / 8, i % 8 / 2);
        out[2 * i] = (4 * vector + 2 * lane + i % 2) as u8;
        i += 1;
    }
    out
}

/// How 32 codes of 5 to 7 bits become bytes in that order: where the bytes of each four codes are, among the first 16 and among
/// those from `LAST` on, and the bit where they start.
const fn spread<const BITS: usize>() -> ([u8; 32], [u8; 32], [u32; 8]) {
    let (mut first, mut last, mut shifts, mut p) = ([0x80; 32], [0x80; 32], [0; 8], 0);
    while p < 32 {
        let (lane, vector, i) = (p / 16, p % 16 / 4, p % 4);
        let start = (8 * vector + 4 * lane) * BITS;
        let byte = start / 8 + i;
        if byte < 16 {
            first[p] = byte as u8;
        } else {
            last[p] = (byte - LAST) as u8;
        }
        shifts[p / 4] = (start % 8) as u32;
        p += 1;
    }
    (first, last, shifts)
}

/// 28 bytes are 32 codes of 7 bits.
const LAST: usize = 12;

#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Levels<'t> {
    /// The first eight levels.
    low: __m256,
    /// Byte b of the first sixteen, twice each.
    bytes: [__m256i; 4],
    table: &'t LevelTable,
}

impl Avx2 {
    computes! {
        /// The levels of eight bytes, loaded one by one: a gather takes almost twice as long.
        fn bytewise(self, codes: u64, table: &LevelTable) -> __m256 {
            let mut x = [_mm_setzero_ps(); 8];
            let mut i = 0;
            while i < 8 {
                x[i] = _mm_load_ss(&table.levels[(codes >> (8 * i)) as u8 as usize]);
                i += 1;
            }
            let low = _mm_movelh_ps(_mm_unpacklo_ps(x[0], x[1]), _mm_unpacklo_ps(x[2], x[3]));
            let high = _mm_movelh_ps(_mm_unpacklo_ps(x[4], x[5]), _mm_unpacklo_ps(x[6], x[7]));
            _mm256_set_m128(high, low)
        }
        /// The bytes of four vectors' elements, put together.
        fn interleave(self, b: [__m256i; 4]) -> [__m256; 4] {
            let (low, high) = (_mm256_unpacklo_epi8(b[0], b[1]), _mm256_unpackhi_epi8(b[0], b[1]));
            let (low2, high2) = (_mm256_unpacklo_epi8(b[2], b[3]), _mm256_unpackhi_epi8(b[2], b[3]));
            [
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(low, low2)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(low, low2)),
                _mm256_castsi256_ps(_mm256_unpacklo_epi16(high, high2)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(high, high2)),
            ]
        }
        /// The levels of 32 codes of 4 to 7 bits, one a byte: of a codebook's upper half, as the lower one mirrors it.
        fn mirrored<const BITS: usize>(self, codes: __m256i, table: &LevelTable) -> [__m256; 4] {
            let half = 1 << (BITS - 1);
            let negative = _mm256_cmpgt_epi8(_mm256_set1_epi8(half as i8), codes);
            let index = _mm256_and_si256(_mm256_xor_si256(codes, negative), _mm256_set1_epi8((half - 1) as i8));
            let mut b = [_mm256_setzero_si256(); 4];
            let mut first = 0;
            while first < half {
                // A shuffle gives zero where the top bit is set: for indices of other tables.
                let within = match half {
                    8 | 16 => index,
                    _ => _mm256_add_epi8(_mm256_xor_si256(index, _mm256_set1_epi8(first as i8)), _mm256_set1_epi8(0x70)),
                };
                for (b, bytes) in b.iter_mut().zip(&table.bytes) {
                    // With half at most 64 and 16 bytes from half + first on: within 128.
                    let levels = _mm_loadu_si128(bytes.as_ptr().add(half + first).cast());
                    *b = _mm256_or_si256(*b, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(levels), within));
                }
                first += 16;
            }
            b[3] = _mm256_or_si256(b[3], _mm256_and_si256(negative, _mm256_set1_epi8(-128)));
            self.interleave(b)
        }
    }
}

impl Simd for Avx2 {
    const LANES: usize = 8;
    // Four bits take two look-ups here: fewer if four vectors are decoded together.
    const LOOK_UP: usize = 3;
    type F = __m256;
    type I = __m256i;
    type Levels<'t> = Levels<'t>;

    #[inline(always)]
    fn run<J: Job>(self, job: J) -> J::Output {
        // SAFETY: the token proves that the instructions are there.
        unsafe { self.run_with(job) }
    }

    computes! {
        fn splat(self, x: f32) -> __m256 { _mm256_set1_ps(x) }
        fn add(self, a: __m256, b: __m256) -> __m256 { _mm256_add_ps(a, b) }
        fn sub(self, a: __m256, b: __m256) -> __m256 { _mm256_sub_ps(a, b) }
        fn mul(self, a: __m256, b: __m256) -> __m256 { _mm256_mul_ps(a, b) }
        fn xor(self, a: __m256, b: __m256) -> __m256 { _mm256_xor_ps(a, b) }
        fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 { _mm256_fmadd_ps(a, b, c) }
        fn round(self, x: __m256) -> __m256 {
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x)
        }
        fn pow2(self, n: __m256) -> __m256 {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
        fn zero_below(self, x: __m256, limit: __m256, y: __m256) -> __m256 {
            _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(x, limit), y)
        }
        fn clamp(self, x: __m256, limit: __m256) -> __m256 {
            _mm256_min_ps(_mm256_max_ps(x, _mm256_sub_ps(_mm256_setzero_ps(), limit)), limit)
        }
        fn swap<const H: usize>(self, x: __m256) -> __m256 {
            match H {
                1 => _mm256_permute_ps::<0b10_11_00_01>(x),
                2 => _mm256_permute_ps::<0b01_00_11_10>(x),
                _ => _mm256_permute2f128_ps::<1>(x, x),
            }
        }
        fn sum4(self, x: [__m256; 4]) -> [f64; 4] {
            // Lanes [a, b, a, b], then [a, b, c, d], twice.
            let ab = _mm256_add_ps(_mm256_unpacklo_ps(x[0], x[1]), _mm256_unpackhi_ps(x[0], x[1]));
            let cd = _mm256_add_ps(_mm256_unpacklo_ps(x[2], x[3]), _mm256_unpackhi_ps(x[2], x[3]));
            let (ab, cd) = (_mm256_castps_pd(ab), _mm256_castps_pd(cd));
            let (low, high) = (_mm256_unpacklo_pd(ab, cd), _mm256_unpackhi_pd(ab, cd));
            let abcd = _mm256_add_ps(_mm256_castpd_ps(low), _mm256_castpd_ps(high));
            let (low, high) = (_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd));
            let mut sums = [0.0; 4];
            _mm256_storeu_pd(sums.as_mut_ptr(), _mm256_add_pd(_mm256_cvtps_pd(low), _mm256_cvtps_pd(high)));
            sums
        }

        fn integers(self, x: i32) -> __m256i { _mm256_set1_epi32(x) }
        fn bits(self, x: __m256) -> __m256i { _mm256_castps_si256(x) }
        fn integer(self, x: __m256) -> __m256i { _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(INTEGERS)) }
        fn count(self, x: __m256, bound: __m256, n: __m256i, step: i32) -> __m256i {
            let above = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_GT_OQ>(x, bound));
            _mm256_add_epi32(n, _mm256_and_si256(above, _mm256_set1_epi32(step)))
        }
        fn plus(self, x: __m256i, n: i32) -> __m256i { _mm256_add_epi32(x, _mm256_set1_epi32(n)) }
        fn and(self, a: __m256i, b: __m256i) -> __m256i { _mm256_and_si256(a, b) }
        fn or(self, a: __m256i, b: __m256i) -> __m256i { _mm256_or_si256(a, b) }
        fn left(self, x: __m256i, by: i32) -> __m256i { _mm256_sll_epi32(x, _mm_cvtsi32_si128(by)) }
        fn right(self, x: __m256i, by: i32) -> __m256i { _mm256_srl_epi32(x, _mm_cvtsi32_si128(by)) }
        fn look_up(self, levels: __m256, n: __m256i) -> __m256 { _mm256_permutevar8x32_ps(levels, n) }
        fn pick_right(self, x: __m256i, from: __m256i, by: __m256i) -> __m256i {
            _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(x, from), by)
        }
    }

    touches! {
        unsafe fn load(self, from: *const f32) -> __m256 { _mm256_loadu_ps(from) }
        unsafe fn load_f16(self, from: *const u16) -> __m256 { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
        unsafe fn load_bytes(self, from: *const u8) -> __m256i { _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast())) }
        unsafe fn load_words(self, from: *const u8) -> __m256i { _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast())) }
        unsafe fn load_integers(self, from: *const u8) -> __m256i { _mm256_loadu_si256(from.cast()) }
        unsafe fn store(self, to: *mut f32, x: __m256) { _mm256_storeu_ps(to, x) }
        unsafe fn store_integers(self, to: *mut u8, x: __m256i) { _mm256_storeu_si256(to.cast(), x) }
        unsafe fn store_bytes(self, to: *mut u8, n: __m256i) {
            let words = _mm_packus_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256::<1>(n));
            _mm_storel_epi64(to.cast(), _mm_packus_epi16(words, words));
        }
        unsafe fn stream(self, to: *mut f32, x: __m256) { _mm256_stream_ps(to, x) }
        unsafe fn pairs(self, from: *const [f32; 2], n: __m256i) -> [__m256; 2] {
            // Eight loads: a gather takes longer.
            let (mut at, from) = ([0i32; 8], from.cast::<f64>());
            _mm256_storeu_si256(at.as_mut_ptr().cast(), n);
            let mut x = [_mm_setzero_pd(); 4];
            let mut i = 0;
            while i < 4 {
                let first = _mm_load_sd(from.add(at[2 * i] as usize));
                x[i] = _mm_loadh_pd(first, from.add(at[2 * i + 1] as usize));
                i += 1;
            }
            let (a, b) = (_mm256_set_m128d(x[2], x[0]), _mm256_set_m128d(x[3], x[1]));
            let (a, b) = (_mm256_castpd_ps(a), _mm256_castpd_ps(b));
            [_mm256_shuffle_ps::<0b10_00_10_00>(a, b), _mm256_shuffle_ps::<0b11_01_11_01>(a, b)]
        }
        unsafe fn gather16(self, from: *const f32, n: __m256i) -> __m256 {
            let low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from), n);
            let high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(from.add(8)), n);
            _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(n)))
        }
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
    fn levels<const BITS: usize>(self, table: &LevelTable) -> Levels<'_> {
        // SAFETY: the token proves that the instructions are there; what is loaded is within the table.
        unsafe {
            let mut bytes = [_mm256_setzero_si256(); 4];
            for (own, bytes) in bytes.iter_mut().zip(&table.bytes) {
                *own = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes.as_ptr().cast()));
            }
            Levels { low: _mm256_loadu_ps(table.levels.as_ptr()), bytes, table }
        }
    }

    #[inline(always)]
    unsafe fn decode<const BITS: usize, const BYTE: bool>(self, codes: *const u8, levels: &Levels<'_>) -> __m256 {
        // SAFETY: the token proves that the instructions are there; the caller promises 16 bytes; the table has 256 levels.
        unsafe {
            if BITS == 8 {
                return self.bytewise(codes.cast::<u64>().read_unaligned(), levels.table);
            }
            let code = if BYTE {
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.cast()))
            } else {
                let row = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.cast()));
                let bytes = _mm256_loadu_si256(const { &code_bytes::<BITS, 32>() }.as_ptr().cast());
                let shifts = _mm256_loadu_si256(const { &code_shifts::<BITS, 8>() }.as_ptr().cast());
                _mm256_srlv_epi32(_mm256_shuffle_epi8(row, bytes), shifts)
            };
            if BITS <= 3 {
                return _mm256_permutevar8x32_ps(levels.low, code);
            }
            let code = _mm256_and_si256(code, _mm256_set1_epi32((1 << BITS) - 1));
            _mm256_i32gather_ps::<4>(levels.table.levels.as_ptr(), code)
        }
    }

    /// Levels of four to seven bits are looked up byte by byte, 32 elements at a time.
    #[inline(always)]
    unsafe fn decode4<const BITS: usize, const BYTE: bool>(self, codes: *const u8, levels: &Levels<'_>) -> [__m256; 4] {
        // SAFETY: the token proves that the instructions are there; the caller promises 64 bytes.
        unsafe {
            if BITS <= 3 || BITS == 8 {
                let step = if BYTE { 8 } else { BITS };
                return [
                    self.decode::<BITS, BYTE>(codes, levels),
                    self.decode::<BITS, BYTE>(codes.add(step), levels),
                    self.decode::<BITS, BYTE>(codes.add(2 * step), levels),
                    self.decode::<BITS, BYTE>(codes.add(3 * step), levels),
                ];
            }
            if BYTE {
                // What is above a code may be anything.
                let codes =
                    _mm256_and_si256(_mm256_loadu_si256(codes.cast()), _mm256_set1_epi8((0xffu8 >> (8 - BITS)) as i8));
                let order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
                return self.mirrored::<BITS>(_mm256_permutevar8x32_epi32(codes, order), levels.table);
            }
            let row = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.cast()));
            if BITS == 4 {
                // Each byte as a pair of bytes.
                let row = _mm256_shuffle_epi8(row, _mm256_loadu_si256(const { &pairs() }.as_ptr().cast()));
                let code = _mm256_or_si256(row, _mm256_slli_epi16::<4>(row));
                let code = _mm256_and_si256(code, _mm256_set1_epi8(15));
                let mut b = [code; 4];
                for (b, &bytes) in b.iter_mut().zip(&levels.bytes) {
                    *b = _mm256_shuffle_epi8(bytes, *b);
                }
                return self.interleave(b);
            }
            let (first, last, shifts) = const { &spread::<BITS>() };
            let rest = _mm256_broadcastsi128_si256(_mm_loadu_si128(codes.add(LAST).cast()));
            let fours = _mm256_or_si256(
                _mm256_shuffle_epi8(row, _mm256_loadu_si256(first.as_ptr().cast())),
                _mm256_shuffle_epi8(rest, _mm256_loadu_si256(last.as_ptr().cast())),
            );
            // Four codes in 32 bits, then two in 16, then one in 8.
            let fours = _mm256_srlv_epi32(fours, _mm256_loadu_si256(shifts.as_ptr().cast()));
            let upper = _mm256_sllv_epi32(fours, _mm256_set1_epi32(16 - 2 * BITS as i32));
            let twos = _mm256_blend_epi16::<0b1010_1010>(fours, upper);
            let upper = _mm256_sllv_epi32(twos, _mm256_set1_epi32(8 - BITS as i32));
            let mask = _mm256_set1_epi16((1 << BITS) - 1);
            let code =
                _mm256_or_si256(_mm256_and_si256(twos, mask), _mm256_and_si256(upper, _mm256_slli_epi16::<8>(mask)));
            self.mirrored::<BITS>(code, levels.table)
        }
    }
}
