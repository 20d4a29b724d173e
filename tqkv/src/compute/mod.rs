//! Memory and submission: [`Device`], [`Buffer`], [`CommandEncoder`] and [`KernelRegistry`], the same on every backend.

mod buffer;
mod device;
pub(crate) mod driver;
mod encoder;
mod info;
mod registry;

pub use crate::format::{DType, Element};
pub use buffer::Buffer;
pub use device::Device;
pub(crate) use encoder::Repeatable;
pub use encoder::{CommandEncoder, Submission};
pub use info::{DeviceInfo, DeviceKind};
pub use registry::{CpuKernel, KernelRegistry, KernelSource};
