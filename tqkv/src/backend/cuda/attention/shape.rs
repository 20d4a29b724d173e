//! What of a problem decides how the tensor-core kernel is compiled.

use crate::backend::cuda::memory::address;
use crate::format::{DType, RowFormat};
use crate::problem::op::{Attention, Near};
use crate::problem::{Batch, Domain, PagePool};

#[derive(Clone, Copy, Debug)]
pub(in crate::backend::cuda) struct Shape {
    pub key: RowFormat,
    pub value: RowFormat,
    pub page_size: usize,
    /// Keys and values of what lies elsewhere (`Attention::near`).
    pub near: [Option<[RowFormat; 2]>; 2],
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

/// The query rows of a sequence that read a KV head.
pub(super) fn query_rows(op: &Attention, sequence: usize) -> usize {
    op.batch.spans()[sequence].new as usize * (op.heads / op.key.kv_heads())
}

/// Less than two tiles of 64 positions for each of eight warps.
pub(super) fn is_short(batch: &Batch, kv_heads: usize, multiprocessors: usize) -> bool {
    let positions: usize = batch.spans().iter().map(|s| (s.len - s.first) as usize).sum();
    positions * kv_heads < 2 * 64 * 8 * multiprocessors
}

/// Whether pages, and rows that are apart, begin at multiples of `unit` as far as strides say, and so do their scales.
fn has_strides_of(pool: &PagePool, unit: usize) -> bool {
    let (codes, scales) = pool.strides();
    let row = |stride| if has_rows_together(pool) { 0 } else { stride };
    let all = [codes, scales].into_iter().flat_map(|s| [s.page, s.head, row(s.row)]);
    pool.is_dense() || all.into_iter().all(|stride| stride.is_multiple_of(unit))
}

/// Whether the rows of a page and KV head lie one behind the other, and so do their scales.
fn has_rows_together(pool: &PagePool) -> bool {
    let (codes, scales) = pool.strides();
    let row = pool.row();
    codes.row == row.row_bytes() && (row.scales_per_row() == 0 || scales.row == row.scale_bytes())
}

/// Whether the kernel can add these positions to the operation's own.
fn goes_with(near: &Near, op: &Attention) -> bool {
    let queries = |batch: &Batch| batch.spans().iter().map(|s| (s.start, s.new)).collect::<Vec<_>>();
    let alike = |[near, own]: [&PagePool; 2]| {
        let (near_row, own_row) = (near.row(), own.row());
        // Rows that are not rotated can be; the others are as they must be, or cannot be.
        let turns = !near_row.is_rotated() || (own_row.is_rotated() && near_row.signs() == own_row.signs());
        let turns = turns && (op.params.domain == Domain::Original || near_row.is_rotated() == own_row.is_rotated());
        let width = (near_row.row_dim(), near_row.head_dim()) == (own_row.row_dim(), own_row.head_dim());
        turns && width && near.is_dense() && near.buffers().all(|b| address(b).is_multiple_of(16))
    };
    let dim = op.key.row().row_dim();
    alike([&near.key, &op.key])
        && alike([&near.value, &op.value])
        && dim == op.value.row().row_dim()
        && dim <= 256
        && queries(&near.batch) == queries(&op.batch)
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
        let mut near = [None; 2];
        if op.near.len() > near.len() || !op.near.iter().all(|n| goes_with(n, op)) {
            return None;
        }
        near.iter_mut().zip(&op.near).for_each(|(to, n)| *to = Some([*n.key.row(), *n.value.row()]));
        let query_rows = (0..op.batch.sequences()).map(|s| query_rows(op, s)).max()?;
        let buffers = || [&op.key, &op.value].into_iter().flat_map(PagePool::buffers);
        // Rows of a tile that see other positions than their neighbours get NaN from what only those see: f32 keeps them apart.
        if op.q.dtype() == DType::F32 && query_rows > op.heads / op.key.kv_heads() {
            return None;
        }
        let at = |unit: usize| {
            let strides = [&op.key, &op.value].into_iter().all(|pool| has_strides_of(pool, unit));
            strides && buffers().all(|b| address(b).is_multiple_of(unit as u64))
        };
        let short = is_short(&op.batch, op.key.kv_heads(), multiprocessors);
        at(2).then(|| Shape {
            key: *op.key.row(),
            value: *op.value.row(),
            near,
            page_size: op.key.page_size(),
            query_rows,
            q: op.q.dtype(),
            out: op.out.dtype(),
            original: op.params.domain == Domain::Original,
            // Where a page's rows are apart, they are copied one by one.
            aligned: at(16) && [&op.key, &op.value].into_iter().all(has_rows_together),
            short,
        })
    }
}
