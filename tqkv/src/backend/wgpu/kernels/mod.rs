//! An operation each: what its kernels are specialised on, their text, their parameters, and how they are recorded.

pub mod attention;
pub mod channels;
pub mod dequantize;
pub mod merge;
pub mod quantize;
pub mod rotate;
