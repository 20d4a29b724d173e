//! Kernels and how they are launched. Backends validate nothing: `ops` has.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;

use crate::compute::{Buffer, DeviceInfo, KernelSource};
use crate::error::Result;
use crate::format::RowFormat;
use crate::ops::{AttentionParams, Batch, Direction, Domain, PagePool, Positions, RowOrder};
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Memory of one allocation.
pub(crate) enum Storage {
    Cpu(cpu::Memory),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Memory),
    #[cfg(feature = "wgpu")]
    Wgpu(wgpu::Memory),
}

/// A device's driver.
pub(crate) trait Backend: Send + Sync {
    fn info(&self) -> DeviceInfo;
    /// Zeroed memory.
    fn alloc(&self, bytes: usize) -> Result<Storage>;
    /// Copies to the host what lies `offset` bytes into the storage, after all submitted work.
    fn read(&self, storage: &Storage, offset: usize, out: &mut [u8]) -> Result<()>;
    /// Copies from the host, after all submitted work.
    fn write(&self, storage: &Storage, offset: usize, data: &[u8]) -> Result<()>;
    fn recorder(&self) -> Result<Box<dyn Recorder>>;
    /// Bytes kept for partial results.
    fn workspace_bytes(&self) -> usize;
    /// The CUDA backend, if it is this.
    #[cfg(feature = "cuda")]
    fn as_cuda(&self) -> Option<&cuda::Cuda> {
        None
    }
}

/// What a backend has worked out for a batch, kept as long as the batch is.
#[derive(Default)]
pub(crate) struct Plans(Mutex<Vec<Arc<dyn Any + Send + Sync>>>);

#[allow(dead_code)] // Not every backend plans.
impl Plans {
    /// The plan of this type that fits, or a new one.
    pub fn get<T: Send + Sync + 'static>(
        &self,
        fits: impl Fn(&T) -> bool,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let mut plans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = plans.iter().filter_map(|p| p.clone().downcast::<T>().ok()).find(|p| fits(p));
        if let Some(plan) = found {
            return Ok(plan);
        }
        let plan = Arc::new(make()?);
        plans.push(plan.clone());
        Ok(plan)
    }
}

impl std::fmt::Debug for Plans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Plans")
    }
}

/// A list of operations that is being built.
pub(crate) trait Recorder: Send {
    fn record(&mut self, op: Op) -> Result<()>;
    /// Kernel launches recorded so far, where they are counted.
    #[cfg(test)]
    fn dispatches(&self) -> usize {
        0
    }
    fn submit(self: Box<Self>) -> Result<Box<dyn Completion>>;
    /// Submits, waits, and says how long it took: by the device's clock if it has one, else by the host's.
    fn submit_and_time(self: Box<Self>) -> Result<Duration> {
        let started = Instant::now();
        self.submit()?.wait()?;
        Ok(started.elapsed())
    }
}

/// Submitted work.
pub(crate) trait Completion: Send {
    fn wait(self: Box<Self>) -> Result<()>;
}

#[allow(clippy::large_enum_variant)] // A list of them is short, and attention is most of it.
/// A validated operation. Shapes stand beside the fields; D is the row's head_dim.
pub(crate) enum Op {
    Rotate(Rotate),
    Quantize(Quantize),
    Dequantize(Dequantize),
    Attention(Attention),
    Merge(Merge),
    Copy(Copy),
    Custom(Custom),
}

pub(crate) struct Rotate {
    pub row: RowFormat,
    pub direction: Direction,
    /// [..., D], any float.
    pub x: Buffer,
    /// As `x`; may be the very same view.
    pub out: Buffer,
}

/// Encodes the newest `new` positions of every sequence of the batch.
pub(crate) struct Quantize {
    /// One input and its pool: x is [tokens, kv_heads, D], any float.
    pub parts: Vec<(Buffer, PagePool)>,
    pub batch: Batch,
}

pub(crate) struct Dequantize {
    pub pool: PagePool,
    pub batch: Batch,
    pub sequence: usize,
    pub positions: Positions,
    pub domain: Domain,
    pub order: RowOrder,
    /// [kv_heads, n, D] or [n, kv_heads, D] as `order` says, any float.
    pub out: Buffer,
}

pub(crate) struct Attention {
    /// [tokens, heads, D], any float.
    pub q: Buffer,
    pub heads: usize,
    pub key: PagePool,
    pub value: PagePool,
    pub batch: Batch,
    pub params: AttentionParams,
    /// As `q`, any float.
    pub out: Buffer,
    /// [tokens, heads] f32.
    pub lse: Option<Buffer>,
}

pub(crate) struct Merge {
    /// Partial outputs [tokens, heads, D] of any float, and their lse [tokens, heads] f32.
    pub parts: Vec<(Buffer, Buffer)>,
    pub out: Buffer,
    pub lse: Option<Buffer>,
}

/// Bytes from one view to another of the same size; they may share memory but do not overlap. Offsets and size are
/// multiples of 4 bytes.
pub(crate) struct Copy {
    pub from: Buffer,
    pub to: Buffer,
}

/// A kernel of the caller's own.
pub(crate) struct Custom {
    pub name: String,
    pub source: KernelSource,
    /// The grid; a CPU has none.
    #[allow(dead_code)]
    pub workgroups: [u32; 3],
    pub bindings: Vec<Buffer>,
    pub constants: Vec<u32>,
}
