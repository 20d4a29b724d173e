//! The transform by itself.

use super::recorder::{self, WgpuRecorder};
use super::wgsl::{self, Align, Builder, Rows, Source, Tensor, Transform, line};
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

pub(super) fn source(spec: &Spec, caps: &Caps) -> Source {
    let row = spec.row.format();
    let d = row.head_dim();
    let transform = Transform::new(&row);
    let mut b = Builder::new(caps);
    b.storage("x", spec.x.element(), spec.out.is_none());
    if let Some(out) = spec.out {
        b.storage("y", out.element(), true);
    }
    b.params(&["rows", "x_off", "y_off"], &[("signs", "u32", 8)]);
    let (to, out) = if let Some(out) = spec.out { ("y", out) } else { ("x", spec.x) };
    spec.x.load(&mut b, "x");
    out.store(&mut b, to);
    if !row.is_rotated() {
        b.main();
        line!(b, "  let first = wg * {0}u * {d}u;\n  let n = min({0}u * {d}u, a.rows * {d}u - first);", transform.rows);
        b.push("  for (var e = first + 8u * tid; e < first + n; e += 8u * WG) {\n    let v = x_load(e);");
        line!(b, "    {}\n  }}\n}}", out.store_eight(to, "e", "v"));
        return b.finish();
    }
    wgsl::flip(&mut b);
    transform.declare(&mut b, 0);
    transform.mix(&mut b);
    b.main();
    line!(b, "  let first = wg * {0}u;\n  let n = min({0}u, a.rows - first);", transform.rows);
    transform.spread(&mut b, "n", |e| {
        let x = format!("x_load((first + i) * {d}u + {e})");
        if spec.forward { format!("flip8({e}, {x})") } else { x }
    });
    b.push("  workgroupBarrier();\n  mix(n, tid);\n  workgroupBarrier();");
    let unit = out.unit();
    line!(b, "  for (var e = {unit}u * tid; e < n * {d}u; e += {unit}u * WG) {{");
    let v = if spec.forward { format!("gather{unit}(e)") } else { format!("flip{unit}(e % {d}u, gather{unit}(e))") };
    line!(b, "    {to}_store(first * {d}u + e, {v});\n  }}\n}}");
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
    let groups = rows.div_ceil(Transform::new(&op.row).rows);
    let signs = wgsl::signs(&op.row);
    recorder.dispatch(&recorder::Spec::Rotate(spec), || source(&spec, &context.caps), slots, groups, &fields, &[&signs])
}
