//! Adapters: enumerated, chosen, opened.

use super::context::{Context, block_on};
use super::recorder::{Spec, WgpuRecorder};
use super::{Caps, Slot, Target, Wgpu, buffer_of};
use crate::compute::driver::Driver;
use crate::compute::driver::Recorder;
use crate::compute::{DeviceInfo, DeviceKind};
use crate::error::{Error, Result};
use half::f16;
use std::sync::Arc;

/// Every adapter of this machine's Metal, Vulkan and DX12 drivers, in their order: `wgpu:N` is the N-th.
fn adapters() -> Vec<wgpu::Adapter> {
    let backends = wgpu::Backends::METAL | wgpu::Backends::VULKAN | wgpu::Backends::DX12;
    let descriptor = wgpu::InstanceDescriptor {
        backends,
        // Validation of the driver's own layers is asked for by WGPU_VALIDATION=1.
        flags: wgpu::InstanceFlags::empty().with_env(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    };
    block_on(wgpu::Instance::new(descriptor).enumerate_adapters(backends))
}

/// Real GPUs before software, discrete before integrated.
fn rank(adapter: &wgpu::Adapter) -> usize {
    match adapter.get_info().device_type {
        wgpu::DeviceType::DiscreteGpu => 0,
        wgpu::DeviceType::IntegratedGpu => 1,
        wgpu::DeviceType::VirtualGpu => 2,
        wgpu::DeviceType::Other => 3,
        wgpu::DeviceType::Cpu => 4,
    }
}

/// Opens adapter `index`, or the best.
pub(crate) fn open(index: Option<usize>) -> Result<Wgpu> {
    let mut adapters = adapters();
    let found = adapters.len();
    let index = match index {
        Some(index) => index,
        None => (0..found).min_by_key(|&i| rank(&adapters[i])).unwrap_or(0),
    };
    if index >= found {
        let reason = match found {
            0 => "no Metal, Vulkan or DX12 driver was found".to_owned(),
            n => format!("expected a number under {n}"),
        };
        return Err(Error::DeviceUnavailable { device: format!("wgpu:{index}"), reason });
    }
    let adapter = adapters.swap_remove(index);
    let info = info(index, &adapter.get_info(), &adapter.limits(), adapter.features());
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("tqkv"),
        required_features: wanted(&adapter) & adapter.features(),
        required_limits: adapter.limits(),
        ..Default::default()
    };
    let (device, queue) = block_on(adapter.request_device(&descriptor))
        .map_err(|e| Error::DeviceUnavailable { device: info.id.clone(), reason: e.to_string() })?;
    wrap(device, queue, info)
}

/// A GPU that is no software rasteriser, if there is one that works.
pub(crate) fn best() -> Option<Wgpu> {
    let adapters = adapters();
    let index = (0..adapters.len()).filter(|&i| rank(&adapters[i]) < 4).min_by_key(|&i| rank(&adapters[i]))?;
    open(Some(index)).ok()
}

/// What `Device::list` shows.
pub(crate) fn list() -> Vec<Result<DeviceInfo>> {
    let adapters = adapters();
    if adapters.is_empty() {
        let reason = "no Metal, Vulkan or DX12 driver was found".to_owned();
        return vec![Err(Error::DeviceUnavailable { device: "wgpu".to_owned(), reason })];
    }
    let one = |(i, a): (usize, &wgpu::Adapter)| Ok(info(i, &a.get_info(), &a.limits(), a.features()));
    adapters.iter().enumerate().map(one).collect()
}

fn wanted(adapter: &wgpu::Adapter) -> wgpu::Features {
    let features = wgpu::Features::SHADER_F16
        | wgpu::Features::SUBGROUP
        | wgpu::Features::SUBGROUP_BARRIER
        | super::recorder::CLOCK;
    match adapter.get_info().device_type {
        wgpu::DeviceType::IntegratedGpu | wgpu::DeviceType::Cpu => features | wgpu::Features::MAPPABLE_PRIMARY_BUFFERS,
        _ => features,
    }
}

/// Makes a backend of a device: finds out what its arithmetic can do.
pub(super) fn wrap(device: wgpu::Device, queue: wgpu::Queue, info: DeviceInfo) -> Result<Wgpu> {
    let adapter = device.adapter_info();
    let software = adapter.device_type == wgpu::DeviceType::Cpu;
    let subgroups = device.features().contains(wgpu::Features::SUBGROUP)
        && adapter.subgroup_min_size >= 4
        && std::env::var_os("TQKV_WGPU_NO_SUBGROUPS").is_none();
    let caps = Caps {
        native_f16: false,
        subgroup: if subgroups { adapter.subgroup_min_size as usize } else { 0 },
        shuffles_wrap: false,
        team: 0,
        busy: if software { 16 } else { 528 },
        threads: super::wgsl::THREADS,
        query_rows: if software { 4 } else { 16 },
        held: if software { 8192 } else { 1024 },
        ahead: if software { 2 } else { 8 },
    };
    let context = Context::new(device, queue, info, caps);
    let threads = super::wgsl::THREADS as u32;
    if context.limits.max_compute_invocations_per_workgroup < threads {
        let most = context.limits.max_compute_invocations_per_workgroup;
        return Err(
            context.unsupported(format!("run {threads} threads: max_compute_invocations_per_workgroup is {most}"))
        );
    }
    context.check()?;
    let context = Arc::new(context);
    let (native_f16, shuffles_wrap, team) = (converts_exactly(&context)?, shuffles_wrap(&context)?, team(&context)?);
    // Nobody else holds it yet.
    let mut context = Arc::try_unwrap(context).map_err(|c| c.failed("its first kernel is still running"))?;
    let caps = &mut context.caps;
    (caps.native_f16, caps.shuffles_wrap, caps.team) = (native_f16, shuffles_wrap, team);
    // On Metal kernels that take many registers have a limit of their own, which wgpu does not tell.
    if team > 0 && !software && adapter.backend != wgpu::Backend::Metal {
        let most = context.limits.max_compute_invocations_per_workgroup as usize;
        context.caps.threads = most.clamp(super::wgsl::THREADS, 512) / super::wgsl::THREADS * super::wgsl::THREADS;
    }
    Ok(Wgpu(Arc::new(context)))
}

/// Whether the device's conversions between f32 and f16 are those of IEEE 754: GPUs may round otherwise and may flush
/// subnormals.
fn converts_exactly(context: &Arc<Context>) -> Result<bool> {
    // Every seventh half, and what lies between it and the next: the middle and its neighbours.
    let halves: Vec<u16> = (0..=u16::MAX).step_by(7).filter(|&h| !f16::from_bits(h).is_nan()).collect();
    let mut words = vec![];
    for (i, &h) in halves.iter().enumerate() {
        let (low, high) = (f16::from_bits(h).to_f32(), f16::from_bits(h.wrapping_add(1)).to_f32());
        let middle = if high.is_finite() { 0.5 * (low + high) } else { 65520f32.copysign(low) };
        let near = f32::from_bits(middle.to_bits().wrapping_add_signed(i as i32 % 3 - 1));
        words.extend([h as u32 | (!h as u32) << 16, middle.to_bits(), near.to_bits()]);
    }
    words.resize(words.len().next_multiple_of(3 * super::wgsl::THREADS), 0);
    let got = probe(context, include_str!("probe.wgsl"), &words, words.len() / 3)?;
    Ok(words.chunks(3).zip(got.chunks(3)).all(|(w, g)| {
        let half = |bits: u32| f16::from_bits(bits as u16);
        let same = |f: f16, got: u32| f.is_nan() || f.to_f32().to_bits() == got;
        let packed = |bits: u32| f16::from_f32(f32::from_bits(bits)).to_bits() as u32;
        same(half(w[0]), g[0]) && same(half(w[0] >> 16), g[1]) && packed(w[1]) | packed(w[2]) << 16 == g[2]
    }))
}

/// Whether a shuffle takes only the low bits of a lane's number, as hardware does and no standard says.
fn shuffles_wrap(context: &Arc<Context>) -> Result<bool> {
    let lanes = context.caps.subgroup as u32;
    if lanes == 0 {
        return Ok(false);
    }
    let words: Vec<u32> = (0..64 * super::wgsl::THREADS as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    let got = probe(context, include_str!("wraps.wgsl"), &words, words.len())?;
    Ok(words.iter().zip(&got).all(|(w, &g)| g == w & (lanes - 1)))
}

/// The threads of a subgroup that can work by itself: its size is known, and its barrier orders what it does in the workgroup's
/// memory, as hardware's do and no standard says. 0: none can.
fn team(context: &Arc<Context>) -> Result<usize> {
    let adapter = context.device.adapter_info();
    let lanes = context.caps.subgroup;
    let known = lanes > 0 && adapter.subgroup_min_size == adapter.subgroup_max_size;
    if !known || lanes > super::wgsl::THREADS || !context.device.features().contains(wgpu::Features::SUBGROUP_BARRIER) {
        return Ok(0);
    }
    let mut words: Vec<u32> = (0..64 * super::wgsl::THREADS as u32).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    let got = probe(context, include_str!("team.wgsl"), &words, words.len())?;
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

/// What a kernel makes of some words, which it calls `x` and `y`.
fn probe(context: &Arc<Context>, text: &'static str, words: &[u32], threads: usize) -> Result<Vec<u32>> {
    let backend = Wgpu(context.clone());
    let buffer = || backend.alloc(4 * words.len()).and_then(|memory| buffer_of(&*memory).cloned());
    let (x, y) = (buffer()?, buffer()?);
    context.write(&x, 0, bytemuck::cast_slice(words))?;
    let slot = |b: &wgpu::Buffer| Slot { target: Target::Buffer(b.clone()), offset: 0, size: b.size(), rest: 0 };
    let mut recorder = WgpuRecorder::new(context);
    let source = || {
        let mut b = super::wgsl::Builder::new(&Caps::default());
        b.storage("x", "u32", false);
        b.storage("y", "u32", true);
        b.params(&[], &[]);
        b.push(text);
        b.finish()
    };
    let groups = threads / super::wgsl::THREADS;
    recorder.dispatch(&Spec::Probe(text), source, vec![slot(&x), slot(&y)], groups, &[], &[])?;
    Box::new(recorder).submit()?.wait()?;
    let mut got = vec![0u32; words.len()];
    context.read(&y, 0, bytemuck::cast_slice_mut(&mut got))?;
    Ok(got)
}

pub(super) fn info(
    index: usize,
    info: &wgpu::AdapterInfo,
    limits: &wgpu::Limits,
    features: wgpu::Features,
) -> DeviceInfo {
    let yes = |f| if features.contains(f) { "yes" } else { "no" }.to_owned();
    DeviceInfo {
        kind: DeviceKind::Wgpu,
        id: format!("wgpu:{index}"),
        name: info.name.clone(),
        details: vec![
            ("api", format!("{:?}", info.backend)),
            ("type", format!("{:?}", info.device_type)),
            ("driver", format!("{} {}", info.driver, info.driver_info)),
            ("subgroups", format!("{} to {}", info.subgroup_min_size, info.subgroup_max_size)),
            ("f16", yes(wgpu::Features::SHADER_F16)),
            ("largest binding", limits.max_storage_buffer_binding_size.to_string()),
            ("largest buffer", limits.max_buffer_size.to_string()),
            ("workgroup memory", limits.max_compute_workgroup_storage_size.to_string()),
        ],
    }
}
