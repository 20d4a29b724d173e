//! Floats into the cache.

use super::recorder::{self, WgpuRecorder, pool_slots};
use super::wgsl::{self, Align, Builder, Rows, Source, Tensor, Transform, float, line};
use super::{Caps, Slot};
use crate::Buffer;
use crate::error::Result;
use crate::format::{Packing, RowFormat, Scaling, ZERO_NORM};
use crate::problem::PagePool;
use crate::problem::op::Quantize;

/// One input and its pool, or two in one dispatch.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    pub parts: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Part {
    pub pool: Rows,
    pub x: Tensor,
}

/// Parameters of the batch, then those of every part (`{}` is its number).
const FIELDS: [&str; 10] =
    ["rows", "table_off", "spans_off", "sequences", "kv_heads", "page_size", "slots", "width", "groups_each", "rounds"];
const PART_FIELDS: [&str; 3] = ["x{}_off", "p{}_codes_off", "p{}_scales_off"];

/// Equal cells over the boundaries, so narrow that each holds one at most: the cell of an element, and one comparison, give
/// its code.
pub(super) struct Grid {
    /// An element's cell is the last cell · (element · scale + shift), rounded, where what is in brackets is between 0 and 1.
    scale: f32,
    shift: f32,
    last: f32,
    /// By cell: how many boundaries lie in cells before it.
    cells: Vec<u32>,
}

impl Grid {
    pub fn new(row: &RowFormat) -> Self {
        let bounds = row.codebook().map_or(&[][..], |book| &book.boundaries);
        let (Some(&low), Some(&high)) = (bounds.first(), bounds.last()) else {
            return Grid { scale: 1.0, shift: 0.0, last: 1.0, cells: vec![0; 4] };
        };
        let gap = bounds.windows(2).map(|w| w[1] - w[0]).fold(f32::INFINITY, f32::min);
        let mut scale = 1.01 / gap;
        loop {
            // The lowest boundary lies in cell 1.
            let shift = 0.87 - low * scale;
            let cell = |b: f32| (b * scale + shift + 0.5) as u32;
            // No boundary so near a cell's edge that a device's rounding could move it into another.
            let clear = bounds.iter().all(|&b| (1e-3..=0.999).contains(&(b * scale + shift + 0.5).fract()));
            if clear && bounds.windows(2).all(|w| cell(w[0]) != cell(w[1])) {
                let last = (cell(high) + 1) as f32;
                let before = |i| bounds.iter().filter(|&&b| cell(b) < i).count() as u32;
                // A power of two, so that a mask keeps whatever comes within the table.
                let cells = (0..(cell(high) + 2).next_power_of_two().max(4)).map(before).collect();
                return Grid { scale: scale / last, shift: shift / last, last, cells };
            }
            scale *= 1.003;
        }
    }
}

/// Elements that one task turns into codes.
fn unit(d: usize) -> usize {
    if d.is_multiple_of(32) { 32 } else { 16 }
}

/// Parts that go into one dispatch, as far as bindings allow.
const PARTS: usize = 2;

/// Workgroups that a dispatch has for a part when there is work for more: each does several rounds of rows, for one copy of
/// tables. Large ones take longer.
fn most_groups(row: &RowFormat) -> usize {
    if vectors(row) > 16 { 1024 } else { 2048 }
}

pub(super) fn source(spec: &Spec, caps: &Caps) -> Source {
    let mut b = Builder::new(caps);
    let mut fields: Vec<String> = FIELDS.map(str::to_owned).into();
    let mut tables = vec![];
    for (i, part) in spec.parts.iter().enumerate() {
        let row = part.pool.format();
        b.storage(&format!("x{i}"), part.x.element(), false);
        let element = if part.shared() { "atomic<u32>" } else { part.pool.element() };
        b.storage(&format!("p{i}_codes"), element, true);
        if row.scales_per_row() > 0 {
            b.storage(&format!("p{i}_scales"), if part.f16_scales() { "atomic<u32>" } else { "u32" }, true);
        }
        fields.extend(PART_FIELDS.map(|f| f.replace("{}", &i.to_string())));
        if row.is_rotated() {
            let vectors = part.pool.book_vectors();
            let sizes = [
                ("levels", "f32", vectors),
                ("bounds", "f32", vectors),
                ("cells", "u32", Grid::new(&row).cells.len() / 4),
                ("signs", "u32", 8),
            ];
            tables.extend(sizes.map(|(name, ty, n)| (format!("p{i}_{name}"), ty, n)));
        }
    }
    b.storage("table", "u32", false);
    b.storage("spans", "u32", false);
    let fields: Vec<_> = fields.iter().map(String::as_str).collect();
    let tables: Vec<_> = tables.iter().map(|(name, ty, n)| (name.as_str(), *ty, *n)).collect();
    b.params(&fields, &tables);
    // All parts have the rows' shape in common, and take turns in the workgroup's memory.
    let row = spec.parts[0].pool.format();
    let transform = Transform::new(&row, caps);
    b.push("var<workgroup> row_of: array<u32, WG>;");
    b.push(include_str!("locate.wgsl"));
    let formats: Vec<_> = spec.parts.iter().map(|p| p.pool.format()).collect();
    let most = |f: &dyn Fn(&RowFormat) -> usize| formats.iter().filter(|f| f.is_rotated()).map(f).max().unwrap_or(0);
    if formats.iter().any(|f| f.is_rotated()) {
        let scales = most(&|f| f.scales_per_row());
        // Codes wait for being packed where the rows were exchanged.
        transform.declare(&mut b, packs(&row, &transform) * transform.rows * (transform.columns + 1));
        line!(
            b,
            "var<workgroup> norm_of: array<f32, {0}>;\nvar<workgroup> gain_of: array<f32, {0}>;",
            scales * transform.rows
        );
        line!(b, "var<workgroup> sums: array<f32, {}>;", scales * transform.rows * (transform.columns + 1));
        line!(b, "var<workgroup> level_square: array<f32, {}>;", most(&|f| 4 * vectors(f)));
        let cells = most(&|f| Grid::new(f).cells.len());
        line!(b, "var<workgroup> cells: array<vec2<f32>, {cells}>;");
        folded(&mut b, &transform);
    }
    for (i, part) in spec.parts.iter().enumerate() {
        part.x.load(&mut b, &format!("x{i}"));
        match part.pool.format().is_rotated() {
            true => encode(&mut b, part, i, &transform),
            false => dense(&mut b, part, i, &transform),
        }
    }
    b.main();
    for i in 0..spec.parts.len() {
        let before = format!("{i}u * a.groups_each");
        line!(b, "  if (wg >= {before} && wg < {before} + a.groups_each) {{ part{i}(wg - {before}, tid); }}");
    }
    b.push("}");
    b.finish()
}

fn vectors(row: &RowFormat) -> usize {
    row.codebook().map_or(0, |book| book.levels.len() / 4)
}

/// Words in which a column's codes wait for being packed, a byte a code.
fn packs(row: &RowFormat, transform: &Transform) -> usize {
    row.head_dim() / unit(row.head_dim()).max(transform.columns)
}

impl Part {
    /// Rows that do not end on words share them with their neighbours, which other workgroups may be writing.
    fn shared(&self) -> bool {
        self.pool.align == Align::Byte
    }

    fn f16_scales(&self) -> bool {
        self.pool.format().scaling() == Scaling::Corrected
    }
}

/// Text that both kinds of parts begin with: a loop over rounds, and where their rows are.
fn rounds(b: &mut Builder, transform: &Transform) {
    let rows = transform.rows;
    line!(b, "  for (var round = 0u; round < a.rounds; round++) {{");
    line!(b, "    let first = (wg * a.rounds + round) * {rows}u;");
    line!(b, "    let n = select(0u, min({rows}u, a.rows - first), first < a.rows);");
    places(b, transform);
}

/// Where the round's rows are in `row_of`, which all threads fill for several rounds at once: divisions are slow.
fn places(b: &mut Builder, transform: &Transform) {
    line!(b, "    let row0 = (round % {}u) * {}u;", transform.columns, transform.rows);
    b.push("    if (row0 == 0u && first + tid < a.rows) { row_of[tid] = locate(first + tid); }");
}

/// Dense floats are stored as they are.
fn dense(b: &mut Builder, part: &Part, i: usize, transform: &Transform) {
    let row = part.pool.format();
    let (d, Packing::Float(dtype)) = (row.head_dim(), row.packing()) else { unreachable!("the row is not rotated") };
    let tensor = Tensor { dtype, wide: part.pool.align == Align::Vector };
    tensor.store(b, &format!("p{i}_codes"));
    line!(b, "fn part{i}(wg: u32, tid: u32) {{");
    rounds(b, transform);
    line!(b, "    workgroupBarrier();\n    for (var e = 8u * tid; e < n * {d}u; e += 8u * WG) {{");
    line!(b, "      let v = x{i}_load(first * {d}u + e);\n      let to = row_of[row0 + e / {d}u] * {d}u + e % {d}u;");
    line!(
        b,
        "      {}\n    }}\n    workgroupBarrier();\n  }}\n}}",
        tensor.store_eight(&format!("p{i}_codes"), "to", "v")
    );
}

/// `fn part{i}(wg, tid)`: rows into codes and scales.
fn encode(b: &mut Builder, part: &Part, i: usize, transform: &Transform) {
    let row = part.pool.format();
    let (d, scales) = (row.head_dim(), row.scales_per_row());
    let p = format!("p{i}");
    if part.shared() {
        b.push(&include_str!("put_shared.wgsl").replace("p_", &format!("{p}_")));
    }
    if part.f16_scales() {
        b.push(&include_str!("put_scale.wgsl").replace("p_", &format!("{p}_")));
    }
    b.push(
        &include_str!("flip.wgsl").replace("flip", &format!("{p}_flip")).replace("a.signs", &format!("a.{p}_signs")),
    );
    let grid = Grid::new(&row);
    let cells = grid.cells.len();
    line!(b, "fn {p}_code(u: f32) -> u32 {{");
    line!(b, "  let t = saturate(fma(u, {}, {}));", float(grid.scale), float(grid.shift));
    // Adding 2^23 rounds, and leaves the whole number in the low bits.
    line!(b, "  let cell = bitcast<u32>(fma(t, {}, 8388608.0)) & {}u;", float(grid.last), cells - 1);
    b.push("  let found = cells[cell];\n  return bitcast<u32>(found.x) + select(0u, 1u, u > found.y);\n}");

    line!(b, "fn part{i}(wg: u32, tid: u32) {{");
    line!(
        b,
        "  for (var t = tid; t < {}u; t += WG) {{\n    let level = a.{p}_levels[t >> 2u][t & 3u];\n    level_square[t] = keep(level * level);\n  }}",
        4 * vectors(&row)
    );
    line!(b, "  for (var t = tid; t < {cells}u; t += WG) {{\n    let code = a.{p}_cells[t >> 2u][t & 3u];");
    line!(b, "    cells[t] = vec2(bitcast<f32>(code), a.{p}_bounds[code >> 2u][code & 3u]);\n  }}");
    let load = |row: &str, e: &str| format!("x{i}_load((first + {row}) * {d}u + {e})");
    if transform.loads_ahead() {
        let rows = transform.rows;
        transform.places(b);
        line!(b, "  var first = wg * a.rounds * {rows}u;");
        line!(b, "  var next = select(0u, min({rows}u, a.rows - first), first < a.rows);");
        transform.load(b, "next", load);
        // A thread's chunks have the same signs all the time.
        for x in 0..transform.columns / 8 {
            line!(b, "  let signs{x} = {p}_flip8(chunk + {}u, Eight(vec4(0.0), vec4(0.0)));", 8 * x);
        }
        b.push("  for (var round = 0u; round < a.rounds; round++) {");
        places(b, transform);
        transform.exchange(b, |v, x| format!("with_signs({v}, signs{x})"));
        line!(b, "    let n = next;\n    first += {rows}u;");
        line!(b, "    next = select(0u, min({rows}u, a.rows - first), first < a.rows && round + 1u < a.rounds);");
        transform.load_again(b, "next", load);
    } else {
        rounds(b, transform);
        transform.columns(b, "n", |row, e| format!("{p}_flip8({e}, {})", load(row, e)));
    }
    squares(b, transform, &row, "y", |k| format!("keep(y{k} * y{k})"));
    let block_rms = row.scaling() == Scaling::BlockRms;
    let mean = if block_rms { format!(" * {}", float(scales as f32 / d as f32)) } else { String::new() };
    let unit_norm = if block_rms { row.scale_factor_d512() } else { (d as f32).sqrt() };
    // One thread a norm.
    line!(b, "    for (var t = tid; t < n * {scales}u; t += WG) {{");
    line!(b, "      let norm = exact_sqrt(folded(t){mean});\n      norm_of[t] = norm;");
    line!(b, "      gain_of[t] = keep(exact_div(1.0, norm)) * {};", float(unit_norm));
    if !part.f16_scales() {
        b.push("      let stored = select(0x7fc00000u, bitcast<u32>(norm), is_finite(norm));");
        line!(
            b,
            "      {p}_scales[(a.{p}_scales_off >> 2u) + row_of[row0 + t / {scales}u] * {scales}u + t % {scales}u] = stored;"
        );
    }
    b.push("    }\n    workgroupBarrier();");
    codes(b, &p, transform, &row);
    if part.f16_scales() {
        squares(b, transform, &row, "level", |k| format!("level{k}"));
        // By the last threads, since the first pack codes.
        b.push("    let t = WG - 1u - tid;\n    if (t < n) {\n      let norm = norm_of[t];");
        b.push("      let scale = f16_bits(exact_div(norm, exact_sqrt(folded(t))));");
        line!(b, "      {p}_put_scale(row_of[row0 + t], select(0x7e00u, scale, is_finite(norm)));\n    }}");
    } else {
        b.push("    workgroupBarrier();");
    }
    pack(b, part, &p, transform);
    b.push("    workgroupBarrier();\n  }\n}");
}

/// The squares of a column's elements added up for every scale, in the order in which the CPU sums: blocks one after the
/// other, then halves folded onto each other. The rest of the folding is `folded`'s.
fn squares(b: &mut Builder, transform: &Transform, row: &RowFormat, name: &str, square: impl Fn(usize) -> String) {
    let (scales, columns) = (row.scales_per_row(), transform.columns);
    let part = transform.per / scales;
    let block = if scales > 1 { part } else { row.block() / columns };
    for s in 0..scales {
        for k in 0..block {
            line!(b, "    var {name}_sum{s}_{k} = {};", square(s * part + k));
            for other in (k + block..part).step_by(block) {
                line!(b, "    {name}_sum{s}_{k} += {};", square(s * part + other));
            }
        }
        let mut half = block / 2;
        while half > 0 {
            for k in 0..half {
                line!(b, "    {name}_sum{s}_{k} += {name}_sum{s}_{};", k + half);
            }
            half /= 2;
        }
        line!(b, "    sums[(i * {scales}u + {s}u) * {}u + c] = {name}_sum{s}_0;", columns + 1);
    }
    b.push("    workgroupBarrier();");
}

/// `fn folded(t)`: the columns' sums of scale t into one.
fn folded(b: &mut Builder, transform: &Transform) {
    let columns = transform.columns;
    b.push("fn folded(t: u32) -> f32 {");
    for c in 0..columns {
        line!(b, "  var s{c} = sums[t * {}u + {c}u];", columns + 1);
    }
    let mut half = columns / 2;
    while half > 0 {
        for c in 0..half {
            line!(b, "  s{c} += s{};", c + half);
        }
        half /= 2;
    }
    b.push("  return s0;\n}");
}

/// The codes of a column, a byte each in `buf`, and with corrected scales their levels' squares as variables.
fn codes(b: &mut Builder, p: &str, transform: &Transform, row: &RowFormat) {
    let (scales, columns, per) = (row.scales_per_row(), transform.columns, transform.per);
    let packs = packs(row, transform);
    let together = per / packs;
    for s in 0..scales {
        line!(b, "    let gain{s} = gain_of[i * {scales}u + {s}u];");
    }
    for g in 0..packs {
        for k in g * together..(g + 1) * together {
            line!(b, "    let code{k} = {p}_code(y{k} * gain{});", k * scales / per);
            if row.scaling() == Scaling::Corrected {
                line!(b, "    let level{k} = level_square[code{k}];");
            }
        }
        let bytes: Vec<_> = (0..together).map(|k| format!("(code{} << {}u)", g * together + k, 8 * k)).collect();
        let at = format!("(i * {packs}u + {g}u) * {}u + c", columns + 1);
        line!(b, "    buf[{at}] = {};", bytes.join(" | "));
    }
}

/// Packs and stores the codes of all rows.
fn pack(b: &mut Builder, part: &Part, p: &str, transform: &Transform) {
    let row = part.pool.format();
    let (d, unit, columns, scales) = (row.head_dim(), unit(row.head_dim()), transform.columns, row.scales_per_row());
    let planes = row.packing() == Packing::Planes;
    let (per_row, field) = (d / unit, if planes { 4 } else { row.row_bytes() * 8 / d });
    let words = (unit * field).div_ceil(32);
    line!(b, "    for (var u = tid; u < n * {per_row}u; u += WG) {{");
    line!(b, "      let i = u / {per_row}u;\n      let c = u % {per_row}u;\n      let row = row_of[row0 + i];");
    // All codes are one value for a zero vector and for one that is not finite.
    line!(b, "      let norm = norm_of[i * {scales}u + {}];", part.pool.scale_of("c", unit));
    for c in 0..columns {
        line!(b, "      let c{c} = buf[u * {}u + {c}u];", columns + 1);
    }
    let (mut packed, mut filled) = (vec![vec![]; words], vec![0; words]);
    let zero = row.codebook().map_or(0, |book| book.zero_code() as u32);
    for e in 0..unit {
        let (bit, from) = (e * field, 8 * (e / columns));
        let (k, shift) = (bit / 32, bit % 32);
        let code = format!("((c{} >> {from}u) & 0xffu)", e % columns);
        packed[k].push(format!("({code} << {shift}u)"));
        filled[k] |= zero << shift;
        if shift + row.bits() > 32 {
            packed[k + 1].push(format!("({code} >> {}u)", 32 - shift));
            filled[k + 1] |= zero >> (32 - shift);
        }
    }
    let mut packed: Vec<String> = packed.iter().map(|codes| codes.join(" | ")).collect();
    if (field, columns, unit) == (4, 8, 32) {
        packed = nibbles(b);
    }
    line!(b, "      let filled = !is_finite(norm) || norm <= {};", float(ZERO_NORM));
    for (k, (packed, filled)) in packed.iter().zip(filled).enumerate() {
        line!(b, "      let w{k} = select({packed}, select(0u, {filled:#x}u, is_finite(norm)), filled);");
    }
    let row_bytes = row.row_bytes();
    if planes {
        store_planes(b, part, p, words);
        return b.push("    }");
    }
    match part.pool.align {
        Align::Byte => {
            line!(b, "      let byte = a.{p}_codes_off + row * {row_bytes}u + c * {}u;", unit * field / 8);
            for k in 0..words {
                line!(b, "      {p}_put(byte + {}u, w{k}, {}u);", 4 * k, (unit * field - 32 * k).min(32));
            }
        }
        align => {
            line!(b, "      let word = (a.{p}_codes_off >> 2u) + row * {}u + c * {words}u;", row_bytes / 4);
            if align == Align::Vector && words.is_multiple_of(4) {
                for k in (0..words).step_by(4) {
                    let vector = format!("vec4(w{}, w{}, w{}, w{})", k, k + 1, k + 2, k + 3);
                    line!(b, "      {p}_codes[(word >> 2u) + {}u] = {vector};", k / 4);
                }
            } else {
                for k in 0..words {
                    let place = match align {
                        Align::Vector => format!("(word + {k}u) >> 2u][(word + {k}u) & 3u"),
                        _ => format!("word + {k}u"),
                    };
                    line!(b, "      {p}_codes[{place}] = w{k};");
                }
            }
        }
    }
    b.push("    }");
}

/// Four words of nibbles from eight columns of four bytes: pairs of columns share bytes, and bytes change places.
fn nibbles(b: &mut Builder) -> Vec<String> {
    for k in 0..4 {
        line!(b, "      let d{k} = c{} | (c{} << 4u);", 2 * k, 2 * k + 1);
    }
    for (k, next) in [(0, 1), (2, 3)] {
        line!(b, "      let even{k} = (d{k} & 0xff00ffu) | ((d{next} & 0xff00ffu) << 8u);");
        line!(b, "      let odd{k} = ((d{k} >> 8u) & 0xff00ffu) | (d{next} & 0xff00ff00u);");
    }
    let low = |x| format!("({x}0 & 0xffffu) | ({x}2 << 16u)");
    let high = |x| format!("({x}0 >> 16u) | ({x}2 & 0xffff0000u)");
    vec![low("even"), low("odd"), high("even"), high("odd")]
}

/// Stores nibbles in the words w0, w1, …, eight elements each, as three planes.
fn store_planes(b: &mut Builder, part: &Part, p: &str, words: usize) {
    let d = part.pool.format().head_dim();
    for plane in 0..3 {
        let byte = |k: usize| {
            format!("(((w{k} >> {}u) & 0x77u) | (((w{k} >> {}u) & 0x11u) << 3u)) << {}u", 8 * plane, 24 + plane, 8 * k)
        };
        let bytes: Vec<String> = (0..words).map(byte).collect();
        line!(b, "      let plane{plane} = {};", bytes.join(" | "));
        line!(b, "      let byte{plane} = a.{p}_codes_off + row * {}u + {}u + c * {words}u;", 3 * d / 8, plane * d / 8);
        match part.pool.align {
            Align::Byte => line!(b, "      {p}_put(byte{plane}, plane{plane}, {}u);", 8 * words),
            Align::Word => line!(b, "      {p}_codes[byte{plane} >> 2u] = plane{plane};"),
            Align::Vector => line!(b, "      {p}_codes[byte{plane} >> 4u][(byte{plane} >> 2u) & 3u] = plane{plane};"),
        }
    }
}

pub(super) fn record(recorder: &mut WgpuRecorder, op: &Quantize) -> Result<()> {
    // A part binds an input, codes and scales; all need the page table and the spans.
    let most = (recorder.context.limits.max_storage_buffers_per_shader_stage as usize).saturating_sub(2) / 3;
    op.parts.chunks(most.clamp(1, PARTS)).try_for_each(|parts| record_parts(recorder, op, parts))
}

fn record_parts(recorder: &mut WgpuRecorder, op: &Quantize, parts: &[(Buffer, PagePool)]) -> Result<()> {
    let context = recorder.context.clone();
    let table = Slot::new(&context, "the page table", op.batch.device_table())?;
    let spans = Slot::new(&context, "the spans", op.batch.device_spans())?;
    let pool = &parts[0].1;
    let (count, width) = (op.batch.tokens() * pool.kv_heads(), op.batch.width());
    let rounds_of_rows = count.div_ceil(Transform::new(pool.row(), &context.caps).rows);
    let most = parts.iter().map(|(_, pool)| most_groups(pool.row())).min().unwrap_or(1);
    let rounds = rounds_of_rows.div_ceil(most);
    let groups = rounds_of_rows.div_ceil(rounds);
    let mut fields = vec![
        count as u32,
        table.words(),
        spans.words(),
        op.batch.sequences() as u32,
        pool.kv_heads() as u32,
        pool.page_size() as u32,
        (width * pool.page_size()) as u32,
        width as u32,
        groups as u32,
        rounds as u32,
    ];
    let (mut slots, mut tables, mut spec) = (vec![], vec![], Spec { parts: vec![] });
    for (x, pool) in parts {
        let (x, tensor) = Slot::tensor(&context, "x", x)?;
        let (pool_slots, rows, [codes_off, scales_off]) = pool_slots(&context, "the pool's codes", pool)?;
        let row = *pool.row();
        if !row.is_rotated() && rows.align == Align::Byte {
            return Err(context.unsupported("store dense floats at a byte offset that is no multiple of 4".into()));
        }
        fields.extend([x.words(), if row.is_rotated() { codes_off } else { codes_off / 4 }, scales_off]);
        slots.push(x);
        slots.extend(pool_slots);
        if let Some(book) = row.codebook() {
            let mut bounds: Vec<u32> = book.boundaries.iter().map(|x| x.to_bits()).collect();
            // Above the last boundary there is none.
            bounds.push(f32::MAX.to_bits());
            tables.extend([wgsl::levels(&row), bounds, Grid::new(&row).cells, wgsl::signs(&row)]);
        }
        spec.parts.push(Part { pool: rows, x: tensor });
    }
    slots.extend([table, spans]);
    let tables: Vec<&[u32]> = tables.iter().map(|t| &t[..]).collect();
    let source = || source(&spec, &context.caps);
    let groups = groups * parts.len();
    recorder.dispatch(&recorder::Spec::Quantize(spec.clone()), source, slots, groups, &fields, &tables)
}
