//! What recorders of one device share: its stream, tables and workspace; and the work that they make.

use super::driver::{Launch, ParamBytes, Stream, lock};
use super::kernel::KernelKey;
use super::memory::Memory;
use super::tables::Tables;
use super::workspace::Workspace;
use crate::error::Result;
use crate::format::{Codec, RowFormat};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};

pub(super) struct Gpu {
    pub stream: Arc<Stream>,
    tables: Mutex<HashMap<(Codec, usize), Arc<Tables>>>,
    pub workspace: Mutex<Workspace>,
}

/// What goes to the stream.
#[allow(clippy::large_enum_variant)] // Launches are nearly all of them, and their parameters lie in place.
pub(super) enum Work {
    Launch(Launch),
    Copy { from: u64, to: u64, bytes: usize },
}

/// Work in order, and memory that must stay until it is enqueued.
#[derive(Default)]
pub(super) struct Recording {
    pub work: Vec<Work>,
    pub memory: Vec<Arc<Memory>>,
}

impl Gpu {
    pub fn new(stream: Stream) -> Self {
        Gpu { stream: Arc::new(stream), tables: Mutex::default(), workspace: Mutex::default() }
    }

    /// A codec's tables on this device, made once.
    pub fn tables(&self, row: &RowFormat) -> Result<Arc<Tables>> {
        let mut tables = lock(&self.tables);
        let key = (row.codec(), row.row_dim());
        if let Some(found) = tables.get(&key) {
            return Ok(found.clone());
        }
        let new = Arc::new(Tables::new(&self.stream, row)?);
        tables.insert(key, new.clone());
        Ok(new)
    }

    pub fn multiprocessors(&self) -> usize {
        self.stream.context.limits.multiprocessors as usize
    }

    /// Blocks for this much work, if blocks take several pieces: at most so many a multiprocessor.
    pub fn blocks(&self, wanted: usize, most: usize) -> u32 {
        wanted.clamp(1, self.multiprocessors() * most) as u32
    }

    /// Adds a launch.
    pub fn launch<P: bytemuck::Pod>(&self, key: &KernelKey, blocks: u32, params: &P, to: &mut Recording) -> Result<()> {
        let kernel = self.stream.context.kernel(key)?;
        let params = ParamBytes::new(bytemuck::bytes_of(params));
        to.work.push(Work::Launch(Launch { kernel, grid: [blocks, 1, 1], params, waits: true }));
        Ok(())
    }
}

/// The largest power of two, up to 16, that divides where a buffer starts and its rows' length.
pub(super) fn alignment(address: u64, stride: usize) -> u32 {
    1 << (address | stride as u64 | 16).trailing_zeros()
}
