//! Float tensors, read and written some elements at a time.

use super::builder::{Builder, line, words};
use crate::format::DType;

/// A tensor of vectors as a kernel reads or writes it. Kernels count `row_dim` elements a vector; where the tensor has fewer, it
/// reads zeros after them, and writes nothing there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tensor {
    dtype: DType,
    /// Whether it lies on 16 bytes, so that vectors of four words can be moved.
    wide: bool,
    /// Elements of a vector in memory and in kernels, where they differ.
    ragged: Option<(usize, usize)>,
}

impl Tensor {
    pub fn new(dtype: DType, wide: bool, dim: usize, row_dim: usize) -> Self {
        let ragged = (dim != row_dim).then_some((dim, row_dim));
        Tensor { dtype, wide: wide && ragged.is_none(), ragged }
    }

    /// Declares the next binding for it.
    pub fn bind(self, b: &mut Builder, name: &str, writable: bool) {
        let element = match () {
            () if writable && self.shares_words() => "atomic<u32>",
            () if self.wide => "vec4<u32>",
            () => "u32",
        };
        b.storage(name, element, writable);
    }

    /// Whether two vectors meet in a word, so that other workgroups may be writing what is around an element.
    fn shares_words(self) -> bool {
        self.dtype != DType::F32 && self.ragged.is_some_and(|(dim, _)| !dim.is_multiple_of(2))
    }

    /// `fn {name}_load(i) -> Eight`: elements i to i + 7; i is a multiple of 8, `a.{name}_off` counts words.
    pub fn load(self, b: &mut Builder, name: &str) {
        if let Some((dim, row_dim)) = self.ragged {
            return self.load_ragged(b, name, dim, row_dim);
        }
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
            let unpack = self.unpack();
            line!(b, "  let w = {vector};");
            line!(b, "  return Eight(vec4({unpack}(w.x), {unpack}(w.y)), vec4({unpack}(w.z), {unpack}(w.w)));");
        }
        b.push("}");
    }

    fn unpack(self) -> &'static str {
        if self.dtype == DType::F16 { "unpack_f16" } else { "unpack_bf16" }
    }

    fn load_ragged(self, b: &mut Builder, name: &str, dim: usize, row_dim: usize) {
        line!(b, "fn {name}_one(i: u32, e: u32) -> f32 {{\n  if (e >= {dim}u) {{ return 0.0; }}");
        match self.dtype {
            DType::F32 => line!(b, "  return bitcast<f32>({name}[a.{name}_off + i]);\n}}"),
            _ => line!(b, "  return {}({name}[a.{name}_off + (i >> 1u)] >> ((i & 1u) << 4u)).x;\n}}", self.unpack()),
        }
        line!(b, "fn {name}_four(i: u32, e: u32) -> vec4<f32> {{");
        let one = |k: usize| format!("{name}_one(i + {k}u, e + {k}u)");
        line!(b, "  return vec4({}, {}, {}, {});\n}}", one(0), one(1), one(2), one(3));
        line!(
            b,
            "fn {name}_load(i: u32) -> Eight {{\n  let e = i % {row_dim}u;\n  let j = i / {row_dim}u * {dim}u + e;"
        );
        line!(b, "  return Eight({name}_four(j, e), {name}_four(j + 4u, e + 4u));\n}}");
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
        line!(b, "fn {name}_store(i: u32, v: {v}) {{\n  let w = {value};");
        if let Some((dim, row_dim)) = self.ragged {
            self.store_ragged(b, name, dim, row_dim);
        } else if self.wide {
            line!(b, "  {name}[(a.{name}_off + {index}) >> 2u] = w;");
        } else {
            line!(b, "  let j = a.{name}_off + {index};");
            for (c, component) in "xyzw".chars().enumerate() {
                line!(b, "  {name}[j + {c}u] = w.{component};");
            }
        }
        b.push("}");
    }

    /// The words `w` of a unit at element `i`, as far as the vector goes.
    fn store_ragged(self, b: &mut Builder, name: &str, dim: usize, row_dim: usize) {
        let per_word = 4 / self.dtype.size();
        line!(b, "  let e = i % {row_dim}u;\n  let first = i / {row_dim}u * {dim}u + e;");
        for k in 0..self.unit() {
            let word = format!("w.{}", ["x", "y", "z", "w"][k / per_word]);
            if self.shares_words() {
                line!(b, "  if (e + {k}u < {dim}u) {{\n    let at = a.{name}_off + ((first + {k}u) >> 1u);");
                line!(b, "    let shift = ((first + {k}u) & 1u) << 4u;");
                line!(b, "    atomicAnd(&{name}[at], ~(0xffffu << shift));");
                line!(b, "    atomicOr(&{name}[at], (({word} >> {}u) & 0xffffu) << shift);\n  }}", 16 * (k % 2));
            } else if k % per_word == 0 {
                let at = format!("a.{name}_off + (first + {k}u) / {per_word}u");
                line!(b, "  if (e + {k}u < {dim}u) {{ {name}[{at}] = {word}; }}");
            }
        }
    }

    /// The text that stores the Eight `v` at element `i`.
    pub fn store_eight(self, name: &str, i: &str, v: &str) -> String {
        match self.unit() {
            4 => format!("{name}_store({i}, {v}.a); {name}_store({i} + 4u, {v}.b);"),
            _ => format!("{name}_store({i}, {v});"),
        }
    }
}
