//! Codes of three bits in planes.

use super::key::{Align, Elements, Stored};
use super::{lookup, scalar};
use crate::backend::wgpu::wgsl::builder::{Builder, line};
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::Transform;

pub struct Planes;

/// Bits from one code to the next in what a fetch brings: nibbles, in the order of their elements. Above three bits they are
/// anything.
const FIELD: usize = 4;

impl Elements for Planes {
    fn fetch_size(&self, s: &Stored, most: usize) -> usize {
        lookup::fetch_size(s, FIELD, most)
    }

    fn read_by(&self, s: &Stored, n: usize) -> Align {
        if n * FIELD < 128 { s.align.min(Align::Word) } else { s.align }
    }

    fn fetch(&self, s: &Stored, b: &mut Builder, p: &str, n: usize) {
        let (row_bytes, plane) = (s.format().row_bytes(), s.format().row_dim() / 8);
        let word = |j: &str| match s.align {
            Align::Vector => format!("{p}_codes[({j}) >> 2u][({j}) & 3u]"),
            _ => format!("{p}_codes[{j}]"),
        };
        let bits = n.max(8);
        line!(b, "fn {p}_plane(at: u32) -> u32 {{\n  let j = at >> 2u;\n  let s = (at & 3u) << 3u;");
        line!(b, "  var w = {} >> s;", word("j"));
        // Loads that depend on a branch cannot go ahead of their use.
        if bits > 8 && (s.align < Align::Word || !plane.is_multiple_of(bits / 8)) {
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

    fn value(&self, s: &Stored, p: &str, w: &str, j: usize) -> String {
        lookup::four(s, FIELD, p, w, j)
    }

    fn value_at(&self, s: &Stored, b: &mut Builder, p: &str) {
        lookup::at(s, FIELD, b, p);
    }

    fn encode(&self, s: &Stored, b: &mut Builder, x: Tensor, i: usize, transform: &Transform) {
        scalar::encode(b, s, x, i, transform, &scalar::Packer { field: FIELD, store: &store });
    }
}

/// Stores nibbles in the words w0, w1, …, eight elements each, as three planes.
fn store(b: &mut Builder, s: &Stored, p: &str, unit: usize) {
    let (d, words) = (s.format().row_dim(), unit * FIELD / 32);
    for plane in 0..3 {
        let byte = |k: usize| {
            format!("(((w{k} >> {}u) & 0x77u) | (((w{k} >> {}u) & 0x11u) << 3u)) << {}u", 8 * plane, 24 + plane, 8 * k)
        };
        let bytes: Vec<String> = (0..words).map(byte).collect();
        line!(b, "      let plane{plane} = {};", bytes.join(" | "));
        line!(b, "      let byte{plane} = a.{p}_codes_off + row * {}u + {}u + c * {words}u;", 3 * d / 8, plane * d / 8);
        match s.align {
            Align::Byte => line!(b, "      {p}_put(byte{plane}, plane{plane}, {}u);", 8 * words),
            Align::Word => line!(b, "      {p}_codes[byte{plane} >> 2u] = plane{plane};"),
            Align::Vector => line!(b, "      {p}_codes[byte{plane} >> 4u][(byte{plane} >> 2u) & 3u] = plane{plane};"),
        }
    }
}
