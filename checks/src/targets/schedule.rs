//! Schedules of a cache against the plain model.

use crate::config::LAYERS;
use crate::model::Model;
use crate::step::Step;
use crate::support::Rng;
use arbitrary::Unstructured;
use tqkv::Device;

/// Steps of a schedule at most.
const STEPS: usize = 400;

/// The schedule that bytes say, on the CPU.
pub fn run(bytes: &[u8]) {
    run_on(super::cpu(), bytes);
}

/// As [`run`], on a device.
pub fn run_on(device: &Device, bytes: &[u8]) {
    let mut u = Unstructured::new(bytes);
    let mut model = Model::new(device);
    for _ in 0..STEPS {
        if u.is_empty() {
            break;
        }
        let Ok(step) = Step::draw(&mut u, LAYERS) else { break };
        model.run(&step);
    }
    model.finish();
}

/// Random bytes are schedules.
pub fn seeds() -> Vec<Vec<u8>> {
    [100, 200, 400].into_iter().enumerate().map(|(i, n)| Rng(i as u64).bytes(n)).collect()
}
