//! Scales of rows.

use crate::backend::wgpu::wgsl::builder::{Builder, float, line};
use crate::format::{RowFormat, Scaling};

pub(super) fn factor(b: &mut Builder, row: &RowFormat, p: &str) {
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

pub(super) fn of_chunk(row: &RowFormat, c: &str, n: usize) -> String {
    let per_scale = row.row_dim() / row.scales_per_row().max(1);
    if per_scale == row.row_dim() { "0u".to_owned() } else { format!("({c}) / {}u", per_scale / n) }
}
