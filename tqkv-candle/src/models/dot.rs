//! Products of packed rows with activations in 16 bits: sums of integers, without decoding the weights. x86-64 with AVX2.
//!
//! An activation's error is at most 2^-16 of the largest of its 32: candle's own products, which round to 8 bits, make 256 times
//! as much, and cost SmolLM2 0.0025 nats a token.

use super::blocks::{half, part, scale_and_min};
use candle_core::quantized::GgmlDType;
use std::arch::x86_64::*;

/// 32 activations: `quants · scale`.
#[repr(align(64))]
pub(super) struct Group {
    quants: [i16; 32],
    scale: f32,
    /// Of what the quants stand for: then what rounding adds is multiplied by weights, and not by quants before their offset.
    sum: f32,
}

impl Group {
    fn new(x: &[f32; 32]) -> Self {
        let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let inverse = if largest > 0.0 { 32767.0 / largest } else { 0.0 };
        let mut quants = [0; 32];
        for i in 0..32 {
            // 1.5 · 2^23: a sum's last bits are the nearest integer.
            quants[i] = (x[i] * inverse + 12_582_912.0).to_bits() as i16;
        }
        // What is no number stays none.
        let scale = if x.iter().all(|x| x.is_finite()) { largest / 32767.0 } else { f32::NAN };
        let sum = quants.iter().map(|&quant| i32::from(quant)).sum::<i32>() as f32 * scale;
        Self { quants, scale, sum }
    }

    /// Groups of whole rows, which have whole groups.
    pub fn all(x: &[f32]) -> Vec<Self> {
        x.as_chunks().0.iter().map(Self::new).collect()
    }
}

/// Whether this processor and this type have the products here.
pub(super) fn knows(dtype: GgmlDType) -> bool {
    use GgmlDType::{Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q6K, Q8_0};
    let known = matches!(dtype, Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0 | Q4K | Q6K);
    known && is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

/// The products of whole rows with every token of `x`, `[rows, tokens]`.
///
/// # Safety
/// [`knows`] the type; `x` has a row's groups for each token, and `rows` so many bytes a row.
pub(super) unsafe fn dot_rows(dtype: GgmlDType, rows: &[u8], row_bytes: usize, x: &[Group], out: &mut [f32]) {
    if is_x86_feature_detected!("avx512bw") {
        // SAFETY: the processor has what the function is compiled for, as it has what `knows` asks for.
        return unsafe { dot_rows_512(dtype, rows, row_bytes, x, out) };
    }
    // SAFETY: as the caller promises.
    unsafe { dot_rows_256(dtype, rows, row_bytes, x, out) }
}

/// # Safety
/// As [`dot_rows`], on a processor with these features.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn dot_rows_512(dtype: GgmlDType, rows: &[u8], row_bytes: usize, x: &[Group], out: &mut [f32]) {
    // SAFETY: as the caller promises.
    unsafe { dot_rows_with::<Wide>(dtype, rows, row_bytes, x, out) }
}

/// # Safety
/// As [`dot_rows`], on a processor with these features.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dot_rows_256(dtype: GgmlDType, rows: &[u8], row_bytes: usize, x: &[Group], out: &mut [f32]) {
    // SAFETY: as the caller promises.
    unsafe { dot_rows_with::<Narrow>(dtype, rows, row_bytes, x, out) }
}

/// # Safety
/// The processor has the features of `I`.
#[inline(always)]
unsafe fn dot_rows_with<I: Isa>(dtype: GgmlDType, rows: &[u8], row_bytes: usize, x: &[Group], out: &mut [f32]) {
    let tokens = out.len() * row_bytes / rows.len().max(1);
    let width = x.len() / tokens.max(1);
    for (row, out) in rows.chunks_exact(row_bytes).zip(out.chunks_exact_mut(tokens.max(1))) {
        for (x, out) in x.chunks_exact(width.max(1)).zip(out) {
            // SAFETY: as the caller promises.
            *out = unsafe { dot::<I>(dtype, row, x) };
        }
    }
}

/// # Safety
/// The processor has the features of `I`.
#[inline(always)]
unsafe fn dot<I: Isa>(dtype: GgmlDType, row: &[u8], x: &[Group]) -> f32 {
    // SAFETY: as the caller promises.
    unsafe {
        match dtype {
            GgmlDType::Q4_0 => each::<I, 18>(row, x, |b| (nibbles(part(b, 2)), halves(b)[0], -8.0)),
            GgmlDType::Q4_1 => each_with_min::<I, 20>(row, x, |b| (nibbles(part(b, 4)), halves(b))),
            GgmlDType::Q5_0 => each::<I, 22>(row, x, |b| (five_bits(part(b, 2)), halves(b)[0], -16.0)),
            GgmlDType::Q5_1 => each_with_min::<I, 24>(row, x, |b| (five_bits(part(b, 4)), halves(b))),
            GgmlDType::Q8_0 => each::<I, 34>(row, x, |b| (load(part(b, 2)), halves(b)[0], 0.0)),
            GgmlDType::Q4K => q4k::<I>(row, x),
            _ => q6k::<I>(row, x),
        }
    }
}

/// Blocks of 32 quants with a scale; `offset` is added to each quant.
///
/// # Safety
/// The processor has the features of `I`.
#[inline(always)]
unsafe fn each<I: Isa, const BYTES: usize>(
    row: &[u8],
    x: &[Group],
    block: impl Fn(&[u8; BYTES]) -> (__m256i, f32, f32),
) -> f32 {
    let (mut sum, mut rest) = (I::zero(), 0.0);
    for (bytes, x) in row.as_chunks().0.iter().zip(x) {
        let (quants, d, offset) = block(bytes);
        // SAFETY: as the caller promises.
        sum = unsafe { I::add(sum, quants, &x.quants, d * x.scale) };
        rest += d * offset * x.sum;
    }
    // SAFETY: as the caller promises.
    unsafe { I::total(sum) + rest }
}

/// Blocks of 32 quants with a scale and a minimum.
///
/// # Safety
/// The processor has the features of `I`.
#[inline(always)]
unsafe fn each_with_min<I: Isa, const BYTES: usize>(
    row: &[u8],
    x: &[Group],
    block: impl Fn(&[u8; BYTES]) -> (__m256i, [f32; 2]),
) -> f32 {
    let (mut sum, mut rest) = (I::zero(), 0.0);
    for (bytes, x) in row.as_chunks().0.iter().zip(x) {
        let (quants, [d, min]) = block(bytes);
        // SAFETY: as the caller promises.
        sum = unsafe { I::add(sum, quants, &x.quants, d * x.scale) };
        rest += min * x.sum;
    }
    // SAFETY: as the caller promises.
    unsafe { I::total(sum) + rest }
}

/// # Safety
/// The processor has the features of `I`.
#[inline(always)]
unsafe fn q4k<I: Isa>(row: &[u8], x: &[Group]) -> f32 {
    let (mut sum, mut rest) = (I::zero(), 0.0);
    for (b, x) in row.as_chunks::<144>().0.iter().zip(x.as_chunks::<8>().0) {
        let [d, m] = halves(b);
        for (i, x) in x.iter().enumerate() {
            let (scale, min) = scale_and_min(i, &b[4..16]);
            // SAFETY: as the caller promises.
            unsafe {
                let bytes = load(part(b, 16 + i / 2 * 32));
                let quants = if i % 2 == 0 { bytes } else { _mm256_srli_epi16(bytes, 4) };
                let quants = _mm256_and_si256(quants, _mm256_set1_epi8(15));
                sum = I::add(sum, quants, &x.quants, d * scale * x.scale);
            }
            rest -= m * min * x.sum;
        }
    }
    // SAFETY: as the caller promises.
    unsafe { I::total(sum) + rest }
}

/// # Safety
/// The processor has the features of `I`.
#[inline(always)]
unsafe fn q6k<I: Isa>(row: &[u8], x: &[Group]) -> f32 {
    let mut sum = I::zero();
    for (b, x) in row.as_chunks::<210>().0.iter().zip(x.as_chunks::<8>().0) {
        let d = half(b, 208);
        for (i, x) in x.iter().enumerate() {
            // As `blocks::q6k` has them.
            let (side, quarter) = (i / 4, i % 4);
            // SAFETY: as the caller promises.
            unsafe {
                let low = load(part(b, side * 64 + quarter % 2 * 32));
                let low = if quarter < 2 { low } else { _mm256_srli_epi16(low, 4) };
                let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
                let high = _mm256_srl_epi16(load(part(b, 128 + side * 32)), _mm_cvtsi32_si128(2 * quarter as i32));
                let high = _mm256_slli_epi16(_mm256_and_si256(high, _mm256_set1_epi8(3)), 4);
                let quants = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
                let scales = [0, 1].map(|k| d * f32::from(b[192 + 2 * i + k] as i8) * x.scale);
                sum = I::add_halves(sum, quants, &x.quants, scales);
            }
        }
    }
    // SAFETY: as the caller promises.
    unsafe { I::total(sum) }
}

/// Two halves at the beginning.
#[inline(always)]
fn halves<const BYTES: usize>(bytes: &[u8; BYTES]) -> [f32; 2] {
    let bits = i32::from_le_bytes(*part(bytes, 0));
    // SAFETY: all that is here runs where `knows` said that there is F16C.
    unsafe {
        let both = _mm_cvtph_ps(_mm_cvtsi32_si128(bits));
        [_mm_cvtss_f32(both), _mm_cvtss_f32(_mm_movehdup_ps(both))]
    }
}

#[inline(always)]
fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: 32 bytes, at any address; all that is here runs where `knows` said that there is AVX2.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// 16 bytes: their lower halves, then their upper ones.
#[inline(always)]
fn nibbles(bytes: &[u8; 16]) -> __m256i {
    // SAFETY: 16 bytes, at any address; all that is here runs where `knows` said that there is AVX2.
    unsafe {
        let bytes = _mm_loadu_si128(bytes.as_ptr().cast());
        let both = _mm256_set_m128i(_mm_srli_epi16(bytes, 4), bytes);
        _mm256_and_si256(both, _mm256_set1_epi8(15))
    }
}

/// 4 bytes with the fifth bit of each element, then the other four bits.
#[inline(always)]
fn five_bits(bytes: &[u8; 20]) -> __m256i {
    let fifth = i32::from_le_bytes(*part(bytes, 0));
    // SAFETY: all that is here runs where `knows` said that there is AVX2.
    unsafe {
        // Each byte gets the byte with its bit, of which the bit is kept.
        let of_byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
        let bit = _mm256_set1_epi64x(0x8040201008040201_u64 as i64);
        let bytes_of_fifth = _mm256_shuffle_epi8(_mm256_set1_epi32(fifth), of_byte);
        let set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes_of_fifth, bit), bit);
        _mm256_or_si256(nibbles(part(bytes, 4)), _mm256_and_si256(set, _mm256_set1_epi8(16)))
    }
}

/// Sums of a width.
trait Isa {
    type Sum: Copy;
    fn zero() -> Self::Sum;
    /// Adds the product of 32 quants of 8 bits with 32 of 16, times `scale`.
    ///
    /// # Safety
    /// The processor has the features.
    unsafe fn add(sum: Self::Sum, quants: __m256i, x: &[i16; 32], scale: f32) -> Self::Sum {
        // SAFETY: as the caller promises.
        unsafe { Self::add_halves(sum, quants, x, [scale; 2]) }
    }
    /// The same with a scale of 16 each.
    ///
    /// # Safety
    /// The processor has the features.
    unsafe fn add_halves(sum: Self::Sum, quants: __m256i, x: &[i16; 32], scales: [f32; 2]) -> Self::Sum;
    /// # Safety
    /// The processor has the features.
    unsafe fn total(sum: Self::Sum) -> f32;
}

/// AVX2.
struct Narrow;

/// The products of 16 quants each with their activations, neighbours added.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn word_products(quants: __m256i, x: &[i16; 32]) -> [__m256i; 2] {
    // SAFETY: as the caller promises; the loads are of the array's two halves.
    unsafe {
        let low = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(quants));
        let high = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(quants, 1));
        [
            _mm256_madd_epi16(low, _mm256_loadu_si256(x.as_ptr().cast())),
            _mm256_madd_epi16(high, _mm256_loadu_si256(x[16..].as_ptr().cast())),
        ]
    }
}

impl Isa for Narrow {
    type Sum = __m256;

    #[inline(always)]
    fn zero() -> __m256 {
        // SAFETY: all that is here runs where `knows` said that there is AVX2.
        unsafe { _mm256_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add(sum: __m256, quants: __m256i, x: &[i16; 32], scale: f32) -> __m256 {
        // SAFETY: as the caller promises.
        unsafe {
            let [low, high] = word_products(quants, x);
            // 16 products of at most 127 · 32767 in each.
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(low, high)), _mm256_set1_ps(scale), sum)
        }
    }

    #[inline(always)]
    unsafe fn add_halves(sum: __m256, quants: __m256i, x: &[i16; 32], scales: [f32; 2]) -> __m256 {
        // SAFETY: as the caller promises.
        unsafe {
            let [low, high] = word_products(quants, x);
            let sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(low), _mm256_set1_ps(scales[0]), sum);
            _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), _mm256_set1_ps(scales[1]), sum)
        }
    }

    #[inline(always)]
    unsafe fn total(sum: __m256) -> f32 {
        // SAFETY: as the caller promises.
        unsafe {
            let four = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
}

/// AVX-512 with products of bytes and words.
struct Wide;

impl Isa for Wide {
    type Sum = __m512;

    #[inline(always)]
    fn zero() -> __m512 {
        // SAFETY: all that is here runs where AVX-512 was found.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn add(sum: __m512, quants: __m256i, x: &[i16; 32], scale: f32) -> __m512 {
        // SAFETY: as the caller promises; the load is of the whole array.
        unsafe {
            let products = _mm512_madd_epi16(_mm512_cvtepi8_epi16(quants), _mm512_loadu_si512(x.as_ptr().cast()));
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scale), sum)
        }
    }

    #[inline(always)]
    unsafe fn add_halves(sum: __m512, quants: __m256i, x: &[i16; 32], scales: [f32; 2]) -> __m512 {
        // SAFETY: as the caller promises; the load is of the whole array.
        unsafe {
            let products = _mm512_madd_epi16(_mm512_cvtepi8_epi16(quants), _mm512_loadu_si512(x.as_ptr().cast()));
            let scales = _mm512_mask_blend_ps(0xff00, _mm512_set1_ps(scales[0]), _mm512_set1_ps(scales[1]));
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(products), scales, sum)
        }
    }

    #[inline(always)]
    unsafe fn total(sum: __m512) -> f32 {
        // SAFETY: as the caller promises.
        unsafe { _mm512_reduce_add_ps(sum) }
    }
}
