//! Random schedules against a plain model that keeps every vector.

use super::*;

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
