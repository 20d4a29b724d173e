//! Kernels by name.

use crate::error::{Error, Result};
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, RwLock};

/// A CPU kernel: gets the bindings' bytes, in order, and the constants.
pub type CpuKernel = Arc<dyn Fn(&mut [&mut [u8]], &[u32]) + Send + Sync>;

/// The source of a caller's kernel.
#[derive(Clone)]
#[non_exhaustive]
pub enum KernelSource {
    /// WGSL with a compute entry point `main`; bindings are `@group(0) @binding(i)` storage buffers, and the constants
    /// a uniform buffer after them.
    Wgsl(String),
    /// CUDA C++ with an `extern "C" __global__` function of the kernel's name; one pointer a binding, then the
    /// constants as 32-bit values. A block has as many threads as the function's `__launch_bounds__` says.
    Cuda(String),
    /// A Rust function; the grid is ignored.
    Cpu(CpuKernel),
}

impl fmt::Debug for KernelSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            KernelSource::Wgsl(_) => "Wgsl",
            KernelSource::Cuda(_) => "Cuda",
            KernelSource::Cpu(_) => "Cpu",
        })
    }
}

/// A device's kernels of the caller's own. Each is compiled once, at its first dispatch.
///
/// ```
/// use std::sync::Arc;
/// use tqkv::{Device, compute::KernelSource};
/// let device = Device::cpu();
/// device.kernels().register("double", KernelSource::Cpu(Arc::new(|bindings, _| {
///     bindings[0].iter_mut().for_each(|b| *b *= 2);
/// })));
/// let x = device.upload(&[1u8, 2, 3], &[3])?;
/// let mut encoder = device.encoder()?;
/// encoder.dispatch("double", [1, 1, 1], &[&x], &[])?;
/// encoder.submit_and_wait()?;
/// assert_eq!(x.read::<u8>()?, [2, 4, 6]);
/// # Ok::<(), tqkv::Error>(())
/// ```
#[derive(Debug, Default)]
pub struct KernelRegistry(RwLock<HashMap<String, KernelSource>>);

impl KernelRegistry {
    /// Adds a kernel, in place of one of the same name.
    pub fn register(&self, name: &str, source: KernelSource) {
        self.0.write().unwrap_or_else(|e| e.into_inner()).insert(name.to_owned(), source);
    }

    /// The source registered under this name.
    ///
    /// # Errors
    /// [`Error::UnknownKernel`].
    pub fn get(&self, name: &str) -> Result<KernelSource> {
        let kernels = self.0.read().unwrap_or_else(|e| e.into_inner());
        kernels.get(name).cloned().ok_or_else(|| Error::UnknownKernel { name: name.to_owned() })
    }
}
