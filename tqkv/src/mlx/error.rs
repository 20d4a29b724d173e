//! mlx-native's error type.

use crate::error::Error;

/// The result of every fallible call of [`mlx`](crate::mlx).
pub type Result<T> = std::result::Result<T, MlxError>;

/// mlx-native's errors, as far as its TurboQuant path has them. After an error nothing has been recorded or written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum MlxError {
    /// The device asked for cannot be had.
    #[error("no such device")]
    DeviceNotFound,
    /// Work failed on the device, or an encoder was used after it was committed.
    #[error("command buffer error: {0}")]
    CommandBufferError(String),
    /// A kernel did not compile.
    #[error("kernel {name} does not compile: {message}")]
    ShaderCompilationError {
        /// The kernel.
        name: String,
        /// The compiler's words.
        message: String,
    },
    /// Memory ran out.
    #[error("no room for a buffer of {bytes} bytes")]
    BufferAllocationError {
        /// Bytes asked for.
        bytes: usize,
    },
    /// An argument is wrong: the operation, then what was got and what was expected.
    #[error("invalid argument: {0}")]
    InvalidArgument(String),
    /// A kernel is not registered.
    #[error("kernel not found: {0}")]
    KernelNotFound(String),
}

impl MlxError {
    /// Whether the same call might succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, MlxError::CommandBufferError(_))
    }

    /// An error of the operation `op`.
    pub(super) fn of(op: &str, error: Error) -> Self {
        match error.into() {
            MlxError::InvalidArgument(message) => MlxError::InvalidArgument(format!("{op}: {message}")),
            MlxError::CommandBufferError(message) => MlxError::CommandBufferError(format!("{op}: {message}")),
            error => error,
        }
    }
}

impl From<Error> for MlxError {
    fn from(error: Error) -> Self {
        match error {
            Error::UnknownDevice { .. } | Error::DeviceUnavailable { .. } => MlxError::DeviceNotFound,
            Error::DeviceFailed { .. } | Error::BufferBusy => MlxError::CommandBufferError(error.to_string()),
            Error::OutOfMemory { requested, .. } => MlxError::BufferAllocationError { bytes: requested },
            Error::KernelCompile { name, log } => MlxError::ShaderCompilationError { name, message: log },
            Error::UnknownKernel { name } => MlxError::KernelNotFound(name),
            error => MlxError::InvalidArgument(error.to_string()),
        }
    }
}
