//! Levels of codes that lie in fields of what a fetch brought.

use super::key::Stored;
use crate::backend::wgpu::wgsl::builder::{Builder, line};

/// The text of the levels of elements 4j to 4j + 3: each field begins with a code.
pub fn four(s: &Stored, field: usize, p: &str, w: &str, j: usize) -> String {
    let bits = s.format().bits();
    let component = |k: usize| format!("{w}.{}", ["x", "y", "z", "w"][k]);
    let level = |i: usize| {
        let (k, shift) = (i * field / 32, i * field % 32);
        let code = match shift {
            0 => component(k),
            _ if shift + bits <= 32 => format!("{} >> {shift}u", component(k)),
            _ => format!("({} >> {shift}u) | ({} << {}u)", component(k), component(k + 1), 32 - shift),
        };
        match s.lanes {
            0 => format!("{p}_book[({code}) & {}u]", (1 << bits) - 1),
            // What is above the code's bits only chooses between lanes with the same level.
            _ if s.wrap => format!("subgroupShuffle({p}_level, {code})"),
            lanes => format!("subgroupShuffle({p}_level, ({code}) & {}u)", lanes - 1),
        }
    };
    format!("vec4<f32>({}, {}, {}, {})", level(4 * j), level(4 * j + 1), level(4 * j + 2), level(4 * j + 3))
}

/// `fn {p}_value_at(w, j) -> f32`.
pub fn at(s: &Stored, field: usize, b: &mut Builder, p: &str) {
    let bits = s.format().bits();
    line!(b, "fn {p}_value_at(w: vec4<u32>, j: u32) -> f32 {{\n  let s = (j * {field}u) & 31u;");
    line!(b, "  var code = w[(j * {field}u) >> 5u] >> s;");
    if !32usize.is_multiple_of(field) {
        line!(b, "  if (s > {}u) {{ code |= w[((j * {field}u) >> 5u) + 1u] << (32u - s); }}", 32 - bits);
    }
    line!(b, "  return {p}_book[code & {}u];\n}}", (1 << bits) - 1);
}

/// The most elements of so many bits each, up to `most`, that four words hold and rows consist of.
pub fn fetch_size(s: &Stored, field: usize, most: usize) -> usize {
    let most = if s.format().row_dim().is_multiple_of(32) { most } else { most.min(16) };
    most.min(1 << (128 / field).ilog2())
}
