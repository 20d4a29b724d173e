//! Layers that store their newest positions apart, and sinks and shifted channels with them, against rows chosen one by one.

mod support;

use support::*;
use tqkv::cache::{LayerKind, RECENT_SLACK, Recent, Sinks};
use tqkv::compute::DeviceKind;
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache, SequenceId, reference};

const D: usize = 64;
const KV_HEADS: usize = 2;
const HEADS: usize = 6;
const NEWEST: usize = 12;
const SINKS: usize = 5;
/// Window of each layer.
const WINDOWS: [Option<usize>; 4] = [None, Some(40), Some(9), None];

fn pair(name: &str) -> CodecPair {
    name.parse().unwrap()
}

/// Main rows, sinks and newest of each layer, as far as it has them; the first layer's keys are shifted and scaled.
fn config(capacity: usize) -> CacheConfig {
    let recent = Recent { positions: NEWEST, codec: pair("k8v8") };
    let channels = channels();
    let mut config = CacheConfig::new(WINDOWS.len(), KV_HEADS, D)
        .codec(pair("k3v3"))
        .page_size(8)
        .capacity(capacity)
        .recent(recent)
        .recent_at(3, Recent { positions: 0, ..recent })
        .sinks(Sinks { positions: SINKS, codec: CodecPair::both(Codec::F16) })
        .sinks_at(2, Sinks { positions: 0, codec: pair("k8v8") })
        .channels_at(0, channels.0, channels.1);
    for (layer, window) in WINDOWS.iter().enumerate() {
        config = config.kind_at(layer, window.map_or(LayerKind::Full, LayerKind::Window));
    }
    config
}

fn channels() -> (Vec<f32>, Vec<f32>) {
    let mut rng = Rng(77);
    let scale = (0..KV_HEADS * D).map(|_| 2f32.powf(2.0 * rng.unit() as f32 - 1.0)).collect();
    (rng.normals(KV_HEADS * D), scale)
}

/// Keys and values of a position, the same whenever it is asked for.
fn token(seed: u64) -> [Vec<f32>; 2] {
    let mut rng = Rng(seed.wrapping_mul(0x9e37_79b9) + 5);
    [rng.normals(KV_HEADS * D), rng.normals(KV_HEADS * D)]
}

/// What a codec gives back of tokens, [tokens, KV_HEADS, D], by way of a pool of its own.
fn through(codec: Codec, x: &[f32], map: bool) -> Vec<f32> {
    let device = Device::cpu();
    let n = x.len() / KV_HEADS / D;
    let row = RowFormat::new(codec, D).unwrap();
    let mut pool = PagePool::new(&device, row, KV_HEADS, n, 1).unwrap();
    if map {
        let (shift, scale) = channels();
        pool = pool.with_channels(&ChannelMap::new(&device, KV_HEADS, D, &shift, &scale).unwrap()).unwrap();
    }
    let batch = Batch::contiguous(&device, n, 0, n, n).unwrap();
    let (given, out) =
        (device.upload(x, &[n, KV_HEADS, D]).unwrap(), device.zeros(DType::F32, &[n, KV_HEADS, D]).unwrap());
    run(&device, |e| {
        quantize(e, &[(&given, &pool)], &batch)?;
        dequantize(e, &pool, &batch, 0, 0..n, Domain::Original, RowOrder::TokenMajor, &out)
    });
    download(&out)
}

/// A sequence as it should be.
#[derive(Clone)]
struct Model {
    id: SequenceId,
    tokens: Vec<u64>,
    /// From here on its newest positions are surely held.
    sure: usize,
}

/// Keys and values of all tokens as main rows, sinks and newest rows give them, by layer.
struct Rows {
    own: [Vec<f32>; 2],
    sinks: [Vec<f32>; 2],
    newest: [Vec<f32>; 2],
}

impl Rows {
    fn of(tokens: &[u64], layer: usize) -> Rows {
        let all: [Vec<f32>; 2] = [0, 1].map(|side| tokens.iter().flat_map(|&t| token(t)[side].clone()).collect());
        let of = |codec: CodecPair| [through(codec.key, &all[0], layer == 0), through(codec.value, &all[1], false)];
        Rows { own: of(pair("k3v3")), sinks: of(CodecPair::both(Codec::F16)), newest: of(pair("k8v8")) }
    }

    /// The rows of a query's positions, for a KV head.
    fn seen(&self, side: usize, layer: usize, query: usize, recent: bool, head: usize) -> Vec<&[f32]> {
        let sinks = if layer == 2 { 0 } else { SINKS };
        let newest = if layer == 3 || !recent { 0 } else { NEWEST };
        let oldest = WINDOWS[layer].map_or(0, |window| (query + 1).saturating_sub(window));
        let positions = (0..=query).filter(|&p| p < sinks || p >= oldest);
        let rows = positions.map(|p| match () {
            () if p < sinks => (&self.sinks, p),
            () if p + newest > query => (&self.newest, p),
            () => (&self.own, p),
        });
        rows.map(|(rows, p)| &rows[side][(p * KV_HEADS + head) * D..][..D]).collect()
    }
}

/// Checks the newest `new` queries of some sequences in all layers.
fn check(device: &Device, cache: &mut KvCache, rng: &mut Rng, models: &[(&Model, usize)], dtype: DType) {
    let n: usize = models.iter().map(|m| m.1).sum();
    let q: Vec<f32> = rng.normals(n * HEADS * D).iter().map(|&x| rounded(dtype, x)).collect();
    let input = upload(device, dtype, &q, &[n, HEADS, D]);
    let params = AttentionParams::for_head_dim(D);
    for layer in 0..WINDOWS.len() {
        let (out, lse) =
            (Guarded::new(device, DType::F32, &[n, HEADS, D]), Guarded::new(device, DType::F32, &[n, HEADS]));
        let queries: Vec<_> = models.iter().map(|(model, new)| (model.id, *new)).collect();
        run(device, |e| cache.attend(e, layer, &queries, &input, &out.buffer, Some(&lse.buffer), &params));
        let (out, lse) = (out.take(), lse.take());
        let mut token = 0;
        for &(model, new) in models {
            let len = model.tokens.len();
            let rows = Rows::of(&model.tokens, layer);
            for query in len - new..len {
                let must = query + 1 >= model.sure + NEWEST;
                let error = |recent: bool| {
                    let errors = (0..HEADS).map(|head| {
                        let r = token * HEADS + head;
                        let seen = |side| rows.seen(side, layer, query, recent, head / (HEADS / KV_HEADS));
                        let query = reference::Query {
                            q: &q[r * D..][..D],
                            scale: params.scale as f64,
                            softcap: None,
                            sink: None,
                        };
                        let (want, want_lse) = reference::attention(&query, &seen(0), &seen(1));
                        let lse = (lse[r] as f64 - want_lse).abs() / want_lse.abs().max(1.0);
                        relative_error(&out[r * D..][..D], &want).max(lse)
                    });
                    errors.fold(0.0, f64::max)
                };
                let most = 2.0 * attention_tolerance(device, dtype, DType::F32);
                let (newest, own) = (error(true), error(false));
                assert!(
                    newest <= most || (!must && own <= most),
                    "layer {layer}, query {query} of {len}, {new} new, sure from {}: {newest:e}, {own:e} with own rows",
                    model.sure
                );
                token += 1;
            }
        }
    }
}

/// Appends the same new tokens in all layers.
fn append(device: &Device, cache: &mut KvCache, tokens: &[(SequenceId, Vec<u64>)]) -> Result<(), Error> {
    let n: usize = tokens.iter().map(|t| t.1.len()).sum();
    let side = |side: usize| {
        let x: Vec<f32> = tokens.iter().flat_map(|t| &t.1).flat_map(|&t| token(t)[side].clone()).collect();
        device.upload(&x, &[n, KV_HEADS, D]).unwrap()
    };
    let (k, v) = (side(0), side(1));
    let counts: Vec<_> = tokens.iter().map(|t| (t.0, t.1.len())).collect();
    let mut encoder = device.encoder()?;
    let mut step = cache.step(&counts)?;
    for layer in 0..WINDOWS.len() {
        step.append(&mut encoder, layer, &k, &v)?;
    }
    step.submit(encoder)?.wait()
}

fn random_schedules(device: &Device) {
    let seeds = if device.info().kind == DeviceKind::Cpu { 6 } else { 1 };
    (91..91 + seeds).for_each(|seed| random_schedule(device, Rng(seed)));
}

fn random_schedule(device: &Device, mut rng: Rng) {
    let mut cache = KvCache::new(device, config(4000)).unwrap();
    let mut models = vec![Model { id: cache.add_sequence(), tokens: vec![], sure: 0 }];
    let mut next = 0;
    for turn in 0..60 {
        let at = rng.below(models.len());
        match rng.below(8) {
            0 if models.len() < 4 => {
                let id = cache.fork(models[at].id).unwrap();
                models.push(Model { id, ..models[at].clone() });
            }
            1 | 2 => {
                let len = models[at].tokens.len();
                // Windows of 40 refuse what they have dropped.
                let keep = len - rng.below(len.min(if turn % 3 == 0 { 150 } else { 20 }) + 1);
                if cache.truncate(models[at].id, keep).is_ok() {
                    models[at].tokens.truncate(keep);
                }
            }
            3 if turn % 5 == 0 => {
                // Through a file into another cache, which goes on in its place.
                let mut file = vec![];
                let saved: Vec<_> = models.iter().map(|m| (m.id, m.tokens.len())).collect();
                cache.write_snapshot(&saved, &mut file, b"m").unwrap();
                cache = KvCache::new(device, config(4000)).unwrap();
                let ids = cache.read_snapshot(&file[..], b"m").unwrap();
                models.iter_mut().zip(ids).for_each(|(model, id)| model.id = id);
                // Of a page that was held in part nothing is stored.
                models.iter_mut().for_each(|model| model.sure = model.sure.max(model.sure.next_multiple_of(8)));
            }
            _ => {
                let mut batch: Vec<(SequenceId, Vec<u64>)> = vec![];
                let both = rng.below(2) == 0;
                for (i, model) in models.iter_mut().enumerate() {
                    if i != at && !both {
                        continue;
                    }
                    let new = [1, 1, 3, 17, 33][rng.below(5)];
                    let tokens: Vec<u64> = (next..next + new).collect();
                    next += new;
                    // Those that a step may drop before it writes.
                    model.sure = model.sure.max((model.tokens.len() + 1).saturating_sub(NEWEST + RECENT_SLACK));
                    model.tokens.extend(&tokens);
                    batch.push((model.id, tokens));
                }
                append(device, &mut cache, &batch).unwrap();
                let queries: Vec<_> =
                    batch.iter().map(|(id, new)| (models.iter().find(|m| m.id == *id).unwrap(), new.len())).collect();
                let dtype = if turn % 2 == 0 { DType::F32 } else { DType::F16 };
                check(device, &mut cache, &mut rng, &queries, dtype);
            }
        }
    }
    assert!(next > 300, "{next} tokens");
}

/// A truncated sequence goes on as the one that never had those tokens, to the last bit, up to the slack; then its own rows serve.
fn truncation_within_the_slack_makes_no_difference(device: &Device) {
    for (cut, same) in [(1, true), (RECENT_SLACK, true), (RECENT_SLACK + NEWEST + 30, false)] {
        let mut cache = KvCache::new(
            device,
            CacheConfig::new(1, KV_HEADS, D)
                .page_size(8)
                .codec(pair("k2v2"))
                .recent(Recent { positions: NEWEST, codec: pair("k8v8") }),
        )
        .unwrap();
        let (a, b) = (cache.add_sequence(), cache.add_sequence());
        let feed = |cache: &mut KvCache, id, range: std::ops::Range<u64>| {
            for t in range {
                let side = |side: usize| device.upload(&token(t)[side], &[1, KV_HEADS, D]).unwrap();
                run(device, |e| cache.append(e, 0, &[(id, 1)], &side(0), &side(1)));
            }
        };
        let len = 200u64;
        feed(&mut cache, a, 0..len);
        cache.truncate(a, len as usize - cut).unwrap();
        feed(&mut cache, b, 0..len - cut as u64);
        let q = device.upload(&Rng(3).normals(HEADS * D), &[1, HEADS, D]).unwrap();
        let attend = |cache: &mut KvCache, id| {
            let out = Guarded::new(device, DType::F32, &[1, HEADS, D]);
            let params = AttentionParams::for_head_dim(D);
            run(device, |e| cache.attend(e, 0, &[(id, 1)], &q, &out.buffer, None, &params));
            out.take()
        };
        assert_eq!(attend(&mut cache, a) == attend(&mut cache, b), same, "{cut} tokens cut");
        feed(&mut cache, a, 1000..1000 + NEWEST as u64);
        feed(&mut cache, b, 1000..1000 + NEWEST as u64);
        assert!(attend(&mut cache, a) == attend(&mut cache, b), "{cut} tokens cut, {NEWEST} later");
    }
}

fn what_does_not_fit_is_said(device: &Device) {
    // More new tokens than there is room for as newest, while there is room for them as such.
    let recent = Recent { positions: 4, codec: pair("k8v8") };
    let base = CacheConfig::new(1, KV_HEADS, D).page_size(8).capacity(400).recent(recent).recent_capacity(104);
    let mut cache = KvCache::new(device, base.clone()).unwrap();
    let id = cache.add_sequence();
    let x = |n: usize| device.zeros(DType::F32, &[n, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    let refused = cache.append(&mut encoder, 0, &[(id, 105)], &x(105), &x(105));
    assert!(matches!(refused, Err(Error::OutOfPages { .. })), "{refused:?}");
    assert_eq!((cache.len(id), cache.usage().used), (Ok(0), 0));
    for _ in 0..20 {
        cache.append(&mut encoder, 0, &[(id, 16)], &x(16), &x(16)).unwrap();
    }
    assert_eq!(cache.len(id), Ok(320));
    // Snapshots keep caches apart that differ in what they store, or in how keys are shifted.
    let mut file = vec![];
    encoder.submit_and_wait().unwrap();
    cache.write_snapshot(&[(id, 320)], &mut file, b"m").unwrap();
    let ones = vec![1.0; KV_HEADS * D];
    for other in [
        base.clone().recent(Recent { positions: 5, ..recent }),
        base.clone().recent(Recent { codec: pair("k4v8"), ..recent }),
        base.clone().recent(Recent { positions: 0, ..recent }),
        base.clone().channels_at(0, ones.clone(), ones.clone()),
    ] {
        let refused = KvCache::new(device, other).unwrap().read_snapshot(&file[..], b"m");
        assert!(matches!(refused, Err(Error::Geometry { .. })), "{refused:?}");
    }
    assert!(KvCache::new(device, base.clone()).unwrap().read_snapshot(&file[..], b"m").is_ok());
    let short = base.clone().channels_at(0, ones[1..].to_vec(), ones.clone()).bytes();
    assert!(matches!(short, Err(Error::Shape { what: "shift", .. })), "{short:?}");
    let shared = CacheConfig::new(2, KV_HEADS, D).kind_at(1, LayerKind::Shared(0)).channels_at(1, ones.clone(), ones);
    assert!(matches!(shared.bytes(), Err(Error::SharedLayer { layer: 1, source_layer: 0 })));
    let none = base.recent_capacity(0).bytes();
    assert!(matches!(none, Err(Error::Zero { what: "recent_capacity" })), "{none:?}");
}

suite!(cpu, wgpu, cuda: (
    random_schedules, truncation_within_the_slack_makes_no_difference, what_does_not_fit_is_said,
));
