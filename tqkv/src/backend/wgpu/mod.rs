//! GPUs through wgpu: Metal, Vulkan, DX12. One set of WGSL kernels, put together for each shape and compiled once.
//!
//! ```text
//! adapter, probe, interop   devices: found, tried, wrapped
//! gpu, transfer, memory     a device: errors, buffers, copies
//! driver, recorder          what the library calls
//! commands, slot, kernel    what kernels are recorded with
//! context, pipelines        what is made once a device
//! kernels                   an operation each: its key, its text, its parameters
//! codec                     how rows are read and written: the one place that knows codecs
//! wgsl                      pieces of text that kernels share
//! ```

mod adapter;
mod caps;
mod codec;
mod commands;
mod context;
mod driver;
mod gpu;
mod interop;
mod kernel;
mod kernels;
mod memory;
mod pipelines;
mod probe;
mod recorder;
mod slot;
#[cfg(test)]
mod tests;
mod transfer;
mod wgsl;

pub(crate) use adapter::{best, list, open};
