//! What kernels bind.

use super::gpu::Gpu;
use super::memory::Memory;
use super::wgsl::tensor::Tensor;
use crate::compute::Buffer;
use crate::error::Result;

/// Where a buffer's bytes are, for a kernel: a binding that starts on an allowed offset, and what is left of the offset.
#[derive(Clone, Copy)]
pub(super) struct Slot<'a> {
    pub memory: &'a Memory,
    pub offset: u64,
    pub size: u64,
    /// Bytes from the binding's start to the first element.
    pub rest: usize,
}

impl<'a> Slot<'a> {
    pub fn new(gpu: &Gpu, what: &str, buffer: &'a Buffer) -> Result<Self> {
        let memory = Memory::of(buffer)?;
        let step = (gpu.limits.min_storage_buffer_offset_alignment as usize).max(16);
        let offset = buffer.offset() / step * step;
        let rest = buffer.offset() - offset;
        let end = ((buffer.offset() + buffer.bytes()).next_multiple_of(16) as u64).min(memory.buffer.size() & !3);
        let size = (end - offset as u64).max(4);
        let most = gpu.limits.max_storage_buffer_binding_size;
        if size > most {
            let what = format!("bind {what} of {size} bytes: max_storage_buffer_binding_size is {most}");
            return Err(gpu.unsupported(what));
        }
        Ok(Slot { memory, offset: offset as u64, size, rest })
    }

    /// All of it.
    pub fn whole(memory: &'a Memory) -> Self {
        Slot { memory, offset: 0, size: memory.buffer.size(), rest: 0 }
    }

    /// A float tensor, whose words kernels read: vectors of so many elements, which have `row_dim` in kernels.
    pub fn tensor(gpu: &Gpu, what: &str, buffer: &'a Buffer, row_dim: usize) -> Result<(Self, Tensor)> {
        let slot = Slot::new(gpu, what, buffer)?;
        if !slot.rest.is_multiple_of(4) {
            let what = format!("reach {what} at byte {}: 16-bit floats must start at a multiple of 4", buffer.offset());
            return Err(gpu.unsupported(what));
        }
        let wide = slot.rest.is_multiple_of(16) && slot.size.is_multiple_of(16);
        let dim = buffer.shape().last().copied().unwrap_or(row_dim);
        Ok((slot, Tensor::new(buffer.dtype(), wide, dim, row_dim)))
    }

    /// Words from the binding's start to the first element.
    pub fn words(&self) -> u32 {
        (self.rest / 4) as u32
    }
}
