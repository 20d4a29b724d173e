//! What an engine does around the library: its own stream, its own memory, CUDA graphs; and what goes wrong on a GPU.

use super::driver::Context;
use crate::cache::{CacheConfig, KvCache};
use crate::compute::{Buffer, DType, Device, KernelSource};
use crate::error::{Error, Result};
use crate::format::{Codec, RowFormat};
use crate::ops::{
    AttentionParams, Batch, Direction, Domain, PagePool, Positions, RowOrder, Span, attention, dequantize, merge,
    quantize, rotate,
};
use cudarc::driver::{result, sys};
use std::process::Command;
use std::sync::Arc;

/// A GPU, unless there is none and none is required.
fn gpu() -> Option<Arc<Context>> {
    match Context::get(0) {
        Ok(context) => Some(context),
        Err(e) => {
            let required = std::env::var("TQKV_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|r| r == "cuda"), "TQKV_REQUIRE names cuda: {e}");
            eprintln!("SKIPPED: {e}");
            None
        }
    }
}

fn numbers(n: usize) -> Vec<f32> {
    (0..n).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 250.0 - 2.0).collect()
}

/// Attention of two sequences whose cache is filled first.
struct Step {
    q: Buffer,
    key: PagePool,
    value: PagePool,
    x: Buffer,
    batch: Batch,
    out: Buffer,
}

impl Step {
    fn new(device: &Device) -> Result<Self> {
        let (row, heads, kv_heads, page, pages) = (RowFormat::new(Codec::tq(4), 128)?, 8, 2, 64, [[0u32, 3], [2, 1]]);
        let span = |pages| Span { first: 0, len: 100, new: 1, pages };
        let halves: Vec<half::f16> = numbers(2 * heads * 128).into_iter().map(half::f16::from_f32).collect();
        let step = Step {
            q: device.upload(&halves, &[2, heads, 128])?,
            key: PagePool::new(device, row, kv_heads, page, 4)?,
            value: PagePool::new(device, row, kv_heads, page, 4)?,
            x: device.upload(&numbers(2 * kv_heads * 128), &[2, kv_heads, 128])?,
            batch: Batch::new(device, page, &[span(&pages[0]), span(&pages[1])])?,
            out: device.zeros(DType::F16, &[2, heads, 128])?,
        };
        let old = Batch::new(device, page, &[0, 1].map(|i| Span { first: 0, len: 100, new: 100, pages: &pages[i] }))?;
        let x = device.upload(&numbers(200 * kv_heads * 128), &[200, kv_heads, 128])?;
        let mut encoder = device.encoder()?;
        quantize(&mut encoder, &[(&x, &step.key), (&x, &step.value)], &old)?;
        encoder.submit_and_wait()?;
        Ok(step)
    }

    /// Hands a step of decoding to the device: one token appended to each sequence, one query each.
    fn submit(&self) -> Result<()> {
        let mut encoder = self.x.device().encoder()?;
        quantize(&mut encoder, &[(&self.x, &self.key), (&self.x, &self.value)], &self.batch)?;
        let params = AttentionParams::for_head_dim(128);
        attention(&mut encoder, &self.q, &self.key, &self.value, &self.batch, &params, &self.out, None)?;
        drop(encoder.submit()?);
        Ok(())
    }

    fn result(&self) -> Result<Vec<half::f16>> {
        self.out.read()
    }
}

#[test]
fn a_step_is_captured_in_a_graph_on_the_callers_stream() {
    let Some(_context) = gpu() else { return };
    let own = Device::open("cuda").unwrap();
    let expected = Step::new(&own).unwrap();
    expected.submit().unwrap();

    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    // SAFETY: the stream is of the primary context, which `own` has entered, and is destroyed last.
    let device = unsafe { Device::cuda_on_stream(0, stream.cast()) }.unwrap();
    let step = Step::new(&device).unwrap();
    step.submit().unwrap();
    assert_eq!(step.result().unwrap(), expected.result().unwrap());

    // SAFETY: the calls go by the driver's documentation; what the graph uses lives until it is destroyed.
    unsafe {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        result::stream::begin_capture(stream, mode).unwrap();
        step.submit().unwrap();
        let graph = result::stream::end_capture(stream).unwrap();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let run = result::graph::instantiate(graph, flags).unwrap();
        for factor in [1.0, -0.5] {
            let q: Vec<_> = numbers(2 * 8 * 128).iter().map(|q| half::f16::from_f32(q * factor)).collect();
            let x: Vec<_> = numbers(2 * 2 * 128).iter().map(|x| x * factor).collect();
            for step in [&expected, &step] {
                step.q.write(&q).unwrap();
                step.x.write(&x).unwrap();
                step.out.write(&vec![half::f16::NAN; 2 * 8 * 128]).unwrap();
            }
            expected.submit().unwrap();
            result::graph::launch(run, stream).unwrap();
            result::graph::launch(run, stream).unwrap();
            assert_eq!(step.result().unwrap(), expected.result().unwrap(), "{factor}");
        }
        result::graph::exec_destroy(run).unwrap();
        result::graph::destroy(graph).unwrap();
    }
    drop((step, device));
    // SAFETY: nothing uses it any more.
    unsafe { result::stream::destroy(stream) }.unwrap();
}

#[test]
fn a_graph_of_the_caller_goes_on_with_an_updated_batch() {
    let Some(_context) = gpu() else { return };
    let own = Device::open("cuda").unwrap();
    let mut anew = Step::new(&own).unwrap();
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    // SAFETY: the stream is of the primary context, which `own` has entered, and is destroyed last.
    let device = unsafe { Device::cuda_on_stream(0, stream.cast()) }.unwrap();
    let mut step = Step::new(&device).unwrap();
    anew.submit().unwrap();
    step.submit().unwrap();
    // SAFETY: the calls go by the driver's documentation; what the graph uses lives until it is destroyed.
    unsafe {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        result::stream::begin_capture(stream, mode).unwrap();
        step.submit().unwrap();
        let graph = result::stream::end_capture(stream).unwrap();
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        let run = result::graph::instantiate(graph, flags).unwrap();
        for (i, lens) in [[101, 100], [128, 90], [65, 1], [3, 128]].into_iter().enumerate() {
            let pages = [[0u32, 3], [2, 1]];
            let spans = [0, 1].map(|i| Span { first: 0, len: lens[i], new: 1, pages: &pages[i] });
            anew.batch = Batch::new(&own, 64, &spans).unwrap();
            step.batch.update(&spans).unwrap();
            let x: Vec<_> = numbers(2 * 2 * 128).iter().map(|x| x * i as f32).collect();
            [&anew, &step].into_iter().for_each(|step| step.x.write(&x).unwrap());
            anew.submit().unwrap();
            result::graph::launch(run, stream).unwrap();
            assert!(step.result().unwrap() == anew.result().unwrap(), "{lens:?}");
        }
        result::graph::exec_destroy(run).unwrap();
        result::graph::destroy(graph).unwrap();
    }
    drop((step, device));
    // SAFETY: nothing uses it any more.
    unsafe { result::stream::destroy(stream) }.unwrap();
}

/// A cache's steps in a graph of the caller's, captured on another stream than the device works on.
#[test]
fn a_graph_of_the_caller_goes_on_with_a_captured_step() {
    const LAYERS: usize = 2;
    let Some(_context) = gpu() else { return };
    let own = Device::open("cuda").unwrap();
    let create = || result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    let (stream, aside) = (create(), create());
    // SAFETY: the streams are of the primary context, which `own` has entered, and are destroyed last.
    let device = unsafe { Device::cuda_on_stream(0, stream.cast()) }.unwrap();
    // SAFETY: as above, and no other thread uses the device.
    let go_to = |stream: sys::CUstream| unsafe { device.move_to_cuda_stream(stream.cast()) }.unwrap();
    let config = || CacheConfig::new(LAYERS, 2, 128).page_size(16).capacity(1024);
    let (mut cache, mut anew) = (KvCache::new(&device, config()).unwrap(), KvCache::new(&own, config()).unwrap());
    let (mut a, b) = (cache.add_sequence(), anew.add_sequence());
    let buffers = |device: &Device| {
        let zeros = |heads| device.zeros(DType::F16, &[1, heads, 128]).unwrap();
        [zeros(2), zeros(8), zeros(8)]
    };
    let (mine, theirs) = (buffers(&device), buffers(&own));
    let record = |step: &mut crate::cache::Step, [kv, q, out]: &[Buffer; 3]| {
        let (mut encoder, params) = (step.device().encoder().unwrap(), AttentionParams::for_head_dim(128));
        for layer in 0..LAYERS {
            step.append_and_attend(&mut encoder, layer, kv, kv, q, out, None, &params).unwrap();
        }
        drop(encoder.submit().unwrap());
    };
    let mut captured: Option<(crate::cache::CapturedStep, sys::CUgraph, sys::CUgraphExec)> = None;
    let mut launched = 0;
    for i in 0..100 {
        for [kv, q, _] in [&mine, &theirs] {
            let halves = |n: usize| numbers(n + i)[i..].iter().map(|&x| half::f16::from_f32(x)).collect::<Vec<_>>();
            kv.write(&halves(2 * 128)).unwrap();
            q.write(&halves(8 * 128)).unwrap();
        }
        let mut step = anew.step(&[(b, 1)]).unwrap();
        record(&mut step, &theirs);
        step.commit().unwrap();
        let mut step = cache.step(&[(a, 1)]).unwrap();
        let resumed = captured.as_ref().is_some_and(|(captured, ..)| step.resume(captured).unwrap());
        // SAFETY: the calls go by the driver's documentation; what the graph uses lives until it is destroyed.
        unsafe {
            if !resumed {
                record(&mut step, &mine);
                go_to(aside);
                let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
                result::stream::begin_capture(aside, mode).unwrap();
                record(&mut step, &mine);
                let graph = result::stream::end_capture(aside).unwrap();
                go_to(stream);
                let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
                let run = result::graph::instantiate(graph, flags).unwrap();
                if let Some((_, graph, run)) = captured.replace((step.captured().unwrap(), graph, run)) {
                    result::graph::exec_destroy(run).unwrap();
                    result::graph::destroy(graph).unwrap();
                }
            } else if let Some((.., run)) = captured {
                result::graph::launch(run, stream).unwrap();
                launched += 1;
            }
        }
        step.commit().unwrap();
        assert!(mine[2].read::<half::f16>().unwrap() == theirs[2].read::<half::f16>().unwrap(), "{i}");
        // A page that is written next is shared: it is copied before the graph.
        if i == 40 {
            let twin = cache.fork(a).unwrap();
            cache.free_sequence(std::mem::replace(&mut a, twin)).unwrap();
            let _kept = cache.fork(a).unwrap();
        }
    }
    assert!(launched > 80, "{launched}");
    if let Some((_, graph, run)) = captured.take() {
        // SAFETY: the stream is done with both: results were read.
        unsafe { result::graph::exec_destroy(run).and_then(|()| result::graph::destroy(graph)) }.unwrap();
    }
    drop((cache, mine, device));
    // SAFETY: nothing uses them any more.
    unsafe { result::stream::destroy(stream).and_then(|()| result::stream::destroy(aside)) }.unwrap();
}

/// A graph would copy from the host's memory at each launch, when nothing of it is left.
#[test]
fn what_a_graph_cannot_repeat_is_refused() {
    let Some(_context) = gpu() else { return };
    let _own = Device::open("cuda").unwrap();
    let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
    // SAFETY: the stream is of the primary context, which `_own` has entered, and is destroyed last.
    let device = unsafe { Device::cuda_on_stream(0, stream.cast()) }.unwrap();
    let step = Step::new(&device).unwrap();
    step.submit().unwrap();
    let expected = step.result().unwrap();
    let lse = device.zeros(DType::F32, &[2, 8]).unwrap();
    let (part, decoded) = (device.zeros(DType::F16, &[2, 8, 128]), device.zeros(DType::F32, &[2, 2, 128]));
    let (part, decoded) = (part.unwrap(), decoded.unwrap());
    let refused = |result: Result<()>| assert!(matches!(result, Err(Error::Unsupported { .. })), "{result:?}");
    let mut encoder = device.encoder().unwrap();
    // SAFETY: the calls go by the driver's documentation.
    unsafe {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        result::stream::begin_capture(stream, mode).unwrap();
        let list = Positions::List(vec![3, 1]);
        let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
        refused(merge(&mut encoder, &[(&part, &lse); 9], &step.out, None));
        refused(dequantize(&mut encoder, &step.key, &step.batch, 0, list, domain, order, &decoded));
        refused(step.x.write(&numbers(2 * 2 * 128)));
        refused(device.zeros(DType::U8, &[16]).map(drop));
        let pages = [[0u32, 3], [2, 1]];
        let spans = [0, 1].map(|i| Span { first: 0, len: 101, new: 1, pages: &pages[i] });
        refused(step.batch.clone().update(&spans));
        // All else goes on.
        step.submit().unwrap();
        let graph = result::stream::end_capture(stream).unwrap();
        result::graph::destroy(graph).unwrap();
    }
    drop(encoder);
    assert_eq!(step.result().unwrap(), expected);
    step.x.write(&numbers(2 * 2 * 128)).unwrap();
    drop((step, lse, part, decoded, device));
    // SAFETY: nothing uses it any more.
    unsafe { result::stream::destroy(stream) }.unwrap();
}

#[test]
fn timed_work_is_the_same_work() {
    let Some(_context) = gpu() else { return };
    let own = Device::open("cuda").unwrap();
    // SAFETY: the legacy stream is always there.
    let legacy = unsafe { Device::cuda_on_stream(0, std::ptr::null_mut()) }.unwrap();
    let expected = Step::new(&own).unwrap();
    expected.submit().unwrap();
    for device in [&own, &legacy] {
        let step = Step::new(device).unwrap();
        step.submit().unwrap();
        step.out.write(&vec![half::f16::NAN; 2 * 8 * 128]).unwrap();
        let mut encoder = device.encoder().unwrap();
        let params = AttentionParams::for_head_dim(128);
        attention(&mut encoder, &step.q, &step.key, &step.value, &step.batch, &params, &step.out, None).unwrap();
        let time = encoder.submit_and_time().unwrap();
        assert_eq!(step.result().unwrap(), expected.result().unwrap());
        assert!(!time.is_zero());
    }
}

#[test]
fn memory_of_others_is_used_where_it_is() {
    let Some(_context) = gpu() else { return };
    let device = Device::open("cuda").unwrap();
    let row = RowFormat::new(Codec::tq(4), 128).unwrap();
    let owner = device.upload(&numbers(3 * 128), &[3, 128]).unwrap();
    let address = owner.cuda_ptr().unwrap();
    // The second and third rows.
    // SAFETY: `owner` outlives the view, and both are on one stream.
    let view = unsafe { Buffer::from_cuda_ptr(&device, address + 512, DType::F32, &[2, 128]) }.unwrap();
    assert_eq!(view.read::<f32>().unwrap(), numbers(3 * 128)[128..]);
    let mut encoder = device.encoder().unwrap();
    rotate(&mut encoder, &row, Direction::Forward, &view, &view).unwrap();
    rotate(&mut encoder, &row, Direction::Inverse, &view, &view).unwrap();
    encoder.submit_and_wait().unwrap();
    let got = owner.read::<f32>().unwrap();
    assert!(got.iter().zip(numbers(3 * 128)).all(|(g, w)| (g - w).abs() < 1e-5));
    assert_eq!(got[..128], numbers(3 * 128)[..128]);

    for (address, reason) in [(0, "null"), (address + 2, "a multiple of 4")] {
        // SAFETY: refused before it is used.
        let error = unsafe { Buffer::from_cuda_ptr(&device, address, DType::F32, &[2, 128]) }.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn too_much_memory_and_broken_kernels_are_errors() {
    let Some(_context) = gpu() else { return };
    let device = Device::open("cuda").unwrap();
    let step = Step::new(&device).unwrap();
    step.submit().unwrap();
    let before = step.result().unwrap();

    let bytes = 1 << 50;
    assert!(
        matches!(device.zeros(DType::U8, &[bytes]), Err(Error::OutOfMemory { requested, .. }) if requested == bytes)
    );
    let kernel = |body: &str| KernelSource::Cuda(format!("extern \"C\" __global__ void broken(int* x) {{ {body} }}"));
    let run = |groups| {
        let mut encoder = device.encoder()?;
        encoder.dispatch("broken", [groups, 1, 1], &[&step.out], &[])?;
        encoder.submit_and_wait()
    };
    device.kernels().register("broken", kernel("x[0] = nothing;"));
    let error = run(1).unwrap_err();
    assert!(
        matches!(&error, Error::KernelCompile { name, log } if name == "broken" && log.contains("nothing")),
        "{error}"
    );
    device.kernels().register("broken", kernel(""));
    assert!(matches!(run(0), Err(Error::DeviceFailed { .. })), "a grid of nothing");

    step.submit().unwrap();
    assert_eq!(step.result().unwrap(), before);
    assert!(device.workspace_bytes() > 0);
}

/// A trap ends the GPU's context, so it happens in a process of its own.
#[test]
fn a_kernel_that_traps_is_an_error() {
    let Some(_context) = gpu() else { return };
    if std::env::var_os("TQKV_TEST_TRAP").is_none() {
        let name = "backend::cuda::interop_tests::a_kernel_that_traps_is_an_error";
        let mut command = Command::new(std::env::current_exe().unwrap());
        let output = command.args(["--exact", name]).env("TQKV_TEST_TRAP", "1").output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let device = Device::open("cuda").unwrap();
    let x = device.zeros(DType::U32, &[1]).unwrap();
    let source = "extern \"C\" __global__ void trap(int* x) { asm(\"trap;\"); }";
    device.kernels().register("trap", KernelSource::Cuda(source.to_owned()));
    let run = || {
        let mut encoder = device.encoder()?;
        encoder.dispatch("trap", [1, 1, 1], &[&x], &[])?;
        encoder.submit_and_wait()
    };
    assert!(matches!(run(), Err(Error::DeviceFailed { .. })));
    assert!(matches!(run(), Err(Error::DeviceFailed { .. })), "a device that has failed says so again");
    assert!(matches!(x.read::<u32>(), Err(Error::DeviceFailed { .. })));
}
