//! What a device's arithmetic and subgroups can do: tried, since no feature tells.

use super::caps::Caps;
use super::commands::Commands;
use super::context::Context;
use super::kernel::Kernel;
use super::slot::Slot;
use super::wgsl::builder::{Builder, Source, THREADS};
use super::wgsl::params::params;
use crate::error::Result;
use half::f16;
use std::sync::Arc;

/// Whether the device's conversions between f32 and f16 are those of IEEE 754: GPUs may round otherwise and may flush
/// subnormals.
pub(super) fn converts_exactly(context: &Arc<Context>) -> Result<bool> {
    // Every seventh half, and what lies between it and the next: the middle and its neighbours.
    let halves: Vec<u16> = (0..=u16::MAX).step_by(7).filter(|&h| !f16::from_bits(h).is_nan()).collect();
    let mut words = vec![];
    for (i, &h) in halves.iter().enumerate() {
        let (low, high) = (f16::from_bits(h).to_f32(), f16::from_bits(h.wrapping_add(1)).to_f32());
        let middle = if high.is_finite() { 0.5 * (low + high) } else { 65520f32.copysign(low) };
        let near = f32::from_bits(middle.to_bits().wrapping_add_signed(i as i32 % 3 - 1));
        words.extend([h as u32 | (!h as u32) << 16, middle.to_bits(), near.to_bits()]);
    }
    words.resize(words.len().next_multiple_of(3 * THREADS), 0);
    let got = probe(context, Probe(include_str!("probes/f16.wgsl")), &words, words.len() / 3)?;
    Ok(words.chunks(3).zip(got.chunks(3)).all(|(w, g)| {
        let half = |bits: u32| f16::from_bits(bits as u16);
        let same = |f: f16, got: u32| f.is_nan() || f.to_f32().to_bits() == got;
        let packed = |bits: u32| f16::from_f32(f32::from_bits(bits)).to_bits() as u32;
        same(half(w[0]), g[0]) && same(half(w[0] >> 16), g[1]) && packed(w[1]) | packed(w[2]) << 16 == g[2]
    }))
}

/// Whether a shuffle takes only the low bits of a lane's number, as hardware does and no standard says.
pub(super) fn shuffles_wrap(context: &Arc<Context>) -> Result<bool> {
    let lanes = context.gpu.caps.subgroup as u32;
    if lanes == 0 {
        return Ok(false);
    }
    let words: Vec<u32> = (0..64 * THREADS as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    let got = probe(context, Probe(include_str!("probes/wraps.wgsl")), &words, words.len())?;
    Ok(words.iter().zip(&got).all(|(w, &g)| g == w & (lanes - 1)))
}

/// The threads of a subgroup that can work by itself: its size is known, and its barrier orders what it does in the workgroup's
/// memory, as hardware's do and no standard says. 0: none can.
pub(super) fn team(context: &Arc<Context>) -> Result<usize> {
    let adapter = context.gpu.device.adapter_info();
    let lanes = context.gpu.caps.subgroup;
    let known = lanes > 0 && adapter.subgroup_min_size == adapter.subgroup_max_size;
    if !known || lanes > THREADS || !context.gpu.device.features().contains(wgpu::Features::SUBGROUP_BARRIER) {
        return Ok(0);
    }
    let mut words: Vec<u32> = (0..64 * THREADS as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    let got = probe(context, Probe(include_str!("probes/team.wgsl")), &words, words.len())?;
    for team in words.chunks_mut(lanes) {
        for k in 0..16 {
            let held = team.to_vec();
            for (lane, v) in team.iter_mut().enumerate() {
                *v = v.wrapping_mul(3).wrapping_add(held[(lane + k) % lanes]);
            }
        }
    }
    Ok(if got == words { lanes } else { 0 })
}

/// A kernel's text, which makes `y` of `x`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Probe(&'static str);

params! {
    struct ProbeParams {}
}

impl Kernel for Probe {
    type Params = ProbeParams;
    const NAME: &'static str = "probe";

    fn source(&self, _: &Caps) -> Source {
        let mut b = Builder::new(&Caps::default());
        b.params::<ProbeParams>();
        b.storage("x", "u32", false);
        b.storage("y", "u32", true);
        b.push(self.0);
        b.finish()
    }
}

/// What a kernel makes of some words.
fn probe(context: &Arc<Context>, kernel: Probe, words: &[u32], threads: usize) -> Result<Vec<u32>> {
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let memory = || context.create((4 * words.len() as u64).next_multiple_of(16), usage);
    let (x, y) = (memory()?, memory()?);
    context.gpu.write(&x.buffer, 0, bytemuck::cast_slice(words))?;
    let mut commands = Commands::new(context);
    let slots = [Slot::whole(&x), Slot::whole(&y)];
    commands.dispatch(&kernel, &slots, threads / THREADS, &ProbeParams {})?;
    context.gpu.wait(Some(commands.submit(|_, _| {})?))?;
    let mut got = vec![0u32; words.len()];
    context.gpu.read(&y.buffer, 0, bytemuck::cast_slice_mut(&mut got))?;
    Ok(got)
}
