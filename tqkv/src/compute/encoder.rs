//! Recording and submission.

use super::driver::{self, Completion, Recorder};
use super::{Buffer, Device};
use crate::error::{Error, Result};
use std::any::Any;
use std::time::Duration;

/// Records operations in order. Nothing runs before [`submit`](CommandEncoder::submit); each operation sees what those
/// before it wrote. An encoder that is dropped has run nothing.
pub struct CommandEncoder {
    device: Device,
    recorder: Box<dyn Recorder>,
}

impl CommandEncoder {
    pub(crate) fn new(device: &Device, recorder: Box<dyn Recorder>) -> Self {
        CommandEncoder { device: device.clone(), recorder }
    }

    /// The device that it records for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Fails unless the buffer is on this encoder's device.
    pub(crate) fn expect_own(&self, what: &'static str, buffer: &Buffer) -> Result<()> {
        self.expect_device(what, buffer.device())
    }

    /// Fails unless this is the encoder's device.
    pub(crate) fn expect_device(&self, what: &'static str, device: &Device) -> Result<()> {
        if device != &self.device {
            return Err(Error::wrong_device(what, device, &self.device));
        }
        Ok(())
    }

    /// Records a validated operation, a `problem::Op`.
    pub(crate) fn record(&mut self, op: Box<dyn Any + Send>) -> Result<()> {
        self.recorder.record(op)
    }

    /// Whether the recorder takes attention over several pools as one operation.
    pub(crate) fn fuses(&self, op: &dyn Any) -> bool {
        self.recorder.fuses(op)
    }

    /// Kernel launches recorded so far.
    #[cfg(test)]
    pub(crate) fn dispatches(&self) -> usize {
        self.recorder.dispatches()
    }

    /// Hands the recorded operations to the device, as one submission.
    ///
    /// # Errors
    /// [`Error::BufferBusy`], [`Error::OutOfMemory`], [`Error::DeviceFailed`]. A CPU runs everything before it returns;
    /// a GPU may report a failure only from [`Submission::wait`].
    pub fn submit(self) -> Result<Submission> {
        Ok(Submission(self.recorder.submit()?))
    }

    /// What was recorded, to be submitted any number of times, or the encoder if the device does not do that.
    pub(crate) fn repeatable(mut self) -> Result<std::result::Result<Repeatable, CommandEncoder>> {
        Ok(self.recorder.repeatable()?.map(Repeatable).ok_or(self))
    }

    /// Submits and waits.
    ///
    /// # Errors
    /// As [`submit`](CommandEncoder::submit) and [`Submission::wait`].
    pub fn submit_and_wait(self) -> Result<()> {
        self.submit()?.wait()
    }

    /// Submits, waits, and returns how long the device was at it, from the first operation's start to the last one's end.
    ///
    /// CUDA runs a graph of them between two events, wgpu between two timestamps where the adapter has them; elsewhere it is the host's
    /// clock from submission to completion. So a short operation is better timed as one of many in an encoder.
    ///
    /// # Errors
    /// As [`submit_and_wait`](CommandEncoder::submit_and_wait).
    ///
    /// ```
    /// # let device = tqkv::Device::cpu();
    /// let (from, to) = (device.zeros(tqkv::DType::F32, &[1024])?, device.zeros(tqkv::DType::F32, &[1024])?);
    /// let mut encoder = device.encoder()?;
    /// for _ in 0..10 {
    ///     tqkv::ops::copy(&mut encoder, &from, &to)?;
    /// }
    /// println!("{:?} a copy", encoder.submit_and_time()? / 10);
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn submit_and_time(self) -> Result<Duration> {
        self.recorder.submit_and_time()
    }
}

/// Recorded work that can be submitted again and again.
pub(crate) struct Repeatable(Box<dyn driver::Repeatable>);

impl Repeatable {
    /// As [`CommandEncoder::submit`].
    pub fn submit(&self) -> Result<Submission> {
        Ok(Submission(self.0.submit()?))
    }
}

/// Work that was handed to a device.
#[must_use = "work may still be running: wait for it, or drop it on purpose"]
pub struct Submission(Box<dyn Completion>);

impl Submission {
    /// Returns when all of it is done.
    ///
    /// # Errors
    /// [`Error::DeviceFailed`].
    pub fn wait(self) -> Result<()> {
        self.0.wait()
    }
}

impl Device {
    /// Starts to record operations.
    ///
    /// # Errors
    /// [`Error::DeviceFailed`] if the device is lost.
    pub fn encoder(&self) -> Result<CommandEncoder> {
        Ok(CommandEncoder::new(self, self.driver().recorder()?))
    }
}
