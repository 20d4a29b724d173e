//! Typed, shaped memory on a device.

use super::Device;
use super::driver::Storage;
use crate::error::{Error, Result, checked_product};
use crate::format::{DType, Element};
use std::fmt;
use std::sync::Arc;

/// Memory on a device: bytes with a type and a shape, row-major and without gaps.
///
/// A clone, a [`reshape`](Buffer::reshape) and a [`slice`](Buffer::slice) are views of the same memory.
#[derive(Clone)]
pub struct Buffer {
    device: Device,
    storage: Arc<dyn Storage>,
    dtype: DType,
    shape: Vec<usize>,
    /// Bytes before the first element.
    offset: usize,
}

impl Buffer {
    pub(crate) fn new(device: &Device, storage: Arc<dyn Storage>, dtype: DType, shape: &[usize]) -> Self {
        Buffer { device: device.clone(), storage, dtype, shape: shape.to_vec(), offset: 0 }
    }

    pub(crate) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// Where its first element lies: among everything on its device if the device has addresses, else in its memory.
    pub(crate) fn address(&self) -> usize {
        self.storage.address().unwrap_or(0) + self.offset
    }

    /// The bytes from `offset` on as another type; the caller has checked that they are within.
    pub(crate) fn retyped(&self, dtype: DType, shape: &[usize]) -> Self {
        let view = Buffer { dtype, shape: shape.to_vec(), ..self.clone() };
        assert!(view.bytes() <= self.bytes(), "{view:?} of {self:?}");
        view
    }

    /// The device that holds it.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What its elements are.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Sizes of its axes, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// The same memory in another shape of as many elements.
    ///
    /// # Errors
    /// [`Error::Shape`] if the number of elements differs.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if checked_product("shape", shape)? != self.len() {
            return Err(Error::shape("buffer", &self.shape, format!("as many elements as {shape:?}")));
        }
        Ok(Buffer { shape: shape.to_vec(), ..self.clone() })
    }

    /// Entries `start..end` along the first axis, as a view.
    ///
    /// # Errors
    /// [`Error::Shape`] if the buffer has no axis or the range is not within it.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Result<Self> {
        match self.shape.split_first() {
            Some((&n, rest)) if range.start <= range.end && range.end <= n => {
                // Divided, because without entries the size of one may exceed any integer.
                let row = self.bytes().checked_div(n).unwrap_or(0);
                let shape = std::iter::once(range.len()).chain(rest.iter().copied()).collect();
                Ok(Buffer { shape, offset: self.offset + range.start * row, ..self.clone() })
            }
            _ => Err(Error::shape("buffer", &self.shape, format!("a first axis that holds {range:?}"))),
        }
    }

    /// Whether both are views of the same memory.
    pub fn shares_memory(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }

    /// Whether both are on one device and have a byte in common.
    pub fn overlaps(&self, other: &Buffer) -> bool {
        let (a, b) = (self.address(), other.address());
        self.may_meet(other) && a.max(b) < (a + self.bytes()).min(b + other.bytes())
    }

    /// Whether both are in one space of addresses.
    pub(crate) fn may_meet(&self, other: &Buffer) -> bool {
        let has_address = |b: &Buffer| b.storage.address().is_some();
        self.shares_memory(other) || (self.device == other.device && has_address(self) && has_address(other))
    }

    /// Copies the elements to the host, after all work submitted before.
    ///
    /// # Errors
    /// [`Error::DType`] if `T` is not what the buffer holds, [`Error::BufferBusy`], [`Error::DeviceFailed`].
    pub fn read<T: Element>(&self) -> Result<Vec<T>> {
        self.expect_dtype("buffer read", T::DTYPE)?;
        let mut out = vec![T::zeroed(); self.len()];
        self.read_bytes(bytemuck::cast_slice_mut(&mut out))?;
        Ok(out)
    }

    /// Copies the buffer's bytes to `out`, after all work submitted before.
    ///
    /// # Errors
    /// [`Error::TooSmall`] or [`Error::TooLarge`] unless `out` has exactly the buffer's bytes, [`Error::BufferBusy`],
    /// [`Error::DeviceFailed`].
    pub fn read_bytes(&self, out: &mut [u8]) -> Result<()> {
        self.expect_bytes(out.len())?;
        self.device.driver().read(&*self.storage, self.offset, out)
    }

    /// Overwrites all elements from the host, after all work submitted before.
    ///
    /// # Errors
    /// As [`read`](Buffer::read); [`Error::TooSmall`] or [`Error::TooLarge`] unless `data` has exactly as many elements.
    pub fn write<T: Element>(&self, data: &[T]) -> Result<()> {
        self.expect_dtype("buffer written", T::DTYPE)?;
        self.write_bytes(bytemuck::cast_slice(data))
    }

    /// Overwrites the buffer's bytes from the host, after all work submitted before.
    ///
    /// # Errors
    /// As [`read_bytes`](Buffer::read_bytes).
    pub fn write_bytes(&self, data: &[u8]) -> Result<()> {
        self.expect_bytes(data.len())?;
        self.device.driver().write(&*self.storage, self.offset, data)
    }

    fn expect_bytes(&self, got: usize) -> Result<()> {
        let expected = self.bytes();
        match got.cmp(&expected) {
            std::cmp::Ordering::Less => Err(Error::TooSmall { what: "host slice", got, expected }),
            std::cmp::Ordering::Greater => Err(Error::TooLarge { what: "host slice's bytes", got, expected }),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }

    fn expect_dtype(&self, what: &'static str, host: DType) -> Result<()> {
        if self.dtype != host {
            return Err(Error::DType { what, got: self.dtype.name(), expected: host.name() });
        }
        Ok(())
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} {:?} on {})", self.dtype, self.shape, self.device)
    }
}

impl Device {
    /// A buffer of zeros.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`], [`Error::OutOfMemory`], or a limit of the device as [`Error::Unsupported`].
    ///
    /// ```
    /// use tqkv::{DType, Device};
    /// let k = Device::cpu().zeros(DType::F32, &[2, 8, 128])?;
    /// assert_eq!(k.bytes(), 2 * 8 * 128 * 4);
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn zeros(&self, dtype: DType, shape: &[usize]) -> Result<Buffer> {
        let bytes = checked_product("buffer size", &[checked_product("buffer size", shape)?, dtype.size()])?;
        let storage = self.driver().alloc(bytes)?;
        Ok(Buffer::new(self, storage.into(), dtype, shape))
    }

    /// A buffer with this content.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `data` has as many elements as `shape`; else as [`zeros`](Device::zeros).
    pub fn upload<T: Element>(&self, data: &[T], shape: &[usize]) -> Result<Buffer> {
        if checked_product("buffer size", shape)? != data.len() {
            return Err(Error::shape("data", &[data.len()], format!("as many elements as {shape:?}")));
        }
        let buffer = self.zeros(T::DTYPE, shape)?;
        buffer.write(data)?;
        Ok(buffer)
    }
}
