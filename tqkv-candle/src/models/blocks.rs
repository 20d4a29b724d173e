//! Blocks of quantized weights, and numbers of 16 bits, as f32, by ggml's definitions (`ggml-quants.c`): what each byte stands for.
//!
//! Everything here is inlined into loops that are compiled for wide registers.

use candle_core::quantized::GgmlDType;

/// Writes what blocks stand for; `bytes` and `out` are whole blocks, as many of each.
#[inline(always)]
pub(super) fn decode(dtype: GgmlDType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        GgmlDType::Q4_0 => each::<18, 32>(bytes, out, |b, out| {
            let d = half(b, 0);
            nibbles(part(b, 2), out, |q| (q as f32 - 8.0) * d);
        }),
        GgmlDType::Q4_1 => each::<20, 32>(bytes, out, |b, out| {
            let (d, m) = (half(b, 0), half(b, 2));
            nibbles(part(b, 4), out, |q| q as f32 * d + m);
        }),
        GgmlDType::Q5_0 => each::<22, 32>(bytes, out, |b, out| {
            let d = half(b, 0);
            five_bits(&b[2..], out, |q| (q as f32 - 16.0) * d);
        }),
        GgmlDType::Q5_1 => each::<24, 32>(bytes, out, |b, out| {
            let (d, m) = (half(b, 0), half(b, 2));
            five_bits(&b[4..], out, |q| q as f32 * d + m);
        }),
        GgmlDType::Q8_0 => each::<34, 32>(bytes, out, |b, out| {
            let d = half(b, 0);
            out.iter_mut().zip(&b[2..]).for_each(|(o, &q)| *o = f32::from(q as i8) * d);
        }),
        GgmlDType::Q2K => each::<84, 256>(bytes, out, q2k),
        GgmlDType::Q3K => each::<110, 256>(bytes, out, q3k),
        GgmlDType::Q4K => each::<144, 256>(bytes, out, q4k),
        GgmlDType::Q5K => each::<176, 256>(bytes, out, q5k),
        GgmlDType::Q6K => each::<210, 256>(bytes, out, q6k),
        GgmlDType::F16 => each::<2, 1>(bytes, out, |b, out| out[0] = half(b, 0)),
        GgmlDType::BF16 => each::<2, 1>(bytes, out, |b, out| {
            out[0] = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
        }),
        // The others are not kept in blocks.
        _ => {}
    }
}

#[inline(always)]
fn each<const BYTES: usize, const ELEMENTS: usize>(
    bytes: &[u8],
    out: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; ELEMENTS]),
) {
    for (bytes, out) in bytes.as_chunks().0.iter().zip(out.as_chunks_mut().0) {
        block(bytes, out);
    }
}

/// So many bytes from here on; their number is known to the compiler, which has nothing to check in loops over them.
#[inline(always)]
pub(super) fn part<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    bytes[at..].first_chunk().unwrap_or(&[0; N])
}

/// A half precision number. As `half` has it, but inlined.
#[inline(always)]
pub(super) fn half(bytes: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    // The exponent's bias grows by 112; the product makes subnormal numbers right too.
    let finite = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((112 + 127) << 23);
    let special = f32::from_bits((bits & 0x3ff) << 13 | 0x7f80_0000);
    let magnitude = if bits & 0x7c00 == 0x7c00 { special } else { finite };
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

/// 16 bytes: their lower halves, then their upper ones.
#[inline(always)]
fn nibbles(bytes: &[u8; 16], out: &mut [f32; 32], value: impl Fn(i32) -> f32) {
    // All 32 bytes first, so that the rest is one loop.
    let mut quants = [0u8; 32];
    quants[..16].copy_from_slice(bytes);
    quants[16..].copy_from_slice(bytes);
    for i in 0..32 {
        out[i] = value(i32::from(quants[i]) >> (i / 16 * 4) & 15);
    }
}

/// 4 bytes with the fifth bit of each element, then the other four bits.
#[inline(always)]
fn five_bits(bytes: &[u8], out: &mut [f32; 32], value: impl Fn(i32) -> f32) {
    let fifth = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    let bytes: &[u8; 16] = part(bytes, 4);
    for i in 0..16 {
        out[i] = value(i32::from(bytes[i] & 15) + (fifth >> i & 1) as i32 * 16);
        out[i + 16] = value(i32::from(bytes[i] >> 4) + (fifth >> (i + 16) & 1) as i32 * 16);
    }
}

#[inline(always)]
fn q2k(b: &[u8; 84], out: &mut [f32; 256]) {
    let (scales, quants) = b[..80].split_at(16);
    let (d, m) = (half(b, 80), half(b, 82));
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let shift = i % 4 * 2;
        let bytes: &[u8; 32] = part(quants, i / 4 * 32);
        let mut quants = [0f32; 32];
        for j in 0..32 {
            quants[j] = (i32::from(bytes[j]) >> shift & 3) as f32;
        }
        let (low, high) = (scales[2 * i], scales[2 * i + 1]);
        let scales = [low, high].map(|s| (d * f32::from(s & 15), m * f32::from(s >> 4)));
        for j in 0..16 {
            out[j] = scales[0].0 * quants[j] - scales[0].1;
            out[j + 16] = scales[1].0 * quants[j + 16] - scales[1].1;
        }
    }
}

#[inline(always)]
fn q3k(b: &[u8; 110], out: &mut [f32; 256]) {
    let (high, quants, scales, d) = (&b[..32], &b[32..96], &b[96..108], half(b, 108));
    for (i, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let low = if i < 8 { scales[i] & 15 } else { scales[i - 8] >> 4 };
        let scale = d * f32::from((low | (scales[8 + i % 4] >> (i / 4 * 2) & 3) << 4) as i8 - 32);
        let (shift, bit) = (i / 2 % 4 * 2, i / 2);
        let (quants, high): (&[u8; 16], &[u8; 16]) = (part(quants, i / 8 * 32 + i % 2 * 16), part(high, i % 2 * 16));
        for j in 0..16 {
            out[j] = scale * ((i32::from(quants[j]) >> shift & 3 | (i32::from(high[j]) >> bit & 1) << 2) - 4) as f32;
        }
    }
}

/// The i-th scale and minimum, of 6 bits each, of eight pairs in 12 bytes.
#[inline(always)]
pub(super) fn scale_and_min(i: usize, s: &[u8]) -> (f32, f32) {
    let (scale, min) = match i < 4 {
        true => (s[i] & 63, s[i + 4] & 63),
        false => (s[i + 4] & 15 | s[i - 4] >> 6 << 4, s[i + 4] >> 4 | s[i] >> 6 << 4),
    };
    (f32::from(scale), f32::from(min))
}

#[inline(always)]
fn q4k(b: &[u8; 144], out: &mut [f32; 256]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(i, &b[4..16]);
        let (scale, min, shift) = (d * scale, m * min, i % 2 * 4);
        let quants: &[u8; 32] = part(b, 16 + i / 2 * 32);
        for j in 0..32 {
            out[j] = scale * (i32::from(quants[j]) >> shift & 15) as f32 - min;
        }
    }
}

#[inline(always)]
fn q5k(b: &[u8; 176], out: &mut [f32; 256]) {
    let (d, m) = (half(b, 0), half(b, 2));
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let (scale, min) = scale_and_min(i, &b[4..16]);
        let (scale, min, shift) = (d * scale, m * min, i % 2 * 4);
        let (quants, high): (&[u8; 32], &[u8; 32]) = (part(b, 48 + i / 2 * 32), part(b, 16));
        for j in 0..32 {
            out[j] = scale * (i32::from(quants[j]) >> shift & 15 | (i32::from(high[j]) >> i & 1) << 4) as f32 - min;
        }
    }
}

#[inline(always)]
fn q6k(b: &[u8; 210], out: &mut [f32; 256]) {
    let d = half(b, 208);
    for (i, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        // Of each half's 128 elements the first 64 are in the lower halves of 64 bytes, the others in the upper ones.
        let (side, quarter) = (i / 4, i % 4);
        let low: &[u8; 32] = part(b, side * 64 + quarter % 2 * 32);
        let high: &[u8; 32] = part(b, 128 + side * 32);
        let (shift, high_shift) = (quarter / 2 * 4, quarter * 2);
        let mut quants = [0f32; 32];
        for j in 0..32 {
            quants[j] = ((i32::from(low[j]) >> shift & 15 | (i32::from(high[j]) >> high_shift & 3) << 4) - 32) as f32;
        }
        let scales = [0, 1].map(|k| d * f32::from(b[192 + 2 * i + k] as i8));
        for j in 0..16 {
            out[j] = scales[0] * quants[j];
            out[j + 16] = scales[1] * quants[j + 16];
        }
    }
}
