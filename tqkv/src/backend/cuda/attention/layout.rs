//! How a block of the tensor-core kernel divides its shared memory. The kernel's own count (`Layout` of attention/params.cuh) is held to it when
//! it is compiled.

use crate::backend::cuda::codec::Needs;
use crate::format::RowFormat;

#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub warps: usize,
    /// Positions that a warp copies at once.
    pub tile: usize,
    /// Copies in flight and in use.
    pub stages: usize,
    /// Query rows of an item over 8.
    pub tiles_n: usize,
    /// See `Shape::parts`.
    pub parts: usize,
}

impl Layout {
    /// Bytes of a block.
    pub fn bytes(self, [key, value]: [(&RowFormat, Needs); 2]) -> usize {
        let shared = key.1.key_table > 0 && key.0.codec() == value.0.codec() && key.0.row_dim() == value.0.row_dim();
        let tables = key.1.key_table + if shared { 0 } else { value.1.value_table };
        let stage = (self.tile * (key.0.bytes() + value.0.bytes())).next_multiple_of(128);
        let rows = 8 * self.tiles_n;
        let sums = rows * (value.0.row_dim() + 4) * 4;
        let queries = rows * (key.0.row_dim() + 4) * 4;
        let fragments = self.tiles_n * key.1.steps * 32 * key.1.query_bytes;
        // Maxima are f64 where results are as of f32.
        let (real, of_queries) = if self.parts > 1 { (8, 8) } else { (4, 4) };
        let softmax = (self.warps + 1) * rows * (real + 4) + of_queries * rows * 4 + 16;
        tables + self.warps * self.stages * stage + sums + queries + self.warps * 2048 + fragments + softmax
    }
}
