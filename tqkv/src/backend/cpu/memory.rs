//! Host memory whose borrows are checked at run time: a conflict between threads is an error, never a data race and
//! never a dead lock.

use crate::compute::Buffer;
use crate::error::{Error, Result};
use crate::problem::PagePool;
use atomic_refcell::{AtomicRef, AtomicRefCell, AtomicRefMut};
use std::ops::Range;

/// A cache line, the alignment of every allocation.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u8; 64]);

/// Ends with a line of padding, so that kernels may read whole vectors up to 64 bytes past what they need.
pub(crate) struct Memory(AtomicRefCell<Vec<Line>>);

impl crate::compute::driver::Storage for Memory {}

impl Memory {
    pub fn zeroed(bytes: usize) -> Result<Self> {
        let lines = bytes.div_ceil(size_of::<Line>()) + 1;
        let error = || Error::OutOfMemory { device: "cpu".to_owned(), requested: bytes };
        // `try_zeroed_slice_box` asks for zeroed pages, which cost nothing until touched.
        let lines = bytemuck::allocation::try_zeroed_slice_box(lines).map_err(|()| error())?;
        Ok(Memory(AtomicRefCell::new(Vec::from(lines))))
    }

    pub fn read(&self) -> Result<AtomicRef<'_, [u8]>> {
        let lines = self.0.try_borrow().map_err(|_| Error::BufferBusy)?;
        Ok(AtomicRef::map(lines, |l| bytemuck::cast_slice(l)))
    }

    pub fn write(&self) -> Result<AtomicRefMut<'_, [u8]>> {
        let lines = self.0.try_borrow_mut().map_err(|_| Error::BufferBusy)?;
        Ok(AtomicRefMut::map(lines, |l| bytemuck::cast_slice_mut(l)))
    }
}

fn range(buffer: &Buffer) -> Range<usize> {
    buffer.offset()..buffer.offset() + buffer.bytes()
}

/// A buffer's bytes, held for reading.
pub(super) struct View<'a>(AtomicRef<'a, [u8]>, Range<usize>);

impl View<'_> {
    pub fn bytes(&self) -> &[u8] {
        &self.0[self.1.clone()]
    }
}

pub(super) fn view(buffer: &Buffer) -> Result<View<'_>> {
    Ok(View(super::memory_of(buffer.storage())?.read()?, range(buffer)))
}

/// A buffer's bytes, held for writing.
pub(super) struct ViewMut<'a>(AtomicRefMut<'a, [u8]>, Range<usize>);

impl ViewMut<'_> {
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.0[self.1.clone()]
    }
}

pub(super) fn view_mut(buffer: &Buffer) -> Result<ViewMut<'_>> {
    Ok(ViewMut(super::memory_of(buffer.storage())?.write()?, range(buffer)))
}

/// Rows of a pool's codes or scales, for reading. Without scales every row is empty.
pub(super) struct Rows<'a> {
    view: Option<View<'a>>,
    row: usize,
}

impl<'a> Rows<'a> {
    pub fn codes(pool: &'a PagePool) -> Result<Self> {
        Ok(Rows { view: Some(view(pool.codes())?), row: pool.row().row_bytes() })
    }

    pub fn scales(pool: &'a PagePool) -> Result<Self> {
        let view = pool.scales().map(view).transpose()?;
        Ok(Rows { view, row: pool.row().scales_per_row() * pool.row().scale_dtype().size() })
    }

    /// `count` rows from `index` on.
    pub fn rows(&self, index: usize, count: usize) -> &[u8] {
        match &self.view {
            Some(view) => &view.bytes()[index * self.row..][..count * self.row],
            None => &[],
        }
    }

    /// Where these rows are: a pointer that is readable for 64 bytes past them.
    pub fn padded(&self, index: usize, count: usize) -> *const u8 {
        let Some(View(all, range)) = &self.view else { return std::ptr::NonNull::dangling().as_ptr() };
        let start = range.start + index * self.row;
        assert!(start + count * self.row <= range.end, "rows {index} to {} of a pool", index + count);
        // From the whole allocation, whose last line is padding.
        all[start..].as_ptr()
    }
}

/// Rows of a pool's codes or scales, for writing from several threads.
pub(super) struct RowsMut<'a> {
    bytes: *mut u8,
    len: usize,
    row: usize,
    /// Keeps everyone else out while rows are handed out.
    _hold: Option<ViewMut<'a>>,
}

// SAFETY: the pointer is used only through `row_mut`, whose callers keep threads on different rows.
unsafe impl Sync for RowsMut<'_> {}

impl<'a> RowsMut<'a> {
    pub fn codes(pool: &'a PagePool) -> Result<Self> {
        Ok(Self::new(Some(view_mut(pool.codes())?), pool.row().row_bytes()))
    }

    pub fn scales(pool: &'a PagePool) -> Result<Self> {
        let view = pool.scales().map(view_mut).transpose()?;
        Ok(Self::new(view, pool.row().scales_per_row() * pool.row().scale_dtype().size()))
    }

    /// Rows of any buffer.
    pub fn buffer(buffer: &'a Buffer, row: usize) -> Result<Self> {
        Ok(Self::new(Some(view_mut(buffer)?), row))
    }

    fn new(mut view: Option<ViewMut<'a>>, row: usize) -> Self {
        let (bytes, len) = match &mut view {
            Some(view) => (view.bytes().as_mut_ptr(), view.bytes().len()),
            None => (std::ptr::NonNull::dangling().as_ptr(), 0),
        };
        let row = if view.is_some() { row } else { 0 };
        RowsMut { bytes, len, row, _hold: view }
    }

    /// # Safety
    /// No two rows of one index may be alive at once.
    #[allow(clippy::mut_from_ref)] // Different rows do not overlap.
    pub unsafe fn row_mut(&self, index: usize) -> &mut [u8] {
        assert!((index + 1) * self.row <= self.len, "row {index} of a pool of {} bytes", self.len);
        // SAFETY: within the allocation by the assertion; exclusive by `_hold` and the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.bytes.add(index * self.row), self.row) }
    }
}
