//! Pages between the device and stored form.

use super::geometry::{PageLayout, Piece};
use crate::cache::state::{KvCache, Pools};
use crate::compute::{Buffer, DeviceKind};
use crate::error::Result;
use std::ops::Range;

/// A page in the pool, the positions that are stored of it, and where its stored form begins in the host's memory.
#[derive(Clone, Copy)]
pub(crate) struct Stored {
    pub page: u32,
    pub positions: usize,
    pub at: usize,
}

impl KvCache {
    /// Copies pages of a group to the host in stored form; bytes between pieces are left as they are.
    pub(crate) fn download(&self, group: usize, layout: &PageLayout, pages: &[Stored], out: &mut [u8]) -> Result<()> {
        let mut staging = vec![];
        for run in self.runs(pages) {
            for (piece, buffer) in self.group_buffers(group).enumerate() {
                let view = view(buffer, run)?;
                let slot = |page: &Stored| layout.piece(page, piece).0;
                let kv_heads = layout.piece(&run[0], piece).1;
                if let [page] = run
                    && page.positions == layout.page_size()
                {
                    view.read_bytes(&mut out[slot(page)])?;
                    continue;
                }
                staging.resize(view.bytes(), 0);
                view.read_bytes(&mut staging)?;
                for (page, from) in run.iter().zip(staging.chunks_exact(view.bytes() / run.len())) {
                    let heads = from.chunks_exact(from.len() / kv_heads);
                    let to = &mut out[slot(page)];
                    let row = to.len() / kv_heads;
                    to.chunks_exact_mut(row).zip(heads).for_each(|(to, from)| to.copy_from_slice(&from[..row]));
                }
            }
        }
        Ok(())
    }

    /// Copies pages of a group from stored form to the device; positions that are not stored become zeros.
    pub(crate) fn upload(&self, group: usize, layout: &PageLayout, pages: &[Stored], data: &[u8]) -> Result<()> {
        let mut staging = vec![];
        for run in self.runs(pages) {
            for (piece, buffer) in self.group_buffers(group).enumerate() {
                let view = view(buffer, run)?;
                let slot = |page: &Stored| layout.piece(page, piece).0;
                let kv_heads = layout.piece(&run[0], piece).1;
                if let [page] = run
                    && page.positions == layout.page_size()
                {
                    view.write_bytes(&data[slot(page)])?;
                    continue;
                }
                staging.clear();
                staging.resize(view.bytes(), 0);
                for (page, to) in run.iter().zip(staging.chunks_exact_mut(view.bytes() / run.len())) {
                    let heads = to.len() / kv_heads;
                    let from = &data[slot(page)];
                    let row = from.len() / kv_heads;
                    let rows = from.chunks_exact(row).zip(to.chunks_exact_mut(heads));
                    rows.for_each(|(from, to)| to[..row].copy_from_slice(from));
                }
                view.write_bytes(&staging)?;
            }
        }
        Ok(())
    }

    /// The codes and scales of a group's layers, in the order of a page's pieces.
    fn group_buffers(&self, group: usize) -> impl Iterator<Item = &Buffer> {
        self.group_pools(group).flat_map(Pools::buffers)
    }

    /// Pages that follow one another in the pool go in one transfer; on the CPU that would only cost a copy.
    fn runs<'a>(&self, pages: &'a [Stored]) -> impl Iterator<Item = &'a [Stored]> {
        let alone = self.device.info().kind == DeviceKind::Cpu;
        pages.chunk_by(move |a, b| !alone && a.page + 1 == b.page)
    }
}

/// The pages of a run, which is never empty.
fn view(buffer: &Buffer, run: &[Stored]) -> Result<Buffer> {
    let first = run[0].page as usize;
    buffer.slice(first..first + run.len())
}

impl PageLayout {
    /// Where a piece of a stored page lies, and its KV heads.
    fn piece(&self, page: &Stored, piece: usize) -> (Range<usize>, usize) {
        let found = self.pieces(page.positions).nth(piece);
        found.map_or((0..0, 1), |Piece { start, bytes, kv_heads }| {
            (page.at + start as usize..page.at + (start + bytes) as usize, kv_heads)
        })
    }
}
