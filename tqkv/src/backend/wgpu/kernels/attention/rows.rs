//! Where rows are: of queries, of the cache, of results.

use super::kernel::AttentionKernel;
use super::teams::Teams;
use crate::backend::wgpu::wgsl::builder::{Builder, line};

/// Declares `query_load`, which gives zeros for a row that is none, and `row_at`, the pool's row of a position.
pub fn declare(b: &mut Builder, kernel: &AttentionKernel, unit: f32) {
    let d = kernel.key.format().row_dim();
    b.push("fn query_load(token0: u32, queries: u32, kv_head: u32, head0: u32, r: u32, e: u32) -> Eight {");
    line!(b, "  let j = r / {0}u;\n  let h = head0 + r % {0}u;", kernel.heads);
    b.push("  if (j >= queries || h >= a.group) { return Eight(vec4(0.0), vec4(0.0)); }");
    let load = format!("q_load(((token0 + j) * a.heads + kv_head * a.group + h) * {d}u + e)");
    match unit {
        1.0 => line!(b, "  return {load};\n}}"),
        _ => line!(b, "  return times8({load}, {:?});\n}}", 1.0 / unit),
    }
    let slot = if kernel.ring { "position % a.slots" } else { "position" };
    let (page, place) = match kernel.page_bits {
        Some(bits) => (format!("slot >> {bits}u"), format!("slot & {}u", (1u32 << bits) - 1)),
        None => ("slot / a.page_size".to_owned(), "slot % a.page_size".to_owned()),
    };
    line!(b, "fn row_at(table_base: u32, kv_head: u32, position: u32) -> u32 {{\n  let slot = {slot};");
    line!(b, "  let page = table[a.table_off + table_base + ({page})];");
    line!(b, "  return (page * a.kv_heads + kv_head) * a.page_size + ({place});\n}}");
}

/// Whether the workgroup's row `r` is one of its queries and heads.
pub fn exists(kernel: &AttentionKernel, r: &str) -> String {
    format!("{r} / {0}u < queries && head0 + {r} % {0}u < a.group", kernel.heads)
}

/// Where its results go.
pub fn row_out(kernel: &AttentionKernel, r: &str) -> String {
    format!("((token0 - a.token_base + {r} / {0}u) * a.heads + kv_head * a.group + head0 + {r} % {0}u)", kernel.heads)
}

/// `next_{p}`: the rows of the thread's positions of the tile at `tile`. Where a tile's rows lie one after the other, `next` is the
/// first.
pub fn next_rows(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, before: &str, tile: &str) {
    if kernel.whole {
        let last = format!("(to_pos - 1u) / {0}u * {0}u", teams.tile);
        line!(b, "{before}next = row_at(table_base, kv_head, min({tile}, {last}));");
    }
    for p in 0..kernel.positions {
        let i = p * teams.team;
        let row = match kernel.whole {
            true => format!("next + {i}u + me"),
            false => format!("row_at(table_base, kv_head, min({tile} + {i}u + me, to_pos - 1u))"),
        };
        line!(b, "{before}next_{p} = {row};");
    }
}

/// Where the values of the thread's next positions are, into `row_of`, from `base` on.
pub fn store_places(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, base: &str) {
    for p in 0..kernel.positions {
        line!(b, "    row_of[places + {base} + {}u + me] = v_place(next_{p});", p * teams.team);
    }
}
