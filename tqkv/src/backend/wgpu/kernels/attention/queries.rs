//! Queries of a workgroup.

use super::exact::{HUGE, LARGEST, UNIT, checked};
use super::kernel::AttentionKernel;
use crate::backend::wgpu::wgsl::builder::{Builder, float, line};
use crate::backend::wgpu::wgsl::transform::Transform;

/// The workgroup's rows of queries into `query`, rotated, and the largest element's size into `largest`. Declares `scale`, which
/// makes up for what they are smaller, and `limit`: above it a key's factor makes a huge score possible.
pub fn queries(b: &mut Builder, kernel: &AttentionKernel, transform: &Transform) {
    b.push("  var most = 0.0;\n  if (tid == 0u) { atomicStore(&largest, 0u); }");
    match kernel.rotate {
        true => rotated(b, kernel, transform),
        false => as_given(b, kernel),
    }
    b.push("  atomicMax(&largest, bitcast<u32>(most));\n  workgroupBarrier();");
    let d = kernel.key.format().row_dim();
    if checked(kernel) {
        line!(b, "  let scale = a.scale * {UNIT:?};");
        // |q| is at most √D of its largest element, and levels have a norm near √D.
        line!(b, "  let limit = {} / bitcast<f32>(atomicLoad(&largest));", float(HUGE / d as f32));
        return;
    }
    line!(b, "  let too_large = bitcast<f32>(atomicLoad(&largest)) > {LARGEST:?};");
    line!(b, "  let scale = a.scale * select(1.0, {UNIT:?}, too_large);\n  if (too_large) {{");
    line!(b, "    for (var e = tid; e < {}u; e += WG) {{ query[e] *= {:?}; }}", kernel.rows() * d / 4, 1.0 / UNIT);
    b.push("  }\n  workgroupBarrier();");
}

fn load(r: &str, e: &str) -> String {
    format!("query_load(token0, queries, kv_head, head0, {r}, {e})")
}

fn as_given(b: &mut Builder, kernel: &AttentionKernel) {
    let d = kernel.key.format().row_dim();
    b.push("  workgroupBarrier();");
    line!(b, "  for (var e = 8u * tid; e < {}u; e += 8u * WG) {{", kernel.rows() * d);
    line!(b, "    let v = {};", load(&format!("e / {d}u"), &format!("e % {d}u")));
    b.push("    query[e >> 2u] = v.a;\n    query[(e >> 2u) + 1u] = v.b;\n    let x = max(abs(v.a), abs(v.b));");
    b.push("    most = max(most, max(max(x.x, x.y), max(x.z, x.w)));\n  }");
}

fn rotated(b: &mut Builder, kernel: &AttentionKernel, transform: &Transform) {
    let (rows, d, columns) = (kernel.rows(), kernel.key.format().row_dim(), transform.columns);
    b.push("  {");
    transform.columns(b, &format!("{rows}u"), |r, e| format!("flip8({e}, {})", load(r, e)));
    line!(b, "  if (i < {rows}u) {{");
    for k in 0..transform.per {
        let at = format!("query[i * {}u + {}u + (c >> 2u)][c & 3u]", d / 4, k * columns / 4);
        line!(b, "    {at} = y{k};\n    most = max(most, abs(y{k}));");
    }
    b.push("  }\n  }");
}
