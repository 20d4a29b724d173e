//! The pages that new positions need: taken before anything is recorded, given back where it comes to nothing.

use super::state::{KvCache, NewPositions, SequenceId};
use crate::error::{Error, Result};

/// What a reservation has changed, so that it can be undone.
pub(super) enum Change {
    /// Pages at the front that nobody will see any more.
    Dropped { sequence: SequenceId, group: usize, first: usize, pages: Vec<u32> },
    /// A page, in place of a shared one or at the end.
    Taken { sequence: SequenceId, group: usize, index: usize, page: u32, replaces: Option<u32> },
}

impl Change {
    /// The group, the shared page, and the page that is to hold its content from now on.
    pub fn copy(&self) -> Option<(usize, u32, u32)> {
        match *self {
            Change::Taken { group, page, replaces: Some(from), .. } => Some((group, from, page)),
            _ => None,
        }
    }
}

impl KvCache {
    /// Frees what a window leaves behind and takes the pages that the new positions need in these groups. On an error
    /// `changes` says what is to be [`undo`](KvCache::undo)ne.
    pub(super) fn reserve(
        &mut self,
        groups: impl IntoIterator<Item = usize>,
        spans: &[NewPositions],
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        for g in groups {
            self.drop_unseen(g, spans, changes);
            let extent = self.groups[g].extent;
            let held = spans.iter().map(|&(id, len, new)| (id, extent.end(len), extent.of_new(len, new)));
            self.take_pages(g, held.filter(|span| span.2 > 0).collect(), changes)?;
        }
        Ok(())
    }

    /// More pages at the end, and copies of shared ones that would be written.
    fn take_pages(&mut self, g: usize, spans: Vec<NewPositions>, changes: &mut Vec<Change>) -> Result<()> {
        let group = &mut self.groups[g];
        // Written pages as (sequence, first and last index within `held`), before anything changes.
        let mut wanted = vec![];
        let mut needed = 0;
        for (id, len, new) in spans {
            let held = &self.sequences.get(&id).ok_or(Error::UnknownSequence { got: id.0 })?.held[g];
            let base = held.first / group.page_size;
            let (first, end) = ((len - new) / group.page_size - base, len.div_ceil(group.page_size) - base);
            let written = &held.pages[first.min(held.pages.len())..];
            needed += written.iter().filter(|&&p| group.pages.is_shared(p)).count();
            needed += end.saturating_sub(held.pages.len());
            wanted.push((id, first, end));
        }
        group.pages.expect_free(needed)?;
        for (id, first, end) in wanted {
            let Some(sequence) = self.sequences.get_mut(&id) else { continue };
            let pages = &mut sequence.held[g].pages;
            for index in first..end {
                let replaces = pages.get(index).copied();
                if replaces.is_some_and(|page| !group.pages.is_shared(page)) {
                    continue;
                }
                let page = group.pages.take()?;
                match pages.get_mut(index) {
                    Some(slot) => *slot = page,
                    None => pages.push(page),
                }
                changes.push(Change::Taken { sequence: id, group: g, index, page, replaces });
                self.version += 1;
            }
        }
        Ok(())
    }

    /// At the start of a model step, frees pages of a windowed group that neither the new tokens nor later ones can see.
    fn drop_unseen(&mut self, g: usize, spans: &[NewPositions], changes: &mut Vec<Change>) {
        let group = &mut self.groups[g];
        for (id, ..) in spans {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            let len = group.layers.first().map_or(0, |&l| sequence.lens[l]);
            if group.layers.iter().any(|&l| sequence.lens[l] != len) {
                continue; // Within a step: a query of another layer may still look back further.
            }
            let held = &mut sequence.held[g];
            let base = held.first / group.page_size;
            let drop = (group.extent.seen(len) / group.page_size).saturating_sub(base).min(held.pages.len());
            if drop > 0 {
                let pages: Vec<u32> = held.pages.drain(..drop).collect();
                pages.iter().for_each(|&page| group.pages.release(page));
                changes.push(Change::Dropped { sequence: *id, group: g, first: held.first, pages });
                held.first = (base + drop) * group.page_size;
                self.version += 1;
            }
        }
    }

    /// The last change is undone first, so that pages are free, and held, as they were. What was dropped stays so if
    /// something may have been `written` since: into those pages, say.
    pub(super) fn undo(&mut self, changes: Vec<Change>, written: bool) {
        self.version += 1;
        for change in changes.into_iter().rev() {
            let (Change::Dropped { sequence, group, .. } | Change::Taken { sequence, group, .. }) = change;
            let Some(sequence) = self.sequences.get_mut(&sequence) else { continue };
            let (held, free) = (&mut sequence.held[group], &mut self.groups[group].pages);
            match change {
                Change::Dropped { .. } if written => {}
                Change::Dropped { first, pages, .. } => {
                    pages.iter().rev().for_each(|&page| free.undo_release(page));
                    held.first = first;
                    held.pages.splice(..0, pages);
                }
                Change::Taken { index, page, replaces, .. } => {
                    free.release(page);
                    match replaces {
                        Some(old) => held.pages[index] = old,
                        None => held.pages.truncate(index),
                    }
                }
            }
        }
    }

    /// Gives up the shared pages that were replaced, and counts the new lengths.
    pub(super) fn settle(&mut self, changes: Vec<Change>, layers: &[usize], spans: &[NewPositions]) {
        for &(id, len, _) in spans {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                layers.iter().for_each(|&layer| sequence.lens[layer] = len);
            }
            self.count_ends(id);
        }
        for (group, replaced, _) in changes.iter().filter_map(Change::copy) {
            self.groups[group].pages.release(replaced);
        }
    }
}
