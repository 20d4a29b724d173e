//! Steps and batches that are recorded once and go on with other lengths and pages, against those recorded anew.

mod support;

use std::cell::Cell;
use support::*;
use tqkv::cache::{LayerKind, Recent, Replay, Side, Sinks, Step};
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, CommandEncoder, DType, Device, Error, KvCache, SequenceId};

const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const D: usize = 64;
const PAGE: usize = 16;
const LAYERS: usize = 4;

/// A full layer that keeps its newest positions apart, a windowed one, one that shares with the first, one with sinks.
fn cache(device: &Device, pages: usize) -> KvCache {
    let config = CacheConfig::new(LAYERS, KV_HEADS, D)
        .codec_at(1, "k3v5".parse().unwrap())
        .kind_at(1, LayerKind::Window(20))
        .kind_at(2, LayerKind::Shared(0))
        .recent_at(0, Recent { positions: 10, codec: "k8v8".parse().unwrap() })
        .kind_at(3, LayerKind::Window(20))
        .sinks_at(3, Sinks { positions: 4, codec: CodecPair::both(Codec::F16) })
        .page_size(PAGE)
        .capacity(pages * PAGE);
    KvCache::new(device, config).unwrap()
}

/// A step's buffers: queries and outputs of both kinds of kernels, by layer.
struct Buffers {
    kv: Buffer,
    q: [Buffer; 2],
    out: [Vec<Buffer>; 2],
}

const TYPES: [DType; 2] = [DType::F16, DType::F32];

impl Buffers {
    fn new(device: &Device, tokens: usize) -> Self {
        let zeros = |dtype| device.zeros(dtype, &[tokens, HEADS, D]).unwrap();
        let outs = |dtype| (0..LAYERS).map(|_| zeros(dtype)).collect();
        let kv = device.zeros(DType::F16, &[tokens, KV_HEADS, D]).unwrap();
        Buffers { kv, q: TYPES.map(zeros), out: TYPES.map(outs) }
    }

    fn write(&self, seed: u64) {
        let x = |n| Rng(seed).normals(n);
        let halves = |n: usize| x(n).into_iter().map(half::f16::from_f32).collect::<Vec<_>>();
        self.kv.write(&halves(self.kv.len())).unwrap();
        self.q[0].write(&halves(self.q[0].len())).unwrap();
        self.q[1].write(&x(self.q[1].len())).unwrap();
    }

    fn record(&self, step: &mut Step, encoder: &mut CommandEncoder) -> tqkv::Result<()> {
        let params = AttentionParams::for_head_dim(D);
        for layer in 0..LAYERS {
            if layer != 2 {
                step.append(encoder, layer, &self.kv, &self.kv)?;
            }
            for (q, out) in self.q.iter().zip(&self.out) {
                step.attend(encoder, layer, q, &out[layer], None, &params)?;
            }
        }
        Ok(())
    }

    fn outputs(&self) -> Vec<Vec<u8>> {
        self.out.iter().flatten().map(bytes).collect()
    }
}

fn bytes(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.read_bytes(&mut bytes).unwrap();
    bytes
}

/// Every byte that a cache holds.
fn contents(cache: &KvCache) -> Vec<Vec<u8>> {
    let pools = (0..LAYERS).flat_map(|layer| [Side::Key, Side::Value].map(|side| (layer, side)));
    let pools =
        pools.flat_map(|(layer, side)| [Some(cache.pool(layer, side).unwrap()), cache.sink_pool(layer, side).unwrap()]);
    pools.flatten().flat_map(|pool| [Some(pool.codes()), pool.scales()]).flatten().map(bytes).collect()
}

/// Replays beside steps recorded anew, with whatever may happen to sequences between them.
fn replays_are_steps(device: &Device, steps: usize, pages: usize) {
    let (mut replayed, mut anew) = (cache(device, pages), cache(device, pages));
    let (buffers, others) = (Buffers::new(device, 2), Buffers::new(device, 2));
    let recordings = Cell::new(0);
    let mut replay = Replay::new(|step, encoder| {
        recordings.set(recordings.get() + 1);
        buffers.record(step, encoder)
    });
    let mut rng = Rng(3);
    let mut ids: Vec<SequenceId> = vec![];
    // Both caches go through the same, so they give out the same numbers and pages.
    let both = |replayed: &mut KvCache, anew: &mut KvCache, f: &dyn Fn(&mut KvCache) -> SequenceId| {
        let (a, b) = (f(replayed), f(anew));
        assert_eq!(a, b);
        a
    };
    for step in 0..steps {
        while ids.len() < 2 {
            ids.push(both(&mut replayed, &mut anew, &|cache| cache.add_sequence()));
        }
        let longest = ids.iter().copied().max_by_key(|&id| replayed.len(id).unwrap()).unwrap();
        match rng.below(40) {
            0 if ids.len() < 4 => ids.push(both(&mut replayed, &mut anew, &|cache| cache.fork(longest).unwrap())),
            1 => ids.swap(0, 1),
            2 if ids.len() > 2 => {
                let id = ids.remove(0);
                [&mut replayed, &mut anew].into_iter().for_each(|cache| cache.free_sequence(id).unwrap());
            }
            3 => {
                let len = replayed.len(longest).unwrap();
                let back = len.saturating_sub(rng.below(6));
                let results = [&mut replayed, &mut anew].map(|cache| cache.truncate(longest, back));
                assert_eq!(results[0], results[1]);
            }
            _ => {}
        }
        if replayed.free_pages() < 6 {
            let longest = ids.iter().position(|&id| id == longest).unwrap();
            let id = ids.remove(longest);
            [&mut replayed, &mut anew].into_iter().for_each(|cache| cache.free_sequence(id).unwrap());
            continue;
        }
        let tokens = [(ids[0], 1), (ids[1], 1)];
        [&buffers, &others].into_iter().for_each(|b| b.write(step as u64));
        replay.run(&mut replayed, &tokens).unwrap().wait().unwrap();
        let (mut step_anew, mut encoder) = (anew.step(&tokens).unwrap(), device.encoder().unwrap());
        others.record(&mut step_anew, &mut encoder).unwrap();
        step_anew.submit(encoder).unwrap().wait().unwrap();
        assert_eq!(buffers.outputs(), others.outputs(), "step {step}");
        if step % 64 == 0 {
            assert!(contents(&replayed) == contents(&anew), "step {step}");
        }
    }
    assert!(contents(&replayed) == contents(&anew));
    let kept = replay.is_recorded();
    assert_eq!(kept, device.to_string().starts_with("cuda"));
    let recordings = recordings.get();
    println!("{recordings} recordings in {steps} steps");
    assert!(if kept { recordings < steps / 4 } else { recordings > steps / 2 }, "{recordings} recordings");
}

/// On a device that captures nothing, nothing goes on with what was captured.
#[test]
fn captured_steps_are_cudas() {
    let device = Device::cpu();
    let mut cache = cache(&device, 8);
    let (sequence, buffers) = (cache.add_sequence(), Buffers::new(&device, 1));
    let mut step = cache.step(&[(sequence, 1)]).unwrap();
    assert!(matches!(step.captured(), Err(Error::UnevenLayers { .. })));
    let mut encoder = device.encoder().unwrap();
    buffers.record(&mut step, &mut encoder).unwrap();
    assert!(matches!(step.captured(), Err(Error::Unsupported { .. })));
    step.submit(encoder).unwrap().wait().unwrap();
}

#[test]
fn replays_are_steps_on_the_cpu() {
    on("cpu", |device| replays_are_steps(device, 400, 60));
}

#[test]
fn replays_are_steps_on_wgpu() {
    on("wgpu", |device| replays_are_steps(device, 60, 60));
}

#[test]
fn replays_are_steps_on_cuda() {
    on("cuda", |device| replays_are_steps(device, 150, 60));
}

/// For a GPU: `cargo test --test replay -- --ignored`.
#[test]
#[ignore = "minutes"]
fn ten_thousand_replays_on_cuda() {
    on("cuda", |device| replays_are_steps(device, 10_000, 600));
}

#[test]
fn what_fails_changes_nothing_and_what_differs_is_recorded_anew() {
    for name in ["cpu", "wgpu", "cuda"] {
        on(name, |device| {
            let mut small = cache(device, 3);
            let (one, two) = (Buffers::new(device, 1), Buffers::new(device, 2));
            let (which, fails) = (Cell::new(&one), Cell::new(false));
            let mut replay = Replay::new(|step, encoder| {
                which.get().record(step, encoder)?;
                if fails.get() { Err(Error::BufferBusy) } else { Ok(()) }
            });
            let (a, b) = (small.add_sequence(), small.add_sequence());
            one.write(1);
            two.write(2);
            for _ in 0..PAGE + 1 {
                replay.run(&mut small, &[(a, 1)]).unwrap().wait().unwrap();
            }
            replay.run(&mut small, &[(b, 1)]).unwrap().wait().unwrap();
            // A page is missing.
            for _ in 1..PAGE {
                replay.run(&mut small, &[(b, 1)]).unwrap().wait().unwrap();
            }
            let before = contents(&small);
            let usage = small.usage();
            assert!(matches!(replay.run(&mut small, &[(b, 1)]), Err(Error::OutOfPages { .. })));
            assert_eq!((small.len(a).unwrap(), small.len(b).unwrap()), (PAGE + 1, PAGE));
            assert_eq!(small.usage(), usage);
            assert!(contents(&small) == before);
            replay.run(&mut small, &[(a, 1)]).unwrap().wait().unwrap();
            assert_eq!(small.len(a).unwrap(), PAGE + 2);
            // Other numbers of tokens want other buffers, which the recording says.
            assert!(matches!(replay.run(&mut small, &[(a, 2)]), Err(Error::Shape { .. })));
            assert_eq!(small.len(a).unwrap(), PAGE + 2);
            which.set(&two);
            replay.run(&mut small, &[(a, 2)]).unwrap().wait().unwrap();
            assert_eq!(small.len(a).unwrap(), PAGE + 4);
            // Another cache has other pools.
            let mut other = cache(device, 3);
            let id = other.add_sequence();
            replay.run(&mut other, &[(id, 2)]).unwrap().wait().unwrap();
            assert_eq!(other.len(id).unwrap(), 2);
            assert!(contents(&other) != contents(&cache(device, 3)), "it was written to");
            // What is recorded anew and fails leaves all as it was.
            let before = contents(&small);
            fails.set(true);
            assert_eq!(replay.run(&mut small, &[(a, 2)]).err(), Some(Error::BufferBusy));
            assert!(!replay.is_recorded());
            assert_eq!(small.len(a).unwrap(), PAGE + 4);
            assert!(contents(&small) == before);
        });
    }
}

/// A pool of 6 pages with random content, and what attention makes of it.
struct Attending {
    pool: PagePool,
    q: Buffer,
    out: Buffer,
}

impl Attending {
    fn new(device: &Device) -> Self {
        let pool = PagePool::new(device, RowFormat::new(Codec::tq(4), D).unwrap(), KV_HEADS, PAGE, 6).unwrap();
        let x = upload(device, DType::F16, &Rng(5).normals(6 * PAGE * KV_HEADS * D), &[6 * PAGE, KV_HEADS, D]);
        let pages: Vec<u32> = (0..6).collect();
        let all = Batch::new(device, PAGE, &[Span { first: 0, len: 6 * PAGE, new: 6 * PAGE, pages: &pages }]).unwrap();
        run(device, |e| quantize(e, &[(&x, &pool)], &all));
        let q = upload(device, DType::F16, &Rng(6).normals(2 * HEADS * D), &[2, HEADS, D]);
        let out = device.zeros(DType::F16, &[2, HEADS, D]).unwrap();
        Attending { pool, q, out }
    }

    fn run(&self, batch: &Batch) -> tqkv::Result<Vec<u8>> {
        let mut encoder = self.q.device().encoder()?;
        let params = AttentionParams::for_head_dim(D);
        attention(&mut encoder, &self.q, &self.pool, &self.pool, batch, &params, &self.out, None)?;
        encoder.submit_and_wait()?;
        Ok(bytes(&self.out))
    }
}

#[test]
fn an_updated_batch_is_like_a_new_one() {
    for name in ["cpu", "wgpu", "cuda"] {
        on(name, |device| {
            let it = Attending::new(device);
            let spans = |len: usize, a: [u32; 3]| {
                let b = a.map(|page| if page < 6 { 5 - page } else { NO_PAGE });
                [(0, len, a), (len / 2, len, b)].map(|(first, len, pages)| (first, len, 1, pages))
            };
            let batch = |spans: &[(usize, usize, usize, [u32; 3])]| {
                let spans: Vec<_> = spans
                    .iter()
                    .map(|(first, len, new, pages)| Span { first: *first, len: *len, new: *new, pages })
                    .collect();
                Batch::new(device, PAGE, &spans)
            };
            let update = |batch: &mut Batch, spans: &[(usize, usize, usize, [u32; 3])]| {
                let spans: Vec<_> = spans
                    .iter()
                    .map(|(first, len, new, pages)| Span { first: *first, len: *len, new: *new, pages })
                    .collect();
                batch.update(&spans)
            };
            let mut updated = batch(&spans(9, [0, 1, NO_PAGE])).unwrap();
            it.run(&updated).unwrap();
            for (len, pages) in [(10, [0, 1, NO_PAGE]), (31, [0, 3, 2]), (32, [4, 0, 5]), (2, [2, NO_PAGE, NO_PAGE])] {
                let behind = updated.clone();
                update(&mut updated, &spans(len, pages)).unwrap();
                assert_eq!(it.run(&updated).unwrap(), it.run(&batch(&spans(len, pages)).unwrap()).unwrap(), "{len}");
                assert_eq!(it.run(&behind), Err(Error::OutdatedBatch));
                assert_eq!(updated.sequences(), 2);
            }
            // What does not fit leaves all as it was.
            let before = it.run(&updated).unwrap();
            let mismatch =
                |what: &'static str, got, expected: &str| Error::Mismatch { what, got, expected: expected.into() };
            let mut more = spans(9, [0, 1, 2]);
            more[1].2 = 2;
            let errors = [
                (
                    spans(9, [6, 1, 2]).map(|s| Span { pages: &[6, 1, 2], first: s.0, len: s.1, new: s.2 }).to_vec(),
                    Error::Page { got: 6, pages: 6 },
                ),
                (vec![Span { first: 0, len: 3, new: 1, pages: &[0] }], mismatch("sequences of the batch", 1, "2")),
                (
                    more.iter().map(|s| Span { first: s.0, len: s.1, new: s.2, pages: &s.3 }).collect(),
                    mismatch("new positions of a sequence", 2, "1"),
                ),
                (
                    vec![Span { first: 0, len: 3, new: 1, pages: &[0; 4] }; 2],
                    mismatch("pages of a sequence's table", 4, "at most 3"),
                ),
                (
                    vec![Span { first: 0, len: 3, new: 1, pages: &[] }; 2],
                    Error::Positions { start: 0, end: 3, first: 0, len: 0 },
                ),
            ];
            for (spans, error) in errors {
                assert_eq!(updated.update(&spans), Err(error));
                assert_eq!(it.run(&updated).unwrap(), before);
            }
            // A page that was written from one place is not written from two.
            let x = device.zeros(DType::F16, &[2, KV_HEADS, D]).unwrap();
            run(device, |e| quantize(e, &[(&x, &it.pool)], &updated));
            let twice = vec![Span { first: 0, len: 3, new: 1, pages: &[0] }; 2];
            assert!(matches!(updated.update(&twice), Err(Error::Aliased { .. })));
        });
    }
}
