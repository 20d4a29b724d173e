//! Attention over compressed rows: how the work is cut up, and put together again. The work itself is in `attend.rs`.

use super::attend::{Source, Task};
use super::rows::RowCoder;
use super::simd::Kernels;
use super::{float, memory};
use crate::error::Result;
use crate::problem::op::{Attention, Merge};
use crate::problem::{Direction, Domain};
use rayon::prelude::*;

/// Query tokens that share the decoded rows.
const QUERY_BLOCK: usize = 16;
/// Positions of one piece of work where there is a single block of queries. Pieces depend on lengths only, never on the
/// number of threads, so that results do not either.
const CHUNK: usize = 1024;

/// Consecutive queries of one sequence and KV head.
struct Unit {
    sequence: usize,
    head: usize,
    first_query: usize,
    queries: usize,
    /// Positions of one piece.
    chunk: usize,
}

pub(super) fn attention(op: &Attention, kernels: &'static Kernels) -> Result<()> {
    let (d, heads, kv_heads) = (op.key.row().head_dim(), op.heads, op.key.kv_heads());
    let group = heads / kv_heads;
    let q = memory::view(&op.q)?;
    let (key_codes, key_scales) = (memory::Rows::codes(&op.key)?, memory::Rows::scales(&op.key)?);
    let (value_codes, value_scales) = (memory::Rows::codes(&op.value)?, memory::Rows::scales(&op.value)?);
    let sinks = op.params.sink_logits.as_ref().map(memory::view).transpose()?;
    let sinks: Option<&[f32]> = sinks.as_ref().map(|s| bytemuck::cast_slice(s.bytes()));
    let (key_coder, value_coder) = (RowCoder::new(op.key.row(), kernels), RowCoder::new(op.value.row(), kernels));
    let out = memory::RowsMut::buffer(&op.out, d * op.out.dtype().size())?;
    let lse = op.lse.as_ref().map(|l| memory::RowsMut::buffer(l, 4)).transpose()?;

    let units: Vec<Unit> = (0..op.batch.sequences())
        .flat_map(|sequence| {
            let new = op.batch.spans()[sequence].new as usize;
            let blocks = new.div_ceil(QUERY_BLOCK);
            (0..blocks).rev().flat_map(move |b| {
                (0..kv_heads).map(move |head| Unit {
                    sequence,
                    head,
                    first_query: b * QUERY_BLOCK,
                    queries: (new - b * QUERY_BLOCK).min(QUERY_BLOCK),
                    chunk: CHUNK * blocks,
                })
            })
        })
        .collect();

    units.par_iter().for_each(|unit| {
        let span = op.batch.spans()[unit.sequence];
        let n = unit.queries * group;
        // The row of q and out that holds row r of the unit.
        let index =
            |r: usize| (span.start as usize + unit.first_query + r / group) * heads + unit.head * group + r % group;
        let mut queries = vec![0f32; n * d];
        let row_bytes = d * op.q.dtype().size();
        for (r, row) in queries.chunks_exact_mut(d).enumerate() {
            float::load(op.q.dtype(), &q.bytes()[index(r) * row_bytes..][..row_bytes], row);
        }
        // Dense keys are not rotated, and their elements may be of any size, so that none of the query's may get lost.
        let units: Vec<f64> = match op.key.row().is_rotated() {
            true => queries.chunks_exact_mut(d).map(take_unit).collect(),
            false => vec![1.0; n],
        };
        if op.params.domain == Domain::Original {
            key_coder.rotate(Direction::Forward, &mut queries);
        }
        let norm = |q: &[f32]| q.iter().map(|&x| x as f64 * x as f64).sum::<f64>().sqrt();
        let norms: Vec<f64> = queries.chunks_exact(d).zip(&units).map(|(q, unit)| norm(q) * unit).collect();
        let (first, len) = (span.first as usize, span.len as usize);
        let seen: Vec<(usize, usize)> = (0..n)
            .map(|r| {
                let position = len - span.new as usize + unit.first_query + r / group;
                let start = op.params.window.map_or(first, |w| first.max((position + 1).saturating_sub(w)));
                (start, if op.params.causal { position + 1 } else { len })
            })
            .collect();
        let (start, end) = (seen[0].0, seen[n - 1].1);
        let starts: Vec<usize> = (start..end).step_by(unit.chunk).collect();
        let parts: Vec<Task> = starts
            .into_par_iter()
            .map(|start| {
                let mut task = Task {
                    q: &queries,
                    units: &units,
                    norms: &norms,
                    seen: &seen,
                    start,
                    end: end.min(start + unit.chunk),
                    batch: &op.batch,
                    sequence: unit.sequence,
                    key: Source {
                        coder: &key_coder,
                        codes: &key_codes,
                        scales: &key_scales,
                        page_rows: kv_heads * op.key.page_size(),
                        head_rows: unit.head * op.key.page_size(),
                    },
                    value: Source {
                        coder: &value_coder,
                        codes: &value_codes,
                        scales: &value_scales,
                        page_rows: kv_heads * op.value.page_size(),
                        head_rows: unit.head * op.value.page_size(),
                    },
                    scale: op.params.scale as f64,
                    softcap: op.params.softcap.map(|c| c as f64),
                    out: vec![0.0; n * d],
                    max: vec![f64::NEG_INFINITY; n],
                    sum: vec![0.0; n],
                };
                // SAFETY: kernels are of this machine.
                unsafe { (kernels.attend)(&mut task) };
                task
            })
            .collect();

        let mut joined = vec![0f32; n * d];
        for (r, joined) in joined.chunks_exact_mut(d).enumerate() {
            let sink = sinks.map(|s| s[unit.head * group + r % group] as f64);
            let lse_value = join(&parts, r, sink, joined);
            if let Some(lse) = &lse {
                // SAFETY: every row is written by one unit only.
                unsafe { lse.row_mut(index(r)) }.copy_from_slice(&(lse_value as f32).to_le_bytes());
            }
        }
        if op.params.domain == Domain::Original {
            value_coder.rotate(Direction::Inverse, &mut joined);
        }
        for (r, row) in joined.chunks_exact(d).enumerate() {
            // SAFETY: as above.
            float::store(op.out.dtype(), row, unsafe { out.row_mut(index(r)) });
        }
    });
    Ok(())
}

/// Divides a query by the power of two that its largest element has, which it gives: so its rotation, its square and its
/// products with levels do not overflow. Nothing is rounded that could matter.
fn take_unit(query: &mut [f32]) -> f64 {
    let largest = query.iter().fold(0f32, |m, x| m.max(x.abs()));
    if largest == 0.0 || largest.is_infinite() {
        return 1.0;
    }
    let exponent = (largest.to_bits() >> 23) as i32 - 127;
    let factor = 2f32.powi(-exponent);
    query.iter_mut().for_each(|x| *x *= factor);
    2f64.powi(exponent)
}

/// Row `r` of all pieces, and the sink, into one; gives the log-sum-exp.
fn join(parts: &[Task], r: usize, sink: Option<f64>, out: &mut [f32]) -> f64 {
    let sink = sink.unwrap_or(f64::NEG_INFINITY);
    // NaN is passed over here and comes back with the sums.
    let max = parts.iter().map(|p| p.max[r]).fold(sink, f64::max);
    let weight = |m: f64| if m == max { 1.0 } else { (m - max).exp() };
    let mut total = if sink == f64::NEG_INFINITY { 0.0 } else { weight(sink) };
    let d = out.len();
    for part in parts {
        let weight = weight(part.max[r]);
        total += weight * part.sum[r];
        out.iter_mut().zip(&part.out[r * d..]).for_each(|(o, x)| *o += weight as f32 * x);
    }
    if total == 0.0 {
        // Nothing was seen.
        return max;
    }
    out.iter_mut().for_each(|o| *o = (*o as f64 / total) as f32);
    max + total.ln()
}

/// Rows are joined as `join` does it: a NaN among the lse makes its row NaN.
pub(super) fn merge(op: &Merge) -> Result<()> {
    let d = op.out.shape()[2];
    let parts = op.parts.iter().map(|(o, l)| Ok((memory::view(o)?, memory::view(l)?))).collect::<Result<Vec<_>>>()?;
    let out = memory::RowsMut::buffer(&op.out, d * op.out.dtype().size())?;
    let lse = op.lse.as_ref().map(|l| memory::RowsMut::buffer(l, 4)).transpose()?;
    (0..op.out.len() / d).into_par_iter().with_min_len(16).for_each(|r| {
        let lse_of = |i: usize| bytemuck::cast_slice::<_, f32>(parts[i].1.bytes())[r] as f64;
        let max = (0..parts.len()).map(lse_of).fold(f64::NEG_INFINITY, f64::max);
        let (mut row, mut sum, mut total) = (vec![0f32; d], vec![0f32; d], 0f64);
        for (i, (part, _)) in parts.iter().enumerate() {
            // A part that saw nothing holds nothing, whatever its bytes are.
            if lse_of(i) == f64::NEG_INFINITY {
                continue;
            }
            let weight = if lse_of(i) == max { 1.0 } else { (lse_of(i) - max).exp() };
            let (dtype, size) = (op.parts[i].0.dtype(), d * op.parts[i].0.dtype().size());
            float::load(dtype, &part.bytes()[r * size..][..size], &mut row);
            total += weight;
            sum.iter_mut().zip(&row).for_each(|(s, x)| *s += weight as f32 * x);
        }
        if total != 0.0 {
            sum.iter_mut().for_each(|s| *s = (*s as f64 / total) as f32);
        }
        let value = if total == 0.0 { max } else { max + total.ln() };
        // SAFETY: every row is written by one task only.
        unsafe {
            float::store(op.out.dtype(), &sum, out.row_mut(r));
            if let Some(lse) = &lse {
                lse.row_mut(r).copy_from_slice(&(value as f32).to_le_bytes());
            }
        }
    });
    Ok(())
}
