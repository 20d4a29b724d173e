//! Host memory, its own or borrowed, whose uses are checked at run time: a conflict between threads is an error, never a data race
//! and never a dead lock.

use crate::compute::Buffer;
use crate::compute::driver::Storage;
use crate::error::{Error, Result};
use std::any::Any;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A cache line, the alignment of every allocation.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line(pub [u8; 64]);

/// Floats that start where a cache's line does, as a vector across two costs two accesses; and a line that may be read after.
pub(super) fn lines(floats: usize) -> Vec<Line> {
    vec![Line([0; 64]); floats / 16 + 1]
}

/// How far kernels may read past a row, as they read whole vectors.
pub(super) const OVERREAD: usize = size_of::<Line>();

/// Bytes on the host.
pub(crate) struct Memory {
    start: *mut u8,
    len: usize,
    /// How many bytes past the end may be read: `OVERREAD` of its own memory, none of borrowed memory.
    padding: usize,
    /// Which bytes are in use now.
    uses: Mutex<Vec<Use>>,
    /// Keeps the bytes alive.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: bytes are reached only through `hold`, which keeps a writer from everyone else.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Storage for Memory {
    fn address(&self) -> Option<usize> {
        Some(self.start.addr())
    }
}

struct Use {
    range: Range<usize>,
    writes: bool,
}

impl Memory {
    pub fn zeroed(bytes: usize) -> Result<Self> {
        let error = || Error::OutOfMemory { device: "cpu".to_owned(), requested: bytes };
        let padded = bytes.checked_add(2 * OVERREAD).ok_or_else(error)?.div_ceil(size_of::<u128>());
        // With the alignment that the system gives anyway, and moved to the start of a line: memory of a larger one is written at once,
        // other zeroed pages cost nothing until they are touched. A vector does not say that nobody else points to what it owns, as
        // a box would.
        let owned = bytemuck::allocation::try_zeroed_slice_box::<u128>(padded).map_err(|()| error())?;
        let mut owned = Vec::from(owned);
        let start = owned.as_mut_ptr().cast::<u8>();
        let start = start.wrapping_add(start.addr().next_multiple_of(OVERREAD) - start.addr());
        Ok(Memory { start, len: bytes, padding: OVERREAD, uses: Mutex::default(), _owner: Box::new(owned) })
    }

    /// Someone else's memory.
    ///
    /// # Safety
    /// `bytes` from `start` on must be initialised and readable, and writable if an operation writes there, as long as `owner` lives;
    /// nobody else may write there, nor read what is written, while an operation uses it.
    pub unsafe fn borrowed(start: *mut u8, bytes: usize, owner: Box<dyn Any + Send + Sync>) -> Self {
        Memory { start, len: bytes, padding: 0, uses: Mutex::default(), _owner: owner }
    }

    /// Takes part of it into use, until the result is dropped.
    ///
    /// # Errors
    /// [`Error::BufferBusy`] if it is in use already and one of both writes.
    pub fn hold(&self, range: Range<usize>, writes: bool) -> Result<Hold<'_>> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} bytes", self.len);
        let mut uses = self.lock();
        let meets = |u: &Use| u.range.start.max(range.start) < u.range.end.min(range.end);
        if uses.iter().any(|u| (u.writes || writes) && meets(u)) {
            return Err(Error::BufferBusy);
        }
        uses.push(Use { range: range.clone(), writes });
        Ok(Hold { memory: self, range, writes })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Use>> {
        self.uses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes in use.
pub(super) struct Hold<'a> {
    memory: &'a Memory,
    range: Range<usize>,
    writes: bool,
}

impl Hold<'_> {
    /// Where they start.
    pub fn start(&self) -> *mut u8 {
        // SAFETY: within the memory, as `hold` has asserted.
        unsafe { self.memory.start.add(self.range.start) }
    }

    /// Where a buffer starts whose bytes are among them.
    pub fn start_of(&self, buffer: &Buffer) -> *mut u8 {
        let range = range(buffer);
        assert!(self.range.start <= range.start && range.end <= self.range.end, "{range:?} of {:?}", self.range);
        // SAFETY: within the memory, by the assertion.
        unsafe { self.memory.start.add(range.start) }
    }

    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// How many bytes may be read from their start on.
    pub fn readable(&self) -> usize {
        self.memory.len + self.memory.padding - self.range.start
    }
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut uses = self.memory.lock();
        if let Some(i) = uses.iter().position(|u| u.range == self.range && u.writes == self.writes) {
            uses.swap_remove(i);
        }
    }
}

/// `ops` has checked that every buffer is on this device; this keeps the mistake loud if it ever did not.
pub(super) fn memory_of(storage: &dyn Storage) -> Result<&Memory> {
    let other = || Error::WrongDevice { what: "buffer", got: "another device".into(), expected: "cpu".into() };
    storage.downcast().ok_or_else(other)
}

/// Where a buffer's bytes are in its memory.
pub(super) fn range(buffer: &Buffer) -> Range<usize> {
    buffer.offset()..buffer.offset() + buffer.bytes()
}

/// Takes a buffer's bytes into use.
pub(super) fn hold(buffer: &Buffer, writes: bool) -> Result<Hold<'_>> {
    memory_of(buffer.storage())?.hold(range(buffer), writes)
}

/// Bytes held for reading.
pub(super) struct View<'a>(Hold<'a>);

impl View<'_> {
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: within the memory, and nobody writes there as long as it is held.
        unsafe { std::slice::from_raw_parts(self.0.start(), self.0.len()) }
    }
}

pub(super) fn view(buffer: &Buffer) -> Result<View<'_>> {
    Ok(View(hold(buffer, false)?))
}

/// Bytes held for writing.
pub(super) struct ViewMut<'a>(Hold<'a>);

impl ViewMut<'_> {
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: within the memory, and nobody else is there as long as it is held.
        unsafe { std::slice::from_raw_parts_mut(self.0.start(), self.0.len()) }
    }
}

pub(super) fn view_mut(buffer: &Buffer) -> Result<ViewMut<'_>> {
    Ok(ViewMut(hold(buffer, true)?))
}

/// What lies at some bytes of a storage, held for reading.
pub(super) fn view_of(storage: &dyn Storage, range: Range<usize>) -> Result<View<'_>> {
    Ok(View(memory_of(storage)?.hold(range, false)?))
}

/// What lies at some bytes of a storage, held for writing.
pub(super) fn view_mut_of(storage: &dyn Storage, range: Range<usize>) -> Result<ViewMut<'_>> {
    Ok(ViewMut(memory_of(storage)?.hold(range, true)?))
}
