//! The types of elements.

use bytemuck::Pod;
use half::{bf16, f16};
use std::fmt;

/// What a buffer's elements are. All are little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// Bytes: packed codes.
    U8,
    /// 32-bit unsigned integers: positions, page tables.
    U32,
    /// 64-bit signed integers: slots and page tables of other engines.
    I64,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision.
    F32,
}

impl DType {
    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            DType::U8 => 1,
            DType::F16 | DType::BF16 => 2,
            DType::U32 | DType::F32 => 4,
            DType::I64 => 8,
        }
    }

    /// `u8`, `u32`, `i64`, `f16`, `bf16` or `f32`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::U8 => "u8",
            DType::U32 => "u32",
            DType::I64 => "i64",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
            DType::F32 => "f32",
        }
    }

    /// Whether elements are floats.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::F32)
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

mod sealed {
    pub trait Sealed {}
}

/// A Rust type that a buffer can hold.
pub trait Element: Pod + Send + Sync + sealed::Sealed {
    /// Its name on devices.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($t:ty => $d:ident),*) => { $(
        impl sealed::Sealed for $t {}
        impl Element for $t { const DTYPE: DType = DType::$d; }
    )* };
}
elements!(u8 => U8, u32 => U32, i64 => I64, f16 => F16, bf16 => BF16, f32 => F32);
