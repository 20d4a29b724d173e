//! How attention is cut into pieces of work, and put together again.

use super::attend::Attend;
use super::join::join;
use super::query::Prepare;
use super::task::{HeadRows, Partial, Task};
use crate::backend::cpu::channels::Channels;
use crate::backend::cpu::codec::RowCoder;
use crate::backend::cpu::float;
use crate::backend::cpu::isa::Isa;
use crate::backend::cpu::memory::{self, View};
use crate::backend::cpu::rows::{PoolView, RowViewMut};
use crate::error::Result;
use crate::problem::op::Attention;
use crate::problem::{Direction, Domain, PagePool, Visible};
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

/// K or V, held for reading.
struct Cached<'a> {
    coder: RowCoder,
    rows: PoolView<'a>,
}

impl<'a> Cached<'a> {
    fn new(pool: &'a PagePool, isa: Isa) -> Result<Self> {
        Ok(Cached { coder: RowCoder::new(pool.row(), isa), rows: PoolView::new(pool)? })
    }

    fn head(&self, head: usize) -> HeadRows<'_> {
        HeadRows { tables: &self.coder, rows: &self.rows, head }
    }
}

/// The queries of a unit, in the rotated domain.
struct Queries {
    rows: Vec<f32>,
    units: Vec<f64>,
    norms: Vec<f64>,
    /// What the shift of the keys' channels takes from each score.
    biases: Vec<f64>,
    /// The positions that each row sees.
    seen: Vec<(usize, usize)>,
}

struct Work<'a> {
    op: &'a Attention,
    isa: Isa,
    q: View<'a>,
    key: Cached<'a>,
    value: Cached<'a>,
    channels: Option<Channels<'a>>,
    sink_logits: Option<View<'a>>,
    out: RowViewMut<'a>,
    lse: Option<RowViewMut<'a>>,
    /// Whether the precision that is asked for allows words.
    words: bool,
    /// Query heads of a KV head.
    group: usize,
    /// Elements of a row of q and out, and of a stored row.
    given: usize,
    d: usize,
}

pub(in crate::backend::cpu) fn attention(op: &Attention, isa: Isa) -> Result<()> {
    let row = op.key.row();
    let given = if op.params.domain == Domain::Original { row.head_dim() } else { row.row_dim() };
    let work = Work {
        op,
        isa,
        q: memory::view(&op.q)?,
        key: Cached::new(&op.key, isa)?,
        value: Cached::new(&op.value, isa)?,
        channels: Channels::of(&op.key)?,
        sink_logits: op.params.sink_logits.as_ref().map(memory::view).transpose()?,
        out: RowViewMut::new(&op.out, given * op.out.dtype().size())?,
        lse: op.lse.as_ref().map(|l| RowViewMut::new(l, 4)).transpose()?,
        words: op.params.precision.allows_half(op.q.dtype()),
        group: op.heads / op.key.kv_heads(),
        given,
        d: row.row_dim(),
    };
    units(op).par_iter().for_each(|unit| work.run(unit));
    Ok(())
}

/// The newest queries first, as they see most.
fn units(op: &Attention) -> Vec<Unit> {
    let units = |sequence: usize| {
        let new = op.batch.spans()[sequence].new as usize;
        let blocks = new.div_ceil(QUERY_BLOCK);
        (0..blocks).rev().flat_map(move |b| {
            (0..op.key.kv_heads()).map(move |head| Unit {
                sequence,
                head,
                first_query: b * QUERY_BLOCK,
                queries: (new - b * QUERY_BLOCK).min(QUERY_BLOCK),
                chunk: CHUNK * blocks,
            })
        })
    };
    (0..op.batch.sequences()).flat_map(units).collect()
}

impl Work<'_> {
    fn run(&self, unit: &Unit) {
        let queries = self.queries(unit);
        let (start, end) = (queries.seen[0].0, queries.seen[queries.seen.len() - 1].1);
        let starts: Vec<usize> = (start..end).step_by(unit.chunk).collect();
        let rows = self.isa.run(Prepare {
            q: &queries.rows,
            units: &queries.units,
            keys: &self.key.coder,
            values: &self.value.coder,
            words: self.words,
        });
        let parts: Vec<Partial> = starts
            .into_par_iter()
            .map(|start| {
                let task = Task {
                    q: &queries.rows,
                    units: &queries.units,
                    norms: &queries.norms,
                    biases: &queries.biases,
                    seen: &queries.seen,
                    start,
                    end: end.min(start + unit.chunk),
                    batch: &self.op.batch,
                    sequence: unit.sequence,
                    key: self.key.head(unit.head),
                    value: self.value.head(unit.head),
                    rows: &rows,
                    scale: self.op.params.scale as f64,
                    softcap: self.op.params.softcap.map(|c| c as f64),
                };
                self.isa.run(Attend(&task))
            })
            .collect();
        // A softcap has needed it already.
        let biases = if self.op.params.softcap.is_some() { vec![0.0; queries.biases.len()] } else { queries.biases };
        self.store(unit, &parts, &biases);
    }

    /// The row of q and out that holds row `r` of the unit.
    fn index(&self, unit: &Unit, r: usize) -> usize {
        let token = self.op.batch.spans()[unit.sequence].start as usize + unit.first_query + r / self.group;
        token * self.op.heads + unit.head * self.group + r % self.group
    }

    fn queries(&self, unit: &Unit) -> Queries {
        let (n, d, params) = (unit.queries * self.group, self.d, &self.op.params);
        let head = unit.head;
        let mut rows = vec![0f32; n * d];
        let (dtype, bytes) = (self.op.q.dtype(), self.given * self.op.q.dtype().size());
        for (r, row) in rows.chunks_exact_mut(d).enumerate() {
            float::load(dtype, &self.q.bytes()[self.index(unit, r) * bytes..][..bytes], &mut row[..self.given]);
        }
        // Dense keys are not rotated, and their elements may be of any size, so that none of the query's may get lost.
        let units: Vec<f64> = match self.op.key.row().is_rotated() {
            true => rows.chunks_exact_mut(d).map(take_unit).collect(),
            false => vec![1.0; n],
        };
        let mut biases = vec![0.0; n];
        if let Some(channels) = &self.channels {
            let rows = rows.chunks_exact_mut(d).zip(&mut biases).zip(&units);
            rows.for_each(|((q, bias), unit)| {
                *bias = channels.query(head, &mut q[..self.given]) * unit * params.scale as f64;
            });
        }
        if params.domain == Domain::Original {
            self.key.coder.rotate(Direction::Forward, &mut rows);
        }
        let norms = rows.chunks_exact(d).zip(&units).map(|(q, unit)| norm(q) * unit).collect();
        let span = self.op.batch.spans()[unit.sequence];
        let held = span.first as usize..span.len as usize;
        let visible = Visible { causal: params.causal, window: params.window };
        let seen = (0..n).map(|r| {
            let position = held.end - span.new as usize + unit.first_query + r / self.group;
            let seen = visible.range(position..position + 1, held.clone());
            (seen.start, seen.end)
        });
        Queries { units, norms, biases, seen: seen.collect(), rows }
    }

    fn store(&self, unit: &Unit, parts: &[Partial], biases: &[f64]) {
        let (n, d) = (unit.queries * self.group, self.d);
        let sinks = self.sink_logits.as_ref().map(|s| bytemuck::cast_slice::<_, f32>(s.bytes()));
        let mut joined = vec![0f32; n * d];
        for (r, joined) in joined.chunks_exact_mut(d).enumerate() {
            let sink = sinks.map(|s| s[unit.head * self.group + r % self.group] as f64);
            let value = join(parts, r, sink.map(|s| s - biases[r]), joined) + biases[r];
            if let Some(lse) = &self.lse {
                // SAFETY: every row is written by one unit only.
                unsafe { lse.row_mut(self.index(unit, r)) }.copy_from_slice(&(value as f32).to_le_bytes());
            }
        }
        if self.op.params.domain == Domain::Original {
            self.value.coder.rotate(Direction::Inverse, &mut joined);
        }
        for (r, row) in joined.chunks_exact(d).enumerate() {
            // SAFETY: every row is written by one unit only.
            let out = unsafe { self.out.row_mut(self.index(unit, r)) };
            float::store(self.op.out.dtype(), &row[..self.given], out);
        }
    }
}

/// Divides a query by the power of two that its largest element has, which it gives: so its rotation and its products with levels
/// do not overflow. Nothing is rounded that could matter. Queries of usual sizes stay as they are.
fn take_unit(query: &mut [f32]) -> f64 {
    // As integers, so that it is done in vectors; NaN is above infinity.
    let largest = query.iter().fold(0, |m, x| x.abs().to_bits().max(m));
    let exponent = (largest >> 23) as i32 - 127;
    if largest == 0 || exponent == 128 || (-60..60).contains(&exponent) {
        return 1.0;
    }
    let factor = 2f32.powi(-exponent);
    query.iter_mut().for_each(|x| *x *= factor);
    2f64.powi(exponent)
}

/// The norm of a row.
fn norm(row: &[f32]) -> f64 {
    let mut lanes = [0f64; 16];
    for x in row.chunks_exact(16) {
        lanes.iter_mut().zip(x).for_each(|(l, &x)| *l += x as f64 * x as f64);
    }
    lanes.iter().sum::<f64>().sqrt()
}
