//! How rows are read and written. `rows` is what kernels know; `key` says which row; `bits`, `planes` and `float` are what a codec
//! can be, chosen in `rows` alone.

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
