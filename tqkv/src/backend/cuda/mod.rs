//! NVIDIA GPUs: kernels in CUDA C++, compiled by NVRTC for the GPU that is there. The driver and NVRTC are loaded at run time.
//!
//! Operations are made ready (compiled, planned, their arguments laid out) when they are recorded and launched when they are
//! submitted, all on one stream. Memory is allocated and freed in the stream's order too.

mod attention;
mod cache;
mod codec;
mod driver;
mod gpu;
mod interop;
#[cfg(test)]
mod interop_tests;
mod kernel;
mod memory;
mod nvrtc;
mod rows;
mod tables;
#[cfg(test)]
mod tests;
mod workspace;

pub(crate) use memory::{Memory, address};

use crate::compute::driver::{Completion, Driver, Recorder, Repeatable, Storage};
use crate::compute::{DeviceInfo, DeviceKind};
use crate::error::{Error, Result};
use crate::problem::op::{Attention, Op};
use driver::{Context, Graph, Mark, Stream, lock};
use gpu::{Gpu, Recording, Work};
use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

/// How many GPUs the driver finds.
pub(crate) fn count() -> Result<usize> {
    driver::count()
}

/// A GPU and the stream that everything runs on.
pub(crate) struct Cuda(Arc<Gpu>);

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

    /// Sends work to another stream of the caller's.
    ///
    /// # Safety
    /// As `Stream::move_to`.
    pub unsafe fn move_to(&self, stream: *mut c_void) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.0.stream.move_to(stream) }
    }

    fn on(stream: Stream) -> Result<Self> {
        // Without the compiler nothing would run, so its absence is said when the device is opened.
        nvrtc::load().map_err(|reason| Error::DeviceUnavailable { device: stream.context.id.clone(), reason })?;
        Ok(Cuda(Arc::new(Gpu::new(stream))))
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
        let details = vec![
            ("compute capability", version(limits.capability)),
            ("multiprocessors", limits.multiprocessors.to_string()),
            ("shared memory a block", format!("{} KiB", limits.shared_memory >> 10)),
            ("driver", format!("CUDA {}", version((limits.driver / 1000, limits.driver % 1000 / 10)))),
            ("NVRTC", nvrtc),
        ];
        let info = DeviceInfo::new(DeviceKind::Cuda, context.id.clone(), limits.name.clone(), details);
        DeviceInfo { memory_bytes: Some(limits.memory as u64), ..info }
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
        Ok(Box::new(CudaRecorder { gpu: self.0.clone(), recording: Recording::default(), ops: Vec::new() }))
    }

    fn takes_strides(&self) -> bool {
        true
    }

    fn reads_tables(&self) -> bool {
        true
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

struct CudaRecorder {
    gpu: Arc<Gpu>,
    recording: Recording,
    /// Hold the buffers until their work is enqueued; from then on they go in the order of the stream.
    ops: Vec<Op>,
}

impl Recorder for CudaRecorder {
    fn record(&mut self, op: Box<dyn Any + Send>) -> Result<()> {
        let op = Op::from_any(op);
        let (gpu, to) = (&*self.gpu, &mut self.recording);
        let before = to.work.len();
        let recorded = match &op {
            Op::Rotate(op) => rows::rotate(gpu, op, to),
            Op::Refresh(batch) => attention::refresh(gpu, batch, to),
            Op::Quantize(ops) => rows::quantize(gpu, ops, to),
            Op::Dequantize(op) => rows::dequantize(gpu, op, to),
            Op::Attention(op) => attention::attention(gpu, op, to),
            Op::Merge(op) => rows::merge(gpu, op, to),
            Op::Copy(op) => {
                to.work.push(Work::Copy { from: address(&op.from), to: address(&op.to), bytes: op.from.bytes() });
                Ok(())
            }
            Op::Custom(op) => rows::custom(gpu, op, to),
        };
        match recorded {
            Ok(()) => self.ops.push(op),
            // Nothing of an operation, or all of it.
            Err(_) => to.work.truncate(before),
        }
        recorded
    }

    fn fuses(&self, op: &dyn Any) -> bool {
        op.downcast_ref::<Attention>().is_some_and(|op| attention::fuses(&self.gpu, op))
    }

    fn submit(self: Box<Self>) -> Result<Box<dyn Completion>> {
        self.enqueue(&self.gpu.stream)?;
        Ok(Box::new(Submitted(self.gpu.stream.mark()?)))
    }

    fn repeatable(&mut self) -> Result<Option<Box<dyn Repeatable>>> {
        let graph = self.gpu.stream.graph(|aside| self.enqueue(aside))?;
        let (ops, memory) = (std::mem::take(&mut self.ops), std::mem::take(&mut self.recording).memory);
        Ok(Some(Box::new(Captured { gpu: self.gpu.clone(), graph, _ops: ops, _memory: memory })))
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
        stream.context.enter()?;
        self.recording.work.iter().try_for_each(|work| match work {
            Work::Launch(launch) => stream.launch(launch),
            Work::Copy { from, to, bytes } => stream.copy(*from, *to, *bytes),
        })
    }
}

/// Recorded work as a graph, with what it reads and writes.
struct Captured {
    gpu: Arc<Gpu>,
    graph: Graph,
    _ops: Vec<Op>,
    _memory: Vec<Arc<Memory>>,
}

impl Repeatable for Captured {
    fn submit(&self) -> Result<Box<dyn Completion>> {
        self.gpu.stream.launch_graph(&self.graph)?;
        Ok(Box::new(Submitted(self.gpu.stream.mark()?)))
    }
}

struct Submitted(Mark);

impl Completion for Submitted {
    fn wait(self: Box<Self>) -> Result<()> {
        self.0.wait()
    }
}
