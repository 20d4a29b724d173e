//! The cache back into floats.

use super::recorder::{self, WgpuRecorder, pool_slots};
use super::wgsl::{self, Builder, Layout, Rows, Source, Tensor, line};
use super::{Caps, Slot, rotate};
use crate::backend::Dequantize;
use crate::compute::DType;
use crate::error::Result;
use crate::ops::{Domain, Positions, RowOrder};

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
    fn rows(&self) -> usize {
        let d = self.pool.format().head_dim();
        if self.restore { rotate::rows_at_once(d) } else { (64 * wgsl::THREADS / d).max(1) }
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
    let (d, rows, scales) = (row.head_dim(), spec.rows(), row.scales_per_row());
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
    // A thread writes 16 bytes at a time.
    let four = spec.out.dtype == DType::F32 && !spec.restore;
    if four {
        wgsl::store4(spec.out, &mut b, "out");
    } else {
        spec.out.store(&mut b, "out");
    }
    let n = spec.pool.fetch_size(if four { 4 } else { 8 });
    spec.pool.fetch(&mut b, "p", n);
    line!(b, "var<workgroup> row_of: array<u32, {rows}>;");
    line!(b, "var<workgroup> factor_of: array<f32, {}>;", rows * scales.max(1));
    if spec.restore {
        Layout::Padded.declare(&mut b, rows * d / 4);
        wgsl::flip(&mut b);
        wgsl::transform(&mut b, &row);
    }
    b.main();
    line!(b, "  let first = wg * {rows}u;\n  let n = min({rows}u, a.rows - first);\n  {}", spec.pool.fill("p"));
    b.push("  for (var i = tid; i < n; i += WG) {\n    let r = first + i;");
    b.push(match spec.head_major {
        true => "    let head = r / a.n;\n    let k = r % a.n;",
        false => "    let head = r % a.kv_heads;\n    let k = r / a.kv_heads;",
    });
    line!(b, "    let position = {};", if spec.listed { "list[k]" } else { "a.start + k" });
    b.push("    let slot = position % a.slots;");
    b.push("    let page = table[a.table_off + a.table_from + slot / a.page_size];");
    b.push("    let row = (page * a.kv_heads + head) * a.page_size + slot % a.page_size;\n    row_of[i] = row;");
    for s in 0..scales {
        line!(b, "    factor_of[i * {scales}u + {s}u] = p_factor(row, {s}u);");
    }
    b.push("  }\n  workgroupBarrier();");
    if four {
        let fours = d / 4;
        line!(
            b,
            "  for (var u = tid; u < n * {fours}u; u += WG) {{\n    let i = u / {fours}u;\n    let c = u % {fours}u;"
        );
        line!(b, "    let w = p_fetch(row_of[i], c);\n    var v = {};", spec.pool.value("p", "w", 0));
        if scales > 0 {
            line!(b, "    v = v * factor_of[i * {scales}u + {}];", spec.pool.scale_of("c", 4));
        }
        line!(b, "    out_store4(first * {d}u + 4u * u, v);\n  }}\n}}");
        return b.finish();
    }
    let eights = d / 8;
    line!(
        b,
        "  for (var u = tid; u < n * {eights}u; u += WG) {{\n    let i = u / {eights}u;\n    let c = u % {eights}u;"
    );
    if n == 8 {
        b.push("    let w = p_fetch(row_of[i], c);");
        line!(b, "    var v = Eight({}, {});", spec.pool.value("p", "w", 0), spec.pool.value("p", "w", 1));
    } else {
        b.push("    let w0 = p_fetch(row_of[i], 2u * c);\n    let w1 = p_fetch(row_of[i], 2u * c + 1u);");
        line!(b, "    var v = Eight({}, {});", spec.pool.value("p", "w0", 0), spec.pool.value("p", "w1", 0));
    }
    if scales > 0 {
        line!(b, "    let f = factor_of[i * {scales}u + {}];", spec.pool.scale_of("c", 8));
        b.push("    v = Eight(v.a * f, v.b * f);");
    }
    if spec.restore {
        b.push("    buf[at(2u * u)] = v.a;\n    buf[at(2u * u + 1u)] = v.b;\n  }\n  transform(n, tid);");
        line!(b, "  for (var u = tid; u < n * {eights}u; u += WG) {{");
        line!(b, "    let v = flip(8u * (u % {eights}u), Eight(buf[at(2u * u)], buf[at(2u * u + 1u)]));");
        line!(b, "    out_store(first * {d}u + 8u * u, v);");
    } else {
        line!(b, "    out_store(first * {d}u + 8u * u, v);");
    }
    b.push("  }\n}");
    b.finish()
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
    let groups = (n * kv_heads).div_ceil(spec.rows());
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
