//! Two real models against `golden/make.py`: SmolLM2-135M-Instruct Q4_1 and Gemma 3 270M Q4_K_M.
//!
//! They need the folder with both files in `TQKV_MODELS` (CONTRIBUTING says where they come from). Without it the tests say
//! that they are skipped; with `TQKV_REQUIRE=models` they fail instead.

use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use tqkv::Device;
use tqkv_candle::{GenerateOptions, Model, SequenceCache, generate};

const SMOLLM2: (&str, &str) = ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf");
const GEMMA3: (&str, &str) = ("gemma3", "gemma-3-270m-q4_k_m.gguf");

/// The file of a model, if there is one.
fn file((name, file): (&str, &str)) -> Option<PathBuf> {
    let folder = std::env::var_os("TQKV_MODELS");
    let path = folder.map(|folder| Path::new(&folder).join(file)).filter(|path| path.exists());
    if path.is_none() {
        let required = std::env::var("TQKV_REQUIRE").unwrap_or_default();
        assert!(
            !required.split(',').any(|r| r == "models"),
            "TQKV_REQUIRE names models, but TQKV_MODELS has no {file}"
        );
        eprintln!("SKIPPED: {name}: TQKV_MODELS names no folder with {file}");
    }
    path
}

/// What the reference gave.
struct Golden(Vec<u8>);

impl Golden {
    fn load(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.safetensors"));
        Self(std::fs::read(path).unwrap())
    }

    fn tensor(&self, name: &str) -> TensorView<'_> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap()
    }

    fn tokens(&self, name: &str) -> Vec<u32> {
        self.tensor(name).data().as_chunks().0.iter().map(|&b| u32::from_le_bytes(b)).collect()
    }

    fn numbers(&self, name: &str) -> Vec<f32> {
        self.tensor(name).data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect()
    }
}

fn cache(model: &Model) -> SequenceCache {
    let config = model.config().cache_config().codec("f32".parse().unwrap()).capacity(256);
    SequenceCache::new(&Device::cpu(), config).unwrap()
}

fn logits(model: &Model, tokens: &[u32]) -> Vec<Vec<f32>> {
    model.logits(&model.forward(tokens, &mut cache(model)).unwrap()).unwrap().to_vec2().unwrap()
}

fn expect_reference(model: (&str, &str)) {
    let (Some(path), name) = (file(model), model.0) else { return };
    let golden = Golden::load(name);
    let tokens = golden.tokens("tokens");
    let exact = logits(&Model::load_dequantized(&path).unwrap(), &tokens);

    // Weights as f32: columns over the whole vocabulary, and the likeliest of each position.
    let (columns, expected) = (golden.tokens("columns"), golden.numbers("logits"));
    let (best, best_logits) = (golden.tokens("best"), golden.numbers("best_logits"));
    let mut worst = 0f32;
    for (i, (row, &largest)) in exact.iter().zip(&golden.numbers("largest")).enumerate() {
        let n = columns.len();
        let spread = columns.iter().zip(&expected[i * n..]);
        for (&column, &expected) in spread.chain(best[i * 8..][..8].iter().zip(&best_logits[i * 8..])) {
            worst = worst.max((row[column as usize] - expected).abs() / largest);
        }
    }
    println!("{name}: largest error of f32 products {worst:e} of a position's largest logit");
    assert!(worst < 1e-3, "{worst}");

    // Weights as they are in the file.
    let model = Model::load(&path).unwrap();
    let mut cache = cache(&model);
    // Few tokens at a time, whose products go another way than those of many.
    let few = |tokens: &[u32]| -> Vec<Vec<f32>> {
        model.logits(&model.forward(tokens, &mut cache).unwrap()).unwrap().to_vec2().unwrap()
    };
    let quantized: Vec<Vec<f32>> = tokens.chunks(5).flat_map(few).collect();
    let mean = quantized.iter().zip(&exact).map(|(q, p)| divergence(q, p)).sum::<f64>() / exact.len() as f64;
    println!("{name}: mean divergence of quantized products {mean:e}");
    assert!(mean.abs() <= 0.002, "{mean}");
}

/// Of one position's prediction from the other's, in nats.
fn divergence(got: &[f32], reference: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::MIN, f32::max);
        f64::from(max) + row.iter().map(|&l| f64::from(l - max).exp()).sum::<f64>().ln()
    };
    let (q_sum, p_sum) = (log_sum(got), log_sum(reference));
    let term = |(&q, &p): (&f32, &f32)| {
        let (q, p) = (f64::from(q) - q_sum, f64::from(p) - p_sum);
        p.exp() * (p - q)
    };
    got.iter().zip(reference).map(term).sum()
}

/// The likeliest tokens, as long as the reference's two best logits are 0.05 apart, and each of them given those before.
fn expect_greedy(model: (&str, &str)) {
    let Some(path) = file(model) else { return };
    let golden = Golden::load(model.0);
    let (prompt, greedy, gaps) = (golden.tokens("prompt"), golden.tokens("greedy"), golden.numbers("gaps"));
    assert_eq!(greedy.len(), 64);
    let close = gaps.iter().position(|&gap| gap < 0.05).unwrap_or(64);
    for (how, model) in [("f32", Model::load_dequantized(&path)), ("quantized", Model::load(&path))] {
        let model = model.unwrap();
        let all = [&prompt[..], &greedy].concat();
        let rows = logits(&model, &all[..all.len() - 1]);
        let top = |row: &[f32]| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
        let got: Vec<u32> = rows[prompt.len() - 1..].iter().map(|row| top(row)).collect();
        let wrong: Vec<usize> = (0..64).filter(|&i| gaps[i] >= 0.05 && got[i] != greedy[i]).collect();
        assert!(wrong.is_empty(), "{how}: {wrong:?}, gaps {:?}", wrong.iter().map(|&i| gaps[i]).collect::<Vec<_>>());

        let options = GenerateOptions { max_tokens: 64, ..GenerateOptions::default() };
        let text = generate(&model, &mut cache(&model), &prompt, &options, |_| ControlFlow::Continue(())).unwrap();
        let same = text.tokens.iter().zip(&greedy).take_while(|(a, b)| a == b).count();
        let speed = text.decode_tokens_per_second();
        println!(
            "{how}: {speed:.1} tokens a second, {same} tokens as the reference's, whose logits come close at {close}"
        );
        assert!(same >= close.min(text.tokens.len()), "{how}: {same}");
    }
}

#[test]
fn smollm2_equals_the_reference() {
    expect_reference(SMOLLM2);
}

#[test]
fn smollm2_writes_what_the_reference_writes() {
    expect_greedy(SMOLLM2);
}

#[test]
fn gemma3_equals_the_reference() {
    expect_reference(GEMMA3);
}

#[test]
fn gemma3_writes_what_the_reference_writes() {
    expect_greedy(GEMMA3);
}
