//! GPUs through wgpu: Metal, Vulkan, DX12. One set of WGSL kernels, put together for each shape and compiled once.

mod adapter;
mod attention;
mod context;
mod dequantize;
mod interop;
mod merge;
mod quantize;
mod recorder;
mod rotate;
#[cfg(test)]
mod tests;
mod wgsl;

pub(crate) use adapter::{best, list, open};

use crate::compute::driver::{Driver, Recorder, Storage};
use crate::compute::{Buffer, DeviceInfo};
use crate::error::{Error, Result};
use context::Context;
use std::sync::Arc;

/// A wgpu buffer. Those of tqkv's own are multiples of 16 bytes, so that kernels can load vectors to the end.
pub(crate) struct Memory(wgpu::Buffer);

impl Storage for Memory {}

/// What kernels are put together for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caps {
    /// pack2x16float and unpack2x16float are exact, subnormals and ties included.
    native_f16: bool,
    /// Threads of the smallest subgroup; 0: no subgroup operations.
    subgroup: usize,
    /// A shuffle takes only the low bits of a lane's number.
    shuffles_wrap: bool,
    /// Threads of every subgroup, where one can work by itself; else 0.
    team: usize,
    /// Workgroups that keep the device busy.
    busy: usize,
    /// The most threads of a workgroup of attention.
    threads: usize,
    /// The most query rows of a workgroup of attention. Few in software, where each makes kernels slower to compile.
    query_rows: usize,
    /// Floats that a workgroup holds for exchange. Few, so that many workgroups run at once; many in software, where each
    /// barrier makes kernels slower to compile.
    held: usize,
    /// Positions whose values a thread of attention loads before it uses them. Few in software, as with query rows.
    ahead: usize,
}

pub(crate) struct Wgpu(Arc<Context>);

/// Bytes that go to or from the device at a time.
const TRANSFER: usize = 64 << 20;

impl Driver for Wgpu {
    fn info(&self) -> DeviceInfo {
        self.0.info.clone()
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Storage>> {
        self.0.check()?;
        let size = bytes.max(16).next_multiple_of(16) as u64;
        let most = self.0.limits.max_buffer_size;
        if size > most {
            return Err(self.0.unsupported(format!("hold a buffer of {size} bytes: max_buffer_size is {most}")));
        }
        let mut usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        if self.0.device.features().contains(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS) {
            usage |= wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::MAP_WRITE;
        }
        Ok(Box::new(Memory(self.0.create_buffer(size, usage)?)))
    }

    fn read(&self, storage: &dyn Storage, offset: usize, out: &mut [u8]) -> Result<()> {
        let buffer = buffer_of(storage)?;
        for (i, chunk) in out.chunks_mut(TRANSFER).enumerate() {
            self.0.read(buffer, (offset + i * TRANSFER) as u64, chunk)?;
        }
        self.0.check()
    }

    fn write(&self, storage: &dyn Storage, offset: usize, data: &[u8]) -> Result<()> {
        let buffer = buffer_of(storage)?;
        for (i, chunk) in data.chunks(TRANSFER).enumerate() {
            self.0.write(buffer, (offset + i * TRANSFER) as u64, chunk)?;
        }
        self.0.check()
    }

    fn recorder(&self) -> Result<Box<dyn Recorder>> {
        self.0.check()?;
        Ok(Box::new(recorder::WgpuRecorder::new(&self.0)))
    }

    fn workspace_bytes(&self) -> usize {
        context::lock(&self.0.shared).scratch.iter().flatten().map(|buffer| buffer.size() as usize).sum()
    }
}

fn buffer_of(storage: &dyn Storage) -> Result<&wgpu::Buffer> {
    let other = || Error::WrongDevice { what: "buffer", got: "another".into(), expected: "wgpu".into() };
    Ok(&storage.downcast::<Memory>().ok_or_else(other)?.0)
}

/// Where a buffer's bytes are, for a kernel: a binding that starts on an allowed offset, and what is left of the offset.
#[derive(Clone)]
pub(crate) struct Slot {
    target: Target,
    offset: u64,
    size: u64,
    /// Bytes from the binding's start to the first element.
    rest: usize,
}

#[derive(Clone)]
enum Target {
    Buffer(wgpu::Buffer),
    /// The submission's own data.
    Arena,
    /// Memory between the passes of one operation: one of two buffers, since a pass that reads one cannot write it.
    Scratch(usize),
}

impl Slot {
    fn new(context: &Context, what: &str, buffer: &Buffer) -> Result<Self> {
        let memory = buffer_of(buffer.storage())?;
        let step = (context.limits.min_storage_buffer_offset_alignment as usize).max(16);
        let offset = buffer.offset() / step * step;
        let rest = buffer.offset() - offset;
        let end = ((buffer.offset() + buffer.bytes()).next_multiple_of(16) as u64).min(memory.size() & !3);
        let size = (end - offset as u64).max(4);
        let most = context.limits.max_storage_buffer_binding_size;
        if size > most {
            let what = format!("bind {what} of {size} bytes: max_storage_buffer_binding_size is {most}");
            return Err(context.unsupported(what));
        }
        Ok(Slot { target: Target::Buffer(memory.clone()), offset: offset as u64, size, rest })
    }

    /// A float tensor, whose words kernels read.
    fn tensor(context: &Context, what: &str, buffer: &Buffer) -> Result<(Self, wgsl::Tensor)> {
        let slot = Slot::new(context, what, buffer)?;
        if !slot.rest.is_multiple_of(4) {
            let what = format!("reach {what} at byte {}: 16-bit floats must start at a multiple of 4", buffer.offset());
            return Err(context.unsupported(what));
        }
        let wide = slot.rest.is_multiple_of(16) && slot.size.is_multiple_of(16);
        Ok((slot, wgsl::Tensor { dtype: buffer.dtype(), wide }))
    }

    /// Words from the binding's start to the first element.
    fn words(&self) -> u32 {
        (self.rest / 4) as u32
    }
}
