//! Operations on rows and bytes, each spread over threads. Attention has a folder.

use super::channels::Channels;
use super::codec::RowCoder;
use super::isa::Isa;
use super::rows::{PoolView, PoolViewMut};
use super::{float, memory};
use crate::compute::{Buffer, DType, KernelSource};
use crate::error::{Error, Result};
use crate::problem::op::{Copy, Custom, Dequantize, Places, Quantize, Rotate};
use crate::problem::{Batch, Direction, Domain, PagePool, Positions, RowOrder};
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

/// Page and row of each token, if it has one.
fn places(op: &Quantize) -> Result<Vec<Option<(usize, usize)>>> {
    match &op.places {
        Places::Batch(batch) => Ok(places_of(batch)),
        Places::Slots { slots, out_of_range } => {
            let (places, beyond) = places_at(slots, &op.parts[0].1)?;
            if let Some(count) = out_of_range.as_ref().filter(|_| beyond > 0) {
                let mut count = memory::view_mut(count)?;
                let count = &mut bytemuck::cast_slice_mut::<_, u32>(count.bytes())[0];
                *count = count.saturating_add(beyond);
            }
            Ok(places)
        }
    }
}

fn places_of(batch: &Batch) -> Vec<Option<(usize, usize)>> {
    let spans = batch.spans().iter().enumerate();
    let positions = spans.flat_map(|(s, span)| (span.len - span.new..span.len).map(move |p| (s, p as usize)));
    positions.map(|(s, position)| Some(batch.locate(s, position))).collect()
}

/// And how many slots are out of range.
#[allow(clippy::type_complexity)] // Places, and a count.
fn places_at(slots: &Buffer, pool: &PagePool) -> Result<(Vec<Option<(usize, usize)>>, u32)> {
    let view = memory::view(slots)?;
    let slots: Vec<i64> = match slots.dtype() {
        DType::I64 => view.bytes().chunks_exact(8).map(bytemuck::pod_read_unaligned).collect(),
        _ => view.bytes().chunks_exact(4).map(|b| i64::from(bytemuck::pod_read_unaligned::<i32>(b))).collect(),
    };
    let (page_size, rows) = (pool.page_size(), pool.pages() * pool.page_size());
    let within = |&slot: &i64| usize::try_from(slot).ok().filter(|&slot| slot < rows);
    let mut used: Vec<usize> = slots.iter().filter_map(within).collect();
    used.sort_unstable();
    if used.windows(2).any(|w| w[0] == w[1]) {
        return Err(Error::Aliased { what: "a slot that is written from two tokens" });
    }
    let beyond = slots.iter().filter(|slot| **slot != -1 && within(slot).is_none()).count() as u32;
    let places = slots.iter().map(|slot| within(slot).map(|slot| (slot / page_size, slot % page_size)));
    Ok((places.collect(), beyond))
}

pub(super) fn quantize(op: &Quantize, isa: Isa) -> Result<()> {
    let places = places(op)?;
    for (x, pool) in &op.parts {
        let coder = RowCoder::new(pool.row(), isa);
        let input = memory::view(x)?;
        let rows = PoolViewMut::new(pool)?;
        let (head_dim, d) = (pool.row().head_dim(), pool.row().row_dim());
        let (kv_heads, dtype) = (pool.kv_heads(), x.dtype());
        let channels = Channels::of(pool)?;
        let x_bytes = head_dim * dtype.size();
        let tokens = places.par_iter().enumerate().with_min_len(ROWS_PER_TASK.div_ceil(kv_heads));
        tokens.for_each_init(
            || vec![0f32; d],
            |v, (token, place)| {
                let &Some((page, slot)) = place else { return };
                for head in 0..kv_heads {
                    let x = &input.bytes()[(token * kv_heads + head) * x_bytes..][..x_bytes];
                    float::load(dtype, x, &mut v[..head_dim]);
                    v[head_dim..].fill(0.0);
                    if let Some(channels) = &channels {
                        channels.store(head, &mut v[..head_dim]);
                    }
                    // SAFETY: `ops::quantize`, or `places_at`, has checked that no two tokens share a row, and each is
                    // written by one task only.
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
