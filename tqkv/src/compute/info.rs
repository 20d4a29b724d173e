//! What is known of a device.

use std::fmt;

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

/// What is known of a device. Its `Display` has a line for each fact.
///
/// ```
/// let info = tqkv::Device::cpu().info();
/// assert_eq!((info.id.as_str(), info.is_gpu), ("cpu", false));
/// assert!(info.threads.is_some_and(|n| n > 0));
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its family.
    pub kind: DeviceKind,
    /// The name that opens it: `cpu`, `wgpu:0`, `cuda:0`.
    pub id: String,
    /// What its maker or driver calls it.
    pub name: String,
    /// Whether kernels run on a GPU: wgpu finds software rasterisers too, which run on the processor.
    pub is_gpu: bool,
    /// Threads that kernels run on, of the CPU.
    pub threads: Option<usize>,
    /// Bytes of memory, where the driver tells it.
    pub memory_bytes: Option<u64>,
    /// Bytes of the largest buffer, where there is a limit other than memory.
    pub largest_buffer_bytes: Option<u64>,
    /// Bytes of the largest buffer that a kernel can read, where there is a limit other than memory.
    pub largest_binding_bytes: Option<u64>,
    /// Other facts worth showing, as name and value; they change from version to version.
    pub details: Vec<(&'static str, String)>,
}

impl DeviceInfo {
    pub(crate) fn new(kind: DeviceKind, id: String, name: String, details: Vec<(&'static str, String)>) -> Self {
        DeviceInfo {
            kind,
            id,
            name,
            is_gpu: kind != DeviceKind::Cpu,
            threads: None,
            memory_bytes: None,
            largest_buffer_bytes: None,
            largest_binding_bytes: None,
            details,
        }
    }
}

impl fmt::Display for DeviceInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.id, self.name)?;
        let threads = self.threads.map(|n| ("threads", n.to_string()));
        let sizes = [
            ("memory", self.memory_bytes),
            ("largest buffer", self.largest_buffer_bytes),
            ("largest binding", self.largest_binding_bytes),
        ];
        let sizes = sizes.into_iter().filter_map(|(name, n)| Some((name, format!("{} MiB", n? >> 20))));
        for (name, value) in threads.into_iter().chain(sizes).chain(self.details.iter().cloned()) {
            write!(f, "\n    {name}: {value}")?;
        }
        Ok(())
    }
}
