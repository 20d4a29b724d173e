//! The device as the rest of the library sees it.

use super::commands::Commands;
use super::context::Context;
use super::memory::Memory;
use super::recorder::WgpuRecorder;
use super::transfer::TRANSFER;
use crate::compute::DeviceInfo;
use crate::compute::driver::{Driver, Recorder, Storage};
use crate::error::Result;
use std::sync::Arc;

pub(crate) struct Wgpu(pub(super) Arc<Context>);

impl Driver for Wgpu {
    fn info(&self) -> DeviceInfo {
        self.0.gpu.info.clone()
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Storage>> {
        let gpu = &self.0.gpu;
        gpu.check()?;
        let size = bytes.max(16).next_multiple_of(16) as u64;
        let most = gpu.limits.max_buffer_size;
        if size > most {
            return Err(gpu.unsupported(format!("hold a buffer of {size} bytes: max_buffer_size is {most}")));
        }
        let mut usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        if gpu.device.features().contains(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS) {
            usage |= wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::MAP_WRITE;
        }
        Ok(Box::new(self.0.create(size, usage)?))
    }

    fn read(&self, storage: &dyn Storage, offset: usize, out: &mut [u8]) -> Result<()> {
        let buffer = &Memory::of_storage(storage)?.buffer;
        for (i, chunk) in out.chunks_mut(TRANSFER).enumerate() {
            self.0.gpu.read(buffer, (offset + i * TRANSFER) as u64, chunk)?;
        }
        self.0.gpu.check()
    }

    fn write(&self, storage: &dyn Storage, offset: usize, data: &[u8]) -> Result<()> {
        let buffer = &Memory::of_storage(storage)?.buffer;
        for (i, chunk) in data.chunks(TRANSFER).enumerate() {
            self.0.gpu.write(buffer, (offset + i * TRANSFER) as u64, chunk)?;
        }
        self.0.gpu.check()
    }

    fn recorder(&self) -> Result<Box<dyn Recorder>> {
        self.0.gpu.check()?;
        Ok(Box::new(WgpuRecorder(Commands::new(&self.0))))
    }

    fn binds_storages(&self) -> bool {
        true
    }

    fn workspace_bytes(&self) -> usize {
        self.0.scratch_bytes()
    }
}
