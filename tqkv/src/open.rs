//! Devices by name: the one place that knows every backend.

use crate::backend;
use crate::compute::{Device, DeviceInfo};
use crate::error::{Error, Result};
use std::sync::OnceLock;

impl Device {
    /// The host's processor: always there. One device for the whole process, with one thread a logical core.
    pub fn cpu() -> Self {
        static CPU: OnceLock<Device> = OnceLock::new();
        CPU.get_or_init(|| Device::from_driver(Box::new(backend::cpu::Cpu::new()))).clone()
    }

    /// The host's processor with this many threads of its own.
    ///
    /// # Errors
    /// [`Error::Zero`] for no thread, [`Error::DeviceUnavailable`] if threads cannot be started.
    pub fn cpu_with_threads(threads: usize) -> Result<Self> {
        Ok(Device::from_driver(Box::new(backend::cpu::Cpu::with_threads(threads)?)))
    }

    /// The fastest device found: CUDA, then a GPU through wgpu (no software rasteriser), else the CPU. Why a faster kind was
    /// passed over is said once, by `tracing` at level `info`.
    pub fn best() -> Self {
        static BEST: OnceLock<Device> = OnceLock::new();
        BEST.get_or_init(Device::find_best).clone()
    }

    fn find_best() -> Self {
        #[cfg(feature = "cuda")]
        match Device::open("cuda") {
            Ok(device) => return device,
            Err(reason) => tracing::info!("no CUDA device is taken: {reason}"),
        }
        #[cfg(feature = "wgpu")]
        match backend::wgpu::best() {
            Some(gpu) => return Device::from_driver(Box::new(gpu)),
            None => tracing::info!("no GPU is taken through wgpu: none is found that is no software rasteriser"),
        }
        Device::cpu()
    }

    /// An NVIDIA GPU whose work all goes to the caller's stream, a `cudaStream_t` or `CUstream`, in the order of submission.
    /// So buffers can be shared with the caller's own kernels on that stream, and submissions can be captured in a CUDA
    /// graph: run every shape once before (kernels are compiled and workspaces grow then), reuse the same
    /// [`Batch`](crate::ops::Batch), and do not wait for submissions while capturing. What takes memory or copies from the host is
    /// [`Error::Unsupported`] then: also [`merge`](crate::ops::merge) of more than eight parts, and positions in a list.
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
        Ok(Device::from_driver(Box::new(unsafe { backend::cuda::Cuda::with_stream(ordinal, stream) }?)))
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
            ("cuda", index) => Ok(Device::from_driver(Box::new(backend::cuda::Cuda::new(index.unwrap_or(0))?))),
            #[cfg(feature = "wgpu")]
            ("wgpu", index) => Ok(Device::from_driver(Box::new(backend::wgpu::open(index)?))),
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
}
