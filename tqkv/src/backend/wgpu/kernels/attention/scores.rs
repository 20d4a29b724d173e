//! Scores of a tile.

use super::exact::{checked, order_large, score_again};
use super::kernel::AttentionKernel;
use super::teams::Teams;
use crate::backend::wgpu::wgsl::builder::{Builder, line};

/// `h{r}_{p}` + `e{r}_{p}`: the score of row r at the thread's position p. Each step loads the codes of the next one, the last
/// those that the next tile begins with.
pub fn scores(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, fetch: usize) {
    let row = kernel.key.format();
    let (groups, rows, positions) = (row.row_dim() / group(kernel), kernel.rows(), kernel.positions);
    for p in 0..positions {
        scale_words(b, kernel, p, "    ");
        if row.scales_per_row() <= 1 && row.is_rotated() {
            line!(b, "    let f_{p} = k_factor(kf_{p}, row_{p}) * scale;");
        }
        for r in 0..rows {
            line!(b, "    var h{r}_{p}: f32;\n    var e{r}_{p} = 0.0;");
        }
    }
    b.push("    {");
    score_group(b, kernel, fetch, "0u", true);
    b.push("    }");
    if groups > 1 {
        line!(b, "    for (var g = 1u; g < {groups}u; g++) {{");
        score_group(b, kernel, fetch, "g", false);
        b.push("    }");
    }
    if checked(kernel) {
        score_again(b, kernel, teams);
    } else {
        order_large(b, kernel, teams);
    }
    for (j, p) in (0..kernel.queries).flat_map(|j| (0..positions).map(move |p| (j, p))) {
        line!(b, "    let ok{j}_{p} = pos_{p} < to_pos && pos_{p} >= low{j} && pos_{p} < high{j};");
    }
    for (r, p) in (0..rows).flat_map(|r| (0..positions).map(move |p| (r, p))) {
        let j = r / kernel.heads;
        if kernel.softcap {
            let bias = if kernel.bias { format!(" + bias{r}") } else { String::new() };
            line!(b, "    h{r}_{p} = capped(h{r}_{p} + e{r}_{p}{bias});\n    e{r}_{p} = 0.0;");
        }
        line!(
            b,
            "    h{r}_{p} = select(UNSEEN, h{r}_{p}, ok{j}_{p});\n    e{r}_{p} = select(0.0, e{r}_{p}, ok{j}_{p});"
        );
    }
}

/// Adds group number `g` of elements to the scores.
fn score_group(b: &mut Builder, kernel: &AttentionKernel, fetch: usize, g: &str, first: bool) {
    let row = kernel.key.format();
    let (d, rows, positions) = (row.row_dim(), kernel.rows(), kernel.positions);
    let (group, together) = (group(kernel), together(kernel, fetch));
    let each = || (0..rows).flat_map(|r| (0..positions).map(move |p| (r, p)));
    for p in (0..positions).filter(|_| row.scales_per_row() > 1) {
        let word = format!("k_scale(row_{p}, {})", kernel.key.scale_of(g, group));
        line!(b, "      let f_{p} = k_factor({word}, row_{p}) * scale;");
    }
    for (r, p) in each() {
        line!(b, "      var t{r}_{p} = 0.0;");
    }
    let runs = group / fetch / together;
    line!(b, "      for (var run = {g} * {runs}u; run < ({g} + 1u) * {runs}u; run++) {{");
    line!(b, "        let last = run == {}u;", d / fetch / together - 1);
    line!(b, "        let begin = select((run + 1u) * {together}u, 0u, last);");
    for p in 0..positions {
        line!(b, "        let place_{p} = k_place(select(row_{p}, next_{p}, last));");
        for i in 0..together {
            line!(b, "        let n{i}_{p} = k_fetch(place_{p}, begin + {i}u);");
        }
    }
    line!(b, "        let at = run * {}u;", together * fetch / 4);
    for (i, j) in (0..together).flat_map(|i| (0..fetch / 4).map(move |j| (i, j))) {
        b.push("        {");
        for p in 0..positions {
            line!(
                b,
                "          let x{p} = {};",
                kernel.key.elements().value(&kernel.key, "k", &format!("w{i}_{p}"), j)
            );
        }
        for r in 0..rows {
            line!(b, "          let q{r} = query[at + {}u];", r * d / 4 + i * fetch / 4 + j);
            for p in 0..positions {
                let product = |sum: String, c: &str| format!("fma(x{p}.{c}, q{r}.{c}, {sum})");
                let sum = ["x", "y", "z", "w"].iter().fold(format!("t{r}_{p}"), |sum, c| product(sum, c));
                line!(b, "          t{r}_{p} = {sum};");
            }
        }
        b.push("        }");
    }
    for (p, i) in (0..positions).flat_map(|p| (0..together).map(move |i| (p, i))) {
        line!(b, "        w{i}_{p} = n{i}_{p};");
    }
    b.push("      }");
    for (r, p) in each() {
        let factor = if row.is_rotated() { format!(" * f_{p}") } else { " * scale".to_owned() };
        if first {
            line!(b, "      h{r}_{p} = t{r}_{p}{factor};");
            continue;
        }
        let (h, e) = (format!("h{r}_{p}"), format!("e{r}_{p}"));
        line!(b, "      {{\n        let s = t{r}_{p}{factor};\n        let y = keep({h} + s);");
        line!(
            b,
            "        let z = keep(y - {h});\n        {e} += ({h} - (y - z)) + (s - z);\n        {h} = y;\n      }}"
        );
    }
}

/// Fetches of keys that are loaded together: of dense rows 32 bytes, memory's sectors; of codes, which take more registers, one.
pub fn together(kernel: &AttentionKernel, fetch: usize) -> usize {
    if kernel.key.format().is_rotated() { 1 } else { (group(kernel) / fetch).min(2) }
}

/// Elements between two exact additions.
fn group(kernel: &AttentionKernel) -> usize {
    let d = kernel.key.format().row_dim();
    [128, 64, 32].into_iter().find(|n| d.is_multiple_of(*n)).unwrap_or(16)
}

/// Words of the scales of the position's next row, where it has one.
pub fn scale_words(b: &mut Builder, kernel: &AttentionKernel, p: usize, before: &str) {
    for (side, rows) in [("k", &kernel.key), ("v", &kernel.value)] {
        match rows.format().scales_per_row() {
            1 => line!(b, "{before}{side}w_{p} = {side}_scale(next_{p}, 0u);"),
            _ => line!(b, "{before}{side}w_{p} = 0u;"),
        }
    }
}
