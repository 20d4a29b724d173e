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
    pub(crate) fn from_backend(backend: Box<dyn Backend>) -> Self {
        Device(Arc::new(Inner { backend, kernels: KernelRegistry::default() }))
    }

    /// The host's processor: always there. One device for the whole process, with one thread a logical core.
    pub fn cpu() -> Self {
        static CPU: OnceLock<Device> = OnceLock::new();
        CPU.get_or_init(|| Device::from_backend(Box::new(backend::cpu::Cpu::new()))).clone()
    }

    /// The host's processor with this many threads of its own.
    ///
    /// # Errors
    /// [`Error::Zero`] for no thread, [`Error::DeviceUnavailable`] if threads cannot be started.
    pub fn cpu_with_threads(threads: usize) -> Result<Self> {
        Ok(Device::from_backend(Box::new(backend::cpu::Cpu::with_threads(threads)?)))
    }

    /// The fastest device found: CUDA, then a GPU through wgpu (no software rasteriser), else the CPU.
    pub fn best() -> Self {
        static BEST: OnceLock<Device> = OnceLock::new();
        BEST.get_or_init(Device::find_best).clone()
    }

    fn find_best() -> Self {
        #[cfg(feature = "cuda")]
        if let Ok(device) = Device::open("cuda") {
            return device;
        }
        #[cfg(feature = "wgpu")]
        if let Some(gpu) = backend::wgpu::best() {
            return Device::from_backend(Box::new(gpu));
        }
        Device::cpu()
    }

    /// An NVIDIA GPU whose work all goes to the caller's stream, a `cudaStream_t` or `CUstream`, in the order of submission.
    /// So buffers can be shared with the caller's own kernels on that stream, and submissions can be captured in a CUDA
    /// graph: run every shape once before (kernels are compiled and workspaces grow then), reuse the same
    /// [`Batch`](crate::ops::Batch), and do not wait for submissions while capturing. What takes memory or copies from the host is
    /// [`Error::Unsupported`] then: also [`merge`](crate::ops::merge), and with it layers that have sinks, and positions in a list.
    ///
    /// # Safety
    /// `stream` must be a stream (null is the default stream) of the GPU's primary context, which the CUDA runtime uses, and
    /// outlive the device and all its buffers.
    ///
    /// # Errors
    /// [`Error::DeviceUnavailable`] with the reason, [`Error::DeviceFailed`].
    #[cfg(feature = "cuda")]
    pub unsafe fn cuda_on_stream(ordinal: usize, stream: *mut std::ffi::c_void) -> Result<Self> {
        // SAFETY: the caller's promise.
        Ok(Device::from_backend(Box::new(unsafe { backend::cuda::Cuda::with_stream(ordinal, stream) }?)))
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
            #[cfg(feature = "cuda")]
            ("cuda", index) => Ok(Device::from_backend(Box::new(backend::cuda::Cuda::new(index.unwrap_or(0))?))),
            #[cfg(feature = "wgpu")]
            ("wgpu", index) => Ok(Device::from_backend(Box::new(backend::wgpu::open(index)?))),
            #[allow(unreachable_patterns)] // Each build has some of them.
            ("wgpu" | "cuda", _) => Err(Error::DeviceUnavailable {
                device: name.to_owned(),
                reason: "this build has no such backend".to_owned(),
            }),
            _ => Err(Error::UnknownDevice { got: name.to_owned() }),
        }
    }

    /// Every device that this build finds on this machine, and why others cannot be used.
    pub fn list() -> Vec<Result<DeviceInfo>> {
        #[allow(unused_mut)] // In a build without GPU backends.
        let mut devices = vec![Ok(Device::cpu().info())];
        #[cfg(feature = "cuda")]
        match backend::cuda::count() {
            Ok(n) => devices.extend((0..n).map(|i| Device::open(&format!("cuda:{i}")).map(|d| d.info()))),
            Err(e) => devices.push(Err(e)),
        }
        #[cfg(feature = "wgpu")]
        devices.extend(backend::wgpu::list());
        devices
    }

    /// What is known of it.
    pub fn info(&self) -> DeviceInfo {
        self.0.backend.info()
    }

    /// Bytes that the device keeps beside buffers, for partial results of operations. They grow when a recorded operation needs
    /// more than any before: record what is largest once to know them, and to have nothing allocated later. A CPU keeps none.
    pub fn workspace_bytes(&self) -> usize {
        self.0.backend.workspace_bytes()
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
