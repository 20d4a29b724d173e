//! Device memory that operations share from launch to launch.

use super::driver::Stream;
use super::memory::Memory;
use crate::error::Result;
use std::sync::Arc;

/// What operations share it for.
#[derive(Clone, Copy)]
pub(super) enum Use {
    /// Partial results of split outputs.
    Partial,
    /// One a part, zero between launches.
    Counters,
    /// Rows as tiles of f16.
    Tiles,
}

/// Each use has memory of its own. It grows when a plan needs more; what graphs may have captured stays.
#[derive(Default)]
pub(super) struct Workspace {
    slots: [Option<Arc<Memory>>; 3],
    outgrown: Vec<Arc<Memory>>,
}

impl Workspace {
    pub fn bytes(&self) -> usize {
        self.slots.iter().flatten().chain(&self.outgrown).map(|m| m.bytes).sum()
    }

    pub fn get(&mut self, stream: &Arc<Stream>, kind: Use, bytes: usize) -> Result<Arc<Memory>> {
        let slot = &mut self.slots[kind as usize];
        if let Some(memory) = slot.as_ref().filter(|m| m.bytes >= bytes) {
            return Ok(memory.clone());
        }
        let memory = Arc::new(stream.alloc(bytes.next_power_of_two())?);
        memory.clear()?;
        self.outgrown.extend(slot.replace(memory.clone()));
        Ok(memory)
    }

    /// Memory for partial results, and counters.
    pub fn parts(&mut self, stream: &Arc<Stream>, partial: usize, counters: usize) -> Result<[Arc<Memory>; 2]> {
        Ok([self.get(stream, Use::Partial, partial)?, self.get(stream, Use::Counters, counters)?])
    }
}
