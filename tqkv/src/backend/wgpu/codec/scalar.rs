//! Encoding by a scalar quantizer: rotate, norms, codes, scales, to the last bit as `format::exact` does it. How codes lie in a
//! row's bytes is the codec's own.

use super::key::{Align, Stored};
use super::rounds::{places, rounds};
use super::tables::CellTable;
use crate::backend::wgpu::wgsl::builder::{Builder, float, line};
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::{Transform, flip};
use crate::format::{RowFormat, Scaling, ZERO_NORM};

/// How codes are packed.
pub struct Packer<'a> {
    /// Bits from one code to the next in the words that `store` is given.
    pub field: usize,
    /// Stores the words w0, w1, … of run `c` of so many codes of `row`, with names that begin with the third argument.
    pub store: &'a dyn Fn(&mut Builder, &Stored, &str, usize),
}

/// Elements that one task turns into codes.
fn unit(d: usize) -> usize {
    if d.is_multiple_of(32) { 32 } else { 16 }
}

fn vectors(row: &RowFormat) -> usize {
    row.codebook().map_or(0, |book| book.levels.len() / 4)
}

/// Words in which a column's codes wait for being packed, a byte a code.
fn packs(row: &RowFormat, transform: &Transform) -> usize {
    row.row_dim() / unit(row.row_dim()).max(transform.columns)
}

fn f16_scales(row: &RowFormat) -> bool {
    row.scaling() == Scaling::Corrected
}

/// Declares the bindings `{p}_codes`, `{p}_scales` and, where there is a codebook, `{p}_tables` of rows that are written. What several
/// workgroups may write at once is atomic.
pub fn bind(b: &mut Builder, s: &Stored, p: &str) {
    let row = s.format();
    let element = match s.align {
        // Rows that do not end on words share them with their neighbours.
        Align::Byte => "atomic<u32>",
        Align::Word => "u32",
        Align::Vector => "vec4<u32>",
    };
    b.storage(&format!("{p}_codes"), element, true);
    if row.scales_per_row() > 0 {
        b.storage(&format!("{p}_scales"), if f16_scales(&row) { "atomic<u32>" } else { "u32" }, true);
    }
}

/// Declares what encoders of all these rows, which have their shape in common, take turns at in the workgroup's memory.
pub fn declare(b: &mut Builder, all: &[Stored], transform: &Transform) {
    let formats: Vec<_> = all.iter().map(Stored::format).filter(|f| f.codebook().is_some()).collect();
    let Some(row) = formats.first() else { return };
    let most = |f: &dyn Fn(&RowFormat) -> usize| formats.iter().map(f).max().unwrap_or(0);
    let scales = most(&|f| f.scales_per_row());
    // Codes wait for being packed where the rows were exchanged.
    transform.declare(b, packs(row, transform) * transform.rows * (transform.columns + 1));
    line!(
        b,
        "var<workgroup> norm_of: array<f32, {0}>;\nvar<workgroup> gain_of: array<f32, {0}>;",
        scales * transform.rows
    );
    line!(b, "var<workgroup> sums: array<f32, {}>;", scales * transform.rows * (transform.columns + 1));
    line!(b, "var<workgroup> level_square: array<f32, {}>;", most(&|f| 4 * vectors(f)));
    line!(b, "var<workgroup> cells: array<vec2<f32>, {}>;", most(&|f| CellTable::new(f).cells.len()));
    folded(b, transform);
}

/// Declares `fn encode{i}(wg, tid)`: rows into codes and scales.
pub fn encode(b: &mut Builder, s: &Stored, x: Tensor, i: usize, transform: &Transform, packer: &Packer) {
    let row = s.format();
    let (d, p) = (row.row_dim(), format!("p{i}"));
    x.load(b, &format!("x{i}"));
    let cells = helpers(b, s, &p);
    line!(b, "fn encode{i}(wg: u32, tid: u32) {{\n  for (var t = tid; t < {}u; t += WG) {{", 4 * vectors(&row));
    line!(b, "    let level = {p}_tables.levels[t >> 2u][t & 3u];\n    level_square[t] = keep(level * level);\n  }}");
    line!(b, "  for (var t = tid; t < {cells}u; t += WG) {{\n    let code = {p}_tables.cells[t >> 2u][t & 3u];");
    line!(b, "    cells[t] = vec2(bitcast<f32>(code), {p}_tables.bounds[code >> 2u][code & 3u]);\n  }}");
    let load = |row: &str, e: &str| format!("x{i}_load((first + {row}) * {d}u + {e})");
    columns(b, &p, transform, load);
    norms(b, &p, transform, &row);
    codes(b, &p, transform, &row);
    if f16_scales(&row) {
        squares(b, transform, &row, "level", |k| format!("level{k}"));
        // By the last threads, since the first pack codes.
        b.push("    let t = WG - 1u - tid;\n    if (t < n) {\n      let norm = norm_of[t];");
        b.push("      let scale = f16_bits(exact_div(norm, exact_sqrt(folded(t))));");
        line!(b, "      {p}_put_scale(row_of[row0 + t], select(0x7e00u, scale, is_finite(norm)));\n    }}");
    } else {
        b.push("    workgroupBarrier();");
    }
    line!(b, "    for (var u = tid; u < n * {}u; u += WG) {{", d / unit(d));
    packed(b, s, transform, packer.field);
    (packer.store)(b, s, &p, unit(d));
    line!(b, "    }}\n    workgroupBarrier();\n  }}\n}}");
}

/// Declares the functions that store bytes, scales and signs and that find a code; gives the number of cells.
fn helpers(b: &mut Builder, s: &Stored, p: &str) -> usize {
    let row = s.format();
    if s.align == Align::Byte {
        b.push(&include_str!("put_shared.wgsl").replace("p_", &format!("{p}_")));
    }
    if f16_scales(&row) {
        b.push(&include_str!("put_scale.wgsl").replace("p_", &format!("{p}_")));
    }
    flip(b, &format!("{p}_flip"), &format!("{p}_tables"));
    let table = CellTable::new(&row);
    let cells = table.cells.len();
    line!(b, "fn {p}_code(u: f32) -> u32 {{");
    line!(b, "  let t = saturate(fma(u, {}, {}));", float(table.scale), float(table.shift));
    // Adding 2^23 rounds, and leaves the whole number in the low bits.
    line!(b, "  let cell = bitcast<u32>(fma(t, {}, 8388608.0)) & {}u;", float(table.last), cells - 1);
    b.push("  let found = cells[cell];\n  return bitcast<u32>(found.x) + select(0u, 1u, u > found.y);\n}");
    cells
}

/// Opens the loop over rounds, and brings each one's rows into columns.
fn columns(b: &mut Builder, p: &str, transform: &Transform, load: impl Fn(&str, &str) -> String) {
    if !transform.loads_ahead() {
        rounds(b, transform);
        return transform.columns(b, "n", |row, e| format!("{p}_flip8({e}, {})", load(row, e)));
    }
    let rows = transform.rows;
    transform.places(b);
    line!(b, "  var first = wg * a.rounds * {rows}u;");
    line!(b, "  var next = select(0u, min({rows}u, a.rows - first), first < a.rows);");
    transform.load(b, "next", &load);
    // A thread's chunks have the same signs all the time.
    for x in 0..transform.columns / 8 {
        line!(b, "  let signs{x} = {p}_flip8(chunk + {}u, Eight(vec4(0.0), vec4(0.0)));", 8 * x);
    }
    b.push("  for (var round = 0u; round < a.rounds; round++) {");
    places(b, transform);
    transform.exchange(b, |v, x| format!("with_signs({v}, signs{x})"));
    line!(b, "    let n = next;\n    first += {rows}u;");
    line!(b, "    next = select(0u, min({rows}u, a.rows - first), first < a.rows && round + 1u < a.rounds);");
    transform.load_again(b, "next", &load);
}

/// Norms, and what elements are multiplied with before they are looked up: a thread each. Norms that are scales are stored.
fn norms(b: &mut Builder, p: &str, transform: &Transform, row: &RowFormat) {
    let (d, scales) = (row.row_dim(), row.scales_per_row());
    squares(b, transform, row, "y", |k| format!("keep(y{k} * y{k})"));
    let block_rms = row.scaling() == Scaling::BlockRms;
    let mean = if block_rms { format!(" * {}", float(scales as f32 / d as f32)) } else { String::new() };
    let unit_norm = if block_rms { row.scale_factor_d512() } else { (d as f32).sqrt() };
    line!(b, "    for (var t = tid; t < n * {scales}u; t += WG) {{");
    line!(b, "      let norm = exact_sqrt(folded(t){mean});\n      norm_of[t] = norm;");
    line!(b, "      gain_of[t] = keep(exact_div(1.0, norm)) * {};", float(unit_norm));
    if !f16_scales(row) {
        b.push("      let stored = select(0x7fc00000u, bitcast<u32>(norm), is_finite(norm));");
        line!(
            b,
            "      {p}_scales[(a.{p}_scales_off >> 2u) + row_of[row0 + t / {scales}u] * {scales}u + t % {scales}u] = stored;"
        );
    }
    b.push("    }\n    workgroupBarrier();");
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

/// The words w0, w1, … of run `c` of codes of row `row`, which are task u of all.
fn packed(b: &mut Builder, s: &Stored, transform: &Transform, field: usize) {
    let row = s.format();
    let (d, columns, scales) = (row.row_dim(), transform.columns, row.scales_per_row());
    let unit = unit(d);
    let (per_row, words) = (d / unit, (unit * field).div_ceil(32));
    line!(b, "      let i = u / {per_row}u;\n      let c = u % {per_row}u;\n      let row = row_of[row0 + i];");
    // All codes are one value for a zero vector and for one that is not finite.
    line!(b, "      let norm = norm_of[i * {scales}u + {}];", s.scale_of("c", unit));
    for c in 0..columns {
        line!(b, "      let c{c} = buf[u * {}u + {c}u];", columns + 1);
    }
    let (mut packed, mut filled) = (vec![vec![]; words], vec![0; words]);
    let zero = row.codebook().map_or(0, |book| u32::from(book.zero_code()));
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
