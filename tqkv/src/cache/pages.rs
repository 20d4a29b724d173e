//! Which page belongs to whom.

use crate::error::{Error, Result};

/// Pages of one group of layers, counted by how many sequences hold each.
#[derive(Debug)]
pub(super) struct Pages {
    holders: Vec<u32>,
    /// Popped from the end, so that pages are first given out in order.
    free: Vec<u32>,
}

impl Pages {
    pub fn new(pages: usize) -> Self {
        Pages { holders: vec![0; pages], free: (0..pages as u32).rev().collect() }
    }

    pub fn total(&self) -> usize {
        self.holders.len()
    }

    pub fn free(&self) -> usize {
        self.free.len()
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
        self.holders[page as usize] = 1;
        Ok(page)
    }

    /// One more holder.
    pub fn share(&mut self, page: u32) {
        self.holders[page as usize] += 1;
    }

    /// One holder fewer; free when it was the last.
    pub fn release(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }

    /// Undoes the last release that was not undone.
    pub fn undo_release(&mut self, page: u32) {
        let holders = &mut self.holders[page as usize];
        if *holders == 0 {
            debug_assert_eq!(self.free.last(), Some(&page));
            self.free.pop();
        }
        *holders += 1;
    }

    pub fn is_shared(&self, page: u32) -> bool {
        self.holders[page as usize] > 1
    }
}
