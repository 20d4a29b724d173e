//! `Attention` with tensors as a user's model has them: any float type, views, several sequences.

use candle_core::{DType, Device, Tensor};
use tqkv::ops::AttentionParams;
use tqkv::{CacheConfig, SequenceId};
use tqkv_candle::{Attention, Error, Result};

const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 32;

fn attention() -> Attention {
    Attention::new(&tqkv::Device::cpu(), CacheConfig::new(1, KV_HEADS, DIM).codec("f32".parse().unwrap())).unwrap()
}

/// A step of the only layer.
fn forward(attention: &mut Attention, new: &[(SequenceId, usize)], [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
    let mut step = attention.step(new)?;
    let out = step.forward(0, q, k, v, &AttentionParams::for_head_dim(DIM))?;
    step.commit()?;
    Ok(out)
}

fn tensor(seed: u32, tokens: usize, heads: usize) -> Tensor {
    let values = (0..tokens * heads * DIM).map(|i| ((i as f32 + seed as f32 * 0.37) * 12.9898).sin());
    Tensor::from_iter(values, &Device::Cpu).unwrap().reshape((tokens, heads, DIM)).unwrap()
}

/// Causal attention of one sequence, as candle's own operations write it.
fn obvious(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let tokens = q.dim(0).unwrap();
    let wide = |x: &Tensor| {
        let x = x.unsqueeze(2).unwrap().broadcast_as((tokens, KV_HEADS, HEADS / KV_HEADS, DIM)).unwrap();
        x.reshape((tokens, HEADS, DIM)).unwrap().transpose(0, 1).unwrap().contiguous().unwrap()
    };
    let q = q.transpose(0, 1).unwrap().contiguous().unwrap();
    let scores = (q.matmul(&wide(k).t().unwrap()).unwrap() / (DIM as f64).sqrt()).unwrap();
    let mask: Vec<f32> =
        (0..tokens * tokens).map(|i| if i % tokens > i / tokens { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (tokens, tokens), &Device::Cpu).unwrap();
    let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask).unwrap()).unwrap();
    weights.matmul(&wide(v)).unwrap().transpose(0, 1).unwrap().contiguous().unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let a = a.to_dtype(DType::F32).unwrap();
    (a - b).unwrap().abs().unwrap().max_all().unwrap().to_scalar().unwrap()
}

#[test]
fn every_float_type_and_views() {
    let (q, k, v) = (tensor(1, 9, HEADS), tensor(2, 9, KV_HEADS), tensor(3, 9, KV_HEADS));
    let expected = obvious(&q, &k, &v);
    for (dtype, bound) in [(DType::F32, 1e-5), (DType::F16, 2e-3), (DType::BF16, 2e-2)] {
        let mut attention = attention();
        let sequence = attention.cache_mut().add_sequence();
        // Views: rows of a larger tensor, and a transposed one.
        let q = Tensor::cat(&[&tensor(9, 2, HEADS), &q], 0).unwrap().to_dtype(dtype).unwrap().narrow(0, 2, 9).unwrap();
        let turn = |x: &Tensor| x.transpose(0, 1).unwrap().contiguous().unwrap().transpose(0, 1).unwrap();
        let (k, v) = (turn(&k).to_dtype(dtype).unwrap(), turn(&v).to_dtype(dtype).unwrap());
        let part = |x: &Tensor, start, len| x.narrow(0, start, len).unwrap();
        let mut parts = vec![];
        for (start, len) in [(0, 5), (5, 1), (6, 3)] {
            let (q, k, v) = (part(&q, start, len), part(&k, start, len), part(&v, start, len));
            parts.push(forward(&mut attention, &[(sequence, len)], [&q, &k, &v]).unwrap());
        }
        let out = Tensor::cat(&parts, 0).unwrap();
        assert_eq!((out.dtype(), out.dims()), (dtype, &[9, HEADS, DIM][..]));
        let difference = difference(&out, &expected);
        assert!(difference < bound, "{dtype:?}: {difference}");
    }
}

#[test]
fn sequences_side_by_side() {
    let mut attention = attention();
    let ids = [attention.cache_mut().add_sequence(), attention.cache_mut().add_sequence()];
    let texts = [3, 6].map(|n| (tensor(n, n as usize, HEADS), tensor(n + 1, n as usize, KV_HEADS)));
    let both = |pick: fn(&(Tensor, Tensor)) -> &Tensor| Tensor::cat(&[pick(&texts[0]), pick(&texts[1])], 0).unwrap();
    let (q, k) = (both(|t| &t.0), both(|t| &t.1));
    let out = forward(&mut attention, &[(ids[0], 3), (ids[1], 6)], [&q, &k, &k]).unwrap();
    for ((q, k), (start, len)) in texts.iter().zip([(0, 3), (3, 6)]) {
        assert!(difference(&out.narrow(0, start, len).unwrap(), &obvious(q, k, k)) < 1e-5);
    }
}

#[test]
fn what_does_not_fit_is_an_error_and_changes_nothing() {
    let mut attention = attention();
    let sequence = attention.cache_mut().add_sequence();
    let (q, k) = (tensor(1, 2, HEADS), tensor(2, 2, KV_HEADS));
    let integers = Tensor::zeros((2, HEADS, DIM), DType::U32, &Device::Cpu).unwrap();
    let result = forward(&mut attention, &[(sequence, 2)], [&integers, &k, &k]);
    assert!(matches!(result, Err(Error::TensorType { got: DType::U32 })));
    // More tokens than named, queries of another width after the keys were stored, a step given up, no layer.
    assert!(matches!(forward(&mut attention, &[(sequence, 3)], [&q, &k, &k]), Err(Error::Cache(_))));
    assert!(matches!(forward(&mut attention, &[(sequence, 2)], [&tensor(1, 2, 3), &k, &k]), Err(Error::Cache(_))));
    assert!(matches!(forward(&mut attention, &[(sequence, 2)], [&q, &q, &k]), Err(Error::Cache(_))));
    let mut step = attention.step(&[(sequence, 2)]).unwrap();
    let error = step.forward(1, &q, &k, &k, &AttentionParams::for_head_dim(DIM)).unwrap_err();
    let message = error.to_string();
    drop(step);
    assert!(matches!(attention.step(&[(sequence, 2)]).unwrap().commit(), Err(Error::Cache(_))));
    assert_eq!((attention.cache().len(sequence).unwrap(), attention.cache().usage().used), (0, 0));
    // The same errors where a model's functions return candle's results.
    let candle: candle_core::Error = error.into();
    assert!(candle.to_string().contains(&message), "{candle}");
}
