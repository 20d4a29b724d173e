//! Attention over one layer.

use super::plan::{Read, Run};
use super::state::{KvCache, Pools, SequenceId, Side};
use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::format::DType;
use crate::ops::{self, AttentionParams, Domain};
use crate::problem::checks::{expect_apart, expect_shape};

/// What attention is asked of a layer: queries, where their results go, and how they see.
pub(super) struct Request<'a> {
    pub layer: usize,
    pub q: &'a Buffer,
    pub out: &'a Buffer,
    pub lse: Option<&'a Buffer>,
    pub params: &'a AttentionParams,
}

impl KvCache {
    /// Attention of the newest positions of sequences, in one layer.
    ///
    /// `queries` names each sequence once with its number of queries, which stand at its newest positions (usually the
    /// tokens just appended). `q` and `out` are \[queries, heads, head_dim\] (f32, f16 or bf16), `lse` f32
    /// \[queries, heads\]; see [`ops::attention`]. A windowed layer's window applies on top of `params`.
    ///
    /// A layer with sinks, or with newest positions in codecs of their own, attends to each by themselves and merges all, over memory that
    /// all its calls share: encoders of one cache are submitted one after the other. No window hides sinks. Queries that are not causal
    /// read the newest positions as all others.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], [`Error::RepeatedSequence`], [`Error::Positions`] for more queries than
    /// positions, queries that would see dropped ones, or queries among sinks that are not causal and would see more than
    /// sinks, [`Error::RotatedSinks`], and those of [`ops::attention`].
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    pub fn attend(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        queries: &[(SequenceId, usize)],
        q: &Buffer,
        out: &Buffer,
        lse: Option<&Buffer>,
        params: &AttentionParams,
    ) -> Result<()> {
        let of = self.layer(layer)?;
        let (shape, source) = (of.shape, of.source);
        let spans = self.spans(source, queries, false)?;
        let runs = self.reads(shape, params.causal, &spans)?;
        self.record_attention(encoder, &runs, &Request { layer, q, out, lse, params })
    }

    pub(super) fn record_attention(
        &mut self,
        encoder: &mut CommandEncoder,
        runs: &[Run],
        request: &Request,
    ) -> Result<()> {
        let extents = self.layer(request.layer)?.extents.clone();
        let &Request { q, out, lse, params, .. } = request;
        // As most layers are: one extent for all queries.
        if let ([Run { reads, .. }], [pools]) = (runs, &*extents) {
            let read = &reads[0];
            let params = read.params(params).unwrap_or_else(|| unreachable!("a layer's own positions alone"));
            return ops::attention(encoder, q, &pools.key, &pools.value, &read.batch, &params, out, lse);
        }
        expect_several(&extents, runs, request)?;
        for Run { queries, reads } in runs {
            let rows = |buffer: &Buffer| buffer.slice(queries.clone());
            let (q, out, lse) = (rows(q)?, rows(out)?, lse.map(rows).transpose()?);
            let reads: Vec<_> = reads.iter().filter_map(|read| Some((read, read.params(params)?))).collect();
            let attention = |encoder: &mut _, (read, params): &(&Read, AttentionParams), out: &_, lse: Option<&_>| {
                let Pools { key, value, .. } = &extents[read.extent];
                ops::attention(encoder, &q, key, value, &read.batch, params, out, lse)
            };
            if let [read] = &reads[..] {
                attention(encoder, read, &out, lse.as_ref())?;
                continue;
            }
            if attend_at_once(encoder, &extents, &reads, &q, &out, lse.as_ref())? {
                continue;
            }
            let &[_, heads, head_dim] = q.shape() else { continue };
            let mut parts = vec![];
            for (i, (read, params)) in reads.into_iter().enumerate() {
                let part = self.scratch(i, [queries.len(), heads, head_dim])?;
                // A sink logit counts once.
                let sink_logits = params.sink_logits.clone().filter(|_| i == 0);
                attention(encoder, &(read, AttentionParams { sink_logits, ..params }), &part[0], Some(&part[1]))?;
                parts.push(part);
            }
            let parts: Vec<_> = parts.iter().map(|[out, lse]| (out, lse)).collect();
            ops::merge(encoder, &parts, &out, lse.as_ref())?;
        }
        Ok(())
    }

    /// Buffers for partial result number `which`: an output of this shape, f32, and its log-sum-exps.
    fn scratch(&mut self, which: usize, shape: [usize; 3]) -> Result<[Buffer; 2]> {
        let rows = shape[0] * shape[1];
        let sizes = [rows * shape[2], rows];
        let fits = |s: &&[Buffer; 2]| s[0].len() >= sizes[0] && s[1].len() >= sizes[1];
        let [out, lse] = match self.scratch.get(which).filter(fits) {
            Some(scratch) => scratch.clone(),
            None => {
                let new = |n: usize| self.device.zeros(DType::F32, &[n]);
                let new = [new(sizes[0])?, new(sizes[1])?];
                match self.scratch.get_mut(which) {
                    Some(old) => *old = new.clone(),
                    None => self.scratch.push(new.clone()),
                }
                new
            }
        };
        Ok([out.slice(0..sizes[0])?.reshape(&shape)?, lse.slice(0..sizes[1])?.reshape(&shape[..2])?])
    }
}

/// All reads of some queries as one operation, with the layer's own positions as what the others are added to; false where that is not to be had.
fn attend_at_once(
    encoder: &mut CommandEncoder,
    extents: &[Pools],
    reads: &[(&Read, AttentionParams)],
    q: &Buffer,
    out: &Buffer,
    lse: Option<&Buffer>,
) -> Result<bool> {
    let (own, others): (Vec<_>, Vec<_>) = reads.iter().partition(|(read, _)| read.extent == 0);
    let parts: Vec<_> = own
        .iter()
        .chain(&others)
        .map(|(read, params)| {
            let Pools { key, value, .. } = &extents[read.extent];
            ops::Part { key, value, batch: &read.batch, params }
        })
        .collect();
    if own.is_empty() { Ok(false) } else { ops::attention_of_parts(encoder, q, &parts, out, lse) }
}

/// What [`ops::attention`] would say of a part of the queries, said of all before anything is recorded.
fn expect_several(extents: &[Pools], runs: &[Run], request: &Request) -> Result<()> {
    let &Request { layer, q, out, lse, params } = request;
    if params.domain == Domain::Rotated {
        for (sinks, side) in extents[1..].iter().flat_map(|e| [(e, Side::Key), (e, Side::Value)]) {
            let (got, expected) = (sinks.side(side).row(), extents[0].side(side).row());
            if (got.is_rotated(), got.signs()) != (expected.is_rotated(), expected.signs()) {
                let (got, expected) = (got.codec().to_string(), expected.codec().to_string());
                return Err(Error::RotatedSinks { layer, got, expected });
            }
        }
    }
    let tokens = runs.last().map_or(0, |run| run.queries.end);
    let &[n, heads, head_dim] = q.shape() else {
        let expected = format!("[{tokens}, heads, {}]", extents[0].key.row().head_dim());
        return Err(Error::shape("q", q.shape(), expected));
    };
    let pools = || extents.iter().flat_map(Pools::buffers);
    expect_shape("q", q, &[tokens, heads, head_dim])?;
    expect_shape("out", out, q.shape())?;
    expect_apart("out", out, pools().chain([q]))?;
    if let Some(lse) = lse {
        expect_shape("lse", lse, &[n, heads])?;
        expect_apart("lse", lse, pools().chain([q, out]))?;
    }
    Ok(())
}
