//! A candle model of your own on a tqkv cache: what changes is its attention.
//!
//! ```text
//! cargo run --release -p tqkv-candle --example own_model
//! ```

use candle_core::{DType, Device, Result, Tensor};
use candle_nn::{Linear, Module, RmsNorm, VarBuilder, VarMap, linear_no_bias, rms_norm};
use tqkv::{CacheConfig, SequenceId, ops::AttentionParams};
use tqkv_candle::Attention;

const LAYERS: usize = 4;
const HEADS: usize = 8;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 64;
const WIDTH: usize = HEADS * HEAD_DIM;

struct Layer {
    norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
}

struct OwnModel(Vec<Layer>);

impl OwnModel {
    fn new(vb: &VarBuilder) -> Result<Self> {
        let layer = |i: usize| {
            let vb = vb.pp(i);
            Ok(Layer {
                norm: rms_norm(WIDTH, 1e-6, vb.pp("norm"))?,
                q: linear_no_bias(WIDTH, WIDTH, vb.pp("q"))?,
                k: linear_no_bias(WIDTH, KV_HEADS * HEAD_DIM, vb.pp("k"))?,
                v: linear_no_bias(WIDTH, KV_HEADS * HEAD_DIM, vb.pp("v"))?,
                out: linear_no_bias(WIDTH, WIDTH, vb.pp("out"))?,
            })
        };
        Ok(Self((0..LAYERS).map(layer).collect::<Result<_>>()?))
    }

    /// `x`, `[tokens, WIDTH]`, are new tokens of one sequence.
    fn forward(&self, x: &Tensor, attention: &mut Attention, sequence: SequenceId) -> Result<Tensor> {
        let (mut x, tokens) = (x.clone(), x.dim(0)?);
        let mut step = attention.step(&[(sequence, tokens)])?;
        for (i, layer) in self.0.iter().enumerate() {
            let normed = layer.norm.forward(&x)?;
            let heads = |y: Tensor, heads: usize| y.reshape((tokens, heads, HEAD_DIM));
            let q = heads(layer.q.forward(&normed)?, HEADS)?; // Here a model with positions rotates q and k.
            let k = heads(layer.k.forward(&normed)?, KV_HEADS)?;
            let v = heads(layer.v.forward(&normed)?, KV_HEADS)?;
            let params = AttentionParams::for_head_dim(HEAD_DIM);
            let attended = step.forward(i, &q, &k, &v, &params)?;
            x = (x + layer.out.forward(&attended.reshape((tokens, WIDTH))?)?)?;
        }
        step.commit()?;
        Ok(x)
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let variables = VarMap::new();
    let model = OwnModel::new(&VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu))?;
    let tokens = Tensor::randn(0f32, 1.0, (100, WIDTH), &Device::Cpu)?;

    // The same tokens through a cache of f32 and one of 5 and 4 bits: first a prompt, then one token after the other.
    let mut outputs = vec![];
    for codec in ["f32", "k5v4"] {
        let config = CacheConfig::new(LAYERS, KV_HEADS, HEAD_DIM).codec(codec.parse()?).capacity(1024);
        let mut attention = Attention::new(&tqkv::Device::cpu(), config)?;
        let sequence = attention.cache_mut().add_sequence();
        model.forward(&tokens.narrow(0, 0, 90)?, &mut attention, sequence)?;
        let mut last = None;
        for i in 90..100 {
            last = Some(model.forward(&tokens.narrow(0, i, 1)?, &mut attention, sequence)?);
        }
        println!("{codec}: {} tokens in {} bytes", attention.cache().len(sequence)?, attention.cache().usage().used);
        outputs.extend(last);
    }
    let norm = |x: &Tensor| x.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>();
    let error = norm(&(&outputs[0] - &outputs[1])?)? / norm(&outputs[0])?;
    println!("relative error of the last token's output: {error:.4}");
    Ok(())
}
