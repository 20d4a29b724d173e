//! Which page belongs to whom, and how full it is.

use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// Pages of one group of layers, counted by how many sequences hold each.
#[derive(Debug)]
pub(super) struct Pages {
    page_size: usize,
    holders: Vec<u32>,
    /// Popped from the end, so that pages are first given out in order.
    free: Vec<u32>,
    /// How many holders fill a page only in part: it is the last page of each.
    partial: Vec<u32>,
    /// How many of them fill so many positions, by page and positions.
    ends: BTreeMap<(u32, u32), u32>,
    /// Positions of held pages that no holder fills.
    gaps: usize,
    /// How often something was done to a page.
    #[cfg(test)]
    pub work: usize,
}

impl Pages {
    pub fn new(pages: usize, page_size: usize) -> Self {
        Pages {
            page_size,
            holders: vec![0; pages],
            free: (0..pages as u32).rev().collect(),
            partial: vec![0; pages],
            ends: BTreeMap::new(),
            gaps: 0,
            #[cfg(test)]
            work: 0,
        }
    }

    pub fn total(&self) -> usize {
        self.holders.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Positions of held pages that no sequence holds.
    pub fn gaps(&self) -> usize {
        self.gaps
    }

    /// Fails unless so many pages are free.
    pub fn expect_free(&self, needed: usize) -> Result<()> {
        self.expect_free_besides(needed, 0)
    }

    /// Fails unless so many pages are free once `more` are given up.
    pub fn expect_free_besides(&self, needed: usize, more: usize) -> Result<()> {
        let free = self.free() + more;
        if needed > free {
            return Err(Error::OutOfPages { needed, free, pages: self.total() });
        }
        Ok(())
    }

    /// A free page with one holder; the caller has asked [`expect_free`](Pages::expect_free).
    pub fn take(&mut self) -> Result<u32> {
        let page = self.free.pop().ok_or(Error::OutOfPages { needed: 1, free: 0, pages: self.total() })?;
        self.recount(page, |pages| pages.holders[page as usize] = 1);
        Ok(page)
    }

    /// One more holder.
    pub fn share(&mut self, page: u32) {
        self.recount(page, |pages| pages.holders[page as usize] += 1);
    }

    /// One holder fewer; free when it was the last.
    pub fn release(&mut self, page: u32) {
        self.recount(page, |pages| pages.holders[page as usize] -= 1);
        if self.holders[page as usize] == 0 {
            self.free.push(page);
        }
    }

    /// Undoes the last release that was not undone.
    pub fn undo_release(&mut self, page: u32) {
        if self.holders[page as usize] == 0 {
            debug_assert_eq!(self.free.last(), Some(&page));
            self.free.pop();
        }
        self.recount(page, |pages| pages.holders[page as usize] += 1);
    }

    pub fn is_shared(&self, page: u32) -> bool {
        self.holders[page as usize] > 1
    }

    /// Says that a holder fills only the first `positions` of a page.
    pub fn mark(&mut self, (page, positions): (u32, u32)) {
        self.recount(page, |pages| {
            pages.partial[page as usize] += 1;
            *pages.ends.entry((page, positions)).or_insert(0) += 1;
        });
    }

    /// Takes back a [`mark`](Pages::mark).
    pub fn unmark(&mut self, end: (u32, u32)) {
        self.recount(end.0, |pages| {
            let Some(count) = pages.ends.get_mut(&end) else { return };
            *count -= 1;
            if *count == 0 {
                pages.ends.remove(&end);
            }
            pages.partial[end.0 as usize] -= 1;
        });
    }

    /// Positions of a page that no holder fills.
    fn gap(&self, page: u32) -> usize {
        let (holders, partial) = (self.holders[page as usize], self.partial[page as usize]);
        if holders == 0 || holders > partial {
            return 0; // Nobody's, or somebody fills all of it.
        }
        let most = self.ends.range((page, 0)..=(page, u32::MAX)).next_back();
        self.page_size - most.map_or(0, |((_, positions), _)| *positions as usize)
    }

    fn recount(&mut self, page: u32, change: impl FnOnce(&mut Self)) {
        #[cfg(test)]
        {
            self.work += 1;
        }
        let before = self.gap(page);
        change(self);
        self.gaps = self.gaps + self.gap(page) - before;
    }
}
