//! Memory that another library owns.

use super::{Cuda, address};
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product};
use crate::format::DType;
use std::any::Any;
use std::sync::Arc;

/// The backend, if the device is one of CUDA's.
fn cuda(device: &Device) -> Option<&Cuda> {
    (device.driver() as &dyn Any).downcast_ref()
}

impl Device {
    /// Sends what is submitted from now on to another stream of the caller's, behind all that was submitted before; as
    /// [`cuda_on_stream`](Device::cuda_on_stream) says of the stream. So one device can follow a library's current stream. While
    /// the stream that it leaves or the one that it comes to is captured in a graph, the order of both is the caller's.
    ///
    /// # Safety
    /// `stream` must be a stream of the GPU's primary context (null is the default stream) and outlive the device and all its
    /// buffers, or be left again before it ends. No other thread may use the device at the time.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is no CUDA device, [`Error::DeviceFailed`].
    pub unsafe fn move_to_cuda_stream(&self, stream: *mut std::ffi::c_void) -> Result<()> {
        let Some(cuda) = cuda(self) else {
            let what = "work on a CUDA stream".to_owned();
            return Err(Error::Unsupported { device: self.to_string(), what });
        };
        // SAFETY: the caller's promise.
        unsafe { cuda.move_to(stream) }
    }
}

impl Buffer {
    /// Memory on an NVIDIA GPU that someone else owns (another library's tensor, say), without a copy. `address` is what
    /// `cudaMalloc` gave, or a place within it; the first element lies there.
    ///
    /// # Safety
    /// `address` must be accessible on the device's GPU, with as many bytes as `dtype` and `shape` say, until the buffer, its
    /// views and all work that was submitted with them are gone. Work that other streams do on that memory must be
    /// ordered with the device's stream by the caller: by waiting for [`Submission`](crate::compute::Submission)s, by synchronising
    /// the other stream before, or by opening the device on the other stream ([`Device::cuda_on_stream`]).
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device is no CUDA device, [`Error::Mismatch`] if `address` is null or not a multiple of
    /// the element's size, [`Error::SizeOverflow`].
    pub unsafe fn from_cuda_ptr(device: &Device, address: u64, dtype: DType, shape: &[usize]) -> Result<Self> {
        let Some(cuda) = cuda(device) else {
            let what = "wrap CUDA memory".to_owned();
            return Err(Error::Unsupported { device: device.to_string(), what });
        };
        let bytes = checked_product("buffer size", &[checked_product("buffer size", shape)?, dtype.size()])?;
        if address == 0 || !address.is_multiple_of(dtype.size() as u64) {
            let expected = format!("not null and a multiple of {}", dtype.size());
            return Err(Error::Mismatch { what: "address of CUDA memory", got: address as usize, expected });
        }
        // SAFETY: the caller's promise.
        let storage = unsafe { cuda.borrow(address, bytes) };
        Ok(Buffer::new(device, Arc::new(storage), dtype, shape))
    }

    /// Where the first element lies in an NVIDIA GPU's memory; `None` on other devices. Valid as long as the buffer or a view
    /// of it lives; what others do there must be ordered as [`from_cuda_ptr`](Buffer::from_cuda_ptr) says.
    pub fn cuda_ptr(&self) -> Option<u64> {
        cuda(self.device()).map(|_| address(self))
    }
}
