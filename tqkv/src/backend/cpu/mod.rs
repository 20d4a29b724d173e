//! The host's processor.

#![deny(clippy::undocumented_unsafe_blocks, clippy::missing_safety_doc)]

mod attention;
mod channels;
mod codec;
mod driver;
mod float;
mod interop;
mod isa;
mod memory;
mod ops;
mod rows;
#[cfg(test)]
mod tests;
mod threads;

pub(crate) use driver::Cpu;
