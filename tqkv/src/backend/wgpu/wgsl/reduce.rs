//! Maxima and sums over a workgroup.

use super::builder::{Builder, line};
use crate::backend::wgpu::caps::Caps;

/// As [`Builder::main`], with the subgroup's numbers where they are used.
pub fn main(b: &mut Builder, caps: &Caps) {
    if caps.subgroup == 0 {
        return b.main();
    }
    b.push(
        "@compute @workgroup_size(WG)\n\
         fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,\n\
         \x20 @builtin(local_invocation_index) tid: u32, @builtin(subgroup_id) subgroup: u32,\n\
         \x20 @builtin(subgroup_invocation_id) invocation: u32, @builtin(num_subgroups) subgroups: u32) {\n\
         \x20 let wg = wid.y * grid.x + wid.x;\n\
         \x20 if (wg >= a.groups) { return; }\n\
         \x20 sid = subgroup;\n  lane_id = invocation;\n  sgs = subgroups;",
    );
}

/// Maximum or sum over a workgroup, for every row: all threads `offer`, then `settle`, then all find it by `taken`.
/// With subgroups, `reduced[r · subgroups + k]` is what subgroup k offered for row r.
pub fn reducer(b: &mut Builder, caps: &Caps, rows: usize, threads: usize) {
    match threads.checked_div(caps.subgroup) {
        Some(subgroups) => by_subgroups(b, caps, rows, subgroups),
        None => by_memory(b, rows, threads),
    }
}

fn by_subgroups(b: &mut Builder, caps: &Caps, rows: usize, most: usize) {
    b.push("var<private> sid: u32;\nvar<private> lane_id: u32;\nvar<private> sgs: u32;");
    line!(b, "var<workgroup> reduced: array<f32, {}>;", rows * most);
    // A loop whose length is known loads all ahead.
    let subgroups = if caps.team > 0 { format!("{most}u") } else { "sgs".to_owned() };
    line!(
        b,
        "fn offer(r: u32, x: f32, tid: u32, sum: bool) {{\n\
         \x20 var y: f32;\n\
         \x20 if (sum) {{ y = subgroupAdd(x); }} else {{ y = subgroupMax(x); }}\n\
         \x20 if (lane_id == 0u) {{ reduced[r * {most}u + sid] = y; }}\n}}\n\
         fn settle(tid: u32, sum: bool) {{ workgroupBarrier(); }}\n\
         fn taken(r: u32, sum: bool) -> f32 {{\n\
         \x20 var y = reduced[r * {most}u];\n\
         \x20 for (var k = 1u; k < {subgroups}; k++) {{\n\
         \x20   let x = reduced[r * {most}u + k];\n\
         \x20   y = select(max(y, x), y + x, sum);\n  }}\n  return y;\n}}"
    );
}

fn by_memory(b: &mut Builder, rows: usize, threads: usize) {
    line!(b, "var<workgroup> offered: array<f32, {}>;", rows * threads);
    line!(b, "var<workgroup> reduced: array<f32, {}>;", rows * 8);
    line!(
        b,
        "fn offer(r: u32, x: f32, tid: u32, sum: bool) {{ offered[r * {threads}u + tid] = x; }}\n\
         fn settle(tid: u32, sum: bool) {{\n\
         \x20 workgroupBarrier();\n\
         \x20 for (var u = tid; u < {}u; u += WG) {{\n\
         \x20   let base = (u >> 3u) * {threads}u + (u & 7u);\n\
         \x20   var y = offered[base];\n\
         \x20   for (var k = 8u; k < {threads}u; k += 8u) {{\n\
         \x20     let x = offered[base + k];\n\
         \x20     y = select(max(y, x), y + x, sum);\n    }}\n\
         \x20   reduced[u] = y;\n  }}\n  workgroupBarrier();\n}}\n\
         fn taken(r: u32, sum: bool) -> f32 {{\n\
         \x20 var y = reduced[8u * r];\n\
         \x20 for (var k = 1u; k < 8u; k++) {{\n\
         \x20   let x = reduced[8u * r + k];\n\
         \x20   y = select(max(y, x), y + x, sum);\n  }}\n  return y;\n}}",
        rows * 8
    );
}
