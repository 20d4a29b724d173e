//! The second pass: the splits of every row into one result.

use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::codec::key::Stored;
use crate::backend::wgpu::codec::tables;
use crate::backend::wgpu::kernel::Kernel;
use crate::backend::wgpu::wgsl::builder::{Builder, Source, THREADS, line};
use crate::backend::wgpu::wgsl::params::params;
use crate::backend::wgpu::wgsl::reduce::{main, reducer};
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::{Transform, flip};

/// The most splits of a context.
pub const MOST_SPLITS: usize = 1024;

/// Splits whose results a thread loads before it uses the first.
const LOADS: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct JoinKernel {
    pub value: Stored,
    pub out: Tensor,
    /// Whether results go back into the model's domain.
    pub restore: bool,
    pub sink_logits: bool,
    pub lse: bool,
    /// Whether the shift of the keys' channels has taken something from all scores.
    pub bias: bool,
}

params! {
    pub struct JoinParams {
        splits: u32,
        out_off: u32,
        sinks_off: u32,
        lse_off: u32,
        heads: u32,
        /// The first row of the dispatch.
        row_base: u32,
        /// The bits of -∞, which text cannot say.
        neg_inf: u32,
        bias_off: u32,
    }
}

impl Kernel for JoinKernel {
    type Params = JoinParams;
    const NAME: &'static str = "join";

    fn source(&self, caps: &Caps) -> Source {
        let row = self.value.format();
        let d = row.row_dim();
        let vectors = d / 4;
        let mut b = Builder::new(caps);
        b.params::<JoinParams>();
        b.storage("partial", "vec4<f32>", false);
        self.out.bind(&mut b, "out", true);
        if self.sink_logits {
            b.storage("sinks", "f32", false);
        }
        if self.lse {
            b.storage("lse", "f32", true);
        }
        if self.bias {
            b.storage("biases", "f32", false);
        }
        self.out.store(&mut b, "out");
        let transform = Transform::new(&row, caps).with_rows(1);
        if self.restore {
            tables::declare(&mut b, &self.value, "v");
            flip(&mut b, "flip", "v_tables");
            transform.declare(&mut b, 0);
        }
        let lanes = THREADS / vectors.min(THREADS);
        line!(b, "var<workgroup> lane_sums: array<vec4<f32>, {}>;", lanes * vectors);
        b.push("fn total(c: u32) -> vec4<f32> {\n  var sum = lane_sums[c];");
        line!(
            b,
            "  for (var k = 1u; k < {lanes}u; k++) {{ sum += lane_sums[k * {vectors}u + c]; }}\n  return sum;\n}}"
        );
        b.push("const NONE = -3e38;\nconst UNSEEN = -3.4e38;");
        line!(b, "var<workgroup> weight_of: array<f32, {MOST_SPLITS}>;");
        reducer(&mut b, caps, 1, THREADS);
        main(&mut b, caps);
        line!(b, "  let base = wg * a.splits;\n  let sums = a.groups * a.splits * {vectors}u + base;");
        if self.bias {
            b.push("  let bias = biases[a.bias_off + a.row_base + wg];");
        }
        self.weights(&mut b);
        sum(&mut b, vectors, lanes);
        b.push("  let none = l == 0.0;\n  let scale = 1.0 / select(l, 1.0, none);");
        let eight = |e: &str| format!("times8(Eight(total({e} >> 2u), total(({e} >> 2u) + 1u)), scale)");
        let to = format!("(a.row_base + wg) * {d}u + e");
        if self.restore {
            let unit = self.out.unit();
            transform.columns(&mut b, "1u", |_, e| eight(e));
            transform.rows(&mut b, "1u", unit, &format!("out_store({to}, flip{unit}(e, v));"));
        } else {
            line!(b, "  for (var e = 8u * tid; e < {d}u; e += 8u * WG) {{\n    let v = {};", eight("e"));
            line!(b, "    {}\n  }}", self.out.store_eight("out", &to, "v"));
        }
        if self.lse {
            b.push("  if (tid == 0u) {");
            let bias = if self.bias { " + bias" } else { "" };
            line!(
                b,
                "    let value = select(m + (low + log(select(l, 1.0, none))){bias}, bitcast<f32>(a.neg_inf), none);"
            );
            b.push("    lse[a.lse_off + a.row_base + wg] = value;\n  }");
        }
        b.push("}");
        b.finish()
    }
}

impl JoinKernel {
    /// The weights of the splits, their sum `l`, and the maximum, `m` + `low`: a thread a split.
    fn weights(&self, b: &mut Builder) {
        b.push("  var most = NONE;\n  var second = 0.0;\n  for (var i = tid; i < a.splits; i += WG) {");
        b.push("    let part = partial[sums + i];");
        b.push("    second = select(select(second, max(second, part.z), part.x == most), part.z, part.x > most);");
        b.push("    most = max(most, part.x);\n  }");
        b.push("  offer(0u, most, tid, false);\n  settle(tid, false);\n  let first = taken(0u, false);");
        b.push("  workgroupBarrier();\n  offer(0u, select(UNSEEN, second, most == first), tid, false);");
        b.push("  settle(tid, false);");
        b.push("  var m = first;\n  var low = taken(0u, false);");
        if self.sink_logits {
            let bias = if self.bias { " - bias" } else { "" };
            line!(b, "  let sink = sinks[a.sinks_off + (a.row_base + wg) % a.heads]{bias};");
            b.push("  low = select(select(low, max(low, 0.0), sink == m), 0.0, sink > m);\n  m = max(m, sink);");
        }
        b.push("  workgroupBarrier();\n  var l = 0.0;\n  for (var i = tid; i < a.splits; i += WG) {");
        b.push("    let part = partial[sums + i];\n    let weight = exp(keep(part.x - m) + (part.z - low));");
        // A split that saw nothing has written nothing: less than no weight.
        b.push("    l += part.y * weight;\n    weight_of[i] = select(weight, -1.0, part.x == NONE);\n  }");
        b.push("  offer(0u, l, tid, true);\n  settle(tid, true);\n  l = taken(0u, true);");
        if self.sink_logits {
            b.push("  let sink_weight = select(exp((sink - m) - low), 1.0, sink == m && low == 0.0);");
            // Bits are compared since a compiler may take for granted that there are no infinities.
            b.push("  l += select(sink_weight, 0.0, bitcast<u32>(sink) == a.neg_inf);");
        }
    }
}

/// The weighted sum of all splits into `lane_sums`.
fn sum(b: &mut Builder, vectors: usize, lanes: usize) {
    let columns = vectors.min(THREADS);
    line!(b, "  let lane = tid / {columns}u;\n  if (lane < {lanes}u) {{");
    line!(b, "    for (var c = tid % {columns}u; c < {vectors}u; c += {columns}u) {{\n      var sum = vec4(0.0);");
    line!(b, "      for (var i = lane; i < a.splits; i += {}u) {{", LOADS * lanes);
    // Several loads in flight; those past the end are of a split that is there, and weigh nothing.
    for k in 0..LOADS {
        line!(b, "        let i{k} = min(i + {}u, a.splits - 1u);", k * lanes);
        line!(b, "        let w{k} = select(-1.0, weight_of[i{k}], i + {}u < a.splits);", k * lanes);
        line!(b, "        let o{k} = partial[(base + i{k}) * {vectors}u + c];");
    }
    for k in 0..LOADS {
        line!(b, "        if (w{k} >= 0.0) {{ sum += w{k} * o{k}; }}");
    }
    b.push("      }");
    line!(b, "      lane_sums[lane * {vectors}u + c] = sum;\n    }}\n  }}\n  workgroupBarrier();");
}
