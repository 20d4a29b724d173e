//! Bytes between host and device.

use super::gpu::{Gpu, lock};
use crate::error::Result;
use std::ops::Range;

/// Bytes that go to or from the device at a time.
pub(super) const TRANSFER: usize = 64 << 20;

impl Gpu {
    /// Maps a part of a buffer when no submission uses it any more.
    fn mapped(
        &self,
        buffer: &wgpu::Buffer,
        mode: wgpu::MapMode,
        range: Range<u64>,
        body: impl FnOnce(&wgpu::BufferSlice) -> Result<(), wgpu::MapRangeError>,
    ) -> Result<()> {
        let _turn = lock(&self.turn);
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
        let kept = lock(&self.staging).take().filter(|buffer| buffer.size() >= size);
        let staging = match kept {
            Some(buffer) => buffer,
            None => {
                self.create_buffer(self.roomy(size), wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST)?
            }
        };
        let copied = self.guarded(|| {
            let mut encoder = self.device.create_command_encoder(&Default::default());
            encoder.copy_buffer_to_buffer(buffer, start, &staging, 0, size);
            self.queue.submit([encoder.finish()])
        });
        self.check()?;
        copied.map_err(|e| self.failed(e.to_string()))?;
        self.mapped(&staging, wgpu::MapMode::Read, 0..size, |slice| slice.get_mapped_range().map(|view| copy(&view)))?;
        *lock(&self.staging) = Some(staging);
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
        let large = data.len() >= TRANSFER / 2;
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
