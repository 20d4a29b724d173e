//! Sequences: begun, forked, cut and ended.

use super::state::{KvCache, Sequence, SequenceId};
use crate::error::{Error, Result};

impl KvCache {
    /// Starts an empty sequence.
    pub fn add_sequence(&mut self) -> SequenceId {
        self.insert(Sequence::empty(self.groups.len(), self.layers.len()))
    }

    /// A new sequence with the same content, which shares all pages with `sequence`. Whoever first writes to a shared page
    /// gets a copy of its own. Sharing a prefix is a fork and a [`truncate`](KvCache::truncate).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::UnevenLayers`] within a model step.
    pub fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        self.len(sequence)?;
        let twin = self.sequence(sequence)?.clone();
        for (group, held) in self.groups.iter_mut().zip(&twin.held) {
            held.pages.iter().for_each(|&page| group.pages.share(page));
        }
        Ok(self.insert(twin))
    }

    /// Ends a sequence and frees the pages that no other shares.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free_sequence(&mut self, sequence: SequenceId) -> Result<()> {
        let gone = self.sequences.remove(&sequence).ok_or(Error::UnknownSequence { got: sequence.0 })?;
        self.release(gone);
        Ok(())
    }

    /// Positions of a sequence, the same in every layer; those that windows have dropped are counted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::UnevenLayers`] within a model step.
    pub fn len(&self, sequence: SequenceId) -> Result<usize> {
        let lens = &self.sequence(sequence)?.lens;
        // Layer 0 is never shared; shared layers have the length of their source.
        match (0..lens.len()).find(|&l| lens[self.layers[l].source] != lens[0]) {
            None => Ok(lens[0]),
            Some(layer) => {
                Err(Error::UnevenLayers { sequence: sequence.0, layer, got: lens[layer], expected: lens[0] })
            }
        }
    }

    /// Whether no sequence holds a position.
    pub fn is_empty(&self) -> bool {
        self.sequences.values().all(|s| s.lens.iter().all(|&n| n == 0))
    }

    /// Drops all positions of a sequence from `len` on, in every layer: afterwards the cache is as if they had never been
    /// appended. With a `len` of 0 the sequence is as good as new.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Positions`] if a layer holds fewer, or a windowed one has dropped positions that
    /// the next token would see. A token that sees none but itself (the first one, any in a window of 1) stands in nobody's
    /// way.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        self.expect_prefix(sequence, len)?;
        let Some(Sequence { held, lens }) = self.sequences.get_mut(&sequence) else { return Ok(()) };
        for (group, held) in self.groups.iter_mut().zip(held) {
            held.first = held.first.min(len);
            let keep = group.extent.pages(group.page_size, held.first, len).len().min(held.pages.len());
            held.pages.split_off(keep).into_iter().rev().for_each(|page| group.pages.release(page));
        }
        lens.iter_mut().for_each(|n| *n = (*n).min(len));
        self.version += 1;
        self.count_ends(sequence);
        Ok(())
    }

    /// Fails unless a sequence could go on after its first `len` positions.
    pub(super) fn expect_prefix(&self, sequence: SequenceId, len: usize) -> Result<()> {
        let Sequence { held, lens } = self.sequence(sequence)?;
        for (group, held) in self.groups.iter().zip(held) {
            let shortest = group.layers.iter().map(|&l| lens[l]).min().unwrap_or(0);
            let start = group.extent.seen(len);
            let lost = start < held.first && !group.extent.is_spare();
            if len > shortest || (lost && !group.extent.sees_nothing(len)) {
                return Err(Error::Positions { start, end: len, first: held.first, len: shortest });
            }
        }
        Ok(())
    }
}
