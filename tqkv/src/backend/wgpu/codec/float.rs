//! Floats as they are: neither rotated nor scaled.

use super::key::{Align, Elements, Stored};
use super::{bits::Bits, rounds::rounds};
use crate::backend::wgpu::wgsl::builder::{Builder, line};
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::Transform;
use crate::format::{DType, Packing};

pub struct Float;

fn dtype(s: &Stored) -> DType {
    match s.format().packing() {
        Packing::Float(dtype) => dtype,
        _ => unreachable!("`rows` chooses this for floats"),
    }
}

/// A row's bits are fetched as those of codes are.
impl Elements for Float {
    fn fetch_size(&self, s: &Stored, most: usize) -> usize {
        Bits.fetch_size(s, most)
    }

    fn read_by(&self, s: &Stored, n: usize) -> Align {
        Bits.read_by(s, n)
    }

    fn fetch(&self, s: &Stored, b: &mut Builder, p: &str, n: usize) {
        Bits.fetch(s, b, p, n);
    }

    fn value(&self, s: &Stored, _: &str, w: &str, j: usize) -> String {
        let component = |k: usize| format!("{w}.{}", ["x", "y", "z", "w"][k]);
        match dtype(s) {
            DType::F32 => format!("bitcast<vec4<f32>>({w})"),
            _ => format!("vec4<f32>(unpack_f16({}), unpack_f16({}))", component(2 * j), component(2 * j + 1)),
        }
    }

    fn value_at(&self, s: &Stored, b: &mut Builder, p: &str) {
        line!(b, "fn {p}_value_at(w: vec4<u32>, j: u32) -> f32 {{");
        match dtype(s) {
            DType::F32 => b.push("  return bitcast<f32>(w[j]);\n}"),
            _ => b.push("  return unpack_f16(w[j >> 1u])[j & 1u];\n}"),
        }
    }

    fn offset_unit(&self) -> u32 {
        4
    }

    fn encode(&self, s: &Stored, b: &mut Builder, x: Tensor, i: usize, transform: &Transform) {
        let d = s.format().row_dim();
        let codes = Tensor::new(dtype(s), s.align == Align::Vector, d, d);
        x.load(b, &format!("x{i}"));
        codes.store(b, &format!("p{i}_codes"));
        line!(b, "fn encode{i}(wg: u32, tid: u32) {{");
        rounds(b, transform);
        line!(b, "    workgroupBarrier();\n    for (var e = 8u * tid; e < n * {d}u; e += 8u * WG) {{");
        line!(b, "      let v = x{i}_load(first * {d}u + e);");
        line!(b, "      let to = row_of[row0 + e / {d}u] * {d}u + e % {d}u;");
        let store = codes.store_eight(&format!("p{i}_codes"), "to", "v");
        line!(b, "      {store}\n    }}\n    workgroupBarrier();\n  }}\n}}");
    }
}
