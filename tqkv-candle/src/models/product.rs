//! Products of f32 with weights in blocks or in 16 bits, which are decoded on the way.
//!
//! candle's own products round activations to 8 bits, which costs SmolLM2 0.0025 nats a token, and have no vector code on
//! x86 for Q4_1, Q5_0 and Q5_1. Here few tokens are rounded to 16 bits where `dot` has the type, many not at all.

use super::blocks::decode;
#[cfg(target_arch = "x86_64")]
use super::dot;
use crate::error::Result;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, Device, Storage, Tensor};
use rayon::prelude::*;

/// From so many tokens on, weights are decoded for a matrix product.
const MANY: usize = 8;

/// Rows of a task: enough that starting it does not count.
const TASK: usize = 16;

/// Rows that are decoded at a time for a matrix product.
const TILE: usize = 2048;

/// `x`, `[tokens, inputs]`, times each of `weights`, `[outputs, inputs]`: `[tokens, outputs]` each. Those of few tokens are
/// worked off together.
pub(super) fn products(x: &Tensor, weights: &[&QTensor]) -> Result<Vec<Tensor>> {
    let (tokens, inputs) = x.dims2()?;
    for weights in weights {
        let expected = weights.shape().dims2()?.1;
        if inputs != expected {
            return Err(candle_core::Error::Msg(format!("a product of {inputs} inputs, expected {expected}")).into());
        }
    }
    let x = x.contiguous()?;
    match tokens {
        1..MANY => few(&x, weights),
        _ => weights.iter().map(|weights| many(&x, weights)).collect(),
    }
}

/// Products of a few tokens: rows are decoded, or summed as integers, and never kept.
fn few(x: &Tensor, weights: &[&QTensor]) -> Result<Vec<Tensor>> {
    let (tokens, inputs) = x.dims2()?;
    let (storage, layout) = x.storage_and_layout();
    let Storage::Cpu(CpuStorage::F32(all)) = &*storage else {
        return Err(candle_core::Error::Msg("a product with f32 on the CPU".into()).into());
    };
    let x = Few::new(&all[layout.start_offset()..][..tokens * inputs], weights);
    let mut matrices = Vec::with_capacity(weights.len());
    for weights in weights {
        let outputs = weights.shape().dims2()?.0;
        // [outputs, tokens], as rows are worked off.
        matrices.push((Decoder::new(weights, inputs), weights.data()?, vec![0.0; outputs * tokens]));
    }
    let tasks = matrices.iter_mut().flat_map(|(decoder, bytes, out)| {
        let decoder: &Decoder = decoder;
        let tasks = out.chunks_mut(TASK * tokens).zip(bytes.chunks(TASK * decoder.row_bytes));
        tasks.map(move |(out, rows)| (decoder, rows, out))
    });
    let tasks: Vec<_> = tasks.collect();
    tasks.into_par_iter().for_each_init(
        || vec![0.0; inputs],
        |row, (decoder, rows, out)| {
            decoder.dot(rows, &x, row, out);
        },
    );
    let outputs = matrices.into_iter().map(|(_, _, out)| {
        let outputs = out.len() / tokens;
        if tokens == 1 {
            return Ok(Tensor::from_vec(out, (1, outputs), &Device::Cpu)?);
        }
        let out = Tensor::from_vec(out, (outputs, tokens), &Device::Cpu)?;
        Ok(out.t()?.contiguous()?)
    });
    outputs.collect()
}

/// Products of many tokens: weights are decoded, a tile at a time, and multiplied as matrices.
fn many(x: &Tensor, weights: &QTensor) -> Result<Tensor> {
    let (tokens, inputs) = x.dims2()?;
    let outputs = weights.shape().dims2()?.0;
    let bytes = weights.data()?;
    let decoder = Decoder::new(weights, inputs);
    let row_bytes = decoder.row_bytes;
    let mut out = if outputs > TILE { vec![0.0; tokens * outputs] } else { vec![] };
    for (i, rows) in bytes.chunks(TILE * row_bytes).enumerate() {
        let count = rows.len() / row_bytes;
        let mut decoded = vec![0.0; count * inputs];
        let tasks = decoded.par_chunks_mut(TASK * inputs).zip(rows.par_chunks(TASK * row_bytes));
        tasks.for_each(|(out, rows)| decoder.decode(rows, out));
        let tile = x.matmul(&Tensor::from_vec(decoded, (count, inputs), &Device::Cpu)?.t()?)?;
        if count == outputs {
            return Ok(tile);
        }
        let tile: Vec<f32> = tile.flatten_all()?.to_vec1()?;
        for (out, tile) in out.chunks_exact_mut(outputs).zip(tile.chunks_exact(count)) {
            out[i * TILE..][..count].copy_from_slice(tile);
        }
    }
    Ok(Tensor::from_vec(out, (tokens, outputs), &Device::Cpu)?)
}

/// What rows of a matrix are.
struct Decoder {
    dtype: GgmlDType,
    inputs: usize,
    row_bytes: usize,
}

/// A few tokens, as the products of some types take them.
struct Few<'a> {
    floats: &'a [f32],
    #[cfg(target_arch = "x86_64")]
    groups: Option<Vec<dot::Group>>,
}

impl<'a> Few<'a> {
    fn new(floats: &'a [f32], weights: &[&QTensor]) -> Self {
        #[cfg(target_arch = "x86_64")]
        let groups = weights.iter().any(|weights| dot::knows(weights.dtype())).then(|| dot::Group::all(floats));
        #[cfg(not(target_arch = "x86_64"))]
        let _ = weights;
        Self {
            floats,
            #[cfg(target_arch = "x86_64")]
            groups,
        }
    }
}

impl Decoder {
    fn new(weights: &QTensor, inputs: usize) -> Self {
        let dtype = weights.dtype();
        Self { dtype, inputs, row_bytes: inputs / dtype.block_size() * dtype.type_size() }
    }

    /// Decodes whole rows.
    fn decode(&self, rows: &[u8], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if wide() {
            // SAFETY: the processor has what the function is compiled for.
            return unsafe { decode_wide(self.dtype, rows, out) };
        }
        decode(self.dtype, rows, out);
    }

    /// The products of whole rows with every token of `x`, `[rows, tokens]`; `row` is memory for one.
    fn dot(&self, rows: &[u8], x: &Few, row: &mut [f32], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let Some(groups) = x.groups.as_ref().filter(|_| dot::knows(self.dtype)) {
            // SAFETY: the type is known, and `x` has whole rows.
            return unsafe { dot::dot_rows(self.dtype, rows, self.row_bytes, groups, out) };
        }
        self.dot_rows(rows, x.floats, row, out);
    }

    /// The same with rows decoded.
    fn dot_rows(&self, rows: &[u8], x: &[f32], row: &mut [f32], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if wide() {
            // SAFETY: the processor has what the function is compiled for.
            return unsafe { dot_rows_wide(self, rows, x, row, out) };
        }
        dot_rows(self, rows, x, row, out);
    }
}

#[cfg(target_arch = "x86_64")]
fn wide() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn decode_wide(dtype: GgmlDType, rows: &[u8], out: &mut [f32]) {
    decode(dtype, rows, out);
}

/// # Safety
/// The processor has AVX2 and FMA.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn dot_rows_wide(decoder: &Decoder, rows: &[u8], x: &[f32], row: &mut [f32], out: &mut [f32]) {
    dot_rows(decoder, rows, x, row, out);
}

#[inline(always)]
fn dot_rows(decoder: &Decoder, rows: &[u8], x: &[f32], row: &mut [f32], out: &mut [f32]) {
    let tokens = x.len() / decoder.inputs;
    for (bytes, out) in rows.chunks_exact(decoder.row_bytes).zip(out.chunks_exact_mut(tokens)) {
        decode(decoder.dtype, bytes, row);
        for (x, out) in x.chunks_exact(decoder.inputs).zip(out) {
            *out = dot(row, x);
        }
    }
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 32];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<32>(), b.as_chunks::<32>());
    for (a, b) in a.iter().zip(b) {
        for i in 0..32 {
            sums[i] += a[i] * b[i];
        }
    }
    // Rows of 16-bit numbers may be of any length.
    sums.iter().sum::<f32>() + a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Few tokens and many, more rows than a tile and a task have, every type: products with what candle decodes.
    #[test]
    fn products_are_those_of_decoded_weights() {
        let weights = Tensor::randn(0f32, 1.0, (TILE + TASK + 3, 512), &Device::Cpu).unwrap();
        for dtype in [
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
            GgmlDType::Q8_0,
            GgmlDType::Q2K,
            GgmlDType::Q3K,
            GgmlDType::Q4K,
            GgmlDType::Q5K,
            GgmlDType::Q6K,
            GgmlDType::F16,
            GgmlDType::BF16,
        ] {
            let quantized = QTensor::quantize(&weights, dtype).unwrap();
            let decoded = quantized.dequantize(&Device::Cpu).unwrap();
            for tokens in [1, 2, MANY, 13] {
                let x = Tensor::randn(0f32, 1.0, (tokens, 512), &Device::Cpu).unwrap();
                let (got, expected) =
                    (products(&x, &[&quantized]).unwrap().remove(0), x.matmul(&decoded.t().unwrap()).unwrap());
                assert_eq!(got.dims(), expected.dims());
                let error = (got - expected).unwrap().abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap();
                // Sums of 512 terms of about 1, in another order; an activation of 16 bits is off by 2^-16 of about 3 at most.
                assert!(error < if tokens < MANY { 4e-3 } else { 2e-4 }, "{dtype:?}, {tokens} tokens: {error}");
            }
        }
    }

    /// Every number of 16 bits, infinities and what is no number among them.
    #[test]
    fn numbers_of_16_bits_are_exact() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut got = vec![0.0; 1 << 16];
        for (dtype, expected) in [
            (GgmlDType::F16, (|bits| half::f16::from_bits(bits).to_f32()) as fn(u16) -> f32),
            (GgmlDType::BF16, |bits| half::bf16::from_bits(bits).to_f32()),
        ] {
            Decoder { dtype, inputs: 1, row_bytes: 2 }.decode(&bytes, &mut got);
            for (bits, got) in (0..=u16::MAX).zip(&got) {
                let expected = expected(bits);
                let same = got.to_bits() == expected.to_bits() || got.is_nan() && expected.is_nan();
                assert!(same, "{dtype:?} {bits:#06x}: {got}, expected {expected}");
            }
        }
    }

    /// Rows whose length is no multiple of anything.
    #[test]
    fn rows_of_any_length() {
        let weights = Tensor::randn(0f32, 1.0, (5, 37), &Device::Cpu).unwrap();
        let packed = QTensor::quantize(&weights, GgmlDType::BF16).unwrap();
        let decoded = packed.dequantize(&Device::Cpu).unwrap().t().unwrap();
        for tokens in [1, 3, MANY] {
            let x = Tensor::randn(0f32, 1.0, (tokens, 37), &Device::Cpu).unwrap();
            let difference = (&products(&x, &[&packed]).unwrap()[0] - x.matmul(&decoded).unwrap()).unwrap();
            assert!(difference.abs().unwrap().max_all().unwrap().to_scalar::<f32>().unwrap() < 1e-5);
        }
    }

    /// Blocks of random bytes stand for what the gguf package says, on the wide path and on the other.
    #[test]
    fn blocks_are_those_of_the_gguf_package() {
        let golden = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/blocks.safetensors");
        let golden = std::fs::read(golden).unwrap();
        let golden = safetensors::SafeTensors::deserialize(&golden).unwrap();
        for (dtype, name) in [
            (GgmlDType::Q4_0, "Q4_0"),
            (GgmlDType::Q4_1, "Q4_1"),
            (GgmlDType::Q5_0, "Q5_0"),
            (GgmlDType::Q5_1, "Q5_1"),
            (GgmlDType::Q8_0, "Q8_0"),
            (GgmlDType::Q2K, "Q2_K"),
            (GgmlDType::Q3K, "Q3_K"),
            (GgmlDType::Q4K, "Q4_K"),
            (GgmlDType::Q5K, "Q5_K"),
            (GgmlDType::Q6K, "Q6_K"),
        ] {
            let bytes = golden.tensor(&format!("{name}.bytes")).unwrap().data().to_vec();
            let expected = golden.tensor(&format!("{name}.values")).unwrap();
            let expected: Vec<f32> = expected.data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
            let (mut plain, mut wide) = (vec![0.0; 512], vec![0.0; 512]);
            decode(dtype, &bytes, &mut plain);
            Decoder { dtype, inputs: 512, row_bytes: bytes.len() }.decode(&bytes, &mut wide);
            for got in [plain, wide] {
                for (i, (g, e)) in got.iter().zip(&expected).enumerate() {
                    assert!((g - e).abs() <= e.abs() * 1e-6 + 1e-7, "{name}, element {i}: {g}, expected {e}");
                }
            }
        }
    }
}
