//! Where the new positions of some sequences are written, and what their queries read: the same for all layers of a shape.

use super::extent::Extent;
use super::state::{Held, KvCache, NewPositions, SequenceId};
use crate::error::{Error, Result};
use crate::ops::{AttentionParams, Batch, NO_PAGE, Span};
use std::ops::Range;

/// Batches that are kept: two kinds of layers, with sinks each, need four in a step.
const BATCHES: usize = 8;

/// New tokens that one extent of a layer holds.
pub(super) struct Write {
    /// Among the layer's extents.
    pub extent: usize,
    /// Among the tokens of all sequences.
    pub tokens: Range<usize>,
    pub batch: Batch,
}

/// Queries that follow one another and read the same extents.
pub(super) struct Run {
    /// Among the queries of all sequences.
    pub queries: Range<usize>,
    /// One, or several whose results are merged.
    pub reads: Vec<Read>,
}

/// What queries read of one extent.
pub(super) struct Read {
    /// Among the layer's extents.
    pub extent: usize,
    pub batch: Batch,
    mask: Mask,
}

/// What hides positions of an extent from a query.
#[derive(PartialEq)]
enum Mask {
    /// What the caller says, and the layer's window.
    Window(Option<usize>),
    /// What the caller says, but no window: sinks among themselves.
    NoWindow,
    /// Nothing: all of them come before it.
    Nothing,
}

impl Write {
    fn is_like(&self, other: &Write) -> bool {
        self.extent == other.extent && self.tokens == other.tokens
    }
}

impl Run {
    fn is_like(&self, other: &Run) -> bool {
        let alike = |(a, b): (&Read, &Read)| a.extent == b.extent && a.mask == b.mask;
        self.queries == other.queries && pairs(&self.reads, &other.reads).is_some_and(|mut reads| reads.all(alike))
    }
}

fn pairs<'a, T>(a: &'a [T], b: &'a [T]) -> Option<impl Iterator<Item = (&'a T, &'a T)>> {
    (a.len() == b.len()).then(|| a.iter().zip(b))
}

/// The batches of two lists of writes, pair by pair, if they differ in nothing else.
pub(super) fn like_writes<'a>(a: &'a [Write], b: &'a [Write]) -> Option<Vec<(&'a Batch, &'a Batch)>> {
    pairs(a, b)?.map(|(a, b)| a.is_like(b).then_some((&a.batch, &b.batch))).collect()
}

/// The batches of two lists of reads, pair by pair, if they differ in nothing else.
pub(super) fn like_reads<'a>(a: &'a [Run], b: &'a [Run]) -> Option<Vec<(&'a Batch, &'a Batch)>> {
    let alike = pairs(a, b)?.map(|(a, b)| a.is_like(b).then(|| a.reads.iter().zip(&b.reads)));
    let runs: Vec<_> = alike.collect::<Option<_>>()?;
    Some(runs.into_iter().flatten().map(|(a, b)| (&a.batch, &b.batch)).collect())
}

impl Read {
    /// The parameters of a call for these positions alone.
    pub fn params(&self, params: &AttentionParams) -> AttentionParams {
        let params = params.clone();
        match self.mask {
            Mask::Window(Some(window)) => {
                AttentionParams { window: Some(params.window.map_or(window, |w| w.min(window))), ..params }
            }
            Mask::Window(None) => params,
            Mask::NoWindow => AttentionParams { window: None, ..params },
            // A sink logit counts once, among the other positions.
            Mask::Nothing => AttentionParams { causal: false, window: None, sink_logits: None, ..params },
        }
    }
}

impl KvCache {
    /// Each sequence with its length in a layer (the new tokens added if they are still to come) and its new positions.
    pub(super) fn spans(
        &self,
        layer: usize,
        tokens: &[(SequenceId, usize)],
        to_come: bool,
    ) -> Result<Vec<NewPositions>> {
        if tokens.is_empty() {
            return Err(Error::Zero { what: "sequences of a batch" });
        }
        let mut ids: Vec<_> = tokens.iter().map(|t| t.0).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::RepeatedSequence { got: pair[0].0 });
        }
        let overflow = Error::SizeOverflow { what: "length of a sequence", limit: "u32" };
        let span = |&(id, new): &(SequenceId, usize)| {
            let held = self.sequence(id)?.lens[layer];
            let len = held.checked_add(if to_come { new } else { 0 }).filter(|&n| n <= u32::MAX as usize);
            let len = len.ok_or_else(|| overflow.clone())?;
            if new > len {
                return Err(Error::Positions { start: 0, end: new, first: 0, len });
            }
            Ok((id, len, new))
        };
        tokens.iter().map(span).collect()
    }

    /// The writes of new positions into the extents of a shape, whose pages are reserved.
    pub(super) fn writes(&mut self, shape: usize, spans: &[NewPositions]) -> Result<Vec<Write>> {
        let groups = self.shapes[shape].clone();
        let all = 0..spans.iter().map(|s| s.2).sum();
        let first = self.sink_positions(shape);
        let mut writes = vec![Write { extent: 0, tokens: all, batch: self.batch(groups[0], first, spans)? }];
        // Sinks are written twice. A window's pages may then be dropped as ever, and what shares pages need not know of sinks.
        for (extent, &group) in groups.iter().enumerate().skip(1) {
            let mut start = 0;
            for &(id, len, new) in spans {
                let held = self.groups[group].extent;
                let early = held.of_new(len, new);
                if early > 0 {
                    let batch = self.batch(group, 0, &[(id, held.end(len), early)])?;
                    writes.push(Write { extent, tokens: start..start + early, batch });
                }
                start += new;
            }
        }
        Ok(writes)
    }

    /// What the queries at the newest positions read of a shape, in order.
    ///
    /// # Errors
    /// [`Error::Positions`] for queries that would see dropped positions, or that stand among sinks and would see more.
    pub(super) fn reads(&mut self, shape: usize, causal: bool, spans: &[NewPositions]) -> Result<Vec<Run>> {
        let (groups, first) = (self.shapes[shape].clone(), self.sink_positions(shape));
        let own = groups[0];
        let window = if let Extent::Newest(window) = self.groups[own].extent { Some(window) } else { None };
        // Queries among the sinks see no others; the rest see all sinks.
        let mut parts: Vec<(bool, NewPositions)> = vec![];
        for &(id, len, new) in spans {
            let start = len - new;
            let early = if causal || len <= first { first.saturating_sub(start).min(new) } else { 0 };
            if early < new && start + early < first {
                return Err(Error::Positions { start, end: len, first, len });
            }
            parts.extend((early > 0).then_some((true, (id, start + early, early))));
            parts.extend((early < new || new == 0).then_some((false, (id, len, new - early))));
        }
        let rest: Vec<_> = parts.iter().filter(|p| !p.0).map(|p| p.1).collect();
        self.expect_seen(own, first, &rest)?;
        let (mut runs, mut start) = (vec![], 0);
        for run in parts.chunk_by(|a, b| a.0 == b.0) {
            let spans: Vec<_> = run.iter().map(|p| p.1).collect();
            let queries = start..start + spans.iter().map(|s| s.2).sum::<usize>();
            start = queries.end;
            if run[0].0 {
                let batch = self.batch(groups[1], 0, &spans)?;
                runs.push(Run { queries, reads: vec![Read { extent: 1, batch, mask: Mask::NoWindow }] });
                continue;
            }
            let batch = self.batch(own, first, &spans)?;
            let mut reads = vec![Read { extent: 0, batch, mask: Mask::Window(window) }];
            if first > 0 && !queries.is_empty() {
                // A query stands at a held position, but without a mask it does not matter at which: as many at once as there are.
                let at_sinks: Vec<_> = spans
                    .iter()
                    .flat_map(|&(id, _, new)| (0..new).step_by(first).map(move |i| (id, first, first.min(new - i))))
                    .collect();
                let batch = self.batch(groups[1], 0, &at_sinks)?;
                reads.push(Read { extent: 1, batch, mask: Mask::Nothing });
            }
            runs.push(Run { queries, reads });
        }
        Ok(runs)
    }

    /// Fails if a query would see positions that its window has dropped; those before `first` are looked up elsewhere.
    fn expect_seen(&self, group: usize, first: usize, spans: &[NewPositions]) -> Result<()> {
        for &(id, len, new) in spans.iter().filter(|s| s.2 > 0) {
            // A query stands one before the token that would follow it.
            let start = self.groups[group].extent.seen(len - new).max(first);
            let first = self.sequence(id)?.held[group].first;
            if start < first {
                return Err(Error::Positions { start, end: len, first, len });
            }
        }
        Ok(())
    }

    /// The batch of these sequences, one of the last if nothing has changed since. Those of its positions before `first` are
    /// left out, unless they are new.
    pub(super) fn batch(&mut self, group: usize, first: usize, spans: &[NewPositions]) -> Result<Batch> {
        let key = (group, first, spans.to_vec(), self.version);
        if let Some((_, batch)) = self.batches.iter().find(|(last, batch)| *last == key && batch.is_current()) {
            return Ok(batch.clone());
        }
        let page_size = self.groups[group].page_size;
        let held = |id: &SequenceId| self.sequence(*id).map(|s| &s.held[group]);
        let mut width = 1;
        for (id, ..) in spans {
            width = width.max(held(id)?.pages.len());
        }
        // With room to grow, so that a captured step lasts.
        width = width.next_power_of_two();
        // A table is a ring of `width` pages; where nothing was dropped it does not wrap.
        let mut table = vec![NO_PAGE; width * spans.len()];
        for ((id, ..), table) in spans.iter().zip(table.chunks_mut(width)) {
            let Held { first, pages, .. } = held(id)?;
            let base = first / page_size;
            pages.iter().enumerate().for_each(|(i, &page)| table[(base + i) % width] = page);
        }
        let mut rows = Vec::with_capacity(spans.len());
        for (&(id, len, new), pages) in spans.iter().zip(table.chunks(width)) {
            let first = held(&id)?.first.max(first.min(len - new)).min(len);
            rows.push(Span { first, len, new, pages });
        }
        let batch = Batch::new(&self.device, page_size, &rows)?;
        self.batches.truncate(BATCHES - 1);
        self.batches.push_front((key, batch.clone()));
        Ok(batch)
    }
}
