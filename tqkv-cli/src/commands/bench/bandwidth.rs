//! How fast a device reads and copies.

use super::meter::{Limit, Meter, Timing};
use anyhow::{Result, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use tqkv::compute::DeviceKind;
use tqkv::compute::KernelSource;
use tqkv::{Buffer, DType, Error};

/// What a processor reads and copies.
const BYTES: usize = 256 << 20;

/// How long it takes to read so many bytes, and to copy them.
#[derive(Clone, Copy)]
pub struct Bandwidth {
    pub bytes: usize,
    pub read: Timing,
    pub copy: Timing,
}

impl Bandwidth {
    /// Bytes that are read, or read and written, in a second.
    pub fn speed(&self, limit: Limit) -> f64 {
        match limit {
            Limit::Read => self.bytes as f64 / self.read.seconds,
            Limit::Copy => 2.0 * self.bytes as f64 / self.copy.seconds,
        }
    }

    pub fn measure(meter: &Meter) -> Result<Self> {
        match meter.device.info().kind {
            DeviceKind::Cpu => of_processor(meter),
            _ => of_gpu(meter),
        }
    }
}

fn of_processor(meter: &Meter) -> Result<Bandwidth> {
    let threads = meter.device.info().threads.unwrap_or(1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let source = vec![1u64; BYTES / 8];
    let mut target = vec![2u64; BYTES / 8];
    let piece = source.len().div_ceil(threads * 16);
    let mut sum = 0;
    let read = meter.time_host(|_| {
        sum = pool.install(|| source.par_chunks(piece).map(|c| c.iter().fold(0, |a: u64, b| a.wrapping_add(*b))).sum());
        Ok(())
    })?;
    ensure!(sum == source.len() as u64, "reading went wrong");
    let copy = meter.time_host(|_| {
        pool.install(|| {
            target.par_chunks_mut(piece).zip(source.par_chunks(piece)).for_each(|(t, s)| t.copy_from_slice(s));
        });
        Ok(())
    })?;
    ensure!(target == source, "copying went wrong");
    Ok(Bandwidth { bytes: BYTES, read, copy })
}

/// Threads of a workgroup of the kernels here.
const THREADS: usize = 256;
/// The best of these numbers of workgroups counts.
const WORKGROUPS: [u32; 3] = [1056, 4096, 16_384];
/// The largest that a device binds is read and copied.
const SIZES: [usize; 3] = [1 << 30, 1 << 28, 1 << 26];

const READ_WGSL: &str = "
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> sums: array<u32>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  var sum = vec4(0u);
  for (var i = id.x; i < arrayLength(&x); i += groups.x * 256u) { sum += x[i]; }
  sums[id.x] = sum.x + sum.y + sum.z + sum.w;
}";

const COPY_WGSL: &str = "
@group(0) @binding(0) var<storage, read> x: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read_write> y: array<vec4<u32>>;
@compute @workgroup_size(256)
fn main(@builtin(global_invocation_id) id: vec3<u32>, @builtin(num_workgroups) groups: vec3<u32>) {
  for (var i = id.x; i < arrayLength(&x); i += groups.x * 256u) { y[i] = x[i]; }
}";

const READ_CUDA: &str = "
extern \"C\" __global__ void __launch_bounds__(256) read(const uint4* x, unsigned* sums, unsigned n) {
    const unsigned id = blockIdx.x * 256 + threadIdx.x, step = gridDim.x * 256;
    unsigned sum = 0;
    for (unsigned i = id; i < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = i + j * step < n ? __ldcs(x + i + j * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += v[j].x + v[j].y + v[j].z + v[j].w;
    }
    sums[id] = sum;
}";

const COPY_CUDA: &str = "
extern \"C\" __global__ void __launch_bounds__(256) copy(const uint4* x, uint4* y, unsigned n) {
    const unsigned step = gridDim.x * 256;
    for (unsigned i = blockIdx.x * 256 + threadIdx.x; i < n; i += 4 * step) {
        uint4 v[4];
#pragma unroll
        for (int j = 0; j < 4; j++) if (i + j * step < n) v[j] = __ldcs(x + i + j * step);
#pragma unroll
        for (int j = 0; j < 4; j++) if (i + j * step < n) __stcs(y + i + j * step, v[j]);
    }
}";

fn of_gpu(meter: &Meter) -> Result<Bandwidth> {
    let device = &meter.device;
    let cuda = device.info().kind == DeviceKind::Cuda;
    let source = |cuda_text: &str, wgsl: &str| match cuda {
        true => KernelSource::Cuda(cuda_text.to_owned()),
        false => KernelSource::Wgsl(wgsl.to_owned()),
    };
    device.kernels().register("read", source(READ_CUDA, READ_WGSL));
    device.kernels().register("copy", source(COPY_CUDA, COPY_WGSL));
    let mut refusal = None;
    for bytes in SIZES {
        match sized(meter, bytes, cuda) {
            Err(error)
                if matches!(error.downcast_ref(), Some(Error::Unsupported { .. } | Error::OutOfMemory { .. })) =>
            {
                refusal = Some(error);
            }
            result => return result,
        }
    }
    Err(refusal.expect("there are sizes"))
}

fn sized(meter: &Meter, bytes: usize, cuda: bool) -> Result<Bandwidth> {
    let device = &meter.device;
    let mut rng = ChaCha8Rng::seed_from_u64(bytes as u64);
    let words: Vec<u32> = (0..bytes / 4).map(|_| rng.random()).collect();
    let x = device.upload(&words, &[words.len()])?;
    let y = device.zeros(DType::U32, &[words.len()])?;
    let constants = if cuda { vec![(bytes / 16) as u32] } else { vec![] };
    let never = Timing { seconds: f64::INFINITY, sustained: None, clock: None };
    let (mut read, mut copy) = (never, never);
    for groups in WORKGROUPS {
        let threads = groups as usize * THREADS;
        let sums = device.zeros(DType::U32, &[threads])?;
        let run = |name: &'static str, to: &Buffer| {
            meter.time(|_, encoder| encoder.dispatch(name, [groups, 1, 1], &[&x, to], &constants))
        };
        read = read.faster(run("read", &sums)?);
        let sum = |words: &[u32]| words.iter().fold(0u32, |a, b| a.wrapping_add(*b));
        ensure!(sum(&sums.read::<u32>()?) == sum(&words), "reading went wrong");
        copy = copy.faster(run("copy", &y)?);
        ensure!(y.read::<u32>()? == words, "copying went wrong");
    }
    Ok(Bandwidth { bytes, read, copy })
}
