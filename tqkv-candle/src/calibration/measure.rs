//! Means and variances of a model's keys and queries, summed up while it runs over text.

use super::error::CalibrationError;
use super::{Calibration, Layer, Origin};
use crate::attention::Tap;
use crate::cache::SequenceCache;
use crate::error::{Error, Result};
use crate::models::Model;
use candle_core::{DType, Tensor};
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, PoisonError};
use tqkv::{Codec, CodecPair, Device};

/// The first positions of a text are left out: their keys are unlike all others (attention sinks) and are kept apart anyway.
const SKIP: usize = 4;

/// Tokens that run through the model at a time.
const CHUNK: usize = 512;

/// Channels count as at least so much of the average channel, so that none is scaled without bounds.
const FLOOR: f64 = 1e-3;

/// Sums over the positions of one layer, \[kv_heads, head_dim\] each.
#[derive(Clone, Default)]
struct Sums {
    positions: usize,
    keys: Vec<f64>,
    squared_keys: Vec<f64>,
    /// Of all queries of a KV head's group.
    squared_queries: Vec<f64>,
}

/// The sums of all layers, and how many of the next step's positions are to be left out.
#[derive(Default)]
struct Statistics {
    layers: Vec<Sums>,
    skip: usize,
    /// Query heads of a group, and elements of a head.
    group: usize,
    head_dim: usize,
}

impl Statistics {
    fn add(&mut self, layer: usize, q: &Tensor, k: &Tensor) -> Result<()> {
        let rows = |x: &Tensor| -> Result<Vec<f32>> {
            let x = x.to_device(&candle_core::Device::Cpu)?.to_dtype(DType::F32)?;
            let skip = self.skip.min(x.dim(0)?);
            Ok(x.narrow(0, skip, x.dim(0)? - skip)?.flatten_all()?.to_vec1()?)
        };
        let (q, k) = (rows(q)?, rows(k)?);
        let sums = &mut self.layers[layer];
        let width = sums.keys.len();
        for row in k.chunks_exact(width) {
            sums.positions += 1;
            for (i, &x) in row.iter().enumerate() {
                sums.keys[i] += f64::from(x);
                sums.squared_keys[i] += f64::from(x) * f64::from(x);
            }
        }
        for row in q.chunks_exact(width * self.group) {
            for (head, row) in row.chunks_exact(self.head_dim).enumerate() {
                let of_group = &mut sums.squared_queries[head / self.group * self.head_dim..][..self.head_dim];
                of_group.iter_mut().zip(row).for_each(|(sum, &x)| *sum += f64::from(x) * f64::from(x));
            }
        }
        Ok(())
    }
}

impl Tap for Arc<Mutex<Statistics>> {
    fn pass(&mut self, layer: usize, q: &Tensor, k: &Tensor, _v: &Tensor) -> Result<Option<[Tensor; 2]>> {
        self.lock().unwrap_or_else(PoisonError::into_inner).add(layer, q, k)?;
        Ok(None)
    }
}

impl Sums {
    fn new(width: usize) -> Self {
        let zeros = || vec![0.0; width];
        Self { positions: 0, keys: zeros(), squared_keys: zeros(), squared_queries: zeros() }
    }

    /// Shift and scale of the channels, for heads of `head_dim` with so many queries a group.
    fn finish(&self, kv_heads: usize, head_dim: usize, group: usize) -> Option<Layer> {
        let n = self.positions as f64;
        let mean: Vec<f64> = self.keys.iter().map(|sum| sum / n).collect();
        let variance = self.squared_keys.iter().zip(&mean).map(|(sum, mean)| (sum / n - mean * mean).max(0.0));
        let variance: Vec<f64> = variance.collect();
        let queries: Vec<f64> = self.squared_queries.iter().map(|sum| sum / (n * group as f64)).collect();
        let scale = variance.chunks(head_dim).zip(queries.chunks(head_dim)).flat_map(|(k, q)| head_scale(k, q));
        let scale: Vec<f32> = scale.map(|x| x as f32).collect();
        let shift: Vec<f32> = mean.iter().map(|&x| x as f32).collect();
        let finite = mean.iter().chain(&variance).chain(&queries).all(|x| x.is_finite());
        let usable = finite && shift.iter().all(|x| x.is_finite()) && scale.iter().all(|x| x.is_normal());
        usable.then_some(Layer { kv_heads, head_dim, shift: shift.into(), scale: scale.into() })
    }
}

/// √(rms k / rms q) of each channel of a head, from mean squares, with a factor that keeps the keys' length.
fn head_scale(keys: &[f64], queries: &[f64]) -> Vec<f64> {
    let average = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
    let (k_average, q_average) = (average(keys), average(queries));
    // A head that is always 0, or never asked, has no channels of different size.
    if !(k_average > f64::MIN_POSITIVE && q_average > f64::MIN_POSITIVE) {
        return vec![1.0; keys.len()];
    }
    let ratio = |(k, q): (&f64, &f64)| (k / k_average + FLOOR) / (q / q_average + FLOOR);
    let scale: Vec<f64> = keys.iter().zip(queries).map(|pair| ratio(pair).powf(0.25)).collect();
    let scaled: f64 = keys.iter().zip(&scale).map(|(k, scale)| k / (scale * scale)).sum();
    let factor = (scaled / keys.iter().sum::<f64>()).sqrt();
    scale.iter().map(|x| x * factor).collect()
}

/// Runs the model over pieces of text, with an uncompressed cache; see [`Calibration::measure`].
pub fn measure(
    model: &Model,
    pieces: &[Vec<u32>],
    origin: Origin,
    mut on_tokens: impl FnMut(usize) -> ControlFlow<()>,
) -> Result<Option<Calibration>> {
    let config = model.config();
    let longest = pieces.iter().map(Vec::len).max().unwrap_or(0);
    if longest <= SKIP {
        return Err(CalibrationError::Tokens { got: longest, expected: SKIP + 1 }.into());
    }
    if longest > config.max_position_embeddings {
        return Err(Error::ContextOverflow { got: longest, limit: config.max_position_embeddings });
    }
    let (kv_heads, head_dim) = (config.kv_heads, config.head_dim);
    let group = config.heads / kv_heads;
    let layers = vec![Sums::new(kv_heads * head_dim); config.layers];
    let statistics = Arc::new(Mutex::new(Statistics { layers, skip: 0, group, head_dim }));
    let cache_config = config.cache_config_for(1, longest, CHUNK).codec(CodecPair::both(Codec::F32));
    let mut cache = SequenceCache::new(&Device::cpu(), cache_config)?;
    cache.attention_mut().set_tap(statistics.clone());
    let lock = || statistics.lock().unwrap_or_else(PoisonError::into_inner);
    let mut done = 0;
    for piece in pieces {
        cache.truncate(0)?;
        for (i, chunk) in piece.chunks(CHUNK).enumerate() {
            lock().skip = SKIP.saturating_sub(i * CHUNK);
            model.forward(chunk, &mut cache)?;
            done += chunk.len();
            if on_tokens(done).is_break() {
                return Ok(None);
            }
        }
    }
    let layer = |(layer, sums): (usize, &Sums)| {
        sums.finish(kv_heads, head_dim, group).ok_or_else(|| CalibrationError::Statistics { layer }.into())
    };
    let layers = lock().layers.iter().enumerate().map(layer).collect::<Result<Vec<_>>>()?;
    Ok(Some(Calibration { origin: Origin { tokens: done, ..origin }, layers, plan: None }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_the_roots_of_the_ratio_and_keep_the_length() {
        // rms of keys 1, 4, 2, 1 and of queries 1, 1, 2, 4: √(ratio) is 1, 2, 1, 0.5.
        let (keys, queries) = ([1.0, 16.0, 4.0, 1.0], [1.0, 1.0, 4.0, 16.0]);
        let scale = head_scale(&keys, &queries);
        for (i, expected) in [1.0, 2.0, 1.0, 0.5].into_iter().enumerate() {
            // The floor changes little.
            assert!((scale[i] / scale[0] / expected - 1.0).abs() < 2e-3, "{scale:?}");
        }
        let length: f64 = keys.iter().zip(&scale).map(|(k, s)| k / (s * s)).sum();
        assert!((length - 22.0).abs() < 1e-9, "{length}");
        assert_eq!(head_scale(&[0.0; 2], &[1.0; 2]), [1.0; 2]);
        assert_eq!(head_scale(&[1.0; 2], &[0.0; 2]), [1.0; 2]);
        // A channel that is always the same is no reason for a scale of 0.
        assert!(head_scale(&[0.0, 1.0], &[1.0, 0.0]).iter().all(|s| s.is_finite() && *s > 0.01));
    }

    #[test]
    fn sums_give_means_and_leave_the_first_positions_out() {
        let mut statistics = Statistics { layers: vec![Sums::new(2)], skip: 1, group: 2, head_dim: 2 };
        let device = &candle_core::Device::Cpu;
        let k = Tensor::new(&[[[1e6f32, 1e6]], [[601.0, 1.0]], [[599.0, -1.0]]], device).unwrap();
        let q = Tensor::new(&[[[9f32, 9.0], [9.0, 9.0]], [[1.0, 2.0], [1.0, 2.0]], [[1.0, 2.0], [-1.0, 2.0]]], device);
        statistics.add(0, &q.unwrap(), &k).unwrap();
        let layer = statistics.layers[0].finish(1, 2, 2).unwrap();
        assert_eq!(*layer.shift, [600.0, 0.0]);
        // Keys of variance 1 both, queries of mean squares 1 and 4.
        let expected = 4f32.powf(0.25);
        assert!((layer.scale[0] / layer.scale[1] / expected - 1.0).abs() < 2e-3, "{:?}", layer.scale);
    }

    #[test]
    fn statistics_that_are_not_finite_make_no_layer() {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut sums = Sums { positions: 1, ..Sums::new(2) };
            sums.keys[1] = bad;
            assert!(sums.finish(1, 2, 1).is_none());
        }
    }
}
