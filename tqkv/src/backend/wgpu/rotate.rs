//! The transform by itself.

use super::recorder::{self, WgpuRecorder};
use super::wgsl::{self, Align, Builder, Layout, Rows, Source, Tensor, line};
use super::{Caps, Slot};
use crate::backend::Rotate;
use crate::error::Result;
use crate::ops::Direction;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    pub row: Rows,
    pub forward: bool,
    pub x: Tensor,
    /// None: in place.
    pub out: Option<Tensor>,
}

/// Rows that a workgroup holds at a time.
pub(super) fn rows_at_once(head_dim: usize) -> usize {
    (16 * wgsl::THREADS / head_dim).max(1)
}

pub(super) fn source(spec: &Spec, caps: &Caps) -> Source {
    let row = spec.row.format();
    let d = row.head_dim();
    let rows = rows_at_once(d);
    let mut b = Builder::new(caps);
    b.storage("x", spec.x.element(), spec.out.is_none());
    if let Some(out) = spec.out {
        b.storage("y", out.element(), true);
    }
    b.params(&["rows", "x_off", "y_off"], &[("signs", "u32", 8)]);
    let to = if spec.out.is_some() { "y" } else { "x" };
    spec.x.load(&mut b, "x");
    spec.out.unwrap_or(spec.x).store(&mut b, to);
    Layout::Padded.declare(&mut b, rows * d / 4);
    wgsl::flip(&mut b);
    wgsl::transform(&mut b, &row);
    b.main();
    line!(b, "  let first = wg * {rows}u;\n  let n = min({rows}u, a.rows - first);");
    let eights = d / 8;
    line!(b, "  for (var u = tid; u < n * {eights}u; u += WG) {{\n    var v = x_load(first * {d}u + 8u * u);");
    if row.is_rotated() {
        if spec.forward {
            line!(b, "    v = flip(8u * (u % {eights}u), v);");
        }
        b.push("    buf[at(2u * u)] = v.a;\n    buf[at(2u * u + 1u)] = v.b;\n  }\n  transform(n, tid);");
        line!(b, "  for (var u = tid; u < n * {eights}u; u += WG) {{");
        b.push("    var v = Eight(buf[at(2u * u)], buf[at(2u * u + 1u)]);");
        if !spec.forward {
            line!(b, "    v = flip(8u * (u % {eights}u), v);");
        }
    }
    line!(b, "    {to}_store(first * {d}u + 8u * u, v);\n  }}\n}}");
    b.finish()
}

pub(super) fn record(recorder: &mut WgpuRecorder, op: &Rotate) -> Result<()> {
    let context = recorder.context.clone();
    let (x, x_tensor) = Slot::tensor(&context, "x", &op.x)?;
    let (out, out_tensor) = Slot::tensor(&context, "out", &op.out)?;
    let in_place = op.x.shares_memory(&op.out);
    let spec = Spec {
        row: Rows::of(&op.row, Align::Word),
        forward: op.direction == Direction::Forward,
        x: x_tensor,
        out: (!in_place).then_some(out_tensor),
    };
    let rows = op.x.len() / op.row.head_dim();
    let fields = [rows as u32, x.words(), out.words()];
    let slots = if in_place { vec![x] } else { vec![x, out] };
    let groups = rows.div_ceil(rows_at_once(op.row.head_dim()));
    let signs = wgsl::signs(&op.row);
    recorder.dispatch(&recorder::Spec::Rotate(spec), || source(&spec, &context.caps), slots, groups, &fields, &[&signs])
}
