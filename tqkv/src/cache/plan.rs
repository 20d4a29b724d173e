//! Where the new positions of some sequences are written, and what their queries read: the same for all layers of a shape.

use super::extent::Extent;
use super::state::{Held, Kept, KvCache, NewPositions, SequenceId};
use crate::error::{Error, Result};
use crate::ops::{AttentionParams, Batch, NO_PAGE, Span};
use std::ops::Range;

/// Batches that are kept: two kinds of layers, with sinks and newest positions each, need a dozen in a step.
const BATCHES: usize = 16;

/// New tokens that one extent of a layer holds.
#[derive(Clone)]
pub(super) struct Write {
    /// Among the layer's extents.
    pub extent: usize,
    /// Among the tokens of all sequences.
    pub tokens: Range<usize>,
    pub batch: Batch,
}

/// Queries that follow one another and read the same extents.
#[derive(Clone)]
pub(super) struct Run {
    /// Among the queries of all sequences.
    pub queries: Range<usize>,
    /// One, or several whose results are merged.
    pub reads: Vec<Read>,
}

/// What queries read of one extent.
#[derive(Clone)]
pub(super) struct Read {
    /// Among the layer's extents.
    pub extent: usize,
    pub batch: Batch,
    mask: Mask,
}

/// What hides positions of an extent from a query.
#[derive(Clone, PartialEq)]
enum Mask {
    /// What the caller says, and so many newest positions at most: the layer's window, or the newest that are stored apart.
    Window(Option<usize>),
    /// As it, for queries that stand so many positions further than the batch says: the newest are read elsewhere.
    Before(usize, Option<usize>),
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
    /// The parameters of a call for these positions alone; none if queries see none of them.
    pub fn params(&self, params: &AttentionParams) -> Option<AttentionParams> {
        let params = params.clone();
        let both = |window: Option<usize>| params.window.into_iter().chain(window).min();
        Some(match self.mask {
            Mask::Window(window) => AttentionParams { window: both(window), ..params },
            Mask::Before(newest, window) => {
                let window = match both(window) {
                    Some(window) => Some(window.checked_sub(newest).filter(|&rest| rest > 0)?),
                    None => None,
                };
                AttentionParams { window, ..params }
            }
            Mask::NoWindow => AttentionParams { window: None, ..params },
            Mask::Nothing => AttentionParams { causal: false, window: None, ..params },
        })
    }
}

/// Which extents a query reads.
#[derive(Clone, Copy, PartialEq)]
enum Kind {
    /// It stands among the sinks, and sees no others.
    Sinks,
    /// All but sinks from the layer's own positions.
    Own,
    /// All but sinks from the newest, which are all that it sees.
    Near,
    /// Its newest positions apart, and those before them.
    Far,
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
        let (groups, kept) = (self.shapes[shape].clone(), self.apart(shape));
        let all = || 0..spans.iter().map(|s| s.2).sum();
        let first = kept.sinks.map_or(0, |s| s.1);
        let mut writes = vec![Write { extent: 0, tokens: all(), batch: self.batch(groups[0], first, spans)? }];
        if let Some((extent, _)) = kept.recent {
            writes.push(Write { extent, tokens: all(), batch: self.batch(groups[extent], 0, spans)? });
        }
        // Sinks are written twice. A window's pages may then be dropped as ever, and what shares pages need not know of sinks.
        if let Some((extent, _)) = kept.sinks {
            let mut start = 0;
            for &(id, len, new) in spans {
                let held = self.groups[groups[extent]].extent;
                let early = held.of_new(len, new);
                if early > 0 {
                    let batch = self.batch(groups[extent], 0, &[(id, held.end(len), early)])?;
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
        let (groups, kept) = (self.shapes[shape].clone(), self.apart(shape));
        let mut parts: Vec<(Kind, NewPositions)> = vec![];
        for span in spans {
            self.kinds(&groups, kept, causal, *span, &mut parts)?;
        }
        let first = kept.sinks.map_or(0, |s| s.1);
        let seers: Vec<_> = parts.iter().filter(|p| p.0 != Kind::Sinks).map(|p| p.1).collect();
        self.expect_seen(groups[0], first, &seers)?;
        let (mut runs, mut start) = (vec![], 0);
        for run in parts.chunk_by(|a, b| a.0 == b.0) {
            let spans: Vec<_> = run.iter().map(|p| p.1).collect();
            let queries = start..start + spans.iter().map(|s| s.2).sum::<usize>();
            start = queries.end;
            let reads = self.reads_of(&groups, kept, run[0].0, &spans)?;
            runs.push(Run { queries, reads });
        }
        Ok(runs)
    }

    /// Cuts a sequence's queries by what they read.
    fn kinds(
        &self,
        groups: &[usize],
        kept: Kept,
        causal: bool,
        (id, len, new): NewPositions,
        parts: &mut Vec<(Kind, NewPositions)>,
    ) -> Result<()> {
        let (start, sinks) = (len - new, kept.sinks.map_or(0, |s| s.1));
        // Queries among the sinks see no others; the rest see all sinks.
        let among = if causal || len <= sinks { sinks.clamp(start, len) } else { start };
        if among < len && among < sinks {
            return Err(Error::Positions { start, end: len, first: sinks, len });
        }
        // The newest count from each query, which must not look past itself; and all of them must be there.
        let (own, near) = match kept.recent.filter(|_| causal) {
            None => (len, len),
            Some((extent, recent)) => {
                let first = self.sequence(id)?.held[groups[extent]].first;
                let whole = if first <= sinks { 0 } else { (first + recent).saturating_sub(1) };
                (whole.clamp(among, len), sinks.saturating_add(recent).clamp(among, len))
            }
        };
        let near = near.max(own);
        let mut at = start;
        for (kind, end) in [(Kind::Sinks, among), (Kind::Own, own), (Kind::Near, near), (Kind::Far, len)] {
            if end > at {
                parts.push((kind, (id, end, end - at)));
                at = end;
            }
        }
        if new == 0 {
            parts.push((Kind::Own, (id, len, 0)));
        }
        Ok(())
    }

    /// What queries of one kind read; logits of sinks count in the first of these.
    fn reads_of(&mut self, groups: &[usize], kept: Kept, kind: Kind, spans: &[NewPositions]) -> Result<Vec<Read>> {
        let own = groups[0];
        let window = if let Extent::Newest(window) = self.groups[own].extent { Some(window) } else { None };
        if let (Kind::Sinks, Some((extent, _))) = (kind, kept.sinks) {
            let batch = self.batch(groups[extent], 0, spans)?;
            return Ok(vec![Read { extent, batch, mask: Mask::NoWindow }]);
        }
        let first = kept.sinks.map_or(0, |s| s.1);
        let mut reads = vec![];
        match kept.recent {
            Some((extent, recent)) if matches!(kind, Kind::Near | Kind::Far) => {
                let batch = self.batch(groups[extent], first, spans)?;
                let newest = window.map_or(recent, |window| window.min(recent));
                reads.push(Read { extent, batch, mask: Mask::Window(Some(newest)) });
                if kind == Kind::Far && window.is_none_or(|window| window > recent) {
                    // Queries that stand where the newest begin, and see all up to there.
                    let before: Vec<_> = spans.iter().map(|&(id, len, new)| (id, len - recent, new)).collect();
                    let batch = self.batch(own, first, &before)?;
                    reads.push(Read { extent: 0, batch, mask: Mask::Before(recent, window) });
                }
            }
            _ => {
                let batch = self.batch(own, first, spans)?;
                reads.push(Read { extent: 0, batch, mask: Mask::Window(window) });
            }
        }
        if let Some((extent, sinks)) = kept.sinks.filter(|_| spans.iter().any(|s| s.2 > 0)) {
            // A query stands at a held position, but without a mask it does not matter at which: as many at once as there are.
            let at_sinks: Vec<_> = spans
                .iter()
                .flat_map(|&(id, _, new)| (0..new).step_by(sinks).map(move |i| (id, sinks, sinks.min(new - i))))
                .collect();
            let batch = self.batch(groups[extent], 0, &at_sinks)?;
            reads.push(Read { extent, batch, mask: Mask::Nothing });
        }
        Ok(reads)
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
