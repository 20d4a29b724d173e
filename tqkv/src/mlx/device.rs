//! mlx-native's device.

use super::{CommandEncoder, DType, MlxBuffer, MlxError, Result};
use crate::compute::Device;
use std::fmt;

/// A [`Device`] by mlx-native's name. Clones are the same device.
#[derive(Clone, PartialEq)]
pub struct MlxDevice(Device);

impl MlxDevice {
    /// The best device of this machine ([`Device::best`]); never an error, since a CPU is always there.
    ///
    /// # Errors
    /// None today; the signature is mlx-native's.
    pub fn new() -> Result<Self> {
        Ok(MlxDevice(Device::best()))
    }

    /// The device, for [`ops`](crate::ops) and [`KvCache`](crate::KvCache).
    pub fn device(&self) -> &Device {
        &self.0
    }

    /// What mlx-native's dispatches take as device: this one.
    pub fn metal_device(&self) -> &MlxDevice {
        self
    }

    /// Starts to record.
    ///
    /// # Errors
    /// [`MlxError::CommandBufferError`] if the device is lost.
    pub fn command_encoder(&self) -> Result<CommandEncoder> {
        Ok(CommandEncoder::new(self.0.encoder()?))
    }

    /// A buffer of zeros; `byte_len` must be what `dtype` and `shape` take.
    ///
    /// # Errors
    /// [`MlxError::InvalidArgument`] for a size of 0, one that does not fit the shape, or one beyond the device's
    /// limits; [`MlxError::BufferAllocationError`].
    pub fn alloc_buffer(&self, byte_len: usize, dtype: DType, shape: Vec<usize>) -> Result<MlxBuffer> {
        if byte_len == 0 {
            return Err(MlxError::InvalidArgument("alloc_buffer: byte_len is 0: expected at least 1".to_owned()));
        }
        let needed = shape.iter().try_fold(dtype.size(), |n, &axis| n.checked_mul(axis));
        if needed != Some(byte_len) {
            let message = format!("alloc_buffer: byte_len is {byte_len}: expected what {shape:?} of {dtype} takes");
            return Err(MlxError::InvalidArgument(message));
        }
        Ok(self.0.zeros(dtype, &shape)?.into())
    }

    /// What its maker or driver calls it.
    pub fn name(&self) -> String {
        self.0.info().name
    }
}

impl From<Device> for MlxDevice {
    fn from(device: Device) -> Self {
        MlxDevice(device)
    }
}

impl fmt::Debug for MlxDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MlxDevice({})", self.0)
    }
}
