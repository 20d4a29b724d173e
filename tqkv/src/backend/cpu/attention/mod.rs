//! Attention of some rows of queries over some positions, generic over the instruction set and over how rows are read.
//!
//! ```text
//! for each tile of positions:
//!     decode its keys and values to f32, levels only           once for all rows; if they are few, as they are used
//!     for each four rows:
//!         s = (q · levels) · key factor · scale                lanes summed in f32, then added in f64
//!         m' = max(m, s); p = exp(s - m'); sum, out shrink by exp(m - m')
//!         sum += p; out += (p · value factor) · levels
//! ```
//! Rounding in those f32 sums is about 6e-9 |q| |k|, so a score whose |q| |k| scale is large is computed again in f64. Where the
//! precision asked for allows it, levels, queries and weights are integers of 16 bits instead (`words`).
//! What is decoded before it is used stays in the first-level cache. What is used next is asked for in the meantime: the
//! tile's values while its keys are gone through, and then the next tile's keys.

mod attend;
mod cut;
mod few;
mod join;
mod kernel;
mod many;
mod query;
mod scores;
mod softmax;
mod task;
mod tile;
mod values;
mod words;

pub(super) use cut::attention;
pub(super) use join::merge;
