//! A buffer on the device, and the bind groups that hold it.

use super::gpu::lock;
use crate::compute::Buffer;
use crate::compute::driver::Storage;
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

/// A wgpu buffer. Those of tqkv's own are multiples of 16 bytes, so that kernels can load vectors to the end.
pub(super) struct Memory {
    pub buffer: wgpu::Buffer,
    /// Stands for the buffer in keys; none comes twice.
    pub id: u64,
    groups: Arc<BindGroups>,
    /// Whether a bind group holds it.
    bound: AtomicBool,
}

impl Storage for Memory {}

impl Memory {
    pub fn new(buffer: wgpu::Buffer, groups: &Arc<BindGroups>) -> Self {
        static IDS: AtomicU64 = AtomicU64::new(0);
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Memory { buffer, id, groups: groups.clone(), bound: AtomicBool::new(false) }
    }

    /// The memory of a tensor.
    pub fn of(buffer: &Buffer) -> Result<&Self> {
        Memory::of_storage(buffer.storage())
    }

    pub fn of_storage(storage: &dyn Storage) -> Result<&Self> {
        let other = || Error::WrongDevice { what: "buffer", got: "another".into(), expected: "wgpu".into() };
        storage.downcast().ok_or_else(other)
    }

    /// Its bind groups go when it goes.
    pub fn is_bound(&self) {
        self.bound.store(true, Ordering::Relaxed);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if *self.bound.get_mut() {
            self.groups.forget(self.id);
        }
    }
}

/// The most bind groups that are kept. A model step takes some a layer.
const MOST: usize = 8192;

/// Bind groups that have been made, by what they bind: a pipeline's number, then of every binding memory, offset and size.
#[derive(Default)]
pub(super) struct BindGroups(Mutex<HashMap<Box<[u64]>, wgpu::BindGroup>>);

impl BindGroups {
    pub fn get(&self, key: &[u64]) -> Option<wgpu::BindGroup> {
        lock(&self.0).get(key).cloned()
    }

    pub fn keep(&self, key: &[u64], group: &wgpu::BindGroup) {
        let mut kept = lock(&self.0);
        // Views of one buffer at ever new places are not worth keeping.
        if kept.len() >= MOST {
            kept.clear();
        }
        kept.insert(key.into(), group.clone());
    }

    /// Lets go of those that hold a memory.
    fn forget(&self, id: u64) {
        lock(&self.0).retain(|key, _| !key[1..].chunks_exact(3).any(|binding| binding[0] == id));
    }
}
