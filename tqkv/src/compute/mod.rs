//! Memory and submission: [`Device`], [`Buffer`], [`CommandEncoder`] and [`KernelRegistry`], the same on every backend.

mod buffer;
mod device;
mod encoder;
mod registry;

pub use buffer::{Buffer, DType, Element};
pub use device::{Device, DeviceInfo, DeviceKind};
pub use encoder::{CommandEncoder, Submission};
pub use registry::{CpuKernel, KernelRegistry, KernelSource};
