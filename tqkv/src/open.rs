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
    /// passed over is said once, by `tracing`: at level `warn` if there is a GPU that does not open, at level `info` if there is
    /// none.
    pub fn best() -> Self {
        static BEST: OnceLock<Device> = OnceLock::new();
        BEST.get_or_init(Device::find_best).clone()
    }

    fn find_best() -> Self {
        #[cfg(feature = "cuda")]
        match backend::cuda::count() {
            Ok(0) => tracing::info!("CUDA is passed over: the driver finds no GPU"),
            Ok(_) => match Device::open("cuda") {
                Ok(device) => return device,
                Err(reason) => tracing::warn!("CUDA is passed over: {reason}"),
            },
            Err(reason) => tracing::info!("CUDA is passed over: {reason}"),
        }
        #[cfg(feature = "wgpu")]
        match backend::wgpu::best() {
            Ok(Some(gpu)) => return Device::from_driver(Box::new(gpu)),
            Ok(None) => tracing::info!("wgpu is passed over: it finds no GPU but software rasterisers"),
            Err(reason) => tracing::warn!("wgpu is passed over: {reason}"),
        }
        Device::cpu()
    }

    /// An NVIDIA GPU whose work all goes to the caller's stream, a `cudaStream_t` or `CUstream`, in the order of submission.
    /// So buffers can be shared with the caller's own kernels on that stream, and submissions can be captured in a CUDA
    /// graph: run every shape once before (kernels are compiled and workspaces grow then), reuse the same
    /// [`Batch`](crate::ops::Batch), and do not wait for submissions while capturing. Between launches [`Batch::update`](crate::ops::Batch::update)
    /// gives the graph other lengths and pages: the next token's, say. What takes memory or copies from the host is
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compute::DeviceKind;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// On a machine with a GPU that opens, fewer kinds are passed over.
    #[test]
    fn the_best_device_says_what_it_passed_over() {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let best = tracing::subscriber::with_default(subscriber, Device::find_best).info();
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let expected = cfg!(feature = "cuda") && best.kind != DeviceKind::Cuda;
        assert_eq!(text.contains("CUDA is passed over: "), expected, "{best}\n{text}");
        let expected = cfg!(feature = "wgpu") && best.kind == DeviceKind::Cpu;
        assert_eq!(text.contains("wgpu is passed over: "), expected, "{best}\n{text}");
        assert!(best.is_gpu || best.kind == DeviceKind::Cpu, "{best}");
    }
}
