//! A decoding step of all layers, as an engine sees it: by the clock of the host, and what of it is recording and what is the device.

use super::check::{floats, largest, relative, views};
use super::meter::{Limit, Measurement, Meter, StepTimes, Timing};
use super::operations::{FILL, attention_tolerance};
use super::shape::Shape;
use anyhow::Result;
use std::time::Instant;
use tqkv::cache::{CacheCodec, Replay, Side, Step};
use tqkv::ops::{AttentionParams, Domain, RowOrder};
use tqkv::{Buffer, CacheConfig, CodecPair, CommandEncoder, DType, KvCache, SequenceId, reference};

/// Steps that are timed, and those before them.
const STEPS: usize = 41;
const WARM: usize = 5;

/// A cache at the shape's context, and one token a sequence for it.
struct Model<'a> {
    meter: &'a Meter,
    shape: &'a Shape,
    codec: CacheCodec,
    cache: KvCache,
    /// The new tokens.
    tokens: Vec<(SequenceId, usize)>,
    /// Lengths before the step.
    lens: Vec<usize>,
    layers: Layers,
}

/// A step's buffers, the same for every token.
struct Layers {
    k: Buffer,
    v: Buffer,
    q: (Vec<f32>, Buffer),
    /// One a layer.
    out: Vec<Buffer>,
    params: AttentionParams,
}

impl Layers {
    fn record(&self, step: &mut Step, encoder: &mut CommandEncoder) -> tqkv::Result<()> {
        let Layers { k, v, q, out, params } = self;
        let mut layers = out.iter().enumerate();
        layers.try_for_each(|(layer, out)| step.append_and_attend(encoder, layer, k, v, &q.1, out, None, params))
    }
}

/// The median, in milliseconds, of what `step` takes, which says so in seconds.
fn median(mut step: impl FnMut() -> Result<f64>) -> Result<f64> {
    let mut times = (0..WARM + STEPS).map(|_| step()).collect::<Result<Vec<_>>>()?.split_off(WARM);
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2] * 1e3)
}

impl Meter {
    /// `append` and `attend` of every layer as one step, one new token a sequence.
    pub fn step(&self, codec: CacheCodec, shape: &Shape, layers: usize) -> Result<()> {
        let mut model = Model::new(self, codec, shape, layers)?;
        let mut recording = vec![];
        let ms_wall = median(|| {
            let started = Instant::now();
            let Model { cache, layers, tokens, .. } = &mut model;
            let (mut step, mut encoder) = (cache.step(tokens)?, self.device.encoder()?);
            layers.record(&mut step, &mut encoder)?;
            recording.push(started.elapsed().as_secs_f64());
            step.submit(encoder)?.wait()?;
            let waited = started.elapsed().as_secs_f64();
            model.roll_back()?;
            Ok(waited)
        })?;
        let mut recording = recording.into_iter();
        let ms_record = median(|| Ok(recording.next().unwrap_or(0.0)))?;
        // Apart from the others: a device may time a graph, or between timestamps, and neither is what an engine submits.
        let ms_device = median(|| {
            let Model { cache, layers, tokens, .. } = &mut model;
            let (mut step, mut encoder) = (cache.step(tokens)?, self.device.encoder()?);
            layers.record(&mut step, &mut encoder)?;
            step.commit()?;
            let time = encoder.submit_and_time()?;
            model.roll_back()?;
            Ok(time.as_secs_f64())
        })?;
        let (ms_replay, error) = model.replay()?;
        let times = StepTimes { layers, ms_wall, ms_record, ms_device, ms_replay };
        let measurement = Measurement {
            op: "step",
            shape: shape.to_string(),
            codec: codec.to_string(),
            timing: Timing { seconds: ms_wall / 1e3, sustained: None, clock: None },
            bytes: model.bytes()?,
            limit: Limit::Read,
            error,
            tolerance: attention_tolerance(self.query_dtype()),
            products: None,
        };
        self.report_step(measurement, times)
    }
}

impl<'a> Model<'a> {
    fn new(meter: &'a Meter, codec: CacheCodec, shape: &'a Shape, layers: usize) -> Result<Self> {
        let lens: Vec<usize> = shape.lens().iter().map(|len| len - 1).collect();
        let page_size = 64;
        // The pages of the longest, for each sequence: so lengths may differ.
        let capacity = shape.lens().iter().map(|len| len.div_ceil(page_size) * page_size).sum();
        let config = CacheConfig::new(layers, shape.kv_heads, shape.head_dim)
            .cache_codec(codec)
            .page_size(page_size)
            .capacity(capacity)
            .recent_capacity(capacity);
        let cache = KvCache::new(&meter.device, config)?;
        let one = |seed, heads| meter.vectors(seed, &[shape.batch, heads, shape.head_dim], meter.query_dtype());
        let ((_, k), (_, v), q) = (one(5, shape.kv_heads)?, one(6, shape.kv_heads)?, one(7, shape.heads)?);
        let zeros = || meter.device.zeros(meter.query_dtype(), &[shape.batch, shape.heads, shape.head_dim]);
        let out = (0..layers).map(|_| zeros()).collect::<tqkv::Result<_>>()?;
        let params = AttentionParams::for_head_dim(shape.head_dim);
        let layers = Layers { k, v, q, out, params };
        let mut model = Model { meter, shape, codec, cache, tokens: vec![], lens, layers };
        model.tokens = (0..shape.batch).map(|_| (model.cache.add_sequence(), 1)).collect();
        model.fill()?;
        Ok(model)
    }

    /// Every sequence with vectors that begin somewhere else in a stretch of random ones.
    fn fill(&mut self) -> Result<()> {
        let tokens = FILL / 2;
        let (_, x) =
            self.meter.vectors(1, &[FILL, self.shape.kv_heads, self.shape.head_dim], self.meter.query_dtype())?;
        let mut at = 0;
        for (i, &(sequence, _)) in self.tokens.iter().enumerate() {
            for start in (0..self.lens[i]).step_by(tokens) {
                let n = tokens.min(self.lens[i] - start);
                let mut encoder = self.meter.device.encoder()?;
                for layer in 0..self.layers.out.len() {
                    let mut part = || {
                        at = (at + 977) % tokens;
                        x.slice(at..at + n)
                    };
                    let (k, v) = (part()?, part()?);
                    self.cache.append(&mut encoder, layer, &[(sequence, n)], &k, &v)?;
                }
                encoder.submit_and_wait()?;
            }
        }
        Ok(())
    }

    /// A step that is recorded once and replayed, where the device does that; and how far the last one's outputs are off.
    fn replay(&mut self) -> Result<(Option<f64>, f64)> {
        let Model { cache, layers, tokens, lens, .. } = self;
        let mut replay = Replay::new(|step, encoder| layers.record(step, encoder));
        let ms = median(|| {
            let started = Instant::now();
            replay.run(cache, tokens)?.wait()?;
            let waited = started.elapsed().as_secs_f64();
            roll_back(cache, tokens, lens)?;
            Ok(waited)
        })?;
        let ms = replay.is_recorded().then_some(ms);
        replay.run(cache, tokens)?.wait()?;
        drop(replay);
        Ok((ms, self.error()?))
    }

    fn roll_back(&mut self) -> tqkv::Result<()> {
        roll_back(&mut self.cache, &self.tokens, &self.lens)
    }

    /// What must be read and written: the caches, and a token's vectors.
    fn bytes(&self) -> Result<usize> {
        let row = |codec| Ok::<_, tqkv::Error>(tqkv::format::RowFormat::new(codec, self.shape.head_dim)?.bytes());
        let position =
            |pair: CodecPair| Ok::<_, tqkv::Error>(self.shape.kv_heads * (row(pair.key)? + row(pair.value)?));
        let CacheCodec { all, sinks, recent, .. } = self.codec;
        let mut cached = 0;
        for len in self.shape.lens() {
            let first = sinks.map_or(0, |s| s.positions.min(len));
            let newest = recent.map_or(0, |r| r.positions.min(len - first));
            cached += (len - first - newest) * position(all)?;
            cached += first * sinks.map_or(Ok(0), |s| position(s.codec))?;
            cached += newest * recent.map_or(Ok(0), |r| position(r.codec))?;
        }
        Ok(self.layers.out.len()
            * (cached + self.layers.k.bytes() + self.layers.v.bytes() + 2 * self.layers.q.1.bytes()))
    }

    /// How far the outputs of the first and the last layer are off, in the first and the last sequence, for two heads each.
    fn error(&mut self) -> Result<f64> {
        let (heads, d) = (self.shape.heads, self.shape.head_dim);
        let mut errors = vec![];
        for layer in [0, self.layers.out.len() - 1] {
            let out = floats(&self.layers.out[layer])?;
            for (i, head) in [(0, 0), (self.shape.batch - 1, heads - 1)] {
                let kv_head = head / (heads / self.shape.kv_heads);
                let (k, v) = (self.rows(layer, Side::Key, i)?, self.rows(layer, Side::Value, i)?);
                let n = self.lens[i] + 1;
                let of_head = |rows: &[f32]| -> Vec<Vec<f32>> {
                    rows[kv_head * n * d..][..n * d].chunks(d).map(<[f32]>::to_vec).collect()
                };
                let (k, v) = (of_head(&k), of_head(&v));
                let at = (i * heads + head) * d;
                let query = reference::Query {
                    q: &self.layers.q.0[at..at + d],
                    scale: f64::from(self.layers.params.scale),
                    softcap: None,
                    sink: None,
                };
                let (expected, _) = reference::attention(&query, &views(&k), &views(&v));
                errors.push(relative(&out[at..at + d], expected));
            }
        }
        Ok(largest(errors))
    }

    /// What the newest query of a sequence reads of a layer, decoded: [kv_heads, positions, head_dim].
    fn rows(&mut self, layer: usize, side: Side, i: usize) -> Result<Vec<f32>> {
        let (n, d) = (self.lens[i] + 1, self.shape.head_dim);
        let first = self.codec.sinks.map_or(0, |s| s.positions.min(n));
        let newest = self.codec.recent.map_or(0, |r| r.positions.min(n - first));
        let mut all = vec![0.0; self.shape.kv_heads * n * d];
        for (range, recent) in [(0..first, false), (first..n - newest, false), (n - newest..n, true)] {
            let out = self.meter.device.zeros(DType::F32, &[self.shape.kv_heads, range.len(), d])?;
            let mut encoder = self.meter.device.encoder()?;
            let (sequence, domain, order) = (self.tokens[i].0, Domain::Original, RowOrder::HeadMajor);
            let cache = &mut self.cache;
            match recent {
                true if newest > 0 => {
                    cache.dequantize_recent(&mut encoder, layer, side, sequence, range.clone(), domain, order, &out)?;
                }
                _ => cache.dequantize(&mut encoder, layer, side, sequence, range.clone(), domain, order, &out)?,
            }
            encoder.submit_and_wait()?;
            let rows = out.read::<f32>()?;
            for head in 0..self.shape.kv_heads {
                let part = &rows[head * range.len() * d..][..range.len() * d];
                all[(head * n + range.start) * d..][..part.len()].copy_from_slice(part);
            }
        }
        Ok(all)
    }
}

fn roll_back(cache: &mut KvCache, tokens: &[(SequenceId, usize)], lens: &[usize]) -> tqkv::Result<()> {
    tokens.iter().zip(lens).try_for_each(|(token, &len)| cache.truncate(token.0, len))
}
