//! Devices: found, named, opened.

use super::{Buffer, CommandEncoder, DType, Element, KernelRegistry};
use crate::backend::{self, Backend};
use crate::error::{Error, Result, checked_product};
use std::fmt;
use std::sync::{Arc, OnceLock};

/// The family of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DeviceKind {
    /// The host's processor.
    Cpu,
    /// A GPU through wgpu: Metal, Vulkan, DX12 or WebGPU.
    Wgpu,
    /// An NVIDIA GPU through CUDA.
    Cuda,
}

/// What is known of a device.
#[derive(Clone, Debug)]
pub struct DeviceInfo {
    /// Its family.
    pub kind: DeviceKind,
    /// The name that opens it: `cpu`, `wgpu:0`, `cuda:0`.
    pub id: String,
    /// What its maker or driver calls it.
    pub name: String,
    /// Facts and limits worth showing, as name and value.
    pub details: Vec<(&'static str, String)>,
}

/// A place that holds buffers and runs operations. Cheap to clone; clones are the same device.
#[derive(Clone)]
pub struct Device(Arc<Inner>);

struct Inner {
    backend: Box<dyn Backend>,
    kernels: KernelRegistry,
}

impl Device {
    pub(crate) fn new(backend: Box<dyn Backend>) -> Self {
        Device(Arc::new(Inner { backend, kernels: KernelRegistry::default() }))
    }

    /// The host's processor: always there. One device for the whole process, with one thread a logical core.
    pub fn cpu() -> Self {
        static CPU: OnceLock<Device> = OnceLock::new();
        CPU.get_or_init(|| Device::new(Box::new(backend::cpu::Cpu::new()))).clone()
    }

    /// The host's processor with this many threads of its own.
    ///
    /// # Errors
    /// [`Error::Zero`] for no thread, [`Error::DeviceUnavailable`] if threads cannot be started.
    pub fn cpu_with_threads(threads: usize) -> Result<Self> {
        Ok(Device::new(Box::new(backend::cpu::Cpu::with_threads(threads)?)))
    }

    /// The fastest device found: CUDA, then a GPU through wgpu (no software rasteriser), else the CPU.
    pub fn best() -> Self {
        Device::cpu()
    }

    /// Opens a device by its name: `cpu`, `wgpu`, `wgpu:N`, `cuda` or `cuda:N`.
    ///
    /// # Errors
    /// [`Error::UnknownDevice`] for another name, [`Error::DeviceUnavailable`] with the reason.
    pub fn open(name: &str) -> Result<Self> {
        let (kind, index) = match name.split_once(':') {
            Some((kind, index)) => match index.parse::<usize>() {
                Ok(index) => (kind, Some(index)),
                Err(_) => return Err(Error::UnknownDevice { got: name.to_owned() }),
            },
            None => (name, None),
        };
        match (kind, index) {
            ("cpu", None) => Ok(Device::cpu()),
            ("wgpu" | "cuda", _) => Err(Error::DeviceUnavailable {
                device: name.to_owned(),
                reason: "this build has no such backend".to_owned(),
            }),
            _ => Err(Error::UnknownDevice { got: name.to_owned() }),
        }
    }

    /// Every device that this build finds on this machine, and why others cannot be used.
    pub fn list() -> Vec<Result<DeviceInfo>> {
        vec![Ok(Device::cpu().info())]
    }

    /// What is known of it.
    pub fn info(&self) -> DeviceInfo {
        self.0.backend.info()
    }

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
        let storage = self.0.backend.alloc(bytes)?;
        Ok(Buffer::new(self, Arc::new(storage), dtype, shape))
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

    /// Starts to record operations.
    ///
    /// # Errors
    /// [`Error::DeviceFailed`] if the device is lost.
    pub fn encoder(&self) -> Result<CommandEncoder> {
        Ok(CommandEncoder::new(self, self.0.backend.recorder()?))
    }

    /// Kernels of the caller's own, which run between tqkv's operations.
    pub fn kernels(&self) -> &KernelRegistry {
        &self.0.kernels
    }

    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.0.backend
    }
}

impl PartialEq for Device {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.info().id)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({self})")
    }
}
