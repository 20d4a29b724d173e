//! Kernels of the caller's own.

use crate::compute::{Buffer, CommandEncoder, KernelRegistry};
use crate::error::Result;
use crate::problem::op::{Custom, Op};

impl CommandEncoder {
    /// Records a kernel of the caller's own (see [`KernelRegistry::register`]).
    ///
    /// `workgroups` is the grid, `bindings` are the buffers in the order of the kernel's bindings or pointers, and
    /// `constants` is passed as a uniform buffer (wgpu), by value (CUDA) or as a slice (CPU).
    ///
    /// # Errors
    /// [`Error::UnknownKernel`](crate::Error::UnknownKernel), [`Error::WrongDevice`](crate::Error::WrongDevice),
    /// [`Error::KernelCompile`](crate::Error::KernelCompile), or [`Error::Unsupported`](crate::Error::Unsupported) if the registered
    /// source is for another kind of device.
    pub fn dispatch(
        &mut self,
        name: &str,
        workgroups: [u32; 3],
        bindings: &[&Buffer],
        constants: &[u32],
    ) -> Result<()> {
        for buffer in bindings {
            self.expect_own("binding", buffer)?;
        }
        let source = self.device().kernels().get(name)?;
        let bindings = bindings.iter().map(|&b| b.clone()).collect();
        let constants = constants.to_vec();
        Op::Custom(Custom { name: name.to_owned(), source, workgroups, bindings, constants }).record(self)
    }

    /// The kernels that [`dispatch`](CommandEncoder::dispatch) finds.
    pub fn kernels(&self) -> &KernelRegistry {
        self.device().kernels()
    }
}
