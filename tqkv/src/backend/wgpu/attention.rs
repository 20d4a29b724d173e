//! Attention over compressed rows: a pass that is split over the context, and one that joins the splits.
//!
//! A workgroup takes the query heads of one KV head (for several queries, some of them) and a run of positions. For each
//! tile of positions: one thread a position decodes the key and scores it against all its queries; a softmax step with a
//! running maximum; then each thread decodes its elements of the values. So each row is decoded once for all queries.
//!
//! Scores are sums of two floats (Knuth's two-sum): in the hundreds, one f32 steps by 3e-5, and what is subtracted before
//! exp must be finer.

use super::recorder::{self, WgpuRecorder, pool_slots};
use super::wgsl::{self, Builder, Layout, Rows, Source, THREADS, Tensor, line};
use super::{Caps, Slot};
use crate::backend::Attention;
use crate::error::Result;
use crate::ops::Domain;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Spec {
    pub key: Rows,
    pub value: Rows,
    pub q: Tensor,
    /// Whether queries come in the model's domain.
    pub rotate: bool,
    /// Query heads of a workgroup.
    pub heads: usize,
    /// Queries of a workgroup.
    pub queries: usize,
    pub causal: bool,
    pub window: bool,
    pub softcap: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct JoinSpec {
    pub value: Rows,
    pub out: Tensor,
    pub restore: bool,
    pub sinks: bool,
    pub lse: bool,
}

/// Positions of a tile: one a thread.
const TILE: usize = THREADS;

/// The most floats of queries that a workgroup holds, so that everything fits 32 KiB.
pub(super) const QUERY_FLOATS: usize = 3072;
const FIELDS: [&str; 19] = [
    "q_off",
    "k_codes_off",
    "k_scales_off",
    "v_codes_off",
    "v_scales_off",
    "table_off",
    "heads",
    "kv_heads",
    "group",
    "parts",
    "splits",
    "per_split",
    "page_size",
    "slots",
    "scale",
    "softcap",
    "window",
    "token_base",
    "rows",
];

/// The most splits of a context.
const MOST_SPLITS: usize = 1024;

/// Words of a task: table base, first token, queries, position of the first query, oldest position, length, start and end
/// of what its queries see.
const TASK: usize = 8;

pub(super) fn source(spec: &Spec, caps: &Caps) -> Source {
    let (key, value) = (spec.key.format(), spec.value.format());
    let d = key.head_dim();
    let (vectors, rows) = (d / 4, spec.heads * spec.queries);
    let row_vectors = rows.div_ceil(4);
    let value_scales = value.scales_per_row().max(1);
    // Elements of a value that a thread sums up, for all rows.
    let chunk = if rows <= 8 { 8 } else { 4 };
    let chunks = d / chunk;
    let lanes = THREADS / chunks;

    let mut b = Builder::new(caps);
    b.storage("q", spec.q.element(), false);
    spec.key.bind(&mut b, "k");
    spec.value.bind(&mut b, "v");
    b.storage("table", "u32", false);
    b.storage("tasks", "u32", false);
    b.storage("parts", "vec4<f32>", true);
    let mut tables = vec![];
    for (name, rows) in [("k_levels", &spec.key), ("v_levels", &spec.value)] {
        if rows.book_vectors() > 0 {
            tables.push((name, "f32", rows.book_vectors()));
        }
    }
    if spec.rotate {
        tables.push(("signs", "u32", 8));
    }
    b.params(&FIELDS, &tables);
    spec.q.load(&mut b, "q");
    for (p, rows) in [("k", &spec.key), ("v", &spec.value)] {
        rows.book(&mut b, p);
        rows.factor(&mut b, p);
    }
    let key_fetch = spec.key.fetch_size(32);
    spec.key.fetch(&mut b, "k", key_fetch);
    let value_fetch = spec.value.fetch_size(chunk);
    spec.value.fetch(&mut b, "v", value_fetch);
    Layout::Plain.declare(&mut b, rows * vectors);
    if spec.rotate {
        wgsl::flip(&mut b);
        wgsl::transform(&mut b, &key);
    }
    line!(b, "var<workgroup> row_of: array<u32, {TILE}>;");
    line!(b, "var<workgroup> weights: array<vec4<f32>, {}>;", TILE * value_scales * row_vectors);
    reducer(&mut b, caps, rows);
    b.push("const NONE = -3e38;");
    if spec.softcap {
        b.push(include_str!("capped.wgsl"));
    }
    main(&mut b, caps);
    line!(b, "  let split = wg % a.splits;\n  let rest = wg / a.splits;");
    b.push("  let part = rest % (a.kv_heads * a.parts);\n  let kv_head = part / a.parts;");
    line!(b, "  let head0 = (part % a.parts) * {}u;", spec.heads);
    line!(b, "  let task = {TASK}u * (rest / (a.kv_heads * a.parts));");
    for (i, name) in
        ["table_base", "token0", "queries", "first_pos", "first", "len", "start", "stop"].iter().enumerate()
    {
        line!(b, "  let {name} = tasks[task + {i}u];");
    }
    b.push("  let from_pos = start + split * a.per_split;\n  let to_pos = min(stop, from_pos + a.per_split);");
    line!(b, "  {}\n  {}", spec.key.fill("k"), spec.value.fill("v"));

    // Queries, rotated and scaled.
    let eights = d / 8;
    line!(b, "  for (var u = tid; u < {}u; u += WG) {{\n    let r = u / {eights}u;", rows * eights);
    line!(b, "    let j = r / {0}u;\n    let h = head0 + r % {0}u;", spec.heads);
    b.push("    var v = Eight(vec4(0.0), vec4(0.0));\n    if (j < queries && h < a.group) {");
    line!(b, "      let i = (token0 + j) * a.heads + kv_head * a.group + h;");
    line!(b, "      v = q_load(i * {d}u + 8u * (u % {eights}u));");
    if spec.rotate {
        line!(b, "      v = flip(8u * (u % {eights}u), v);");
    }
    b.push("    }\n    buf[2u * u] = v.a;\n    buf[2u * u + 1u] = v.b;\n  }");
    b.push(&if spec.rotate { format!("  transform({rows}u, tid);") } else { "  workgroupBarrier();".to_owned() });
    line!(b, "  for (var u = tid; u < {}u; u += WG) {{ buf[u] = buf[u] * bitcast<f32>(a.scale); }}", rows * vectors);
    b.push("  workgroupBarrier();");

    // What each query sees.
    for j in 0..spec.queries {
        line!(b, "  let pos{j} = first_pos + {j}u;");
        let low = match spec.window {
            true => format!("max(first, select(0u, pos{j} + 1u - a.window, pos{j} + 1u > a.window))"),
            false => "first".to_owned(),
        };
        let high = if spec.causal { format!("pos{j} + 1u") } else { "len".to_owned() };
        line!(b, "  let low{j} = {low};\n  let high{j} = select(0u, {high}, {j}u < queries);");
    }
    for r in 0..rows {
        line!(b, "  var m{r} = NONE;\n  var l{r} = 0.0;");
        for x in 0..chunk / 4 {
            line!(b, "  var o{r}_{x} = vec4(0.0);");
        }
    }
    line!(b, "  let c = tid % {chunks}u;\n  let lane_v = tid / {chunks}u;");
    line!(b, "  for (var tile = from_pos; tile < to_pos; tile += {TILE}u) {{");
    b.push("    let pos = tile + tid;");
    scores(&mut b, spec, key_fetch, rows);
    softmax(&mut b, spec, rows, chunk, value_scales, row_vectors);
    values(&mut b, spec, rows, chunk, value_fetch, lanes, row_vectors, value_scales);
    b.push("  }");

    // The threads' sums into one.
    for r in 0..rows {
        line!(b, "  offer({r}u, l{r}, tid, true);");
    }
    b.push("  settle(tid, true);");
    for r in 0..rows {
        line!(b, "  l{r} = taken({r}u, true);");
    }
    line!(b, "  for (var k = 0u; k < {lanes}u; k++) {{\n    if (lane_v == k) {{");
    for r in 0..rows {
        for x in 0..chunk / 4 {
            let at = format!("buf[{}u + c * {}u + {x}u]", r * vectors, chunk / 4);
            line!(b, "      {at} = select({at}, vec4(0.0), k == 0u) + o{r}_{x};");
        }
    }
    b.push("    }\n    workgroupBarrier();\n  }");
    line!(b, "  for (var u = tid; u < {}u; u += WG) {{\n    let r = u / {vectors}u;", rows * vectors);
    line!(b, "    let j = r / {0}u;\n    let h = head0 + r % {0}u;", spec.heads);
    b.push("    if (j < queries && h < a.group) {");
    b.push("      let row = (token0 - a.token_base + j) * a.heads + kv_head * a.group + h;");
    line!(b, "      parts[(row * a.splits + split) * {vectors}u + u % {vectors}u] = buf[u];\n    }}\n  }}");
    for r in 0..rows {
        let (j, h) = (r / spec.heads, r % spec.heads);
        line!(b, "  if (tid == {r}u && {j}u < queries && head0 + {h}u < a.group) {{");
        line!(b, "    let row = (token0 - a.token_base + {j}u) * a.heads + kv_head * a.group + head0 + {h}u;");
        line!(
            b,
            "    parts[a.rows * a.splits * {vectors}u + row * a.splits + split] = vec4(m{r}, l{r}, 0.0, 0.0);\n  }}"
        );
    }
    b.push("}");
    b.finish()
}

/// As [`Builder::main`], with the subgroup's numbers where they are used.
fn main(b: &mut Builder, caps: &Caps) {
    if !caps.subgroups {
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
fn reducer(b: &mut Builder, caps: &Caps, rows: usize) {
    if caps.subgroups {
        // Subgroups of 4 are the smallest there are.
        let most = THREADS / 4;
        b.push("var<private> sid: u32;\nvar<private> lane_id: u32;\nvar<private> sgs: u32;");
        line!(b, "var<workgroup> reduced: array<f32, {}>;", rows * most);
        line!(
            b,
            "fn offer(r: u32, x: f32, tid: u32, sum: bool) {{\n\
             \x20 var y: f32;\n\
             \x20 if (sum) {{ y = subgroupAdd(x); }} else {{ y = subgroupMax(x); }}\n\
             \x20 if (lane_id == 0u) {{ reduced[r * {most}u + sid] = y; }}\n}}\n\
             fn settle(tid: u32, sum: bool) {{ workgroupBarrier(); }}\n\
             fn taken(r: u32, sum: bool) -> f32 {{\n\
             \x20 var y = reduced[r * {most}u];\n\
             \x20 for (var k = 1u; k < sgs; k++) {{\n\
             \x20   let x = reduced[r * {most}u + k];\n\
             \x20   y = select(max(y, x), y + x, sum);\n  }}\n  return y;\n}}"
        );
    } else {
        line!(b, "var<workgroup> offered: array<f32, {}>;", rows * TILE);
        line!(b, "var<workgroup> reduced: array<f32, {}>;", rows * 8);
        line!(
            b,
            "fn offer(r: u32, x: f32, tid: u32, sum: bool) {{ offered[r * {TILE}u + tid] = x; }}\n\
             fn settle(tid: u32, sum: bool) {{\n\
             \x20 workgroupBarrier();\n\
             \x20 for (var u = tid; u < {}u; u += WG) {{\n\
             \x20   let base = (u >> 3u) * {TILE}u + (u & 7u);\n\
             \x20   var y = offered[base];\n\
             \x20   for (var k = 8u; k < {TILE}u; k += 8u) {{\n\
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
}

/// `h{r}` + `e{r}`: the score of row r at the thread's position.
fn scores(b: &mut Builder, spec: &Spec, fetch: usize, rows: usize) {
    let row = spec.key.format();
    let d = row.head_dim();
    // Elements between two exact additions.
    let group = if d.is_multiple_of(32) { 32 } else { 16 };
    let (groups, fetches) = (d / group, group / fetch);
    b.push("    let slot = min(pos, to_pos - 1u) % a.slots;");
    b.push("    let page = table[a.table_off + table_base + slot / a.page_size];");
    b.push("    let row = (page * a.kv_heads + kv_head) * a.page_size + slot % a.page_size;");
    for r in 0..rows {
        line!(b, "    var h{r} = 0.0;\n    var e{r} = 0.0;");
    }
    let several = row.scales_per_row() > 1;
    if !several && row.is_rotated() {
        b.push("    let f = k_factor(row, 0u);");
    }
    line!(b, "    for (var g = 0u; g < {groups}u; g++) {{");
    for i in 0..fetches {
        line!(b, "      let w{i} = k_fetch(row, g * {fetches}u + {i}u);");
    }
    if several {
        line!(b, "      let f = k_factor(row, {});", spec.key.scale_of("g", group));
    }
    for j in 0..group / 4 {
        let per_fetch = fetch / 4;
        let value = spec.key.value("k", &format!("w{}", j / per_fetch), j % per_fetch);
        line!(b, "      let x{j} = {value};");
    }
    for r in 0..rows {
        line!(b, "      {{\n        let at = {}u + g * {}u;\n        var t = x0 * buf[at];", r * d / 4, group / 4);
        for j in 1..group / 4 {
            line!(b, "        t = fma(x{j}, buf[at + {j}u], t);");
        }
        let factor = if row.is_rotated() { " * f" } else { "" };
        line!(b, "        let s = ((t.x + t.y) + (t.z + t.w)){factor};");
        line!(b, "        let y = keep(h{r} + s);\n        let z = keep(y - h{r});");
        line!(b, "        e{r} += (h{r} - (y - z)) + (s - z);\n        h{r} = y;\n      }}");
    }
    b.push("    }");
    for r in 0..rows {
        let j = r / spec.heads;
        if spec.softcap {
            line!(b, "    h{r} = capped(h{r} + e{r});\n    e{r} = 0.0;");
        }
        line!(b, "    let ok{r} = pos < to_pos && pos >= low{j} && pos < high{j};");
    }
}

/// The running maximum, and the weight of the thread's position for every row: zero where it is not seen. The factor of
/// the value is in the weight, so that what an unseen row holds, NaN too, is never added.
fn softmax(b: &mut Builder, spec: &Spec, rows: usize, chunk: usize, scales: usize, row_vectors: usize) {
    for r in 0..rows {
        line!(b, "    offer({r}u, select(NONE, h{r}, ok{r}), tid, false);");
    }
    b.push("    settle(tid, false);");
    for r in 0..rows {
        line!(
            b,
            "    let n{r} = max(m{r}, taken({r}u, false));\n    let shrink{r} = exp(m{r} - n{r});\n    m{r} = n{r};"
        );
        line!(b, "    let p{r} = select(0.0, exp((h{r} - m{r}) + e{r}), ok{r});\n    l{r} = l{r} * shrink{r} + p{r};");
        for x in 0..chunk / 4 {
            line!(b, "    o{r}_{x} *= shrink{r};");
        }
    }
    b.push("    row_of[tid] = row;");
    let rotated = spec.value.format().is_rotated();
    for s in 0..scales {
        if rotated {
            line!(b, "    let vf{s} = v_factor(row, {s}u);");
        }
        for x in 0..row_vectors {
            let weight = |i: usize| match 4 * x + i {
                r if r < rows && rotated => format!("select(0.0, p{r} * vf{s}, ok{r})"),
                r if r < rows => format!("p{r}"),
                _ => "0.0".to_owned(),
            };
            let vector = format!("vec4<f32>({}, {}, {}, {})", weight(0), weight(1), weight(2), weight(3));
            line!(b, "    weights[(tid * {scales}u + {s}u) * {row_vectors}u + {x}u] = {vector};");
        }
    }
    b.push("    workgroupBarrier();");
}

/// Adds the tile's weighted values to `o{r}_{x}`.
#[allow(clippy::too_many_arguments)] // Each is a size of its own.
fn values(
    b: &mut Builder,
    spec: &Spec,
    rows: usize,
    chunk: usize,
    fetch: usize,
    lanes: usize,
    row_vectors: usize,
    scales: usize,
) {
    // Loads of several positions before any is used keep more of them in flight.
    let unroll = if TILE.is_multiple_of(4 * lanes) { 4 } else { 1 };
    let fetches = chunk / fetch;
    let count = if unroll > 1 { format!("{TILE}u") } else { format!("min({TILE}u, to_pos - tile)") };
    line!(b, "    if (lane_v < {lanes}u) {{\n      let count = {count};");
    line!(b, "      for (var i = lane_v; i < count; i += {}u) {{", unroll * lanes);
    for k in 0..unroll {
        for f in 0..fetches {
            line!(b, "        let w{k}_{f} = v_fetch(row_of[i + {}u], c * {fetches}u + {f}u);", k * lanes);
        }
    }
    for k in 0..unroll {
        b.push("        {");
        for x in 0..chunk / 4 {
            let per_fetch = fetch / 4;
            let value = spec.value.value("v", &format!("w{k}_{}", x / per_fetch), x % per_fetch);
            line!(b, "          let x{x} = {value};");
        }
        let scale = spec.value.scale_of("c", chunk);
        line!(b, "          let at = ((i + {}u) * {scales}u + {scale}) * {row_vectors}u;", k * lanes);
        for v in 0..row_vectors {
            line!(b, "          let p{v} = weights[at + {v}u];");
        }
        for r in 0..rows {
            let p = format!("p{}.{}", r / 4, ["x", "y", "z", "w"][r % 4]);
            for x in 0..chunk / 4 {
                let sum = format!("fma(vec4({p}), x{x}, o{r}_{x})");
                match spec.value.format().is_rotated() {
                    true => line!(b, "          o{r}_{x} = {sum};"),
                    // A float that is not seen may be anything.
                    false => line!(b, "          if ({p} != 0.0) {{ o{r}_{x} = {sum}; }}"),
                }
            }
        }
        b.push("        }");
    }
    b.push("      }\n    }");
}

/// The splits of every row into one result.
pub(super) fn join_source(spec: &JoinSpec, caps: &Caps) -> Source {
    let row = spec.value.format();
    let d = row.head_dim();
    let vectors = d / 4;
    let columns = vectors.min(THREADS);
    let lanes = THREADS / columns;
    let mut b = Builder::new(caps);
    b.storage("parts", "vec4<f32>", false);
    b.storage("out", spec.out.element(), true);
    if spec.sinks {
        b.storage("sinks", "f32", false);
    }
    if spec.lse {
        b.storage("lse", "f32", true);
    }
    let fields = ["splits", "out_off", "sinks_off", "lse_off", "heads", "row_base", "neg_inf"];
    b.params(&fields, if spec.restore { &[("signs", "u32", 8)] } else { &[] });
    spec.out.store(&mut b, "out");
    Layout::Plain.declare(&mut b, (lanes * vectors).max(vectors));
    if spec.restore {
        wgsl::flip(&mut b);
        wgsl::transform(&mut b, &row);
    }
    b.push("const NONE = -3e38;");
    line!(b, "var<workgroup> weight_of: array<f32, {MOST_SPLITS}>;");
    reducer(&mut b, caps, 1);
    main(&mut b, caps);
    line!(b, "  let base = wg * a.splits;\n  let sums = a.groups * a.splits * {vectors}u + base;");
    // The splits' maxima and sums, a thread each.
    b.push("  var most = NONE;");
    b.push("  for (var i = tid; i < a.splits; i += WG) { most = max(most, parts[sums + i].x); }");
    b.push("  offer(0u, most, tid, false);\n  settle(tid, false);\n  var m = taken(0u, false);");
    if spec.sinks {
        b.push("  let sink = sinks[a.sinks_off + (a.row_base + wg) % a.heads];\n  m = max(m, sink);");
    }
    b.push("  workgroupBarrier();\n  var l = 0.0;\n  for (var i = tid; i < a.splits; i += WG) {");
    b.push("    let part = parts[sums + i];\n    let weight = exp(part.x - m);\n    l += part.y * weight;");
    // A split that saw nothing has written nothing.
    b.push("    weight_of[i] = select(0.0, weight, part.x > NONE);\n  }");
    b.push("  offer(0u, l, tid, true);\n  settle(tid, true);\n  l = taken(0u, true);");
    if spec.sinks {
        b.push("  l += select(0.0, exp(sink - m), sink > NONE);");
    }
    line!(b, "  let lane = tid / {columns}u;\n  if (lane < {lanes}u) {{");
    line!(b, "    for (var c = tid % {columns}u; c < {vectors}u; c += {columns}u) {{\n      var sum = vec4(0.0);");
    line!(b, "      for (var i = lane; i < a.splits; i += {}u) {{", 4 * lanes);
    // Four loads in flight; those past the end are of a split that is there, and weigh nothing.
    for k in 0..4 {
        line!(b, "        let i{k} = min(i + {}u, a.splits - 1u);", k * lanes);
        line!(b, "        let w{k} = select(0.0, weight_of[i{k}], i + {}u < a.splits);", k * lanes);
        line!(b, "        let o{k} = parts[(base + i{k}) * {vectors}u + c];");
    }
    for k in 0..4 {
        line!(b, "        if (w{k} != 0.0) {{ sum += w{k} * o{k}; }}");
    }
    b.push("      }");
    line!(b, "      buf[lane * {vectors}u + c] = sum;\n    }}\n  }}\n  workgroupBarrier();");
    b.push("  let none = l == 0.0;\n  let scale = 1.0 / select(l, 1.0, none);");
    line!(b, "  for (var c = tid; c < {vectors}u; c += WG) {{\n    var sum = buf[c];");
    line!(b, "    for (var k = 1u; k < {lanes}u; k++) {{ sum += buf[k * {vectors}u + c]; }}");
    b.push("    buf[c] = sum * scale;\n  }");
    b.push(if spec.restore { "  transform(1u, tid);" } else { "  workgroupBarrier();" });
    line!(b, "  for (var u = tid; u < {}u; u += WG) {{\n    var v = Eight(buf[2u * u], buf[2u * u + 1u]);", d / 8);
    if spec.restore {
        b.push("    v = flip(8u * u, v);");
    }
    line!(b, "    out_store((a.row_base + wg) * {d}u + 8u * u, v);\n  }}");
    if spec.lse {
        b.push("  if (tid == 0u) {");
        b.push("    let value = select(m + log(select(l, 1.0, none)), bitcast<f32>(a.neg_inf), none);");
        b.push("    lse[a.lse_off + a.row_base + wg] = value;\n  }");
    }
    b.push("}");
    b.finish()
}

struct Task {
    words: [u32; TASK],
    queries: usize,
    seen: usize,
}

pub(super) fn record(recorder: &mut WgpuRecorder, op: &Attention) -> Result<()> {
    let context = recorder.context.clone();
    let (q, q_tensor) = Slot::tensor(&context, "q", &op.q)?;
    let (out, out_tensor) = Slot::tensor(&context, "out", &op.out)?;
    let (key_slots, key, [k_codes, k_scales]) = pool_slots(&context, "the keys", &op.key)?;
    let (value_slots, value, [v_codes, v_scales]) = pool_slots(&context, "the values", &op.value)?;
    let table = Slot::new(&context, "the page table", op.batch.device_table())?;
    let sinks = op.params.sinks.as_ref().map(|s| Slot::new(&context, "sinks", s)).transpose()?;
    let lse = op.lse.as_ref().map(|l| Slot::new(&context, "lse", l)).transpose()?;

    let (d, heads, kv_heads) = (op.key.row().head_dim(), op.heads, op.key.kv_heads());
    let (group, spans) = (heads / kv_heads, op.batch.spans());
    let most = context.caps.query_rows.min(QUERY_FLOATS / d);
    let parts = group.div_ceil(most);
    let heads_at_once = group.div_ceil(parts);
    let longest = spans.iter().map(|s| s.new as usize).max().unwrap_or(1);
    let queries = (most / heads_at_once).clamp(1, longest.max(1));
    let original = op.params.domain == Domain::Original;
    let spec = Spec {
        key,
        value,
        q: q_tensor,
        rotate: original && op.key.row().is_rotated(),
        heads: heads_at_once,
        queries,
        causal: op.params.causal,
        window: op.params.window.is_some(),
        softcap: op.params.softcap.is_some(),
    };
    let join = JoinSpec {
        value: Rows::of(op.value.row(), wgsl::Align::Word),
        out: out_tensor,
        restore: original && op.value.row().is_rotated(),
        sinks: sinks.is_some(),
        lse: lse.is_some(),
    };
    let tasks = tasks(op, queries);
    // A split's results take memory for every query, so that very many queries go in turns.
    let row_bytes = (d + 4) * 4;
    let room = context.limits.max_storage_buffer_binding_size.min(256 << 20) as usize / (row_bytes * heads);
    let mut next = 0;
    while next < tasks.len() {
        let mut end = next;
        let mut tokens = 0;
        while end < tasks.len() && (end == next || tokens + tasks[end].queries <= room) {
            tokens += tasks[end].queries;
            end += 1;
        }
        let turn = &tasks[next..end];
        next = end;
        let blocks = turn.len() * kv_heads * parts;
        let tiles = turn.iter().map(|t| t.seen).max().unwrap_or(0).div_ceil(TILE).max(1);
        let splits = context.caps.busy.div_ceil(blocks).clamp(1, tiles.min(MOST_SPLITS)).min((room / tokens).max(1));
        let per_split = tiles.div_ceil(splits);
        let splits = tiles.div_ceil(per_split);
        let rows = tokens * heads;
        let token_base = turn[0].words[1];
        let fields = [
            q.words(),
            k_codes,
            k_scales,
            v_codes,
            v_scales,
            table.words(),
            heads as u32,
            kv_heads as u32,
            group as u32,
            parts as u32,
            splits as u32,
            (per_split * TILE) as u32,
            op.key.page_size() as u32,
            (op.batch.width() * op.key.page_size()) as u32,
            op.params.scale.to_bits(),
            op.params.softcap.unwrap_or(1.0).to_bits(),
            op.params.window.map_or(0, |w| w.min(u32::MAX as usize) as u32),
            token_base,
            rows as u32,
        ];
        let words: Vec<u32> = turn.iter().flat_map(|t| t.words).collect();
        let partial = recorder.scratch(0, 0, (rows * splits * row_bytes) as u64)?;
        let mut slots = vec![q.clone()];
        slots.extend(key_slots.iter().chain(&value_slots).cloned());
        slots.extend([table.clone(), recorder.list("tasks", &words)?, partial.clone()]);
        let tables = [wgsl::levels(op.key.row()), wgsl::levels(op.value.row()), wgsl::signs(op.key.row())];
        let used = [!tables[0].is_empty(), !tables[1].is_empty(), spec.rotate];
        let tables: Vec<&[u32]> = tables.iter().zip(used).filter(|(_, used)| *used).map(|(t, _)| &t[..]).collect();
        let text = || source(&spec, &context.caps);
        recorder.dispatch(&recorder::Spec::Attention(spec), text, slots, blocks * splits, &fields, &tables)?;

        let fields = [
            splits as u32,
            out.words(),
            sinks.as_ref().map_or(0, Slot::words),
            lse.as_ref().map_or(0, Slot::words),
            heads as u32,
            token_base * heads as u32,
            f32::NEG_INFINITY.to_bits(),
        ];
        let slots: Vec<Slot> = [partial, out.clone()].into_iter().chain(sinks.clone()).chain(lse.clone()).collect();
        let signs = wgsl::signs(op.value.row());
        let tables: &[&[u32]] = if join.restore { &[&signs] } else { &[] };
        let text = || join_source(&join, &context.caps);
        recorder.dispatch(&recorder::Spec::Join(join), text, slots, rows, &fields, tables)?;
    }
    Ok(())
}

/// Runs of at most `queries` queries of one sequence, and the positions that they see together.
fn tasks(op: &Attention, queries: usize) -> Vec<Task> {
    let mut tasks = vec![];
    for (s, span) in op.batch.spans().iter().enumerate() {
        for first_query in (0..span.new as usize).step_by(queries) {
            let count = queries.min(span.new as usize - first_query);
            let pos0 = span.len as usize - span.new as usize + first_query;
            let first = span.first as usize;
            let start = op.params.window.map_or(first, |w| first.max((pos0 + 1).saturating_sub(w)));
            let stop = if op.params.causal { pos0 + count } else { span.len as usize };
            let words = [
                (s * op.batch.width()) as u32,
                span.start + first_query as u32,
                count as u32,
                pos0 as u32,
                span.first,
                span.len,
                start as u32,
                stop as u32,
            ];
            tasks.push(Task { words, queries: count, seen: stop - start });
        }
    }
    tasks
}
