//! Memory that another library owns.

use super::driver::Cpu;
use super::memory::Memory;
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product};
use crate::format::DType;
use std::any::Any;
use std::sync::Arc;

impl Buffer {
    /// Memory on the host that someone else owns (another library's tensor, a mapped file), without a copy. `start` is where the
    /// first element lies. `owner` is dropped with the last view of the buffer: give what keeps the memory alive, or `()` if
    /// something else does. Operations run as fast as on memory of tqkv's own, and touch no byte outside.
    ///
    /// ```
    /// use std::sync::Arc;
    /// use tqkv::{Buffer, DType, Device};
    /// let device = Device::cpu();
    /// let theirs = Arc::new([1f32, 2.0, 3.0]);
    /// // SAFETY: three floats, kept alive by the buffer, and only read.
    /// let x = unsafe {
    ///     Buffer::from_host_ptr(&device, theirs.as_ptr().cast_mut().cast(), DType::F32, &[3], Box::new(theirs.clone()))
    /// }?;
    /// assert_eq!(x.read::<f32>()?, [1.0, 2.0, 3.0]);
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    ///
    /// # Safety
    /// As many bytes as `dtype` and `shape` say must be initialised and readable, and writable if an operation or a call writes
    /// there, until the buffer and its views are gone. While a call that uses them runs (on a CPU operations run when they are
    /// submitted), nobody else may write there, nor read what is written. Two buffers over the same memory are told to overlap
    /// within an operation, but not between threads.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is no CPU, [`Error::Mismatch`] if `start` is null or not a multiple of the element's
    /// size, [`Error::SizeOverflow`].
    pub unsafe fn from_host_ptr(
        device: &Device,
        start: *mut u8,
        dtype: DType,
        shape: &[usize],
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Self> {
        let Some(cpu) = (device.driver() as &dyn Any).downcast_ref::<Cpu>() else {
            let what = "wrap memory of the host".to_owned();
            return Err(Error::Unsupported { device: device.to_string(), what });
        };
        cpu.expect_usable()?;
        let bytes = checked_product("buffer size", &[checked_product("buffer size", shape)?, dtype.size()])?;
        if start.is_null() || !start.addr().is_multiple_of(dtype.size()) {
            let expected = format!("not null and a multiple of {}", dtype.size());
            return Err(Error::Mismatch { what: "address of host memory", got: start.addr(), expected });
        }
        // SAFETY: the caller's promise.
        let memory = unsafe { Memory::borrowed(start, bytes, owner) };
        Ok(Buffer::new(device, Arc::new(memory), dtype, shape))
    }
}
