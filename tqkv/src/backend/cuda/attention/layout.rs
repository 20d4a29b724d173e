//! How a block of the tensor-core kernel divides its shared memory. The kernel's own count (`Layout` of attention/params.cuh) is held to it when
//! it is compiled.

use crate::format::{DType, Packing, RowFormat};

/// What a codec takes of it, for keys and for values (`Keys` and `Values` of kernels/codec).
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Needs {
    /// Bytes of the tables of keys and of values. Sides of one codec share theirs.
    pub key_table: usize,
    pub value_table: usize,
    /// Steps of a key's fragments, and bytes that a lane has of a query at each.
    pub steps: usize,
    pub query_bytes: usize,
    /// Whether keys are looked up in a table.
    pub looked_up: bool,
}

impl Needs {
    /// `None` if the kernel does not take such rows.
    pub fn of(row: &RowFormat, narrow: bool) -> Option<Self> {
        let d = row.row_dim();
        let lines = |bits| match bits {
            5 => 64,
            6 => 128,
            _ => 256,
        };
        let looked_up = |bits| {
            let table = 128 * lines(bits);
            Needs { key_table: table, value_table: table, steps: d / 16, query_bytes: 8, looked_up: true }
        };
        match row.packing() {
            Packing::Dense => Some(looked_up(row.bits())),
            Packing::Byte => Some(looked_up(8)),
            Packing::Planes => {
                let lines = if d.is_multiple_of(128) { 64 } else { 256 };
                let query_bytes = if narrow { 8 } else { 16 };
                let steps = 4 * d.div_ceil(128);
                Some(Needs { key_table: 0, value_table: 128 * lines, steps, query_bytes, looked_up: false })
            }
            Packing::Float(DType::F16) => {
                Some(Needs { key_table: 0, value_table: 0, steps: d / 16, query_bytes: 8, looked_up: true })
            }
            _ => None,
        }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub warps: usize,
    /// Positions that a warp copies at once.
    pub tile: usize,
    /// Copies in flight and in use.
    pub stages: usize,
    /// Query rows of an item over 8.
    pub tiles_n: usize,
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
        let softmax = (2 * self.warps + 4) * rows * 4 + 16;
        tables + self.warps * self.stages * stage + sums + queries + self.warps * 2048 + fragments + softmax
    }
}
