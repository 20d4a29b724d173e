//! What of a problem decides how the tensor-core kernel is compiled.

use crate::backend::cuda::memory::address;
use crate::format::{DType, RowFormat};
use crate::problem::op::Attention;
use crate::problem::{Batch, Domain, PagePool};

#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Shape {
    pub key: RowFormat,
    pub value: RowFormat,
    pub page_size: usize,
    /// Query rows of the longest sequence: queries times heads of a KV head.
    pub query_rows: usize,
    pub q: DType,
    pub out: DType,
    /// Whether queries and outputs are in the model's own domain, of head_dim elements.
    pub original: bool,
    /// Whether rows may be copied 16 bytes at a time.
    pub aligned: bool,
    /// Whether there is little for each block to do: finer tiles spread it better over its warps.
    pub short: bool,
}

/// Less than two tiles of 64 positions for each of eight warps.
pub(super) fn is_short(batch: &Batch, kv_heads: usize, multiprocessors: usize) -> bool {
    let positions: usize = batch.spans().iter().map(|s| (s.len - s.first) as usize).sum();
    positions * kv_heads < 2 * 64 * 8 * multiprocessors
}

impl Shape {
    /// Whether the eight columns of the tensor cores can be four pairs.
    pub fn narrow(&self) -> bool {
        self.query_rows <= 4
    }

    /// As how many numbers of f16 queries, weights and levels are multiplied: f32 queries as two, whose sum is as good as f32.
    pub fn parts(&self) -> usize {
        if self.q == DType::F32 { 2 } else { 1 }
    }

    /// `None` for what the kernel does not take.
    pub fn of(op: &Attention, multiprocessors: usize) -> Option<Self> {
        let queries = op.batch.spans().iter().map(|s| s.new as usize).max()?;
        let buffers = || [&op.key, &op.value].into_iter().flat_map(PagePool::buffers);
        // Rows of a tile that see other positions than their neighbours get NaN from what only those see: f32 keeps them apart.
        if op.q.dtype() == DType::F32 && queries > 1 {
            return None;
        }
        let at = |unit: u64| buffers().all(|b| address(b).is_multiple_of(unit));
        let short = is_short(&op.batch, op.key.kv_heads(), multiprocessors);
        at(2).then(|| Shape {
            key: *op.key.row(),
            value: *op.value.row(),
            page_size: op.key.page_size(),
            query_rows: queries * (op.heads / op.key.kv_heads()),
            q: op.q.dtype(),
            out: op.out.dtype(),
            original: op.params.domain == Domain::Original,
            aligned: at(16),
            short,
        })
    }
}
