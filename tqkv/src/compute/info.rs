//! What is known of a device.

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
