//! The signs of the randomised transform.

use super::scalar::{SIGNS_256, SIGNS_512};
use super::{Codec, MAX_HEAD_DIM};

/// Bit j of word j / 32: whether element j is negated before the transform.
pub type SignWords = [u32; MAX_HEAD_DIM / 32];

/// Native signs: the bits of SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators",
/// OOPSLA 2014) seeded with "tqkv sg1" as a little-endian integer, least significant first; the same prefix at every D.
const NATIVE_SIGNS: SignWords = {
    let mut words = [0; MAX_HEAD_DIM / 32];
    let mut state = u64::from_le_bytes(*b"tqkv sg1");
    let mut i = 0;
    while i < words.len() {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        words[i] = z as u32;
        words[i + 1] = (z >> 32) as u32;
        i += 2;
    }
    words
};

/// Which elements of a row of `row_dim` elements are negated before the transform.
pub(super) fn of(codec: Codec, row_dim: usize) -> SignWords {
    let mut words = [0; MAX_HEAD_DIM / 32];
    match (codec, row_dim) {
        (Codec::Native { .. }, _) => words = NATIVE_SIGNS,
        (Codec::Seed { .. }, 256) => words[..8].copy_from_slice(&SIGNS_256),
        (Codec::Seed { .. }, 512) => words[..16].copy_from_slice(&SIGNS_512),
        _ => {}
    }
    words
}
