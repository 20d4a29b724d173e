//! Attention over compressed rows: a pass that is split over the context, and one that joins the splits.
//!
//! A workgroup takes the query heads of one KV head (for several queries, some of them) and a run of positions. For each
//! tile of positions: a thread decodes the keys of some positions and scores them against all its queries; a softmax step
//! with a running maximum; then each thread decodes its elements of the values. So each row is decoded once for all queries.
//! Tiles are a subgroup's own where its size is known, and no thread waits for another subgroup before the end.
//!
//! Codes, scales and page tables are loaded a step before they are used, across tiles too. What lies past the workgroup's
//! positions is loaded from its last row or page, and weighs nothing.
//!
//! Scores are sums of two floats (Knuth's two-sum): in the hundreds, one f32 steps by 3e-5, and what is subtracted before
//! exp must be finer. Where a query's and a key's norm make it possible that a score is huge, its products are kept as two
//! floats too; and where one is so large that f32 steps by whole numbers, so is the running maximum: the second float of a
//! score would overflow exp otherwise.
//!
//! What a query does not see, and what has no positions, may be anything. It is never multiplied by a weight of zero: NaN would
//! come of it.

use super::context::Context;
use super::recorder::{self, WgpuRecorder, pool_slots};
use super::wgsl::{self, Builder, Rows, Source, THREADS, Tensor, Transform, line};
use super::{Caps, Slot};
use crate::error::Result;
use crate::problem::Domain;
use crate::problem::op::Attention;

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
    /// Positions of a thread and tile: each query that is read from the workgroup's memory serves them all.
    pub positions: usize,
    pub causal: bool,
    pub window: bool,
    pub softcap: bool,
    /// Whether positions may lie beyond the slots, which are a ring then.
    pub ring: bool,
    /// The logarithm of the page size, where that is a power of two.
    pub page_bits: Option<u32>,
    /// Whether no page ends within a tile, whose rows lie one after the other then.
    pub whole: bool,
    /// Threads of a workgroup.
    pub threads: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct JoinSpec {
    pub value: Rows,
    pub out: Tensor,
    pub restore: bool,
    pub sinks: bool,
    pub lse: bool,
}

impl Spec {
    fn rows(&self) -> usize {
        self.heads * self.queries
    }

    /// Vectors of four weights that a workgroup holds.
    pub fn weights(&self) -> usize {
        self.tile() * self.value.format().scales_per_row().max(1) * self.rows().div_ceil(4)
    }

    /// Whether a workgroup of so many threads works in teams, and its memory holds what they need.
    fn fits(&self, context: &Context) -> bool {
        let teams = Layout::new(self, &context.caps).teams() > 1;
        teams && 16 * self.weights() + REST <= context.limits.max_compute_workgroup_storage_size as usize
    }

    /// Positions of all teams' tiles.
    fn tile(&self) -> usize {
        self.positions * self.threads
    }

    /// Elements of a value that a thread sums up, for all rows.
    fn chunk(&self, caps: &Caps) -> usize {
        let most = match 2 * caps.query_rows / self.rows() {
            16.. => 16,
            8.. => 8,
            _ => 4,
        };
        // Every element needs a thread.
        most.max(self.key.format().head_dim().div_ceil(THREADS).next_power_of_two())
    }
}

/// The most positions of a thread: two are faster than one and than four on an H200, where registers get short.
pub(super) fn most_positions(rows: usize, caps: &Caps) -> usize {
    (caps.query_rows / rows).clamp(1, 2)
}

/// The most floats of queries that a workgroup holds, so that everything fits 32 KiB.
pub(super) const QUERY_FLOATS: usize = 2048;
/// A subgroup's running maximum may be exceeded by so much: weights are up to exp(8) then, and none the less exact.
const LAG: f32 = 8.0;

/// Scores are computed again where |q| |k| scale may be larger: at a quarter of it, as it is rather, f32 errs by some 1e-5.
const HUGE: f32 = 1024.0;

/// Scores above this have a running maximum of two floats: f32 steps by whole numbers there.
const LARGE: f32 = 8388608.0;

/// Queries above this are always multiplied as two floats, factors first: f32 could overflow before a small factor comes.
const HUGE_QUERY: f32 = 1e30;

/// Bytes that a workgroup holds beside its weights, at most.
const REST: usize = 16 << 10;

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
    "tiles",
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

/// How a workgroup's threads share its work. A team has tiles for itself: of their values a thread adds up `chunk` elements of
/// every lanes-th position.
struct Layout {
    /// Threads of a workgroup.
    threads: usize,
    /// Threads of a team: a subgroup's, or all.
    team: usize,
    /// Positions of a team's tile.
    tile: usize,
    chunk: usize,
    chunks: usize,
    lanes: usize,
    /// Positions whose values a thread loads before it uses the first.
    depth: usize,
    /// Vectors of four rows.
    fours: usize,
}

impl Layout {
    fn new(spec: &Spec, caps: &Caps) -> Self {
        let chunk = spec.chunk(caps);
        let chunks = spec.key.format().head_dim() / chunk;
        let team = if caps.team > 0 && caps.team.is_multiple_of(chunks) { caps.team } else { spec.threads };
        let (lanes, tile) = (team / chunks, spec.positions * team);
        let depth = caps.ahead.min(tile.div_ceil(lanes));
        Layout { threads: spec.threads, team, tile, chunk, chunks, lanes, depth, fours: spec.rows().div_ceil(4) }
    }

    /// Whether all lanes have values all the time.
    fn even(&self) -> bool {
        self.lanes * self.chunks == self.team && self.tile.is_multiple_of(self.lanes * self.depth)
    }

    fn teams(&self) -> usize {
        self.threads / self.team
    }

    /// Waits for the team.
    fn barrier(&self) -> &'static str {
        if self.teams() > 1 { "subgroupBarrier();" } else { "workgroupBarrier();" }
    }
}

pub(super) fn source(spec: &Spec, caps: &Caps) -> Source {
    let (key, value) = (spec.key.format(), spec.value.format());
    let d = key.head_dim();
    let (vectors, rows, tiles) = (d / 4, spec.rows(), spec.tile());
    let scales = value.scales_per_row().max(1);
    let layout = Layout::new(spec, caps);
    let Layout { team, tile, chunk, chunks, fours, .. } = layout;

    let mut b = Builder::with_threads(caps, spec.threads);
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
    let transform = Transform::new(&key, caps).with_rows(if spec.rotate { rows } else { 0 });
    if spec.rotate {
        transform.declare(&mut b, 0);
        wgsl::flip(&mut b);
    }
    line!(b, "var<workgroup> query: array<vec4<f32>, {}>;", rows * vectors);
    if !spec.whole {
        // Rows of two tiles in turn.
        line!(b, "var<workgroup> row_of: array<u32, {}>;", 2 * tiles);
    }
    // Weights of the tiles, four rows a vector; in the end sums.
    let weights = spec.weights();
    line!(b, "var<workgroup> held: array<vec4<f32>, {weights}>;");
    reducer(&mut b, caps, rows, spec.threads);
    b.push("fn query_load(token0: u32, queries: u32, kv_head: u32, head0: u32, r: u32, e: u32) -> Eight {");
    line!(b, "  let j = r / {0}u;\n  let h = head0 + r % {0}u;", spec.heads);
    b.push("  if (j >= queries || h >= a.group) { return Eight(vec4(0.0), vec4(0.0)); }");
    line!(b, "  return q_load(((token0 + j) * a.heads + kv_head * a.group + h) * {d}u + e);\n}}");
    let slot = if spec.ring { "position % a.slots" } else { "position" };
    let (page, place) = match spec.page_bits {
        Some(bits) => (format!("slot >> {bits}u"), format!("slot & {}u", (1u32 << bits) - 1)),
        None => ("slot / a.page_size".to_owned(), "slot % a.page_size".to_owned()),
    };
    line!(b, "fn row_at(table_base: u32, kv_head: u32, position: u32) -> u32 {{\n  let slot = {slot};");
    line!(b, "  let page = table[a.table_off + table_base + ({page})];");
    line!(b, "  return (page * a.kv_heads + kv_head) * a.page_size + ({place});\n}}");
    b.push("// Whether a score has been large, and the second floats of the teams' maxima.");
    b.push("var<workgroup> large_seen: atomic<u32>;");
    line!(b, "var<workgroup> low: array<f32, {}>;", layout.teams() * rows);
    line!(b, "const LARGE = {LARGE:?};");
    b.push(include_str!("two_floats.wgsl"));
    if checked(spec) {
        exact_score(&mut b, spec, key_fetch);
    }
    // Less than the maximum of no positions, so that its weight is 0.
    b.push("const NONE = -3e38;\nconst UNSEEN = -3.4e38;");
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
    // Runs of whole tiles of a team, as even as they can be.
    b.push("  let each = a.tiles / a.splits;\n  let more = a.tiles % a.splits;");
    line!(b, "  let from_pos = start + (split * each + min(split, more)) * {tile}u;");
    line!(b, "  let to_pos = min(stop, from_pos + (each + u32(split < more)) * {tile}u);");
    b.push(if layout.teams() > 1 {
        "  let team = sid;\n  let me = lane_id;"
    } else {
        "  let team = 0u;\n  let me = tid;"
    });
    line!(b, "  let weights = team * {}u;", tile * scales * fours);
    next_rows(&mut b, spec, &layout, "  var ", &format!("from_pos + team * {tile}u"));
    if !spec.whole {
        line!(b, "  let places = team * {}u;\n  var base = 0u;", 2 * tile);
        store_places(&mut b, spec, &layout, "base");
    }
    for p in 0..spec.positions {
        for i in 0..together(spec, key_fetch) {
            line!(b, "  var w{i}_{p} = k_fetch(k_place(next_{p}), {i}u);");
        }
        scale_words(&mut b, spec, p, "  var ");
    }
    line!(b, "  {}\n  {}", spec.key.fill("k"), spec.value.fill("v"));
    line!(b, "  for (var i = tid; i < {}u; i += WG) {{ low[i] = 0.0; }}", layout.teams() * rows);
    b.push("  if (tid == 0u) { atomicStore(&large_seen, 0u); }");
    queries(&mut b, spec, &transform);
    b.push("  let scale = bitcast<f32>(a.scale);");
    if checked(spec) {
        // |q| is at most √D of its largest element, and levels have a norm near √D.
        b.push("  let query_most = bitcast<f32>(atomicLoad(&largest));");
        let limit = wgsl::float(HUGE / d as f32);
        line!(b, "  let limit = select({limit} / query_most, -1.0, query_most > {HUGE_QUERY:?});");
    }
    for (p, rows) in [("k", &spec.key), ("v", &spec.value)] {
        line!(b, "  {}", rows.level(p));
    }

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
    if layout.teams() > 1 {
        b.push("  var large = false;");
    }
    line!(b, "  let c = me % {chunks}u;\n  let lane_v = me / {chunks}u;");
    let first = if spec.whole { "next" } else { "base" };
    fetch_values(&mut b, spec, &layout, value_fetch, "  var v", first, "0u");
    line!(b, "  for (var tile = from_pos + team * {tile}u; tile < to_pos; tile += {tiles}u) {{");
    if spec.whole {
        b.push("    let here = next;");
    }
    for p in 0..spec.positions {
        line!(b, "    let row_{p} = next_{p};");
    }
    next_rows(&mut b, spec, &layout, "    ", &format!("tile + {tiles}u"));
    for p in 0..spec.positions {
        line!(b, "    let pos_{p} = tile + {}u + me;\n    let kf_{p} = kw_{p};\n    let vf_{p} = vw_{p};", p * team);
    }
    scores(&mut b, spec, &layout, key_fetch);
    softmax(&mut b, spec, &layout, scales);
    values(&mut b, spec, &layout, value_fetch);
    if !spec.whole {
        line!(b, "    base = {tile}u - base;");
    }
    b.push("  }");

    sums(&mut b, spec, &layout, weights / spec.threads);
    b.push("}");
    b.finish()
}

/// The threads' sums into one, and out: vectors of all threads at a time, as many as there is room for.
fn sums(b: &mut Builder, spec: &Spec, layout: &Layout, at_once: usize) {
    let (rows, vectors) = (spec.rows(), spec.key.format().head_dim() / 4);
    let Layout { chunk, chunks, .. } = *layout;
    let (lanes, per) = (layout.threads / chunks, chunk / 4);
    line!(b, "  let lane = team * {}u + lane_v;", layout.lanes);
    if layout.teams() > 1 {
        common_maximum(b, rows, chunk, layout.teams());
    }
    for r in 0..rows {
        line!(b, "  offer({r}u, l{r}, tid, true);");
    }
    b.push("  settle(tid, true);");
    for r in 0..rows {
        line!(b, "  l{r} = taken({r}u, true);\n  if (tid == {r}u && {}) {{", seen(spec, &format!("{r}u")));
        line!(
            b,
            "    parts[a.rows * a.splits * {vectors}u + {} * a.splits + split] = vec4(m{r}, l{r}, {}, 0.0);\n  }}",
            row_out(spec, &format!("{r}u")),
            if layout.teams() > 1 { format!("d{r}") } else { format!("low[{r}]") }
        );
    }
    for first in (0..rows * per).step_by(at_once) {
        let here = first..(rows * per).min(first + at_once);
        line!(b, "  if (lane < {lanes}u) {{");
        for (n, u) in here.clone().enumerate() {
            line!(b, "    held[{}u + lane * {chunks}u + c] = o{}_{};", n * layout.threads, u / per, u % per);
        }
        line!(b, "  }}\n  workgroupBarrier();\n  for (var t = tid; t < {}u; t += WG) {{", here.len() * chunks);
        line!(b, "    let u = {first}u + t / {chunks}u;\n    let r = u / {per}u;");
        line!(b, "    let at = t / {chunks}u * WG + t % {chunks}u;\n    var sum = held[at];");
        line!(b, "    for (var k = 1u; k < {lanes}u; k++) {{ sum += held[at + k * {chunks}u]; }}");
        line!(b, "    if ({}) {{", seen(spec, "r"));
        line!(
            b,
            "      parts[({} * a.splits + split) * {vectors}u + t % {chunks}u * {per}u + u % {per}u] = sum;",
            row_out(spec, "r")
        );
        b.push("    }\n  }\n  workgroupBarrier();");
    }
}

/// Whether the workgroup's row `r` is one of its queries and heads.
fn seen(spec: &Spec, r: &str) -> String {
    format!("{r} / {0}u < queries && head0 + {r} % {0}u < a.group", spec.heads)
}

/// Where its results go.
fn row_out(spec: &Spec, r: &str) -> String {
    format!("((token0 - a.token_base + {r} / {0}u) * a.heads + kv_head * a.group + head0 + {r} % {0}u)", spec.heads)
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

/// Row r's maximum becomes `n{r}`, whose second float is `below{r}` less than the old one's.
fn shrink(b: &mut Builder, r: usize, chunk: usize) {
    line!(b, "  let shrink{r} = exp(keep(m{r} - n{r}) + below{r});\n  m{r} = n{r};\n  l{r} *= shrink{r};");
    for x in 0..chunk / 4 {
        line!(b, "  o{r}_{x} *= shrink{r};");
    }
}

/// `next_{p}`: the rows of the thread's positions of the tile at `tile`. Where a tile's rows lie one after the other, `next` is the
/// first.
fn next_rows(b: &mut Builder, spec: &Spec, layout: &Layout, before: &str, tile: &str) {
    if spec.whole {
        let last = format!("(to_pos - 1u) / {0}u * {0}u", layout.tile);
        line!(b, "{before}next = row_at(table_base, kv_head, min({tile}, {last}));");
    }
    for p in 0..spec.positions {
        let i = p * layout.team;
        let row = match spec.whole {
            true => format!("next + {i}u + me"),
            false => format!("row_at(table_base, kv_head, min({tile} + {i}u + me, to_pos - 1u))"),
        };
        line!(b, "{before}next_{p} = {row};");
    }
}

/// Where the values of the thread's next positions are, into `row_of`, from `base` on.
fn store_places(b: &mut Builder, spec: &Spec, layout: &Layout, base: &str) {
    for p in 0..spec.positions {
        line!(b, "    row_of[places + {base} + {}u + me] = v_place(next_{p});", p * layout.team);
    }
}

/// Fetches of keys that are loaded together: of dense rows 32 bytes, memory's sectors; of codes, which take more registers, one.
fn together(spec: &Spec, fetch: usize) -> usize {
    if spec.key.format().is_rotated() { 1 } else { (group(spec) / fetch).min(2) }
}

/// Elements between two exact additions.
fn group(spec: &Spec) -> usize {
    let d = spec.key.format().head_dim();
    [128, 64, 32].into_iter().find(|n| d.is_multiple_of(*n)).unwrap_or(16)
}

/// Words of the scales of the position's next row, where it has one.
fn scale_words(b: &mut Builder, spec: &Spec, p: usize, before: &str) {
    for (side, rows) in [("k", &spec.key), ("v", &spec.value)] {
        match rows.format().scales_per_row() {
            1 => line!(b, "{before}{side}w_{p} = {side}_scale(next_{p}, 0u);"),
            _ => line!(b, "{before}{side}w_{p} = 0u;"),
        }
    }
}

/// Whether huge scores are computed again. Dense keys have no scale to tell them by.
fn checked(spec: &Spec) -> bool {
    spec.key.format().is_rotated()
}

/// `fn exact_score(row, r) -> vec2<f32>`: the score of query row r at a row of the keys, as a sum of two floats.
fn exact_score(b: &mut Builder, spec: &Spec, fetch: usize) {
    let row = spec.key.format();
    let (d, scales) = (row.head_dim(), row.scales_per_row());
    b.push("var<workgroup> largest: atomic<u32>;");
    spec.key.level_at(b, "k");
    b.push("fn exact_score(row: u32, r: u32) -> vec2<f32> {\n  var sum = vec2(0.0);");
    line!(b, "  for (var s = 0u; s < {scales}u; s++) {{");
    b.push("    let factor = times(vec2(k_factor(k_scale(row, s), row), 0.0), bitcast<f32>(a.scale));");
    let fetches = d / fetch / scales;
    line!(b, "    for (var c = s * {fetches}u; c < (s + 1u) * {fetches}u; c++) {{");
    line!(b, "      let w = k_fetch(k_place(row), c);\n      for (var j = 0u; j < {fetch}u; j++) {{");
    line!(b, "        let q = query[r * {}u + c * {}u + (j >> 2u)][j & 3u];", d / 4, fetch / 4);
    b.push("        sum = plus(sum, times(times(factor, k_level_at(w, j)), q));\n      }\n    }");
    b.push("  }\n  return ordered(sum);\n}");
}

/// The workgroup's rows of queries into `query`, rotated, and the largest element's size into `largest`.
fn queries(b: &mut Builder, spec: &Spec, transform: &Transform) {
    let d = spec.key.format().head_dim();
    let rows = spec.rows();
    let load = |r: &str, e: &str| format!("query_load(token0, queries, kv_head, head0, {r}, {e})");
    if checked(spec) {
        b.push("  var most = 0.0;\n  if (tid == 0u) { atomicStore(&largest, 0u); }");
    }
    let end = if checked(spec) { "  atomicMax(&largest, bitcast<u32>(most));\n" } else { "" };
    if !spec.rotate {
        if checked(spec) {
            b.push("  workgroupBarrier();");
        }
        line!(b, "  for (var e = 8u * tid; e < {}u; e += 8u * WG) {{", rows * d);
        line!(b, "    let v = {};", load(&format!("e / {d}u"), &format!("e % {d}u")));
        b.push("    query[e >> 2u] = v.a;\n    query[(e >> 2u) + 1u] = v.b;");
        if checked(spec) {
            b.push("    let x = max(abs(v.a), abs(v.b));\n    most = max(most, max(max(x.x, x.y), max(x.z, x.w)));");
        }
        return line!(b, "  }}\n{end}  workgroupBarrier();");
    }
    let columns = transform.columns;
    b.push("  {");
    transform.columns(b, &format!("{rows}u"), |r, e| format!("flip8({e}, {})", load(r, e)));
    line!(b, "  if (i < {rows}u) {{");
    for k in 0..transform.per {
        let at = format!("query[i * {}u + {}u + (c >> 2u)][c & 3u]", d / 4, k * columns / 4);
        line!(b, "    {at} = y{k};");
        if checked(spec) {
            line!(b, "    most = max(most, abs(y{k}));");
        }
    }
    line!(b, "  }}\n  }}\n{end}  workgroupBarrier();");
}

/// As [`Builder::main`], with the subgroup's numbers where they are used.
fn main(b: &mut Builder, caps: &Caps) {
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
fn reducer(b: &mut Builder, caps: &Caps, rows: usize, threads: usize) {
    if let Some(most) = threads.checked_div(caps.subgroup) {
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
    } else {
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
}

/// `h{r}_{p}` + `e{r}_{p}`: the score of row r at the thread's position p. Each step loads the codes of the next one, the last
/// those that the next tile begins with.
fn scores(b: &mut Builder, spec: &Spec, layout: &Layout, fetch: usize) {
    let row = spec.key.format();
    let (groups, rows, positions) = (row.head_dim() / group(spec), spec.rows(), spec.positions);
    for p in 0..positions {
        scale_words(b, spec, p, "    ");
        if row.scales_per_row() <= 1 && row.is_rotated() {
            line!(b, "    let f_{p} = k_factor(kf_{p}, row_{p}) * scale;");
        }
        for r in 0..rows {
            line!(b, "    var h{r}_{p}: f32;\n    var e{r}_{p} = 0.0;");
        }
    }
    b.push("    {");
    score_group(b, spec, fetch, "0u", true);
    b.push("    }");
    if groups > 1 {
        line!(b, "    for (var g = 1u; g < {groups}u; g++) {{");
        score_group(b, spec, fetch, "g", false);
        b.push("    }");
    }
    if checked(spec) {
        score_again(b, spec, layout);
    } else {
        order_large(b, spec, layout);
    }
    for (j, p) in (0..spec.queries).flat_map(|j| (0..positions).map(move |p| (j, p))) {
        line!(b, "    let ok{j}_{p} = pos_{p} < to_pos && pos_{p} >= low{j} && pos_{p} < high{j};");
    }
    for (r, p) in (0..rows).flat_map(|r| (0..positions).map(move |p| (r, p))) {
        let j = r / spec.heads;
        if spec.softcap {
            line!(b, "    h{r}_{p} = capped(h{r}_{p} + e{r}_{p});\n    e{r}_{p} = 0.0;");
        }
        line!(
            b,
            "    h{r}_{p} = select(UNSEEN, h{r}_{p}, ok{j}_{p});\n    e{r}_{p} = select(0.0, e{r}_{p}, ok{j}_{p});"
        );
    }
}

/// The thread's scores again where one of them may be huge.
fn score_again(b: &mut Builder, spec: &Spec, layout: &Layout) {
    let (rows, positions) = (spec.rows(), spec.positions);
    let factor = |s, p| format!("abs(k_factor(k_scale(row_{p}, {s}u), row_{p}) * scale) > limit");
    let huge = |p| match spec.key.format().scales_per_row() {
        1 => format!("abs(f_{p}) > limit"),
        n => (0..n).map(|s| factor(s, p)).collect::<Vec<_>>().join(" || "),
    };
    let any: Vec<_> = (0..positions).map(huge).collect();
    line!(b, "    if ({}) {{\n      for (var u = 0u; u < {}u; u++) {{", any.join(" || "), rows * positions);
    let row = |row, p| format!("select({row}, row_{p}, u / {rows}u == {p}u)");
    line!(b, "        let s = exact_score({}, u % {rows}u);", (1..positions).fold("row_0".to_owned(), row));
    for (p, r) in (0..positions).flat_map(|p| (0..rows).map(move |r| (p, r))) {
        line!(b, "        if (u == {}u) {{ h{r}_{p} = s.x; e{r}_{p} = s.y; }}", p * rows + r);
    }
    line!(b, "        if (abs(s.x) > LARGE) {{ {} }}\n      }}\n    }}", say_large(layout));
}

/// Puts large scores in order: the second float is what the first one's rounding has lost.
fn order_large(b: &mut Builder, spec: &Spec, layout: &Layout) {
    let each = || (0..spec.rows()).flat_map(|r| (0..spec.positions).map(move |p| (r, p)));
    let most = each().fold("0.0".to_owned(), |most, (r, p)| format!("max({most}, abs(h{r}_{p}))"));
    line!(b, "    if ({most} > LARGE) {{\n      {}", say_large(layout));
    for (r, p) in each() {
        line!(b, "      let s{r}_{p} = ordered(vec2(h{r}_{p}, e{r}_{p}));");
        line!(b, "      h{r}_{p} = s{r}_{p}.x;\n      e{r}_{p} = s{r}_{p}.y;");
    }
    b.push("    }");
}

/// Says that a score is large, to the team and for the end.
fn say_large(layout: &Layout) -> &'static str {
    if layout.teams() > 1 { "large = true; atomicStore(&large_seen, 1u);" } else { "atomicStore(&large_seen, 1u);" }
}

/// Adds group number `g` of elements to the scores.
fn score_group(b: &mut Builder, spec: &Spec, fetch: usize, g: &str, first: bool) {
    let row = spec.key.format();
    let (d, rows, positions) = (row.head_dim(), spec.rows(), spec.positions);
    let (group, together) = (group(spec), together(spec, fetch));
    let each = || (0..rows).flat_map(|r| (0..positions).map(move |p| (r, p)));
    for p in (0..positions).filter(|_| row.scales_per_row() > 1) {
        let word = format!("k_scale(row_{p}, {})", spec.key.scale_of(g, group));
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
            line!(b, "          let x{p} = {};", spec.key.value("k", &format!("w{i}_{p}"), j));
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

/// The running maximum, and the weight of the thread's positions for every row: zero where one is not seen. The factor of
/// the value is in the weight, so that what an unseen row holds, NaN too, is never added.
fn softmax(b: &mut Builder, spec: &Spec, layout: &Layout, scales: usize) {
    let (rows, positions) = (spec.rows(), spec.positions);
    let Layout { fours, tile, team, .. } = *layout;
    for r in 0..rows {
        let larger = |most: String, p| format!("max({most}, h{r}_{p})");
        line!(b, "    let most{r} = {};", (1..positions).fold(format!("h{r}_0"), larger));
    }
    // In most tiles none grows.
    if layout.teams() > 1 {
        let above: Vec<_> = (0..rows).map(|r| format!("most{r} - m{r} > {LAG:?}")).collect();
        line!(b, "    if (subgroupAny({} || large)) {{", above.join(" || "));
        for r in 0..rows {
            line!(b, "    let n{r} = max(m{r}, subgroupMax(most{r}));");
        }
        b.push("    large = subgroupAny(large);");
        second_floats(b, spec, layout, "large");
    } else {
        for r in 0..rows {
            line!(b, "    offer({r}u, most{r}, tid, false);");
        }
        b.push("    settle(tid, false);");
        for r in 0..rows {
            line!(b, "    let n{r} = max(m{r}, taken({r}u, false));");
        }
        b.push("    let large = atomicLoad(&large_seen) != 0u;");
        second_floats(b, spec, layout, "large");
        let grown: Vec<_> = (0..rows).map(|r| format!("n{r} > m{r}")).collect();
        line!(b, "    if ({} || large) {{", grown.join(" || "));
    }
    for r in 0..rows {
        shrink(b, r, layout.chunk);
    }
    b.push("    }");
    for (r, p) in (0..rows).flat_map(|r| (0..positions).map(move |p| (r, p))) {
        line!(b, "    let p{r}_{p} = exp((h{r}_{p} - m{r}) + e{r}_{p});\n    l{r} += p{r}_{p};");
    }
    if layout.teams() > 1 {
        // All threads have read the last tile's weights.
        line!(b, "    {}", layout.barrier());
    }
    if !spec.whole {
        store_places(b, spec, layout, &format!("{tile}u - base"));
    }
    let rotated = spec.value.format().is_rotated();
    for p in 0..positions {
        for s in 0..scales {
            if rotated {
                let word = if scales > 1 { format!("v_scale(row_{p}, {s}u)") } else { format!("vf_{p}") };
                line!(b, "    let f{s}_{p} = v_factor({word}, row_{p});");
                for j in 0..spec.queries {
                    line!(b, "    let f{s}_{p}_{j} = select(0.0, f{s}_{p}, ok{j}_{p});");
                }
            }
            for four in 0..fours {
                let weight = |r: usize| match rotated {
                    _ if r >= rows => "0.0".to_owned(),
                    true => format!("p{r}_{p} * f{s}_{p}_{}", r / spec.heads),
                    // A float that is not seen may be anything: less than no weight.
                    false => format!("select(-1.0, p{r}_{p}, ok{}_{p})", r / spec.heads),
                };
                let four_weights: Vec<_> = (4 * four..4 * four + 4).map(weight).collect();
                let at = format!("weights + ({}u + me) * {fours}u + {four}u", s * tile + p * team);
                line!(b, "    held[{at}] = vec4({});", four_weights.join(", "));
            }
        }
    }
    line!(b, "    {}", layout.barrier());
}

/// The second floats of the maxima `n{r}` into `low`, where scores are large: the largest of those whose first float is the
/// maximum. `below{r}` is by how much the old one was larger, and scores lose the new one.
fn second_floats(b: &mut Builder, spec: &Spec, layout: &Layout, large: &str) {
    let (rows, positions) = (spec.rows(), spec.positions);
    let teams = layout.teams() > 1;
    for r in 0..rows {
        line!(b, "    var below{r} = 0.0;");
    }
    line!(b, "    if ({large}) {{");
    if !teams {
        // All threads have taken the first floats.
        b.push("      workgroupBarrier();");
    }
    for r in 0..rows {
        line!(b, "      let old{r} = low[team * {rows}u + {r}u];");
        let second = |most: String, p| format!("max({most}, select(UNSEEN, e{r}_{p}, h{r}_{p} == n{r}))");
        let most = (0..positions).fold(format!("select(UNSEEN, old{r}, m{r} == n{r})"), second);
        match teams {
            true => line!(b, "      let new{r} = subgroupMax({most});"),
            false => line!(b, "      offer({r}u, {most}, tid, false);"),
        }
    }
    if !teams {
        b.push("      settle(tid, false);");
        for r in 0..rows {
            line!(b, "      let new{r} = taken({r}u, false);");
        }
    }
    for r in 0..rows {
        line!(b, "      below{r} = old{r} - new{r};");
        for p in 0..positions {
            line!(b, "      e{r}_{p} = keep(e{r}_{p} - new{r});");
        }
        line!(b, "      if (me == 0u) {{ low[team * {rows}u + {r}u] = new{r}; }}");
    }
    b.push("    }");
}

/// Loads `depth` positions' values of the thread, turn number `turn`: of the tile whose first row is `base`, or whose places are in
/// `row_of` from `base` on.
fn fetch_values(b: &mut Builder, spec: &Spec, layout: &Layout, fetch: usize, to: &str, base: &str, turn: &str) {
    let Layout { tile, lanes, depth, .. } = *layout;
    let fetches = layout.chunk / fetch;
    for k in 0..depth {
        let at = format!("{turn} * {}u + {}u + lane_v", depth * lanes, k * lanes);
        let at = if layout.even() { at } else { format!("min({at}, {}u)", tile - 1) };
        let place = match spec.whole {
            true => format!("v_place({base} + {at})"),
            false => format!("row_of[places + {base} + {at}]"),
        };
        for f in 0..fetches {
            line!(b, "{to}{k}_{f} = v_fetch({place}, c * {fetches}u + {f}u);");
        }
    }
}

/// Adds the tile's weighted values to `o{r}_{x}`; each turn's values have been loaded a turn before.
fn values(b: &mut Builder, spec: &Spec, layout: &Layout, fetch: usize) {
    let rows = spec.rows();
    let Layout { tile, chunk, lanes, depth, fours, .. } = *layout;
    let turns = tile.div_ceil(lanes * depth);
    let rotated = spec.value.format().is_rotated();
    let nothing = if rotated { "0.0" } else { "-1.0" };
    let fetches = chunk / fetch;
    line!(b, "    for (var turn = 0u; turn < {turns}u; turn++) {{");
    line!(b, "      let over = turn == {}u;", turns - 1);
    let (now, then) = if spec.whole { ("here", "next".to_owned()) } else { ("base", format!("{tile}u - base")) };
    line!(b, "      let begin = select({now}, {then}, over);\n      let after = select(turn + 1u, 0u, over);");
    fetch_values(b, spec, layout, fetch, "      let u", "begin", "after");
    for k in 0..depth {
        b.push("      {");
        for x in 0..chunk / 4 {
            let per_fetch = fetch / 4;
            let value = spec.value.value("v", &format!("v{k}_{}", x / per_fetch), x % per_fetch);
            line!(b, "        let x{x} = {value};");
        }
        let i = format!("turn * {}u + {}u + lane_v", depth * lanes, k * lanes);
        line!(b, "        let i = {i};");
        let scale = spec.value.scale_of("c", chunk);
        for four in 0..fours {
            let at = |i: &str| format!("held[weights + (({scale}) * {tile}u + {i}) * {fours}u + {four}u]");
            match layout.even() {
                true => line!(b, "        let p{four} = {};", at("i")),
                false => line!(
                    b,
                    "        let p{four} = select(vec4({nothing}), {}, i < {tile}u);",
                    at(&format!("min(i, {}u)", tile - 1))
                ),
            }
        }
        for r in 0..rows {
            let p = format!("p{}.{}", r / 4, ["x", "y", "z", "w"][r % 4]);
            for x in 0..chunk / 4 {
                let sum = format!("fma(vec4({p}), x{x}, o{r}_{x})");
                match rotated {
                    true => line!(b, "        o{r}_{x} = {sum};"),
                    false => line!(b, "        if ({p} >= 0.0) {{ o{r}_{x} = {sum}; }}"),
                }
            }
        }
        b.push("      }");
    }
    for (k, f) in (0..depth).flat_map(|k| (0..fetches).map(move |f| (k, f))) {
        line!(b, "      v{k}_{f} = u{k}_{f};");
    }
    b.push("    }");
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
    line!(b, "var<workgroup> lane_sums: array<vec4<f32>, {}>;", lanes * vectors);
    b.push("fn total(c: u32) -> vec4<f32> {\n  var sum = lane_sums[c];");
    line!(b, "  for (var k = 1u; k < {lanes}u; k++) {{ sum += lane_sums[k * {vectors}u + c]; }}\n  return sum;\n}}");
    let transform = Transform::new(&row, caps).with_rows(1);
    if spec.restore {
        wgsl::flip(&mut b);
        transform.declare(&mut b, 0);
    }
    b.push("const NONE = -3e38;\nconst UNSEEN = -3.4e38;");
    line!(b, "var<workgroup> weight_of: array<f32, {MOST_SPLITS}>;");
    reducer(&mut b, caps, 1, THREADS);
    main(&mut b, caps);
    line!(b, "  let base = wg * a.splits;\n  let sums = a.groups * a.splits * {vectors}u + base;");
    // The splits' maxima and sums, a thread each.
    b.push("  var most = NONE;");
    b.push("  for (var i = tid; i < a.splits; i += WG) { most = max(most, parts[sums + i].x); }");
    b.push(
        "  offer(0u, most, tid, false);\n  settle(tid, false);\n  let first = taken(0u, false);\n  workgroupBarrier();",
    );
    b.push("  var second = UNSEEN;\n  for (var i = tid; i < a.splits; i += WG) {");
    b.push("    let part = parts[sums + i];\n    second = max(second, select(UNSEEN, part.z, part.x == first));\n  }");
    b.push("  offer(0u, second, tid, false);\n  settle(tid, false);");
    b.push("  var m = first;\n  var low = taken(0u, false);");
    if spec.sinks {
        b.push("  let sink = sinks[a.sinks_off + (a.row_base + wg) % a.heads];");
        b.push("  low = select(select(low, max(low, 0.0), sink == m), 0.0, sink > m);\n  m = max(m, sink);");
    }
    b.push("  workgroupBarrier();\n  var l = 0.0;\n  for (var i = tid; i < a.splits; i += WG) {");
    b.push("    let part = parts[sums + i];\n    let weight = exp(keep(part.x - m) + (part.z - low));\n    l += part.y * weight;");
    // A split that saw nothing has written nothing: less than no weight.
    b.push("    weight_of[i] = select(weight, -1.0, part.x == NONE);\n  }");
    b.push("  offer(0u, l, tid, true);\n  settle(tid, true);\n  l = taken(0u, true);");
    if spec.sinks {
        b.push("  let sink_weight = select(exp((sink - m) - low), 1.0, sink == m);");
        b.push("  l += select(sink_weight, 0.0, bitcast<u32>(sink) == a.neg_inf);");
    }
    line!(b, "  let lane = tid / {columns}u;\n  if (lane < {lanes}u) {{");
    line!(b, "    for (var c = tid % {columns}u; c < {vectors}u; c += {columns}u) {{\n      var sum = vec4(0.0);");
    let loads = 8;
    line!(b, "      for (var i = lane; i < a.splits; i += {}u) {{", loads * lanes);
    // Several loads in flight; those past the end are of a split that is there, and weigh nothing.
    for k in 0..loads {
        line!(b, "        let i{k} = min(i + {}u, a.splits - 1u);", k * lanes);
        line!(b, "        let w{k} = select(-1.0, weight_of[i{k}], i + {}u < a.splits);", k * lanes);
        line!(b, "        let o{k} = parts[(base + i{k}) * {vectors}u + c];");
    }
    for k in 0..loads {
        line!(b, "        if (w{k} >= 0.0) {{ sum += w{k} * o{k}; }}");
    }
    b.push("      }");
    line!(b, "      lane_sums[lane * {vectors}u + c] = sum;\n    }}\n  }}\n  workgroupBarrier();");
    b.push("  let none = l == 0.0;\n  let scale = 1.0 / select(l, 1.0, none);");
    let eight = |e: &str| format!("times8(Eight(total({e} >> 2u), total(({e} >> 2u) + 1u)), scale)");
    let to = format!("(a.row_base + wg) * {d}u + e");
    if spec.restore {
        let unit = spec.out.unit();
        transform.columns(&mut b, "1u", |_, e| eight(e));
        transform.rows(&mut b, "1u", unit, &format!("out_store({to}, flip{unit}(e, v));"));
    } else {
        line!(b, "  for (var e = 8u * tid; e < {d}u; e += 8u * WG) {{\n    let v = {};", eight("e"));
        line!(b, "    {}\n  }}", spec.out.store_eight("out", &to, "v"));
    }
    if spec.lse {
        b.push("  if (tid == 0u) {");
        b.push("    let value = select(m + (low + log(select(l, 1.0, none))), bitcast<f32>(a.neg_inf), none);");
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
    let sinks = op.params.sink_logits.as_ref().map(|s| Slot::new(&context, "sinks", s)).transpose()?;
    let lse = op.lse.as_ref().map(|l| Slot::new(&context, "lse", l)).transpose()?;

    let (d, heads, kv_heads) = (op.key.row().head_dim(), op.heads, op.key.kv_heads());
    let (group, spans, page_size) = (heads / kv_heads, op.batch.spans(), op.key.page_size());
    let most = context.caps.query_rows.min(QUERY_FLOATS / d);
    let parts = group.div_ceil(most);
    let heads_at_once = group.div_ceil(parts);
    let longest = spans.iter().map(|s| s.new as usize).max().unwrap_or(1);
    let queries = (most / heads_at_once).clamp(1, longest.max(1));
    let mut tasks = tasks(op, queries);
    let longest = tasks.iter().map(|t| t.seen).max().unwrap_or(0);
    // Fewer positions a thread where the device would not be busy.
    let mut positions = most_positions(heads_at_once * queries, &context.caps);
    while positions > 1 && tasks.len() * kv_heads * parts * (longest / (positions * THREADS)) < context.caps.busy / 8 {
        positions /= 2;
    }
    let original = op.params.domain == Domain::Original;
    let mut spec = Spec {
        key: key.in_lanes(&context.caps),
        value: value.in_lanes(&context.caps),
        q: q_tensor,
        rotate: original && op.key.row().is_rotated(),
        heads: heads_at_once,
        queries,
        positions,
        causal: op.params.causal,
        window: op.params.window.is_some(),
        softcap: op.params.softcap.is_some(),
        ring: spans.iter().any(|s| s.len as usize > op.batch.width() * page_size),
        page_bits: page_size.is_power_of_two().then(|| page_size.ilog2()),
        whole: false,
        threads: THREADS,
    };
    spec.value = spec.value.fetched_by(spec.chunk(&context.caps));
    // Large workgroups of codes where they keep the device busy: a driver must find registers for all their threads at once.
    let wide = Spec { threads: context.caps.threads, ..spec };
    let shortest = tasks.iter().map(|t| t.seen).min().unwrap_or(0);
    let threads_at_work = tasks.len() * kv_heads * parts * (shortest / wide.tile()) * wide.threads;
    let rotated = op.key.row().is_rotated() && op.value.row().is_rotated();
    if threads_at_work >= context.caps.busy * THREADS && rotated && wide.fits(&context) {
        spec = wide;
    }
    let tile = Layout::new(&spec, &context.caps).tile;
    spec.whole = page_size.is_multiple_of(tile);
    if spec.whole {
        tasks.iter_mut().for_each(|task| task.begin_at_multiple_of(tile));
    }
    let join = JoinSpec {
        value: Rows::of(op.value.row(), wgsl::Align::Word),
        out: out_tensor,
        restore: original && op.value.row().is_rotated(),
        sinks: sinks.is_some(),
        lse: lse.is_some(),
    };
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
        let seen = turn.iter().map(|t| t.seen).max().unwrap_or(0);
        let most = seen.div_ceil(spec.tile()).clamp(1, MOST_SPLITS).min((room / tokens).max(1));
        let splits = (context.caps.busy * THREADS / spec.threads / blocks).clamp(1, most);
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
            seen.div_ceil(tile) as u32,
            page_size as u32,
            (op.batch.width() * page_size) as u32,
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

impl Task {
    /// Begins up to `n` - 1 positions earlier. No query sees them.
    fn begin_at_multiple_of(&mut self, n: usize) {
        let more = self.words[6] % n as u32;
        self.words[6] -= more;
        self.seen += more as usize;
    }
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
