//! A codebook as instruction sets look it up.

use crate::format::Codebook;

/// Levels, and their bytes.
#[repr(C, align(64))]
pub(in crate::backend::cpu) struct LevelTable {
    /// With fewer than 8 bits they repeat, so that bits above the code do not matter.
    pub levels: [f32; 256],
    /// Byte b of level 128 + i at \[b\]\[i\]: with 8 bits the upper half, which mirrors the lower one. With fewer bits level i is
    /// at \[b\]\[i\].
    pub bytes: [[u8; 128]; 4],
    /// Levels as integers, repeated as `levels` are.
    pub words: [i16; 256],
    /// What such an integer counts.
    pub word: f32,
}

/// No integer that stands for a level is larger: 13 bits, so that as much room is left to queries and weights.
pub(in crate::backend::cpu) const LARGEST_WORD: i32 = (1 << 13) - 1;

impl LevelTable {
    /// Zeros without a codebook.
    pub fn new(book: Option<&Codebook>) -> Self {
        let levels = book.map_or(&[0.0][..], |book| &book.levels);
        let levels: [f32; 256] = std::array::from_fn(|i| levels[i % levels.len()]);
        let bytes = std::array::from_fn(|b| std::array::from_fn(|i| levels[128 + i].to_le_bytes()[b]));
        let word = word(&levels);
        let words = levels.map(|x| (x / word).round() as i16);
        LevelTable { levels, bytes, words, word }
    }
}

/// The unit of which levels are most nearly multiples, of those in which the largest level is that, down to half of it.
fn word(levels: &[f32; 256]) -> f32 {
    let largest = levels.iter().fold(0f32, |m, x| x.abs().max(m));
    if largest == 0.0 {
        return 1.0;
    }
    let error = |unit: f32| levels.iter().map(|x| (x - (x / unit).round() * unit).powi(2)).sum::<f32>();
    let units = (LARGEST_WORD / 2..=LARGEST_WORD).rev().map(|n| largest / n as f32);
    units.min_by(|a, b| error(*a).total_cmp(&error(*b))).unwrap_or(1.0)
}

/// The bytes in which lanes find their codes of BITS bits, four a lane, for byte shuffles; 0x80 gives zero.
#[cfg(target_arch = "x86_64")]
pub(super) const fn code_bytes<const BITS: usize, const BYTES: usize>() -> [u8; BYTES] {
    let (mut out, mut i) = ([0x80u8; BYTES], 0);
    while i < BYTES / 4 {
        out[4 * i] = (i * BITS / 8) as u8;
        if i * BITS % 8 + BITS > 8 {
            out[4 * i + 1] = (i * BITS / 8) as u8 + 1;
        }
        i += 1;
    }
    out
}

/// Where in those bytes they start.
#[cfg(target_arch = "x86_64")]
pub(super) const fn code_shifts<const BITS: usize, const LANES: usize>() -> [u32; LANES] {
    let (mut out, mut i) = ([0; LANES], 0);
    while i < LANES {
        out[i] = (i * BITS % 8) as u32;
        i += 1;
    }
    out
}
