//! Whether a GPU's clock stays up: with pauses between submissions a driver may lower it, and everything takes several times as long.

use anyhow::Result;
use std::cell::Cell;
use tqkv::compute::{DeviceKind, KernelSource};
use tqkv::{Buffer, DType, Device};

/// Steps that wait for each other: their time is in clock cycles, whatever else the device can do.
const STEPS: &str = "
@group(0) @binding(0) var<storage, read_write> x: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(local_invocation_index) id: u32) {
  var y = x[id];
  for (var i = 0u; i < 20000u; i++) { y = y * 747796405u + 2891336453u; y ^= y >> 7u; }
  x[id] = y;
}";

pub struct Clock {
    x: Buffer,
    /// The shortest time so far.
    shortest: Cell<f64>,
}

impl Clock {
    /// Of devices that may lower it: through CUDA they do not, as a process that uses it holds a context.
    pub fn new(device: &Device) -> Result<Option<Self>> {
        let info = device.info();
        if info.kind != DeviceKind::Wgpu || !info.is_gpu {
            return Ok(None);
        }
        device.kernels().register("steps", KernelSource::Wgsl(STEPS.to_owned()));
        Ok(Some(Clock { x: device.zeros(DType::U32, &[64])?, shortest: Cell::new(f64::INFINITY) }))
    }

    /// What it is now, as a share of the highest that this process has seen.
    pub fn share(&self, device: &Device) -> Result<f64> {
        let mut encoder = device.encoder()?;
        encoder.dispatch("steps", [1, 1, 1], &[&self.x], &[])?;
        let seconds = encoder.submit_and_time()?.as_secs_f64();
        self.shortest.set(self.shortest.get().min(seconds));
        Ok(self.shortest.get() / seconds)
    }
}
