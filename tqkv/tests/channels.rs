//! Keys whose channels are shifted and scaled ([`ChannelMap`]), on every backend.

mod support;

use support::*;
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, Codec, DType, Device, Error, reference};

/// A map whose shifts are several times what keys vary by, and whose scales lie over some octaves.
struct Map {
    shift: Vec<f32>,
    scale: Vec<f32>,
    map: ChannelMap,
}

impl Map {
    fn new(device: &Device, rng: &mut Rng, kv_heads: usize, d: usize) -> Map {
        let shift: Vec<f32> = rng.normals(kv_heads * d).iter().map(|x| 3.0 * x).collect();
        let scale: Vec<f32> = (0..kv_heads * d).map(|_| 2f32.powf(4.0 * rng.unit() as f32 - 2.0)).collect();
        let map = ChannelMap::new(device, kv_heads, d, &shift, &scale).unwrap();
        Map { shift, scale, map }
    }

    /// What is stored of keys, [tokens, kv_heads, d].
    fn stored(&self, keys: &[f32]) -> Vec<f32> {
        let channels = (0..self.shift.len()).cycle();
        keys.iter().zip(channels).map(|(k, i)| (k - self.shift[i]) * (1.0 / self.scale[i])).collect()
    }
}

fn bytes(buffer: &Buffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.read_bytes(&mut bytes).unwrap();
    bytes
}

/// Codec and head_dim of keys.
const ROWS: [(Codec, usize); 12] = [
    (Codec::tq(2), 64),
    (Codec::tq(3), 96),
    (Codec::tq(4), 128),
    (Codec::tq(5), 80),
    (Codec::tq(8), 128),
    (Codec::tq(4), 20),
    (Codec::tq(4), 256),
    (Codec::seed(4), 128),
    (Codec::seed(5), 512),
    (Codec::F16, 64),
    (Codec::F16, 20),
    (Codec::F32, 128),
];

fn what_is_stored_is_the_mapped_key(device: &Device) {
    let mut rng = Rng(41);
    for (codec, d) in ROWS {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let (kv_heads, tokens) = (3, 37);
            let row = RowFormat::new(codec, d).unwrap();
            let map = Map::new(device, &mut rng, kv_heads, d);
            let keys: Vec<f32> = rng.normals(tokens * kv_heads * d).iter().map(|&x| rounded(dtype, x)).collect();
            let values = upload(device, dtype, &rng.normals(tokens * kv_heads * d), &[tokens, kv_heads, d]);
            let batch = Batch::contiguous(device, 64, 0, tokens, tokens).unwrap();
            let pool = || PagePool::new(device, row, kv_heads, 64, 1).unwrap();
            let (mapped, plain) = (pool().with_channels(&map.map).unwrap(), pool());
            let (value, value_beside) = (pool(), pool());
            let given = upload(device, dtype, &keys, &[tokens, kv_heads, d]);
            let before = device.upload(&map.stored(&keys), &[tokens, kv_heads, d]).unwrap();
            run(device, |e| {
                quantize(e, &[(&given, &mapped), (&values, &value)], &batch)?;
                quantize(e, &[(&before, &plain)], &batch)?;
                quantize(e, &[(&values, &value_beside)], &batch)
            });
            for (a, b) in [(&mapped, &plain), (&value, &value_beside)] {
                assert!(bytes(a.codes()) == bytes(b.codes()), "{codec} D={d} {dtype}: codes");
                assert!(a.scales().map(bytes) == b.scales().map(bytes), "{codec} D={d} {dtype}: scales");
            }
            // And back: the stored rows are the same, and in the original domain the map is undone.
            let read = |pool: &PagePool, domain, order| {
                let dim = if domain == Domain::Original { d } else { row.row_dim() };
                let n = 9;
                let shape = if order == RowOrder::TokenMajor { [n, kv_heads, dim] } else { [kv_heads, n, dim] };
                let out = Guarded::new(device, DType::F32, &shape);
                run(device, |e| dequantize(e, pool, &batch, 0, 5..14, domain, order, &out.buffer));
                out.take()
            };
            let order = RowOrder::TokenMajor;
            assert!(read(&mapped, Domain::Rotated, order) == read(&plain, Domain::Rotated, order));
            for order in [RowOrder::TokenMajor, RowOrder::HeadMajor] {
                let (got, stored) = (read(&mapped, Domain::Original, order), read(&plain, Domain::Original, order));
                for (r, (got, stored)) in got.chunks(d).zip(stored.chunks(d)).enumerate() {
                    let head = if order == RowOrder::TokenMajor { r % kv_heads } else { r / 9 };
                    let want: Vec<f64> = stored
                        .iter()
                        .zip(&map.scale[head * d..])
                        .zip(&map.shift[head * d..])
                        .map(|((&x, &scale), &shift)| x as f64 * scale as f64 + shift as f64)
                        .collect();
                    assert!(relative_error(got, &want) < 1e-6, "{codec} D={d} {dtype} {order:?} row {r}");
                }
            }
        }
    }
}

/// Options of attention.
#[derive(Clone, Copy, Debug)]
struct Options {
    group: usize,
    q: DType,
    out: DType,
    lens: &'static [(usize, usize)],
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: bool,
}

const PLAIN: Options = Options {
    group: 4,
    q: DType::F32,
    out: DType::F32,
    lens: &[(75, 1), (5, 5), (300, 3)],
    window: None,
    softcap: None,
    sinks: false,
};

fn attention_is_that_of_the_keys_as_they_came(device: &Device) {
    let half = Options { q: DType::F16, out: DType::F16, ..PLAIN };
    let options = [
        PLAIN,
        half,
        Options { q: DType::BF16, ..half },
        Options { softcap: Some(4.0), sinks: true, ..PLAIN },
        Options { softcap: Some(4.0), ..half },
        Options { sinks: true, group: 1, window: Some(20), ..half },
        Options { sinks: true, group: 9, ..PLAIN },
        Options { lens: &[(3000, 1)], ..half },
        Options { lens: &[(3000, 1)], sinks: true, ..PLAIN },
        Options { lens: &[(130, 130)], sinks: true, ..half },
    ];
    let mut rng = Rng(42);
    let mut worst = (0.0, String::new());
    for (codec, d) in ROWS {
        for options in options {
            let name = format!("{codec} D={d} {options:?}");
            let error = attend(device, &mut rng, codec, d, options, &name);
            if error > worst.0 {
                worst = (error, name);
            }
        }
    }
    println!("largest share of the tolerance {:.2}: {}", worst.0, worst.1);
}

/// Checks one case; gives the largest error as a share of what it may be.
fn attend(device: &Device, rng: &mut Rng, codec: Codec, d: usize, o: Options, name: &str) -> f64 {
    let (kv_heads, page_size) = (2, 16);
    let heads = kv_heads * o.group;
    let row = RowFormat::new(codec, d).unwrap();
    let map = Map::new(device, rng, kv_heads, d);
    let pages_of = |len: usize| len.div_ceil(page_size);
    let pages: usize = o.lens.iter().map(|l| pages_of(l.0)).sum();
    let pool = || PagePool::new(device, row, kv_heads, page_size, pages).unwrap();
    let (key, value) = (pool().with_channels(&map.map).unwrap(), pool());
    // Filled in one go, so that all of it is new once.
    let mut tables: Vec<Vec<u32>> = vec![];
    let mut next = 0;
    for &(len, _) in o.lens {
        tables.push((next..next + pages_of(len) as u32).rev().collect());
        next += pages_of(len) as u32;
    }
    let batch = |new: &dyn Fn(usize) -> usize| {
        let spans = o.lens.iter().zip(&tables).enumerate();
        let spans: Vec<_> = spans.map(|(s, (&(len, _), pages))| Span { first: 0, len, new: new(s), pages }).collect();
        Batch::new(device, page_size, &spans).unwrap()
    };
    let all = batch(&|s| o.lens[s].0);
    let total = all.tokens();
    let mean = map.shift.clone();
    let keys: Vec<f32> = (0..total)
        .flat_map(|_| {
            rng.normals(kv_heads * d)
                .into_iter()
                .enumerate()
                .map(|(i, x)| mean[i] + map.scale[i] * x)
                .collect::<Vec<_>>()
        })
        .collect();
    let values = rng.normals(total * kv_heads * d);
    let shape = [total, kv_heads, d];
    let (k, v) = (device.upload(&keys, &shape).unwrap(), device.upload(&values, &shape).unwrap());
    let queries = batch(&|s| o.lens[s].1);
    let tokens = queries.tokens();
    let q: Vec<f32> = rng.normals(tokens * heads * d).iter().map(|&x| rounded(o.q, 0.3 * x)).collect();
    let sinks = rng.normals(heads);
    let mut params = AttentionParams::for_head_dim(d);
    (params.window, params.softcap) = (o.window, o.softcap);
    params.sink_logits = o.sinks.then(|| device.upload(&sinks, &[heads]).unwrap());
    let input = upload(device, o.q, &q, &[tokens, heads, d]);
    let (out, lse) =
        (Guarded::new(device, o.out, &[tokens, heads, d]), Guarded::new(device, DType::F32, &[tokens, heads]));
    run(device, |e| {
        quantize(e, &[(&k, &key), (&v, &value)], &all)?;
        attention(e, &input, &key, &value, &queries, &params, &out.buffer, Some(&lse.buffer))
    });
    // The judge sees what the cache gives back, key by key.
    let decoded = |pool: &PagePool, s: usize| {
        let n = o.lens[s].0;
        let out = device.zeros(DType::F32, &[n, kv_heads, d]).unwrap();
        run(device, |e| dequantize(e, pool, &all, s, 0..n, Domain::Original, RowOrder::TokenMajor, &out));
        download(&out)
    };
    let (out, lse) = (out.take(), lse.take());
    // Scores lose what f32 and half types lose of q·shift, which is larger than what they vary by.
    let tolerance = attention_tolerance(device, o.q, o.out);
    let (mut token, mut worst) = (0, 0f64);
    for (s, &(len, new)) in o.lens.iter().enumerate() {
        let (keys, values) = (decoded(&key, s), decoded(&value, s));
        let rows = |x: &'_ [f32], head: usize, p: usize| x[(p * kv_heads + head) * d..][..d].to_vec();
        for i in 0..new {
            // Of many queries some.
            if new > 8 && i % 29 != 0 {
                token += 1;
                continue;
            }
            let own = len - new + i;
            let start = o.window.map_or(0, |w| (own + 1).saturating_sub(w));
            for (head, &sink) in sinks.iter().enumerate() {
                let keys: Vec<_> = (start..=own).map(|p| rows(&keys, head / o.group, p)).collect();
                let values: Vec<_> = (start..=own).map(|p| rows(&values, head / o.group, p)).collect();
                let r = token * heads + head;
                let query = reference::Query {
                    q: &q[r * d..][..d],
                    scale: params.scale as f64,
                    softcap: o.softcap.map(f64::from),
                    sink: o.sinks.then_some(sink as f64),
                };
                let (keys, values): (Vec<&[f32]>, Vec<&[f32]>) =
                    (keys.iter().map(|k| &k[..]).collect(), values.iter().map(|v| &v[..]).collect());
                let (want, want_lse) = reference::attention(&query, &keys, &values);
                let error = relative_error(&out[r * d..][..d], &want) / tolerance;
                assert!(error <= 1.0, "{name}: sequence {s} query {i} head {head}: {error} of {tolerance:e}");
                let lse_error = (lse[r] as f64 - want_lse).abs() / want_lse.abs().max(1.0) / tolerance;
                assert!(lse_error <= 1.0, "{name}: sequence {s} query {i} head {head}: lse {} {want_lse}", lse[r]);
                worst = worst.max(error).max(lse_error);
            }
            token += 1;
        }
    }
    worst
}

fn maps_that_do_not_fit_are_refused(device: &Device) {
    let map = |shift: &[f32], scale: &[f32]| ChannelMap::new(device, 2, 16, shift, scale);
    let (zeros, ones) = (vec![0.0; 32], vec![1.0; 32]);
    assert!(matches!(map(&zeros[1..], &ones), Err(Error::Shape { what: "shift", .. })));
    assert!(matches!(map(&zeros, &ones[1..]), Err(Error::Shape { what: "scale", .. })));
    assert!(matches!(ChannelMap::new(device, 0, 16, &[], &[]), Err(Error::Zero { what: "kv_heads" })));
    assert!(matches!(ChannelMap::new(device, 2, 0, &[], &[]), Err(Error::Zero { what: "head_dim" })));
    let with = |at: &[f32], x: f32| [&at[..31], &[x]].concat();
    for x in [f32::NAN, f32::INFINITY] {
        assert!(matches!(map(&with(&zeros, x), &ones), Err(Error::Parameter { name: "shift", .. })), "shift {x}");
    }
    for x in [f32::NAN, f32::INFINITY, 0.0, -1.0, 1e-40, 3e38] {
        let name = "scale of a channel";
        assert!(
            matches!(map(&zeros, &with(&ones, x)), Err(Error::Parameter { name: n, .. }) if n == name),
            "scale {x}"
        );
    }
    let map = map(&zeros, &ones).unwrap();
    let row = |d| RowFormat::new(Codec::tq(4), d).unwrap();
    let pool = |d, kv_heads| PagePool::new(device, row(d), kv_heads, 8, 1).unwrap();
    assert!(matches!(pool(32, 2).with_channels(&map), Err(Error::Shape { what: "channels", .. })));
    assert!(matches!(pool(16, 1).with_channels(&map), Err(Error::Shape { what: "channels", .. })));
    let other = PagePool::new(&Device::cpu(), row(16), 2, 8, 1).unwrap();
    assert!(
        *device == Device::cpu()
            || matches!(other.with_channels(&map), Err(Error::WrongDevice { what: "channels", .. }))
    );

    let (plain, mapped) = (pool(16, 2), pool(16, 2).with_channels(&map).unwrap());
    let batch = Batch::contiguous(device, 8, 0, 4, 1).unwrap();
    let buffer = || device.zeros(DType::F32, &[1, 2, 16]).unwrap();
    let (q, out) = (buffer(), buffer());
    let mut e = device.encoder().unwrap();
    let mut params = AttentionParams::for_head_dim(16);
    let refused = attention(&mut e, &q, &plain, &mapped, &batch, &params, &out, None);
    assert!(matches!(refused, Err(Error::Channels { what: "values", .. })));
    params.domain = Domain::Rotated;
    let refused = attention(&mut e, &q, &mapped, &plain, &batch, &params, &out, None);
    assert!(matches!(refused, Err(Error::Channels { what: "keys", .. })));
}

suite!(cpu, wgpu, cuda: (
    what_is_stored_is_the_mapped_key, attention_is_that_of_the_keys_as_they_came, maps_that_do_not_fit_are_refused,
));
