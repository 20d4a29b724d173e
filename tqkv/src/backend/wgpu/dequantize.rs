//! The cache back into floats.

use super::recorder::{self, WgpuRecorder, pool_slots};
use super::wgsl::{self, Builder, Rows, Source, Tensor, Transform, line};
use super::{Caps, Slot};
use crate::error::Result;
use crate::problem::op::Dequantize;
use crate::problem::{Domain, Positions, RowOrder};

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    pub pool: Rows,
    pub out: Tensor,
    /// Whether vectors go back into the model's domain.
    pub restore: bool,
    pub head_major: bool,
    /// Whether positions come as a list.
    pub listed: bool,
}

impl Spec {
    /// Rows that a workgroup decodes: more where they need not be held.
    fn rows(&self, caps: &Caps) -> usize {
        let row = self.pool.format();
        if self.restore { Transform::new(&row, caps).rows } else { (64 * wgsl::THREADS / row.head_dim()).max(1) }
    }
}

const FIELDS: [&str; 11] = [
    "rows",
    "out_off",
    "p_codes_off",
    "p_scales_off",
    "table_off",
    "n",
    "start",
    "kv_heads",
    "page_size",
    "slots",
    "table_from",
];

pub(super) fn source(spec: &Spec, caps: &Caps) -> Source {
    let row = spec.pool.format();
    let (d, rows, scales) = (row.head_dim(), spec.rows(caps), row.scales_per_row());
    let mut b = Builder::new(caps);
    spec.pool.bind(&mut b, "p");
    b.storage("table", "u32", false);
    if spec.listed {
        b.storage("list", "u32", false);
    }
    b.storage("out", spec.out.element(), true);
    let mut tables = vec![];
    if spec.pool.book_vectors() > 0 {
        tables.push(("p_levels", "f32", spec.pool.book_vectors()));
    }
    if spec.restore {
        tables.push(("signs", "u32", 8));
    }
    b.params(&FIELDS, &tables);
    spec.pool.book(&mut b, "p");
    spec.pool.factor(&mut b, "p");
    spec.out.store(&mut b, "out");
    let unit = if spec.restore { 8 } else { spec.out.unit() };
    let n = spec.pool.fetch_size(unit);
    spec.pool.fetch(&mut b, "p", n);
    decode(&mut b, spec, unit, n);
    line!(b, "var<workgroup> row_of: array<u32, {rows}>;");
    line!(b, "var<workgroup> factor_of: array<f32, {}>;", rows * scales.max(1));
    let transform = Transform::new(&row, caps);
    if spec.restore {
        wgsl::flip(&mut b);
        transform.declare(&mut b, 0);
    }
    b.main();
    line!(b, "  let first_row = wg * {rows}u;\n  let n = min({rows}u, a.rows - first_row);\n  {}", spec.pool.fill("p"));
    b.push("  for (var i = tid; i < n; i += WG) {\n    let r = first_row + i;");
    b.push(match spec.head_major {
        true => "    let head = r / a.n;\n    let k = r % a.n;",
        false => "    let head = r % a.kv_heads;\n    let k = r / a.kv_heads;",
    });
    line!(b, "    let position = {};", if spec.listed { "list[k]" } else { "a.start + k" });
    b.push("    let slot = position % a.slots;");
    b.push("    let page = table[a.table_off + a.table_from + slot / a.page_size];");
    b.push("    let row = (page * a.kv_heads + head) * a.page_size + slot % a.page_size;\n    row_of[i] = row;");
    for s in 0..scales {
        line!(b, "    factor_of[i * {scales}u + {s}u] = p_factor(p_scale(row, {s}u), row);");
    }
    b.push("  }\n  workgroupBarrier();");
    let decoded = |i: &str, e: &str| {
        let fetches = (0..unit / n).map(|k| format!(", p_fetch(p_place(row_of[{i}]), {e} / {n}u + {k}u)"));
        format!("decoded({i}, {e}{})", fetches.collect::<String>())
    };
    if spec.restore {
        transform.columns(&mut b, "n", decoded);
        let unit = spec.out.unit();
        let store = format!("out_store(first_row * {d}u + e, flip{unit}(e % {d}u, v));");
        transform.rows(&mut b, "n", unit, &store);
        b.push("}");
        return b.finish();
    }
    let step = unit * wgsl::THREADS;
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
    b.finish()
}

/// `fn decoded(i, e, w0, …)`: 4 or 8 (`unit`) elements from element e of the workgroup's row i on, of fetches of n.
fn decode(b: &mut Builder, spec: &Spec, unit: usize, n: usize) {
    let ty = if unit == 4 { "vec4<f32>" } else { "Eight" };
    let words: String = (0..unit / n).map(|k| format!(", w{k}: vec4<u32>")).collect();
    line!(b, "fn decoded(i: u32, e: u32{words}) -> {ty} {{");
    let four = |j: usize| spec.pool.value("p", &format!("w{}", 4 * j / n), j % (n / 4));
    let v = if unit == 4 { four(0) } else { format!("Eight({}, {})", four(0), four(1)) };
    match spec.pool.format().scales_per_row() {
        0 => line!(b, "  return {v};\n}}"),
        scales => {
            let scale = spec.pool.scale_of("e", 1);
            line!(b, "  return times{unit}({v}, factor_of[i * {scales}u + {scale}]);\n}}");
        }
    }
}

pub(super) fn record(recorder: &mut WgpuRecorder, op: &Dequantize) -> Result<()> {
    let context = recorder.context.clone();
    let (mut slots, pool, [codes_off, scales_off]) = pool_slots(&context, "the pool's codes", &op.pool)?;
    let table = Slot::new(&context, "the page table", op.batch.device_table())?;
    let (out, out_tensor) = Slot::tensor(&context, "out", &op.out)?;
    let row = *op.pool.row();
    let spec = Spec {
        pool,
        out: out_tensor,
        restore: op.domain == Domain::Original && row.is_rotated(),
        head_major: op.order == RowOrder::HeadMajor,
        listed: matches!(op.positions, Positions::List(_)),
    };
    let (n, kv_heads, page_size) = (op.positions.len(), op.pool.kv_heads(), op.pool.page_size());
    let width = op.batch.width();
    let fields = [
        (n * kv_heads) as u32,
        out.words(),
        codes_off,
        scales_off,
        table.words(),
        n as u32,
        if spec.listed { 0 } else { op.positions.get(0) as u32 },
        kv_heads as u32,
        page_size as u32,
        (width * page_size) as u32,
        (op.sequence * width) as u32,
    ];
    slots.push(table);
    if let Positions::List(list) = &op.positions {
        slots.push(recorder.list("the list of positions", list)?);
    }
    slots.push(out);
    let groups = (n * kv_heads).div_ceil(spec.rows(&context.caps));
    let (levels, signs) = (wgsl::levels(&row), wgsl::signs(&row));
    let mut tables: Vec<&[u32]> = vec![];
    if !levels.is_empty() {
        tables.push(&levels);
    }
    if spec.restore {
        tables.push(&signs);
    }
    let source = || source(&spec, &context.caps);
    recorder.dispatch(&recorder::Spec::Dequantize(spec), source, slots, groups, &fields, &tables)
}
