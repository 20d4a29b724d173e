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
use crate::format::Cells;
use crate::format::Codebook;
use crate::problem::Direction;
use std::sync::OnceLock;

/// The bits of 1.5 · 2^23, where floats step by one.
const INTEGERS: i32 = 0x4b40_0000;

/// A codebook as kernels look it up.
#[repr(C, align(64))]
pub(crate) struct Table {
    /// With fewer than 8 bits they repeat, so that bits above the code do not matter.
    pub levels: [f32; 256],
    /// Byte b of level 128 + i at \[b\]\[i\]: with 8 bits the upper half, which mirrors the lower one. With fewer bits level i is
    /// at \[b\]\[i\].
    pub planes: [[u8; 128]; 4],
    /// Decision boundaries; infinite after the last.
    pub bounds: [f32; 256],
    boundaries: &'static [f32],
    cells: OnceLock<(Cells, Vec<[f32; 2]>)>,
}

impl Table {
    pub fn new(book: Option<&'static Codebook>) -> Self {
        let (levels, boundaries) = book.map_or((&[0.0][..], &[][..]), |book| (&book.levels, &book.boundaries));
        let levels: [f32; 256] = std::array::from_fn(|i| levels[i % levels.len()]);
        let planes = std::array::from_fn(|b| std::array::from_fn(|i| levels[128 + i].to_le_bytes()[b]));
        let bounds = std::array::from_fn(|i| boundaries.get(i).copied().unwrap_or(f32::INFINITY));
        Table { levels, planes, bounds, boundaries, cells: OnceLock::new() }
    }

    /// Cells, and their entries with integers as the bits of floats. Only encoding needs them.
    pub fn cells(&self) -> &(Cells, Vec<[f32; 2]>) {
        self.cells.get_or_init(|| {
            let cells = Cells::new(self.boundaries);
            let entries = cells.entries.iter().map(|&(bound, below)| [bound, f32::from_bits(below)]).collect();
            (cells, entries)
        })
    }
}

/// A part of a kernel for M rows and codes of BITS bits. As a function of its own for each it compiles much faster than all
/// of them in one.
pub(super) trait Job {
    /// # Safety
    /// Needs the instruction set.
    unsafe fn run<S: Simd, const M: usize, const BITS: usize>(self);
}

/// Functions for an instruction set, which `kernels!` makes.
pub(super) trait Call: Sized {
    /// Runs a job with these instructions enabled.
    ///
    /// # Safety
    /// Needs them, and what the job needs.
    unsafe fn call<J: Job, const M: usize, const BITS: usize>(job: J);
}

/// A vector of f32 lanes and what is done with it.
///
/// # Safety
/// Every method needs the instruction set that the type stands for; pointers must be valid for the lanes read or written,
/// and need no more alignment than their element. Code pointers must be readable for 16 bytes, whatever a row holds.
pub(super) trait Simd: Call + Copy + 'static {
    /// Lanes of a vector: 8 or 16, so that a vector's codes are whole bytes at every width.
    const LANES: usize;
    type F: Copy;
    /// As many integers.
    type I: Copy;
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
    /// The sum of each vector's lanes, the last addition or more in f64.
    unsafe fn sum4(x: [Self::F; 4], to: *mut f64);
    unsafe fn load_f16(from: *const u16) -> Self::F;
    /// A hint that this line will be read.
    #[inline(always)]
    fn prefetch(_: *const u8) {}
    unsafe fn levels<const BITS: usize>(table: &Table) -> Self::Levels;
    /// The levels of `LANES` codes: packed densely, or one a byte.
    unsafe fn decode<const BITS: usize, const BYTE: bool>(codes: *const u8, levels: &Self::Levels) -> Self::F;
    /// How many bits of a nibble `decode_run` looks up; 0 if it looks up nothing.
    const NIBBLES: usize = 0;
    /// Of a run of `8 · LANES` codes of 2 bits or nibbles, the levels of those at c, 8 + c, 16 + c …
    #[inline(always)]
    unsafe fn decode_run<const BITS: usize>(_codes: *const u8, _c: usize, _levels: &Self::Levels) -> Self::F {
        unreachable!("it looks up nothing")
    }
    /// Adds `step` to the lanes of `n` where x > bound.
    unsafe fn count(x: Self::F, bound: Self::F, n: Self::I, step: i32) -> Self::I;
    unsafe fn zeros() -> Self::I;
    /// Both of `from[n]`, lane by lane.
    unsafe fn pairs(from: *const [f32; 2], n: Self::I) -> [Self::F; 2];
    /// `from[n]` of 16 entries, all of which can be read.
    unsafe fn gather16(from: *const f32, n: Self::I) -> Self::F;
    /// The integer n of x = 1.5 · 2^23 + n.
    unsafe fn integer(x: Self::F) -> Self::I;
    /// Bits as integers.
    unsafe fn bits(x: Self::F) -> Self::I;
    /// The nearer of x and the ends of -limit to limit; one of these ends if x is NaN.
    unsafe fn clamp(x: Self::F, limit: Self::F) -> Self::F;
    /// Lanes of 0..=255 as bytes.
    unsafe fn store_bytes(to: *mut u8, n: Self::I);
    /// Stores past the caches; the address must be a multiple of 64 bytes or so many lanes further.
    unsafe fn stream(to: *mut f32, x: Self::F);
    /// Ends a run of such stores.
    #[inline(always)]
    fn fence() {}
    /// The nibbles of `LANES` runs of eight codes of 3 bits, from their bytes in the three planes, which are readable for 64
    /// bytes. Their top bits may be anything.
    #[inline(always)]
    unsafe fn nibbles(planes: [*const u8; 3], to: *mut u8) {
        for i in 0..Self::LANES {
            // SAFETY: the caller's promise.
            unsafe {
                let byte = |plane: usize| *planes[plane].add(i) as u32;
                let (a, b, c) = (byte(0), byte(1), byte(2));
                let word = a | b << 8 | c << 16 | (a >> 3 & 0x11 | b >> 2 & 0x22 | c >> 1 & 0x44) << 24;
                to.cast::<[u8; 4]>().add(i).write(word.to_le_bytes());
            }
        }
    }
    /// The levels of such runs.
    #[inline(always)]
    unsafe fn decode_runs(planes: [*const u8; 3], levels: &Self::Levels) -> [Self::F; 8] {
        // Half of it is the 64 bytes more that decode may read.
        let mut codes = [0u8; 128];
        // SAFETY: the caller's promise.
        unsafe {
            Self::nibbles(planes, codes.as_mut_ptr());
            let first = Self::decode4::<4, false>(codes.as_ptr(), levels);
            let last = Self::decode4::<4, false>(codes.as_ptr().add(2 * Self::LANES), levels);
            [first[0], first[1], first[2], first[3], last[0], last[1], last[2], last[3]]
        }
    }
    /// As `decode` for four vectors, which may be cheaper together; readable for 64 bytes.
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
    /// Encodes one vector, which is overwritten, as codes and scales.
    pub encode: unsafe fn(&RowCoder, &mut [f32], &mut [u8], &mut [u8]),
    /// Copies whole vectors past the caches to an address that is a multiple of 64.
    pub stream: unsafe fn(&[f32], *mut f32),
    /// Decodes consecutive rows, levels times their factors if given: readable for 64 bytes past the last.
    pub decode: unsafe fn(&RowCoder, *const u8, Option<&[f32]>, &mut [f32]),
}

/// Defines `KERNELS` for one instruction set.
macro_rules! kernels {
    ($isa:ty, $name:literal, $available:expr $(, $features:literal)?) => {
        impl $crate::backend::cpu::simd::Call for $isa {
            // Inlined, they would be one function again.
            #[inline(never)]
            $(#[target_feature(enable = $features)])?
            unsafe fn call<J: $crate::backend::cpu::simd::Job, const M: usize, const BITS: usize>(job: J) {
                unsafe { job.run::<Self, M, BITS>() }
            }
        }

        pub(super) static KERNELS: $crate::backend::cpu::simd::Kernels = {
            use $crate::backend::cpu::{attend, rows, simd::Kernels};
            use $crate::problem::Direction;

            // SAFETY of all: whoever takes a kernel has asked `is_available`.
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
            $(#[target_feature(enable = $features)])?
            unsafe fn encode(coder: &rows::RowCoder, v: &mut [f32], codes: &mut [u8], scales: &mut [u8]) {
                unsafe { rows::encode::<$isa>(coder, v, codes, scales) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn stream(from: &[f32], to: *mut f32) {
                unsafe { rows::stream::<$isa>(from, to) }
            }
            Kernels { name: $name, is_available: $available, attend: attend_, rotate, encode, stream, decode }
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
