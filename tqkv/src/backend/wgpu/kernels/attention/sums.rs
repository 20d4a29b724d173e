//! The end of a split: the threads' sums into one, and out.

use super::kernel::AttentionKernel;
use super::rows::{exists, row_out};
use super::softmax::shrink;
use super::teams::Teams;
use crate::backend::wgpu::wgsl::builder::{Builder, line};

/// The threads' sums into one, and out: vectors of all threads at a time, as many as there is room for.
pub fn sums(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, at_once: usize) {
    let (rows, vectors) = (kernel.rows(), kernel.key.format().row_dim() / 4);
    let Teams { chunk, chunks, .. } = *teams;
    let (lanes, per) = (teams.threads / chunks, chunk / 4);
    line!(b, "  let lane = team * {}u + lane_v;", teams.lanes);
    if teams.count() > 1 {
        common_maximum(b, rows, chunk, teams.count());
    }
    for r in 0..rows {
        line!(b, "  offer({r}u, l{r}, tid, true);");
    }
    b.push("  settle(tid, true);");
    for r in 0..rows {
        line!(b, "  l{r} = taken({r}u, true);\n  if (tid == {r}u && {}) {{", exists(kernel, &format!("{r}u")));
        line!(
            b,
            "    partial[a.rows * a.splits * {vectors}u + {} * a.splits + split] = vec4(m{r}, l{r}, {}, 0.0);\n  }}",
            row_out(kernel, &format!("{r}u")),
            if teams.count() > 1 { format!("d{r}") } else { format!("low[{r}]") }
        );
    }
    for first in (0..rows * per).step_by(at_once) {
        let here = first..(rows * per).min(first + at_once);
        line!(b, "  if (lane < {lanes}u) {{");
        for (n, u) in here.clone().enumerate() {
            line!(b, "    held[{}u + lane * {chunks}u + c] = o{}_{};", n * teams.threads, u / per, u % per);
        }
        line!(b, "  }}\n  workgroupBarrier();\n  for (var t = tid; t < {}u; t += WG) {{", here.len() * chunks);
        line!(b, "    let u = {first}u + t / {chunks}u;\n    let r = u / {per}u;");
        line!(b, "    let at = t / {chunks}u * WG + t % {chunks}u;\n    var sum = held[at];");
        line!(b, "    for (var k = 1u; k < {lanes}u; k++) {{ sum += held[at + k * {chunks}u]; }}");
        line!(b, "    if ({}) {{", exists(kernel, "r"));
        line!(
            b,
            "      partial[({} * a.splits + split) * {vectors}u + t % {chunks}u * {per}u + u % {per}u] = sum;",
            row_out(kernel, "r")
        );
        b.push("    }\n  }\n  workgroupBarrier();");
    }
}

/// Gives all teams' sums the largest of their maxima; `d{r}` is its second float.
fn common_maximum(b: &mut Builder, rows: usize, chunk: usize, teams: usize) {
    for r in 0..rows {
        line!(b, "  offer({r}u, m{r}, tid, false);");
    }
    b.push("  settle(tid, false);");
    for r in 0..rows {
        line!(b, "  let n{r} = taken({r}u, false);\n  var d{r} = 0.0;\n  var below{r} = 0.0;");
    }
    b.push("  if (atomicLoad(&large_seen) != 0u) {");
    for r in 0..rows {
        line!(b, "    d{r} = UNSEEN;\n    for (var k = 0u; k < {teams}u; k++) {{");
        line!(
            b,
            "      d{r} = max(d{r}, select(UNSEEN, low[k * {rows}u + {r}u], reduced[{r}u * {teams}u + k] == n{r}));"
        );
        line!(b, "    }}\n    below{r} = low[team * {rows}u + {r}u] - d{r};");
    }
    b.push("  }");
    for r in 0..rows {
        shrink(b, r, chunk);
    }
    b.push("  workgroupBarrier();");
}
