//! The host's processor.

#![deny(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]

mod attention;
mod channels;
mod codec;
mod driver;
mod float;
mod isa;
mod memory;
mod ops;
#[cfg(test)]
mod tests;

pub(crate) use driver::Cpu;
