//! Random schedules against a plain model that keeps every vector.

mod support;

use proptest::prelude::*;
use std::collections::HashMap;
use support::*;
use tqkv::cache::{Heads, LayerKind, Side, Sinks};
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache, SequenceId, reference};

const KV_HEADS: usize = 2;
const HEADS: usize = 4;
const D: usize = 32;
const PAGE: usize = 8;
const WINDOW: usize = 12;
const LAYERS: usize = 9;
const CAPACITY: usize = 40 * PAGE;
const SINK_SEQUENCES: usize = 6;

/// Full layers of two codecs, a windowed one, one that shares with the first; a windowed and a full layer with sinks, less
/// than a page of them and more, and one that shares with the former; layers that see nothing but the token itself, one of
/// them its sinks too.
fn config() -> CacheConfig {
    CacheConfig::new(LAYERS, KV_HEADS, D)
        .codec("k5v4".parse().unwrap())
        .codec_at(1, "k3v8".parse().unwrap())
        .kind_at(2, LayerKind::Window(WINDOW))
        .kind_at(3, LayerKind::Shared(0))
        .kind_at(4, LayerKind::Window(WINDOW))
        .sinks_at(4, Sinks { positions: 5, codec: CodecPair::both(Codec::F16) })
        .sinks_at(5, Sinks { positions: 11, codec: "k8v8".parse().unwrap() })
        .kind_at(6, LayerKind::Shared(4))
        .kind_at(7, LayerKind::Window(1))
        .kind_at(8, LayerKind::Window(1))
        .sinks_at(8, Sinks { positions: 5, codec: CodecPair::both(Codec::F16) })
        .sink_sequences(SINK_SEQUENCES)
        .page_size(PAGE)
        .capacity(CAPACITY)
}

/// The layer whose positions a layer reads.
fn source(layer: usize) -> usize {
    if let LayerKind::Shared(source) = config().layer_kind(layer) { source } else { layer }
}

/// The oldest position, sinks apart, that a layer's query at `position` sees.
fn window_start(layer: usize, position: usize) -> usize {
    match config().layer_kind(source(layer)) {
        LayerKind::Window(window) => (position + 1).saturating_sub(window),
        _ => 0,
    }
}

/// Rolling back to `len` may fail only because a window has dropped positions that the next token would see: there must be
/// some.
fn expect_dropped(error: &Error, len: usize) {
    let Error::Positions { start, first, .. } = *error else { panic!("{error}") };
    assert!(start < len && start < first, "{error}: nothing stands in the way of {len}");
}

/// How many first positions a layer keeps apart.
fn sinks(layer: usize) -> usize {
    config().layer_sinks(source(layer)).map_or(0, |s| s.positions)
}

/// How a layer stores one side of a position.
fn row(layer: usize, side: Side, position: usize) -> RowFormat {
    let sinks = config().layer_sinks(layer).filter(|s| position < s.positions);
    let pair = sinks.map_or(config().layer_codec(layer), |s| s.codec);
    RowFormat::new(if side == Side::Key { pair.key } else { pair.value }, D).unwrap()
}

/// How tokens are appended.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    ByLayer,
    Step,
    /// A step that is dropped after so many layers, submitted or not.
    Abandoned(usize, bool),
}

#[derive(Clone, Debug)]
enum Step {
    Add,
    /// New tokens for up to three sequences at once, layer by layer or as a step, which may be given up midway.
    Append([(usize, usize); 3], usize, How),
    Attend(usize, usize),
    Fork(usize),
    Truncate(usize, usize),
    Free(usize),
    Check(usize),
    /// A prefix of a sequence, or everything, is written aside.
    Save(Option<(usize, usize)>),
    /// What was written last comes back beside what is there.
    Load,
}

/// How many tokens are taken back: a few, or all.
fn back() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0..30usize, 1 => Just(usize::MAX)]
}

fn how() -> impl Strategy<Value = How> {
    let abandoned = (0..=LAYERS, any::<bool>()).prop_map(|(layers, submitted)| How::Abandoned(layers, submitted));
    prop_oneof![3 => Just(How::ByLayer), 3 => Just(How::Step), 2 => abandoned]
}

fn step() -> impl Strategy<Value = Step> {
    let any = 0..1000usize;
    prop_oneof![
        1 => Just(Step::Add),
        8 => (prop::array::uniform3((any.clone(), 0..20usize)), 1..=3usize, how())
            .prop_map(|(t, n, how)| Step::Append(t, n, how)),
        3 => (any.clone(), 1..6usize).prop_map(|(s, n)| Step::Attend(s, n)),
        2 => any.clone().prop_map(Step::Fork),
        3 => (any.clone(), back()).prop_map(|(s, n)| Step::Truncate(s, n)),
        1 => any.clone().prop_map(Step::Free),
        1 => any.clone().prop_map(Step::Check),
        2 => prop::option::weighted(0.7, (any, back())).prop_map(Step::Save),
        2 => Just(Step::Load),
    ]
}

/// The vectors of a token: a function of its number, the layer and the side.
fn vectors(token: u64, layer: usize, side: Side) -> Vec<f32> {
    Rng(token * 16 + layer as u64 * 2 + (side == Side::Value) as u64).normals(KV_HEADS * D)
}

/// What a token's vectors decode to: encoded alone on the CPU, in a pool of one position.
fn decode_alone(token: u64, layer: usize, side: Side, position: usize, domain: Domain) -> Vec<f32> {
    let cpu = Device::cpu();
    let pool = PagePool::new(&cpu, row(layer, side, position), KV_HEADS, 1, 1).unwrap();
    let batch = Batch::contiguous(&cpu, 1, 0, 1, 1).unwrap();
    let x = cpu.upload(&vectors(token, layer, side), &[1, KV_HEADS, D]).unwrap();
    let out = cpu.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    run(&cpu, |e| {
        quantize(e, &[(&x, &pool)], &batch)?;
        dequantize(e, &pool, &batch, 0, 0, domain, RowOrder::TokenMajor, &out)
    });
    out.read().unwrap()
}

/// Token, layer, side, whether it is a sink, and the domain.
type Decoded = (u64, usize, Side, bool, Domain);

struct Model {
    cache: KvCache,
    /// Tokens of every sequence, and the oldest position that the windowed layer must still hold.
    sequences: Vec<(SequenceId, Vec<u64>)>,
    next_token: u64,
    /// The last snapshot, and the tokens of its sequences.
    saved: Option<(Vec<u8>, Vec<Vec<u64>>)>,
    decoded: HashMap<Decoded, Vec<f32>>,
}

impl Model {
    fn new(device: &Device) -> Model {
        let cache = KvCache::new(device, config()).unwrap();
        Model { cache, sequences: vec![], next_token: 0, saved: None, decoded: HashMap::new() }
    }

    fn decoded(&mut self, token: u64, layer: usize, side: Side, position: usize, domain: Domain) -> &[f32] {
        let key = (token, layer, side, position < sinks(layer), domain);
        self.decoded.entry(key).or_insert_with(|| decode_alone(token, layer, side, position, domain))
    }

    fn pick(&self, n: usize) -> Option<usize> {
        (!self.sequences.is_empty()).then(|| n % self.sequences.len())
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Add => {
                if self.sequences.len() < 8 {
                    let id = self.cache.add_sequence();
                    self.sequences.push((id, vec![]));
                }
            }
            Step::Append(ref tokens, n, how) => self.append(&tokens[..n], how),
            Step::Attend(s, n) => {
                if let Some(s) = self.pick(s) {
                    self.attend(s, n);
                }
            }
            Step::Fork(s) => {
                if let Some(s) = self.pick(s).filter(|_| self.sequences.len() < 8) {
                    let twin = self.cache.fork(self.sequences[s].0).unwrap();
                    self.sequences.push((twin, self.sequences[s].1.clone()));
                }
            }
            Step::Truncate(s, n) => {
                if let Some(s) = self.pick(s) {
                    let (id, tokens) = &mut self.sequences[s];
                    let len = tokens.len().saturating_sub(n);
                    match self.cache.truncate(*id, len) {
                        Ok(()) => tokens.truncate(len),
                        Err(e) => expect_dropped(&e, len),
                    }
                }
            }
            Step::Free(s) => {
                if let Some(s) = self.pick(s) {
                    let (id, _) = self.sequences.swap_remove(s);
                    self.cache.free_sequence(id).unwrap();
                    assert_eq!(self.cache.len(id), Err(Error::UnknownSequence { got: number(id) }));
                }
            }
            Step::Check(s) => {
                if let Some(s) = self.pick(s) {
                    self.check(s);
                }
            }
            Step::Save(prefix) => self.save(prefix),
            Step::Load => self.load(),
        }
    }

    fn save(&mut self, prefix: Option<(usize, usize)>) {
        let prefixes: Vec<(SequenceId, Vec<u64>)> = match prefix {
            None => self.sequences.clone(),
            Some((s, n)) => {
                let Some(s) = self.pick(s) else { return };
                let (id, tokens) = &self.sequences[s];
                vec![(*id, tokens[..tokens.len().saturating_sub(n)].to_vec())]
            }
        };
        let lens: Vec<_> = prefixes.iter().map(|(id, tokens)| (*id, tokens.len())).collect();
        let mut bytes = vec![];
        match self.cache.write_snapshot(&lens, &mut bytes, b"model") {
            Ok(()) => self.saved = Some((bytes, prefixes.into_iter().map(|p| p.1).collect())),
            Err(e) => {
                assert!(prefix.is_some());
                expect_dropped(&e, lens[0].1);
            }
        }
    }

    fn load(&mut self) {
        let Some((bytes, all)) = self.saved.clone().filter(|(_, all)| self.sequences.len() + all.len() <= 10) else {
            return;
        };
        let before = self.cache.usage();
        match self.cache.read_snapshot(&bytes[..], b"model") {
            Ok(ids) => {
                // What was just written again must be the same bytes, whatever pages it now lies in.
                let lens: Vec<_> = ids.iter().zip(&all).map(|(&id, tokens)| (id, tokens.len())).collect();
                let mut again = vec![];
                self.cache.write_snapshot(&lens, &mut again, b"model").unwrap();
                assert!(again == bytes, "another snapshot after loading");
                self.sequences.extend(ids.into_iter().zip(all));
            }
            Err(Error::OutOfPages { needed, free, .. }) => {
                assert!(needed > free, "{needed} pages are free");
                assert_eq!(self.cache.usage(), before);
            }
            Err(e) => panic!("{e}"),
        }
    }

    fn append(&mut self, tokens: &[(usize, usize)], how: How) {
        let mut chosen: Vec<(usize, usize)> = vec![];
        for &(s, n) in tokens {
            if let Some(s) = self.pick(s).filter(|s| chosen.iter().all(|(t, _)| t != s)) {
                chosen.push((s, n));
            }
        }
        if chosen.is_empty() {
            return;
        }
        let n: usize = chosen.iter().map(|t| t.1).sum();
        let new: Vec<u64> = (self.next_token..).take(n).collect();
        let tokens: Vec<_> = chosen.iter().map(|&(s, n)| (self.sequences[s].0, n)).collect();
        let device = self.cache.device().clone();
        let inputs = |layer| {
            [Side::Key, Side::Value].map(|side| {
                let all: Vec<f32> = new.iter().flat_map(|&t| vectors(t, layer, side)).collect();
                device.upload(&all, &[n, KV_HEADS, D]).unwrap()
            })
        };
        let mut encoder = device.encoder().unwrap();
        if how == How::ByLayer {
            for layer in (0..LAYERS).filter(|&l| source(l) == l) {
                let [k, v] = inputs(layer);
                match self.cache.append(&mut encoder, layer, &tokens, &k, &v) {
                    Ok(()) => {}
                    Err(Error::OutOfPages { needed, free, .. }) => {
                        assert!(needed > free, "{needed} pages are free");
                        // The step ends here; what the layers before took goes back.
                        encoder.submit_and_wait().unwrap();
                        for &(s, _) in &chosen {
                            let (id, held) = &self.sequences[s];
                            self.cache.truncate(*id, held.len()).unwrap();
                        }
                        return;
                    }
                    Err(e) => panic!("{e}"),
                }
            }
            encoder.submit_and_wait().unwrap();
        } else {
            let before = self.cache.usage();
            let mut step = match self.cache.step(&tokens) {
                Ok(step) => step,
                Err(Error::OutOfPages { needed, free, .. }) => {
                    assert!(needed > free, "{needed} pages are free");
                    return;
                }
                Err(e) => panic!("{e}"),
            };
            assert_eq!(step.tokens(), n);
            let layers = if let How::Abandoned(layers, _) = how { layers } else { LAYERS };
            let q = device.upload(&Rng(n as u64).normals(n * HEADS * D), &[n, HEADS, D]).unwrap();
            let out = device.zeros(DType::F32, &[n, HEADS, D]).unwrap();
            for layer in 0..layers {
                if source(layer) == layer {
                    let [k, v] = inputs(layer);
                    step.append(&mut encoder, layer, &k, &v).unwrap();
                }
                let params = AttentionParams::for_head_dim(D);
                step.attend(&mut encoder, layer, &q, &out, None, &params).unwrap();
            }
            match how {
                How::Abandoned(layers, submitted) => {
                    if submitted {
                        encoder.submit_and_wait().unwrap();
                    }
                    if layers < LAYERS && n > 0 {
                        assert!(matches!(step.commit(), Err(Error::UnevenLayers { .. })));
                    } else {
                        drop(step);
                    }
                    let usage = self.cache.usage();
                    // Pages that windows leave behind may be gone.
                    assert!(if layers > 0 { usage.used <= before.used } else { usage == before });
                    return;
                }
                _ => step.submit(encoder).unwrap().wait().unwrap(),
            }
        }
        self.next_token += n as u64;
        let mut new = new.into_iter();
        for (s, n) in chosen {
            self.sequences[s].1.extend(new.by_ref().take(n));
        }
    }

    fn attend(&mut self, s: usize, n: usize) {
        let (id, tokens) = self.sequences[s].clone();
        let n = n.min(tokens.len());
        let device = self.cache.device().clone();
        let q = Rng(tokens.len() as u64).normals(n * HEADS * D);
        let input = device.upload(&q, &[n, HEADS, D]).unwrap();
        let params = AttentionParams::for_head_dim(D);
        for layer in 0..LAYERS {
            let out = Guarded::new(&device, DType::F32, &[n, HEADS, D]);
            let mut encoder = device.encoder().unwrap();
            match self.cache.attend(&mut encoder, layer, &[(id, n)], &input, &out.buffer, None, &params) {
                Ok(()) => encoder.submit_and_wait().unwrap(),
                // Queries from before the last step may look at what the window has dropped.
                Err(Error::Positions { start, first, .. }) if window_start(layer, 1000) > 0 && start < first => {
                    continue;
                }
                Err(e) => panic!("{e}"),
            }
            let out = out.take();
            for i in 0..n {
                let own = tokens.len() - n + i;
                let start = window_start(layer, own);
                let seen: Vec<usize> = (0..=own).filter(|&p| p >= start || p < sinks(layer)).collect();
                for head in 0..HEADS {
                    let at = head * KV_HEADS / HEADS * D;
                    let mut rows = |side| -> Vec<Vec<f32>> {
                        let of = |&p: &usize| {
                            self.decoded(tokens[p], source(layer), side, p, Domain::Original)[at..at + D].to_vec()
                        };
                        seen.iter().map(of).collect()
                    };
                    let (keys, values) = (rows(Side::Key), rows(Side::Value));
                    let r = (i * HEADS + head) * D;
                    let scale = params.scale as f64;
                    let query = reference::Query { q: &q[r..r + D], scale, softcap: None, sink: None };
                    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
                    let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
                    let want = reference::attention(&query, &keys, &values).0;
                    let error = relative_error(&out[r..r + D], &want);
                    assert!(error <= attention_tolerance(&device, DType::F32, DType::F32), "layer {layer}: {error:e}");
                }
            }
        }
    }

    /// Every position that must be there is there to the bit; every other is an error.
    fn check(&mut self, s: usize) {
        let (id, tokens) = self.sequences[s].clone();
        assert_eq!(self.cache.len(id), Ok(tokens.len()));
        let device = self.cache.device().clone();
        // What a GPU's encoder may round otherwise is another test's matter.
        let exact = device.info().kind != tqkv::compute::DeviceKind::Wgpu;
        for layer in 0..LAYERS {
            let (len, sinks) = (tokens.len(), sinks(layer));
            let start = window_start(layer, len).max(sinks).min(len);
            for (side, range) in
                [Side::Key, Side::Value].into_iter().flat_map(|s| [(s, 0..sinks.min(len)), (s, start..len)])
            {
                let out = device.zeros(DType::F32, &[range.len(), KV_HEADS, D]).unwrap();
                let mut decode = |range: std::ops::Range<usize>| {
                    let mut encoder = device.encoder().unwrap();
                    let (domain, order) = (Domain::Rotated, RowOrder::TokenMajor);
                    self.cache.dequantize(&mut encoder, layer, side, id, range, domain, order, &out)?;
                    encoder.submit_and_wait()
                };
                decode(range.clone()).unwrap();
                assert!(matches!(decode(len..len + 1), Err(Error::Positions { .. })));
                if 0 < sinks && sinks < len {
                    assert!(matches!(decode(sinks - 1..sinks + 1), Err(Error::Positions { .. })));
                }
                let got = out.read::<f32>().unwrap();
                for (got, position) in got.chunks(KV_HEADS * D).zip(range) {
                    let want = self.decoded(tokens[position], source(layer), side, position, Domain::Rotated);
                    let differ = got.iter().zip(want).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                    assert!(
                        if exact { differ == 0 } else { differ <= 1 },
                        "layer {layer} {side:?} position {position}"
                    );
                }
            }
        }
    }

    /// Frees everything: no page may be lost.
    fn finish(mut self) {
        for s in 0..self.sequences.len() {
            self.check(s);
        }
        for (id, _) in self.sequences.drain(..) {
            self.cache.free_sequence(id).unwrap();
        }
        let usage = self.cache.usage();
        assert_eq!((usage.used, usage.free, usage.fragmentation), (0, usage.capacity, 0.0));
        assert_eq!(usage.capacity, config().bytes().unwrap());
    }
}

fn number(id: SequenceId) -> u64 {
    format!("{id:?}").chars().filter(char::is_ascii_digit).collect::<String>().parse().unwrap()
}

fn schedule(device: &Device, cases: u32, steps: usize) {
    let config = ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 2000, ..Default::default() };
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(
        config,
        proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha),
    );
    let steps = prop::collection::vec(step(), steps..=steps);
    let result = runner.run(&steps, |steps| {
        let mut model = Model::new(device);
        steps.iter().for_each(|step| model.run(step));
        model.finish();
        Ok(())
    });
    if let Err(e) = result {
        panic!("{e}");
    }
}

#[test]
fn random_schedules_on_the_cpu() {
    schedule(&Device::cpu(), 60, 200);
}

#[test]
fn random_schedules_on_wgpu() {
    on("wgpu", |device| schedule(device, 4, 60));
}

#[test]
fn random_schedules_on_cuda() {
    on("cuda", |device| schedule(device, 10, 100));
}

#[test]
fn running_out_changes_nothing() {
    let device = Device::cpu();
    let no_sinks = Sinks { positions: 0, codec: CodecPair::both(Codec::F16) };
    let config = config().capacity(2 * PAGE).sinks_at(4, no_sinks).sinks_at(5, no_sinks).sinks_at(8, no_sinks);
    let mut cache = KvCache::new(&device, config).unwrap();
    let (a, b) = (cache.add_sequence(), cache.add_sequence());
    let x = device.zeros(DType::F32, &[PAGE + 1, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    for layer in [0, 1, 2, 4, 5, 7, 8] {
        cache.append(&mut encoder, layer, &[(a, PAGE + 1)], &x, &x).unwrap();
    }
    let before = cache.usage();
    assert_eq!(before.free, 0);
    assert!((before.fragmentation - 7.0 / 16.0).abs() < 1e-12);
    let one = x.slice(0..1).unwrap();
    let full = Err(Error::OutOfPages { needed: 1, free: 0, pages: 2 });
    assert_eq!(cache.append(&mut encoder, 0, &[(b, 1)], &one, &one), full);
    // A shared page that would be written needs a page of its own.
    let twin = cache.fork(a).unwrap();
    assert_eq!(cache.append(&mut encoder, 0, &[(twin, 1)], &one, &one), full);
    assert_eq!((cache.len(a), cache.len(b), cache.len(twin)), (Ok(PAGE + 1), Ok(0), Ok(PAGE + 1)));
    assert_eq!(cache.usage(), before);
}

/// Not even pages that a window would drop are gone.
#[test]
fn a_failing_append_changes_nothing() {
    let device = Device::cpu();
    let sinks = Sinks { positions: 5, codec: CodecPair::both(Codec::F16) };
    let config = CacheConfig::new(2, KV_HEADS, D).page_size(PAGE).capacity(8 * PAGE).sink_sequences(1);
    let config = config.kind_at(0, LayerKind::Window(WINDOW)).kind_at(1, LayerKind::Window(WINDOW)).sinks_at(1, sinks);
    let mut cache = KvCache::new(&device, config).unwrap();
    let (a, b) = (cache.add_sequence(), cache.add_sequence());
    let x = device.upload(&Rng(1).normals(60 * KV_HEADS * D), &[60, KV_HEADS, D]).unwrap();
    let rows = |n| x.slice(0..n).unwrap();
    let append = |cache: &mut KvCache, layer, tokens: &[_], x: &Buffer| {
        let mut encoder = device.encoder().unwrap();
        let result = cache.append(&mut encoder, layer, tokens, x, x);
        encoder.submit_and_wait().unwrap();
        result
    };
    for layer in 0..2 {
        append(&mut cache, layer, &[(a, 30)], &rows(30)).unwrap();
    }
    let twin = cache.fork(a).unwrap();
    let state = |cache: &mut KvCache| {
        let mut all = vec![];
        for (id, range) in [a, twin].into_iter().flat_map(|id| [(id, 5..30), (id, 0..5)]) {
            let out = device.zeros(DType::F32, &[range.len(), KV_HEADS, D]).unwrap();
            let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
            run(&device, |e| cache.dequantize(e, 1, Side::Key, id, range, domain, order, &out));
            all.push(out.read::<f32>().unwrap());
        }
        (cache.usage(), cache.free_pages(), all)
    };
    let before = state(&mut cache);
    // 4 pages are free; the window of `a` and of its fork leaves two each, which both hold.
    let full = append(&mut cache, 0, &[(a, 60)], &rows(60));
    assert!(matches!(full, Err(Error::OutOfPages { .. })), "{full:?}");
    assert_eq!(state(&mut cache), before);
    let both = append(&mut cache, 0, &[(a, 2), (twin, 40)], &rows(42));
    assert!(matches!(both, Err(Error::OutOfPages { .. })), "{both:?}");
    assert_eq!(state(&mut cache), before);
    // Pages were dropped and taken by then, a shared one would have been copied.
    let wrong = append(&mut cache, 0, &[(a, 2), (twin, 3)], &rows(4));
    assert!(matches!(wrong, Err(Error::Shape { .. })), "{wrong:?}");
    assert_eq!(state(&mut cache), before);
    // Room in the window's pages, but none for other sinks.
    let sinks = append(&mut cache, 1, &[(b, 3)], &rows(3));
    assert_eq!(sinks, Err(Error::OutOfPages { needed: 1, free: 0, pages: 1 }));
    assert_eq!(state(&mut cache), before);
    // What failed goes well where there is room.
    for layer in 0..2 {
        append(&mut cache, layer, &[(a, 2), (twin, 3)], &rows(5)).unwrap();
    }
    assert_eq!((cache.len(a), cache.len(twin)), (Ok(32), Ok(33)));
}

/// StreamingLLM: the first tokens and the newest ones, nothing between.
#[test]
fn sinks_stay_where_a_window_moves_on() {
    let device = Device::cpu();
    let sinks = Sinks { positions: 4, codec: CodecPair::both(Codec::F16) };
    let config = CacheConfig::new(1, KV_HEADS, D).kind_at(0, LayerKind::Window(WINDOW)).sinks(sinks).sink_sequences(1);
    let config = config.page_size(PAGE).capacity(4 * PAGE);
    // A page of two sides of f16 for four positions beside four pages of 4 bits and a scale.
    assert_eq!(config.bytes(), Ok(KV_HEADS * 2 * (4 * D * 2 + 4 * PAGE * (D / 2 + 2))));
    let mut cache = KvCache::new(&device, config).unwrap();
    let seq = cache.add_sequence();
    let x = device.upload(&Rng(1).normals(KV_HEADS * D), &[1, KV_HEADS, D]).unwrap();
    for _ in 0..200 {
        run(&device, |e| cache.append(e, 0, &[(seq, 1)], &x, &x));
    }
    let out = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    let mut decode = |position: usize| {
        let mut encoder = device.encoder().unwrap();
        let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
        cache.dequantize(&mut encoder, 0, Side::Key, seq, position, domain, order, &out)?;
        encoder.submit_and_wait()
    };
    for position in 0..200 {
        match decode(position) {
            Ok(()) => assert!(!(4..=200 - WINDOW - PAGE).contains(&position), "{position}"),
            Err(error) => {
                assert_eq!(error, Error::Positions { start: position, end: position + 1, first: 184, len: 200 });
                assert!((4..=200 - WINDOW).contains(&position), "{position}");
            }
        }
    }
    // In f16, not in 4 bits.
    decode(3).unwrap();
    let given = x.read::<f32>().unwrap();
    assert!(out.read::<f32>().unwrap().iter().zip(given).all(|(got, x)| *got == rounded(DType::F16, x)));
}

/// Without positions that the next token would see there is nothing that a window could have dropped.
#[test]
fn rolling_back_to_where_nothing_is_seen() {
    let device = Device::cpu();
    let sinks = Sinks { positions: 4, codec: CodecPair::both(Codec::F16) };
    let base = || CacheConfig::new(1, KV_HEADS, D).page_size(PAGE).capacity(20 * PAGE);
    let window = |w| base().kind_at(0, LayerKind::Window(w));
    let x = device.upload(&Rng(1).normals(40 * KV_HEADS * D), &[40, KV_HEADS, D]).unwrap();
    let q = device.upload(&Rng(2).normals(HEADS * D), &[1, HEADS, D]).unwrap();
    let append = |cache: &mut KvCache, seq, position: usize| {
        let x = x.slice(position..position + 1).unwrap();
        run(&device, |e| cache.append(e, 0, &[(seq, 1)], &x, &x));
    };
    let attended = |cache: &mut KvCache, seq, queries: usize| {
        let q = device.upload(&q.read::<f32>().unwrap().repeat(queries), &[queries, HEADS, D])?;
        let out = device.zeros(DType::F32, &[queries, HEADS, D])?;
        let mut encoder = device.encoder()?;
        cache.attend(&mut encoder, 0, &[(seq, queries)], &q, &out, None, &AttentionParams::for_head_dim(D))?;
        encoder.submit_and_wait()?;
        out.read::<f32>()
    };
    let full = |config: CacheConfig, rollback: usize| {
        let mut cache = KvCache::new(&device, config).unwrap();
        let seq = cache.add_sequence();
        (0..40).for_each(|i| append(&mut cache, seq, i));
        // The prefix first: it is what truncation leaves.
        let dir = tempfile::tempdir().unwrap();
        cache.save_prefix(seq, rollback, dir.path().join("prefix"), b"m").unwrap();
        cache.truncate(seq, rollback).unwrap();
        assert_eq!(cache.len(seq), Ok(rollback));
        let loaded = cache.load(dir.path().join("prefix"), b"m").unwrap()[0];
        assert_eq!(cache.len(loaded), Ok(rollback));
        (cache, [seq, loaded])
    };
    // From nothing on, as a new sequence; each step beside one that never went further.
    let goes_on = |cache: &mut KvCache, seqs: [SequenceId; 2], from: usize, until: usize| {
        let mut other = KvCache::new(&device, cache.config().clone()).unwrap();
        let fresh = other.add_sequence();
        (0..from).for_each(|i| append(&mut other, fresh, i));
        for i in from..until {
            append(&mut other, fresh, i);
            let want = attended(&mut other, fresh, 1).unwrap();
            for seq in seqs {
                append(cache, seq, i);
                assert_eq!(attended(cache, seq, 1).unwrap(), want, "position {i}");
            }
        }
    };
    for config in [window(4), window(1), base(), window(4).sinks(sinks), window(1).sinks(sinks)] {
        let (mut cache, seqs) = full(config, 0);
        assert_eq!(cache.usage().used, 0);
        assert!(cache.is_empty());
        goes_on(&mut cache, seqs, 0, 20);
    }
    for rollback in [35, 33, 32, 31, 16, 13, 1] {
        for config in [window(1), window(1).sinks(sinks)] {
            let (mut cache, seqs) = full(config.clone(), rollback);
            goes_on(&mut cache, seqs, rollback, rollback + 2);
            // The positions before are gone, though their page is there: nobody may see them.
            let out = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
            if rollback > 5 && rollback < 32 {
                for seq in seqs {
                    let early = attended(&mut cache, seq, 3);
                    assert!(matches!(early, Err(Error::Positions { first, .. }) if first >= rollback), "{early:?}");
                    let mut encoder = device.encoder().unwrap();
                    let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
                    let lost = cache.dequantize(&mut encoder, 0, Side::Key, seq, rollback - 1, domain, order, &out);
                    assert!(matches!(lost, Err(Error::Positions { first, .. }) if first >= rollback), "{lost:?}");
                }
            }
            for seq in seqs {
                cache.free_sequence(seq).unwrap();
            }
            assert_eq!(cache.usage().used, 0);
        }
    }
    // Where something is seen that was dropped, it is an error as ever.
    let mut cache = KvCache::new(&device, window(4)).unwrap();
    let seq = cache.add_sequence();
    (0..40).for_each(|i| append(&mut cache, seq, i));
    assert_eq!(cache.truncate(seq, 1), Err(Error::Positions { start: 0, end: 1, first: 32, len: 40 }));
}

/// A step gives what appending and attending by layer give, counts only when it is submitted, and says what it lacks.
#[test]
fn a_step_is_one_thing() {
    let device = Device::cpu();
    let (mut cache, mut other) = (KvCache::new(&device, config()).unwrap(), KvCache::new(&device, config()).unwrap());
    let params = AttentionParams::for_head_dim(D);
    let ids = [cache.add_sequence(), cache.add_sequence()];
    assert_eq!(ids, [other.add_sequence(), other.add_sequence()]);
    let mut rng = Rng(3);
    for tokens in [[11, 3], [1, 1], [1, 1], [9, 0], [1, 40], [1, 1]] {
        let n: usize = tokens.iter().sum();
        let tokens = [(ids[0], tokens[0]), (ids[1], tokens[1])];
        let mut input = |heads: usize| device.upload(&rng.normals(n * heads * D), &[n, heads, D]).unwrap();
        let all: Vec<_> = (0..LAYERS).map(|_| (input(KV_HEADS), input(KV_HEADS), input(HEADS))).collect();
        let outs = || -> Vec<_> {
            let new = |shape: &[usize]| device.zeros(DType::F32, shape).unwrap();
            (0..LAYERS).map(|_| (new(&[n, HEADS, D]), new(&[n, HEADS]))).collect()
        };
        let (got, want) = (outs(), outs());
        let mut encoder = device.encoder().unwrap();
        let mut step = cache.step(&tokens).unwrap();
        for (layer, (k, v, q)) in all.iter().enumerate() {
            let (out, lse) = &got[layer];
            if source(layer) != layer {
                let shared = Error::SharedLayer { layer, source_layer: source(layer) };
                assert_eq!(step.append(&mut encoder, layer, k, v), Err(shared));
                step.attend(&mut encoder, layer, q, out, Some(lse), &params).unwrap();
                continue;
            }
            // Before its keys are there nothing can be read.
            let early = step.attend(&mut encoder, layer, q, out, None, &params);
            assert!(matches!(early, Err(Error::Positions { .. })), "{early:?}");
            let short = k.slice(1..n).unwrap();
            assert!(matches!(step.append(&mut encoder, layer, &short, &short), Err(Error::Shape { .. })));
            step.append_and_attend(&mut encoder, layer, k, v, q, out, Some(lse), &params).unwrap();
        }
        step.submit(encoder).unwrap().wait().unwrap();
        run(&device, |e| {
            for (layer, (k, v, q)) in all.iter().enumerate() {
                if source(layer) == layer {
                    other.append(e, layer, &tokens, k, v)?;
                }
                other.attend(e, layer, &tokens, q, &want[layer].0, Some(&want[layer].1), &params)?;
            }
            Ok(())
        });
        for (layer, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.0.read::<f32>(), want.0.read::<f32>(), "layer {layer}");
            assert_eq!(got.1.read::<f32>(), want.1.read::<f32>(), "layer {layer}");
        }
        assert_eq!(cache.usage(), other.usage());
        assert_eq!((cache.len(ids[0]), cache.len(ids[1])), (other.len(ids[0]), other.len(ids[1])));
    }

    // What is missing is named, and nothing has changed, but that windows have dropped what no token sees any more.
    let (used, len) = (cache.usage().used, cache.len(ids[0]).unwrap());
    let x = device.zeros(DType::F32, &[2, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    let mut step = cache.step(&[(ids[0], 2)]).unwrap();
    step.append(&mut encoder, 0, &x, &x).unwrap();
    let missing = Error::UnevenLayers { sequence: number(ids[0]), layer: 1, got: len, expected: len + 2 };
    assert_eq!(step.submit(encoder).map(drop), Err(missing));
    let before = (cache.usage(), cache.len(ids[0]));
    assert!(before.0.used <= used && before.1 == Ok(len), "{before:?}");
    assert_eq!(cache.step(&[]).map(drop), Err(Error::Zero { what: "sequences of a batch" }));
    let twice = cache.step(&[(ids[0], 1), (ids[0], 1)]).map(drop);
    assert_eq!(twice, Err(Error::RepeatedSequence { got: number(ids[0]) }));
    assert!(matches!(cache.step(&[(ids[0], CAPACITY)]).map(drop), Err(Error::OutOfPages { .. })));
    assert_eq!((cache.usage(), cache.len(ids[0])), before);
    // A step cannot begin where appending by layer was left half done.
    let mut encoder = device.encoder().unwrap();
    cache.append(&mut encoder, 0, &[(ids[0], 2)], &x, &x).unwrap();
    assert!(matches!(cache.step(&[(ids[0], 1)]).map(drop), Err(Error::UnevenLayers { .. })));
    cache.truncate(ids[0], len).unwrap();
    assert_eq!((cache.usage(), cache.len(ids[0])), before);
}

/// Each layer is as the only one of a cache of its own, however different the others are.
#[test]
fn layers_may_differ_in_their_heads() {
    let device = Device::cpu();
    let (a, b, c) = (Heads::new(KV_HEADS, D), Heads::new(1, 64), Heads::new(4, 16));
    let window = LayerKind::Window(WINDOW);
    let sinks = Sinks { positions: 3, codec: CodecPair::both(Codec::F16) };
    let config = CacheConfig::new(5, KV_HEADS, D).page_size(PAGE).capacity(CAPACITY).sink_sequences(2);
    let config = config.heads_at(1, b).codec_at(1, "k8v8".parse().unwrap()).kind_at(2, LayerKind::Shared(1));
    let config = config.kind_at(3, window).heads_at(3, c).sinks_at(3, sinks).kind_at(4, window);
    let alone = |heads: Heads| {
        let config = CacheConfig::new(1, heads.kv_heads, heads.head_dim).page_size(PAGE).capacity(CAPACITY);
        config.sink_sequences(2)
    };
    let alone = [
        alone(a),
        alone(b).codec("k8v8".parse().unwrap()),
        alone(b).codec("k8v8".parse().unwrap()),
        alone(c).kind_at(0, window).sinks(sinks),
        alone(a).kind_at(0, window),
    ];
    let sum: usize = [0, 1, 3, 4].iter().map(|&layer| alone[layer].bytes().unwrap()).sum();
    assert_eq!(config.bytes(), Ok(sum));
    let mut cache = KvCache::new(&device, config.clone()).unwrap();
    assert_eq!(cache.bytes(), sum);
    let seq = cache.add_sequence();
    let mut alone: Vec<_> = alone
        .into_iter()
        .map(|config| {
            let mut cache = KvCache::new(&device, config).unwrap();
            let seq = cache.add_sequence();
            (cache, seq)
        })
        .collect();
    let mut rng = Rng(4);
    for n in [11, 1, 1, 20, 1, 9] {
        let mut encoder = device.encoder().unwrap();
        let mut step = cache.step(&[(seq, n)]).unwrap();
        let mut outs = vec![];
        let mut kv = vec![];
        for (layer, heads) in [a, b, b, c, a].into_iter().enumerate() {
            let mut input =
                |heads: usize, d: usize| device.upload(&rng.normals(n * heads * d), &[n, heads, d]).unwrap();
            let (kv_heads, d) = (heads.kv_heads, heads.head_dim);
            if layer != 2 {
                kv = vec![input(kv_heads, d), input(kv_heads, d)];
                step.append(&mut encoder, layer, &kv[0], &kv[1]).unwrap();
            }
            let (q, params) = (input(HEADS, d), AttentionParams::for_head_dim(d));
            let out = || device.zeros(DType::F32, &[n, HEADS, d]).unwrap();
            let (got, want) = (out(), out());
            step.attend(&mut encoder, layer, &q, &got, None, &params).unwrap();
            let (other, id) = &mut alone[layer];
            run(&device, |e| {
                other.append(e, 0, &[(*id, n)], &kv[0], &kv[1])?;
                other.attend(e, 0, &[(*id, n)], &q, &want, None, &params)
            });
            outs.push((got, want));
        }
        step.submit(encoder).unwrap().wait().unwrap();
        for (layer, (got, want)) in outs.iter().enumerate() {
            assert_eq!(got.read::<f32>(), want.read::<f32>(), "layer {layer}");
        }
    }
    // Keys of other layers do not fit, and what no kernel takes is refused before there is a cache.
    let mut step = cache.step(&[(seq, 1)]).unwrap();
    let x = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    assert!(matches!(step.append(&mut device.encoder().unwrap(), 1, &x, &x), Err(Error::Shape { .. })));
    let mismatch = |layer, heads: Heads| match config.clone().heads_at(layer, heads).bytes() {
        Err(Error::Mismatch { what, got, .. }) => (what, got),
        other => panic!("{other:?}"),
    };
    assert_eq!(mismatch(1, b.value_dim(32)), ("head_dim of the values", 32));
    assert_eq!(mismatch(2, a), ("kv_heads of a shared layer", KV_HEADS));
    assert_eq!(mismatch(2, Heads::new(1, 32)), ("head_dim of a shared layer", 32));
    assert_eq!(config.clone().heads_at(2, b).bytes(), Ok(sum));
    assert_eq!(config.clone().heads_at(5, b).bytes(), Err(Error::Layer { got: 5, layers: 5 }));
    assert_eq!(config.clone().heads_at(0, Heads::new(0, 32)).bytes(), Err(Error::Zero { what: "kv_heads" }));
}

#[test]
fn shared_and_unknown_layers_are_named() {
    let device = Device::cpu();
    let mut cache = KvCache::new(&device, config()).unwrap();
    let seq = cache.add_sequence();
    let x = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    let shared = Err(Error::SharedLayer { layer: 3, source_layer: 0 });
    assert_eq!(cache.append(&mut encoder, 3, &[(seq, 1)], &x, &x), shared);
    assert_eq!(
        cache.append(&mut encoder, LAYERS, &[(seq, 1)], &x, &x),
        Err(Error::Layer { got: LAYERS, layers: LAYERS })
    );
    let twice = [(seq, 1), (seq, 1)];
    assert_eq!(cache.append(&mut encoder, 0, &twice, &x, &x), Err(Error::RepeatedSequence { got: number(seq) }));
    for (kind, layer) in [(LayerKind::Shared(2), 2), (LayerKind::Shared(3), 2), (LayerKind::Window(0), 1)] {
        assert!(config().kind_at(layer, kind).bytes().is_err());
    }
    assert!(config().kind_at(3, LayerKind::Shared(1)).kind_at(1, LayerKind::Shared(0)).bytes().is_err());
    assert!(config().page_size(12).bytes().is_err());
    let ends = CacheConfig::new(6, 1, 64).codec_at_ends(1, CodecPair::both(tqkv::Codec::F16));
    let dense: Vec<bool> = (0..6).map(|l| ends.layer_codec(l).key.is_dense()).collect();
    assert_eq!(dense, [true, false, false, false, false, true]);
}
