//! Partial attention results into one.

use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::commands::Commands;
use crate::backend::wgpu::kernel::Kernel;
use crate::backend::wgpu::slot::Slot;
use crate::backend::wgpu::wgsl::builder::{Builder, Source, THREADS, line};
use crate::backend::wgpu::wgsl::params::params;
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::error::Result;
use crate::format::DType;
use crate::problem::op::Merge;

/// The most parts of a dispatch: no more than drivers compile fast.
const PARTS: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct MergeKernel {
    pub parts: [Option<Tensor>; PARTS],
    pub out: Tensor,
    pub lse: bool,
}

params! {
    pub struct MergeParams {
        /// Runs of eight elements of a vector.
        eights: u32,
        rows: u32,
        /// The bits of -∞, which text cannot say.
        neg_inf: u32,
        out_off: u32,
        lse_off: u32,
        part0_off: u32,
        part1_off: u32,
        part2_off: u32,
        part3_off: u32,
        part4_off: u32,
        part5_off: u32,
        part6_off: u32,
        part7_off: u32,
        lse0_off: u32,
        lse1_off: u32,
        lse2_off: u32,
        lse3_off: u32,
        lse4_off: u32,
        lse5_off: u32,
        lse6_off: u32,
        lse7_off: u32,
    }
}

impl Kernel for MergeKernel {
    type Params = MergeParams;
    const NAME: &'static str = "merge";

    fn source(&self, caps: &Caps) -> Source {
        let parts = || self.parts.iter().flatten().enumerate();
        let mut b = Builder::new(caps);
        b.params::<MergeParams>();
        for (i, part) in parts() {
            part.bind(&mut b, &format!("part{i}"), false);
            b.storage(&format!("lse{i}"), "f32", false);
        }
        self.out.bind(&mut b, "out", true);
        if self.lse {
            b.storage("lse", "f32", true);
        }
        parts().for_each(|(i, part)| part.load(&mut b, &format!("part{i}")));
        self.out.store(&mut b, "out");
        b.main();
        b.push("  let u = wg * WG + tid;\n  let r = u / a.eights;\n  if (r >= a.rows) { return; }");
        b.push("  var most = bitcast<f32>(0xff7fffffu);");
        for (i, _) in parts() {
            line!(b, "  let l{i} = lse{i}[a.lse{i}_off + r];\n  most = max(most, l{i});");
            // Bits are compared since a compiler may take for granted that there are no infinities.
            line!(b, "  let some{i} = bitcast<u32>(l{i}) != a.neg_inf;");
        }
        b.push("  var total = 0.0;\n  var sum = Eight(vec4(0.0), vec4(0.0));");
        for (i, _) in parts() {
            // A part without positions, whose lse is -∞, may hold anything. One whose lse is ∞ weighs as much as the maximum.
            line!(b, "  let w{i} = select(exp(l{i} - most), 1.0, l{i} == most);\n  let v{i} = part{i}_load(8u * u);");
            line!(b, "  if (some{i}) {{\n    total += w{i};");
            line!(b, "    sum = Eight(sum.a + w{i} * v{i}.a, sum.b + w{i} * v{i}.b);\n  }}");
        }
        b.push("  let none = total == 0.0;\n  let d = select(total, 1.0, none);");
        b.push("  let v = Eight(sum.a / d, sum.b / d);");
        line!(b, "  {}", self.out.store_eight("out", "8u * u", "v"));
        if self.lse {
            b.push("  if (u % a.eights == 0u) {");
            b.push("    lse[a.lse_off + r] = select(most + log(d), bitcast<f32>(a.neg_inf), none);\n  }");
        }
        b.push("}");
        b.finish()
    }
}

/// A part: its vectors and their lse.
#[derive(Clone, Copy)]
struct Part<'a> {
    out: Slot<'a>,
    tensor: Tensor,
    lse: Slot<'a>,
}

pub fn record(commands: &mut Commands, op: &Merge) -> Result<()> {
    let context = commands.context.clone();
    let gpu = &context.gpu;
    let &[tokens, heads, d] = op.out.shape() else { unreachable!("checked by ops") };
    let (rows, eights) = (tokens * heads, d.div_ceil(8));
    let mut parts = vec![];
    for (o, l) in &op.parts {
        let (out, tensor) = Slot::tensor(gpu, "a part", o, 8 * eights)?;
        parts.push(Part { out, tensor, lse: Slot::new(gpu, "a part's lse", l)? });
    }
    let (out, out_tensor) = Slot::tensor(gpu, "out", &op.out, 8 * eights)?;
    let lse = op.lse.as_ref().map(|l| Slot::new(gpu, "lse", l)).transpose()?;
    // As many parts at a time as bindings allow; those merged so far are one part more.
    let most = ((gpu.limits.max_storage_buffers_per_shader_stage as usize).saturating_sub(2) / 2).clamp(2, PARTS);
    if parts.len() <= most {
        return merge(commands, &parts, &out, out_tensor, lse.as_ref(), (rows, eights));
    }
    let vectors = (rows * eights * 32) as u64;
    let step = vectors.next_multiple_of(256);
    let scratch = [0, 1].map(|i| commands.scratch(i, step + (rows * 4).next_multiple_of(16) as u64));
    let [first, second] = scratch;
    let scratch = [first?, second?];
    let between = |turn: usize| Part {
        out: Slot { memory: &scratch[turn % 2], offset: 0, size: vectors, rest: 0 },
        tensor: Tensor::new(DType::F32, true, 8 * eights, 8 * eights),
        lse: Slot { memory: &scratch[turn % 2], offset: step, size: (rows * 4).next_multiple_of(16) as u64, rest: 0 },
    };
    let (now, mut rest) = parts.split_at(most);
    let mut now = now.to_vec();
    let mut turn = 0;
    loop {
        if rest.is_empty() {
            return merge(commands, &now, &out, out_tensor, lse.as_ref(), (rows, eights));
        }
        let to = between(turn);
        merge(commands, &now, &to.out, to.tensor, Some(&to.lse), (rows, eights))?;
        let (next, others) = rest.split_at(rest.len().min(most - 1));
        now = std::iter::once(to).chain(next.iter().copied()).collect();
        rest = others;
        turn += 1;
    }
}

fn merge(
    commands: &mut Commands,
    parts: &[Part],
    out: &Slot,
    out_tensor: Tensor,
    lse: Option<&Slot>,
    (rows, eights): (usize, usize),
) -> Result<()> {
    let of = |i: usize| parts.get(i);
    let kernel =
        MergeKernel { parts: std::array::from_fn(|i| of(i).map(|p| p.tensor)), out: out_tensor, lse: lse.is_some() };
    let [part, part_lse] = [|p: &Part| p.out.words(), |p: &Part| p.lse.words()]
        .map(|words| std::array::from_fn::<u32, PARTS, _>(|i| of(i).map_or(0, words)));
    let params = MergeParams {
        eights: eights as u32,
        rows: rows as u32,
        neg_inf: f32::NEG_INFINITY.to_bits(),
        out_off: out.words(),
        lse_off: lse.map_or(0, Slot::words),
        part0_off: part[0],
        part1_off: part[1],
        part2_off: part[2],
        part3_off: part[3],
        part4_off: part[4],
        part5_off: part[5],
        part6_off: part[6],
        part7_off: part[7],
        lse0_off: part_lse[0],
        lse1_off: part_lse[1],
        lse2_off: part_lse[2],
        lse3_off: part_lse[3],
        lse4_off: part_lse[4],
        lse5_off: part_lse[5],
        lse6_off: part_lse[6],
        lse7_off: part_lse[7],
    };
    let slots: Vec<Slot> = parts.iter().flat_map(|p| [p.out, p.lse]).chain([*out]).chain(lse.copied()).collect();
    commands.dispatch(&kernel, &slots, (rows * eights).div_ceil(THREADS), &params)
}
