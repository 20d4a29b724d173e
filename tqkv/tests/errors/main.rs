//! Every rule that a caller can break has an error of its own, which says what was got and what was expected; then
//! nothing is written, and nothing panics.

mod caches;
mod operations;
mod pools;
#[path = "../support/mod.rs"]
mod support;

use half::f16;
use support::*;
use tqkv::cache::{LayerKind, Side, Sinks};
use tqkv::compute::KernelSource;
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache};

const D: usize = 64;
const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const PAGE: usize = 8;
const PAGES: usize = 3;

fn row() -> RowFormat {
    RowFormat::new(Codec::tq(4), D).unwrap()
}

fn zero(what: &'static str) -> Error {
    Error::Zero { what }
}

fn shape(what: &'static str, got: &[usize], expected: &str) -> Error {
    Error::Shape { what, got: got.to_vec(), expected: expected.to_owned() }
}

fn mismatch(what: &'static str, got: usize, expected: &str) -> Error {
    Error::Mismatch { what, got, expected: expected.to_owned() }
}

fn overflow(what: &'static str, limit: &'static str) -> Error {
    Error::SizeOverflow { what, limit }
}

/// Two pools of random content, K and V.
struct Scene {
    device: Device,
    key: PagePool,
    value: PagePool,
}

impl Scene {
    fn new() -> Scene {
        let device = Device::cpu();
        let mut rng = Rng(1);
        let mut pool = || {
            let pool = PagePool::new(&device, row(), KV_HEADS, PAGE, PAGES).unwrap();
            pool.codes().write(&rng.bytes(pool.codes().bytes())).unwrap();
            pool.scales().unwrap().write(&vec![f16::ONE; pool.scales().unwrap().len()]).unwrap();
            pool
        };
        Scene { key: pool(), value: pool(), device }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut all = vec![];
        for buffer in [&self.key, &self.value].into_iter().flat_map(|p| [p.codes(), p.scales().unwrap()]) {
            let mut bytes = vec![0; buffer.bytes()];
            buffer.read_bytes(&mut bytes).unwrap();
            all.extend(bytes);
        }
        all
    }

    /// The operation gives exactly this error and leaves nothing behind that a submission would run.
    #[track_caller]
    fn fails(&self, want: Error, record: impl FnOnce(&mut tqkv::CommandEncoder) -> tqkv::Result<()>) {
        let before = self.bytes();
        let mut encoder = self.device.encoder().unwrap();
        assert_eq!(record(&mut encoder), Err(want));
        encoder.submit_and_wait().unwrap();
        assert!(self.bytes() == before, "an error wrote to a pool");
    }

    fn zeros(&self, shape: &[usize]) -> Buffer {
        self.device.zeros(DType::F32, shape).unwrap()
    }

    fn batch(&self, spans: &[Span]) -> tqkv::Result<Batch> {
        Batch::new(&self.device, PAGE, spans)
    }

    /// Positions 0..len in pages 0 and 1.
    fn plain(&self, len: usize, new: usize) -> Batch {
        self.batch(&[Span { first: 0, len, new, pages: &[0, 1] }]).unwrap()
    }
}

#[test]
fn codecs() {
    for bits in [0, 1, 9, 255] {
        let want = Error::Bits { codec: "native", got: bits, expected: "2 to 8" };
        assert_eq!(RowFormat::new(Codec::tq(bits), D), Err(want));
    }
    for bits in [0, 1, 7, 9] {
        let want = Error::Bits { codec: "seed", got: bits, expected: "2, 3, 4, 5, 6 or 8" };
        assert_eq!(RowFormat::new(Codec::seed(bits), D), Err(want));
    }
    for got in [0, 1025, 1040, 100_000, usize::MAX - 15, usize::MAX] {
        for codec in [Codec::tq(4), Codec::F16, Codec::F32] {
            let want = Error::HeadDim { codec: codec.to_string(), got, expected: "1 to 1024" };
            assert_eq!(RowFormat::new(codec, got), Err(want));
        }
    }
    for got in [0, 1, 3, 8, 80, 192, 1024, 100_000, 1 << 63] {
        let codec = Codec::seed(4);
        let want = Error::HeadDim { codec: codec.to_string(), got, expected: "a power of two from 16 to 512" };
        assert_eq!(RowFormat::new(codec, got), Err(want));
    }
    for got in [0.0, -1.0, f32::INFINITY, f32::NEG_INFINITY] {
        let want = Error::Parameter { name: "scale_factor_d512", got, expected: "finite and positive" };
        assert_eq!(row().with_scale_factor_d512(got), Err(want));
    }
    assert!(matches!(
        row().with_scale_factor_d512(f32::NAN),
        Err(Error::Parameter { name: "scale_factor_d512", got, .. }) if got.is_nan()
    ));
    for name in ["k1v4", "k9v4", "seed7", "turbo"] {
        assert_eq!(name.parse::<CodecPair>(), Err(Error::UnknownCodec { got: name.to_owned() }));
    }
    let want = Error::HeadDim { codec: "tq3".into(), got: 0, expected: "1 to 1024" };
    assert_eq!("k3v3".parse::<CodecPair>().unwrap().bits_per_element(0), Err(want));
}

#[test]
fn devices() {
    for name in ["", "gpu", "cpu:0", "CPU", "wgpu:", "cuda:x", "cuda:-1", "cuda:99999999999999999999"] {
        assert_eq!(Device::open(name).map(|_| ()), Err(Error::UnknownDevice { got: name.to_owned() }));
    }
    for name in ["wgpu:4000000000", "cuda:4000000000"] {
        match Device::open(name) {
            Err(Error::DeviceUnavailable { device, reason }) => assert!(device == name && !reason.is_empty()),
            other => panic!("{name}: {other:?}"),
        }
    }
    assert_eq!(Device::cpu_with_threads(0).map(|_| ()), Err(zero("threads")));
    let device = Device::cpu();
    for shape in [&[usize::MAX][..], &[usize::MAX, usize::MAX], &[1 << 32, 1 << 32], &[usize::MAX, 2, 0]] {
        let zeros = device.zeros(DType::F32, shape).map(|_| ());
        assert_eq!(zeros, Err(overflow("buffer size", "isize")), "{shape:?}");
    }
    let requested = isize::MAX as usize / 4 * 4;
    let want = Error::OutOfMemory { device: "cpu".to_owned(), requested };
    assert_eq!(device.zeros(DType::F32, &[requested / 4]).map(|_| ()), Err(want));
    assert_eq!(device.upload(&[1f32; 3], &[2, 2]).map(|_| ()), Err(shape("data", &[3], "as many elements as [2, 2]")));
}

#[test]
fn buffers() {
    let b = Device::cpu().upload(&[1f32; 6], &[2, 3]).unwrap();
    assert_eq!(b.reshape(&[4]).map(|_| ()), Err(shape("buffer", &[2, 3], "as many elements as [4]")));
    assert_eq!(b.reshape(&[usize::MAX, 2]).map(|_| ()), Err(overflow("shape", "isize")));
    #[allow(clippy::reversed_empty_ranges)] // That is the mistake.
    for (range, text) in [(0..3, "0..3"), (2..1, "2..1"), (3..3, "3..3"), (0..usize::MAX, "0..18446744073709551615")] {
        let want = shape("buffer", &[2, 3], &format!("a first axis that holds {text}"));
        assert_eq!(b.slice(range).map(|_| ()), Err(want));
    }
    let scalar = b.slice(0..1).unwrap().reshape(&[3]).unwrap().slice(0..1).unwrap().reshape(&[]).unwrap();
    assert_eq!(scalar.slice(0..0).map(|_| ()), Err(shape("buffer", &[], "a first axis that holds 0..0")));
    // Without entries the size of an entry may be anything.
    let empty = Device::cpu().zeros(DType::F32, &[0, usize::MAX, usize::MAX]).unwrap();
    assert_eq!(empty.slice(0..0).unwrap().bytes(), 0);

    let dtype = |what, expected| Error::DType { what, got: "f32", expected };
    assert_eq!(b.read::<u8>(), Err(dtype("buffer read", "u8")));
    assert_eq!(b.write(&[f16::ONE; 6]), Err(dtype("buffer written", "f16")));
    assert_eq!(b.write(&[0f32; 5]), Err(Error::TooSmall { what: "host slice", got: 20, expected: 24 }));
    assert_eq!(b.write(&[0f32; 7]), Err(Error::TooLarge { what: "host slice's bytes", got: 28, expected: 24 }));
    assert_eq!(b.read_bytes(&mut [0; 23]), Err(Error::TooSmall { what: "host slice", got: 23, expected: 24 }));
    assert_eq!(b.read::<f32>().unwrap(), [1.0; 6]);
}

#[test]
fn kernels() {
    let s = Scene::new();
    let unknown = Error::UnknownKernel { name: "nobody".to_owned() };
    assert_eq!(s.device.kernels().get("nobody").map(|_| ()), Err(unknown.clone()));
    s.fails(unknown, |e| e.dispatch("nobody", [1, 1, 1], &[], &[]));
    let device = Device::cpu_with_threads(1).unwrap();
    device.kernels().register("foreign", KernelSource::Wgsl(String::new()));
    let what = "run kernel foreign, whose source is for another kind of device".to_owned();
    let want = Error::Unsupported { device: "cpu".to_owned(), what };
    assert_eq!(device.encoder().unwrap().dispatch("foreign", [1, 1, 1], &[], &[]), Err(want));
    let far = s.zeros(&[1]);
    let want =
        Error::WrongDevice { what: "binding", got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    assert_eq!(device.encoder().unwrap().dispatch("foreign", [1, 1, 1], &[&far], &[]), Err(want));
}

/// While a kernel writes a buffer, another thread gets an error, never a wait or a race.
#[test]
fn a_buffer_in_use_is_busy() {
    use std::sync::{Arc, Mutex, mpsc::channel};
    let device = Device::cpu_with_threads(1).unwrap();
    let buffer = device.zeros(DType::F32, &[4]).unwrap();
    let ((entered, is_entered), (leave, may_leave)) = (channel(), channel());
    let may_leave = Mutex::new(may_leave);
    let hold = Arc::new(move |_: &mut [&mut [u8]], _: &[u32]| {
        entered.send(()).unwrap();
        may_leave.lock().unwrap().recv().unwrap()
    });
    device.kernels().register("hold", KernelSource::Cpu(hold));
    std::thread::scope(|scope| {
        scope.spawn(|| run(&device, |e| e.dispatch("hold", [1, 1, 1], &[&buffer], &[])));
        is_entered.recv().unwrap();
        assert_eq!(buffer.read::<f32>(), Err(Error::BufferBusy));
        assert_eq!(buffer.write(&[1f32; 4]), Err(Error::BufferBusy));
        leave.send(()).unwrap();
    });
    assert_eq!(buffer.read::<f32>().unwrap(), [0.0; 4]);
}
