//! Scores that may be huge: computed again as two floats, and put in order where f32 steps by whole numbers.

use super::kernel::AttentionKernel;
use super::teams::Teams;
use crate::backend::wgpu::wgsl::builder::{Builder, line};

/// Scores are computed again where |q| |k| scale may be larger: at a quarter of it, as it is rather, f32 errs by some 1e-5.
pub const HUGE: f32 = 1024.0;

/// Scores above this have a running maximum of two floats: f32 steps by whole numbers there.
pub const LARGE: f32 = 8388608.0;

/// Queries are a 1024th of their size in the workgroup's memory, so that neither their rotation nor their products with levels
/// overflow. Those of dense keys, which may be of any size, only where they are larger than [`LARGEST`].
pub const UNIT: f32 = 1024.0;

/// The largest element of a query for dense keys that is taken as it is.
pub const LARGEST: f32 = 1e30;

/// Whether huge scores are computed again. Dense keys have no scale to tell them by.
pub fn checked(kernel: &AttentionKernel) -> bool {
    kernel.key.format().is_rotated()
}

/// `fn exact_score(row, r) -> vec2<f32>`: the score of query row r at a row of the keys, as a sum of two floats.
pub fn exact_score(b: &mut Builder, kernel: &AttentionKernel, fetch: usize) {
    let row = kernel.key.format();
    let (d, scales) = (row.row_dim(), row.scales_per_row());
    kernel.key.elements().value_at(&kernel.key, b, "k");
    b.push("fn exact_score(row: u32, r: u32) -> vec2<f32> {\n  var sum = vec2(0.0);");
    line!(b, "  for (var s = 0u; s < {scales}u; s++) {{");
    line!(b, "    let factor = times(vec2(k_factor(k_scale(row, s), row), 0.0), a.scale * {UNIT:?});");
    let fetches = d / fetch / scales;
    line!(b, "    for (var c = s * {fetches}u; c < (s + 1u) * {fetches}u; c++) {{");
    line!(b, "      let w = k_fetch(k_place(row), c);\n      for (var j = 0u; j < {fetch}u; j++) {{");
    line!(b, "        let q = query[r * {}u + c * {}u + (j >> 2u)][j & 3u];", d / 4, fetch / 4);
    b.push("        sum = plus(sum, times(times(factor, k_value_at(w, j)), q));\n      }\n    }");
    b.push("  }\n  return ordered(sum);\n}");
}

/// The thread's scores again where one of them may be huge.
pub fn score_again(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams) {
    let (rows, positions) = (kernel.rows(), kernel.positions);
    let factor = |s, p| format!("!(abs(k_factor(k_scale(row_{p}, {s}u), row_{p}) * scale) <= limit)");
    let huge = |p| match kernel.key.format().scales_per_row() {
        1 => format!("!(abs(f_{p}) <= limit)"),
        n => (0..n).map(|s| factor(s, p)).collect::<Vec<_>>().join(" || "),
    };
    let any: Vec<_> = (0..positions).map(huge).collect();
    line!(b, "    if ({}) {{\n      for (var u = 0u; u < {}u; u++) {{", any.join(" || "), rows * positions);
    let row = |row, p| format!("select({row}, row_{p}, u / {rows}u == {p}u)");
    line!(b, "        let s = exact_score({}, u % {rows}u);", (1..positions).fold("row_0".to_owned(), row));
    for (p, r) in (0..positions).flat_map(|p| (0..rows).map(move |r| (p, r))) {
        line!(b, "        if (u == {}u) {{ h{r}_{p} = s.x; e{r}_{p} = s.y; }}", p * rows + r);
    }
    line!(b, "        if (abs(s.x) > LARGE) {{ {} }}\n      }}\n    }}", say_large(teams));
}

/// Puts large scores in order: the second float is what the first one's rounding has lost.
pub fn order_large(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams) {
    let each = || (0..kernel.rows()).flat_map(|r| (0..kernel.positions).map(move |p| (r, p)));
    let most = each().fold("0.0".to_owned(), |most, (r, p)| format!("max({most}, abs(h{r}_{p}))"));
    line!(b, "    if ({most} > LARGE) {{\n      {}", say_large(teams));
    for (r, p) in each() {
        line!(b, "      let s{r}_{p} = ordered(vec2(h{r}_{p}, e{r}_{p}));");
        line!(b, "      h{r}_{p} = s{r}_{p}.x;\n      e{r}_{p} = s{r}_{p}.y;");
    }
    b.push("    }");
}

/// Says that a score is large, to the team and for the end.
fn say_large(teams: &Teams) -> &'static str {
    if teams.count() > 1 { "large = true; atomicStore(&large_seen, 1u);" } else { "atomicStore(&large_seen, 1u);" }
}
