//! What all recorders of a device share: compiled kernels, tables, bind groups, and memory that is used again.

use super::codec::tables;
use super::gpu::{Gpu, lock};
use super::memory::{BindGroups, Memory};
use super::pipelines::Pipelines;
use crate::error::Result;
use crate::format::{Codec, RowFormat};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

pub(super) struct Context {
    pub gpu: Gpu,
    pub pipelines: Pipelines,
    pub groups: Arc<BindGroups>,
    /// What kernels look up, by codec and row_dim.
    tables: Mutex<HashMap<(Codec, usize), Arc<Memory>>>,
    /// For parameters and lists of submissions: each writes its own before it runs.
    segments: Mutex<Vec<Arc<Memory>>>,
    /// Between the passes of one operation: two, since a pass that reads one cannot write it.
    scratch: Mutex<[Option<Arc<Memory>>; 3]>,
}

/// The least bytes of a segment.
const SEGMENT: u64 = 256 << 10;

impl Context {
    pub fn new(gpu: Gpu) -> Self {
        Context {
            gpu,
            pipelines: Pipelines::default(),
            groups: Arc::default(),
            tables: Mutex::default(),
            segments: Mutex::default(),
            scratch: Mutex::default(),
        }
    }

    pub fn create(&self, size: u64, usage: wgpu::BufferUsages) -> Result<Memory> {
        Ok(Memory::new(self.gpu.create_buffer(size, usage)?, &self.groups))
    }

    /// The tables of a row that has a codebook.
    pub fn tables(&self, row: &RowFormat) -> Result<Arc<Memory>> {
        let key = (row.codec(), row.row_dim());
        if let Some(found) = lock(&self.tables).get(&key) {
            return Ok(found.clone());
        }
        let words = tables::words(row);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let memory = Arc::new(self.create(4 * words.len() as u64, usage)?);
        self.gpu.write(&memory.buffer, 0, bytemuck::cast_slice(&words))?;
        Ok(lock(&self.tables).entry(key).or_insert(memory).clone())
    }

    /// Segment number `i`, with room for so many bytes.
    pub fn segment(&self, i: usize, bytes: u64) -> Result<Arc<Memory>> {
        let mut segments = lock(&self.segments);
        if let Some(segment) = segments.get(i).filter(|s| s.buffer.size() >= bytes) {
            return Ok(segment.clone());
        }
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let segment = Arc::new(self.create(self.gpu.roomy(bytes.max(SEGMENT)), usage)?);
        match segments.get_mut(i) {
            Some(old) => *old = segment.clone(),
            None => segments.push(segment.clone()),
        }
        Ok(segment)
    }

    /// Scratch memory `which`, with room for so many bytes.
    pub fn scratch(&self, which: usize, bytes: u64) -> Result<Arc<Memory>> {
        let mut scratch = lock(&self.scratch);
        let kept = &mut scratch[which];
        if let Some(memory) = kept.as_ref().filter(|m| m.buffer.size() >= bytes) {
            return Ok(memory.clone());
        }
        // The smaller one goes first, unless work that was recorded holds it.
        *kept = None;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let memory = Arc::new(self.create(self.gpu.roomy(bytes.max(16)), usage)?);
        *kept = Some(memory.clone());
        Ok(memory)
    }

    /// Bytes of all scratch memory.
    pub fn scratch_bytes(&self) -> usize {
        lock(&self.scratch).iter().flatten().map(|memory| memory.buffer.size() as usize).sum()
    }
}
