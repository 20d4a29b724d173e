//! A device, its queue, and what they share: compiled kernels, memory that is used again, and what has gone wrong.

use super::wgsl::Source;
use super::{Caps, recorder::Spec};
use crate::compute::DeviceInfo;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

pub(super) struct Context {
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    pub limits: wgpu::Limits,
    pub info: DeviceInfo,
    pub caps: Caps,
    pipelines: Mutex<HashMap<Spec, Arc<Pipeline>>>,
    /// Held while a submission writes its data and is handed over, so that submissions can share the memory.
    pub shared: Mutex<Shared>,
    staging: Mutex<Option<wgpu::Buffer>>,
    trouble: Arc<Mutex<Trouble>>,
}

#[derive(Default)]
pub(super) struct Shared {
    pub arena: Option<wgpu::Buffer>,
    pub scratch: [Option<wgpu::Buffer>; 2],
}

/// What the device has reported outside of any call.
#[derive(Default)]
struct Trouble {
    lost: Option<String>,
    told: bool,
    errors: Vec<String>,
}

pub(super) struct Pipeline {
    pub pipeline: wgpu::ComputePipeline,
    pub layout: wgpu::BindGroupLayout,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|e| e.into_inner())
}

/// Futures of native wgpu are ready as soon as the device has been polled.
pub(super) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(value) => return value,
            std::task::Poll::Pending => std::thread::yield_now(),
        }
    }
}

impl Context {
    pub fn new(device: wgpu::Device, queue: wgpu::Queue, info: DeviceInfo, caps: Caps) -> Self {
        let trouble = Arc::new(Mutex::new(Trouble::default()));
        let seen = trouble.clone();
        device.set_device_lost_callback(move |reason, message| {
            lock(&seen).lost.get_or_insert_with(|| format!("{reason:?}: {message}"));
        });
        let seen = trouble.clone();
        device.on_uncaptured_error(Arc::new(move |error: wgpu::Error| lock(&seen).errors.push(error.to_string())));
        Context {
            limits: device.limits(),
            device,
            queue,
            info,
            caps,
            pipelines: Mutex::default(),
            shared: Mutex::default(),
            staging: Mutex::default(),
            trouble,
        }
    }

    pub fn failed(&self, reason: impl Into<String>) -> Error {
        Error::DeviceFailed { device: self.info.id.clone(), reason: reason.into() }
    }

    pub fn unsupported(&self, what: String) -> Error {
        Error::Unsupported { device: self.info.id.clone(), what }
    }

    /// Fails if the device is lost or has reported an error since the last check.
    pub fn check(&self) -> Result<()> {
        let mut trouble = lock(&self.trouble);
        if let Some(reason) = trouble.lost.clone() {
            let again = std::mem::replace(&mut trouble.told, true);
            return Err(self.failed(format!("the device {} lost: {reason}", if again { "was" } else { "is" })));
        }
        match trouble.errors.is_empty() {
            true => Ok(()),
            false => Err(self.failed(std::mem::take(&mut trouble.errors).join("; "))),
        }
    }

    /// Runs calls on the device and turns what they report into a wgpu error.
    pub fn guarded<T>(&self, calls: impl FnOnce() -> T) -> Result<T, wgpu::Error> {
        let filters = [wgpu::ErrorFilter::Validation, wgpu::ErrorFilter::OutOfMemory, wgpu::ErrorFilter::Internal];
        let mut scopes: Vec<_> = filters.map(|f| self.device.push_error_scope(f)).into();
        let value = calls();
        let mut error = None;
        while let Some(scope) = scopes.pop() {
            error = error.or(block_on(scope.pop()));
        }
        error.map_or(Ok(value), Err)
    }

    pub fn create_buffer(&self, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        let descriptor = wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false };
        let buffer = self.guarded(|| self.device.create_buffer(&descriptor));
        self.check()?;
        buffer.map_err(|e| match e {
            wgpu::Error::OutOfMemory { .. } => {
                Error::OutOfMemory { device: self.info.id.clone(), requested: size as usize }
            }
            e => self.failed(e.to_string()),
        })
    }

    /// The buffer in `slot` if it is large enough, else a new one in its place.
    pub fn grown(&self, slot: &mut Option<wgpu::Buffer>, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        match slot {
            Some(buffer) if buffer.size() >= size => Ok(buffer.clone()),
            _ => {
                let size = size.next_power_of_two().min(self.limits.max_buffer_size).max(size);
                Ok(slot.insert(self.create_buffer(size, usage)?).clone())
            }
        }
    }

    /// The compiled kernel for a specification.
    pub fn pipeline(&self, spec: &Spec, source: impl FnOnce() -> Source) -> Result<Arc<Pipeline>> {
        if let Some(pipeline) = lock(&self.pipelines).get(spec) {
            return Ok(pipeline.clone());
        }
        let source = source();
        let most = self.limits.max_storage_buffers_per_shader_stage;
        if source.writable.len() > most as usize {
            let n = source.writable.len();
            let what = format!("bind {n} buffers to a kernel: max_storage_buffers_per_shader_stage is {most}");
            return Err(self.unsupported(what));
        }
        let compiled = self.guarded(|| self.compile(&source));
        self.check()?;
        let log = |e: wgpu::Error| Error::KernelCompile { name: spec.name().to_owned(), log: e.to_string() };
        let pipeline = Arc::new(compiled.map_err(log)?);
        lock(&self.pipelines).insert(spec.clone(), pipeline.clone());
        Ok(pipeline)
    }

    fn compile(&self, source: &Source) -> Pipeline {
        let shader =
            wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl((&source.text).into()) };
        // SAFETY: `ops` has proved that every row, position and page that kernels compute lies within its buffer, their
        // loops count to bounds, and their divisors are constants or counts that are not zero.
        let module =
            unsafe { self.device.create_shader_module_trusted(shader, wgpu::ShaderRuntimeChecks::unchecked()) };
        let entry = |binding: usize, ty| wgpu::BindGroupLayoutEntry {
            binding: binding as u32,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer { ty, has_dynamic_offset: false, min_binding_size: None },
            count: None,
        };
        let storage = source.writable.iter().map(|&w| wgpu::BufferBindingType::Storage { read_only: !w });
        let entries: Vec<_> = storage
            .chain([wgpu::BufferBindingType::Uniform])
            .enumerate()
            .map(|(binding, ty)| entry(binding, ty))
            .collect();
        let layout =
            self.device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor { label: None, entries: &entries });
        let pipeline_layout = self.device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: None,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
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
        Pipeline { pipeline, layout }
    }

    /// A caller's kernel: checked as written, its layout derived from it.
    pub fn custom_pipeline(&self, name: &str, text: &str) -> Result<Arc<Pipeline>> {
        let spec = Spec::Custom(text.to_owned());
        if let Some(pipeline) = lock(&self.pipelines).get(&spec) {
            return Ok(pipeline.clone());
        }
        let compiled = self.guarded(|| {
            let source = wgpu::ShaderSource::Wgsl(text.into());
            let module = self.device.create_shader_module(wgpu::ShaderModuleDescriptor { label: Some(name), source });
            let pipeline = self.device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(name),
                layout: None,
                module: &module,
                entry_point: Some("main"),
                compilation_options: Default::default(),
                cache: None,
            });
            let layout = pipeline.get_bind_group_layout(0);
            Pipeline { pipeline, layout }
        });
        self.check()?;
        let log = |e: wgpu::Error| Error::KernelCompile { name: name.to_owned(), log: e.to_string() };
        let pipeline = Arc::new(compiled.map_err(log)?);
        lock(&self.pipelines).insert(spec, pipeline.clone());
        Ok(pipeline)
    }

    /// Waits for a submission, or for all of them.
    pub fn wait(&self, submission_index: Option<wgpu::SubmissionIndex>) -> Result<()> {
        let polled = self.device.poll(wgpu::PollType::Wait { submission_index, timeout: None });
        self.check()?;
        polled.map(|_| ()).map_err(|e| self.failed(e.to_string()))
    }

    /// Maps a part of a buffer when no submission uses it any more.
    fn mapped(
        &self,
        buffer: &wgpu::Buffer,
        mode: wgpu::MapMode,
        range: Range<u64>,
        body: impl FnOnce(&wgpu::BufferSlice) -> Result<(), wgpu::MapRangeError>,
    ) -> Result<()> {
        // A submission must not be handed over while a buffer of it is mapped.
        let _shared = lock(&self.shared);
        let slice = buffer.slice(range);
        let (send, receive) = std::sync::mpsc::channel();
        let asked = self.guarded(|| {
            slice.map_async(mode, move |result| {
                let _ = send.send(result); // The receiver is gone only if waiting has failed.
            });
            // Enough if nothing uses the buffer.
            self.device.poll(wgpu::PollType::Poll)
        });
        self.check()?;
        asked.map_err(|e| self.failed(e.to_string()))?.map_err(|e| self.failed(e.to_string()))?;
        let mut ready = receive.try_recv();
        if ready.is_err() {
            self.wait(None)?;
            ready = receive.try_recv();
        }
        match ready {
            Ok(Ok(())) => {}
            Ok(Err(e)) => return Err(self.failed(e.to_string())),
            Err(_) => return Err(self.failed("a buffer was never mapped")),
        }
        let done = body(&slice);
        buffer.unmap();
        done.map_err(|e| self.failed(e.to_string()))
    }

    /// Copies bytes to the host.
    pub fn read(&self, buffer: &wgpu::Buffer, offset: u64, out: &mut [u8]) -> Result<()> {
        if out.is_empty() {
            return Ok(());
        }
        // Mappings start at multiples of eight bytes, and both they and copies move whole words.
        let start = offset & !7;
        let size = (offset + out.len() as u64).next_multiple_of(4) - start;
        let mut copy = |view: &[u8]| out.copy_from_slice(&view[(offset - start) as usize..][..out.len()]);
        if buffer.usage().contains(wgpu::BufferUsages::MAP_READ) {
            return self.mapped(buffer, wgpu::MapMode::Read, start..start + size, |slice| {
                slice.get_mapped_range().map(|view| copy(&view))
            });
        }
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let mut kept = lock(&self.staging).take();
        let staging = self.grown(&mut kept, size, usage)?;
        let copied = self.guarded(|| {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(buffer, start, &staging, 0, size);
            self.queue.submit([encoder.finish()])
        });
        self.check()?;
        copied.map_err(|e| self.failed(e.to_string()))?;
        self.mapped(&staging, wgpu::MapMode::Read, 0..size, |slice| slice.get_mapped_range().map(|view| copy(&view)))?;
        *lock(&self.staging) = kept;
        Ok(())
    }

    /// Copies bytes from the host, ordered with submissions.
    pub fn write(&self, buffer: &wgpu::Buffer, offset: u64, data: &[u8]) -> Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        if buffer.usage().contains(wgpu::BufferUsages::MAP_WRITE) {
            let start = offset & !7;
            let end = (offset + data.len() as u64).next_multiple_of(4);
            return self.mapped(buffer, wgpu::MapMode::Write, start..end, |slice| {
                let at = (offset - start) as usize;
                slice.get_mapped_range_mut().map(|mut view| view.slice(at..at + data.len()).copy_from_slice(data))
            });
        }
        // Words that are written in part are read first.
        let start = offset & !3;
        let end = (offset + data.len() as u64).next_multiple_of(4);
        if (start, end) == (offset, offset + data.len() as u64) {
            return self.write_words(buffer, start, data);
        }
        let mut words = vec![0; (end - start) as usize];
        let last = words.len() - 4;
        self.read(buffer, start, &mut words[..4])?;
        self.read(buffer, end - 4, &mut words[last..])?;
        words[(offset - start) as usize..][..data.len()].copy_from_slice(data);
        self.write_words(buffer, start, &words)
    }

    fn write_words(&self, buffer: &wgpu::Buffer, offset: u64, data: &[u8]) -> Result<()> {
        let large = data.len() >= super::TRANSFER / 2;
        let written = self.guarded(|| {
            self.queue.write_buffer(buffer, offset, data);
            // Written data waits for a submission in memory of the host; large data is not left waiting.
            large.then(|| self.queue.submit([]))
        });
        self.check()?;
        match written.map_err(|e| self.failed(e.to_string()))? {
            Some(index) => self.wait(Some(index)),
            None => Ok(()),
        }
    }
}
