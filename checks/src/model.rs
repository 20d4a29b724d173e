//! A plain model of a cache: it keeps every vector, does beside a cache what is done to it, and compares.

use crate::config::{D, HEADS, KV_HEADS, LAYERS, NEWEST, PAGE, channels, config};
use crate::step::{How, Step};
use crate::support::{Guarded, Rng, relative_error, rounded, run, upload};
use std::collections::HashMap;
use std::ops::Range;
use tqkv::cache::{LayerKind, RECENT_SLACK, Replay, Side, Usage};
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache, SequenceId, reference};

/// Sequences at once; a snapshot may bring two more.
const SEQUENCES: usize = 8;

/// In which of a layer's extents a row is read.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Extent {
    Own,
    Sinks,
    Newest,
}

/// Token, layer, side, extent.
type Key = (u64, usize, Side, Extent);

/// What a row decodes to.
struct Decoded {
    rotated: Vec<f32>,
    original: Vec<f32>,
}

/// A sequence as it should be.
#[derive(Clone)]
struct Sequence {
    id: SequenceId,
    tokens: Vec<u64>,
    /// From here on its newest positions are surely held apart.
    sure: usize,
}

/// A snapshot, and its sequences.
type Saved = (Vec<u8>, Vec<Sequence>);

/// A cache, and what should be in it.
pub struct Model {
    cache: KvCache,
    config: CacheConfig,
    sequences: Vec<Sequence>,
    next_token: u64,
    /// The last snapshot, and its sequences.
    saved: Option<Saved>,
    decoded: HashMap<Key, Decoded>,
}

impl Model {
    /// An empty cache.
    pub fn new(device: &Device) -> Model {
        let cache = KvCache::new(device, config()).expect("a small cache");
        Model { cache, config: config(), sequences: vec![], next_token: 0, saved: None, decoded: HashMap::new() }
    }

    /// How full the cache is.
    pub fn usage(&self) -> Usage {
        self.cache.usage()
    }

    /// Does a step on both sides.
    ///
    /// # Panics
    /// If they differ.
    pub fn run(&mut self, step: &Step) {
        // A long run does not keep what no sequence holds any more.
        if self.decoded.len() > 40_000 {
            self.decoded.clear();
        }
        let pick = |n: usize| (!self.sequences.is_empty()).then(|| n % self.sequences.len());
        match *step {
            Step::Add => {
                if self.sequences.len() < SEQUENCES {
                    let id = self.cache.add_sequence();
                    self.sequences.push(Sequence { id, tokens: vec![], sure: 0 });
                }
            }
            Step::Append(ref tokens, how) => self.append(tokens, how),
            Step::Save(prefix) => self.save(prefix),
            Step::Load => self.load(),
            Step::Attend(ref queries) => self.attend(queries),
            Step::Check(s) => drop(pick(s).map(|s| self.check(s))),
            Step::Fork(s) => {
                if let Some(s) = pick(s).filter(|_| self.sequences.len() < SEQUENCES) {
                    let id = self.cache.fork(self.sequences[s].id).expect("a known sequence");
                    self.sequences.push(Sequence { id, ..self.sequences[s].clone() });
                }
            }
            Step::Truncate(s, n) => {
                if let Some(s) = pick(s) {
                    let Sequence { id, tokens, .. } = &mut self.sequences[s];
                    let len = tokens.len().saturating_sub(n);
                    match self.cache.truncate(*id, len) {
                        Ok(()) => tokens.truncate(len),
                        Err(e) => expect_dropped(&e, len),
                    }
                }
            }
            Step::Free(s) => {
                if let Some(s) = pick(s) {
                    let Sequence { id, .. } = self.sequences.swap_remove(s);
                    self.cache.free_sequence(id).expect("a known sequence");
                    assert!(matches!(self.cache.len(id), Err(Error::UnknownSequence { .. })));
                }
            }
        }
    }

    /// Looks at everything and frees it: no page may be lost.
    ///
    /// # Panics
    /// If one is, or something differs.
    pub fn finish(mut self) {
        (0..self.sequences.len()).for_each(|s| self.check(s));
        for Sequence { id, .. } in self.sequences.drain(..) {
            self.cache.free_sequence(id).expect("a known sequence");
        }
        let usage = self.cache.usage();
        assert_eq!((usage.used, usage.free, usage.fragmentation), (0, usage.capacity, 0.0));
        assert_eq!(Ok(usage.capacity), self.config.bytes());
    }

    fn save(&mut self, prefix: Option<(usize, usize)>) {
        let mut saved = self.sequences.clone();
        if let Some((s, n)) = prefix {
            let Some(mut one) = saved.get(s % saved.len().max(1)).cloned() else { return };
            one.tokens.truncate(one.tokens.len().saturating_sub(n));
            saved = vec![one];
        }
        let lens: Vec<_> = saved.iter().map(|s| (s.id, s.tokens.len())).collect();
        let mut bytes = vec![];
        match self.cache.write_snapshot(&lens, &mut bytes, b"model") {
            Ok(()) => self.saved = Some((bytes, saved)),
            Err(e) => {
                assert!(prefix.is_some());
                expect_dropped(&e, lens[0].1);
            }
        }
    }

    fn load(&mut self) {
        let fits = |saved: &&Saved| self.sequences.len() + saved.1.len() <= SEQUENCES + 2;
        let Some((bytes, all)) = self.saved.as_ref().filter(fits).cloned() else { return };
        let before = self.cache.usage();
        match self.cache.read_snapshot(&bytes[..], b"model") {
            Ok(ids) => {
                // What was just written again must be the same bytes, whatever pages it now lies in.
                let lens: Vec<_> = ids.iter().zip(&all).map(|(&id, s)| (id, s.tokens.len())).collect();
                let mut again = vec![];
                self.cache.write_snapshot(&lens, &mut again, b"model").expect("what was loaded is saved");
                assert!(again == bytes, "another snapshot after loading");
                for (id, Sequence { tokens, sure, .. }) in ids.into_iter().zip(all) {
                    // What no later token sees is not stored, nor the rest of a page that was held in part.
                    let sure = sure.max(unseen(tokens.len())).next_multiple_of(PAGE);
                    self.sequences.push(Sequence { id, tokens, sure });
                }
            }
            Err(error) => {
                expect_full(&error);
                assert_eq!(self.cache.usage(), before);
            }
        }
    }

    /// Each sequence at most once.
    fn choose(&self, some: &[(usize, usize)]) -> Vec<(usize, usize)> {
        let mut chosen: Vec<(usize, usize)> = vec![];
        for &(s, n) in some {
            let s = s % self.sequences.len().max(1);
            if s < self.sequences.len() && chosen.iter().all(|(t, _)| *t != s) {
                chosen.push((s, n));
            }
        }
        chosen
    }

    fn append(&mut self, tokens: &[(usize, usize)], how: How) {
        let chosen = self.choose(tokens);
        if chosen.is_empty() {
            return;
        }
        // What a step may drop before it writes.
        for &(s, _) in &chosen {
            let Sequence { tokens, sure, .. } = &mut self.sequences[s];
            *sure = (*sure).max(unseen(tokens.len()));
        }
        let n: usize = chosen.iter().map(|t| t.1).sum();
        let new: Vec<u64> = (self.next_token..).take(n).collect();
        self.next_token += n as u64;
        let tokens: Vec<_> = chosen.iter().map(|&(s, n)| (self.sequences[s].id, n)).collect();
        let runs = match how {
            How::ByLayer => self.append_by_layer(&tokens, &new) as usize,
            How::Step => self.append_as_step(&tokens, &new, None) as usize,
            How::Abandoned(layers, submitted) => self.append_as_step(&tokens, &new, Some((layers, submitted))) as usize,
            How::Replay(runs) => self.replay(&tokens, &new, runs),
        };
        for _ in 0..runs {
            let mut new = new.iter();
            for &(s, n) in &chosen {
                let Sequence { tokens, sure, .. } = &mut self.sequences[s];
                *sure = (*sure).max(unseen(tokens.len()));
                tokens.extend(new.by_ref().take(n));
            }
        }
    }

    /// Keys and values of tokens in a layer.
    fn inputs(&self, layer: usize, tokens: &[u64]) -> [Buffer; 2] {
        [Side::Key, Side::Value].map(|side| {
            let all: Vec<f32> = tokens.iter().flat_map(|&t| vectors(t, layer, side)).collect();
            self.cache.device().upload(&all, &[tokens.len(), KV_HEADS, D]).expect("a small buffer")
        })
    }

    fn queries(&self, n: usize) -> [Buffer; 2] {
        let device = self.cache.device();
        let q = device.upload(&Rng(n as u64).normals(n * HEADS * D), &[n, HEADS, D]);
        [q, device.zeros(DType::F32, &[n, HEADS, D])].map(|buffer| buffer.expect("a small buffer"))
    }

    /// Whether there was room.
    fn append_by_layer(&mut self, tokens: &[(SequenceId, usize)], new: &[u64]) -> bool {
        let mut encoder = self.cache.device().encoder().expect("an encoder");
        let mut result = Ok(());
        let own: Vec<usize> = (0..LAYERS).filter(|&l| self.source(l) == l).collect();
        for layer in own {
            let [k, v] = self.inputs(layer, new);
            result = self.cache.append(&mut encoder, layer, tokens, &k, &v);
            if result.is_err() {
                break;
            }
        }
        encoder.submit_and_wait().expect("recorded work runs");
        if let Err(error) = &result {
            expect_full(error);
            // The step ends here; what the layers before took goes back.
            for (id, _) in tokens {
                let len = self.sequences.iter().find(|s| s.id == *id).map_or(0, |s| s.tokens.len());
                self.cache.truncate(*id, len).expect("what was not there before is taken back");
            }
        }
        result.is_ok()
    }

    /// Whether the tokens count.
    fn append_as_step(
        &mut self,
        tokens: &[(SequenceId, usize)],
        new: &[u64],
        abandoned: Option<(usize, bool)>,
    ) -> bool {
        let (before, n) = (self.cache.usage(), new.len());
        let layers = abandoned.map_or(LAYERS, |a| a.0);
        let inputs: Vec<_> = (0..layers).map(|layer| self.inputs(layer, new)).collect();
        let sources: Vec<_> = (0..layers).map(|layer| self.source(layer)).collect();
        let [q, out] = self.queries(n);
        let mut encoder = self.cache.device().encoder().expect("an encoder");
        let mut step = match self.cache.step(tokens) {
            Ok(step) => step,
            Err(error) => {
                expect_full(&error);
                return false;
            }
        };
        assert_eq!(step.tokens(), n);
        for (layer, [k, v]) in inputs.iter().enumerate() {
            if sources[layer] == layer {
                step.append(&mut encoder, layer, k, v).expect("a layer of its own");
            }
            let params = AttentionParams::for_head_dim(D);
            step.attend(&mut encoder, layer, &q, &out, None, &params).expect("after its source");
        }
        let Some((_, submitted)) = abandoned else {
            step.submit(encoder).and_then(|s| s.wait()).expect("recorded work runs");
            return true;
        };
        if submitted {
            encoder.submit_and_wait().expect("recorded work runs");
        }
        if layers < LAYERS && n > 0 {
            assert!(matches!(step.commit(), Err(Error::UnevenLayers { .. })));
        } else {
            drop(step);
        }
        let usage = self.cache.usage();
        // Pages that windows leave behind may be gone.
        assert!(if layers > 0 { usage.used <= before.used } else { usage == before });
        false
    }

    /// How many times there was room.
    fn replay(&mut self, tokens: &[(SequenceId, usize)], new: &[u64], runs: usize) -> usize {
        let inputs: Vec<_> = (0..LAYERS).map(|layer| self.inputs(layer, new)).collect();
        let sources: Vec<_> = (0..LAYERS).map(|layer| self.source(layer)).collect();
        let [q, out] = self.queries(new.len());
        let params = AttentionParams::for_head_dim(D);
        let mut replay = Replay::new(|step, encoder| {
            for (layer, [k, v]) in inputs.iter().enumerate() {
                if sources[layer] == layer {
                    step.append(encoder, layer, k, v)?;
                }
                step.attend(encoder, layer, &q, &out, None, &params)?;
            }
            Ok(())
        });
        for run in 0..runs {
            let before = self.cache.usage();
            match replay.run(&mut self.cache, tokens) {
                Ok(submission) => submission.wait().expect("recorded work runs"),
                Err(error) => {
                    expect_full(&error);
                    assert_eq!(self.cache.usage(), before);
                    return run;
                }
            }
        }
        runs
    }

    fn attend(&mut self, queries: &[(usize, usize)]) {
        let chosen: Vec<(Sequence, usize)> =
            self.choose(queries).into_iter().map(|(s, n)| (self.sequences[s].clone(), n)).collect();
        if chosen.is_empty() {
            return;
        }
        let chosen: Vec<_> = chosen.into_iter().map(|(s, n)| (n.min(s.tokens.len()), s)).collect();
        let (asked, n) = (chosen.iter().map(|(n, s)| (s.id, *n)).collect::<Vec<_>>(), chosen.iter().map(|c| c.0).sum());
        let device = self.cache.device().clone();
        // Kernels of CUDA differ by the type of queries.
        let dtype = if self.next_token.is_multiple_of(2) { DType::F32 } else { DType::F16 };
        let q: Vec<f32> = Rng(self.next_token).normals(n * HEADS * D).iter().map(|&x| rounded(dtype, x)).collect();
        let input = upload(&device, dtype, &q, &[n, HEADS, D]);
        let params = AttentionParams::for_head_dim(D);
        for layer in 0..LAYERS {
            let (out, lse) =
                (Guarded::new(&device, DType::F32, &[n, HEADS, D]), Guarded::new(&device, DType::F32, &[n, HEADS]));
            let mut encoder = device.encoder().expect("an encoder");
            let (to, log) = (&out.buffer, Some(&lse.buffer));
            match self.cache.attend(&mut encoder, layer, &asked, &input, to, log, &params) {
                Ok(()) => encoder.submit_and_wait().expect("recorded work runs"),
                // Queries from before the last step may look at what the window has dropped.
                Err(Error::Positions { start, first, .. }) if self.oldest(layer, 1000) > 0 && start < first => continue,
                Err(e) => panic!("{e}"),
            }
            let (out, lse) = (out.take(), lse.take());
            let mut rows = q.chunks(HEADS * D).zip(out.chunks(HEADS * D)).zip(lse.chunks(HEADS));
            for (n, sequence) in &chosen {
                self.decode_all(&sequence.tokens, layer);
                let len = sequence.tokens.len();
                for (own, ((q, out), lse)) in (len - n..len).zip(rows.by_ref()) {
                    self.expect_close(layer, sequence, own, dtype, [q, out, lse]);
                }
            }
        }
    }

    /// Compares the heads of one query at position `own`: its vectors, their results and their log-sum-exps.
    fn expect_close(&self, layer: usize, of: &Sequence, own: usize, dtype: DType, [q, out, lse]: [&[f32]; 3]) {
        let (newest, scale) = (self.newest(layer), f64::from(AttentionParams::for_head_dim(D).scale));
        // Results of extents are merged; newest positions that a sequence may have lost are read as all others.
        let merged = if self.newest(layer) > 0 { 2.0 } else { 1.0 };
        // In units of what is allowed.
        let error = |newest: usize| {
            let of_head = |head: usize| {
                let (q, out) = (&q[head * D..][..D], &out[head * D..][..D]);
                let seen = |side| self.seen(&of.tokens, layer, side, own, newest, head * KV_HEADS / HEADS);
                let query = reference::Query { q, scale, softcap: None, sink: None };
                let keys = seen(Side::Key);
                let (want, want_lse) = reference::attention(&query, &keys, &seen(Side::Value));
                let lse = (f64::from(lse[head]) - want_lse).abs() / want_lse.abs().max(1.0);
                relative_error(out, &want).max(lse)
                    / (merged * crate::tolerance(self.cache.device(), dtype, &query, &keys))
            };
            (0..HEADS).map(of_head).fold(0.0, f64::max)
        };
        let (apart, spared) = (error(newest), newest > 0 && own + 1 < of.sure + newest);
        assert!(
            apart <= 1.0 || (spared && error(0) <= 1.0),
            "layer {layer}, query {own} of {}, sure from {}: {apart:.2} of what is allowed",
            of.tokens.len(),
            of.sure
        );
    }

    /// The rows that a query at position `own` sees, of one KV head.
    fn seen(&self, tokens: &[u64], layer: usize, side: Side, own: usize, newest: usize, head: usize) -> Vec<&[f32]> {
        let (sinks, oldest) = (self.sinks(layer), self.oldest(layer, own));
        let positions = (0..=own).filter(|&p| p >= oldest || p < sinks);
        let row = |p: usize| {
            let extent = match () {
                () if p < sinks => Extent::Sinks,
                () if p + newest > own => Extent::Newest,
                () => Extent::Own,
            };
            &self.decoded[&(tokens[p], self.source(layer), side, extent)].original[head * D..][..D]
        };
        positions.map(row).collect()
    }

    /// Every position that must be there is there to the bit; every other is an error.
    fn check(&mut self, s: usize) {
        let Sequence { id, tokens, sure } = self.sequences[s].clone();
        let len = tokens.len();
        assert_eq!(self.cache.len(id), Ok(len));
        for layer in 0..LAYERS {
            self.decode_all(&tokens, layer);
            let sinks = self.sinks(layer);
            let start = self.oldest(layer, len).max(sinks).min(len);
            for side in [Side::Key, Side::Value] {
                self.check_rows(id, &tokens, (layer, side, Extent::Sinks), 0..sinks.min(len));
                self.check_rows(id, &tokens, (layer, side, Extent::Own), start..len);
                if self.newest(layer) > 0 {
                    self.check_rows(id, &tokens, (layer, side, Extent::Newest), sure.min(len)..len);
                }
                let mixed = (0 < sinks && sinks < len).then(|| sinks - 1..sinks + 1);
                for range in mixed.into_iter().chain(std::iter::once(len..len + 1)) {
                    let got = self.decode(id, (layer, side, Extent::Own), range);
                    assert!(matches!(got, Err(Error::Positions { .. })), "layer {layer}: {got:?}");
                }
            }
        }
    }

    fn check_rows(&mut self, id: SequenceId, tokens: &[u64], of: (usize, Side, Extent), range: Range<usize>) {
        let (layer, side, extent) = of;
        let got = self.decode(id, of, range.clone()).expect("held positions");
        // What a GPU's encoder may round otherwise is another test's matter.
        let most = if self.cache.device().info().kind == tqkv::compute::DeviceKind::Wgpu { 1 } else { 0 };
        for (got, position) in got.chunks(KV_HEADS * D).zip(range) {
            let want = &self.decoded[&(tokens[position], self.source(layer), side, extent)].rotated;
            let differ = got.iter().zip(want).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
            assert!(differ <= most, "layer {layer} {side:?} {extent:?} position {position}: {differ} elements differ");
        }
    }

    /// Positions as the cache decodes them.
    fn decode(
        &mut self,
        id: SequenceId,
        (layer, side, extent): (usize, Side, Extent),
        range: Range<usize>,
    ) -> Result<Vec<f32>, Error> {
        let device = self.cache.device().clone();
        let out = device.zeros(DType::F32, &[range.len(), KV_HEADS, D])?;
        let (mut encoder, domain, order) = (device.encoder()?, Domain::Rotated, RowOrder::TokenMajor);
        match extent {
            Extent::Newest => {
                self.cache.dequantize_recent(&mut encoder, layer, side, id, range, domain, order, &out)?;
            }
            _ => self.cache.dequantize(&mut encoder, layer, side, id, range, domain, order, &out)?,
        }
        encoder.submit_and_wait()?;
        out.read()
    }

    /// Sees to it that all rows of these tokens are in `decoded`.
    fn decode_all(&mut self, tokens: &[u64], layer: usize) {
        let layer = self.source(layer);
        for side in [Side::Key, Side::Value] {
            for (extent, first, end) in [
                (Extent::Own, 0, tokens.len()),
                (Extent::Sinks, 0, self.sinks(layer).min(tokens.len())),
                (Extent::Newest, 0, if self.newest(layer) > 0 { tokens.len() } else { 0 }),
            ] {
                let new = |t: &u64| !self.decoded.contains_key(&(*t, layer, side, extent));
                let missing: Vec<u64> = tokens[first..end].iter().copied().filter(new).collect();
                if !missing.is_empty() {
                    let rows = self.decode_apart(&missing, layer, side, extent);
                    self.decoded.extend(missing.into_iter().map(|t| (t, layer, side, extent)).zip(rows));
                }
            }
        }
    }

    /// What tokens' vectors decode to: by way of a pool of their own on the CPU.
    fn decode_apart(&self, tokens: &[u64], layer: usize, side: Side, extent: Extent) -> Vec<Decoded> {
        let (cpu, n) = (crate::targets::cpu(), tokens.len());
        let pair = match extent {
            Extent::Own => self.config.layer_codec(layer),
            Extent::Sinks => self.config.layer_sinks(layer).map_or(CodecPair::both(Codec::F16), |s| s.codec),
            Extent::Newest => self.config.layer_recent(layer).map_or(CodecPair::both(Codec::F16), |r| r.codec),
        };
        let codec = if side == Side::Key { pair.key } else { pair.value };
        let row = RowFormat::new(codec, D).expect("a codec of the configuration");
        let decode = || {
            let mut pool = PagePool::new(cpu, row, KV_HEADS, n, 1)?;
            if side == Side::Key && [0, 9].contains(&layer) {
                let (shift, scale) = channels();
                pool = pool.with_channels(&ChannelMap::new(cpu, KV_HEADS, D, &shift, &scale)?)?;
            }
            let batch = Batch::contiguous(cpu, n, 0, n, n)?;
            let all: Vec<f32> = tokens.iter().flat_map(|&t| vectors(t, layer, side)).collect();
            let x = cpu.upload(&all, &[n, KV_HEADS, D])?;
            run(cpu, |e| quantize(e, &[(&x, &pool)], &batch));
            let domains = [Domain::Rotated, Domain::Original].map(|domain| {
                let out = cpu.zeros(DType::F32, &[n, KV_HEADS, D])?;
                run(cpu, |e| dequantize(e, &pool, &batch, 0, 0..n, domain, RowOrder::TokenMajor, &out));
                out.read::<f32>()
            });
            let [rotated, original] = domains;
            Ok::<_, Error>((rotated?, original?))
        };
        let (rotated, original) = decode().expect("a small pool");
        let rows = rotated.chunks(KV_HEADS * D).zip(original.chunks(KV_HEADS * D));
        rows.map(|(rotated, original)| Decoded { rotated: rotated.into(), original: original.into() }).collect()
    }

    /// The layer whose positions a layer reads.
    fn source(&self, layer: usize) -> usize {
        if let LayerKind::Shared(source) = self.config.layer_kind(layer) { source } else { layer }
    }

    /// The oldest position, sinks apart, that a layer's query at `position` sees.
    fn oldest(&self, layer: usize, position: usize) -> usize {
        match self.config.layer_kind(self.source(layer)) {
            LayerKind::Window(window) => (position + 1).saturating_sub(window),
            _ => 0,
        }
    }

    /// How many first positions a layer keeps apart.
    fn sinks(&self, layer: usize) -> usize {
        self.config.layer_sinks(self.source(layer)).map_or(0, |s| s.positions)
    }

    /// How many newest positions a layer keeps apart.
    fn newest(&self, layer: usize) -> usize {
        self.config.layer_recent(self.source(layer)).map_or(0, |r| r.positions)
    }
}

/// The positions that the newest ones of a sequence of so many do not reach.
fn unseen(len: usize) -> usize {
    (len + 1).saturating_sub(NEWEST + RECENT_SLACK)
}

/// The vectors of a token: a function of its number, the layer and the side.
fn vectors(token: u64, layer: usize, side: Side) -> Vec<f32> {
    Rng(token * 32 + layer as u64 * 2 + (side == Side::Value) as u64).normals(KV_HEADS * D)
}

/// Rolling back to `len` may fail only because a window has dropped positions that the next token would see: there must be
/// some.
fn expect_dropped(error: &Error, len: usize) {
    let Error::Positions { start, first, .. } = *error else { panic!("{error}") };
    assert!(start < len && start < first, "{error}: nothing stands in the way of {len}");
}

/// Pages may run out, and only if they have.
fn expect_full(error: &Error) {
    let Error::OutOfPages { needed, free, .. } = *error else { panic!("{error}") };
    assert!(needed > free, "{error}");
}
