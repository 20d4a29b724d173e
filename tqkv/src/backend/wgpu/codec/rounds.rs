//! How a workgroup of an encoder goes through its rows.

use crate::backend::wgpu::wgsl::builder::{Builder, line};
use crate::backend::wgpu::wgsl::transform::Transform;

/// Opens a loop over rounds of `transform.rows` rows: `n` of them from `first` on.
pub fn rounds(b: &mut Builder, transform: &Transform) {
    let rows = transform.rows;
    line!(b, "  for (var round = 0u; round < a.rounds; round++) {{");
    line!(b, "    let first = (wg * a.rounds + round) * {rows}u;");
    line!(b, "    let n = select(0u, min({rows}u, a.rows - first), first < a.rows);");
    places(b, transform);
}

/// Where the round's rows are in `row_of`, which all threads fill for several rounds at once: divisions are slow.
pub fn places(b: &mut Builder, transform: &Transform) {
    line!(b, "    let row0 = (round % {}u) * {}u;", transform.columns, transform.rows);
    b.push("    if (row0 == 0u && first + tid < a.rows) { row_of[tid] = locate(first + tid); }");
}
