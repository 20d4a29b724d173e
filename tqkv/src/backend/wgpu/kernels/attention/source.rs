//! The text of the first pass, phase by phase.

use super::exact::{LARGE, checked, exact_score};
use super::kernel::{AttentionKernel, AttentionParams, Task};
use super::queries::queries;
use super::scores::{scale_words, scores, together};
use super::softmax::softmax;
use super::sums::sums;
use super::teams::Teams;
use super::values::{fetch_values, values};
use super::{exact, rows};
use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::kernel::Kernel;
use crate::backend::wgpu::wgsl::builder::{Builder, Source, line};
use crate::backend::wgpu::wgsl::params::Params;
use crate::backend::wgpu::wgsl::reduce::{main, reducer};
use crate::backend::wgpu::wgsl::transform::{Transform, flip};

/// Words of a task.
const TASK: usize = size_of::<Task>() / 4;

impl Kernel for AttentionKernel {
    type Params = AttentionParams;
    const NAME: &'static str = "attention";

    fn source(&self, caps: &Caps) -> Source {
        let teams = self.teams(caps);
        let key_fetch = self.key.elements().fetch_size(&self.key, 32);
        let value_fetch = self.value.elements().fetch_size(&self.value, teams.chunk);
        let transform = Transform::new(&self.key.format(), caps).with_rows(if self.rotate { self.rows() } else { 0 });
        let mut b = Builder::with_threads(caps, self.threads);
        bind(&mut b, self);
        self.key.elements().fetch(&self.key, &mut b, "k", key_fetch);
        self.value.elements().fetch(&self.value, &mut b, "v", value_fetch);
        if self.rotate {
            transform.declare(&mut b, 0);
            flip(&mut b, "flip", "k_tables");
        }
        declare(&mut b, self, &teams, caps);
        if checked(self) {
            exact_score(&mut b, self, key_fetch);
        }
        main(&mut b, caps);
        place(&mut b, self, &teams);
        first_loads(&mut b, self, &teams, key_fetch);
        queries(&mut b, self, &transform);
        for (p, stored) in [("k", &self.key), ("v", &self.value)] {
            line!(b, "  {}", stored.level(p));
        }
        state(&mut b, self, &teams);
        let first = if self.whole { "next" } else { "base" };
        fetch_values(&mut b, self, &teams, value_fetch, "  var v", first, "0u");
        tile(&mut b, self, &teams, (key_fetch, value_fetch));
        sums(&mut b, self, &teams, self.weights() / self.threads);
        b.push("}");
        b.finish()
    }
}

/// Bindings, and how they are read.
fn bind(b: &mut Builder, kernel: &AttentionKernel) {
    b.params::<AttentionParams>();
    kernel.q.bind(b, "q", false);
    kernel.key.bind(b, "k");
    kernel.value.bind(b, "v");
    b.storage("table", "u32", false);
    b.storage("tasks", "u32", false);
    b.storage("partial", "vec4<f32>", true);
    kernel.q.load(b, "q");
    for (p, stored) in [("k", &kernel.key), ("v", &kernel.value)] {
        stored.tables(b, p);
        stored.factor(b, p);
    }
}

/// The workgroup's memory, and functions.
fn declare(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, caps: &Caps) {
    let rows = kernel.rows();
    line!(b, "var<workgroup> query: array<vec4<f32>, {}>;", rows * kernel.key.format().row_dim() / 4);
    if !kernel.whole {
        // Rows of two tiles in turn.
        line!(b, "var<workgroup> row_of: array<u32, {}>;", 2 * kernel.tile());
    }
    // Weights of the tiles, four rows a vector; in the end sums.
    line!(b, "var<workgroup> held: array<vec4<f32>, {}>;", kernel.weights());
    reducer(b, caps, rows, kernel.threads);
    let unit = if checked(kernel) { exact::UNIT } else { 1.0 };
    rows::declare(b, kernel, unit);
    b.push("var<workgroup> largest: atomic<u32>;");
    b.push("// Whether a score has been large, and the second floats of the teams' maxima.");
    b.push("var<workgroup> large_seen: atomic<u32>;");
    line!(b, "var<workgroup> low: array<f32, {}>;", teams.count() * rows);
    line!(b, "const LARGE = {LARGE:?};");
    b.push(include_str!("two_floats.wgsl"));
    // Less than the maximum of no positions, so that its weight is 0.
    b.push("const NONE = -3e38;\nconst UNSEEN = -3.4e38;");
    if kernel.window {
        b.push(include_str!("visible.wgsl"));
    }
    if kernel.softcap {
        b.push(include_str!("capped.wgsl"));
    }
}

/// What is the workgroup's: a KV head, some of its query heads, a task, and a run of positions; and what is the team's.
fn place(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams) {
    let tile = teams.tile;
    b.push("  let split = wg % a.splits;\n  let rest = wg / a.splits;");
    b.push("  let share = rest % (a.kv_heads * a.shares);\n  let kv_head = share / a.shares;");
    line!(b, "  let head0 = (share % a.shares) * {}u;", kernel.heads);
    line!(b, "  let task = a.tasks_off + {TASK}u * (rest / (a.kv_heads * a.shares));");
    for (i, (name, _)) in Task::FIELDS.iter().enumerate() {
        line!(b, "  let {name} = tasks[task + {i}u];");
    }
    // Runs of whole tiles of a team, as even as they can be.
    b.push("  let each = a.tiles / a.splits;\n  let more = a.tiles % a.splits;");
    line!(b, "  let from_pos = start + (split * each + min(split, more)) * {tile}u;");
    line!(b, "  let to_pos = min(stop, from_pos + (each + u32(split < more)) * {tile}u);");
    b.push(match teams.count() {
        1 => "  let team = 0u;\n  let me = tid;",
        _ => "  let team = sid;\n  let me = lane_id;",
    });
    let scales = kernel.value.format().scales_per_row().max(1);
    line!(b, "  let weights = team * {}u;", tile * scales * teams.fours);
}

/// What the first tile begins with.
fn first_loads(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, key_fetch: usize) {
    let tile = teams.tile;
    rows::next_rows(b, kernel, teams, "  var ", &format!("from_pos + team * {tile}u"));
    if !kernel.whole {
        line!(b, "  let places = team * {}u;\n  var base = 0u;", 2 * tile);
        rows::store_places(b, kernel, teams, "base");
    }
    for p in 0..kernel.positions {
        for i in 0..together(kernel, key_fetch) {
            line!(b, "  var w{i}_{p} = k_fetch(k_place(next_{p}), {i}u);");
        }
        scale_words(b, kernel, p, "  var ");
    }
    line!(b, "  {}\n  {}", kernel.key.fill("k"), kernel.value.fill("v"));
    line!(b, "  for (var i = tid; i < {}u; i += WG) {{ low[i] = 0.0; }}", teams.count() * kernel.rows());
    b.push("  if (tid == 0u) { atomicStore(&large_seen, 0u); }");
}

/// What each query sees, and what tiles add to.
fn state(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams) {
    for j in 0..kernel.queries {
        line!(b, "  let pos{j} = first_pos + {j}u;");
        let low = if kernel.window { format!("max(first, oldest(pos{j}))") } else { "first".to_owned() };
        let high = if kernel.causal { format!("pos{j} + 1u") } else { "len".to_owned() };
        line!(b, "  let low{j} = {low};\n  let high{j} = select(0u, {high}, {j}u < queries);");
    }
    if kernel.bias {
        // Behind the queries, which are vectors of four.
        for r in 0..kernel.rows() {
            let row =
                format!("(token0 + {r}u / {0}u) * a.heads + kv_head * a.group + head0 + {r}u % {0}u", kernel.heads);
            line!(b, "  let at{r} = a.bias_off + min({row}, a.rows_of_q - 1u);");
            line!(b, "  let bias{r} = bitcast<f32>(q[at{r} >> 2u][at{r} & 3u]);");
        }
    }
    for r in 0..kernel.rows() {
        line!(b, "  var m{r} = NONE;\n  var l{r} = 0.0;");
        for x in 0..teams.chunk / 4 {
            line!(b, "  var o{r}_{x} = vec4(0.0);");
        }
    }
    if teams.count() > 1 {
        b.push("  var large = false;");
    }
    line!(b, "  let c = me % {0}u;\n  let lane_v = me / {0}u;", teams.chunks);
}

/// The loop over tiles.
fn tile(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, (key_fetch, value_fetch): (usize, usize)) {
    let (tile, tiles) = (teams.tile, kernel.tile());
    line!(b, "  for (var tile = from_pos + team * {tile}u; tile < to_pos; tile += {tiles}u) {{");
    if kernel.whole {
        b.push("    let here = next;");
    }
    for p in 0..kernel.positions {
        line!(b, "    let row_{p} = next_{p};");
    }
    rows::next_rows(b, kernel, teams, "    ", &format!("tile + {tiles}u"));
    for p in 0..kernel.positions {
        line!(b, "    let pos_{p} = tile + {}u + me;", p * teams.team);
        line!(b, "    let kf_{p} = kw_{p};\n    let vf_{p} = vw_{p};");
    }
    scores(b, kernel, teams, key_fetch);
    softmax(b, kernel, teams, kernel.value.format().scales_per_row().max(1));
    values(b, kernel, teams, value_fetch);
    if !kernel.whole {
        line!(b, "    base = {tile}u - base;");
    }
    b.push("  }");
}
