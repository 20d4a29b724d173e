//! Sums of weighted values.

use super::kernel::AttentionKernel;
use super::teams::Teams;
use crate::backend::wgpu::wgsl::builder::{Builder, line};

/// Loads `depth` positions' values of the thread, turn number `turn`: of the tile whose first row is `base`, or whose places are in
/// `row_of` from `base` on.
pub fn fetch_values(
    b: &mut Builder,
    kernel: &AttentionKernel,
    teams: &Teams,
    fetch: usize,
    to: &str,
    base: &str,
    turn: &str,
) {
    let Teams { tile, lanes, depth, .. } = *teams;
    let fetches = teams.chunk / fetch;
    for k in 0..depth {
        let at = format!("{turn} * {}u + {}u + lane_v", depth * lanes, k * lanes);
        let at = if teams.even() { at } else { format!("min({at}, {}u)", tile - 1) };
        let place = match kernel.whole {
            true => format!("v_place({base} + {at})"),
            false => format!("row_of[places + {base} + {at}]"),
        };
        for f in 0..fetches {
            line!(b, "{to}{k}_{f} = v_fetch({place}, c * {fetches}u + {f}u);");
        }
    }
}

/// Adds the tile's weighted values to `o{r}_{x}`; each turn's values have been loaded a turn before.
pub fn values(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, fetch: usize) {
    let rows = kernel.rows();
    let Teams { tile, chunk, lanes, depth, fours, .. } = *teams;
    let turns = tile.div_ceil(lanes * depth);
    let rotated = kernel.value.format().is_rotated();
    let nothing = if rotated { "0.0" } else { "-1.0" };
    let fetches = chunk / fetch;
    line!(b, "    for (var turn = 0u; turn < {turns}u; turn++) {{");
    line!(b, "      let over = turn == {}u;", turns - 1);
    let (now, then) = if kernel.whole { ("here", "next".to_owned()) } else { ("base", format!("{tile}u - base")) };
    line!(b, "      let begin = select({now}, {then}, over);\n      let after = select(turn + 1u, 0u, over);");
    fetch_values(b, kernel, teams, fetch, "      let u", "begin", "after");
    for k in 0..depth {
        b.push("      {");
        for x in 0..chunk / 4 {
            let per_fetch = fetch / 4;
            let value =
                kernel.value.elements().value(&kernel.value, "v", &format!("v{k}_{}", x / per_fetch), x % per_fetch);
            line!(b, "        let x{x} = {value};");
        }
        let i = format!("turn * {}u + {}u + lane_v", depth * lanes, k * lanes);
        line!(b, "        let i = {i};");
        let scale = kernel.value.scale_of("c", chunk);
        for four in 0..fours {
            let at = |i: &str| format!("held[weights + (({scale}) * {tile}u + {i}) * {fours}u + {four}u]");
            match teams.even() {
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
