//! The orthogonal transform, and the signs before it.

use super::builder::{Builder, THREADS, float, line};
use crate::backend::wgpu::caps::Caps;
use crate::format::RowFormat;

/// `fn {flip}4(i, v)` and `fn {flip}8(i, v)` negate elements i to i + 3 or i + 7 as the signs in the uniform `tables` say.
pub fn flip(b: &mut Builder, name: &str, tables: &str) {
    b.push(&include_str!("flip.wgsl").replace("flip", name).replace("tables", tables));
}

/// The orthogonal transform by a workgroup, to the last bit as the CPU does it, with one exchange between threads.
///
/// A row is `per` chunks of `columns` elements. A thread takes a chunk, does the butterflies within it and spreads it over
/// the workgroup's `buf`; after a barrier a thread takes a column, the elements of one number in every chunk, in which
/// all other butterflies lie, and the reflection too. `buf` holds few rows at a time, since what a workgroup holds decides
/// how many of them a GPU runs at once; columns wait in registers.
pub struct Transform {
    row: RowFormat,
    /// 8 or 16, so that a column is no more than 64 elements; blocks of the transform are multiples of 16.
    pub columns: usize,
    /// Elements of a column.
    pub per: usize,
    /// Rows of a workgroup: a column a thread.
    pub rows: usize,
    /// Rows that `buf` holds.
    pass: usize,
}

impl Transform {
    pub fn new(row: &RowFormat, caps: &Caps) -> Self {
        let d = row.row_dim();
        let columns = if d <= 128 { 8 } else { 16 };
        let rows = THREADS / columns;
        Transform { row: *row, columns, per: d / columns, rows, pass: (caps.held / d).clamp(1, rows) }
    }

    pub fn with_rows(self, rows: usize) -> Self {
        Transform { rows, pass: self.pass.min(rows), ..self }
    }

    /// Declares `buf` (of `least` words or more) and what reaches it; elements are counted over the rows that it holds.
    pub fn declare(&self, b: &mut Builder, least: usize) {
        // A hole after every chunk, so that neither chunks nor columns meet in one bank.
        let words = self.pass * self.per * (self.columns + 1);
        line!(b, "var<workgroup> buf: array<u32, {}>;", words.max(least));
        line!(b, "fn at(e: u32) -> u32 {{ return e + (e >> {}u); }}", self.columns.ilog2());
        b.push(include_str!("spread.wgsl"));
        b.push(match self.columns {
            8 => "fn spread(e: u32, v0: Eight) { put8(at(e), chunk8(v0)); }",
            _ => {
                "fn spread(e: u32, v0: Eight, v1: Eight) {\n\
                 \x20 let x = chunk8(v0);\n  let y = chunk8(v1);\n\
                 \x20 put8(at(e), Eight(x.a + y.a, x.b + y.b));\n\
                 \x20 put8(at(e) + 8u, Eight(x.a - y.a, x.b - y.b));\n}"
            }
        });
    }

    /// Transforms the first `n` rows: column `c` of row `i` ends in the thread's variables `y0`, `y1`, …
    /// `eight(row, e)` is the text of the Eight at element `e` of a row. Without a barrier after it, a thread may write its
    /// column of `buf` only.
    pub fn columns(&self, b: &mut Builder, n: &str, eight: impl Fn(&str, &str) -> String) {
        let (columns, per, pass) = (self.columns, self.per, self.pass);
        self.places(b);
        match self.rows.div_ceil(pass) {
            1 => {
                self.declare_columns(b);
                line!(b, "  for (var u = tid; u < {n} * {per}u; u += WG) {{");
                let value = |e| eight(&format!("(u / {per}u)"), &format!("(u % {per}u * {columns}u + {e}u)"));
                let values: Vec<_> = (0..columns).step_by(8).map(value).collect();
                line!(b, "    spread(u * {columns}u, {});\n  }}\n  workgroupBarrier();", values.join(", "));
                self.take(b, "0u");
                self.mix(b);
            }
            2 => {
                self.load(b, n, eight);
                self.exchange(b, |v, _| v);
            }
            passes => {
                self.declare_columns(b);
                line!(b, "  for (var turn = 0u; turn < {passes}u; turn++) {{");
                self.declare_chunk(b, 0);
                self.load_chunk(b, 0, &format!("turn * {pass}u"), n, &eight);
                self.exchange_chunk(b, 0, "turn", &|v, _| v);
                b.push("  }");
                self.mix(b);
            }
        }
    }

    /// Whether all rows are exchanged in two passes, so that a thread holds two chunks and can load them ahead.
    pub fn loads_ahead(&self) -> bool {
        self.rows.div_ceil(self.pass) == 2
    }

    /// The row and column that a thread takes, and the row and chunk that it spreads.
    pub fn places(&self, b: &mut Builder) {
        let (columns, per) = (self.columns, self.per);
        line!(b, "  let i = tid / {columns}u;\n  let c = tid % {columns}u;");
        line!(b, "  let chunk_row = tid / {per}u;\n  let chunk = (tid % {per}u) * {columns}u;");
    }

    /// Declares the thread's two chunks, and loads them.
    pub fn load(&self, b: &mut Builder, n: &str, eight: impl Fn(&str, &str) -> String) {
        (0..2).for_each(|j| self.declare_chunk(b, j));
        self.load_again(b, n, eight);
    }

    /// Loads the thread's two chunks.
    pub fn load_again(&self, b: &mut Builder, n: &str, eight: impl Fn(&str, &str) -> String) {
        (0..2).for_each(|j| self.load_chunk(b, j, &format!("{}u", j * self.pass), n, &eight));
    }

    /// The two chunks, as `change(v, x)` makes them of the Eight v, which is number x of its chunk, into columns.
    pub fn exchange(&self, b: &mut Builder, change: impl Fn(String, usize) -> String) {
        self.declare_columns(b);
        (0..2).for_each(|j| self.exchange_chunk(b, j, &format!("{j}u"), &change));
        self.mix(b);
    }

    fn declare_columns(&self, b: &mut Builder) {
        (0..self.per).for_each(|k| line!(b, "  var y{k} = 0.0;"));
    }

    fn declare_chunk(&self, b: &mut Builder, j: usize) {
        (0..self.columns / 8).for_each(|x| line!(b, "  var v{j}_{x} = Eight(vec4(0.0), vec4(0.0));"));
    }

    fn load_chunk(&self, b: &mut Builder, j: usize, first: &str, n: &str, eight: &impl Fn(&str, &str) -> String) {
        line!(b, "  if (chunk_row < {}u && {first} + chunk_row < {n}) {{", self.pass);
        for x in 0..self.columns / 8 {
            line!(b, "    v{j}_{x} = {};", eight(&format!("({first} + chunk_row)"), &format!("(chunk + {}u)", 8 * x)));
        }
        b.push("  }");
    }

    fn exchange_chunk(&self, b: &mut Builder, j: usize, number: &str, change: &impl Fn(String, usize) -> String) {
        let eight = |x: usize| change(format!("v{j}_{x}"), x);
        let values: Vec<_> = (0..self.columns / 8).map(eight).collect();
        line!(b, "  if (chunk_row < {}u) {{ spread(tid * {}u, {}); }}", self.pass, self.columns, values.join(", "));
        b.push("  workgroupBarrier();");
        self.take(b, number);
        b.push("  workgroupBarrier();");
    }

    fn take(&self, b: &mut Builder, number: &str) {
        let (per, pass, stride) = (self.per, self.pass, self.columns + 1);
        line!(b, "  if (i / {pass}u == {number}) {{\n    let column = (i % {pass}u) * {}u + c;", per * stride);
        for k in 0..per {
            line!(b, "    y{k} = bitcast<f32>(buf[column + {}u]);", k * stride);
        }
        b.push("  }");
    }

    /// All butterflies between the elements of a column, and the reflection.
    fn mix(&self, b: &mut Builder) {
        let per = self.per;
        let block = self.row.block() / self.columns;
        let mut h = 1;
        while h < block {
            for k in (0..per).filter(|k| k & h == 0) {
                let j = k + h;
                line!(b, "  {{ let t = y{k}; y{k} = t + y{j}; y{j} = t - y{j}; }}");
            }
            h *= 2;
        }
        let norm = float(1.0 / (self.row.block() as f32).sqrt());
        let blocks = per / block;
        for k in 0..per {
            let product = format!("y{k} * {norm}");
            line!(b, "  y{k} = {};", if blocks > 1 { format!("keep({product})") } else { product });
        }
        for j in (0..block).filter(|_| blocks > 1) {
            line!(b, "  var sum{j} = y{j};");
            for k in 1..blocks {
                line!(b, "  sum{j} = sum{j} + y{};", k * block + j);
            }
            line!(b, "  sum{j} = keep(sum{j} * {});", float(2.0 / blocks as f32));
            for k in 0..blocks {
                line!(b, "  y{0} = y{0} - sum{j};", k * block + j);
            }
        }
    }

    /// Brings the columns back: `store` is the text that takes element `e` of all rows and the unit `v` that starts there.
    pub fn rows(&self, b: &mut Builder, n: &str, unit: usize, store: &str) {
        let (columns, per, pass, d) = (self.columns, self.per, self.pass, self.row.row_dim());
        line!(b, "  for (var first = 0u; first < {n}; first += {pass}u) {{");
        line!(
            b,
            "    if (i / {pass}u == first / {pass}u) {{\n      let column = (i % {pass}u) * {}u + c;",
            per * (columns + 1)
        );
        for k in 0..per {
            line!(b, "      buf[column + {}u] = bitcast<u32>(y{k});", k * (columns + 1));
        }
        b.push("    }\n    workgroupBarrier();");
        line!(b, "    let end = min({pass}u, {n} - first) * {d}u;");
        line!(b, "    for (var held = {unit}u * tid; held < end; held += {unit}u * WG) {{");
        line!(b, "      let e = first * {d}u + held;\n      let v = gather{unit}(held);\n      {store}\n    }}");
        b.push("    workgroupBarrier();\n  }");
    }
}
