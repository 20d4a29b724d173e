//! Codes one after the other: a stream of their bits, or one a byte.

use super::key::{Align, Elements, Stored};
use super::{lookup, scalar};
use crate::backend::wgpu::wgsl::builder::{Builder, line};
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::Transform;

pub struct Bits;

/// Bits from one code to the next.
fn field(s: &Stored) -> usize {
    s.format().row_bytes() * 8 / s.format().row_dim()
}

impl Elements for Bits {
    fn fetch_size(&self, s: &Stored, most: usize) -> usize {
        lookup::fetch_size(s, field(s), most)
    }

    fn read_by(&self, s: &Stored, n: usize) -> Align {
        // Vectors, unless less is read at a time.
        if n * field(s) < 128 { s.align.min(Align::Word) } else { s.align }
    }

    fn fetch(&self, s: &Stored, b: &mut Builder, p: &str, n: usize) {
        let (bits, row_bytes) = (n * field(s), s.format().row_bytes());
        let count = bits.div_ceil(32);
        let word = |k: usize| match s.align {
            Align::Vector => format!("{p}_codes[(j + {k}u) >> 2u][(j + {k}u) & 3u]"),
            _ => format!("{p}_codes[j + {k}u]"),
        };
        let load = |n: usize| {
            let word = |k| if k < n { word(k) } else { "0u".to_owned() };
            format!("vec4<u32>({}, {}, {}, {})", word(0), word(1), word(2), word(3))
        };
        // What a place counts.
        let bytes = match s.align {
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

    fn value(&self, s: &Stored, p: &str, w: &str, j: usize) -> String {
        lookup::four(s, field(s), p, w, j)
    }

    fn value_at(&self, s: &Stored, b: &mut Builder, p: &str) {
        lookup::at(s, field(s), b, p);
    }

    fn encode(&self, s: &Stored, b: &mut Builder, x: Tensor, i: usize, transform: &Transform) {
        scalar::encode(b, s, x, i, transform, &scalar::Packer { field: field(s), store: &store });
    }
}

/// Stores the words w0, w1, … of a run of codes.
fn store(b: &mut Builder, s: &Stored, p: &str, unit: usize) {
    let (row_bytes, bits) = (s.format().row_bytes(), unit * field(s));
    let words = bits.div_ceil(32);
    if s.align == Align::Byte {
        line!(b, "      let byte = a.{p}_codes_off + row * {row_bytes}u + c * {}u;", bits / 8);
        for k in 0..words {
            line!(b, "      {p}_put(byte + {}u, w{k}, {}u);", 4 * k, (bits - 32 * k).min(32));
        }
        return;
    }
    line!(b, "      let word = (a.{p}_codes_off >> 2u) + row * {}u + c * {words}u;", row_bytes / 4);
    if s.align == Align::Vector && words.is_multiple_of(4) {
        for k in (0..words).step_by(4) {
            let vector = format!("vec4(w{}, w{}, w{}, w{})", k, k + 1, k + 2, k + 3);
            line!(b, "      {p}_codes[(word >> 2u) + {}u] = {vector};", k / 4);
        }
        return;
    }
    for k in 0..words {
        let place = match s.align {
            Align::Vector => format!("(word + {k}u) >> 2u][(word + {k}u) & 3u"),
            _ => format!("word + {k}u"),
        };
        line!(b, "      {p}_codes[{place}] = w{k};");
    }
}
