//! Rows of pools and of dense buffers, as kernels reach them.

use super::memory::{Hold, Line, OVERREAD, hold, memory_of, range};
use crate::compute::Buffer;
use crate::error::Result;
use crate::problem::{PagePool, Strides};

/// Rows of a pool, held for reading.
pub(super) struct PoolView<'a> {
    codes: Hold<'a>,
    scales: Option<Hold<'a>>,
    strides: (Strides, Strides),
    /// Bytes of a row's codes and of its scales.
    bytes: (usize, usize),
    /// Rows that start here or later are read from `tail`, as a vector from them might reach past what may be read.
    tail_at: usize,
    /// Where `tail` starts.
    tail_from: usize,
    /// A copy of the end of borrowed memory that may be read past; empty for memory that may itself.
    tail: Vec<Line>,
}

// SAFETY: what it points to is held for reading.
unsafe impl Sync for PoolView<'_> {}

/// Rows of a pool that lie one after the other.
pub(super) struct Run<'a> {
    pub rows: usize,
    /// Readable for `OVERREAD` bytes past the last row.
    pub codes: *const u8,
    pub scales: &'a [u8],
}

impl<'a> PoolView<'a> {
    pub fn new(pool: &'a PagePool) -> Result<Self> {
        let codes = hold(pool.codes(), false)?;
        let scales = pool.scales().map(|s| hold(s, false)).transpose()?;
        let bytes = (pool.row().row_bytes(), pool.row().scale_bytes());
        let (len, safe) = (codes.len(), codes.readable());
        let mut view = PoolView {
            codes,
            scales,
            strides: pool.strides(),
            bytes,
            tail_at: (safe + 1).saturating_sub(OVERREAD + bytes.0),
            tail_from: 0,
            tail: vec![],
        };
        if view.tail_at < len {
            // Aligned as what it is a copy of is.
            view.tail_from = view.tail_at / OVERREAD * OVERREAD;
            view.tail = vec![Line([0; OVERREAD]); (len - view.tail_from).div_ceil(OVERREAD) + 1];
            // SAFETY: within what is held, and within `tail` by its size.
            unsafe {
                let from = view.codes.start().add(view.tail_from);
                from.copy_to_nonoverlapping(view.tail.as_mut_ptr().cast(), len - view.tail_from);
            }
        }
        Ok(view)
    }

    /// Where a row's codes and its scales start.
    pub fn at(&self, page: usize, head: usize, slot: usize) -> (usize, usize) {
        (self.strides.0.at(page, head, slot), self.strides.1.at(page, head, slot))
    }

    /// How many of `most` slots of a page from one on lie one after the other.
    pub fn in_a_row(&self, most: usize) -> usize {
        let dense = self.strides.0.row == self.bytes.0 && self.strides.1.row == self.bytes.1;
        if dense { most } else { most.min(1) }
    }

    /// Rows that lie one after the other, `most` or fewer.
    #[inline(always)]
    pub fn run(&self, (code, scale): (usize, usize), most: usize) -> Run<'_> {
        let (mut rows, mut start) = (most, self.codes.start().cast_const());
        if code + most * self.bytes.0 > self.tail_at {
            match code < self.tail_at {
                // Those that start before the tail.
                true => rows = most.min((self.tail_at - code).div_ceil(self.bytes.0)),
                false => start = self.tail.as_ptr().cast::<u8>().wrapping_sub(self.tail_from),
            }
        }
        assert!(code + rows * self.bytes.0 <= self.codes.len(), "a row of {} bytes at {code}", self.codes.len());
        Run { rows, codes: start.wrapping_add(code), scales: self.scales(scale, rows) }
    }

    fn scales(&self, at: usize, rows: usize) -> &[u8] {
        let Some(scales) = &self.scales else { return &[] };
        let bytes = rows * self.bytes.1;
        assert!(at + bytes <= scales.len(), "a scale of {} bytes at {at}", scales.len());
        // SAFETY: within what is held for reading, by the assertion.
        unsafe { std::slice::from_raw_parts(scales.start().add(at), bytes) }
    }
}

/// Rows of a pool, held for writing from several threads.
pub(super) struct PoolViewMut<'a> {
    codes: RowsMut,
    scales: RowsMut,
    strides: (Strides, Strides),
    /// Keep everyone else out while rows are handed out.
    _holds: [Option<Hold<'a>>; 2],
}

impl<'a> PoolViewMut<'a> {
    pub fn new(pool: &'a PagePool) -> Result<Self> {
        let (codes, scales) = (pool.codes(), pool.scales());
        // Codes and scales may lie between each other in one memory.
        let (first, second) = match scales {
            Some(scales) if scales.shares_memory(codes) => {
                let (a, b) = (range(codes), range(scales));
                let both = a.start.min(b.start)..a.end.max(b.end);
                (memory_of(codes.storage())?.hold(both, true)?, None)
            }
            _ => (hold(codes, true)?, scales.map(|s| hold(s, true)).transpose()?),
        };
        let row = pool.row();
        Ok(PoolViewMut {
            codes: RowsMut::new(&first, codes, row.row_bytes()),
            scales: match scales {
                Some(scales) => RowsMut::new(second.as_ref().unwrap_or(&first), scales, row.scale_bytes()),
                None => RowsMut { start: std::ptr::NonNull::dangling().as_ptr(), len: 0, bytes: 0 },
            },
            strides: pool.strides(),
            _holds: [Some(first), second],
        })
    }

    /// Codes and scales of a row.
    ///
    /// # Safety
    /// No two of one row may be alive at once.
    #[allow(clippy::mut_from_ref)] // Different rows do not overlap.
    pub unsafe fn row_mut(&self, page: usize, head: usize, slot: usize) -> (&mut [u8], &mut [u8]) {
        let (code, scale) = (self.strides.0.at(page, head, slot), self.strides.1.at(page, head, slot));
        // SAFETY: the caller's promise; rows do not overlap, nor codes and scales, as `PagePool::strided` has checked.
        unsafe { (self.codes.row_mut(code), self.scales.row_mut(scale)) }
    }
}

/// Rows of a dense buffer, held for writing from several threads.
pub(super) struct RowViewMut<'a> {
    rows: RowsMut,
    /// Keeps everyone else out while rows are handed out.
    _hold: Hold<'a>,
}

impl<'a> RowViewMut<'a> {
    /// Rows of `bytes` each.
    pub fn new(buffer: &'a Buffer, bytes: usize) -> Result<Self> {
        let hold = hold(buffer, true)?;
        Ok(RowViewMut { rows: RowsMut::new(&hold, buffer, bytes), _hold: hold })
    }

    /// # Safety
    /// No two rows of one index may be alive at once.
    #[allow(clippy::mut_from_ref)] // Different rows do not overlap.
    pub unsafe fn row_mut(&self, index: usize) -> &mut [u8] {
        // SAFETY: the caller's promise.
        unsafe { self.rows.row_mut(index * self.rows.bytes) }
    }
}

/// Where rows of `bytes` each may be written.
struct RowsMut {
    start: *mut u8,
    len: usize,
    bytes: usize,
}

// SAFETY: the pointer is used only through `row_mut`, whose callers keep threads on different rows.
unsafe impl Sync for RowsMut {}

impl RowsMut {
    /// Those of a buffer that is held.
    fn new(hold: &Hold, buffer: &Buffer, bytes: usize) -> Self {
        RowsMut { start: hold.start_of(buffer), len: buffer.bytes(), bytes }
    }

    /// The row that starts at a byte.
    ///
    /// # Safety
    /// The bytes are held for writing, and no two rows that overlap may be alive at once.
    #[allow(clippy::mut_from_ref)] // Different rows do not overlap.
    unsafe fn row_mut(&self, at: usize) -> &mut [u8] {
        assert!(at + self.bytes <= self.len, "a row at {at} of {} bytes", self.len);
        // SAFETY: within the buffer by the assertion; exclusive by the hold and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), self.bytes) }
    }
}
