//! The running maximum and the weights of a tile.

use super::kernel::AttentionKernel;
use super::rows::store_places;
use super::teams::Teams;
use crate::backend::wgpu::wgsl::builder::{Builder, line};

/// A subgroup's running maximum may be exceeded by so much: weights are up to exp(8) then, and none the less exact.
const LAG: f32 = 8.0;

/// The running maximum, and the weight of the thread's positions for every row: zero where one is not seen. The factor of
/// the value is in the weight, so that what an unseen row holds, NaN too, is never added.
pub fn softmax(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, scales: usize) {
    let (rows, positions) = (kernel.rows(), kernel.positions);
    let Teams { fours, tile, team, .. } = *teams;
    for r in 0..rows {
        let larger = |most: String, p| format!("max({most}, h{r}_{p})");
        line!(b, "    let most{r} = {};", (1..positions).fold(format!("h{r}_0"), larger));
    }
    // In most tiles none grows.
    if teams.count() > 1 {
        let above: Vec<_> = (0..rows).map(|r| format!("most{r} - m{r} > {LAG:?}")).collect();
        line!(b, "    if (subgroupAny({} || large)) {{", above.join(" || "));
        for r in 0..rows {
            line!(b, "    let n{r} = max(m{r}, subgroupMax(most{r}));");
        }
        b.push("    large = subgroupAny(large);");
        second_floats(b, kernel, teams, "large");
    } else {
        for r in 0..rows {
            line!(b, "    offer({r}u, most{r}, tid, false);");
        }
        b.push("    settle(tid, false);");
        for r in 0..rows {
            line!(b, "    let n{r} = max(m{r}, taken({r}u, false));");
        }
        b.push("    let large = atomicLoad(&large_seen) != 0u;");
        second_floats(b, kernel, teams, "large");
        let grown: Vec<_> = (0..rows).map(|r| format!("n{r} > m{r}")).collect();
        line!(b, "    if ({} || large) {{", grown.join(" || "));
    }
    for r in 0..rows {
        shrink(b, r, teams.chunk);
    }
    b.push("    }");
    for (r, p) in (0..rows).flat_map(|r| (0..positions).map(move |p| (r, p))) {
        line!(b, "    let p{r}_{p} = exp((h{r}_{p} - m{r}) + e{r}_{p});\n    l{r} += p{r}_{p};");
    }
    if teams.count() > 1 {
        // All threads have read the last tile's weights.
        line!(b, "    {}", teams.barrier());
    }
    if !kernel.whole {
        store_places(b, kernel, teams, &format!("{tile}u - base"));
    }
    let rotated = kernel.value.format().is_rotated();
    for p in 0..positions {
        for s in 0..scales {
            if rotated {
                let word = if scales > 1 { format!("v_scale(row_{p}, {s}u)") } else { format!("vf_{p}") };
                line!(b, "    let f{s}_{p} = v_factor({word}, row_{p});");
                for j in 0..kernel.queries {
                    line!(b, "    let f{s}_{p}_{j} = select(0.0, f{s}_{p}, ok{j}_{p});");
                }
            }
            for four in 0..fours {
                let weight = |r: usize| match rotated {
                    _ if r >= rows => "0.0".to_owned(),
                    true => format!("p{r}_{p} * f{s}_{p}_{}", r / kernel.heads),
                    // A float that is not seen may be anything: less than no weight.
                    false => format!("select(-1.0, p{r}_{p}, ok{}_{p})", r / kernel.heads),
                };
                let four_weights: Vec<_> = (4 * four..4 * four + 4).map(weight).collect();
                let at = format!("weights + ({}u + me) * {fours}u + {four}u", s * tile + p * team);
                line!(b, "    held[{at}] = vec4({});", four_weights.join(", "));
            }
        }
    }
    line!(b, "    {}", teams.barrier());
}

/// The second floats of the maxima `n{r}` into `low`, where scores are large: the largest of those whose first float is the
/// maximum. `below{r}` is by how much the old one was larger, and scores lose the new one.
fn second_floats(b: &mut Builder, kernel: &AttentionKernel, teams: &Teams, large: &str) {
    let (rows, positions) = (kernel.rows(), kernel.positions);
    let teams = teams.count() > 1;
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

/// Row r's maximum becomes `n{r}`, whose second float is `below{r}` less than the old one's.
pub fn shrink(b: &mut Builder, r: usize, chunk: usize) {
    line!(b, "  let shrink{r} = exp(keep(m{r} - n{r}) + below{r});\n  m{r} = n{r};\n  l{r} *= shrink{r};");
    for x in 0..chunk / 4 {
        line!(b, "  o{r}_{x} *= shrink{r};");
    }
}
