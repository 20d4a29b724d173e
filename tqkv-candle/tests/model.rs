//! The model against an obvious f64 one; chunks, generation and evaluation.

mod common;

use common::{HEAD_DIM, HEADS, HIDDEN, INNER, KV_HEADS, LAYERS, TinyModel};
use std::ops::ControlFlow;
use std::path::Path;
use tempfile::tempdir;
use tqkv::cache::LayerKind;
use tqkv::{CodecPair, Device};
use tqkv_candle::{
    Encoded, Error, GenerateOptions, Haystack, Model, ModelConfig, Progress, SequenceCache, StopReason, TextProgress,
    Vocabulary, Windows, evaluate, find_needles, first_difference, generate, generate_text, generate_with, run_freely,
};

fn load(tiny: &TinyModel) -> Model {
    let dir = tempdir().unwrap();
    tiny.write(dir.path());
    Model::load(dir.path()).unwrap()
}

fn cache(model: &Model) -> SequenceCache {
    cache_with(model, "f32")
}

fn cache_with(model: &Model, codec: &str) -> SequenceCache {
    let codec: CodecPair = codec.parse().unwrap();
    SequenceCache::new(&Device::cpu(), model.config().cache_config().codec(codec)).unwrap()
}

/// Logits of the last token, computed in f64 with plain loops, one position at a time.
fn oracle(tiny: &TinyModel, tokens: &[u32]) -> Vec<f64> {
    let config = ModelConfig::parse(tiny.config.to_string().as_bytes(), Path::new("")).unwrap();
    let frequencies = config.rope.inverse_frequencies();
    let get = |name: &str| tiny.tensors.get(name).map(|(_, values)| values);
    let linear = |name: &str, x: &[f64]| -> Vec<f64> {
        let weight = get(&format!("{name}.weight")).unwrap();
        let bias = get(&format!("{name}.bias"));
        let row = |(i, row): (usize, &[f32])| {
            row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum::<f64>() + bias.map_or(0.0, |b| b[i].into())
        };
        weight.chunks(x.len()).enumerate().map(row).collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
        let weight = get(&format!("{name}.weight")).unwrap();
        x.iter().zip(weight).map(|(v, &w)| v / (mean + f64::from(config.rms_norm_eps)).sqrt() * f64::from(w)).collect()
    };
    let rope = |x: &mut [f64], position: usize| {
        for head in x.chunks_mut(HEAD_DIM) {
            for (i, &frequency) in frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * f64::from(frequency)).sin_cos();
                let (a, b) = (head[i], head[i + HEAD_DIM / 2]);
                head[i] = a * cos - b * sin;
                head[i + HEAD_DIM / 2] = b * cos + a * sin;
            }
        }
    };
    let mut keys = vec![Vec::new(); LAYERS];
    let mut values = vec![Vec::new(); LAYERS];
    let mut logits = Vec::new();
    for (position, &token) in tokens.iter().enumerate() {
        let row = token as usize * HIDDEN..(token as usize + 1) * HIDDEN;
        let mut x: Vec<f64> = get("model.embed_tokens.weight").unwrap()[row].iter().map(|&v| v.into()).collect();
        for layer in 0..LAYERS {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let h = norm(&name("input_layernorm"), &x);
            let mut q = linear(&name("self_attn.q_proj"), &h);
            let mut k = linear(&name("self_attn.k_proj"), &h);
            rope(&mut q, position);
            rope(&mut k, position);
            keys[layer].push(k);
            values[layer].push(linear(&name("self_attn.v_proj"), &h));
            let mut attended = vec![0.0; HEADS * HEAD_DIM];
            for head in 0..HEADS {
                let kv = head / (HEADS / KV_HEADS) * HEAD_DIM..(head / (HEADS / KV_HEADS) + 1) * HEAD_DIM;
                let q = &q[head * HEAD_DIM..(head + 1) * HEAD_DIM];
                let weights: Vec<f64> = keys[layer]
                    .iter()
                    .map(|k| q.iter().zip(&k[kv.clone()]).map(|(q, k)| q * k).sum::<f64>())
                    .map(|score| (score / (HEAD_DIM as f64).sqrt()).exp())
                    .collect();
                let sum: f64 = weights.iter().sum();
                for (weight, v) in weights.iter().zip(&values[layer]) {
                    for (o, v) in attended[head * HEAD_DIM..].iter_mut().zip(&v[kv.clone()]) {
                        *o += weight / sum * v;
                    }
                }
            }
            x.iter_mut().zip(linear(&name("self_attn.o_proj"), &attended)).for_each(|(x, o)| *x += o);
            let h = norm(&name("post_attention_layernorm"), &x);
            let gate = linear(&name("mlp.gate_proj"), &h);
            let up = linear(&name("mlp.up_proj"), &h);
            let inner: Vec<f64> = (0..INNER).map(|i| gate[i] / (1.0 + (-gate[i]).exp()) * up[i]).collect();
            x.iter_mut().zip(linear(&name("mlp.down_proj"), &inner)).for_each(|(x, o)| *x += o);
        }
        let output = if config.tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        logits = linear(output, &norm("model.norm", &x));
    }
    logits
}

fn last_row(model: &Model, hidden: &candle_core::Tensor) -> Vec<f32> {
    model.logits(hidden).unwrap().to_vec2().unwrap().pop().unwrap()
}

#[test]
fn logits_are_those_of_the_obvious_model() {
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 256).collect();
    for tiny in [TinyModel::new(), TinyModel::with_everything()] {
        let model = load(&tiny);
        let expected = oracle(&tiny, &tokens);
        let largest = expected.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        for chunk in [40, 7, 1] {
            let mut cache = cache(&model);
            let chunks = tokens.chunks(chunk).map(|c| model.forward(c, &mut cache).unwrap());
            let got = last_row(&model, &chunks.last().unwrap());
            let error = got.iter().zip(&expected).fold(0.0f64, |m, (&g, e)| m.max((f64::from(g) - e).abs()));
            // f32 sums of at most 256 terms in a handful of layers.
            assert!(error < 1e-5 * largest, "chunk {chunk}: error {error:e} of {largest}");
        }
    }
}

#[test]
fn an_error_leaves_the_cache_as_it_was() {
    let model = load(&TinyModel::new());
    let mut cache = cache(&model);
    model.forward(&[0, 1, 2], &mut cache).unwrap();
    assert!(matches!(model.forward(&[], &mut cache), Err(Error::NoTokens)));
    assert!(matches!(model.forward(&[3, 256], &mut cache), Err(Error::Token { got: 256, vocab_size: 256 })));
    let error = model.forward(&[1; 62], &mut cache);
    assert!(matches!(error, Err(Error::ContextOverflow { got: 65, limit: 64 })));
    assert_eq!(cache.tokens().unwrap(), 3);
    model.forward(&[1; 61], &mut cache).unwrap();
    assert_eq!(cache.tokens().unwrap(), 64);
}

#[test]
fn truncating_rolls_back() {
    let model = load(&TinyModel::new());
    let mut cache = cache(&model);
    model.forward(&[0, 1, 2], &mut cache).unwrap();
    let expected = last_row(&model, &model.forward(&[9], &mut cache).unwrap());
    model.forward(&[10, 11], &mut cache).unwrap();
    cache.truncate(3).unwrap();
    assert!(last_row(&model, &model.forward(&[9], &mut cache).unwrap()) == expected);
}

fn tokens_of(model: &Model, options: &GenerateOptions) -> Vec<u32> {
    let mut streamed = Vec::new();
    let generated = generate(model, &mut cache(model), &[0, 65, 66, 67], options, |token| {
        streamed.push(token);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(generated.tokens, streamed);
    assert_eq!((generated.prompt_tokens, generated.stop), (4, StopReason::MaxTokens));
    streamed
}

#[test]
fn generation_is_reproducible() {
    let model = load(&TinyModel::new());
    let greedy = GenerateOptions { max_tokens: 20, ..GenerateOptions::default() };
    let tokens = tokens_of(&model, &greedy);
    assert_eq!(tokens.len(), 20);
    for options in [GenerateOptions { seed: 1, ..greedy.clone() }, GenerateOptions { chunk: 2, ..greedy.clone() }] {
        assert_eq!(tokens_of(&model, &options), tokens);
    }
    let drawn = |seed| tokens_of(&model, &GenerateOptions { temperature: 1.0, seed, ..greedy.clone() });
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
    assert_ne!(drawn(1), tokens);
    // Cold enough, the likeliest token is drawn always.
    assert_eq!(tokens_of(&model, &GenerateOptions { temperature: 1e-6, ..greedy.clone() }), tokens);
}

#[test]
fn generation_stops() {
    let mut tiny = TinyModel::new();
    let model = load(&tiny);
    let run = |model: &Model, prompt: &[u32], options: &GenerateOptions| {
        generate(model, &mut cache(model), prompt, options, |_| ControlFlow::Continue(()))
    };
    let options = GenerateOptions { max_tokens: 1000, ..GenerateOptions::default() };
    // 60 tokens leave room for 4; the fifth comes from the logits of the last and is not run.
    let generated = run(&model, &[65; 60], &options).unwrap();
    assert_eq!((generated.tokens.len(), generated.stop), (5, StopReason::ContextFull));
    assert!(matches!(run(&model, &[65; 65], &options), Err(Error::ContextOverflow { got: 65, limit: 64 })));
    assert!(matches!(run(&model, &[], &options), Err(Error::NoTokens)));
    assert!(matches!(run(&model, &[65], &GenerateOptions { chunk: 0, ..options.clone() }), Err(Error::ChunkSize)));
    for temperature in [-1.0, f32::NAN, f32::INFINITY] {
        let result = run(&model, &[65], &GenerateOptions { temperature, ..options.clone() });
        assert!(matches!(result, Err(Error::Temperature { .. })));
    }
    let none = run(&model, &[65], &GenerateOptions { max_tokens: 0, ..options.clone() }).unwrap();
    assert_eq!((none.tokens.len(), none.stop), (0, StopReason::MaxTokens));
    let stopped = generate(&model, &mut cache(&model), &[65], &options, |_| ControlFlow::Break(())).unwrap();
    assert_eq!((stopped.tokens.len(), stopped.stop), (1, StopReason::Callback));

    let end = generated.tokens[0];
    tiny.config["eos_token_id"] = serde_json::json!([300 % 256, end]);
    let generated = run(&load(&tiny), &[65; 60], &options).unwrap();
    assert_eq!((generated.tokens.len(), generated.stop), (0, StopReason::EndToken));
}

#[test]
fn weights_that_are_nan_are_an_error() {
    let mut tiny = TinyModel::new();
    tiny.tensors.get_mut("model.norm.weight").unwrap().1[3] = f32::NAN;
    let model = load(&tiny);
    let result = generate(&model, &mut cache(&model), &[0], &GenerateOptions::default(), |_| ControlFlow::Continue(()));
    assert!(matches!(result, Err(Error::NonFiniteLogits { position: 0 })));
    let windows = Windows::new(&Vocabulary::Bytes.encode(b"abcd").unwrap(), 1, 4, Some(0)).unwrap();
    let result = evaluate(&model, &mut cache(&model), &mut [], &windows, 8, |_| ());
    assert!(matches!(result, Err(Error::NonFiniteLogits { position: 0 })));
}

#[test]
fn evaluation_agrees_with_the_obvious_sums() {
    let tiny = TinyModel::new();
    let model = load(&tiny);
    let text = Vocabulary::Bytes.encode(b"The quick brown fox jumps").unwrap();
    let windows = Windows::new(&text, 2, 12, Some(0)).unwrap();
    let mut done = Vec::new();
    let (result, others) =
        evaluate(&model, &mut cache(&model), &mut [cache(&model)], &windows, 5, |n| done.push(n)).unwrap();
    assert_eq!(others, [result]);
    assert_eq!(done, [1, 2]);
    assert_eq!((result.tokens, result.bytes), (22, 22));
    assert_eq!((result.kld(), result.same_top1(), result.delta_percent()), (0.0, 1.0, 0.0));
    let mut nats = 0.0;
    for window in text.tokens.chunks_exact(12) {
        let mut window = window.to_vec();
        window[0] = 0;
        for end in 1..12 {
            let logits = oracle(&tiny, &window[..end]);
            nats += logits.iter().map(|l| l.exp()).sum::<f64>().ln() - logits[window[end] as usize];
        }
    }
    assert!((result.bits_per_byte() / (nats / 22.0 / 2f64.ln()) - 1.0).abs() < 1e-6);
    assert!((result.perplexity() / (nats / 22.0).exp() - 1.0).abs() < 1e-6);
}

#[test]
fn windows_need_text() {
    let text = Vocabulary::Bytes.encode(b"0123456789").unwrap();
    assert!(matches!(Windows::new(&text, 0, 5, None), Err(Error::NoWindows)));
    assert!(matches!(Windows::new(&text, 1, 1, None), Err(Error::WindowLength { got: 1 })));
    assert!(matches!(Windows::new(&text, 3, 5, None), Err(Error::TextTooShort { got: 10, expected: 15, .. })));
    assert!(matches!(Windows::new(&text, usize::MAX, 5, None), Err(Error::TextTooShort { .. })));
    assert!(matches!(Windows::new(&Encoded::default(), 1, 5, None), Err(Error::TextTooShort { got: 0, .. })));
    assert_eq!(Windows::new(&text, 2, 5, None).unwrap().len(), 2);
}

/// Every window starts anew, whatever the layers' own windows have dropped by then.
#[test]
fn windowed_layers_are_emptied_between_windows_of_text() {
    let model = load(&TinyModel::new());
    let text = Vocabulary::Bytes.encode(b"The quick brown fox jumps over the lazy dog, and so on and on.").unwrap();
    let config = |window| model.config().cache_config().page_size(8).kind_at(1, LayerKind::Window(window));
    let cache = |window| SequenceCache::new(&Device::cpu(), config(window)).unwrap();
    for window in [1, 4] {
        let run = |text: &Encoded, windows| {
            let windows = Windows::new(text, windows, 30, Some(0)).unwrap();
            // A cache that held another text before.
            let mut used = cache(window);
            model.forward(&[7; 40], &mut used).unwrap();
            let result = evaluate(&model, &mut used, &mut [cache(window)], &windows, 7, |_| ()).unwrap();
            assert_eq!(result.1, [result.0]);
            result.0
        };
        let second = Encoded { tokens: text.tokens[30..].to_vec(), spans: text.spans[30..].to_vec() };
        let (both, first, second) = (run(&text, 2), run(&text, 1), run(&second, 1));
        let sum = first.bits_per_byte() * first.bytes as f64 + second.bits_per_byte() * second.bytes as f64;
        assert_eq!(both.tokens, 58);
        assert!((both.bits_per_byte() * both.bytes as f64 / sum - 1.0).abs() < 1e-12, "window {window}");
    }
}

/// A file of 200 tokens into a cache with room for 256, one of which is held.
#[test]
fn a_cache_gives_up_its_own_tokens_for_a_file() {
    let mut tiny = TinyModel::new();
    tiny.config["max_position_embeddings"] = serde_json::json!(256);
    let model = load(&tiny);
    let path = tempfile::tempdir().unwrap();
    let path = path.path().join("saved");
    let mut saved = cache(&model);
    let tokens: Vec<u32> = (0..200).collect();
    model.forward(&tokens, &mut saved).unwrap();
    saved.save(&path, b"tiny").unwrap();
    let mut other = cache(&model);
    model.forward(&[1], &mut other).unwrap();
    assert!(matches!(other.load(&path, b"large"), Err(Error::Cache(tqkv::Error::Fingerprint { .. }))));
    assert_eq!(other.tokens().unwrap(), 1);
    other.load(&path, b"tiny").unwrap();
    assert_eq!(other.tokens().unwrap(), 200);
    let next = |cache: &mut SequenceCache| model.forward(&[5], cache).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(next(&mut other), next(&mut saved));
}

#[test]
fn more_bits_diverge_less() {
    let model = load(&TinyModel::new());
    let text = Vocabulary::Bytes.encode(b"The quick brown fox jumps over the lazy dog, and so on.").unwrap();
    let windows = Windows::new(&text, 2, 24, Some(0)).unwrap();
    let codecs = ["f32", "f16", "k8v8", "k6v6", "k4v4", "k3v3", "k2v2"];
    let mut caches: Vec<_> = codecs.iter().map(|codec| cache_with(&model, codec)).collect();
    let (_, results) = evaluate(&model, &mut cache(&model), &mut caches, &windows, 7, |_| ()).unwrap();
    assert_eq!(results[0].kld(), 0.0);
    let kld: Vec<f64> = results.iter().map(|r| r.kld()).collect();
    assert!(kld.is_sorted(), "{kld:?}");
}

#[test]
fn a_full_cache_is_an_error_and_keeps_its_tokens() {
    let model = load(&TinyModel::new());
    let config = model.config().cache_config().page_size(16).capacity(32);
    let mut cache = SequenceCache::new(&Device::cpu(), config).unwrap();
    model.forward(&[1; 30], &mut cache).unwrap();
    let error = model.forward(&[1; 3], &mut cache);
    assert!(matches!(error, Err(Error::Cache(tqkv::Error::OutOfPages { .. }))));
    assert_eq!(cache.tokens().unwrap(), 30);
    model.forward(&[1; 2], &mut cache).unwrap();
}

#[test]
fn a_cache_for_another_model_is_an_error() {
    let model = load(&TinyModel::new());
    for config in [tqkv::CacheConfig::new(1, 2, 64), tqkv::CacheConfig::new(2, 1, 64)] {
        let mut cache = SequenceCache::new(&Device::cpu(), config).unwrap();
        assert!(matches!(model.forward(&[1, 2], &mut cache), Err(Error::Cache(_))));
        assert_eq!(cache.tokens().unwrap(), 0);
    }
}

#[test]
fn a_prompt_without_room_is_refused_before_anything_is_appended() {
    let model = load(&TinyModel::new());
    let config = model.config().cache_config().page_size(16).capacity(32);
    let options = GenerateOptions { chunk: 8, max_tokens: 100, ..GenerateOptions::default() };
    let run = |cache: &mut SequenceCache, prompt: &[u32]| {
        generate(&model, cache, prompt, &options, |_| ControlFlow::Continue(()))
    };
    let mut cache = SequenceCache::new(&Device::cpu(), config.clone()).unwrap();
    model.forward(&[1; 3], &mut cache).unwrap();
    let error = run(&mut cache, &[1; 30]);
    assert!(matches!(error, Err(Error::Cache(tqkv::Error::OutOfPages { needed: 2, free: 1, pages: 2 }))), "{error:?}");
    let error = run(&mut cache, &[&[1; 20][..], &[256]].concat());
    assert!(matches!(error, Err(Error::Token { got: 256, vocab_size: 256 })), "{error:?}");
    assert_eq!(cache.tokens().unwrap(), 3);
    // What fits runs, until the cache is full: the last token comes from the logits of the 32nd.
    let generated = run(&mut cache, &[1; 27]).unwrap();
    assert_eq!((generated.tokens.len(), generated.stop), (3, StopReason::ContextFull));
    assert_eq!(cache.tokens().unwrap(), 32);

    // A window's layers have room again as their pages are given up, but not for a chunk of any length.
    let windows = |capacity| {
        let window = tqkv::cache::LayerKind::Window(16);
        let config = config.clone().capacity(64).window_capacity(capacity).kind_at(0, window);
        SequenceCache::new(&Device::cpu(), config).unwrap()
    };
    let (mut narrow, mut wide) = (windows(16), windows(48));
    assert!(matches!(run(&mut narrow, &[1; 40]), Err(Error::Cache(tqkv::Error::OutOfPages { .. }))));
    assert_eq!(narrow.tokens().unwrap(), 0);
    run(&mut wide, &[1; 40]).unwrap();

    let windows = |length| Windows::new(&Vocabulary::Bytes.encode(&[7; 80]).unwrap(), 1, length, Some(0)).unwrap();
    let (mut short, mut long) = (cache, self::cache(&model));
    model.forward(&[1; 5], &mut long).unwrap();
    let error = evaluate(&model, &mut long, std::slice::from_mut(&mut short), &windows(34), 8, |_| ());
    assert!(matches!(error, Err(Error::Cache(tqkv::Error::OutOfPages { .. }))), "{error:?}");
    let error = evaluate(&model, &mut long, &mut [], &windows(66), 8, |_| ());
    assert!(matches!(error, Err(Error::ContextOverflow { got: 65, limit: 64 })), "{error:?}");
    assert_eq!((short.tokens().unwrap(), long.tokens().unwrap()), (32, 5));
}

#[test]
fn a_prompt_that_fails_leaves_the_cache_as_it_was() {
    let mut tiny = TinyModel::new();
    // Token 7 has no logits.
    tiny.tensors.get_mut("model.embed_tokens.weight").unwrap().1[7 * HIDDEN] = f32::NAN;
    let model = load(&tiny);
    let mut cache = cache(&model);
    model.forward(&[1, 2], &mut cache).unwrap();
    let options = GenerateOptions { chunk: 2, ..GenerateOptions::default() };
    let error = generate(&model, &mut cache, &[1, 2, 3, 7], &options, |_| ControlFlow::Continue(()));
    assert!(matches!(error, Err(Error::NonFiniteLogits { position: 5 })), "{error:?}");
    assert_eq!(cache.tokens().unwrap(), 2);
}

#[test]
fn text_is_generated_up_to_a_stop_string() {
    let model = load(&TinyModel::new());
    let options = GenerateOptions { max_tokens: 40, temperature: 2.0, seed: 3, chunk: 2, ..GenerateOptions::default() };
    let run = |stop: &[&str]| {
        let stop: Vec<String> = stop.iter().map(|s| s.to_string()).collect();
        let (mut text, mut done) = (String::new(), Vec::new());
        let prompt = [0, 65, 66, 67, 68];
        let decoder = Vocabulary::Bytes.decoder();
        let generated =
            generate_text(&model, &mut cache(&model), None, &prompt, &options, decoder, &stop, |progress| {
                match progress {
                    TextProgress::Prompt(tokens) => done.push(tokens),
                    TextProgress::Text(piece) => text += piece,
                }
                ControlFlow::Continue(())
            });
        assert_eq!(done, [2, 4, 5]);
        (generated.unwrap(), text)
    };
    let (whole, text) = run(&[]);
    let bytes: Vec<u8> = whole.tokens.iter().map(|&token| token as u8).collect();
    assert_eq!((text.as_str(), whole.stop), (&*String::from_utf8_lossy(&bytes), StopReason::MaxTokens));
    // Two characters from the middle.
    let at = text.char_indices().map(|(at, _)| at).nth(20).unwrap();
    let stop: String = text[at..].chars().take(2).collect();
    let at = text.find(&stop).unwrap();
    let (cut, before) = run(&["not there at all", &stop]);
    assert_eq!((before.as_str(), cut.stop), (&text[..at], StopReason::StopString));
    assert!(whole.tokens.starts_with(&cut.tokens) && cut.tokens.len() < whole.tokens.len());
    let result = generate_text(
        &model,
        &mut cache(&model),
        None,
        &[65],
        &options,
        Vocabulary::Bytes.decoder(),
        &[String::new()],
        |_| ControlFlow::Continue(()),
    );
    assert!(matches!(result, Err(Error::StopString)));
}

#[test]
fn a_generation_may_be_ended_within_the_prompt() {
    let model = load(&TinyModel::new());
    let options = GenerateOptions { chunk: 4, ..GenerateOptions::default() };
    let mut cache = cache(&model);
    let mut end_at = |tokens| {
        generate_with(&model, &mut cache, &[65; 10], &options, |progress| match progress {
            Progress::Prompt(done) if done >= tokens => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
        .unwrap()
    };
    for (tokens, ran) in [(5, 8), (10, 10)] {
        let generated = end_at(tokens);
        assert_eq!((generated.stop, generated.prompt_tokens, generated.tokens.len()), (StopReason::Callback, ran, 0));
    }
    assert_eq!(cache.tokens().unwrap(), 18);
}

#[test]
fn tokens_before_the_prompt_count_as_repetitions() {
    let model = load(&TinyModel::new());
    let options = GenerateOptions { max_tokens: 12, ..GenerateOptions::default() };
    let plain = tokens_with(&model, &options);
    let penalty = GenerateOptions { repetition_penalty: 1e6, ..options };
    let distinct = tokens_with(&model, &penalty);
    let count = |tokens: &[u32]| tokens.iter().collect::<std::collections::HashSet<_>>().len();
    assert!(count(&plain) <= count(&distinct) && count(&distinct) == 12, "{plain:?} {distinct:?}");
    assert!(distinct.iter().all(|token| ![0, 65, 66, 67].contains(token)));
    let others = tokens_with(&model, &GenerateOptions { history: distinct.clone(), ..penalty });
    assert!(others.iter().all(|token| !distinct.contains(token)), "{distinct:?} {others:?}");
}

fn tokens_with(model: &Model, options: &GenerateOptions) -> Vec<u32> {
    let run = generate(model, &mut cache(model), &[0, 65, 66, 67], options, |_| ControlFlow::Continue(()));
    run.unwrap().tokens
}

#[test]
fn percentiles_are_those_of_the_divergences() {
    let tiny = TinyModel::new();
    let model = load(&tiny);
    let text = Vocabulary::Bytes.encode(b"The quick brown fox jumps over the lazy dog").unwrap();
    let windows = Windows::new(&text, 2, 21, Some(0)).unwrap();
    let mut caches = [cache_with(&model, "k4v4")];
    let (_, results) = evaluate(&model, &mut cache(&model), &mut caches, &windows, 6, |_| ()).unwrap();
    // Each prediction by itself, in f64 of the logits.
    let mut divergences: Vec<f64> = Vec::new();
    for window in windows.iter() {
        let (mut exact, mut coded) = (cache(&model), cache_with(&model, "k4v4"));
        for chunk in window[..20].chunks(6) {
            let rows = |cache: &mut SequenceCache| -> Vec<Vec<f32>> {
                model.logits(&model.forward(chunk, cache).unwrap()).unwrap().to_vec2().unwrap()
            };
            for (p, q) in rows(&mut exact).iter().zip(&rows(&mut coded)) {
                let log_sum = |row: &[f32]| row.iter().map(|&l| f64::from(l).exp()).sum::<f64>().ln();
                let (sum_p, sum_q) = (log_sum(p), log_sum(q));
                let term = |(&p, &q): (&f32, &f32)| {
                    let (p, q) = (f64::from(p) - sum_p, f64::from(q) - sum_q);
                    p.exp() * (p - q)
                };
                divergences.push(p.iter().zip(q).map(term).sum());
            }
        }
    }
    divergences.sort_by(f64::total_cmp);
    let close = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-9 + 1e-6 * expected, "{got} {expected}");
    assert_eq!(divergences.len(), 40);
    close(results[0].kld(), divergences.iter().sum::<f64>() / 40.0);
    close(results[0].kld_median(), divergences[19]);
    close(results[0].kld_p99(), divergences[39]);
}

#[test]
fn free_runs_are_greedy_and_their_first_difference_is_found() {
    let model = load(&TinyModel::new());
    let expected = tokens_with(&model, &GenerateOptions { max_tokens: 20, ..GenerateOptions::default() });
    let mut cache = cache(&model);
    for _ in 0..2 {
        assert_eq!(run_freely(&model, &mut cache, &[0, 65, 66, 67], 20).unwrap(), expected);
    }
    assert_eq!(first_difference(&[1, 2, 3], &[1, 2, 3]), None);
    assert_eq!(first_difference(&[1, 2, 3], &[1, 4, 3]), Some(1));
    assert_eq!(first_difference(&[1, 2], &[1, 2, 3]), Some(2));
    assert_eq!(first_difference(&[], &[1]), Some(0));
}

#[test]
fn needles_are_hidden_where_they_should_be_and_cost_what_the_oracle_says() {
    let mut tiny = TinyModel::new();
    tiny.config["max_position_embeddings"] = serde_json::json!(512);
    let model = load(&tiny);
    let hay: Vec<u32> = b"hay".iter().cycle().take(900).map(|&b| b.into()).collect();
    let hide = |length, needles, round| Haystack::new(&Vocabulary::Bytes, &hay, length, needles, round, Some(0));
    let haystack = hide(400, 2, 7).unwrap();
    let (first, rest) = haystack.tokens().split_first().unwrap();
    let text: String = rest.iter().map(|&t| char::from(u8::try_from(t).unwrap())).collect();
    assert_eq!((*first, haystack.tokens().len()), (0, 400));
    // Another number for each needle and round, of other things.
    let facts = ["weight of the whale", "population of the island"];
    let told = |haystack: &Haystack, fact: &str| -> String {
        let text: String = haystack.tokens()[1..].iter().map(|&t| char::from(u8::try_from(t).unwrap())).collect();
        let (_, after) = text.split_once(&format!("\nThe {fact} is ")).unwrap();
        after.split_once(".\n").unwrap().0.to_owned()
    };
    let numbers = facts.map(|fact| told(&haystack, fact));
    assert!(numbers[0] != numbers[1] && numbers.iter().all(|n| n.len() == 5), "{numbers:?}");
    assert_ne!(told(&hide(400, 2, 16).unwrap(), facts[0]), numbers[0]);
    let sentences = [0, 1].map(|i| format!("\nThe {} is {}.\n", facts[i], numbers[i]));
    let questions = [0, 1].map(|i| format!("\nWhat is the {0}? The {0} is {1}", facts[i], numbers[i]));
    let length = 399 - sentences.concat().len() - questions.concat().len();
    let (third, hay) = ((length as f64 / 3.0).round() as usize, "hay".repeat(300));
    let two_thirds = (length as f64 * 2.0 / 3.0).round() as usize;
    let [a, b, c] = [&hay[..third], &hay[third..two_thirds], &hay[two_thirds..length]];
    assert_eq!(text, format!("{a}{}{b}{}{c}{}", sentences[0], sentences[1], questions.concat()));

    // Chunks that end within the answers.
    let found = find_needles(&model, &mut cache(&model), &haystack, 29).unwrap();
    let mut end = 400;
    for (i, found) in found.iter().enumerate().rev() {
        // Each byte of " 12345" after those before it.
        let (mut nats, mut likeliest) = (0.0, true);
        for at in end - 6..end {
            let logits = oracle(&tiny, &haystack.tokens()[..at]);
            let next = logits[haystack.tokens()[at] as usize];
            nats += logits.iter().map(|l| l.exp()).sum::<f64>().ln() - next;
            likeliest &= logits.iter().all(|&l| l <= next);
        }
        assert!((found.nats - nats).abs() < 2e-4, "{found:?} {nats}");
        assert_eq!((found.found, found.depth), (likeliest, (i + 1) as f64 / 3.0));
        end -= questions[i].len();
    }

    assert!(matches!(hide(200, 2, 0), Err(Error::WindowLength { got: 200 })));
    assert!(matches!(hide(2000, 2, 0), Err(Error::TextTooShort { got: 900, .. })));
    assert!(matches!(hide(400, 0, 0), Err(Error::Needles { got: 0, most: Haystack::MOST })));
    assert!(matches!(hide(2000, 10, 0), Err(Error::Needles { got: 10, .. })));
    let (mut small, long) = (cache_with(&model, "k4v4"), hide(900, 2, 0).unwrap());
    assert!(matches!(find_needles(&model, &mut small, &long, 64), Err(Error::ContextOverflow { got: 899, .. })));
    assert!(matches!(find_needles(&model, &mut small, &haystack, 0), Err(Error::ChunkSize)));
}
