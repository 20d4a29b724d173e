//! Every rule that a caller can break has an error of its own, which says what was got and what was expected; then
//! nothing is written, and nothing panics.

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
fn pools() {
    let device = Device::cpu();
    let new = |kv_heads, page_size, pages| PagePool::new(&device, row(), kv_heads, page_size, pages).map(|_| ());
    assert_eq!(new(0, 8, 1), Err(zero("kv_heads")));
    assert_eq!(new(2, 0, 1), Err(zero("page_size")));
    assert_eq!(new(2, 8, 0), Err(zero("pages")));
    let max = usize::MAX;
    for (kv_heads, page_size, pages) in [(max, 8, 1), (2, max, 1), (2, 8, max), (max, max, max), (1 << 32, 1 << 32, 1)]
    {
        assert_eq!(new(kv_heads, page_size, pages), Err(overflow("rows of a pool", "isize")));
    }
    assert_eq!(new(1 << 16, 1 << 16, 1), Err(overflow("rows of a pool", "u32")));
    assert_eq!(new(1 << 13, 1 << 14, 1), Err(overflow("bytes of a page", "u32")));

    let scales = device.zeros(DType::F16, &[1, 2, 8, 1]).unwrap();
    let codes = device.zeros(DType::U8, &[1, 2, 8, 32]).unwrap();
    let from = |row, codes: &Buffer, scales: Option<&Buffer>| PagePool::from_buffers(row, codes, scales).map(|_| ());
    assert_eq!(from(row(), &codes, Some(&scales)), Ok(()));
    let flat = codes.reshape(&[512]).unwrap();
    let want = shape("codes", &[512], "[pages, kv_heads, page_size, row_bytes]");
    assert_eq!(from(row(), &flat, Some(&scales)), Err(want));
    let five = RowFormat::new(Codec::tq(5), D).unwrap();
    assert_eq!(from(five, &codes, Some(&scales)), Err(shape("codes", &[1, 2, 8, 32], "[1, 2, 8, 40]")));
    let floats = device.zeros(DType::F32, &[1, 2, 8, 32]).unwrap();
    let want = Error::DType { what: "codes", got: "f32", expected: "u8" };
    assert_eq!(from(row(), &floats, Some(&scales)), Err(want));
    assert_eq!(from(row(), &codes, None), Err(shape("scales", &[], "[1, 2, 8, 1]")));
    let two = device.zeros(DType::F16, &[1, 2, 8, 2]).unwrap();
    assert_eq!(from(row(), &codes, Some(&two)), Err(shape("scales", &[1, 2, 8, 2], "[1, 2, 8, 1]")));
    let wide = device.zeros(DType::F32, &[1, 2, 8, 1]).unwrap();
    let want = Error::DType { what: "scales", got: "f32", expected: "f16" };
    assert_eq!(from(row(), &codes, Some(&wide)), Err(want));
    let seed = RowFormat::new(Codec::seed(4), D).unwrap();
    let want = Error::DType { what: "scales", got: "f16", expected: "f32" };
    assert_eq!(from(seed, &codes, Some(&scales)), Err(want));
    let far = Device::cpu_with_threads(1).unwrap().zeros(DType::F16, &[1, 2, 8, 1]).unwrap();
    let want =
        Error::WrongDevice { what: "scales", got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    assert_eq!(from(row(), &codes, Some(&far)), Err(want));

    let dense = RowFormat::new(Codec::F16, 16).unwrap();
    let codes = device.zeros(DType::U8, &[1, 2, 8, 32]).unwrap();
    let want = shape("scales", &[1, 2, 8, 1], "none: dense floats have no scales");
    assert_eq!(from(dense, &codes, Some(&scales)), Err(want));
    let odd = device.zeros(DType::U8, &[33]).unwrap().slice(1..33).unwrap().reshape(&[1, 1, 1, 32]).unwrap();
    let want = mismatch("byte offset of codes", 1, "a multiple of 2, so that floats are aligned");
    assert_eq!(from(dense, &odd, None), Err(want));
    for (shape, what) in [([0, 2, 8, 32], "pages"), ([1, 0, 8, 32], "kv_heads"), ([1, 2, 0, 32], "page_size")] {
        assert_eq!(from(dense, &device.zeros(DType::U8, &shape).unwrap(), None), Err(zero(what)));
    }
}

#[test]
fn strided_pools() {
    let device = Device::cpu();
    let (row, bytes) = (row(), row().bytes());
    let memory = device.zeros(DType::U8, &[3 * 16 * bytes]).unwrap();
    let dense = Strides::dense(2, 8, bytes);
    let from = |at: usize| memory.slice(at..memory.len()).unwrap();
    fn pool(row: RowFormat, codes: (&Buffer, Strides), scales: Option<(&Buffer, Strides)>) -> tqkv::Result<PagePool> {
        PagePool::strided(row, [3, 2, 8], codes, scales)
    }
    let (codes, scales) = (from(0), from(32));
    fn fails(want: Error, codes: (&Buffer, Strides), scales: Option<(&Buffer, Strides)>) {
        assert_eq!(pool(self::row(), codes, scales).map(|_| ()), Err(want));
    }
    let beside = pool(row, (&codes, dense), Some((&scales, dense))).unwrap();
    assert_eq!(
        (beside.bytes(), beside.codes().bytes(), beside.strides()),
        (48 * bytes, 48 * bytes - 2, (dense, dense))
    );

    let overlap = |got, least| {
        mismatch("stride of codes", got, &format!("at least {least}, as what it steps over takes so many bytes"))
    };
    fails(overlap(31, 32), (&codes, Strides { row: 31, ..dense }), Some((&scales, dense)));
    fails(overlap(263, 270), (&codes, Strides { head: 263, ..dense }), Some((&scales, dense)));
    fails(overlap(0, 32), (&codes, Strides::default()), Some((&scales, dense)));
    let far = Strides { page: usize::MAX / 2, ..dense };
    fails(overflow("stride of codes", "isize"), (&codes, far), Some((&scales, dense)));
    let small = |what, got, expected| Error::TooSmall { what, got, expected };
    let short = memory.slice(0..48 * bytes - 3).unwrap();
    fails(small("codes", 48 * bytes - 3, 48 * bytes - 2), (&short, dense), Some((&scales, dense)));
    let late = from(33);
    fails(small("scales", 48 * bytes - 33, 48 * bytes - 32), (&codes, dense), Some((&late, dense)));
    fails(Error::Aliased { what: "scales" }, (&codes, dense), Some((&from(30), dense)));
    fails(shape("scales", &[], "[3, 2, 8, 1]"), (&codes, dense), None);
    // f16 scales at an odd byte, or an odd number of bytes apart.
    let odd = Strides::dense(2, 8, 33);
    let want = mismatch("stride of scales", 33, "a multiple of 2, so that floats are aligned");
    let other = device.zeros(DType::U8, &[48 * 33]).unwrap();
    fails(want, (&codes, dense), Some((&other, odd)));
    let want = mismatch("byte offset of scales", 1, "a multiple of 2, so that floats are aligned");
    fails(want, (&codes, dense), Some((&other.slice(1..97).unwrap(), Strides::dense(2, 8, 2))));
    let elsewhere = Device::cpu_with_threads(1).unwrap().zeros(DType::U8, &[48 * bytes]).unwrap();
    let want =
        Error::WrongDevice { what: "scales", got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    fails(want, (&codes, dense), Some((&elsewhere, dense)));
    let f16 = RowFormat::new(Codec::F16, 16).unwrap();
    let none = shape("scales", scales.shape(), "none: dense floats have no scales");
    assert_eq!(pool(f16, (&codes, dense), Some((&scales, dense))).map(|_| ()), Err(none));
    let want = mismatch("stride of codes", 33, "a multiple of 2, so that floats are aligned");
    assert_eq!(pool(f16, (&codes, odd), None).map(|_| ()), Err(want));

    // Two pools may lie between each other, but no row within another.
    let twice = Strides { row: 2 * bytes, head: 16 * bytes, page: 32 * bytes };
    let memory = device.zeros(DType::U8, &[3 * 32 * bytes]).unwrap();
    let side = |at: usize| {
        let from = |at| memory.slice(at..memory.len()).unwrap();
        pool(row, (&from(at), twice), Some((&from(at + 32), twice))).unwrap()
    };
    let (key, value, shifted) = (side(0), side(bytes), side(2));
    assert!(!key.overlaps(&value) && key.overlaps(&shifted) && value.overlaps(&shifted) && key.overlaps(&key));
    let x = device.upload(&[1f32; 2 * D], &[1, 2, D]).unwrap();
    let batch = Batch::contiguous(&device, 8, 0, 1, 1).unwrap();
    let mut encoder = device.encoder().unwrap();
    quantize(&mut encoder, &[(&x, &key), (&x, &value)], &batch).unwrap();
    let aliased = Err(Error::Aliased { what: "pool" });
    assert_eq!(quantize(&mut encoder, &[(&x, &key), (&x, &shifted)], &batch), aliased);
    encoder.submit_and_wait().unwrap();
}

#[test]
fn strides_on_gpus() {
    for device in ["wgpu", "cuda"].into_iter().filter_map(device) {
        let (row, bytes) = (row(), row().bytes());
        let memory = device.zeros(DType::U8, &[48 * bytes]).unwrap();
        let strides = Strides::dense(2, 8, bytes);
        let apart = device.zeros(DType::F16, &[48]).unwrap();
        let beside = (&apart, Strides::dense(2, 8, 2));
        let what = format!("read a pool of {:?}, only one without gaps", (strides, beside.1));
        let want = Error::Unsupported { device: device.to_string(), what };
        assert_eq!(PagePool::strided(row, [3, 2, 8], (&memory, strides), Some(beside)).map(|_| ()), Err(want));
        let pool = PagePool::strided(row, [3, 2, 8], (&memory, Strides::dense(2, 8, 32)), Some(beside)).unwrap();
        assert_eq!((pool.codes().shape(), pool.scales().unwrap().shape()), (&[3, 2, 8, 32][..], &[3, 2, 8, 1][..]));
        // SAFETY: refused before it is looked at.
        let borrowed = unsafe { Buffer::from_host_ptr(&device, 64 as *mut u8, DType::F32, &[2], Box::new(())) };
        let what = "wrap memory of the host".to_owned();
        assert_eq!(borrowed.map(|_| ()), Err(Error::Unsupported { device: device.to_string(), what }));
    }
}

#[test]
fn borrowed_memory() {
    let device = Device::cpu();
    let mut own = [0f32; 8];
    let start = own.as_mut_ptr().cast::<u8>();
    // SAFETY: within `own`, which nobody else touches below.
    let borrow =
        |at: *mut u8, shape: &[usize]| unsafe { Buffer::from_host_ptr(&device, at, DType::F32, shape, Box::new(())) };
    let address = |got| mismatch("address of host memory", got, "not null and a multiple of 4");
    assert_eq!(borrow(std::ptr::null_mut(), &[2]).map(|_| ()), Err(address(0)));
    let odd = start.wrapping_add(2);
    assert_eq!(borrow(odd, &[2]).map(|_| ()), Err(address(odd.addr())));
    assert_eq!(borrow(start, &[usize::MAX, 2]).map(|_| ()), Err(overflow("buffer size", "isize")));

    // Two views of one memory that know nothing of each other.
    let (all, half) = (borrow(start, &[8]).unwrap(), borrow(start.wrapping_add(16), &[4]).unwrap());
    assert!(all.overlaps(&half) && !all.shares_memory(&half) && !all.slice(0..4).unwrap().overlaps(&half));
    let mut encoder = device.encoder().unwrap();
    assert_eq!(copy(&mut encoder, &all.slice(1..5).unwrap(), &half), Err(Error::Aliased { what: "to" }));
    all.slice(0..4).unwrap().write(&[1f32, 2.0, 3.0, 4.0]).unwrap();
    copy(&mut encoder, &all.slice(0..4).unwrap(), &half).unwrap();
    encoder.submit_and_wait().unwrap();
    drop((all, half));
    assert_eq!(own, [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
}

#[test]
fn batches() {
    let device = Device::cpu();
    let new = |page_size, spans: &[Span]| Batch::new(&device, page_size, spans).map(|_| ());
    let span = |first, len, new| Span { first, len, new, pages: &[0, 1] };
    let max = usize::MAX;
    assert_eq!(new(0, &[span(0, 1, 1)]), Err(zero("page_size")));
    assert_eq!(new(PAGE, &[]), Err(zero("sequences of a batch")));
    let too_large = |what, got, expected| Error::TooLarge { what, got, expected };
    assert_eq!(new(PAGE, &[span(0, 3, 4)]), Err(too_large("new positions of a sequence", 4, 3)));
    assert_eq!(new(PAGE, &[span(2, 3, 2)]), Err(too_large("new positions of a sequence", 2, 1)));
    assert_eq!(new(PAGE, &[span(0, 3, max)]), Err(too_large("new positions of a sequence", max, 3)));
    assert_eq!(new(PAGE, &[span(4, 3, 0)]), Err(too_large("first position of a sequence", 4, 3)));
    let positions = |start, end, first, len| Error::Positions { start, end, first, len };
    assert_eq!(new(PAGE, &[span(0, 17, 1)]), Err(positions(0, 17, 0, 16)));
    assert_eq!(new(PAGE, &[span(5, 22, 1)]), Err(positions(5, 22, 5, 21)));
    assert_eq!(new(PAGE, &[span(0, max, max)]), Err(positions(0, max, 0, 16)));
    // The second table is shorter than the first, so it is no ring.
    let short = Span { first: 3, len: 9, new: 0, pages: &[2] };
    assert_eq!(new(PAGE, &[span(0, 1, 1), short]), Err(positions(3, 9, 0, 8)));
    let none = Span { first: 0, len: 1, new: 1, pages: &[] };
    assert_eq!(new(PAGE, &[none]), Err(positions(0, 1, 0, 0)));

    let hole = |first, len| Span { first, len, new: 0, pages: &[0, NO_PAGE] };
    let no_page = Error::Page { got: NO_PAGE as usize, pages: NO_PAGE as usize };
    assert_eq!(new(PAGE, &[hole(0, 9)]), Err(no_page.clone()));
    assert_eq!(new(PAGE, &[hole(8, 10)]), Err(no_page));
    assert_eq!(new(PAGE, &[hole(0, 8), hole(9, 9), hole(16, 24)]), Ok(()));

    // Positions end where kernels can still count, slots at 2^32 - 1.
    let last = 0x7fff_0000;
    assert_eq!(new(PAGE, &[span(last - 2, last, 2)]), Ok(()));
    for len in [last + 1, u32::MAX as usize, max] {
        assert_eq!(new(PAGE, &[span(len - 2, len, 2)]), Err(too_large("length of a sequence", len, last)));
    }
    assert_eq!(new(max, &[span(0, 1, 1)]), Err(overflow("slots of a sequence", "isize")));
    assert_eq!(new(1 << 31, &[span(0, 1, 1)]), Err(overflow("slots of a sequence", "u32")));
    let half = 1 << 30;
    let spans: Vec<_> = (0..4).map(|_| span(0, half, half)).collect();
    assert_eq!(new(half, &spans), Err(overflow("tokens of a batch", "u32")));
    assert_eq!(Batch::contiguous(&device, 0, 0, 1, 1).map(|_| ()), Err(zero("page_size")));
    assert_eq!(Batch::contiguous(&device, max, 0, 1, 1).map(|_| ()), Err(overflow("slots of a sequence", "isize")));
}

#[test]
fn quantizing() {
    let s = Scene::new();
    let x = s.zeros(&[3, KV_HEADS, D]);
    let batch = s.plain(5, 3);
    s.fails(zero("parts"), |e| quantize(e, &[], &batch));
    for bad in [[2, KV_HEADS, D], [3, 1, D], [3, KV_HEADS, 32], [3, 0, D]] {
        let x = s.zeros(&bad);
        s.fails(shape("x", &bad, "[3, 2, 64]"), |e| quantize(e, &[(&x, &s.key)], &batch));
    }
    let codes = s.device.zeros(DType::U8, &[3, KV_HEADS, D]).unwrap();
    let want = Error::DType { what: "x", got: "u8", expected: "f32, f16 or bf16" };
    s.fails(want, |e| quantize(e, &[(&codes, &s.key)], &batch));

    let other = Device::cpu_with_threads(1).unwrap();
    let wrong = |what| Error::WrongDevice { what, got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    let far = other.zeros(DType::F32, &[3, KV_HEADS, D]).unwrap();
    s.fails(wrong("x"), |e| quantize(e, &[(&far, &s.key)], &batch));
    let far = PagePool::new(&other, row(), KV_HEADS, PAGE, PAGES).unwrap();
    s.fails(wrong("pool"), |e| quantize(e, &[(&x, &far)], &batch));
    let far = Batch::new(&other, PAGE, &[Span { first: 0, len: 3, new: 3, pages: &[0] }]).unwrap();
    s.fails(wrong("batch"), |e| quantize(e, &[(&x, &s.key)], &far));

    let wide = Batch::new(&s.device, 16, &[Span { first: 0, len: 3, new: 3, pages: &[0] }]).unwrap();
    let want = mismatch("page_size of the batch", 16, "8 as in the pool");
    s.fails(want, |e| quantize(e, &[(&x, &s.key)], &wide));
    for page in [PAGES as u32, u32::MAX - 1] {
        let past = s.batch(&[Span { first: 0, len: 3, new: 3, pages: &[page] }]).unwrap();
        s.fails(Error::Page { got: page as usize, pages: PAGES }, |e| quantize(e, &[(&x, &s.key)], &past));
    }

    // The same page in two sequences, and twice in one table.
    let aliased = Error::Aliased { what: "a page that is written from two places" };
    let span = |len, new| Span { first: 0, len, new, pages: &[1] };
    let two = s.batch(&[span(1, 1), span(3, 2)]).unwrap();
    s.fails(aliased.clone(), |e| quantize(e, &[(&x, &s.key)], &two));
    let twice = s.batch(&[Span { first: 0, len: 9, new: 3, pages: &[2, 2] }]).unwrap();
    s.fails(aliased, |e| quantize(e, &[(&x, &s.key)], &twice));

    // One pool twice, and an input that lies in a pool's scales.
    let aliased = Error::Aliased { what: "pool" };
    s.fails(aliased.clone(), |e| quantize(e, &[(&x, &s.key), (&x, &s.key)], &batch));
    let memory = s.device.zeros(DType::F16, &[32]).unwrap();
    let scales = memory.slice(0..2).unwrap().reshape(&[1, 1, 2, 1]).unwrap();
    let codes = s.device.zeros(DType::U8, &[1, 1, 2, 4]).unwrap();
    let pool = PagePool::from_buffers(RowFormat::new(Codec::tq(2), 16).unwrap(), &codes, Some(&scales)).unwrap();
    let x = memory.slice(1..17).unwrap().reshape(&[1, 1, 16]).unwrap();
    let one = Batch::contiguous(&s.device, 2, 0, 1, 1).unwrap();
    s.fails(aliased, |e| quantize(e, &[(&x, &pool)], &one));
    // Beside them it may lie.
    let x = memory.slice(16..32).unwrap().reshape(&[1, 1, 16]).unwrap();
    let mut encoder = s.device.encoder().unwrap();
    quantize(&mut encoder, &[(&x, &pool)], &one).unwrap();
    encoder.submit_and_wait().unwrap();
}

#[test]
fn dequantizing() {
    let s = Scene::new();
    let batch = s.batch(&[Span { first: 2, len: 12, new: 0, pages: &[0, 1] }]).unwrap();
    let out = s.zeros(&[1, KV_HEADS, D]);
    let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
    let at = |positions: Positions, out: &Buffer, want: Error| {
        s.fails(want, |e| dequantize(e, &s.key, &batch, 0, positions, domain, order, out));
    };
    let positions = |start, end| Error::Positions { start, end, first: 2, len: 12 };
    at(Positions::from(12), &out, positions(12, 13));
    at(Positions::from(1), &out, positions(1, 2));
    at(Positions::from(11..13), &out, positions(11, 13));
    at(Positions::from(0..usize::MAX), &out, positions(0, usize::MAX));
    at(Positions::List(vec![5, 12]), &out, positions(12, 13));
    at(Positions::List(vec![u32::MAX]), &out, positions(u32::MAX as usize, 1 << 32));
    at(Positions::from(3..5), &out, shape("out", &[1, 2, 64], "[2, 2, 64]"));
    let bytes = s.device.zeros(DType::U8, &[1, KV_HEADS, D]).unwrap();
    at(Positions::from(3), &bytes, Error::DType { what: "out", got: "u8", expected: "f32, f16 or bf16" });
    let far = Device::cpu_with_threads(1).unwrap().zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    let wrong = Error::WrongDevice { what: "out", got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    at(Positions::from(3), &far, wrong);
    s.fails(mismatch("sequence", 1, "less than the batch's 1"), |e| {
        dequantize(e, &s.key, &batch, 1, 3, domain, order, &out)
    });
    let head_major = s.zeros(&[2, KV_HEADS, D]);
    s.fails(shape("out", &[2, 2, 64], "[2, 3, 64]"), |e| {
        dequantize(e, &s.key, &batch, 0, 3..6, domain, RowOrder::HeadMajor, &head_major)
    });
    let past = s.batch(&[Span { first: 0, len: 3, new: 0, pages: &[7] }]).unwrap();
    s.fails(Error::Page { got: 7, pages: PAGES }, |e| dequantize(e, &s.key, &past, 0, 1, domain, order, &out));
    // Into its own scales.
    let scales = s.key.scales().unwrap().reshape(&[PAGES * KV_HEADS * PAGE]).unwrap();
    let small = PagePool::from_buffers(
        RowFormat::new(Codec::tq(2), 16).unwrap(),
        &s.device.zeros(DType::U8, &[1, 1, 2, 4]).unwrap(),
        Some(&scales.slice(0..2).unwrap().reshape(&[1, 1, 2, 1]).unwrap()),
    )
    .unwrap();
    let two = Batch::contiguous(&s.device, 2, 0, 2, 0).unwrap();
    let inside = scales.slice(1..17).unwrap().reshape(&[1, 1, 16]).unwrap();
    s.fails(Error::Aliased { what: "out" }, |e| dequantize(e, &small, &two, 0, 0, domain, order, &inside));
    assert!(out.read::<f32>().unwrap().iter().all(|&x| x == 0.0));
}

#[test]
fn attending() {
    let s = Scene::new();
    let (batch, params) = (s.plain(5, 3), AttentionParams::for_head_dim(D));
    let poison = |shape: &[usize]| upload(&s.device, DType::F32, &vec![f32::NAN; shape.iter().product()], shape);
    let (q, out, lse) = (s.zeros(&[3, HEADS, D]), poison(&[3, HEADS, D]), poison(&[3, HEADS]));
    let fails = |want, q: &Buffer, out: &Buffer, lse: Option<&Buffer>, params: &AttentionParams| {
        s.fails(want, |e| attention(e, q, &s.key, &s.value, &batch, params, out, lse));
    };
    let flat = q.reshape(&[3 * HEADS, D]).unwrap();
    fails(shape("q", &[12, 64], "[3, heads, 64]"), &flat, &out, None, &params);
    let two = s.zeros(&[2, HEADS, D]);
    fails(shape("q", &[2, 4, 64], "[3, 4, 64]"), &two, &out, None, &params);
    fails(shape("out", &[2, 4, 64], "[3, 4, 64]"), &q, &two, None, &params);
    let none = s.zeros(&[3, 0, D]);
    fails(zero("heads"), &none, &none, None, &params);
    let (three, three_out) = (s.zeros(&[3, 3, D]), s.zeros(&[3, 3, D]));
    fails(mismatch("heads", 3, "a multiple of kv_heads 2"), &three, &three_out, None, &params);
    let bytes = s.device.zeros(DType::U8, &[3, HEADS, D]).unwrap();
    let dtype = |what, got: DType, expected| Error::DType { what, got: got.name(), expected };
    fails(dtype("q", DType::U8, "f32, f16 or bf16"), &bytes, &out, None, &params);
    fails(dtype("out", DType::U8, "f32, f16 or bf16"), &q, &bytes, None, &params);
    let half = s.device.zeros(DType::F16, &[3, HEADS]).unwrap();
    fails(dtype("lse", DType::F16, "f32"), &q, &out, Some(&half), &params);
    fails(shape("lse", &[2, 4, 64], "[3, 4]"), &q, &out, Some(&two), &params);
    fails(Error::Aliased { what: "out" }, &q, &q, None, &params);
    let within = q.reshape(&[3 * HEADS * D]).unwrap().slice(0..3 * HEADS).unwrap().reshape(&[3, HEADS]).unwrap();
    fails(Error::Aliased { what: "lse" }, &q, &out, Some(&within), &params);
    let far = Device::cpu_with_threads(1).unwrap();
    let wrong = |what| Error::WrongDevice { what, got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    let far_q = far.zeros(DType::F32, &[3, HEADS, D]).unwrap();
    fails(wrong("q"), &far_q, &out, None, &params);
    fails(wrong("out"), &q, &far_q, None, &params);
    fails(wrong("lse"), &q, &out, Some(&far.zeros(DType::F32, &[3, HEADS]).unwrap()), &params);
    let with = |change: fn(&mut AttentionParams)| {
        let mut params = params.clone();
        change(&mut params);
        params
    };
    let parameter = |name, got, expected| Error::Parameter { name, got, expected };
    let bad = with(|p| p.scale = f32::INFINITY);
    fails(parameter("scale", f32::INFINITY, "finite"), &q, &out, None, &bad);
    for cap in [0.0, -1.0, f32::INFINITY] {
        let bad = AttentionParams { softcap: Some(cap), ..params.clone() };
        fails(parameter("softcap", cap, "finite and positive"), &q, &out, None, &bad);
    }
    fails(zero("window"), &q, &out, None, &with(|p| p.window = Some(0)));
    let sinks = |buffer: Buffer| AttentionParams { sink_logits: Some(buffer), ..params.clone() };
    fails(shape("sink_logits", &[3], "[4]"), &q, &out, None, &sinks(s.zeros(&[3])));
    let halves = s.device.zeros(DType::F16, &[HEADS]).unwrap();
    fails(dtype("sink_logits", DType::F16, "f32"), &q, &out, None, &sinks(halves));
    fails(wrong("sink_logits"), &q, &out, None, &sinks(far.zeros(DType::F32, &[HEADS]).unwrap()));
    let of_out = out.reshape(&[3 * HEADS * D]).unwrap().slice(0..HEADS).unwrap();
    fails(Error::Aliased { what: "out" }, &q, &out, None, &sinks(of_out));

    let pool = |codec, d, kv_heads| {
        PagePool::new(&s.device, RowFormat::new(codec, d).unwrap(), kv_heads, PAGE, PAGES).unwrap()
    };
    let value = |want, value: &PagePool| {
        s.fails(want, |e| attention(e, &q, &s.key, value, &batch, &params, &out, None));
    };
    value(mismatch("head_dim of the values", 128, "64 as in the keys"), &pool(Codec::tq(4), 128, KV_HEADS));
    value(mismatch("kv_heads of the values", 1, "2 as in the keys"), &pool(Codec::tq(4), D, 1));
    let few = PagePool::new(&s.device, row(), KV_HEADS, PAGE, 1).unwrap();
    let both = s.batch(&[Span { first: 0, len: 10, new: 3, pages: &[0, 1] }]).unwrap();
    s.fails(Error::Page { got: 1, pages: 1 }, |e| attention(e, &q, &few, &s.value, &both, &params, &out, None));
    assert!(out.read::<f32>().unwrap().iter().chain(&lse.read::<f32>().unwrap()).all(|x| x.is_nan()));
}

#[test]
fn rotating_merging_copying() {
    let s = Scene::new();
    let x = s.zeros(&[2, D]);
    let go = |row: &RowFormat, x: &Buffer, out: &Buffer, want| {
        s.fails(want, |e| rotate(e, row, Direction::Forward, x, out));
    };
    let wide = RowFormat::new(Codec::tq(4), 80).unwrap();
    go(&wide, &x, &x, shape("x", &[2, 64], "[..., 80]"));
    go(&row(), &x, &s.zeros(&[3, D]), shape("out", &[3, 64], "[2, 64]"));
    let u32s = s.device.zeros(DType::U32, &[2, D]).unwrap();
    go(&row(), &u32s, &x, Error::DType { what: "x", got: "u32", expected: "f32, f16 or bf16" });
    let three = s.zeros(&[3, D]);
    let overlapping = Error::Aliased { what: "out" };
    go(&row(), &three.slice(0..2).unwrap(), &three.slice(1..3).unwrap(), overlapping);

    let (o, l) = (s.zeros(&[2, HEADS, D]), s.zeros(&[2, HEADS]));
    let out = s.zeros(&[2, HEADS, D]);
    s.fails(zero("parts"), |e| merge(e, &[], &out, None));
    s.fails(shape("out", &[2, 64], "[tokens, heads, head_dim]"), |e| merge(e, &[(&o, &l)], &x, None));
    s.fails(shape("part", &[2, 64], "[2, 4, 64]"), |e| merge(e, &[(&x, &l)], &out, None));
    s.fails(shape("lse of a part", &[2, 64], "[2, 4]"), |e| merge(e, &[(&o, &x)], &out, None));
    s.fails(Error::Aliased { what: "out" }, |e| merge(e, &[(&out, &l)], &out, None));
    s.fails(Error::Aliased { what: "lse" }, |e| merge(e, &[(&o, &l)], &out, Some(&l)));
    let half = s.device.zeros(DType::F16, &[2, HEADS]).unwrap();
    let want = Error::DType { what: "lse of a part", got: "f16", expected: "f32" };
    s.fails(want, |e| merge(e, &[(&o, &half)], &out, None));

    s.fails(shape("to", &[3, 64], "[2, 64]"), |e| copy(e, &x, &three));
    let want = Error::DType { what: "to", got: "u32", expected: "the type that is copied" };
    s.fails(want, |e| copy(e, &x, &u32s));
    s.fails(Error::Aliased { what: "to" }, |e| copy(e, &three.slice(0..2).unwrap(), &three.slice(1..3).unwrap()));
    let bytes = s.device.zeros(DType::U8, &[16]).unwrap();
    let (a, b) = (bytes.slice(1..5).unwrap(), bytes.slice(8..12).unwrap());
    s.fails(mismatch("offset of from", 1, "a multiple of 4"), |e| copy(e, &a, &b));
    s.fails(mismatch("offset of to", 1, "a multiple of 4"), |e| copy(e, &b, &a));
    let three = bytes.slice(0..3).unwrap();
    s.fails(mismatch("bytes copied", 3, "a multiple of 4"), |e| copy(e, &three, &bytes.slice(4..7).unwrap()));
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

/// What is not finite is stored as code 0 and scale NaN, decodes to NaN, and spoils attention that sees it, but no other.
#[test]
fn numbers_that_are_not_finite() {
    let device = Device::cpu();
    for codec in (2..=8).map(Codec::tq).chain([2, 3, 4, 5, 6, 8].map(Codec::seed)) {
        for d in [64, 256, 512] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
                let row = RowFormat::new(codec, d).unwrap();
                let mut x = Rng(9).normals(3 * d);
                x[d + 5] = bad;
                let pool = PagePool::new(&device, row, 1, 3, 1).unwrap();
                let batch = Batch::contiguous(&device, 3, 0, 3, 3).unwrap();
                let input = device.upload(&x, &[3, 1, d]).unwrap();
                let out = device.zeros(DType::F32, &[3, 1, d]).unwrap();
                let (q, attended) = (device.upload(&x[..d], &[1, 1, d]).unwrap(), device.zeros(DType::F32, &[1, 1, d]));
                let attended = attended.unwrap();
                let params = AttentionParams::for_head_dim(d);
                let newest = Batch::contiguous(&device, 3, 0, 3, 1).unwrap();
                run(&device, |e| {
                    quantize(e, &[(&input, &pool)], &batch)?;
                    dequantize(e, &pool, &batch, 0, 0..3, Domain::Original, RowOrder::TokenMajor, &out)?;
                    attention(e, &q, &pool, &pool, &newest, &params, &attended, None)
                });
                let codes = pool.codes().read::<u8>().unwrap();
                assert!(codes[row.row_bytes()..2 * row.row_bytes()].iter().all(|&c| c == 0), "{codec} {d} {bad}");
                let scales = download(pool.scales().unwrap());
                let n = row.scales_per_row();
                assert!(scales[n..2 * n].iter().all(|s| s.is_nan()));
                assert!(scales[..n].iter().chain(&scales[2 * n..]).all(|s| s.is_finite()));
                let out = out.read::<f32>().unwrap();
                assert!(out[d..2 * d].iter().all(|x| x.is_nan()), "{codec} {d} {bad}");
                assert!(out[..d].iter().chain(&out[2 * d..]).all(|x| x.is_finite()));
                assert!(attended.read::<f32>().unwrap().iter().all(|x| x.is_nan()), "{codec} {d} {bad}");
                // A window that does not reach it is not touched by it.
                let window = AttentionParams { window: Some(1), ..params };
                run(&device, |e| attention(e, &q, &pool, &pool, &newest, &window, &attended, None));
                assert!(attended.read::<f32>().unwrap().iter().all(|x| x.is_finite()));
            }
        }
    }
}

#[test]
fn configurations() {
    let ok = || CacheConfig::new(2, KV_HEADS, D);
    assert_eq!(CacheConfig::new(0, 2, D).bytes(), Err(zero("layers")));
    assert_eq!(CacheConfig::new(2, 0, D).bytes(), Err(zero("kv_heads")));
    assert_eq!(ok().page_size(0).bytes(), Err(zero("page_size")));
    assert_eq!(ok().capacity(0).bytes(), Err(zero("capacity")));
    assert_eq!(ok().window_capacity(0).bytes(), Err(zero("window_capacity")));
    assert_eq!(ok().kind_at(1, LayerKind::Window(0)).bytes(), Err(zero("window")));
    assert_eq!(ok().page_size(12).bytes(), Err(mismatch("page_size", 12, "a multiple of 8")));
    let sinks = |positions, codec| Sinks { positions, codec: CodecPair::both(codec) };
    assert_eq!(ok().sinks(sinks(4, Codec::F16)).sink_sequences(0).bytes(), Err(zero("sink_sequences")));
    let want = Error::Bits { codec: "native", got: 9, expected: "2 to 8" };
    assert_eq!(ok().sinks_at(1, sinks(4, Codec::tq(9))).bytes(), Err(want));
    let layer = Error::Layer { got: 2, layers: 2 };
    assert_eq!(ok().sinks_at(2, sinks(4, Codec::F16)).bytes(), Err(layer.clone()));
    assert_eq!(ok().codec_at(2, CodecPair::both(Codec::F16)).bytes(), Err(layer.clone()));
    assert_eq!(ok().kind_at(2, LayerKind::Full).bytes(), Err(layer));
    for source in [1, 2, usize::MAX] {
        let want = mismatch("shared layer", source, "a layer before 1 that holds positions of its own");
        assert_eq!(ok().kind_at(1, LayerKind::Shared(source)).bytes(), Err(want));
    }
    for got in [0, 1025, 100_000] {
        let want = Error::HeadDim { codec: "tq4".into(), got, expected: "1 to 1024" };
        assert_eq!(CacheConfig::new(2, 2, got).bytes(), Err(want));
    }
    for got in [1, 9] {
        let want = Error::Bits { codec: "native", got, expected: "2 to 8" };
        assert_eq!(ok().key(Codec::tq(got)).bytes(), Err(want.clone()));
        assert_eq!(ok().value(Codec::tq(got)).bytes(), Err(want.clone()));
        assert_eq!(ok().codec_at(1, CodecPair::both(Codec::tq(got))).bytes(), Err(want));
    }
    let max = usize::MAX;
    let large = [
        CacheConfig::new(max, 2, D),
        CacheConfig::new(2, max, D),
        ok().page_size(max - 7),
        ok().page_size(max - 7).sinks(sinks(max, Codec::F16)),
        CacheConfig::new(max, max, D).capacity(max).page_size(max - 7),
        CacheConfig::new(1 << 40, 1 << 10, D),
    ];
    for config in large {
        assert_eq!(config.bytes(), Err(overflow("cache size", "isize")), "{config:?}");
        assert_eq!(KvCache::new(&Device::cpu(), config).map(|_| ()), Err(overflow("cache size", "isize")));
    }
    assert_eq!(ok().capacity(max).bytes(), Err(overflow("pages", "u32")));
    assert_eq!(ok().sinks(sinks(max, Codec::F16)).bytes(), Err(overflow("pages", "u32")));
    assert_eq!(ok().sinks(sinks(2, Codec::F16)).sink_sequences(max).bytes(), Err(overflow("pages", "u32")));
    let page = ok().page_size(1 << 27).capacity(1 << 27);
    assert_eq!(page.bytes(), Err(overflow("bytes of a page", "u32")));
    assert_eq!(ok().capacity(1 << 32).bytes(), Err(overflow("rows of a pool", "u32")));
}

#[test]
fn caches() {
    let s = Scene::new();
    let config = CacheConfig::new(3, KV_HEADS, D)
        .page_size(PAGE)
        .capacity(4 * PAGE)
        .kind_at(1, LayerKind::Window(4))
        .kind_at(2, LayerKind::Shared(0));
    let mut cache = KvCache::new(&s.device, config).unwrap();
    let (a, gone) = (cache.add_sequence(), cache.add_sequence());
    cache.free_sequence(gone).unwrap();
    let x = s.zeros(&[3, KV_HEADS, D]);
    let (q, out) = (s.zeros(&[3, HEADS, D]), s.zeros(&[3, HEADS, D]));
    let params = AttentionParams::for_head_dim(D);
    let unknown = || Error::UnknownSequence { got: 1 };
    let repeated = || Error::RepeatedSequence { got: 0 };
    let layer = || Error::Layer { got: 3, layers: 3 };

    // Nothing that fails may change what is held.
    let append = |cache: &mut KvCache, layer, tokens: &[_], x: &Buffer, want| {
        let (free, bytes) = (cache.free_pages(), cache.usage().used);
        s.fails(want, |e| cache.append(e, layer, tokens, x, x));
        assert_eq!((cache.free_pages(), cache.usage().used), (free, bytes));
        assert_eq!(cache.len(a), Ok(0));
    };
    append(&mut cache, 3, &[(a, 3)], &x, layer());
    append(&mut cache, 2, &[(a, 3)], &x, Error::SharedLayer { layer: 2, source_layer: 0 });
    append(&mut cache, 0, &[(gone, 3)], &x, unknown());
    append(&mut cache, 0, &[(a, 1), (a, 2)], &x, repeated());
    append(&mut cache, 0, &[], &x, zero("sequences of a batch"));
    append(&mut cache, 0, &[(a, 2)], &x, shape("x", &[3, 2, 64], "[2, 2, 64]"));
    append(&mut cache, 0, &[(a, 33)], &x, Error::OutOfPages { needed: 5, free: 4, pages: 4 });
    let needed = (1usize << 32).div_ceil(PAGE);
    append(&mut cache, 0, &[(a, u32::MAX as usize)], &x, Error::OutOfPages { needed, free: 4, pages: 4 });
    append(&mut cache, 0, &[(a, usize::MAX)], &x, overflow("length of a sequence", "u32"));

    let positions = |start, end, first, len| Error::Positions { start, end, first, len };
    let attend = |cache: &mut KvCache, layer, queries: &[_], want| {
        s.fails(want, |e| cache.attend(e, layer, queries, &q, &out, None, &params));
    };
    attend(&mut cache, 0, &[(a, 3)], positions(0, 3, 0, 0));
    attend(&mut cache, 3, &[(a, 3)], layer());
    attend(&mut cache, 0, &[(gone, 3)], unknown());
    attend(&mut cache, 0, &[(a, 1), (a, 2)], repeated());
    attend(&mut cache, 0, &[(a, usize::MAX)], positions(0, usize::MAX, 0, 0));

    run(&s.device, |e| cache.append(e, 0, &[(a, 3)], &x, &x));
    let uneven = || Error::UnevenLayers { sequence: 0, layer: 1, got: 0, expected: 3 };
    assert_eq!(cache.len(a), Err(uneven()));
    assert_eq!(cache.fork(a), Err(uneven()));
    assert_eq!(cache.truncate(a, 2), Err(positions(0, 2, 0, 0)));
    run(&s.device, |e| cache.append(e, 1, &[(a, 3)], &x, &x));
    assert_eq!(cache.len(a), Ok(3));
    assert_eq!(cache.truncate(a, 4), Err(positions(0, 4, 0, 3)));
    for len in [usize::MAX, usize::MAX - 1] {
        assert_eq!(cache.truncate(a, len), Err(positions(0, len, 0, 3)));
    }
    let one = s.zeros(&[1, KV_HEADS, D]);
    let decode = |cache: &mut KvCache, layer, id, at: Positions, want| {
        let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
        s.fails(want, |e| cache.dequantize(e, layer, Side::Value, id, at, domain, order, &one));
    };
    decode(&mut cache, 0, a, 3.into(), positions(3, 4, 0, 3));
    decode(&mut cache, 3, a, 0.into(), layer());
    decode(&mut cache, 0, gone, 0.into(), unknown());
    decode(&mut cache, 0, a, (0..2).into(), shape("out", &[1, 2, 64], "[2, 2, 64]"));
    let empty = cache.add_sequence();
    decode(&mut cache, 0, empty, 0.into(), positions(0, 1, 0, 0));
    assert_eq!(cache.pool(3, Side::Key).map(|_| ()), Err(layer()));
    assert_eq!(cache.free_sequence(gone), Err(unknown()));
    assert_eq!(cache.truncate(gone, 0), Err(unknown()));
    assert_eq!(cache.fork(gone), Err(unknown()));
    assert_eq!(cache.len(gone), Err(unknown()));
    assert_eq!(cache.len(a), Ok(3));
}

#[test]
fn sinks() {
    let s = Scene::new();
    let sinks = |codec| Sinks { positions: 4, codec: CodecPair::both(codec) };
    let config = CacheConfig::new(2, KV_HEADS, D).page_size(PAGE).capacity(4 * PAGE).sinks(sinks(Codec::F16));
    let mut cache = KvCache::new(&s.device, config.sinks_at(1, sinks(Codec::tq(8)))).unwrap();
    let a = cache.add_sequence();
    let x = s.zeros(&[6, KV_HEADS, D]);
    run(&s.device, |e| (0..2).try_for_each(|layer| cache.append(e, layer, &[(a, 6)], &x, &x)));
    let (q, out, lse) = (s.zeros(&[6, HEADS, D]), s.zeros(&[6, HEADS, D]), s.zeros(&[6, HEADS]));
    let params = AttentionParams::for_head_dim(D);
    let mut attend = |layer, q: &Buffer, out: &Buffer, lse: &Buffer, params: &AttentionParams, want| {
        s.fails(want, |e| cache.attend(e, layer, &[(a, 6)], q, out, Some(lse), params));
    };
    // Sinks and the rest in different bases, where the caller has rotated.
    let rotated = AttentionParams { domain: Domain::Rotated, ..params.clone() };
    let want = Error::RotatedSinks { layer: 0, got: "f16".into(), expected: "tq4".into() };
    attend(0, &q, &out, &lse, &rotated, want);
    // Queries among the sinks that would see beyond them.
    let open = AttentionParams { causal: false, ..params.clone() };
    attend(0, &q, &out, &lse, &open, Error::Positions { start: 0, end: 6, first: 4, len: 6 });
    attend(0, &s.zeros(&[5, HEADS, D]), &out, &lse, &params, shape("q", &[5, 4, 64], "[6, 4, 64]"));
    attend(0, &s.zeros(&[6, D]), &out, &lse, &params, shape("q", &[6, 64], "[6, heads, 64]"));
    attend(0, &q, &s.zeros(&[6, HEADS, 32]), &lse, &params, shape("out", &[6, 4, 32], "[6, 4, 64]"));
    attend(0, &q, &out, &s.zeros(&[6]), &params, shape("lse", &[6], "[6, 4]"));
    attend(0, &q, &q, &lse, &params, Error::Aliased { what: "out" });
    let whole = s.zeros(&[7, HEADS, D]);
    let (view, inside) = (whole.slice(0..6).unwrap(), whole.slice(5..6).unwrap().reshape(&[256]).unwrap());
    let inside = inside.slice(0..24).unwrap().reshape(&[6, HEADS]).unwrap();
    attend(0, &q, &view, &inside, &params, Error::Aliased { what: "lse" });
    let zero_window = AttentionParams { window: Some(0), ..params.clone() };
    attend(0, &q, &out, &lse, &zero_window, zero("window"));
    s.fails(zero("sequences of a batch"), |e| cache.attend(e, 0, &[], &q, &out, None, &params));
    // In one basis all is well.
    run(&s.device, |e| cache.attend(e, 1, &[(a, 6)], &q, &out, Some(&lse), &rotated));
    let mut decode = |at: Positions, want| {
        let one = s.zeros(&[1, KV_HEADS, D]);
        let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
        s.fails(want, |e| cache.dequantize(e, 0, Side::Value, a, at, domain, order, &one));
    };
    decode((3..5).into(), Error::Positions { start: 3, end: 5, first: 4, len: 6 });
    decode(Positions::List(vec![4, 3]), Error::Positions { start: 3, end: 4, first: 4, len: 6 });
    decode(6.into(), Error::Positions { start: 6, end: 7, first: 4, len: 6 });
}
