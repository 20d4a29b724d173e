//! Codecs and their names.

use super::RowFormat;
use crate::error::{Error, Result};
use std::fmt;
use std::str::FromStr;

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

    /// Its two bytes in files.
    pub(crate) const fn wire(self) -> [u8; 2] {
        match self {
            Codec::F32 => [0, 32],
            Codec::F16 => [1, 16],
            Codec::Seed { bits } => [2, bits],
            Codec::Native { bits } => [3, bits],
        }
    }

    /// Of these bytes, if there is one. Whether it has so many bits is for [`RowFormat::new`] to say.
    pub(crate) const fn of_wire(bytes: [u8; 2]) -> Option<Self> {
        match bytes {
            [0, 32] => Some(Codec::F32),
            [1, 16] => Some(Codec::F16),
            [2, bits] => Some(Codec::Seed { bits }),
            [3, bits] => Some(Codec::Native { bits }),
            _ => None,
        }
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
