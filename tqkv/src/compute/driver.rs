//! What a backend implements: memory and submission. What it can be asked to compute is in `problem`.

use super::info::DeviceInfo;
use crate::error::Result;
use std::any::Any;
use std::time::{Duration, Instant};

/// Memory of one allocation. Each backend knows its own.
pub(crate) trait Storage: Any + Send + Sync {
    /// Where it starts, if two storages may hold the same bytes; else each is a place of its own.
    fn address(&self) -> Option<usize> {
        None
    }
}

impl dyn Storage {
    /// The memory of the backend that asks, if it is that backend's.
    pub fn downcast<T: Storage>(&self) -> Option<&T> {
        (self as &dyn Any).downcast_ref()
    }
}

/// A device's driver.
pub(crate) trait Driver: Any + Send + Sync {
    fn info(&self) -> DeviceInfo;
    /// Zeroed memory.
    fn alloc(&self, bytes: usize) -> Result<Box<dyn Storage>>;
    /// Copies to the host what lies `offset` bytes into the storage, after all submitted work.
    fn read(&self, storage: &dyn Storage, offset: usize, out: &mut [u8]) -> Result<()>;
    /// Copies from the host, after all submitted work.
    fn write(&self, storage: &dyn Storage, offset: usize, data: &[u8]) -> Result<()>;
    fn recorder(&self) -> Result<Box<dyn Recorder>>;
    /// Whether kernels bind a whole storage, so that none that is written may be bound a second time.
    fn binds_storages(&self) -> bool {
        false
    }
    /// Whether operations take pools with [`Strides`](crate::ops::Strides) of the caller's.
    fn takes_strides(&self) -> bool {
        false
    }
    /// Whether operations take batches whose page tables lie in the device's memory alone.
    fn reads_tables(&self) -> bool {
        false
    }
    /// Bytes kept for partial results.
    fn workspace_bytes(&self) -> usize;
}

/// A list of operations that is being built.
pub(crate) trait Recorder: Send {
    /// Adds an operation, a `problem::Op`: validated, and known to nobody between `ops` and the backend.
    fn record(&mut self, op: Box<dyn Any + Send>) -> Result<()>;
    /// Whether it takes this `problem::op::Attention` with all that it has.
    fn fuses(&self, _op: &dyn Any) -> bool {
        false
    }
    /// Kernel launches recorded so far, where they are counted.
    #[cfg(test)]
    fn dispatches(&self) -> usize {
        0
    }
    fn submit(self: Box<Self>) -> Result<Box<dyn Completion>>;
    /// What was recorded, to be submitted any number of times, on devices that have that; the recorder is empty then.
    fn repeatable(&mut self) -> Result<Option<Box<dyn Repeatable>>> {
        Ok(None)
    }
    /// Submits, waits, and says how long it took: by the device's clock if it has one, else by the host's.
    fn submit_and_time(self: Box<Self>) -> Result<Duration> {
        let started = Instant::now();
        self.submit()?.wait()?;
        Ok(started.elapsed())
    }
}

/// Work that can be submitted again and again.
pub(crate) trait Repeatable: Send {
    fn submit(&self) -> Result<Box<dyn Completion>>;
}

/// Submitted work.
pub(crate) trait Completion: Send {
    fn wait(self: Box<Self>) -> Result<()>;
}
