//! The transform by itself.

use super::recorder::{self, WgpuRecorder};
use super::wgsl::{self, Align, Builder, Rows, Source, Tensor, Transform, line};
use super::{Caps, Slot};
use crate::error::Result;
use crate::problem::Direction;
use crate::problem::op::Rotate;

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
    let transform = Transform::new(&row, caps);
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
    b.main();
    line!(b, "  let first_row = wg * {0}u;\n  let n = min({0}u, a.rows - first_row);", transform.rows);
    transform.columns(&mut b, "n", |i, e| {
        let x = format!("x_load((first_row + {i}) * {d}u + {e})");
        if spec.forward { format!("flip8({e}, {x})") } else { x }
    });
    let unit = out.unit();
    let v = if spec.forward { "v".to_owned() } else { format!("flip{unit}(e % {d}u, v)") };
    transform.rows(&mut b, "n", unit, &format!("{to}_store(first_row * {d}u + e, {v});"));
    b.push("}");
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
    let groups = rows.div_ceil(Transform::new(&op.row, &context.caps).rows);
    let signs = wgsl::signs(&op.row);
    recorder.dispatch(&recorder::Spec::Rotate(spec), || source(&spec, &context.caps), slots, groups, &fields, &[&signs])
}
