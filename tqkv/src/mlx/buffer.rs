//! mlx-native's buffer.

use super::{DType, MlxError, Result};
use crate::compute::Buffer;
use crate::error::{Error, checked_product};
use bytemuck::Pod;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, OnceLock};

/// A [`Buffer`] by mlx-native's name. Clones and views share memory.
///
/// mlx-native hands out slices of memory that CPU and GPU share. Here a device may have memory of its own, so
/// [`as_slice`](MlxBuffer::as_slice) is a copy and [`as_mut_slice`](MlxBuffer::as_mut_slice) one that is written back.
#[derive(Clone)]
pub struct MlxBuffer {
    buffer: Buffer,
    /// Why a slice could not be written back: every later use of the buffer fails with it.
    lost: Arc<OnceLock<Error>>,
}

impl MlxBuffer {
    /// The buffer, for [`ops`](crate::ops) and [`KvCache`](crate::KvCache).
    pub fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// What its elements are.
    pub fn dtype(&self) -> DType {
        self.buffer.dtype()
    }

    /// Sizes of its axes, slowest first.
    pub fn shape(&self) -> &[usize] {
        self.buffer.shape()
    }

    /// Bytes of this view.
    pub fn byte_len(&self) -> usize {
        self.buffer.bytes()
    }

    /// Elements.
    pub fn element_count(&self) -> usize {
        self.buffer.len()
    }

    /// `n_elements` from `byte_offset` of this view on, in one axis, as a view of the same memory. Where mlx-native
    /// panics, this is an error.
    ///
    /// # Errors
    /// [`MlxError::InvalidArgument`] if `byte_offset` is no multiple of the element's size or the view exceeds the buffer.
    pub fn slice_view(&self, byte_offset: u64, n_elements: usize) -> Result<Self> {
        let size = self.dtype().size();
        let range = usize::try_from(byte_offset)
            .ok()
            .filter(|offset| offset.is_multiple_of(size))
            .and_then(|offset| Some(offset / size..(offset / size).checked_add(n_elements)?))
            .filter(|range| range.end <= self.element_count());
        let Some(range) = range else {
            return Err(MlxError::InvalidArgument(format!(
                "slice_view: {n_elements} elements from byte {byte_offset}: expected them within {} elements of {size} bytes",
                self.element_count()
            )));
        };
        let buffer = self.buffer.reshape(&[self.element_count()])?.slice(range)?;
        Ok(MlxBuffer { buffer, lost: self.lost.clone() })
    }

    /// The same memory in another shape of as many elements.
    ///
    /// # Errors
    /// [`MlxError::InvalidArgument`] if the number of elements differs.
    pub fn with_shape(&self, shape: Vec<usize>) -> Result<Self> {
        Ok(MlxBuffer { buffer: self.buffer.reshape(&shape)?, lost: self.lost.clone() })
    }

    /// A copy of the content, after all work committed before.
    ///
    /// # Errors
    /// [`MlxError::InvalidArgument`] if the bytes are no whole number of `T`, [`MlxError::CommandBufferError`].
    pub fn as_slice<T: Pod>(&self) -> Result<Vec<T>> {
        if size_of::<T>() == 0 || !self.byte_len().is_multiple_of(size_of::<T>()) {
            return Err(MlxError::InvalidArgument(format!(
                "as_slice: {} bytes: expected a multiple of the element's {}",
                self.byte_len(),
                size_of::<T>()
            )));
        }
        let buffer = self.intact()?;
        let mut host = vec![T::zeroed(); self.byte_len() / size_of::<T>()];
        buffer.read_bytes(bytemuck::cast_slice_mut(&mut host))?;
        Ok(host)
    }

    /// The content to change: it is written back when the slice is dropped. Should that fail, the buffer is lost, and every
    /// later use of it fails with the reason; [`MlxSliceMut::finish`] tells at once and loses nothing.
    ///
    /// # Errors
    /// As [`as_slice`](MlxBuffer::as_slice).
    pub fn as_mut_slice<T: Pod>(&mut self) -> Result<MlxSliceMut<'_, T>> {
        let host = self.as_slice()?;
        Ok(MlxSliceMut { buffer: self, host, finished: false })
    }

    fn intact(&self) -> crate::Result<&Buffer> {
        self.lost.get().map_or(Ok(&self.buffer), |error| Err(error.clone()))
    }

    /// The first elements of the buffer, in the shape that an operation needs. Larger buffers are fine, as in mlx-native.
    pub(super) fn view(&self, what: &'static str, dtype: DType, shape: &[usize]) -> crate::Result<Buffer> {
        let buffer = self.intact()?;
        if buffer.dtype() != dtype {
            return Err(Error::DType { what, got: buffer.dtype().name(), expected: dtype.name() });
        }
        let expected = checked_product(what, &[checked_product(what, shape)?, dtype.size()])?;
        if buffer.bytes() < expected {
            return Err(Error::TooSmall { what, got: buffer.bytes(), expected });
        }
        buffer.reshape(&[buffer.len()])?.slice(0..expected / dtype.size())?.reshape(shape)
    }
}

impl From<Buffer> for MlxBuffer {
    fn from(buffer: Buffer) -> Self {
        MlxBuffer { buffer, lost: Arc::default() }
    }
}

impl fmt::Debug for MlxBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mlx{:?}", self.buffer)
    }
}

/// A buffer's content on the host, written back when dropped.
pub struct MlxSliceMut<'a, T: Pod> {
    buffer: &'a MlxBuffer,
    host: Vec<T>,
    finished: bool,
}

impl<T: Pod> MlxSliceMut<'_, T> {
    /// Writes back now.
    ///
    /// # Errors
    /// [`MlxError::CommandBufferError`] if another thread uses the buffer at this moment or the device fails.
    pub fn finish(mut self) -> Result<()> {
        self.finished = true;
        Ok(self.write_back()?)
    }

    fn write_back(&self) -> crate::Result<()> {
        self.buffer.buffer.write_bytes(bytemuck::cast_slice(&self.host))
    }
}

impl<T: Pod> Deref for MlxSliceMut<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.host
    }
}

impl<T: Pod> DerefMut for MlxSliceMut<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.host
    }
}

impl<T: Pod> Drop for MlxSliceMut<'_, T> {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = self.write_back()
        {
            self.buffer.lost.get_or_init(|| error);
        }
    }
}
