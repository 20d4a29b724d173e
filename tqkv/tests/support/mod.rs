//! What the test suites share: devices, seeded data, poisoned and guarded buffers.
#![allow(dead_code)] // Each suite uses its part.

pub mod pools;

use half::{bf16, f16};
use std::io::Write;
use std::sync::Mutex;
use tqkv::compute::DeviceKind;
use tqkv::{Buffer, CommandEncoder, DType, Device};

/// The device of this name, or `None` (said on standard error, once) where this machine has none.
///
/// `TQKV_REQUIRE=wgpu,cuda` names devices that must be there: then a missing one fails the test.
pub fn device(name: &str) -> Option<Device> {
    watch_wgpu();
    match Device::open(name) {
        Ok(device) => Some(device),
        Err(e) => {
            let required = std::env::var("TQKV_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|r| r == name), "TQKV_REQUIRE names {name}: {e}");
            static SAID: Mutex<Vec<String>> = Mutex::new(Vec::new());
            let mut said = SAID.lock().unwrap();
            if !said.iter().any(|s| s == name) {
                said.push(name.to_owned());
                // Past the test harness's capture, so that a skip is seen in a passing run.
                let _ = writeln!(std::io::stderr(), "SKIPPED: every test on {name}: {e}");
            }
            None
        }
    }
}

/// Runs a test body on a device of this name, if there is one. wgpu and naga must have nothing to complain about.
pub fn on(name: &str, body: impl FnOnce(&Device)) {
    if let Some(device) = device(name) {
        body(&device);
        let complaints = COMPLAINTS.lock().unwrap();
        assert!(name != "wgpu" || complaints.is_empty(), "logged at warn or error: {complaints:#?}");
    }
}

/// Stamps tests, functions of a device beside it, onto devices: a module each.
#[allow(unused_macros)]
macro_rules! suite {
    ($($device:ident),*: $tests:tt) => { $(
        mod $device {
            $crate::support::suite!(@tests $device: $tests);
        }
    )* };
    (@tests $device:ident: ($($test:ident),* $(,)?)) => { $(
        #[test]
        fn $test() {
            super::on(stringify!($device), super::$test);
        }
    )* };
}
#[allow(unused_imports)]
pub(crate) use suite;

/// What wgpu and naga have logged as warnings or errors in this process.
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Collects complaints from here on.
fn watch_wgpu() {
    struct Watch;
    impl log::Log for Watch {
        fn enabled(&self, metadata: &log::Metadata) -> bool {
            metadata.level() <= log::Level::Warn
                && ["wgpu", "naga"].iter().any(|name| metadata.target().starts_with(name))
        }
        fn log(&self, record: &log::Record) {
            if self.enabled(record.metadata()) {
                COMPLAINTS.lock().unwrap().push(format!("{} {}: {}", record.level(), record.target(), record.args()));
            }
        }
        fn flush(&self) {}
    }
    if log::set_logger(&Watch).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
}

#[cfg(feature = "wgpu")]
fn ready<T>(future: impl Future<Output = T>) -> T {
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    let mut future = std::pin::pin!(future);
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}

/// A wgpu device as an engine would have it: without optional features, subgroups among them.
#[cfg(feature = "wgpu")]
pub fn engine() -> (tqkv::wgpu::Device, tqkv::wgpu::Queue) {
    use tqkv::wgpu;
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    descriptor.flags = wgpu::InstanceFlags::empty();
    let adapters = ready(wgpu::Instance::new(descriptor).enumerate_adapters(wgpu::Backends::PRIMARY));
    let adapter = adapters.first().expect("an adapter, as tqkv has found one");
    let descriptor = wgpu::DeviceDescriptor { required_limits: adapter.limits(), ..Default::default() };
    ready(adapter.request_device(&descriptor)).expect("a device")
}

/// Records, submits, waits.
pub fn run(device: &Device, record: impl FnOnce(&mut CommandEncoder) -> tqkv::Result<()>) {
    let mut encoder = device.encoder().unwrap();
    record(&mut encoder).unwrap();
    encoder.submit_and_wait().unwrap();
}

/// SplitMix64: the same numbers everywhere and for ever.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, n).
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Uniform in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.unit()).cos()) as f32
    }

    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    pub fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// Rounds through a stored type.
pub fn rounded(dtype: DType, x: f32) -> f32 {
    match dtype {
        DType::F16 => f16::from_f32(x).to_f32(),
        DType::BF16 => bf16::from_f32(x).to_f32(),
        _ => x,
    }
}

/// Uploads floats as any float type.
pub fn upload(device: &Device, dtype: DType, data: &[f32], shape: &[usize]) -> Buffer {
    match dtype {
        DType::F16 => device.upload(&data.iter().map(|&x| f16::from_f32(x)).collect::<Vec<_>>(), shape),
        DType::BF16 => device.upload(&data.iter().map(|&x| bf16::from_f32(x)).collect::<Vec<_>>(), shape),
        _ => device.upload(data, shape),
    }
    .unwrap()
}

/// Reads any float type as f32.
pub fn download(buffer: &Buffer) -> Vec<f32> {
    match buffer.dtype() {
        DType::F16 => buffer.read::<f16>().unwrap().into_iter().map(f16::to_f32).collect(),
        DType::BF16 => buffer.read::<bf16>().unwrap().into_iter().map(bf16::to_f32).collect(),
        _ => buffer.read::<f32>().unwrap(),
    }
}

/// An output full of NaN with guards before and after it.
pub struct Guarded {
    whole: Buffer,
    pub buffer: Buffer,
}

/// Elements before and after a guarded output; a multiple of every alignment that kernels like.
const GUARD: usize = 64;

impl Guarded {
    pub fn new(device: &Device, dtype: DType, shape: &[usize]) -> Guarded {
        let len: usize = shape.iter().product();
        let whole = upload(device, dtype, &vec![f32::NAN; len + 2 * GUARD], &[len + 2 * GUARD]);
        let buffer = whole.slice(GUARD..GUARD + len).unwrap().reshape(shape).unwrap();
        Guarded { whole, buffer }
    }

    /// The content, after a look at the guards.
    pub fn take(&self) -> Vec<f32> {
        let all = download(&self.whole);
        let len = all.len() - 2 * GUARD;
        assert!(all[..GUARD].iter().chain(&all[GUARD + len..]).all(|x| x.is_nan()), "written outside the output");
        all[GUARD..GUARD + len].to_vec()
    }
}

/// |got - want| / |want| of two vectors; the absolute error where `want` vanishes.
pub fn relative_error(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let norm = want.iter().map(|w| w * w).sum::<f64>().sqrt();
    let error = got.iter().zip(want).map(|(&g, w)| (g as f64 - w).powi(2)).sum::<f64>().sqrt();
    if norm > 1e-20 { error / norm } else { error }
}

/// How far attention may be from float64, relative: f32 sums on the CPU (scores are kept finer than f32), f32 on GPUs.
/// On the CPU queries of half types may be answered in integers of 16 bits, within what `Precision::Half` says.
/// On CUDA queries of half types go to the tensor cores, where rotated queries (of more than four rows a KV head), levels and
/// weights are rounded to f16: 2^-11 + 2^-12 + 2^-11, or 1.2e-3, plus their sums. Half outputs add their own rounding.
pub fn attention_tolerance(device: &Device, q: DType, out: DType) -> f64 {
    let arithmetic = match (device.info().kind, q) {
        (DeviceKind::Cpu, DType::F16 | DType::BF16) => 5e-4,
        (DeviceKind::Cpu, _) => 1e-5,
        (DeviceKind::Cuda, DType::F16 | DType::BF16) => 2e-3,
        _ => 2e-5,
    };
    let rounding = match out {
        DType::F16 => 2f64.powi(-11),
        DType::BF16 => 2f64.powi(-8),
        _ => 0.0,
    };
    arithmetic + rounding
}
