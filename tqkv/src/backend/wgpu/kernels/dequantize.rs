//! The cache back into floats.

use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::codec::key::Stored;
use crate::backend::wgpu::codec::rows::PoolSlots;
use crate::backend::wgpu::commands::Commands;
use crate::backend::wgpu::kernel::Kernel;
use crate::backend::wgpu::kernels::channels::{Mapped, Pass, Way};
use crate::backend::wgpu::slot::Slot;
use crate::backend::wgpu::wgsl::builder::{Builder, Source, THREADS, line};
use crate::backend::wgpu::wgsl::params::params;
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::{Transform, flip};
use crate::error::Result;
use crate::problem::op::Dequantize;
use crate::problem::{Domain, Positions, RowOrder};

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct DequantizeKernel {
    pub pool: Stored,
    pub out: Tensor,
    /// Whether vectors go back into the model's domain.
    pub restore: bool,
    pub head_major: bool,
    /// Whether positions come as a list.
    pub listed: bool,
}

params! {
    pub struct DequantizeParams {
        rows: u32,
        out_off: u32,
        p_codes_off: u32,
        p_scales_off: u32,
        /// Where the sequence's page table starts.
        table_off: u32,
        list_off: u32,
        /// Positions, the first one, and what they lie in.
        n: u32,
        start: u32,
        kv_heads: u32,
        page_size: u32,
        slots: u32,
    }
}

impl DequantizeKernel {
    /// Rows that a workgroup decodes: more where they need not be held.
    fn rows(&self, caps: &Caps) -> usize {
        let row = self.pool.format();
        if self.restore { Transform::new(&row, caps).rows } else { (64 * THREADS / row.row_dim()).max(1) }
    }

    /// Declares bindings and functions; gives the elements of a fetch.
    fn declare(&self, b: &mut Builder, unit: usize) -> usize {
        b.params::<DequantizeParams>();
        self.pool.bind(b, "p");
        b.storage("table", "u32", false);
        if self.listed {
            b.storage("list", "u32", false);
        }
        self.out.bind(b, "out", true);
        self.pool.tables(b, "p");
        self.pool.factor(b, "p");
        self.out.store(b, "out");
        let n = self.pool.elements().fetch_size(&self.pool, unit);
        self.pool.elements().fetch(&self.pool, b, "p", n);
        decode(b, self, unit, n);
        n
    }
}

impl Kernel for DequantizeKernel {
    type Params = DequantizeParams;
    const NAME: &'static str = "dequantize";

    fn source(&self, caps: &Caps) -> Source {
        let row = self.pool.format();
        let (d, rows, scales) = (row.row_dim(), self.rows(caps), row.scales_per_row());
        let mut b = Builder::new(caps);
        let unit = if self.restore { 8 } else { self.out.unit() };
        let n = self.declare(&mut b, unit);
        line!(b, "var<workgroup> row_of: array<u32, {rows}>;");
        line!(b, "var<workgroup> factor_of: array<f32, {}>;", rows * scales.max(1));
        let transform = Transform::new(&row, caps);
        if self.restore {
            flip(&mut b, "flip", "p_tables");
            transform.declare(&mut b, 0);
        }
        b.main();
        line!(
            b,
            "  let first_row = wg * {rows}u;\n  let n = min({rows}u, a.rows - first_row);\n  {}",
            self.pool.fill("p")
        );
        b.push("  for (var i = tid; i < n; i += WG) {\n    let r = first_row + i;");
        b.push(match self.head_major {
            true => "    let head = r / a.n;\n    let k = r % a.n;",
            false => "    let head = r % a.kv_heads;\n    let k = r / a.kv_heads;",
        });
        line!(b, "    let position = {};", if self.listed { "list[a.list_off + k]" } else { "a.start + k" });
        b.push("    let slot = position % a.slots;");
        b.push("    let page = table[a.table_off + slot / a.page_size];");
        b.push("    let row = (page * a.kv_heads + head) * a.page_size + slot % a.page_size;\n    row_of[i] = row;");
        for s in 0..scales {
            line!(b, "    factor_of[i * {scales}u + {s}u] = p_factor(p_scale(row, {s}u), row);");
        }
        b.push("  }\n  workgroupBarrier();");
        if self.restore {
            let decoded = |i: &str, e: &str| {
                let fetches = (0..unit / n).map(|k| format!(", p_fetch(p_place(row_of[{i}]), {e} / {n}u + {k}u)"));
                format!("decoded({i}, {e}{})", fetches.collect::<String>())
            };
            transform.columns(&mut b, "n", decoded);
            let unit = self.out.unit();
            let store = format!("out_store(first_row * {d}u + e, flip{unit}(e % {d}u, v));");
            transform.rows(&mut b, "n", unit, &store);
            b.push("}");
        } else {
            rows_as_stored(&mut b, d, unit, n, caps);
        }
        b.finish()
    }
}

/// Rows that stay in their domain, several loads ahead.
fn rows_as_stored(b: &mut Builder, d: usize, unit: usize, n: usize, caps: &Caps) {
    let step = unit * THREADS;
    let ahead = if unit == 8 { caps.ahead } else { 1 };
    line!(b, "  for (var first = 0u; first < n * {d}u; first += {}u) {{", ahead * step);
    for k in 0..ahead {
        line!(b, "    let e{k} = first + {}u + {unit}u * tid;\n    let i{k} = min(e{k} / {d}u, n - 1u);", k * step);
        for f in 0..unit / n {
            line!(b, "    let w{k}_{f} = p_fetch(p_place(row_of[i{k}]), e{k} % {d}u / {n}u + {f}u);");
        }
    }
    for k in 0..ahead {
        let words: String = (0..unit / n).map(|f| format!(", w{k}_{f}")).collect();
        let v = format!("decoded(i{k}, e{k} % {d}u{words})");
        line!(b, "    if (e{k} < n * {d}u) {{ out_store(first_row * {d}u + e{k}, {v}); }}");
    }
    b.push("  }\n}");
}

/// `fn decoded(i, e, w0, …)`: 4 or 8 (`unit`) elements from element e of the workgroup's row i on, of fetches of n.
fn decode(b: &mut Builder, kernel: &DequantizeKernel, unit: usize, n: usize) {
    let ty = if unit == 4 { "vec4<f32>" } else { "Eight" };
    let words: String = (0..unit / n).map(|k| format!(", w{k}: vec4<u32>")).collect();
    line!(b, "fn decoded(i: u32, e: u32{words}) -> {ty} {{");
    let pool = &kernel.pool;
    let four = |j: usize| pool.elements().value(pool, "p", &format!("w{}", 4 * j / n), j % (n / 4));
    let v = if unit == 4 { four(0) } else { format!("Eight({}, {})", four(0), four(1)) };
    match pool.format().scales_per_row() {
        0 => line!(b, "  return {v};\n}}"),
        scales => {
            let scale = pool.scale_of("e", 1);
            line!(b, "  return times{unit}({v}, factor_of[i * {scales}u + {scale}]);\n}}");
        }
    }
}

pub fn record(commands: &mut Commands, op: &Dequantize) -> Result<()> {
    let context = commands.context.clone();
    let pool = PoolSlots::new(&context, "the pool's codes", &op.pool)?;
    let batch = commands.batch(&op.batch)?;
    let row = *op.pool.row();
    let rows = op.positions.len() * op.pool.kv_heads();
    let map = op.pool.channels().filter(|_| op.domain == Domain::Original);
    let between = match map {
        Some(_) => Mapped::room(commands, &[(rows, row.row_dim())])?.pop(),
        None => None,
    };
    let (out, out_tensor) = match &between {
        Some(between) => (between.slot(), between.tensor()),
        None => Slot::tensor(&context.gpu, "out", &op.out, row.row_dim())?,
    };
    let list = match &op.positions {
        Positions::List(list) => Some(commands.list("the list of positions", list)?),
        Positions::Range(_) => None,
    };
    let kernel = DequantizeKernel {
        pool: pool.stored,
        out: out_tensor,
        restore: op.domain == Domain::Original && row.is_rotated(),
        head_major: op.order == RowOrder::HeadMajor,
        listed: list.is_some(),
    };
    let (n, kv_heads, page_size) = (op.positions.len(), op.pool.kv_heads(), op.pool.page_size());
    let width = op.batch.width();
    let params = DequantizeParams {
        rows: (n * kv_heads) as u32,
        out_off: out.words(),
        p_codes_off: pool.codes_off,
        p_scales_off: pool.scales_off,
        table_off: batch.table + (op.sequence * width) as u32,
        list_off: list.as_ref().map_or(0, |list| list.first),
        n: n as u32,
        start: if list.is_some() { 0 } else { op.positions.get(0) as u32 },
        kv_heads: kv_heads as u32,
        page_size: page_size as u32,
        slots: (width * page_size) as u32,
    };
    let mut slots: Vec<Slot> = pool.slots().collect();
    slots.push(batch.slot());
    slots.extend(list.as_ref().map(|list| list.slot()));
    slots.push(out);
    slots.extend(pool.tables());
    let groups = (n * kv_heads).div_ceil(kernel.rows(&context.gpu.caps));
    commands.dispatch(&kernel, &slots, groups, &params)?;
    match (map, &between) {
        (Some(map), Some(between)) => {
            let per = if op.order == RowOrder::HeadMajor { n } else { 1 };
            Pass { map, way: Way::Restore, per, scale: 1.0 }.map_from(commands, between, &op.out)
        }
        _ => Ok(()),
    }
}
