//! An engine's own wgpu device and buffers, without a copy. Through wgpu's `from_hal` constructors these can be an engine's
//! own Metal or Vulkan objects.

use super::adapter;
use super::driver::Wgpu;
use super::memory::Memory;
use crate::compute::{Buffer, DType, Device};
use crate::error::{Error, Result, checked_product};
use std::any::Any;
use std::sync::Arc;

impl Device {
    /// Wraps a wgpu device and its queue; tqkv's work goes to this queue, in order with the engine's own submissions.
    ///
    /// A Metal or Vulkan device becomes a wgpu one through `wgpu::Adapter::create_device_from_hal`. Features that tqkv uses
    /// if the device has them: `SHADER_F16`, `SUBGROUP`. Ask for the adapter's own limits: the defaults hold few buffers
    /// a kernel and small bindings.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the device's limits are too low for any kernel, [`Error::DeviceFailed`] if it is lost.
    ///
    /// # Safety
    /// - `queue` is `device`'s.
    /// - The device's error and loss callbacks are tqkv's from here on: the engine sets none, and opens error scopes only
    ///   around its own calls.
    /// - tqkv's kernels run without bounds checks. That is sound as long as buffers hold what tqkv put there: the engine
    ///   must not overwrite the page tables and spans of a `Batch`.
    pub unsafe fn from_wgpu(device: wgpu::Device, queue: wgpu::Queue) -> Result<Device> {
        let mut info = adapter::info(0, &device.adapter_info(), &device.limits(), device.features());
        info.id = "wgpu:wrapped".to_owned();
        Ok(Device::from_driver(Box::new(adapter::wrap(device, queue, info)?)))
    }
}

impl Buffer {
    /// Wraps a wgpu buffer as a tensor, without a copy. The tensor starts at the buffer's first byte.
    ///
    /// A Metal or Vulkan buffer becomes a wgpu one through `wgpu::Device::create_buffer_from_hal`.
    ///
    /// # Errors
    /// [`Error::TooSmall`] if the shape does not fit, [`Error::Mismatch`] unless the size is a multiple of 4,
    /// [`Error::Unsupported`] if the usages lack `STORAGE`, `COPY_SRC` or `COPY_DST`, or `device` is no wgpu device.
    ///
    /// # Safety
    /// - `buffer` was made by the wgpu device that `device` wraps, and is not mapped while work that uses it is recorded
    ///   or runs.
    /// - It is wrapped once: two wraps of one buffer would count as different memory, and an operation that reads one and
    ///   writes the other would race. Clone or slice the wrap instead.
    pub unsafe fn from_wgpu(device: &Device, buffer: wgpu::Buffer, dtype: DType, shape: &[usize]) -> Result<Buffer> {
        let unsupported = |what: &str| Error::Unsupported { device: device.to_string(), what: what.to_owned() };
        let Some(wgpu) = (device.driver() as &dyn Any).downcast_ref::<Wgpu>() else {
            return Err(unsupported("hold a wgpu buffer"));
        };
        let bytes = checked_product("buffer size", &[checked_product("buffer size", shape)?, dtype.size()])?;
        let size = buffer.size() as usize;
        if bytes > size {
            return Err(Error::TooSmall { what: "wgpu buffer", got: size, expected: bytes });
        }
        if !size.is_multiple_of(4) || size == 0 {
            let expected = "a multiple of 4 over 0".to_owned();
            return Err(Error::Mismatch { what: "size of the wgpu buffer", got: size, expected });
        }
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        if !buffer.usage().contains(usage) {
            return Err(unsupported("use a wgpu buffer without STORAGE, COPY_SRC and COPY_DST"));
        }
        Ok(Buffer::new(device, Arc::new(Memory::new(buffer, &wgpu.0.groups)), dtype, shape))
    }

    /// The wgpu buffer that holds this tensor, and the byte at which the tensor starts; none on other devices.
    pub fn as_wgpu(&self) -> Option<(&wgpu::Buffer, usize)> {
        self.storage().downcast::<Memory>().map(|memory| (&memory.buffer, self.offset()))
    }
}
