//! Operations on rows and bytes, each spread over threads. Attention has a folder.

use super::channels::Channels;
use super::codec::RowCoder;
use super::isa::Isa;
use super::rows::{PoolView, PoolViewMut};
use super::{float, memory};
use crate::compute::{DType, KernelSource};
use crate::error::Result;
use crate::problem::op::{Copy, Custom, Dequantize, Quantize, Rotate};
use crate::problem::{Direction, Domain, Positions, RowOrder};
use rayon::prelude::*;

/// Rows that one task encodes, decodes or rotates.
const ROWS_PER_TASK: usize = 32;
/// Decoded output from this size on is written past the caches, which it would not fit anyway.
const STREAM_BYTES: usize = 8 << 20;

pub(super) fn rotate(op: &Rotate, isa: Isa) -> Result<()> {
    let coder = RowCoder::new(&op.row, isa);
    let (head_dim, d) = (op.row.head_dim(), op.row.row_dim());
    // What is not rotated yet, or no longer, has head_dim elements.
    let (x_dim, out_dim) = if op.direction == Direction::Forward { (head_dim, d) } else { (d, head_dim) };
    let in_place = op.x.overlaps(&op.out);
    let x = if in_place { None } else { Some(memory::view(&op.x)?) };
    let mut out = memory::view_mut(&op.out)?;
    let (from, to) = (op.x.dtype(), op.out.dtype());
    let (x_row, out_row) = (x_dim * from.size(), out_dim * to.size());
    let tasks = out.bytes().par_chunks_mut(ROWS_PER_TASK * out_row).enumerate();
    tasks.for_each_init(Vec::new, |scratch, (task, rows)| {
        let n = rows.len() / out_row;
        let x = x.as_ref().map(|x| &x.bytes()[task * ROWS_PER_TASK * x_row..][..n * x_row]);
        if to == DType::F32 && head_dim == d {
            let v = bytemuck::cast_slice_mut(rows);
            if let Some(x) = x {
                float::load(from, x, v);
            }
            coder.rotate(op.direction, v);
        } else {
            scratch.resize(n * d, 0f32);
            load_rows(from, x.unwrap_or(rows), x_dim, scratch, d);
            coder.rotate(op.direction, scratch);
            store_rows(to, scratch, d, rows, out_dim);
        }
    });
    Ok(())
}

/// Rows of `x_dim` elements into rows of `d`, which end with zeros.
fn load_rows(dtype: DType, x: &[u8], x_dim: usize, rows: &mut [f32], d: usize) {
    if x_dim == d {
        return float::load(dtype, x, rows);
    }
    for (x, row) in x.chunks_exact(x_dim * dtype.size()).zip(rows.chunks_exact_mut(d)) {
        let (given, rest) = row.split_at_mut(x_dim);
        float::load(dtype, x, given);
        rest.fill(0.0);
    }
}

/// The first `out_dim` elements of rows of `d`.
fn store_rows(dtype: DType, rows: &[f32], d: usize, out: &mut [u8], out_dim: usize) {
    if out_dim == d {
        return float::store(dtype, rows, out);
    }
    for (row, out) in rows.chunks_exact(d).zip(out.chunks_exact_mut(out_dim * dtype.size())) {
        float::store(dtype, &row[..out_dim], out);
    }
}

pub(super) fn quantize(op: &Quantize, isa: Isa) -> Result<()> {
    for (x, pool) in &op.parts {
        let coder = RowCoder::new(pool.row(), isa);
        let input = memory::view(x)?;
        let rows = PoolViewMut::new(pool)?;
        let (head_dim, d) = (pool.row().head_dim(), pool.row().row_dim());
        let (kv_heads, dtype) = (pool.kv_heads(), x.dtype());
        let channels = Channels::of(pool)?;
        let x_bytes = head_dim * dtype.size();
        let spans = op.batch.spans();
        let tokens = (0..op.batch.tokens()).into_par_iter().with_min_len(ROWS_PER_TASK.div_ceil(kv_heads));
        tokens.for_each_init(
            || vec![0f32; d],
            |v, token| {
                // The span that holds the token: the last that starts at or before it and has new tokens.
                let s = spans.partition_point(|s| (s.start + s.new) as usize <= token);
                let span = &spans[s];
                let position = (span.len - span.new) as usize + token - span.start as usize;
                let (page, slot) = op.batch.locate(s, position);
                for head in 0..kv_heads {
                    let x = &input.bytes()[(token * kv_heads + head) * x_bytes..][..x_bytes];
                    float::load(dtype, x, &mut v[..head_dim]);
                    v[head_dim..].fill(0.0);
                    if let Some(channels) = &channels {
                        channels.store(head, &mut v[..head_dim]);
                    }
                    // SAFETY: `ops::quantize` has checked that no two new positions share a row, and each is written by
                    // one task only.
                    let (codes, scales) = unsafe { rows.row_mut(page, head, slot) };
                    coder.encode(v, codes, scales);
                }
            },
        );
    }
    Ok(())
}

pub(super) fn dequantize(op: &Dequantize, isa: Isa) -> Result<()> {
    let coder = RowCoder::new(op.pool.row(), isa);
    let channels = Channels::of(&op.pool)?.filter(|_| op.domain == Domain::Original);
    let rows = PoolView::new(&op.pool)?;
    let mut out = memory::view_mut(&op.out)?;
    let (kv_heads, n, to) = (op.pool.kv_heads(), op.positions.len(), op.out.dtype());
    let (d, per_row) = (op.pool.row().row_dim(), op.pool.row().scales_per_row());
    let out_dim = if op.domain == Domain::Original { op.pool.row().head_dim() } else { d };
    let large = op.out.bytes() >= STREAM_BYTES;
    let head_at = |r: usize| match op.order {
        RowOrder::TokenMajor => (r % kv_heads, r / kv_heads),
        RowOrder::HeadMajor => (r / n, r % n),
    };
    // The rows from `r` on that lie one after the other, at most so many.
    let run_at = |r: usize, most: usize| {
        let (head, i) = head_at(r);
        let (page, slot) = op.batch.locate(op.sequence, op.positions.get(i));
        let most = match (op.order, &op.positions) {
            (RowOrder::HeadMajor, Positions::Range(_)) => most.min(n - i).min(op.batch.page_size() - slot),
            _ => 1,
        };
        rows.run(rows.at(page, head, slot), rows.in_a_row(most))
    };
    // Rows from `start` on, in f32.
    let fill = |start: usize, v: &mut [f32], factors: &mut [f32]| {
        let (mut runs, mut held, mut i) = ([(std::ptr::null(), 0); ROWS_PER_TASK], 0, 0);
        while i < v.len() / d {
            let run = run_at(start + i, v.len() / d - i);
            if per_row > 0 {
                coder.factors(run.scales, &mut factors[i * per_row..][..run.rows * per_row]);
            }
            runs[held] = (run.codes, run.rows);
            (held, i) = (held + 1, i + run.rows);
        }
        let factors = (per_row > 0).then_some(&factors[..i * per_row]);
        // SAFETY: `run` gives pointers that are readable for 64 bytes past the rows.
        unsafe { coder.decode(&runs[..held], factors, v) };
        if op.domain == Domain::Original {
            coder.rotate(Direction::Inverse, v);
        }
        if let Some(channels) = &channels {
            let rows = v.chunks_exact_mut(d).enumerate();
            rows.for_each(|(i, row)| channels.restore(head_at(start + i).0, &mut row[..out_dim]));
        }
    };
    let scratch = || (vec![0f32; ROWS_PER_TASK * d], vec![0f32; ROWS_PER_TASK * per_row]);
    let tasks = out.bytes().par_chunks_mut(out_dim * to.size() * ROWS_PER_TASK).enumerate();
    tasks.for_each_init(scratch, |(v, factors), (task, rows)| {
        let start = task * ROWS_PER_TASK;
        let whole = to == DType::F32 && out_dim == d;
        if whole && !large {
            return fill(start, bytemuck::cast_slice_mut(rows), factors);
        }
        let v = &mut v[..rows.len() / (out_dim * to.size()) * d];
        fill(start, v, factors);
        match whole {
            true => coder.stream(v, bytemuck::cast_slice_mut(rows)),
            false => store_rows(to, v, d, rows, out_dim),
        }
    });
    Ok(())
}

pub(super) fn copy(op: &Copy) -> Result<()> {
    memory::view_mut(&op.to)?.bytes().copy_from_slice(memory::view(&op.from)?.bytes());
    Ok(())
}

pub(super) fn custom(op: &Custom) -> Result<()> {
    let KernelSource::Cpu(kernel) = &op.source else { unreachable!("checked when it was recorded") };
    let mut views = op.bindings.iter().map(memory::view_mut).collect::<Result<Vec<_>>>()?;
    let mut bindings: Vec<&mut [u8]> = views.iter_mut().map(|v| v.bytes()).collect();
    kernel(&mut bindings, &op.constants);
    Ok(())
}
