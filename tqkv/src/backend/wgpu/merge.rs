//! Partial attention results into one.

use super::recorder::{self, WgpuRecorder};
use super::wgsl::{Builder, Source, Tensor, line};
use super::{Caps, Slot};
use crate::compute::DType;
use crate::error::Result;
use crate::problem::op::Merge;

/// `tensors` are the parts and, last, the output.
pub(super) fn source(tensors: &[Tensor], lse: bool, caps: &Caps) -> Source {
    let (out, parts) = (tensors[tensors.len() - 1], &tensors[..tensors.len() - 1]);
    let mut b = Builder::new(caps);
    let mut fields = vec!["eights".to_owned(), "lse_off".to_owned(), "neg_inf".to_owned(), "out_off".to_owned()];
    for (i, part) in parts.iter().enumerate() {
        b.storage(&format!("part{i}"), part.element(), false);
        b.storage(&format!("lse{i}"), "f32", false);
        fields.extend([format!("part{i}_off"), format!("lse{i}_off")]);
    }
    b.storage("out", out.element(), true);
    if lse {
        b.storage("lse", "f32", true);
    }
    fields.push("rows".to_owned());
    b.params(&fields.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    parts.iter().enumerate().for_each(|(i, part)| part.load(&mut b, &format!("part{i}")));
    out.store(&mut b, "out");
    b.main();
    b.push("  let u = wg * WG + tid;\n  let r = u / a.eights;\n  if (r >= a.rows) { return; }\n  var most = bitcast<f32>(0xff7fffffu);");
    for i in 0..parts.len() {
        line!(b, "  let l{i} = lse{i}[a.lse{i}_off + r];\n  most = max(most, l{i});");
        // Bits are compared since a compiler may take for granted that there are no infinities.
        line!(b, "  let some{i} = bitcast<u32>(l{i}) != a.neg_inf;");
    }
    b.push("  var total = 0.0;\n  var sum = Eight(vec4(0.0), vec4(0.0));");
    for i in 0..parts.len() {
        // A part without positions, whose lse is -∞, may hold anything. One whose lse is ∞ weighs as much as the maximum.
        line!(b, "  let w{i} = select(exp(l{i} - most), 1.0, l{i} == most);\n  let v{i} = part{i}_load(8u * u);");
        line!(b, "  if (some{i}) {{\n    total += w{i};");
        line!(b, "    sum = Eight(sum.a + w{i} * v{i}.a, sum.b + w{i} * v{i}.b);\n  }}");
    }
    b.push("  let none = total == 0.0;\n  let d = select(total, 1.0, none);");
    b.push("  let v = Eight(sum.a / d, sum.b / d);");
    line!(b, "  {}", out.store_eight("out", "8u * u", "v"));
    if lse {
        b.push(
            "  if (u % a.eights == 0u) { lse[a.lse_off + r] = select(most + log(d), bitcast<f32>(a.neg_inf), none); }",
        );
    }
    b.push("}");
    b.finish()
}

pub(super) fn record(recorder: &mut WgpuRecorder, op: &Merge) -> Result<()> {
    let context = recorder.context.clone();
    let &[tokens, heads, d] = op.out.shape() else { unreachable!("checked by ops") };
    if !d.is_multiple_of(8) {
        return Err(context.unsupported(format!("merge vectors of {d} elements: expected a multiple of 8")));
    }
    let rows = tokens * heads;
    let mut parts = op
        .parts
        .iter()
        .map(|(o, l)| {
            let (o, tensor) = Slot::tensor(&context, "a part", o)?;
            Ok((o, tensor, Slot::new(&context, "a part's lse", l)?))
        })
        .collect::<Result<Vec<_>>>()?;
    let (out, out_tensor) = Slot::tensor(&context, "out", &op.out)?;
    let lse = op.lse.as_ref().map(|l| Slot::new(&context, "lse", l)).transpose()?;
    // As many parts at a time as bindings allow, and no more than drivers compile fast; those merged so far are one part more.
    let most = ((context.limits.max_storage_buffers_per_shader_stage as usize).saturating_sub(2) / 2).min(8);
    let mut turn = 0;
    while parts.len() > most.max(2) {
        let step = (rows * d * 4).next_multiple_of(256) as u64;
        let bytes = (rows * d * 4) as u64;
        let to = recorder.scratch(turn % 2, 0, bytes)?;
        let to_lse = recorder.scratch(turn % 2, step, (rows * 4).next_multiple_of(16) as u64)?;
        let rest = parts.split_off(most.max(2));
        let tensor = Tensor { dtype: DType::F32, wide: true };
        merge(recorder, &parts, &to, tensor, Some(&to_lse), rows, d)?;
        parts = rest;
        parts.insert(0, (to, tensor, to_lse));
        turn += 1;
    }
    merge(recorder, &parts, &out, out_tensor, lse.as_ref(), rows, d)
}

fn merge(
    recorder: &mut WgpuRecorder,
    parts: &[(Slot, Tensor, Slot)],
    out: &Slot,
    out_tensor: Tensor,
    lse: Option<&Slot>,
    rows: usize,
    d: usize,
) -> Result<()> {
    let context = recorder.context.clone();
    let tensors: Vec<_> = parts.iter().map(|p| p.1).chain([out_tensor]).collect();
    let mut fields = vec![(d / 8) as u32, lse.map_or(0, Slot::words), f32::NEG_INFINITY.to_bits(), out.words()];
    let mut slots = vec![];
    for (o, _, l) in parts {
        slots.extend([o.clone(), l.clone()]);
        fields.extend([o.words(), l.words()]);
    }
    fields.push(rows as u32);
    slots.push(out.clone());
    slots.extend(lse.cloned());
    let groups = (rows * d / 8).div_ceil(super::wgsl::THREADS);
    let spec = recorder::Spec::Merge(tensors.clone(), lse.is_some());
    recorder.dispatch(&spec, || source(&tensors, lse.is_some(), &context.caps), slots, groups, &fields, &[])
}
