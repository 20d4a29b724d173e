//! Adapters: enumerated, chosen, opened.

use super::caps::Caps;
use super::context::Context;
use super::driver::Wgpu;
use super::gpu::{Gpu, block_on};
use super::probe;
use super::recorder::CLOCK;
use super::wgsl::builder::THREADS;
use crate::compute::{DeviceInfo, DeviceKind};
use crate::error::{Error, Result};
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

/// The best GPU that opens, `None` if there is none. Software rasterisers do not count.
///
/// # Errors
/// That of the best GPU, if there are GPUs and none opens.
pub(crate) fn best() -> Result<Option<Wgpu>> {
    let adapters = adapters();
    let mut gpus: Vec<usize> = (0..adapters.len()).filter(|&i| rank(&adapters[i]) < 4).collect();
    gpus.sort_by_key(|&i| rank(&adapters[i]));
    let mut failure = None;
    for gpu in gpus {
        match open(Some(gpu)) {
            Ok(gpu) => return Ok(Some(gpu)),
            Err(reason) => failure = failure.or(Some(reason)),
        }
    }
    failure.map_or(Ok(None), Err)
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
    let features = wgpu::Features::SHADER_F16 | wgpu::Features::SUBGROUP | wgpu::Features::SUBGROUP_BARRIER | CLOCK;
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
        threads: THREADS,
        query_rows: if software { 4 } else { 16 },
        held: if software { 8192 } else { 1024 },
        ahead: if software { 2 } else { 8 },
    };
    let gpu = Gpu::new(device, queue, info, caps);
    let most = gpu.limits.max_compute_invocations_per_workgroup as usize;
    if most < THREADS {
        let what = format!("run {THREADS} threads: max_compute_invocations_per_workgroup is {most}");
        return Err(gpu.unsupported(what));
    }
    gpu.check()?;
    let context = Arc::new(Context::new(gpu));
    let (native_f16, shuffles_wrap, team) =
        (probe::converts_exactly(&context)?, probe::shuffles_wrap(&context)?, probe::team(&context)?);
    // Nobody else holds it yet.
    let mut context = Arc::try_unwrap(context).map_err(|c| c.gpu.failed("its first kernel is still running"))?;
    let caps = &mut context.gpu.caps;
    (caps.native_f16, caps.shuffles_wrap, caps.team) = (native_f16, shuffles_wrap, team);
    // On Metal kernels that take many registers have a limit of their own, which wgpu does not tell.
    if team > 0 && !software && adapter.backend != wgpu::Backend::Metal {
        caps.threads = most.clamp(THREADS, 512) / THREADS * THREADS;
    }
    Ok(Wgpu(Arc::new(context)))
}

pub(super) fn info(
    index: usize,
    info: &wgpu::AdapterInfo,
    limits: &wgpu::Limits,
    features: wgpu::Features,
) -> DeviceInfo {
    let yes = |f| if features.contains(f) { "yes" } else { "no" }.to_owned();
    let details = vec![
        ("api", format!("{:?}", info.backend)),
        ("type", format!("{:?}", info.device_type)),
        ("driver", format!("{} {}", info.driver, info.driver_info)),
        ("subgroups", format!("{} to {}", info.subgroup_min_size, info.subgroup_max_size)),
        ("f16", yes(wgpu::Features::SHADER_F16)),
        ("workgroup memory", format!("{} KiB", limits.max_compute_workgroup_storage_size >> 10)),
    ];
    DeviceInfo {
        is_gpu: info.device_type != wgpu::DeviceType::Cpu,
        largest_buffer_bytes: Some(limits.max_buffer_size),
        largest_binding_bytes: Some(limits.max_storage_buffer_binding_size),
        ..DeviceInfo::new(DeviceKind::Wgpu, format!("wgpu:{index}"), info.name.clone(), details)
    }
}
