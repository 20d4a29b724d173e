//! The transform by itself.

use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::codec::key::{Align, Stored};
use crate::backend::wgpu::codec::tables;
use crate::backend::wgpu::commands::Commands;
use crate::backend::wgpu::kernel::Kernel;
use crate::backend::wgpu::slot::Slot;
use crate::backend::wgpu::wgsl::builder::{Builder, Source, line};
use crate::backend::wgpu::wgsl::params::params;
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::{Transform, flip};
use crate::error::Result;
use crate::problem::Direction;
use crate::problem::op::Rotate;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct RotateKernel {
    pub row: Stored,
    pub forward: bool,
    pub x: Tensor,
    /// None: in place.
    pub out: Option<Tensor>,
}

params! {
    pub struct RotateParams {
        rows: u32,
        x_off: u32,
        y_off: u32,
    }
}

impl Kernel for RotateKernel {
    type Params = RotateParams;
    const NAME: &'static str = "rotate";

    fn source(&self, caps: &Caps) -> Source {
        let row = self.row.format();
        let d = row.row_dim();
        let transform = Transform::new(&row, caps);
        let mut b = Builder::new(caps);
        b.params::<RotateParams>();
        self.x.bind(&mut b, "x", self.out.is_none());
        if let Some(out) = self.out {
            out.bind(&mut b, "y", true);
        }
        let (to, out) = if let Some(out) = self.out { ("y", out) } else { ("x", self.x) };
        self.x.load(&mut b, "x");
        out.store(&mut b, to);
        if !row.is_rotated() {
            b.main();
            line!(b, "  let first = wg * {0}u * {d}u;", transform.rows);
            line!(b, "  let n = min({0}u * {d}u, a.rows * {d}u - first);", transform.rows);
            b.push("  for (var e = first + 8u * tid; e < first + n; e += 8u * WG) {\n    let v = x_load(e);");
            line!(b, "    {}\n  }}\n}}", out.store_eight(to, "e", "v"));
            return b.finish();
        }
        tables::declare(&mut b, &self.row, "r");
        flip(&mut b, "flip", "r_tables");
        transform.declare(&mut b, 0);
        b.main();
        line!(b, "  let first_row = wg * {0}u;\n  let n = min({0}u, a.rows - first_row);", transform.rows);
        transform.columns(&mut b, "n", |i, e| {
            let x = format!("x_load((first_row + {i}) * {d}u + {e})");
            if self.forward { format!("flip8({e}, {x})") } else { x }
        });
        let unit = out.unit();
        let v = if self.forward { "v".to_owned() } else { format!("flip{unit}(e % {d}u, v)") };
        transform.rows(&mut b, "n", unit, &format!("{to}_store(first_row * {d}u + e, {v});"));
        b.push("}");
        b.finish()
    }
}

pub fn record(commands: &mut Commands, op: &Rotate) -> Result<()> {
    let context = commands.context.clone();
    let (gpu, d) = (&context.gpu, op.row.row_dim());
    let (x, x_tensor) = Slot::tensor(gpu, "x", &op.x, d)?;
    let (out, out_tensor) = Slot::tensor(gpu, "out", &op.out, d)?;
    let in_place = op.x.shares_memory(&op.out);
    let kernel = RotateKernel {
        row: Stored::of(&op.row, Align::Word),
        forward: op.direction == Direction::Forward,
        x: x_tensor,
        out: (!in_place).then_some(out_tensor),
    };
    let rows = op.x.len() / op.x.shape().last().copied().unwrap_or(d).max(1);
    let params = RotateParams { rows: rows as u32, x_off: x.words(), y_off: out.words() };
    let tables = op.row.codebook().map(|_| context.tables(&op.row)).transpose()?;
    let mut slots = if in_place { vec![x] } else { vec![x, out] };
    slots.extend(tables.as_deref().map(Slot::whole));
    let groups = rows.div_ceil(Transform::new(&op.row, &gpu.caps).rows);
    commands.dispatch(&kernel, &slots, groups, &params)
}
