//! What is done with random input: by the fuzzers of `fuzz/`, by `cargo xtask soak`, and by the tests of this crate, which do
//! the same on stable.

pub mod config;
pub mod model;
pub mod mutate;
pub mod scale;
pub mod soak;
pub mod step;
pub mod targets;

#[allow(missing_docs, clippy::should_implement_trait)]
#[path = "../../tqkv/tests/support/mod.rs"]
pub mod support;

use tqkv::compute::DeviceKind;
use tqkv::reference::Query;
use tqkv::{DType, Device};

/// How far attention of a random case may be off. Half precision on the CPU keeps its bound of outputs where values do not cancel,
/// and for |q| |k| scale up to 16; of many random cases some do otherwise.
pub(crate) fn tolerance(device: &Device, dtype: DType, query: &Query, keys: &[&[f32]]) -> f64 {
    let usual = support::attention_tolerance(device, dtype, DType::F32);
    if device.info().kind != DeviceKind::Cpu || dtype == DType::F32 {
        return usual;
    }
    let norm = |x: &[f32]| x.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt();
    let size = norm(query.q) * query.scale.abs() * keys.iter().map(|k| norm(k)).fold(0.0, f64::max);
    4.0 * usual * (size / 16.0).max(1.0)
}
