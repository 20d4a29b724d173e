//! What an instruction set must offer, the kernels that are built from it, and the choice of one at run time.
//!
//! Every algorithm is written once, generic over [`Simd`], in `attend.rs` and `rows.rs`. A module here only says how its
//! instruction set does each step; the macro at its end compiles the algorithms with those instructions enabled.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use super::attend::Task;
use super::rows::RowCoder;
use crate::error::{Error, Result};
use crate::ops::Direction;

/// A vector of f32 lanes and what is done with it.
///
/// # Safety
/// Every method needs the instruction set that the type stands for; pointers must be valid for the lanes read or written,
/// and need no more alignment than their element. Code pointers must be readable for 16 bytes, whatever a row holds.
pub(super) trait Simd: Copy + 'static {
    /// Lanes of a vector: 8 or 16, so that a vector's codes are whole bytes at every width.
    const LANES: usize;
    type F: Copy;
    /// A codebook, in registers as far as it fits.
    type Levels: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(from: *const f32) -> Self::F;
    unsafe fn store(to: *mut f32, x: Self::F);
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn sub(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    /// Of the bits.
    unsafe fn xor(a: Self::F, b: Self::F) -> Self::F;
    /// a · b + c, rounded once where the machine can.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// To the nearest integer.
    unsafe fn round(x: Self::F) -> Self::F;
    /// 2^n of integral lanes in -126..=127; NaN may give anything.
    unsafe fn pow2(n: Self::F) -> Self::F;
    /// `y` where x ≥ limit or x is NaN, else 0.
    unsafe fn zero_below(x: Self::F, limit: Self::F, y: Self::F) -> Self::F;
    /// Lane i exchanged with lane i ^ H.
    unsafe fn swap<const H: usize>(x: Self::F) -> Self::F;
    /// The sum of each vector's lanes, added up in f64 (the first halving may be in f32).
    unsafe fn sum4(x: [Self::F; 4], to: *mut f64);
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// A table of 256 levels; with fewer bits it repeats, so that bits above the code do not matter.
    unsafe fn levels<const BITS: usize>(table: *const f32) -> Self::Levels;
    /// The levels of `LANES` codes: packed densely, or one a byte.
    unsafe fn decode<const BITS: usize, const BYTE: bool>(codes: *const u8, levels: &Self::Levels) -> Self::F;
    /// As above for four vectors, which may be cheaper together; readable for 64 bytes.
    #[inline(always)]
    unsafe fn decode4<const BITS: usize, const BYTE: bool>(codes: *const u8, levels: &Self::Levels) -> [Self::F; 4] {
        let step = Self::LANES * if BYTE { 8 } else { BITS } / 8;
        // SAFETY: the caller's promises.
        unsafe {
            [
                Self::decode::<BITS, BYTE>(codes, levels),
                Self::decode::<BITS, BYTE>(codes.add(step), levels),
                Self::decode::<BITS, BYTE>(codes.add(2 * step), levels),
                Self::decode::<BITS, BYTE>(codes.add(3 * step), levels),
            ]
        }
    }
}

/// The algorithms, compiled for one instruction set.
pub(crate) struct Kernels {
    pub name: &'static str,
    pub is_available: fn() -> bool,
    /// Attention of some rows of queries over some positions.
    pub attend: unsafe fn(&mut Task),
    /// Rotates consecutive rows of D floats in place.
    pub rotate: unsafe fn(&RowCoder, Direction, &mut [f32]),
    /// Decodes consecutive rows, levels times their factors if given: readable for 64 bytes past the last.
    pub decode: unsafe fn(&RowCoder, *const u8, Option<&[f32]>, &mut [f32]),
}

/// Defines `KERNELS` for one instruction set.
macro_rules! kernels {
    ($isa:ty, $name:literal, $available:expr $(, $features:literal)?) => {
        pub(super) static KERNELS: $crate::backend::cpu::simd::Kernels = {
            use $crate::backend::cpu::{attend, rows, simd::Kernels};
            use $crate::ops::Direction;

            // SAFETY of the three: whoever takes a kernel has asked `is_available`.
            $(#[target_feature(enable = $features)])?
            unsafe fn attend_(task: &mut attend::Task) {
                unsafe { attend::attend::<$isa>(task) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn rotate(coder: &rows::RowCoder, direction: Direction, v: &mut [f32]) {
                unsafe { rows::rotate::<$isa>(coder, direction, v) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn decode(coder: &rows::RowCoder, codes: *const u8, factors: Option<&[f32]>, out: &mut [f32]) {
                unsafe { rows::decode::<$isa>(coder, codes, factors, out) }
            }
            Kernels { name: $name, is_available: $available, attend: attend_, rotate, decode }
        };
    };
}
use kernels;

/// Every instruction set of this architecture, the best first.
pub(crate) static ALL: &[&Kernels] = &[
    #[cfg(target_arch = "x86_64")]
    &avx512::KERNELS,
    #[cfg(target_arch = "x86_64")]
    &avx2::KERNELS,
    #[cfg(target_arch = "aarch64")]
    &neon::KERNELS,
    &portable::KERNELS,
];

/// The best kernels of this machine, or those that the environment variable `TQKV_CPU` names.
pub(crate) fn choose() -> Result<&'static Kernels> {
    match std::env::var("TQKV_CPU") {
        Ok(name) => named(&name),
        Err(std::env::VarError::NotPresent) => Ok(ALL.iter().find(|k| (k.is_available)()).expect("portable is")),
        Err(std::env::VarError::NotUnicode(name)) => named(&name.to_string_lossy()),
    }
}

/// The kernels of this name; never others in their place.
pub(crate) fn named(name: &str) -> Result<&'static Kernels> {
    let unavailable = |reason| Error::DeviceUnavailable { device: format!("cpu with TQKV_CPU={name}"), reason };
    match ALL.iter().find(|k| k.name == name) {
        Some(kernels) if (kernels.is_available)() => Ok(kernels),
        Some(_) => Err(unavailable("this processor lacks these instructions".to_owned())),
        None => {
            let names: Vec<_> = ALL.iter().map(|k| k.name).collect();
            Err(unavailable(format!("expected one of {}", names.join(", "))))
        }
    }
}
