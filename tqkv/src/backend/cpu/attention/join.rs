//! Parts of attention into one.

use super::task::Partial;
use crate::backend::cpu::rows::RowViewMut;
use crate::backend::cpu::{float, memory};
use crate::error::Result;
use crate::problem::op::Merge;
use rayon::prelude::*;

/// Row `r` of all pieces, and the sink, into one; gives the log-sum-exp.
pub(super) fn join(parts: &[Partial], r: usize, sink: Option<f64>, out: &mut [f32]) -> f64 {
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
pub(in crate::backend::cpu) fn merge(op: &Merge) -> Result<()> {
    let d = op.out.shape()[2];
    let parts = op.parts.iter().map(|(o, l)| Ok((memory::view(o)?, memory::view(l)?))).collect::<Result<Vec<_>>>()?;
    let out = RowViewMut::new(&op.out, d * op.out.dtype().size())?;
    let lse = op.lse.as_ref().map(|l| RowViewMut::new(l, 4)).transpose()?;
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
