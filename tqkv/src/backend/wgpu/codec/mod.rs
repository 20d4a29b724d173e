//! How rows are read and written: the one place that knows which kinds of codecs there are.
//!
//! Kernels know `key` (which row, and the interface `Elements`) and `rows` (what all rows have in common: bindings, codebooks, scales).
//! `bits`, `planes` and `float` implement the interface; `scalar` and `lookup` are what codecs with a codebook share.

mod bits;
mod float;
pub mod key;
mod lookup;
mod planes;
mod rounds;
pub mod rows;
pub mod scalar;
mod scale;
pub mod tables;

use crate::format::Packing;

impl key::Stored {
    /// How its elements are read and written.
    pub fn elements(&self) -> &'static dyn key::Elements {
        match self.format().packing() {
            Packing::Float(_) => &float::Float,
            Packing::Planes => &planes::Planes,
            _ => &bits::Bits,
        }
    }
}
