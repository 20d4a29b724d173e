//! Instruction sets.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod choice;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod table;
mod token;

pub(super) use choice::Isa;
pub(super) use table::{LARGEST_WORD, LevelTable};
pub(super) use token::{Job, Simd, word_of_pair};
