//! Attention over compressed rows: each row is decoded once for all queries that read it.

use super::coder::Coder;
use super::{float, memory};
use crate::backend::{Attention, Merge};
use crate::error::Result;
use crate::ops::Domain;
use rayon::prelude::*;

/// Query tokens that one task handles.
const QUERY_BLOCK: usize = 16;
/// Positions that are decoded at a time.
const TILE: usize = 64;

/// A task's queries and their running softmax.
struct Rows {
    /// Rotated and scaled queries, then outputs: [rows, D].
    q: Vec<f32>,
    out: Vec<f32>,
    max: Vec<f32>,
    sum: Vec<f32>,
}

pub(super) fn attention(op: &Attention) -> Result<()> {
    let (d, heads, kv_heads) = (op.key.row().head_dim(), op.heads, op.key.kv_heads());
    let group = heads / kv_heads;
    let q = memory::view(&op.q)?;
    let (key_codes, key_scales) = (memory::Rows::codes(&op.key)?, memory::Rows::scales(&op.key)?);
    let (value_codes, value_scales) = (memory::Rows::codes(&op.value)?, memory::Rows::scales(&op.value)?);
    let sinks = op.params.sinks.as_ref().map(memory::view).transpose()?;
    let sinks: Option<&[f32]> = sinks.as_ref().map(|s| bytemuck::cast_slice(s.bytes()));
    let (key_coder, value_coder) = (Coder::new(op.key.row()), Coder::new(op.value.row()));

    let tasks: Vec<(usize, usize, usize)> = (0..op.batch.sequences())
        .flat_map(|s| {
            let blocks = (op.batch.spans()[s].new as usize).div_ceil(QUERY_BLOCK);
            (0..blocks).flat_map(move |b| (0..kv_heads).map(move |h| (s, b * QUERY_BLOCK, h)))
        })
        .collect();
    let results: Vec<Rows> = tasks
        .par_iter()
        .map(|&(s, first_query, head)| {
            let span = op.batch.spans()[s];
            let queries = (span.new as usize - first_query).min(QUERY_BLOCK);
            let n = queries * group;
            let mut rows =
                Rows { q: vec![0.0; n * d], out: vec![0.0; n * d], max: vec![f32::NEG_INFINITY; n], sum: vec![0.0; n] };
            let row_bytes = d * op.q.dtype().size();
            for r in 0..n {
                let token = span.start as usize + first_query + r / group;
                let index = token * heads + head * group + r % group;
                let row = &mut rows.q[r * d..][..d];
                float::load(op.q.dtype(), &q.bytes()[index * row_bytes..][..row_bytes], row);
                if op.params.domain == Domain::Original {
                    key_coder.rotate(row);
                }
            }
            let (first, len) = (span.first as usize, span.len as usize);
            let position = |r: usize| len - span.new as usize + first_query + r / group;
            // Positions that row r sees.
            let seen = |r: usize| {
                let start = op.params.window.map_or(first, |w| first.max((position(r) + 1).saturating_sub(w)));
                let end = if op.params.causal { position(r) + 1 } else { len };
                (start, end)
            };
            let start = seen(0).0;
            let end = seen(n - 1).1;
            let (mut keys, mut values, mut scores) = (vec![0f32; TILE * d], vec![0f32; TILE * d], [0f64; TILE]);
            for tile in (start..end).step_by(TILE) {
                let count = TILE.min(end - tile);
                for i in 0..count {
                    let (page, slot) = op.batch.locate(s, tile + i);
                    let index = (page * kv_heads + head) * op.key.page_size() + slot;
                    key_coder.decode(key_codes.row(index), key_scales.row(index), &mut keys[i * d..][..d]);
                    value_coder.decode(value_codes.row(index), value_scales.row(index), &mut values[i * d..][..d]);
                }
                for r in 0..n {
                    let (from, to) = seen(r);
                    let (from, to) = (from.max(tile) - tile, to.min(tile + count).saturating_sub(tile));
                    if from >= to {
                        continue;
                    }
                    let q = &rows.q[r * d..][..d];
                    let mut max = rows.max[r] as f64;
                    for i in from..to {
                        let mut score = dot(q, &keys[i * d..][..d]) * op.params.scale as f64;
                        if let Some(cap) = op.params.softcap {
                            let cap = cap as f64;
                            score = cap * (score / cap).tanh();
                        }
                        scores[i] = score;
                        max = max.max(score);
                    }
                    let out = &mut rows.out[r * d..][..d];
                    let max = max as f32;
                    if max > rows.max[r] {
                        let shrink = (rows.max[r] - max).exp();
                        rows.sum[r] *= shrink;
                        out.iter_mut().for_each(|o| *o *= shrink);
                        rows.max[r] = max;
                    }
                    for i in from..to {
                        let p = ((scores[i] - max as f64) as f32).exp();
                        rows.sum[r] += p;
                        out.iter_mut().zip(&values[i * d..][..d]).for_each(|(o, v)| *o += p * v);
                    }
                }
            }
            for r in 0..n {
                if let Some(sinks) = sinks {
                    let sink = sinks[head * group + r % group];
                    let max = rows.max[r].max(sink);
                    let shrink = if rows.max[r] == max { 1.0 } else { (rows.max[r] - max).exp() };
                    rows.sum[r] = rows.sum[r] * shrink + (sink - max).exp();
                    rows.out[r * d..][..d].iter_mut().for_each(|o| *o *= shrink);
                    rows.max[r] = max;
                }
                let out = &mut rows.out[r * d..][..d];
                if rows.sum[r] > 0.0 {
                    let inverse = 1.0 / rows.sum[r];
                    out.iter_mut().for_each(|o| *o *= inverse);
                }
                if op.params.domain == Domain::Original {
                    value_coder.restore(out);
                }
            }
            rows
        })
        .collect();

    let mut out = memory::view_mut(&op.out)?;
    let mut lse = op.lse.as_ref().map(memory::view_mut).transpose()?;
    let row_bytes = d * op.out.dtype().size();
    for (&(s, first_query, head), rows) in tasks.iter().zip(&results) {
        for r in 0..rows.max.len() {
            let token = op.batch.spans()[s].start as usize + first_query + r / group;
            let index = token * heads + head * group + r % group;
            float::store(op.out.dtype(), &rows.out[r * d..][..d], &mut out.bytes()[index * row_bytes..][..row_bytes]);
            if let Some(lse) = &mut lse {
                let value = rows.max[r] + rows.sum[r].ln();
                lse.bytes()[index * 4..][..4].copy_from_slice(&value.to_le_bytes());
            }
        }
    }
    Ok(())
}

/// Scores reach the hundreds, where f32 steps by 3e-5: what is subtracted before exp must be finer.
fn dot(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0f32; 16];
    for (a, b) in a.chunks_exact(16).zip(b.chunks_exact(16)) {
        for ((l, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *l += a * b;
        }
    }
    lanes.iter().map(|&l| l as f64).sum()
}

pub(super) fn merge(op: &Merge) -> Result<()> {
    let d = op.out.shape()[2];
    let parts = op.parts.iter().map(|(o, l)| Ok((memory::view(o)?, memory::view(l)?))).collect::<Result<Vec<_>>>()?;
    let mut out = memory::view_mut(&op.out)?;
    let mut lse_out = op.lse.as_ref().map(memory::view_mut).transpose()?;
    let row_bytes = d * op.out.dtype().size();
    let (mut row, mut sum) = (vec![0f32; d], vec![0f32; d]);
    for (r, out) in out.bytes().chunks_exact_mut(row_bytes).enumerate() {
        let lse = |i: usize| bytemuck::cast_slice::<_, f32>(parts[i].1.bytes())[r];
        let max = (0..parts.len()).map(lse).fold(f32::NEG_INFINITY, f32::max);
        sum.fill(0.0);
        let mut total = 0.0;
        for (i, (part, _)) in parts.iter().enumerate().filter(|_| max > f32::NEG_INFINITY) {
            let weight = (lse(i) - max).exp();
            let size = d * op.parts[i].0.dtype().size();
            float::load(op.parts[i].0.dtype(), &part.bytes()[r * size..][..size], &mut row);
            total += weight;
            sum.iter_mut().zip(&row).for_each(|(s, x)| *s += weight * x);
        }
        if total > 0.0 {
            sum.iter_mut().for_each(|s| *s /= total);
        }
        float::store(op.out.dtype(), &sum, out);
        if let Some(lse_out) = &mut lse_out {
            let value = if total > 0.0 { max + total.ln() } else { max };
            lse_out.bytes()[r * 4..][..4].copy_from_slice(&value.to_le_bytes());
        }
    }
    Ok(())
}
