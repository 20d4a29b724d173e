//! Every generated kernel: valid, and fit for Metal; and how many dispatches operations take.

use super::caps::Caps;
use super::codec::key::{Align, Stored};
use super::kernel::Kernel;
use super::kernels::attention::{join::JoinKernel, kernel};
use super::kernels::{dequantize::DequantizeKernel, merge::MergeKernel, quantize, rotate::RotateKernel};
use super::wgsl::builder::Source;
use super::wgsl::tensor::Tensor;
use crate::cache::{LayerKind, Sinks};
use crate::format::{Codec, CodecPair, DType, RowFormat};
use crate::ops::{
    AttentionParams, Batch, Direction, Domain, PagePool, RowOrder, Span, attention as attend, dequantize as decode,
    quantize as encode, rotate as turn,
};
use crate::{CacheConfig, Device, KvCache, backend};
use std::sync::Arc;

/// What a Metal GPU gives a threadgroup.
const METAL_WORKGROUP_MEMORY: u32 = 32 << 10;

/// Translates a kernel as wgpu does on macOS and checks the outcome.
fn check_for_metal(name: &str, source: &Source) {
    let module = naga::front::wgsl::parse_str(&source.text)
        .unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source.text)));
    let mut validator =
        naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
    let info = validator.validate(&module).unwrap_or_else(|e| panic!("{name}: {}", e.emit_to_string(&source.text)));
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).unwrap();
    let memory: u32 = module
        .global_variables
        .iter()
        .filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
        .map(|(_, v)| layouter[v.ty].size)
        .sum();
    assert!(memory <= METAL_WORKGROUP_MEMORY, "{name}: {memory} bytes of workgroup memory");
    let unchecked = naga::proc::BoundsCheckPolicy::Unchecked;
    let options = naga::back::msl::Options {
        lang_version: (2, 4),
        bounds_check_policies: naga::proc::BoundsCheckPolicies {
            index: unchecked,
            buffer: unchecked,
            image_load: unchecked,
            binding_array: unchecked,
        },
        zero_initialize_workgroup_memory: false,
        force_loop_bounding: false,
        ..Default::default()
    };
    let (msl, _) = naga::back::msl::write_string(&module, &info, &options, &Default::default())
        .unwrap_or_else(|e| panic!("{name}: {e}"));
    // What naga adds to check accesses and to bound loops.
    for check in ["_buffer_sizes.", "DefaultConstructible", "loop_bound"] {
        assert!(!msl.contains(check), "{name}: {check} in\n{msl}");
    }
}

const SHAPES: [(Codec, usize); 17] = [
    (Codec::tq(2), 64),
    (Codec::tq(3), 80),
    (Codec::tq(4), 128),
    (Codec::tq(5), 96),
    (Codec::tq(6), 112),
    (Codec::tq(7), 256),
    (Codec::tq(8), 1024),
    (Codec::tq(4), 576),
    (Codec::seed(4), 128),
    (Codec::seed(5), 256),
    (Codec::seed(8), 512),
    (Codec::F16, 128),
    (Codec::F32, 256),
    (Codec::F32, 16),
    // Tensors of fewer elements than rows, and of an odd number.
    (Codec::tq(3), 100),
    (Codec::tq(4), 7),
    (Codec::F16, 7),
];

#[test]
fn kernels_translate_to_metal() {
    for (native_f16, subgroup) in [(true, 32), (true, 8), (false, 0)] {
        let caps = Caps {
            native_f16,
            subgroup,
            shuffles_wrap: subgroup == 8,
            team: if subgroup == 32 { 32 } else { 0 },
            busy: 64,
            threads: 512,
            query_rows: 16,
            held: 1024,
            ahead: 8,
        };
        let mut kernels = 0;
        let mut check = |name: String, source: Source| {
            check_for_metal(&name, &source);
            kernels += 1;
        };
        for (codec, d) in SHAPES {
            let row = RowFormat::new(codec, d).unwrap();
            for align in [Align::Byte, Align::Word, Align::Vector] {
                let fits = match align {
                    Align::Byte => row.is_rotated(),
                    Align::Word => row.row_bytes().is_multiple_of(4),
                    Align::Vector => row.row_bytes().is_multiple_of(16),
                };
                if fits {
                    let stored = Stored::of(&row, align);
                    for dtype in [DType::F32, DType::F16, DType::BF16] {
                        rows(&stored, dtype, &caps, &mut check);
                    }
                    attention(&stored, &caps, &mut check);
                }
            }
        }
        let part = |dtype| Some(Tensor::new(dtype, true, 64, 64));
        let parts = [DType::F32, DType::F16, DType::BF16, DType::F32].map(part);
        let parts = std::array::from_fn(|i| parts.get(i).copied().flatten());
        let out = Tensor::new(DType::F16, true, 64, 64);
        check("merge".to_owned(), MergeKernel { parts, out, lse: true }.source(&caps));
        println!("{kernels} kernels");
    }
}

/// A tensor of vectors of the rows' head_dim.
fn tensor(stored: &Stored, dtype: DType) -> Tensor {
    let row = stored.format();
    Tensor::new(dtype, stored.align == Align::Vector, row.head_dim(), row.row_dim())
}

/// Kernels that read or write rows one by one.
fn rows(stored: &Stored, dtype: DType, caps: &Caps, check: &mut dyn FnMut(String, Source)) {
    let (row, x) = (stored.format(), tensor(stored, dtype));
    let name = format!("{} D={} {:?} {dtype}", row.codec(), row.head_dim(), stored.align);
    for forward in [false, true] {
        // In place where both domains have one size.
        for out in [None, Some(x)].into_iter().filter(|out| out.is_some() || row.head_dim() == row.row_dim()) {
            let kernel = RotateKernel { row: *stored, forward, x, out };
            check(format!("rotate {name}"), kernel.source(caps));
        }
    }
    let input = Some(quantize::Input { pool: *stored, x });
    for inputs in [[input, None], [input, input]] {
        check(format!("quantize {name}"), quantize::QuantizeKernel { inputs }.source(caps));
    }
    for restore in [false, true].into_iter().filter(|r| !r || row.is_rotated()) {
        let kernel = DequantizeKernel { pool: *stored, out: x, restore, head_major: restore, listed: !restore };
        check(format!("dequantize {name}"), kernel.source(caps));
    }
    let sink_logits = dtype == DType::F32;
    let kernel = JoinKernel {
        value: *stored,
        out: x,
        restore: row.is_rotated(),
        sink_logits,
        lse: !sink_logits,
        bias: sink_logits,
    };
    check(format!("join {name}"), kernel.source(caps));
}

/// As many rows of queries as a workgroup may have, some, and one.
fn attention(stored: &Stored, caps: &Caps, check: &mut dyn FnMut(String, Source)) {
    let row = stored.format();
    let most = caps.query_rows.min(kernel::QUERY_FLOATS / row.row_dim());
    for (heads, queries, threads) in
        [(most, 1, 128), (1, most, 128), (most.min(4), 1, 128), (1, 1, 128), (most.min(4), 1, 512)]
    {
        let kernel = kernel::AttentionKernel {
            key: *stored,
            value: *stored,
            q: tensor(stored, DType::F16),
            rotate: row.is_rotated(),
            heads,
            queries,
            positions: kernel::most_positions(heads * queries, caps),
            causal: heads > 1,
            window: heads > 1,
            softcap: queries > 1,
            bias: false,
            ring: queries > 1,
            page_bits: (heads > 1).then_some(6),
            whole: heads == 1 || threads > 128,
            threads,
        };
        if threads > 128 && (caps.subgroup == 0 || kernel.weights() > 1024) {
            continue;
        }
        let name =
            format!("attention {} D={} {:?} {heads}x{queries} {threads}", row.codec(), row.head_dim(), stored.align);
        check(name, kernel.source(caps));
    }
}

/// An append is one and attention is two, however many sequences there are; five in a layer with sinks: two for them, two for the rest, and a merge.
#[test]
fn a_step_takes_three_dispatches_a_layer() {
    let Ok(wgpu) = backend::wgpu::open(None) else {
        assert!(!std::env::var("TQKV_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "wgpu")), "wgpu is required");
        eprintln!("SKIPPED: no wgpu device");
        return;
    };
    let device = Device::from_driver(Box::new(wgpu));
    let sinks = Sinks { positions: 4, codec: CodecPair::both(Codec::tq(4)) };
    let config = CacheConfig::new(3, 1, 64).capacity(64 * 4096).kind_at(1, LayerKind::Window(512)).sinks_at(2, sinks);
    let mut cache = KvCache::new(&device, config).unwrap();
    // Lengths from 1 to 4096.
    let tokens: Vec<_> = (0..64).map(|i| (cache.add_sequence(), 1 + i * 65)).collect();
    let n = tokens.iter().map(|t| t.1).sum();
    let x = device.zeros(DType::F32, &[n, 1, 64]).unwrap();
    let q = device.zeros(DType::F32, &[64, 2, 64]).unwrap();
    let out = device.zeros(DType::F32, &[64, 2, 64]).unwrap();
    let newest: Vec<_> = tokens.iter().map(|t| (t.0, 1)).collect();
    let mut encoder = device.encoder().unwrap();
    let (mut appends, mut counted) = (vec![], vec![]);
    for layer in 0..3 {
        let start = encoder.dispatches();
        cache.append(&mut encoder, layer, &tokens, &x, &x).unwrap();
        let before = encoder.dispatches();
        appends.push(before - start);
        cache.attend(&mut encoder, layer, &newest, &q, &out, None, &AttentionParams::for_head_dim(64)).unwrap();
        counted.push(encoder.dispatches() - before);
    }
    // Keys and values of all sequences in one.
    assert_eq!(appends[..2], [1, 1]);
    // The first sequence's only query is a sink itself, which makes it a run of its own.
    assert_eq!(counted, [2, 2, 2 + 5]);
    // Nothing is submitted: the conformance suite looks at the numbers.
}

/// Kernels are put together otherwise for software, which CI has: rows exchanged all at once, few queries a workgroup. These
/// are what a GPU would get, against the CPU.
#[test]
fn kernels_for_gpus_agree_with_the_cpu() {
    let cpu = Device::cpu();
    for (subgroups, wide, new) in [(true, false, 4), (true, false, 1), (true, true, 1), (false, false, 4)] {
        let Ok(mut wgpu) = backend::wgpu::open(None) else {
            assert!(
                !std::env::var("TQKV_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "wgpu")),
                "wgpu is required"
            );
            return eprintln!("SKIPPED: no wgpu device");
        };
        let caps = &mut Arc::get_mut(&mut wgpu.0).expect("just opened").gpu.caps;
        (caps.held, caps.query_rows, caps.ahead) = (1024, 16, 8);
        if !subgroups {
            (caps.subgroup, caps.team) = (0, 0);
        }
        if wide {
            // No work is too little for large workgroups then.
            (caps.threads, caps.busy) = (512, 0);
        }
        let gpu = Device::from_driver(Box::new(wgpu));
        // Teams' tiles lie within pages of 96 positions.
        let shapes = [
            (Codec::tq(4), 128, 100),
            (Codec::tq(4), 64, 96),
            (Codec::tq(4), 64, 100),
            (Codec::tq(3), 80, 100),
            (Codec::seed(4), 512, 100),
        ];
        for (codec, d, n) in shapes {
            let (row, kv_heads, heads) = (RowFormat::new(codec, d).unwrap(), 2, 8);
            let pages = [0];
            let spans = |new| [Span { first: 0, len: n, new, pages: &pages }];
            let mut results = vec![];
            for device in [&cpu, &gpu] {
                let numbers = |n: usize| (0..n).map(|i| (i as f32 * 0.37).sin() + (i as f32 * 0.011).cos());
                let x: Vec<f32> = numbers(n * kv_heads * d).collect();
                let x = device.upload(&x, &[n, kv_heads, d]).unwrap();
                let q: Vec<f32> = numbers(new * heads * d).collect();
                let q = device.upload(&q, &[new, heads, d]).unwrap();
                let pool = PagePool::new(device, row, kv_heads, n, 1).unwrap();
                let (rotated, restored) = (device.zeros(DType::F32, x.shape()), device.zeros(DType::F32, x.shape()));
                let (rotated, restored) = (rotated.unwrap(), restored.unwrap());
                let out = device.zeros(DType::F32, q.shape()).unwrap();
                let batch = |new| Batch::new(device, n, &spans(new)).unwrap();
                let mut encoder = device.encoder().unwrap();
                turn(&mut encoder, &row, Direction::Forward, &x, &rotated).unwrap();
                encode(&mut encoder, &[(&x, &pool)], &batch(n)).unwrap();
                let order = RowOrder::TokenMajor;
                decode(&mut encoder, &pool, &batch(0), 0, 0..n, Domain::Original, order, &restored).unwrap();
                let params = AttentionParams::for_head_dim(d);
                attend(&mut encoder, &q, &pool, &pool, &batch(new), &params, &out, None).unwrap();
                encoder.submit_and_wait().unwrap();
                results.push((
                    pool.codes().read::<u8>().unwrap(),
                    [rotated, restored, out].map(|b| b.read::<f32>().unwrap()),
                ));
            }
            let name = format!("{codec} D={d}, {n} positions, {new} queries, subgroups {subgroups}, wide {wide}");
            assert!(results[0].0 == results[1].0, "{name}: codes");
            for (i, (want, got)) in results[0].1.iter().zip(&results[1].1).enumerate() {
                let off: f64 = want.iter().zip(got).map(|(w, g)| f64::from(w - g).powi(2)).sum();
                let norm: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
                assert!((off / norm).sqrt() < 1e-5, "{name}: result {i} is off by {:e}", (off / norm).sqrt());
            }
        }
    }
}
