//! Floats into the cache.

use super::recorder::{self, WgpuRecorder, pool_slots};
use super::wgsl::{self, Align, Builder, Layout, Rows, Source, Tensor, float, line};
use super::{Caps, Slot, rotate};
use crate::backend::Quantize;
use crate::error::Result;
use crate::format::{RowFormat, Scaling, ZERO_NORM};
use crate::ops::PagePool;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    pub pool: Rows,
    pub x: Tensor,
}

const FIELDS: [&str; 11] = [
    "rows",
    "x_off",
    "p_codes_off",
    "p_scales_off",
    "table_off",
    "spans_off",
    "sequences",
    "kv_heads",
    "page_size",
    "slots",
    "width",
];

/// Equal cells over the boundaries, so narrow that each holds one at most: the cell of an element, and one comparison, give
/// its code.
pub(super) struct Grid {
    /// An element's cell is the whole part of element · scale + shift.
    scale: f32,
    shift: f32,
    /// By cell: how many boundaries lie in cells before it.
    cells: Vec<u32>,
}

impl Grid {
    pub fn new(row: &RowFormat) -> Self {
        let bounds = row.codebook().map_or(&[][..], |book| &book.boundaries);
        let (Some(&low), Some(&high)) = (bounds.first(), bounds.last()) else {
            return Grid { scale: 1.0, shift: 0.0, cells: vec![0; 4] };
        };
        let gap = bounds.windows(2).map(|w| w[1] - w[0]).fold(f32::INFINITY, f32::min);
        let mut scale = 1.01 / gap;
        loop {
            let shift = 1.37 - low * scale;
            let cell = |b: f32| b * scale + shift;
            // No boundary so near a cell's edge that a device's rounding could move it into another.
            let clear = bounds.iter().all(|&b| (1e-3..=0.999).contains(&cell(b).fract()));
            if clear && bounds.windows(2).all(|w| cell(w[0]) as u32 != cell(w[1]) as u32) {
                let count = (cell(high) as usize + 2).next_multiple_of(4);
                let before = |i| bounds.iter().filter(|&&b| (cell(b) as usize) < i).count() as u32;
                return Grid { scale, shift, cells: (0..count).map(before).collect() };
            }
            scale *= 1.003;
        }
    }
}

/// Elements that one task turns into codes.
fn unit(d: usize) -> usize {
    if d.is_multiple_of(32) { 32 } else { 16 }
}

pub(super) fn source(spec: &Spec, caps: &Caps) -> Source {
    let row = spec.pool.format();
    let d = row.head_dim();
    let (rows, eights) = (rotate::rows_at_once(d), d / 8);
    // Rows that do not end on words share them with their neighbours, which other workgroups may be writing.
    let shared = spec.pool.align == Align::Byte;
    let mut b = Builder::new(caps);
    b.storage("x", spec.x.element(), false);
    b.storage("p_codes", if shared { "atomic<u32>" } else { spec.pool.element() }, true);
    let f16_scales = row.scaling() == Scaling::Corrected;
    if row.scales_per_row() > 0 {
        b.storage("p_scales", if f16_scales { "atomic<u32>" } else { "u32" }, true);
    }
    b.storage("table", "u32", false);
    b.storage("spans", "u32", false);
    let vectors = spec.pool.book_vectors();
    let grid = Grid::new(&row);
    let cells = grid.cells.len();
    let tables = [
        ("signs", "u32", 8),
        ("p_levels", "f32", vectors),
        ("p_bounds", "f32", vectors),
        ("p_cells", "u32", cells / 4),
    ];
    b.params(&FIELDS, if vectors > 0 { &tables } else { &[] });
    spec.x.load(&mut b, "x");
    line!(b, "var<workgroup> row_of: array<u32, {rows}>;");
    b.push(include_str!("locate.wgsl"));
    b.push(if shared { include_str!("put_shared.wgsl") } else { "" });
    if !row.is_rotated() {
        dense(&mut b, spec, d, rows, eights);
        return b.finish();
    }
    Layout::Padded.declare(&mut b, rows * d / 4);
    wgsl::flip(&mut b);
    wgsl::transform(&mut b, &row);
    squares(&mut b, &row, rows);
    spec.pool.book(&mut b, "p");
    let scales = row.scales_per_row();
    line!(b, "var<workgroup> p_bound: array<f32, {}>;", 4 * vectors);
    line!(b, "var<workgroup> norm_of: array<f32, {}>;", rows * scales);
    line!(b, "var<workgroup> gain_of: array<f32, {}>;", rows * scales);
    if f16_scales {
        b.push(include_str!("put_scale.wgsl"));
    }
    line!(b, "var<workgroup> p_cell: array<u32, {cells}>;");
    b.push("fn code4(u: vec4<f32>) -> vec4<u32> {");
    line!(b, "  let t = clamp(u * {} + {}, vec4(0.0), vec4({}.0));", float(grid.scale), float(grid.shift), cells - 1);
    line!(b, "  let i = min(vec4<u32>(t), vec4({}u));", cells - 1);
    b.push("  let c = vec4(p_cell[i.x], p_cell[i.y], p_cell[i.z], p_cell[i.w]);");
    b.push("  let bound = vec4(p_bound[c.x], p_bound[c.y], p_bound[c.z], p_bound[c.w]);");
    b.push("  return c + select(vec4(0u), vec4(1u), u > bound);\n}");
    b.main();
    line!(b, "  let first = wg * {rows}u;\n  let n = min({rows}u, a.rows - first);\n  p_fill(tid);");
    line!(b, "  for (var i = tid; i < {}u; i += WG) {{ p_bound[i] = a.p_bounds[i >> 2u][i & 3u]; }}", 4 * vectors);
    line!(b, "  for (var i = tid; i < {cells}u; i += WG) {{ p_cell[i] = a.p_cells[i >> 2u][i & 3u]; }}");
    b.push("  for (var i = tid; i < n; i += WG) { row_of[i] = locate(first + i); }");
    line!(b, "  for (var u = tid; u < n * {eights}u; u += WG) {{");
    line!(b, "    let v = flip(8u * (u % {eights}u), x_load(first * {d}u + 8u * u));");
    b.push("    buf[at(2u * u)] = v.a;\n    buf[at(2u * u + 1u)] = v.b;\n  }\n  transform(n, tid);\n  fold(n, tid);");
    // One thread a norm.
    line!(b, "  for (var i = tid; i < n * {scales}u; i += WG) {{\n    let squares = folded(i);");
    let block_rms = row.scaling() == Scaling::BlockRms;
    line!(
        b,
        "    let norm = exact_sqrt(squares{});",
        if block_rms { format!(" * {}", float(scales as f32 / d as f32)) } else { String::new() }
    );
    let unit_norm = if block_rms { row.scale_factor_d512() } else { (d as f32).sqrt() };
    line!(b, "    norm_of[i] = norm;\n    gain_of[i] = keep(exact_div(1.0, norm)) * {};", float(unit_norm));
    if !f16_scales {
        b.push("    let stored = select(0x7fc00000u, bitcast<u32>(norm), is_finite(norm));");
        line!(b, "    p_scales[(a.p_scales_off >> 2u) + row_of[i / {scales}u] * {scales}u + i % {scales}u] = stored;");
    }
    b.push("  }\n  workgroupBarrier();");
    codes(&mut b, spec, &row);
    if f16_scales {
        b.push("  workgroupBarrier();\n  fold(n, tid);\n  for (var i = tid; i < n; i += WG) {");
        b.push("    let norm = norm_of[i];\n    let scale = f16_bits(exact_div(norm, exact_sqrt(folded(i))));");
        b.push("    put_scale(row_of[i], select(0x7e00u, scale, is_finite(norm)));\n  }");
    }
    b.push("}");
    b.finish()
}

/// Dense floats are stored as they are.
fn dense(b: &mut Builder, spec: &Spec, d: usize, rows: usize, eights: usize) {
    let crate::format::Packing::Float(dtype) = spec.pool.format().packing() else {
        unreachable!("checked by the caller")
    };
    Tensor { dtype, wide: spec.pool.align == Align::Vector }.store(b, "p_codes");
    b.main();
    line!(b, "  let first = wg * {rows}u;\n  let n = min({rows}u, a.rows - first);");
    b.push("  for (var i = tid; i < n; i += WG) { row_of[i] = locate(first + i); }\n  workgroupBarrier();");
    line!(b, "  for (var u = tid; u < n * {eights}u; u += WG) {{");
    line!(b, "    let v = x_load(first * {d}u + 8u * u);");
    line!(b, "    p_codes_store(row_of[u / {eights}u] * {d}u + 8u * (u % {eights}u), v);\n  }}\n}}");
}

/// `fold(rows, tid)` and `folded(i)`: the sum of squares of part i of `buf` for every scale, in the order in which the CPU
/// sums: blocks one after the other, then halves folded onto each other.
fn squares(b: &mut Builder, row: &RowFormat, rows: usize) {
    let scales = row.scales_per_row();
    let vectors = row.head_dim() / scales / 4;
    let block = if scales > 1 { vectors } else { row.block() / 4 };
    let blocks = vectors / block;
    let span = block.min(8);
    let tasks = block / span;
    line!(b, "var<workgroup> sums: array<vec4<f32>, {}>;", rows * scales * tasks);
    line!(b, "fn fold(rows: u32, tid: u32) {{\n  for (var u = tid; u < rows * {}u; u += WG) {{", scales * tasks);
    line!(b, "    let base = (u / {tasks}u) * {vectors}u + u % {tasks}u;");
    for k in 0..span {
        line!(b, "    let v{k} = buf[at(base + {}u)];\n    var s{k} = keep4(v{k} * v{k});", k * tasks);
        for i in 1..blocks {
            line!(b, "    let v{k}_{i} = buf[at(base + {}u)];", i * block + k * tasks);
            line!(b, "    s{k} = s{k} + keep4(v{k}_{i} * v{k}_{i});");
        }
    }
    let mut half = span / 2;
    while half > 0 {
        for k in 0..half {
            line!(b, "    s{k} = s{k} + s{};", k + half);
        }
        half /= 2;
    }
    b.push("    sums[u] = s0;\n  }\n  workgroupBarrier();\n}");
    line!(b, "fn folded(i: u32) -> f32 {{");
    for k in 0..tasks {
        line!(b, "  var s{k} = sums[i * {tasks}u + {k}u];");
    }
    let mut half = tasks / 2;
    while half > 0 {
        for k in 0..half {
            line!(b, "  s{k} = s{k} + s{};", k + half);
        }
        half /= 2;
    }
    b.push("  let pair = s0.xy + s0.zw;\n  return pair.x + pair.y;\n}");
}

/// Codes of all elements, packed and stored; with corrected scales their levels take the elements' place.
fn codes(b: &mut Builder, spec: &Spec, row: &RowFormat) {
    let (d, unit) = (row.head_dim(), unit(row.head_dim()));
    let (scales, per_row) = (row.scales_per_row(), row.head_dim() / unit);
    let planes = row.packing() == crate::format::Packing::Planes;
    let field = if planes { 4 } else { row.row_bytes() * 8 / d };
    let words = (unit * field).div_ceil(32);
    line!(
        b,
        "  for (var u = tid; u < n * {per_row}u; u += WG) {{\n    let i = u / {per_row}u;\n    let c = u % {per_row}u;"
    );
    line!(b, "    let s = i * {scales}u + {};", spec.pool.scale_of("c", unit));
    b.push("    let norm = norm_of[s];\n    let gain = gain_of[s];");
    // All codes are one value for a zero vector and for one that is not finite.
    let zero = row.codebook().map_or(0, |book| book.zero_code());
    line!(b, "    let fill = select(0u, {zero}u, is_finite(norm));");
    line!(b, "    let filled = vec4(!is_finite(norm) || norm <= {});", float(ZERO_NORM));
    for k in 0..words {
        line!(b, "    var w{k} = 0u;");
    }
    for j in 0..unit / 4 {
        line!(b, "    let at{j} = at(u * {}u + {j}u);", unit / 4);
        line!(b, "    let c{j} = select(code4(buf[at{j}] * gain), vec4(fill), filled);");
        if row.scaling() == Scaling::Corrected {
            line!(b, "    buf[at{j}] = vec4<f32>(p_book[c{j}.x], p_book[c{j}.y], p_book[c{j}.z], p_book[c{j}.w]);");
        }
        for (e, component) in "xyzw".chars().enumerate() {
            let bit = (4 * j + e) * field;
            let (k, shift) = (bit / 32, bit % 32);
            line!(b, "    w{k} |= c{j}.{component} << {shift}u;");
            if shift + row.bits() > 32 {
                line!(b, "    w{} |= c{j}.{component} >> {}u;", k + 1, 32 - shift);
            }
        }
    }
    let row_bytes = row.row_bytes();
    if planes {
        store_planes(b, spec, d, words);
        return b.push("  }");
    }
    match spec.pool.align {
        Align::Byte => {
            line!(b, "    let byte = a.p_codes_off + row_of[i] * {row_bytes}u + c * {}u;", unit * field / 8);
            for k in 0..words {
                line!(b, "    put(byte + {}u, w{k}, {}u);", 4 * k, (unit * field - 32 * k).min(32));
            }
        }
        align => {
            line!(b, "    let word = (a.p_codes_off >> 2u) + row_of[i] * {}u + c * {words}u;", row_bytes / 4);
            if align == Align::Vector && words.is_multiple_of(4) {
                for k in (0..words).step_by(4) {
                    let vector = format!("vec4(w{}, w{}, w{}, w{})", k, k + 1, k + 2, k + 3);
                    line!(b, "    p_codes[(word >> 2u) + {}u] = {vector};", k / 4);
                }
            } else {
                for k in 0..words {
                    let place = match align {
                        Align::Vector => format!("(word + {k}u) >> 2u][(word + {k}u) & 3u"),
                        _ => format!("word + {k}u"),
                    };
                    line!(b, "    p_codes[{place}] = w{k};");
                }
            }
        }
    }
    b.push("  }");
}

/// Stores nibbles in the words w0, w1, …, eight elements each, as three planes.
fn store_planes(b: &mut Builder, spec: &Spec, d: usize, words: usize) {
    for plane in 0..3 {
        let byte = |k: usize| {
            format!("(((w{k} >> {}u) & 0x77u) | (((w{k} >> {}u) & 0x11u) << 3u)) << {}u", 8 * plane, 24 + plane, 8 * k)
        };
        let bytes: Vec<String> = (0..words).map(byte).collect();
        line!(b, "    let plane{plane} = {};", bytes.join(" | "));
        line!(
            b,
            "    let byte{plane} = a.p_codes_off + row_of[i] * {}u + {}u + c * {words}u;",
            3 * d / 8,
            plane * d / 8
        );
        match spec.pool.align {
            Align::Byte => line!(b, "    put(byte{plane}, plane{plane}, {}u);", 8 * words),
            Align::Word => line!(b, "    p_codes[byte{plane} >> 2u] = plane{plane};"),
            Align::Vector => line!(b, "    p_codes[byte{plane} >> 4u][(byte{plane} >> 2u) & 3u] = plane{plane};"),
        }
    }
}

pub(super) fn record(recorder: &mut WgpuRecorder, op: &Quantize) -> Result<()> {
    // A dispatch a part: K and V may differ in codec.
    op.parts.iter().try_for_each(|(x, pool)| record_part(recorder, op, x, pool))
}

fn record_part(recorder: &mut WgpuRecorder, op: &Quantize, x: &crate::Buffer, pool: &PagePool) -> Result<()> {
    let context = recorder.context.clone();
    let (x, x_tensor) = Slot::tensor(&context, "x", x)?;
    let (pool_slots, rows, [codes_off, scales_off]) = pool_slots(&context, "the pool's codes", pool)?;
    let row = *pool.row();
    if !row.is_rotated() && rows.align == Align::Byte {
        return Err(context.unsupported("store dense floats at a byte offset that is no multiple of 4".into()));
    }
    let table = Slot::new(&context, "the page table", op.batch.device_table())?;
    let spans = Slot::new(&context, "the spans", op.batch.device_spans())?;
    let (count, width) = (op.batch.tokens() * pool.kv_heads(), op.batch.width());
    let fields = [
        count as u32,
        x.words(),
        if row.is_rotated() { codes_off } else { codes_off / 4 },
        scales_off,
        table.words(),
        spans.words(),
        op.batch.sequences() as u32,
        pool.kv_heads() as u32,
        pool.page_size() as u32,
        (width * pool.page_size()) as u32,
        width as u32,
    ];
    let mut slots = vec![x];
    slots.extend(pool_slots);
    slots.extend([table, spans]);
    let spec = Spec { pool: rows, x: x_tensor };
    let (signs, levels) = (wgsl::signs(&row), wgsl::levels(&row));
    let mut bounds: Vec<u32> =
        row.codebook().map_or(vec![], |book| book.boundaries.iter().map(|x| x.to_bits()).collect());
    // Above the last boundary there is none.
    bounds.resize(levels.len(), f32::MAX.to_bits());
    let cells = Grid::new(&row).cells;
    let tables: &[&[u32]] = if row.is_rotated() { &[&signs, &levels, &bounds, &cells] } else { &[] };
    let groups = count.div_ceil(rotate::rows_at_once(row.head_dim()));
    let source = || source(&spec, &context.caps);
    recorder.dispatch(&recorder::Spec::Quantize(spec), source, slots, groups, &fields, tables)
}
