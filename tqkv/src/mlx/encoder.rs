//! mlx-native's encoder and kernel registry.

use super::{MlxDevice, MlxError, Result};
use crate::compute::{self, Submission};
use crate::error::Error;
use std::sync::{Mutex, PoisonError};

/// Records dispatches and commits them once. Each sees what those before it wrote; no barriers are needed.
pub struct CommandEncoder(Mutex<State>);

enum State {
    Recording(compute::CommandEncoder),
    Running(Submission),
    Done(crate::Result<()>),
}

impl CommandEncoder {
    pub(super) fn new(encoder: compute::CommandEncoder) -> Self {
        CommandEncoder(Mutex::new(State::Recording(encoder)))
    }

    fn state(&mut self) -> &mut State {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing: dispatches are ordered already.
    pub fn memory_barrier(&mut self) {}

    /// Hands the work to the device and does not wait. mlx-native's `commit` returns nothing; this one tells what failed.
    ///
    /// # Errors
    /// [`MlxError::CommandBufferError`] if the device fails or the encoder was committed before.
    pub fn commit(&mut self) -> Result<()> {
        let state = self.state();
        match std::mem::replace(state, State::Done(Ok(()))) {
            State::Recording(encoder) => match encoder.submit() {
                Ok(submission) => {
                    *state = State::Running(submission);
                    Ok(())
                }
                Err(error) => {
                    *state = State::Done(Err(error.clone()));
                    Err(error.into())
                }
            },
            committed => {
                *state = committed;
                Err(already_committed())
            }
        }
    }

    /// Waits for work that was committed.
    ///
    /// # Errors
    /// [`MlxError::CommandBufferError`] if it failed or nothing was committed.
    pub fn wait_until_completed(&self) -> Result<()> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let State::Recording(_) = *state {
            return Err(MlxError::CommandBufferError("not committed: expected commit before the wait".to_owned()));
        }
        let result = match std::mem::replace(&mut *state, State::Done(Ok(()))) {
            State::Running(submission) => submission.wait(),
            State::Done(result) => result,
            State::Recording(_) => unreachable!("returned above"),
        };
        *state = State::Done(result.clone());
        Ok(result?)
    }

    /// Commits and waits.
    ///
    /// # Errors
    /// As [`commit`](CommandEncoder::commit) and [`wait_until_completed`](CommandEncoder::wait_until_completed).
    pub fn commit_and_wait(&mut self) -> Result<()> {
        self.commit()?;
        self.wait_until_completed()
    }

    /// Lets `record` add operations for `op`, on the device that the caller names.
    pub(super) fn record(
        &mut self,
        op: &str,
        device: &MlxDevice,
        record: impl FnOnce(&mut compute::CommandEncoder) -> crate::Result<()>,
    ) -> Result<()> {
        let State::Recording(encoder) = self.state() else { return Err(already_committed()) };
        if encoder.device() != device.device() {
            return Err(MlxError::of(op, Error::wrong_device("device", device.device(), encoder.device())));
        }
        record(encoder).map_err(|error| MlxError::of(op, error))
    }
}

fn already_committed() -> MlxError {
    MlxError::CommandBufferError("already committed: expected a new encoder".to_owned())
}

/// Empty: a device compiles and keeps its kernels itself ([`Device::kernels`](crate::Device::kernels) takes a caller's
/// own). It is here because dispatches take one.
#[derive(Debug, Default)]
pub struct KernelRegistry(());

impl KernelRegistry {
    /// An empty registry.
    pub fn new() -> Self {
        KernelRegistry(())
    }
}
