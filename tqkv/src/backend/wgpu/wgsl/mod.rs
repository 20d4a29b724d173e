//! Pieces of text that kernels share.

pub mod builder;
pub mod params;
pub mod reduce;
pub mod tensor;
pub mod transform;
