//! Memory on a GPU, taken and freed in the order of a stream.

use super::driver::{Stream, lock};
use crate::compute::Buffer;
use crate::error::{Error, Result};
use crate::problem::{Batch, SpanInfo};
use cudarc::driver::{result, sys};
use std::sync::Arc;

/// Where a buffer starts on the GPU.
pub(crate) fn address(buffer: &Buffer) -> u64 {
    buffer.storage().downcast::<Memory>().map_or(0, |memory| memory.address + buffer.offset() as u64)
}

/// Where a batch's spans and its page tables start on the GPU.
pub(super) fn batch_addresses(batch: &Batch) -> Result<[u64; 2]> {
    let spans = address(&batch.device_words()?);
    Ok([spans, spans + (batch.sequences() * size_of::<SpanInfo>()) as u64])
}

/// Memory on a GPU.
pub(crate) struct Memory {
    stream: Arc<Stream>,
    pub(super) address: u64,
    pub(super) bytes: usize,
    /// Someone else's memory is not freed.
    owned: bool,
}

impl crate::compute::driver::Storage for Memory {
    fn address(&self) -> Option<usize> {
        Some(self.address as usize)
    }
}

impl Memory {
    /// # Safety
    /// The memory must be on the stream's GPU, `bytes` long, and outlive the result.
    pub(super) unsafe fn borrowed(stream: &Arc<Stream>, address: u64, bytes: usize) -> Self {
        Memory { stream: stream.clone(), address, bytes, owned: false }
    }

    pub(super) fn clear(&self) -> Result<()> {
        self.stream.context.enter()?;
        // SAFETY: within the allocation.
        unsafe { result::memset_d8_async(self.address, 0, self.bytes, self.stream.raw()) }
            .map_err(|e| self.stream.context.failed(e))
    }

    pub(super) fn read(&self, offset: usize, out: &mut [u8]) -> Result<()> {
        self.stream.context.enter()?;
        if !out.is_empty() {
            debug_assert!(offset + out.len() <= self.bytes);
            // SAFETY: within the allocation by the buffer's shape; the copy is over before this returns.
            unsafe { result::memcpy_dtoh_async(out, self.address + offset as u64, self.stream.raw()) }
                .map_err(|e| self.stream.context.failed(e))?;
        }
        self.stream.synchronize()
    }

    pub(super) fn write(&self, offset: usize, data: &[u8]) -> Result<()> {
        self.stream.context.enter()?;
        if data.is_empty() {
            return Ok(());
        }
        self.stream.expect_no_capture("copy from the host")?;
        debug_assert!(offset + data.len() <= self.bytes);
        // SAFETY: within the allocation by the buffer's shape; from pageable memory the driver copies before it returns, for
        // any other the copy is waited for.
        unsafe { result::memcpy_htod_async(self.address + offset as u64, data, self.stream.raw()) }
            .map_err(|e| self.stream.context.failed(e))?;
        if is_known(&data[0]) || is_known(&data[data.len() - 1]) { self.stream.synchronize() } else { Ok(()) }
    }
}

/// Whether the driver knows the memory of a byte (pinned, registered, managed): then it reads it only when the stream comes to
/// it, and the caller must not have it back before.
fn is_known(byte: &u8) -> bool {
    // The plural is no error for a pointer that the driver does not know: its type is 0 then.
    let (mut kind, mut which) = (0u32, sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE);
    let mut to: *mut std::ffi::c_void = (&raw mut kind).cast();
    // SAFETY: one attribute, and one integer that it is written to.
    unsafe { sys::cuPointerGetAttributes(1, &mut which, &mut to, std::ptr::from_ref(byte) as u64) }.result().is_ok()
        && kind != 0
}

impl Drop for Memory {
    fn drop(&mut self) {
        if !self.owned || self.stream.context.enter().is_err() {
            return;
        }
        // A graph that is being captured would free it once more at each launch.
        if self.stream.is_captured() {
            lock(&self.stream.given_up).push(self.address);
        } else {
            self.stream.free(self.address);
        }
    }
}

impl Stream {
    /// Memory in the order of the stream, not cleared.
    pub fn alloc(self: &Arc<Self>, bytes: usize) -> Result<Memory> {
        self.context.enter()?;
        self.expect_no_capture("take memory")?;
        self.free_given_up();
        let size = bytes.max(1);
        // SAFETY: the pool and the stream are alive.
        let address = unsafe {
            match self.pool {
                Some(pool) => result::mem_pool::alloc_async(pool, size, self.raw()),
                None => result::malloc_sync(size),
            }
        };
        let address = address.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Error::OutOfMemory { device: self.context.id.clone(), requested: bytes }
            }
            _ => self.context.failed(e),
        })?;
        Ok(Memory { stream: self.clone(), address, bytes, owned: true })
    }

    /// Frees what was allocated, behind the work that uses it.
    fn free(&self, address: u64) {
        // SAFETY: allocated by `alloc` in the same way.
        let _ = unsafe {
            match self.pool {
                Some(_) => result::free_async(address, self.raw()),
                None => result::free_sync(address),
            }
        };
    }

    pub(super) fn free_given_up(&self) {
        std::mem::take(&mut *lock(&self.given_up)).into_iter().for_each(|address| self.free(address));
    }

    /// Memory with this content.
    pub fn upload(self: &Arc<Self>, data: &[u8]) -> Result<Memory> {
        let memory = self.alloc(data.len())?;
        memory.write(0, data)?;
        Ok(memory)
    }
}
