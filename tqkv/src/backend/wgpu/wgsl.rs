//! WGSL in pieces: bindings, parameters, float conversion, row decoding, the transform.
//!
//! Kernels are text that is put together for one shape, so that loops have constant bounds and shifts are constants.
//! Codebooks and signs reach them in the parameters, bit for bit as `format` holds them.

use super::Caps;
use crate::compute::DType;
use crate::format::{Codec, Packing, RowFormat, Scaling};
use crate::problem::PagePool;

/// Threads of a workgroup; attention may have more.
pub const THREADS: usize = 128;

/// A kernel's text and, by binding, whether it writes.
pub struct Source {
    pub text: String,
    pub writable: Vec<bool>,
}

/// A kernel that is being put together.
pub struct Builder {
    text: String,
    writable: Vec<bool>,
}

/// `line!(b, "...")` appends a formatted line.
macro_rules! line {
    ($b:expr, $($arg:tt)*) => { $b.push(&format!($($arg)*)) };
}
pub(super) use line;

impl Builder {
    pub fn new(caps: &Caps) -> Self {
        Builder::with_threads(caps, THREADS)
    }

    pub fn with_threads(caps: &Caps, threads: usize) -> Self {
        let mut b = Builder { text: String::new(), writable: vec![] };
        line!(b, "const WG = {threads}u;");
        b.push(include_str!("prelude.wgsl"));
        b.push(if caps.native_f16 { include_str!("f16_native.wgsl") } else { include_str!("f16_soft.wgsl") });
        b
    }

    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    /// Declares the next storage binding.
    pub fn storage(&mut self, name: &str, element: &str, writable: bool) {
        let access = if writable { "read_write" } else { "read" };
        line!(self, "@group(0) @binding({}) var<storage, {access}> {name}: array<{element}>;", self.writable.len());
        self.writable.push(writable);
    }

    /// Declares the parameters as `a`: u32 `fields` (after `groups`, the grid, and `zero`), then tables of vectors of four.
    pub fn params(&mut self, fields: &[&str], tables: &[(&str, &str, usize)]) {
        self.push("struct Params {\n  groups: u32,\n  zero: u32,");
        for name in fields {
            line!(self, "  {name}: u32,");
        }
        for (name, element, vectors) in tables {
            line!(self, "  {name}: array<vec4<{element}>, {vectors}>,");
        }
        self.push("}");
        line!(self, "@group(0) @binding({}) var<uniform> a: Params;", self.writable.len());
    }

    /// Opens the entry point; `wg` is the workgroup's number in a grid that may be folded, `tid` the thread's.
    pub fn main(&mut self) {
        self.push(
            "@compute @workgroup_size(WG)\n\
             fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,\n\
             \x20 @builtin(local_invocation_index) tid: u32) {\n\
             \x20 let wg = wid.y * grid.x + wid.x;\n\
             \x20 if (wg >= a.groups) { return; }",
        );
    }

    pub fn finish(self) -> Source {
        Source { text: self.text, writable: self.writable }
    }
}

/// How a float tensor is read or written, eight elements at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    pub dtype: DType,
    /// Whether it lies on 16 bytes, so that vectors of four words can be moved.
    pub wide: bool,
}

impl Tensor {
    pub fn element(self) -> &'static str {
        if self.wide { "vec4<u32>" } else { "u32" }
    }

    /// `fn {name}_load(i) -> Eight`: elements i to i + 7; i is a multiple of 8, `a.{name}_off` counts words.
    pub fn load(self, b: &mut Builder, name: &str) {
        line!(b, "fn {name}_load(i: u32) -> Eight {{");
        if self.dtype == DType::F32 {
            line!(b, "  let j = a.{name}_off + i;");
            let vector = |k: usize| match self.wide {
                true => format!("{name}[(j >> 2u) + {k}u]"),
                false => words(name, "j", 4 * k, 4),
            };
            line!(b, "  return Eight(bitcast<vec4<f32>>({}), bitcast<vec4<f32>>({}));", vector(0), vector(1));
        } else {
            line!(b, "  let j = a.{name}_off + (i >> 1u);");
            let vector = if self.wide { format!("{name}[j >> 2u]") } else { words(name, "j", 0, 4) };
            let unpack = if self.dtype == DType::F16 { "unpack_f16" } else { "unpack_bf16" };
            line!(b, "  let w = {vector};");
            line!(b, "  return Eight(vec4({unpack}(w.x), {unpack}(w.y)), vec4({unpack}(w.z), {unpack}(w.w)));");
        }
        b.push("}");
    }

    /// Elements of 16 bytes, which a thread stores at a time: neighbouring threads write neighbouring vectors.
    pub fn unit(self) -> usize {
        16 / self.dtype.size()
    }

    /// `fn {name}_store(i, v)`: v is a unit, a vector of four or an `Eight`.
    pub fn store(self, b: &mut Builder, name: &str) {
        let (v, index, value) = match self.dtype {
            DType::F32 => ("vec4<f32>", "i", "bitcast<vec4<u32>>(v)"),
            DType::F16 => ("Eight", "(i >> 1u)", "pack_f16_eight(v)"),
            _ => ("Eight", "(i >> 1u)", "pack_bf16_eight(v)"),
        };
        line!(b, "fn {name}_store(i: u32, v: {v}) {{\n  let j = a.{name}_off + {index};\n  let w = {value};");
        if self.wide {
            line!(b, "  {name}[j >> 2u] = w;");
        } else {
            for (c, component) in "xyzw".chars().enumerate() {
                line!(b, "  {name}[j + {c}u] = w.{component};");
            }
        }
        b.push("}");
    }

    /// The text that stores the Eight `v` at element `i`.
    pub fn store_eight(self, name: &str, i: &str, v: &str) -> String {
        match self.unit() {
            4 => format!("{name}_store({i}, {v}.a); {name}_store({i} + 4u, {v}.b);"),
            _ => format!("{name}_store({i}, {v});"),
        }
    }
}

/// A vector of `n` ≤ 4 consecutive words, zeros after them.
fn words(name: &str, index: &str, from: usize, n: usize) -> String {
    let word = |k| if k < n { format!("{name}[{index} + {}u]", from + k) } else { "0u".to_owned() };
    format!("vec4<u32>({}, {}, {}, {})", word(0), word(1), word(2), word(3))
}

/// What stored rows lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Align {
    /// Any byte.
    Byte,
    /// Words.
    Word,
    /// 16 bytes.
    Vector,
}

/// How a pool's rows are read and written: everything that a kernel is specialised on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Rows {
    codec: Codec,
    head_dim: usize,
    d512: u32,
    pub align: Align,
    /// Lanes of a subgroup among which codes are looked up; 0: in the workgroup's memory.
    lanes: usize,
    /// Shuffles ignore what a lane's number has above its bits.
    wrap: bool,
}

impl Rows {
    /// `offset` and `size` are what the codes' binding starts at and holds.
    pub fn new(pool: &PagePool, offset: usize, size: usize) -> Self {
        let lies_on = |n| [offset, size, pool.row().row_bytes()].iter().all(|x| x.is_multiple_of(n));
        let align = if lies_on(16) {
            Align::Vector
        } else if offset.is_multiple_of(4) && pool.row().row_bytes().is_multiple_of(4) {
            Align::Word
        } else {
            Align::Byte
        };
        Rows::of(pool.row(), align)
    }

    pub fn of(row: &RowFormat, align: Align) -> Self {
        let d512 = row.scale_factor_d512().to_bits();
        Rows { codec: row.codec(), head_dim: row.head_dim(), d512, align, lanes: 0, wrap: false }
    }

    /// The same, read `n` elements at a time: rows of vectors by words, if less than a vector is read.
    pub fn fetched_by(self, n: usize) -> Self {
        let narrow = n * self.field() < 128;
        Rows { align: if narrow { self.align.min(Align::Word) } else { self.align }, ..self }
    }

    /// The same with a codebook that the lanes of a subgroup hold, if it fits: a look-up is a shuffle then, which takes a
    /// lane's number as it is, where an address takes another shift.
    pub fn in_lanes(self, caps: &Caps) -> Self {
        let fits = (1..=caps.subgroup).contains(&(4 * self.book_vectors()));
        Rows { lanes: if fits { caps.subgroup } else { 0 }, wrap: caps.shuffles_wrap, ..self }
    }

    pub fn format(&self) -> RowFormat {
        let row =
            RowFormat::new(self.codec, self.head_dim).and_then(|r| r.with_scale_factor_d512(f32::from_bits(self.d512)));
        row.expect("it came from a RowFormat")
    }

    /// Bits between one element and the next in what a fetch brings.
    fn field(&self) -> usize {
        let row = self.format();
        if row.packing() == Packing::Planes { 4 } else { row.row_bytes() * 8 / self.head_dim }
    }

    /// The most elements, up to `most`, that one fetch of at most four words brings.
    pub fn fetch_size(&self, most: usize) -> usize {
        let most = if self.head_dim.is_multiple_of(32) { most } else { most.min(16) };
        most.min(1 << (128 / self.field()).ilog2())
    }

    pub fn element(&self) -> &'static str {
        if self.align == Align::Vector { "vec4<u32>" } else { "u32" }
    }

    /// Declares the bindings `{p}_codes` and, unless dense, `{p}_scales`.
    pub fn bind(&self, b: &mut Builder, p: &str) {
        b.storage(&format!("{p}_codes"), self.element(), false);
        if self.format().scales_per_row() > 0 {
            b.storage(&format!("{p}_scales"), "u32", false);
        }
    }

    /// Vectors that the codebook takes in the parameters.
    pub fn book_vectors(&self) -> usize {
        self.format().codebook().map_or(0, |b| b.levels.len() / 4)
    }

    /// The workgroup's copy of the codebook, `{p}_book`, and `fn {p}_fill(tid)`, which needs a barrier after it.
    pub fn book(&self, b: &mut Builder, p: &str) {
        let n = 4 * self.book_vectors();
        if n > 0 {
            line!(b, "var<workgroup> {p}_book: array<f32, {n}>;");
            line!(b, "fn {p}_fill(tid: u32) {{");
            line!(b, "  for (var i = tid; i < {n}u; i += WG) {{ {p}_book[i] = a.{p}_levels[i >> 2u][i & 3u]; }}\n}}");
        }
    }

    pub fn fill(&self, p: &str) -> String {
        if self.book_vectors() > 0 { format!("{p}_fill(tid);") } else { String::new() }
    }

    /// The lane's level, for shuffles.
    pub fn level(&self, p: &str) -> String {
        match self.lanes {
            0 => String::new(),
            _ => format!("let {p}_level = {p}_book[lane_id & {}u];", 4 * self.book_vectors() - 1),
        }
    }

    /// `fn {p}_place(row)`, which uses the parameter `{p}_codes_off`: where a row starts, in what its codes are read by.
    /// `fn {p}_fetch(place, c) -> vec4<u32>`: the stored bits of its elements c·n to c·n + n - 1, from bit 0 on.
    pub fn fetch(&self, b: &mut Builder, p: &str, n: usize) {
        if self.format().packing() == Packing::Planes {
            return self.fetch_planes(b, p, n);
        }
        let (bits, row_bytes) = (n * self.field(), self.format().row_bytes());
        let count = bits.div_ceil(32);
        let word = |k: usize| match self.align {
            Align::Vector => format!("{p}_codes[(j + {k}u) >> 2u][(j + {k}u) & 3u]"),
            _ => format!("{p}_codes[j + {k}u]"),
        };
        let load = |n: usize| {
            let word = |k| if k < n { word(k) } else { "0u".to_owned() };
            format!("vec4<u32>({}, {}, {}, {})", word(0), word(1), word(2), word(3))
        };
        // What a place counts.
        let bytes = match self.align {
            Align::Vector if bits == 128 => 16,
            Align::Vector | Align::Word if bits.is_multiple_of(32) => 4,
            _ => 1,
        };
        line!(
            b,
            "fn {p}_place(row: u32) -> u32 {{ return a.{p}_codes_off / {bytes}u + row * {}u; }}",
            row_bytes / bytes
        );
        line!(b, "fn {p}_fetch(place: u32, c: u32) -> vec4<u32> {{");
        if bytes == 16 {
            line!(b, "  return {p}_codes[place + c];");
        } else if bytes == 4 {
            line!(b, "  let j = place + c * {count}u;");
            line!(b, "  return {};", load(count));
        } else {
            line!(b, "  let bit = c * {bits}u;");
            line!(b, "  let at = place + (bit >> 3u);");
            line!(b, "  let s = ((at & 3u) << 3u) + (bit & 7u);\n  let j = at >> 2u;");
            line!(b, "  var w = {};", load(count));
            b.push("  if (s != 0u) {\n    var next = 0u;");
            line!(b, "    if (s + {bits}u > {}u) {{ next = {}; }}", 32 * count, word(count));
            let next = |k: usize| match k + 1 {
                k if k == count => "next",
                1 => "w.y",
                2 => "w.z",
                3 => "w.w",
                _ => "0u",
            };
            line!(
                b,
                "    w = (w >> vec4(s)) | (vec4<u32>({}, {}, {}, {}) << vec4(32u - s));\n  }}\n  return w;",
                next(0),
                next(1),
                next(2),
                next(3)
            );
        }
        b.push("}");
    }

    /// The same for planes, whose nibbles come in the order of their elements; above three bits they are anything.
    fn fetch_planes(&self, b: &mut Builder, p: &str, n: usize) {
        let (row_bytes, plane) = (self.format().row_bytes(), self.head_dim / 8);
        let word = |j: &str| match self.align {
            Align::Vector => format!("{p}_codes[({j}) >> 2u][({j}) & 3u]"),
            _ => format!("{p}_codes[{j}]"),
        };
        let bits = n.max(8);
        line!(b, "fn {p}_plane(at: u32) -> u32 {{\n  let j = at >> 2u;\n  let s = (at & 3u) << 3u;");
        line!(b, "  var w = {} >> s;", word("j"));
        // Loads that depend on a branch cannot go ahead of their use.
        if bits > 8 && (self.align < Align::Word || !plane.is_multiple_of(bits / 8)) {
            line!(b, "  if (s + {bits}u > 32u) {{ w |= {} << (32u - s); }}", word("j + 1u"));
        }
        b.push("  return w;\n}");
        line!(b, "fn {p}_place(row: u32) -> u32 {{ return a.{p}_codes_off + row * {row_bytes}u; }}");
        line!(b, "fn {p}_fetch(place: u32, c: u32) -> vec4<u32> {{");
        line!(b, "  let at = place + ((c * {n}u) >> 3u);");
        line!(
            b,
            "  let x = {p}_plane(at);\n  let y = {p}_plane(at + {plane}u);\n  let z = {p}_plane(at + {}u);",
            2 * plane
        );
        b.push("  let rest = ((x >> 3u) & 0x11111111u) | ((y >> 2u) & 0x22222222u) | ((z >> 1u) & 0x44444444u);");
        b.push("  let by = vec4(0u, 8u, 16u, 24u);\n  let m = vec4(255u);");
        b.push("  let w = ((vec4(x) >> by) & m) | (((vec4(y) >> by) & m) << vec4(8u)) | (((vec4(z) >> by) & m) << vec4(16u)) | ((vec4(rest) >> by) << vec4(24u));");
        let half = if n < 8 { "  return w >> vec4((c & 1u) << 4u);" } else { "  return w;" };
        b.push(half);
        b.push("}");
    }

    /// Elements 4j to 4j + 3 of what a fetch into `w` brought: levels, or floats of a dense codec.
    pub fn value(&self, p: &str, w: &str, j: usize) -> String {
        let row = self.format();
        let component = |k: usize| format!("{w}.{}", ["x", "y", "z", "w"][k]);
        match row.packing() {
            Packing::Float(DType::F32) => format!("bitcast<vec4<f32>>({w})"),
            Packing::Float(_) => {
                format!("vec4<f32>(unpack_f16({}), unpack_f16({}))", component(2 * j), component(2 * j + 1))
            }
            _ => {
                let (field, bits) = (self.field(), row.bits());
                let level = |i: usize| {
                    let (k, shift) = (i * field / 32, i * field % 32);
                    let code = match shift {
                        0 => component(k),
                        _ if shift + bits <= 32 => format!("{} >> {shift}u", component(k)),
                        _ => format!("({} >> {shift}u) | ({} << {}u)", component(k), component(k + 1), 32 - shift),
                    };
                    match self.lanes {
                        0 => format!("{p}_book[({code}) & {}u]", (1 << bits) - 1),
                        // What is above the code's bits only chooses between lanes with the same level.
                        _ if self.wrap => format!("subgroupShuffle({p}_level, {code})"),
                        lanes => format!("subgroupShuffle({p}_level, ({code}) & {}u)", lanes - 1),
                    }
                };
                format!("vec4<f32>({}, {}, {}, {})", level(4 * j), level(4 * j + 1), level(4 * j + 2), level(4 * j + 3))
            }
        }
    }

    /// `fn {p}_level_at(w, j) -> f32`: the level of element j, which only run time knows, of what a fetch brought.
    pub fn level_at(&self, b: &mut Builder, p: &str) {
        let (field, bits) = (self.field(), self.format().bits());
        line!(b, "fn {p}_level_at(w: vec4<u32>, j: u32) -> f32 {{\n  let s = (j * {field}u) & 31u;");
        line!(b, "  var code = w[(j * {field}u) >> 5u] >> s;");
        if !32usize.is_multiple_of(field) {
            line!(b, "  if (s > {}u) {{ code |= w[((j * {field}u) >> 5u) + 1u] << (32u - s); }}", 32 - bits);
        }
        line!(b, "  return {p}_book[code & {}u];\n}}", (1 << bits) - 1);
    }

    /// `fn {p}_scale(row, s) -> u32`, which uses the parameter `{p}_scales_off`: the word that holds scale s of a row; and
    /// `fn {p}_factor(word, row) -> f32`, what [`RowFormat::factor`] makes of it.
    pub fn factor(&self, b: &mut Builder, p: &str) {
        let row = self.format();
        let word = match row.scaling() {
            Scaling::None => "0u".to_owned(),
            Scaling::Corrected => format!("{p}_scales[((a.{p}_scales_off >> 1u) + row) >> 1u]"),
            _ => format!("{p}_scales[(a.{p}_scales_off >> 2u) + row * {}u + s]", row.scales_per_row()),
        };
        line!(b, "fn {p}_scale(row: u32, s: u32) -> u32 {{ return {word}; }}");
        line!(b, "fn {p}_factor(word: u32, row: u32) -> f32 {{");
        match row.scaling() {
            Scaling::None => b.push("  return 1.0;"),
            Scaling::Corrected => {
                line!(b, "  let half = ((a.{p}_scales_off >> 1u) + row) & 1u;");
                b.push("  let pair = unpack_f16(word);\n  return select(pair.x, pair.y, half == 1u);");
            }
            Scaling::Norm => line!(b, "  return bitcast<f32>(word) * {};", float(row.factor(1.0))),
            Scaling::BlockRms => {
                let factor = row.scale_factor_d512();
                let quotient = if factor == 1.0 { "rms".into() } else { format!("exact_div(rms, {})", float(factor)) };
                line!(b, "  let rms = bitcast<f32>(word);\n  return {quotient};");
            }
        }
        b.push("}");
    }

    /// Which of a row's scales chunk `c` of `n` elements has.
    pub fn scale_of(&self, c: &str, n: usize) -> String {
        let per_scale = self.head_dim / self.format().scales_per_row().max(1);
        if per_scale == self.head_dim { "0u".to_owned() } else { format!("({c}) / {}u", per_scale / n) }
    }
}

/// A finite float as WGSL, bit for bit.
pub fn float(x: f32) -> String {
    format!("bitcast<f32>({:#x}u)", x.to_bits())
}

/// The codebook as the parameters' tables hold it.
pub fn levels(row: &RowFormat) -> Vec<u32> {
    row.codebook().map_or(vec![], |book| book.levels.iter().map(|x| x.to_bits()).collect())
}

/// `fn flip4(i, v)` and `fn flip8(i, v)` negate elements i to i + 3 or i + 7 as the signs say.
pub fn flip(b: &mut Builder) {
    b.push(include_str!("flip.wgsl"));
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
        let d = row.head_dim();
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
        let (columns, per, pass, d) = (self.columns, self.per, self.pass, self.row.head_dim());
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

/// The signs as the parameters' table holds them.
pub fn signs(row: &RowFormat) -> Vec<u32> {
    row.signs().to_vec()
}
