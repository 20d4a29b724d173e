//! One row: a codec at a head_dim.

use super::scalar::{NATIVE_BOOKS, SEED_BOOKS};
use super::{Codebook, Codec, DType, MAX_HEAD_DIM, Packing, ROW_STEP, Scaling, SignWords, signs};
use crate::error::{Error, Result};

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
    /// [`Error::Bits`] for a width that the codec lacks, [`Error::HeadDim`] unless head_dim is from 1 to 1024
    /// (seed: a power of two from 16 to 512).
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
            return Err(Error::HeadDim {
                codec: codec.to_string(),
                got: head_dim,
                expected: "a power of two from 16 to 512",
            });
        }
        if head_dim == 0 || head_dim > MAX_HEAD_DIM {
            return Err(Error::HeadDim { codec: codec.to_string(), got: head_dim, expected: "1 to 1024" });
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

    /// Elements of a vector, as models have them.
    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Elements of a stored row, and of a vector in the rotated domain: head_dim, rounded up to a multiple of 16. What a row
    /// has more is zero before the transform.
    pub fn row_dim(&self) -> usize {
        self.head_dim.next_multiple_of(ROW_STEP)
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
        self.packing().row_bytes(self.row_dim(), self.bits())
    }

    /// Scales of a row: 0, 1, or 2 (seed at head_dim 512).
    pub fn scales_per_row(&self) -> usize {
        self.scaling().per_row(self.row_dim())
    }

    /// The type of a scale.
    pub fn scale_dtype(&self) -> DType {
        self.scaling().dtype()
    }

    /// Bytes of the scales of a row.
    pub fn scale_bytes(&self) -> usize {
        self.scales_per_row() * self.scale_dtype().size()
    }

    /// All bytes of a row: codes and scales.
    pub fn bytes(&self) -> usize {
        self.row_bytes() + self.scale_bytes()
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
        signs::of(self.codec, self.row_dim())
    }

    /// Elements of one Walsh-Hadamard block: the largest power of two that divides row_dim.
    ///
    /// Where row_dim is more than one block, a reflection across the blocks follows:
    /// y\[b\]\[j\] = x\[b\]\[j\] - (2/m) Σ x\[·\]\[j\] over the m blocks. Both are symmetric and orthogonal and they commute, so that
    /// the whole transform is its own inverse at every row_dim.
    pub fn block(&self) -> usize {
        1 << self.row_dim().trailing_zeros()
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
    pub fn get_code(&self, row: &[u8], i: usize) -> u16 {
        assert!(!self.codec.is_dense(), "{} has no codes", self.codec);
        self.packing().code(row, self.row_dim(), self.bits(), i)
    }

    /// Packs `codes` (row_dim of them, each below 2^bits) into `row`, overwriting all of it.
    ///
    /// # Panics
    /// For dense floats, which have no codes, and unless there are row_dim codes and `row_bytes` bytes.
    pub fn pack(&self, codes: &[u16], row: &mut [u8]) {
        assert!(!self.codec.is_dense(), "{} has no codes", self.codec);
        assert_eq!((codes.len(), row.len()), (self.row_dim(), self.row_bytes()), "codes and bytes of a row");
        self.packing().pack(codes, self.bits(), row);
    }
}
