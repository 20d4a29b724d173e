//! Device memory that operations share from launch to launch.

use super::driver::Stream;
use super::memory::Memory;
use crate::error::Result;
use std::sync::Arc;

/// Where parts of split outputs meet. It grows when a plan needs more; what graphs may have captured stays.
#[derive(Default)]
pub(super) struct Workspace {
    partial: Option<Arc<Memory>>,
    /// One a part, zero between launches.
    counters: Option<Arc<Memory>>,
    outgrown: Vec<Arc<Memory>>,
}

impl Workspace {
    pub fn bytes(&self) -> usize {
        [&self.partial, &self.counters].into_iter().flatten().chain(&self.outgrown).map(|m| m.bytes).sum()
    }

    /// Memory for partial results, and counters.
    pub fn get(&mut self, stream: &Arc<Stream>, partial: usize, counters: usize) -> Result<[Arc<Memory>; 2]> {
        let Workspace { partial: p, counters: c, outgrown } = self;
        let mut grown = |slot: &mut Option<Arc<Memory>>, bytes: usize| -> Result<Arc<Memory>> {
            if let Some(memory) = slot.as_ref().filter(|m| m.bytes >= bytes) {
                return Ok(memory.clone());
            }
            let memory = Arc::new(stream.alloc(bytes.next_power_of_two())?);
            memory.clear()?;
            outgrown.extend(slot.replace(memory.clone()));
            Ok(memory)
        };
        Ok([grown(p, partial)?, grown(c, counters)?])
    }
}
