//! Compiled kernels, each made once a device.

use super::gpu::{Gpu, lock};
use super::kernel::Kernel;
use super::wgsl::builder::{Access, Source};
use super::wgsl::params::Params;
use crate::error::{Error, Result};
use std::any::{Any, TypeId};
use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
    /// Stands for the pipeline in keys of bind groups.
    pub id: u64,
}

impl Pipeline {
    fn new(pipeline: wgpu::ComputePipeline, layout: wgpu::BindGroupLayout) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        Pipeline { pipeline, layout, id: IDS.fetch_add(1, Ordering::Relaxed) }
    }
}

#[derive(Default)]
pub(super) struct Pipelines {
    /// By type of kernel a map from kernels of that type.
    own: Mutex<HashMap<TypeId, Box<dyn Any + Send>>>,
    /// Callers' kernels by name, with their text.
    custom: Mutex<HashMap<String, (String, Arc<Pipeline>)>>,
}

impl Pipelines {
    pub fn get<K: Kernel>(&self, gpu: &Gpu, kernel: &K) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = lock(&self.own).get(&TypeId::of::<K>()).and_then(|m| map::<K>(m)?.get(kernel)) {
            return Ok(pipeline.clone());
        }
        let source = kernel.source(&gpu.caps);
        let buffers = source.bindings.iter().filter(|b| !matches!(b, Access::Uniform(_))).count();
        let most = gpu.limits.max_storage_buffers_per_shader_stage;
        if buffers > most as usize {
            let what = format!("bind {buffers} buffers to a kernel: max_storage_buffers_per_shader_stage is {most}");
            return Err(gpu.unsupported(what));
        }
        let compiled = gpu.guarded(|| compile::<K>(gpu, &source));
        gpu.check()?;
        let log = |e: wgpu::Error| Error::KernelCompile { name: K::NAME.to_owned(), log: e.to_string() };
        let pipeline = Arc::new(compiled.map_err(log)?);
        let mut own = lock(&self.own);
        let map = own.entry(TypeId::of::<K>()).or_insert_with(|| Box::new(HashMap::<K, Arc<Pipeline>>::new()));
        if let Some(map) = map.downcast_mut::<HashMap<K, Arc<Pipeline>>>() {
            map.insert(*kernel, pipeline.clone());
        }
        Ok(pipeline)
    }

    /// A caller's kernel: checked as written, its layout derived from it.
    pub fn custom(&self, gpu: &Gpu, name: &str, text: &str) -> Result<Arc<Pipeline>> {
        if let Some((own, pipeline)) = lock(&self.custom).get(name)
            && own == text
        {
            return Ok(pipeline.clone());
        }
        let compiled = gpu.guarded(|| {
            let source = wgpu::ShaderSource::Wgsl(text.into());
            let module = gpu.device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(name), source });
            let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(name),
                layout: None,
                module: &module,
                entry_point: Some("main"),
                compilation_options: Default::default(),
                cache: None,
            });
            let layout = pipeline.get_bind_group_layout(0);
            Pipeline::new(pipeline, layout)
        });
        gpu.check()?;
        let log = |e: wgpu::Error| Error::KernelCompile { name: name.to_owned(), log: e.to_string() };
        let pipeline = Arc::new(compiled.map_err(log)?);
        lock(&self.custom).insert(name.to_owned(), (text.to_owned(), pipeline.clone()));
        Ok(pipeline)
    }
}

fn map<K: Kernel>(map: &Box<dyn Any + Send>) -> Option<&HashMap<K, Arc<Pipeline>>> {
    map.downcast_ref()
}

/// Bytes of a kernel's parameters, as a uniform of its own.
pub(super) fn params_bytes<P: Params>() -> u64 {
    (size_of::<P>() as u64 + 8).next_multiple_of(16)
}

fn compile<K: Kernel>(gpu: &Gpu, source: &Source) -> Pipeline {
    let shader = wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl((&source.text).into()) };
    // SAFETY: `ops` has proved that every row, position and page that kernels compute lies within its buffer, their
    // loops count to bounds, and their divisors are constants or counts that are not zero.
    let module = unsafe { gpu.device.create_shader_module_trusted(shader, wgpu::ShaderRuntimeChecks::unchecked()) };
    let entry = |binding: usize, ty, has_dynamic_offset, bytes| wgpu::BindGroupLayoutEntry {
        binding: binding as u32,
        visibility: wgpu::ShaderStages::COMPUTE,
        // Known sizes spare a check at every dispatch.
        ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: NonZeroU64::new(bytes) },
        count: None,
    };
    let params = entry(0, wgpu::BufferBindingType::Uniform, true, params_bytes::<K::Params>());
    let others = source.bindings.iter().enumerate().map(|(i, access)| {
        let (ty, bytes) = match *access {
            Access::Read(bytes) => (wgpu::BufferBindingType::Storage { read_only: true }, bytes),
            Access::Write(bytes) => (wgpu::BufferBindingType::Storage { read_only: false }, bytes),
            Access::Uniform(bytes) => (wgpu::BufferBindingType::Uniform, bytes),
        };
        entry(i + 1, ty, false, bytes)
    });
    let entries: Vec<_> = std::iter::once(params).chain(others).collect();
    let layout =
        gpu.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
    let pipeline_layout = gpu.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: None,
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let pipeline = gpu.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: Some(&pipeline_layout),
        module: &module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: false,
            ..Default::default()
        },
        cache: None,
    });
    Pipeline::new(pipeline, layout)
}
