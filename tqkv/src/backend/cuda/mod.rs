//! NVIDIA GPUs: kernels in CUDA C++, compiled by NVRTC for the GPU that is there. The driver and NVRTC are loaded at run time.
//!
//! Operations are made ready (compiled, planned, their arguments laid out) when they are recorded and launched when they are
//! submitted, all on one stream. Memory is allocated and freed in the stream's order too.

mod attention;
mod cache;
mod driver;
mod interop;
#[cfg(test)]
mod interop_tests;
mod nvrtc;
mod plan;
mod rows;
mod tables;
#[cfg(test)]
mod tests;

pub(crate) use driver::Memory;

use crate::compute::driver::{Completion, Driver, Recorder, Storage};
use crate::compute::{Buffer, DType, DeviceInfo, DeviceKind};
use crate::error::{Error, Result};
use crate::format::{Codec, RowFormat};
use crate::problem::op::Op;
use driver::{Context, Launch, Mark, Stream, lock};
use std::any::Any;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tables::Tables;

/// How many GPUs the driver finds.
pub(crate) fn count() -> Result<usize> {
    driver::count()
}

/// A GPU and the stream that everything runs on.
pub(crate) struct Cuda(Arc<Gpu>);

struct Gpu {
    stream: Arc<Stream>,
    tables: Mutex<HashMap<(Codec, usize), Arc<Tables>>>,
    workspace: Mutex<attention::Workspace>,
}

impl Cuda {
    pub fn new(ordinal: usize) -> Result<Self> {
        let context = Context::get(ordinal)?;
        Self::on(Stream::new(&context)?)
    }

    /// On the caller's stream.
    ///
    /// # Safety
    /// As `Stream::borrowed`.
    pub unsafe fn with_stream(ordinal: usize, stream: *mut c_void) -> Result<Self> {
        let context = Context::get(ordinal)?;
        // SAFETY: the caller's promise.
        Self::on(unsafe { Stream::borrowed(&context, stream) }?)
    }

    fn on(stream: Stream) -> Result<Self> {
        // Without the compiler nothing would run, so its absence is said when the device is opened.
        nvrtc::load().map_err(|reason| Error::DeviceUnavailable { device: stream.context.id.clone(), reason })?;
        let gpu = Gpu { stream: Arc::new(stream), tables: Mutex::default(), workspace: Mutex::default() };
        Ok(Cuda(Arc::new(gpu)))
    }

    /// Memory of another owner.
    ///
    /// # Safety
    /// As `Memory::borrowed`.
    pub unsafe fn borrow(&self, address: u64, bytes: usize) -> Memory {
        // SAFETY: the caller's promise.
        unsafe { Memory::borrowed(&self.0.stream, address, bytes) }
    }
}

impl Driver for Cuda {
    fn info(&self) -> DeviceInfo {
        let context = &self.0.stream.context;
        let limits = &context.limits;
        let version = |(major, minor): (i32, i32)| format!("{major}.{minor}");
        let nvrtc = nvrtc::load().map_or_else(|e| e, |n| version(n.version));
        DeviceInfo {
            kind: DeviceKind::Cuda,
            id: context.id.clone(),
            name: limits.name.clone(),
            details: vec![
                ("compute capability", version(limits.capability)),
                ("multiprocessors", limits.multiprocessors.to_string()),
                ("memory", format!("{:.1} GiB", limits.memory as f64 / (1u64 << 30) as f64)),
                ("shared memory a block", format!("{} KiB", limits.shared_memory >> 10)),
                ("driver", format!("CUDA {}", version((limits.driver / 1000, limits.driver % 1000 / 10)))),
                ("NVRTC", nvrtc),
            ],
        }
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Storage>> {
        let memory = self.0.stream.alloc(bytes)?;
        memory.clear()?;
        Ok(Box::new(memory))
    }

    fn read(&self, storage: &dyn Storage, offset: usize, out: &mut [u8]) -> Result<()> {
        memory_of(storage)?.read(offset, out)
    }

    fn write(&self, storage: &dyn Storage, offset: usize, data: &[u8]) -> Result<()> {
        memory_of(storage)?.write(offset, data)
    }

    fn recorder(&self) -> Result<Box<dyn Recorder>> {
        Ok(Box::new(CudaRecorder { gpu: self.0.clone(), work: Vec::new() }))
    }

    fn workspace_bytes(&self) -> usize {
        lock(&self.0.workspace).bytes()
    }
}

/// `ops` has checked that every buffer is on this device; this keeps the mistake loud if it ever did not.
fn memory_of(storage: &dyn Storage) -> Result<&Memory> {
    let other = || Error::WrongDevice { what: "buffer", got: "another device".into(), expected: "cuda".into() };
    storage.downcast().ok_or_else(other)
}

/// Where a buffer starts on the GPU.
pub(crate) fn address(buffer: &Buffer) -> u64 {
    buffer.storage().downcast::<Memory>().map_or(0, |memory| memory.address + buffer.offset() as u64)
}

/// How kernels number float types.
fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F16 => 1,
        DType::BF16 => 2,
        _ => 0,
    }
}

/// What goes to the stream.
enum Work {
    Launch(Launch),
    Copy { from: u64, to: u64, bytes: usize },
}

/// Work, and what must stay alive until it is enqueued.
struct Prepared {
    work: Work,
    #[allow(dead_code)] // Only held.
    buffers: Vec<Buffer>,
    memory: Vec<Arc<Memory>>,
}

impl Gpu {
    fn tables(&self, row: &RowFormat) -> Result<Arc<Tables>> {
        let mut tables = lock(&self.tables);
        let key = (row.codec(), row.head_dim());
        if let Some(found) = tables.get(&key) {
            return Ok(found.clone());
        }
        let new = Arc::new(Tables::new(&self.stream, row)?);
        tables.insert(key, new.clone());
        Ok(new)
    }

    /// Blocks for this much work, if blocks take several pieces: at most so many a multiprocessor.
    fn blocks(&self, wanted: usize, most: usize) -> u32 {
        wanted.clamp(1, self.stream.context.limits.multiprocessors as usize * most) as u32
    }

    fn prepare<P: bytemuck::Pod>(
        &self,
        source: &nvrtc::Source,
        blocks: u32,
        params: &P,
        buffers: Vec<Buffer>,
    ) -> Result<Prepared> {
        let kernel = self.stream.context.kernel(source)?;
        let params = bytemuck::bytes_of(params).to_vec();
        let work = Work::Launch(Launch { kernel, grid: [blocks, 1, 1], params });
        Ok(Prepared { work, buffers, memory: vec![] })
    }
}

struct CudaRecorder {
    gpu: Arc<Gpu>,
    work: Vec<Prepared>,
}

impl CudaRecorder {
    fn take(&mut self, op: Op) -> Result<()> {
        let gpu = &*self.gpu;
        match &op {
            Op::Rotate(op) => self.work.push(rows::rotate(gpu, op)?),
            Op::Quantize(op) => self.work.extend(rows::quantize(gpu, op)?),
            Op::Dequantize(op) => self.work.push(rows::dequantize(gpu, op)?),
            Op::Attention(op) => self.work.push(attention::attention(gpu, op)?),
            Op::Merge(op) => self.work.push(rows::merge(gpu, op)?),
            Op::Copy(op) => self.work.push(Prepared {
                work: Work::Copy { from: address(&op.from), to: address(&op.to), bytes: op.from.bytes() },
                buffers: vec![op.from.clone(), op.to.clone()],
                memory: vec![],
            }),
            Op::Custom(op) => self.work.push(rows::custom(gpu, op)?),
        }
        Ok(())
    }
}

impl Recorder for CudaRecorder {
    fn record(&mut self, op: Box<dyn Any + Send>) -> Result<()> {
        self.take(Op::from_any(op))
    }

    fn submit(self: Box<Self>) -> Result<Box<dyn Completion>> {
        self.enqueue(&self.gpu.stream)?;
        Ok(Box::new(Submitted(self.gpu.stream.mark()?)))
    }

    fn submit_and_time(self: Box<Self>) -> Result<Duration> {
        let stream = &self.gpu.stream;
        let graph = stream.graph(|aside| self.enqueue(aside))?;
        let start = stream.timed_mark()?;
        stream.launch_graph(&graph)?;
        let end = stream.timed_mark()?;
        end.wait()?;
        start.until(&end)
    }
}

impl CudaRecorder {
    fn enqueue(&self, stream: &Stream) -> Result<()> {
        self.work.iter().try_for_each(|prepared| match &prepared.work {
            Work::Launch(launch) => stream.launch(launch),
            Work::Copy { from, to, bytes } => stream.copy(*from, *to, *bytes),
        })
    }
}

struct Submitted(Mark);

impl Completion for Submitted {
    fn wait(self: Box<Self>) -> Result<()> {
        self.0.wait()
    }
}
