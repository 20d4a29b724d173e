//! The codec as data: bits, packing, codebooks, signs, scales and sizes. No I/O, no threads, no GPU.
//!
//! A *vector* is the K or V of one KV head at one position: `head_dim` floats. A *row* is what it is stored as:
//! `row_bytes` bytes of codes and `scales_per_row` scales. `docs/format.md` describes every byte.

#[cfg_attr(not(feature = "cuda"), allow(dead_code))] // Not every backend needs all of it.
pub(crate) mod cells;
mod native_tables;
mod seed_tables;

use crate::compute::DType;
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;
use std::sync::LazyLock;

/// The version of the stored bytes. It changes when the same bytes would decode to other values.
pub const FORMAT_VERSION: u32 = 2;

/// The largest head_dim that any codec takes.
pub const MAX_HEAD_DIM: usize = 1024;

/// Every head_dim is a multiple of this, so that a row is whole bytes at every width.
pub const HEAD_DIM_STEP: usize = 16;

/// A norm at or under this encodes as the zero vector.
pub const ZERO_NORM: f32 = 1e-10;

/// How a vector is stored.
///
/// A codec is checked where it meets a head_dim, in [`RowFormat::new`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Codec {
    /// Uncompressed 32-bit floats, neither rotated nor scaled.
    F32,
    /// Uncompressed 16-bit floats, neither rotated nor scaled.
    F16,
    /// mlx-native 0.8.1's TurboQuant: 4 bits in nibbles; 2, 3, 5, 6 and 8 bits in a byte each; f32 norms.
    Seed {
        /// Bits of a code: 2, 3, 4, 5, 6 or 8.
        bits: u8,
    },
    /// tqkv's TurboQuant: densely packed codes and one norm-corrected f16 scale.
    Native {
        /// Bits of a code: 2 to 8.
        bits: u8,
    },
}

impl Codec {
    /// The native codec with this many bits an element (2 to 8).
    pub const fn tq(bits: u8) -> Self {
        Codec::Native { bits }
    }

    /// mlx-native's codec with this many bits an element (2, 3, 4, 5, 6 or 8).
    pub const fn seed(bits: u8) -> Self {
        Codec::Seed { bits }
    }

    /// Whether vectors are stored as plain floats.
    pub const fn is_dense(self) -> bool {
        matches!(self, Codec::F32 | Codec::F16)
    }
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Codec::F32 => write!(f, "f32"),
            Codec::F16 => write!(f, "f16"),
            Codec::Seed { bits } => write!(f, "seed{bits}"),
            Codec::Native { bits } => write!(f, "tq{bits}"),
        }
    }
}

/// The codecs of keys and of values: what the command line calls `k5v4`, `seed4`, `f16` or `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct CodecPair {
    /// The codec of keys.
    pub key: Codec,
    /// The codec of values.
    pub value: Codec,
}

impl CodecPair {
    /// The same codec on both sides.
    pub const fn both(codec: Codec) -> Self {
        CodecPair { key: codec, value: codec }
    }

    /// Bits an element of K and V together, scales counted, at this head_dim.
    ///
    /// # Errors
    /// Those of [`RowFormat::new`].
    pub fn bits_per_element(self, head_dim: usize) -> Result<f64> {
        let bytes = RowFormat::new(self.key, head_dim)?.bytes() + RowFormat::new(self.value, head_dim)?.bytes();
        Ok(bytes as f64 * 8.0 / (2 * head_dim) as f64)
    }
}

impl fmt::Display for CodecPair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.key, self.value) {
            (Codec::Native { bits: k }, Codec::Native { bits: v }) => write!(f, "k{k}v{v}"),
            (k, v) if k == v => write!(f, "{k}"),
            (k, v) => write!(f, "{k}+{v}"),
        }
    }
}

impl FromStr for CodecPair {
    type Err = Error;

    /// Reads `f32`, `f16`, `seed4`, `seed5`, `seed6`, `seed8` or `kXvY` with X and Y from 2 to 8.
    fn from_str(name: &str) -> Result<Self> {
        let digit = |b: u8| if (b'2'..=b'8').contains(&b) { Some(b - b'0') } else { None };
        let pair = match *name.as_bytes() {
            [b'f', b'3', b'2'] => Some(CodecPair::both(Codec::F32)),
            [b'f', b'1', b'6'] => Some(CodecPair::both(Codec::F16)),
            [b's', b'e', b'e', b'd', b @ (b'4' | b'5' | b'6' | b'8')] => Some(CodecPair::both(Codec::seed(b - b'0'))),
            [b'k', k, b'v', v] => match (digit(k), digit(v)) {
                (Some(k), Some(v)) => Some(CodecPair { key: Codec::tq(k), value: Codec::tq(v) }),
                _ => None,
            },
            _ => None,
        };
        pair.ok_or_else(|| Error::UnknownCodec { got: name.to_owned() })
    }
}

/// Levels and decision boundaries of a scalar quantizer for a unit normal variable, ascending.
#[derive(Debug)]
pub struct Codebook {
    /// The value of each code.
    pub levels: Vec<f32>,
    /// A code is the number of boundaries that the value is strictly greater than: midpoints of the levels, in f32.
    pub boundaries: Vec<f32>,
}

impl Codebook {
    fn new(levels: Vec<f32>) -> Self {
        let boundaries = levels.windows(2).map(|w| (w[0] + w[1]) * 0.5).collect();
        Codebook { levels, boundaries }
    }

    fn symmetric(half: &[f32]) -> Self {
        Codebook::new(half.iter().rev().map(|c| -c).chain(half.iter().copied()).collect())
    }

    /// The code of a scaled element: how many boundaries it is strictly greater than. NaN gives 0.
    pub fn code(&self, u: f32) -> u8 {
        self.boundaries.partition_point(|&b| u > b) as u8
    }

    /// The code that a zero vector is stored as, 2^(bits-1) - 1.
    pub fn zero_code(&self) -> u8 {
        (self.levels.len() / 2 - 1) as u8
    }
}

static SEED_BOOKS: LazyLock<[Option<Codebook>; 9]> = LazyLock::new(|| {
    use seed_tables::*;
    [
        None,
        None,
        Some(Codebook::new(BOOK_2.to_vec())),
        Some(Codebook::new(BOOK_3.to_vec())),
        Some(Codebook::new(BOOK_4.to_vec())),
        Some(Codebook::new(BOOK_5.to_vec())),
        Some(Codebook::new(BOOK_6.to_vec())),
        None,
        Some(Codebook::new(BOOK_8.to_vec())),
    ]
});

static NATIVE_BOOKS: LazyLock<[Option<Codebook>; 9]> = LazyLock::new(|| {
    use native_tables::*;
    [
        None,
        None,
        Some(Codebook::symmetric(&HALF_2)),
        Some(Codebook::symmetric(&HALF_3)),
        Some(Codebook::symmetric(&HALF_4)),
        Some(Codebook::symmetric(&HALF_5)),
        Some(Codebook::symmetric(&HALF_6)),
        Some(Codebook::symmetric(&HALF_7)),
        Some(Codebook::symmetric(&HALF_8)),
    ]
});

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

/// How a row of codes is packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Packing {
    /// Not codes but little-endian floats.
    Float(DType),
    /// Element i in bits [i·b, (i+1)·b) of the row, which is read as one little-endian integer.
    Dense,
    /// Codes of 3 bits in three planes of head_dim / 8 bytes, each byte two nibbles. Of elements 8r to 8r + 7, byte r of plane
    /// p holds elements 8r + 2p and 8r + 2p + 1 in its nibbles' low three bits; the nibbles' top bits hold bit p of the
    /// elements 8r + 6 and 8r + 7.
    Planes,
    /// One code a byte; readers ignore the bits above the code.
    Byte,
}

/// What scales mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scaling {
    /// None: dense floats.
    None,
    /// One f16: the factor from codebook levels to the decoded vector, chosen so that the vector keeps its norm.
    Corrected,
    /// One f32: the L2 norm of the rotated vector. Factor: norm · (1/√D).
    Norm,
    /// One f32 for each 256 elements: their root mean square. Factor: rms / `scale_factor_d512`.
    BlockRms,
}

/// A codec at a head_dim: everything about one row. Cheap to copy.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowFormat {
    codec: Codec,
    head_dim: usize,
    scale_factor_d512: f32,
}

impl RowFormat {
    /// Checks that this codec exists at this head_dim.
    ///
    /// # Errors
    /// [`Error::Bits`] for a width that the codec lacks, [`Error::HeadDim`] unless head_dim is a multiple of 16 from
    /// 16 to 1024 (seed: a power of two from 16 to 512).
    ///
    /// ```
    /// use tqkv::format::{Codec, RowFormat};
    /// let row = RowFormat::new(Codec::tq(3), 128)?;
    /// assert_eq!((row.row_bytes(), row.bytes()), (48, 50));
    /// assert!(RowFormat::new(Codec::tq(9), 128).is_err());
    /// assert!(RowFormat::new(Codec::tq(3), 100_000).is_err());
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn new(codec: Codec, head_dim: usize) -> Result<Self> {
        let seed = match codec {
            Codec::Native { bits } if !(2..=8).contains(&bits) => {
                return Err(Error::Bits { codec: "native", got: bits, expected: "2 to 8" });
            }
            Codec::Seed { bits } if !matches!(bits, 2..=6 | 8) => {
                return Err(Error::Bits { codec: "seed", got: bits, expected: "2, 3, 4, 5, 6 or 8" });
            }
            Codec::Seed { .. } => true,
            _ => false,
        };
        if seed && !(head_dim.is_power_of_two() && (16..=512).contains(&head_dim)) {
            return Err(Error::HeadDim { codec, got: head_dim, expected: "a power of two from 16 to 512" });
        }
        if head_dim == 0 || !head_dim.is_multiple_of(HEAD_DIM_STEP) || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { codec, got: head_dim, expected: "a multiple of 16 from 16 to 1024" });
        }
        Ok(RowFormat { codec, head_dim, scale_factor_d512: 1.0 })
    }

    /// The seed codec's extra factor at head_dim 512 (1 unless a caller of mlx-native chose another).
    ///
    /// # Errors
    /// [`Error::Parameter`] unless it is finite and positive.
    pub fn with_scale_factor_d512(mut self, factor: f32) -> Result<Self> {
        if !(factor.is_finite() && factor > 0.0) {
            return Err(Error::Parameter { name: "scale_factor_d512", got: factor, expected: "finite and positive" });
        }
        self.scale_factor_d512 = factor;
        Ok(self)
    }

    /// The codec.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Elements of a vector.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// The seed codec's extra factor at head_dim 512.
    pub fn scale_factor_d512(&self) -> f32 {
        self.scale_factor_d512
    }

    /// Bits of a stored code, or of a float.
    pub fn bits(&self) -> usize {
        match self.codec {
            Codec::F32 => 32,
            Codec::F16 => 16,
            Codec::Seed { bits } | Codec::Native { bits } => bits as usize,
        }
    }

    /// How codes are packed.
    pub fn packing(&self) -> Packing {
        match self.codec {
            Codec::F32 => Packing::Float(DType::F32),
            Codec::F16 => Packing::Float(DType::F16),
            Codec::Native { bits: 3 } => Packing::Planes,
            Codec::Seed { bits: 4 } | Codec::Native { .. } => Packing::Dense,
            Codec::Seed { .. } => Packing::Byte,
        }
    }

    /// What the scales mean.
    pub fn scaling(&self) -> Scaling {
        match self.codec {
            Codec::F32 | Codec::F16 => Scaling::None,
            Codec::Native { .. } => Scaling::Corrected,
            Codec::Seed { .. } if self.head_dim <= 256 => Scaling::Norm,
            Codec::Seed { .. } => Scaling::BlockRms,
        }
    }

    /// Bytes of a row of codes (or floats), scales not counted. A row is whole bytes at every width.
    pub fn row_bytes(&self) -> usize {
        match self.packing() {
            Packing::Byte => self.head_dim,
            _ => self.head_dim * self.bits() / 8,
        }
    }

    /// Scales of a row: 0, 1, or 2 (seed at head_dim 512).
    pub fn scales_per_row(&self) -> usize {
        match self.scaling() {
            Scaling::None => 0,
            Scaling::Corrected | Scaling::Norm => 1,
            Scaling::BlockRms => self.head_dim / 256,
        }
    }

    /// The type of a scale.
    pub fn scale_dtype(&self) -> DType {
        if self.scaling() == Scaling::Corrected { DType::F16 } else { DType::F32 }
    }

    /// All bytes of a row: codes and scales.
    pub fn bytes(&self) -> usize {
        self.row_bytes() + self.scales_per_row() * self.scale_dtype().size()
    }

    /// Levels and boundaries; `None` for dense floats.
    pub fn codebook(&self) -> Option<&'static Codebook> {
        match self.codec {
            Codec::F32 | Codec::F16 => None,
            Codec::Seed { bits } => SEED_BOOKS[bits as usize].as_ref(),
            Codec::Native { bits } => NATIVE_BOOKS[bits as usize].as_ref(),
        }
    }

    /// Whether stored vectors are rotated: all but dense floats are.
    pub fn is_rotated(&self) -> bool {
        !self.codec.is_dense()
    }

    /// Which elements are negated before the transform: bit j of word j / 32.
    pub fn signs(&self) -> SignWords {
        let mut words = [0; MAX_HEAD_DIM / 32];
        match (self.codec, self.head_dim) {
            (Codec::Native { .. }, _) => words = NATIVE_SIGNS,
            (Codec::Seed { .. }, 256) => words[..8].copy_from_slice(&seed_tables::SIGNS_256),
            (Codec::Seed { .. }, 512) => words[..16].copy_from_slice(&seed_tables::SIGNS_512),
            _ => {}
        }
        words
    }

    /// Elements of one Walsh-Hadamard block: the largest power of two that divides head_dim.
    ///
    /// Where head_dim is more than one block, a reflection across the blocks follows:
    /// y\[b\]\[j\] = x\[b\]\[j\] - (2/m) Σ x\[·\]\[j\] over the m blocks. Both are symmetric and orthogonal and they commute, so that
    /// the whole transform is its own inverse at every head_dim.
    pub fn block(&self) -> usize {
        1 << self.head_dim.trailing_zeros()
    }

    /// The factor that a stored scale stands for: decoded element = level · factor.
    pub fn factor(&self, scale: f32) -> f32 {
        match self.scaling() {
            Scaling::None => 1.0,
            Scaling::Corrected => scale,
            Scaling::Norm => scale * (1.0 / (self.head_dim as f32).sqrt()),
            Scaling::BlockRms => scale / self.scale_factor_d512,
        }
    }

    /// The code of element `i` of a packed row of `row_bytes` bytes.
    ///
    /// # Panics
    /// For dense floats, which have no codes, and if the row ends before the element.
    pub fn get_code(&self, row: &[u8], i: usize) -> u8 {
        assert!(!self.codec.is_dense(), "{} has no codes", self.codec);
        let bits = self.bits();
        let mask = ((1u32 << bits) - 1) as u8;
        match self.packing() {
            Packing::Byte => row[i] & mask,
            Packing::Planes => {
                let (run, nibble) = (i / 8, 4 * (i % 2));
                let byte = |plane: usize| row[plane * self.head_dim / 8 + run] >> nibble;
                match i % 8 / 2 {
                    3 => (0..3).map(|plane| (byte(plane) >> 3 & 1) << plane).sum(),
                    plane => byte(plane) & mask,
                }
            }
            _ => {
                let (byte, shift) = (i * bits / 8, i * bits % 8);
                let low = row[byte] as u16;
                let high = if shift + bits > 8 { row[byte + 1] as u16 } else { 0 };
                ((low | high << 8) >> shift) as u8 & mask
            }
        }
    }

    /// Packs `codes` (head_dim of them, one a byte, each below 2^bits) into `row`, overwriting all of it.
    ///
    /// # Panics
    /// For dense floats, which have no codes, and unless there are head_dim codes and `row_bytes` bytes.
    pub fn pack(&self, codes: &[u8], row: &mut [u8]) {
        assert!(!self.codec.is_dense(), "{} has no codes", self.codec);
        assert_eq!((codes.len(), row.len()), (self.head_dim, self.row_bytes()), "codes and bytes of a row");
        match self.packing() {
            Packing::Byte => row.copy_from_slice(codes),
            Packing::Planes => {
                for (plane, bytes) in row.chunks_exact_mut(self.head_dim / 8).enumerate() {
                    for (byte, run) in bytes.iter_mut().zip(codes.chunks_exact(8)) {
                        let nibble = |half: usize| run[2 * plane + half] | (run[6 + half] >> plane & 1) << 3;
                        *byte = nibble(0) | nibble(1) << 4;
                    }
                }
            }
            _ => {
                let bits = self.bits();
                let (mut held, mut count, mut out) = (0u32, 0, row.iter_mut());
                for &code in codes {
                    held |= (code as u32) << count;
                    count += bits;
                    while count >= 8 {
                        if let Some(byte) = out.next() {
                            *byte = held as u8;
                        }
                        held >>= 8;
                        count -= 8;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
