//! Random schedules of a cache against a plain model that keeps every vector.

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};
use tqkv::Device;
use tqkv_checks::support::on;
use tqkv_checks::targets::schedule;

/// About as many steps as a fifth of the bytes.
fn schedules(device: &Device, cases: u32, bytes: usize) {
    let config = ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2000, ..Default::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let result = runner.run(&prop::collection::vec(any::<u8>(), bytes..=bytes), |bytes| {
        schedule::run_on(device, &bytes);
        Ok(())
    });
    if let Err(e) = result {
        panic!("{e}");
    }
}

#[test]
fn random_schedules_on_the_cpu() {
    schedules(&Device::cpu(), 40, 1000);
}

#[test]
fn random_schedules_on_wgpu() {
    on("wgpu", |device| schedules(device, 4, 300));
}

#[test]
fn random_schedules_on_cuda() {
    on("cuda", |device| schedules(device, 10, 500));
}
