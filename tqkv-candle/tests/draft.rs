//! Speculative decoding and batches: the text is the one without them.

mod common;

use common::TinyModel;
use std::ops::ControlFlow;
use tempfile::tempdir;
use tqkv::{CacheConfig, Device};
use tqkv_candle::{
    Attention, Draft, Error, GenerateOptions, Generated, Model, Progress, SequenceCache, StopReason, generate,
    generate_batch, generate_with_draft,
};

const PROMPT: [u32; 4] = [0, 65, 66, 67];

fn load(tiny: &TinyModel) -> Model {
    let dir = tempdir().unwrap();
    tiny.write(dir.path());
    Model::load(dir.path()).unwrap()
}

/// Of the same kind, but with a mind of its own in part.
fn other() -> Model {
    let mut tiny = TinyModel::new();
    let (_, weights) = tiny.tensors.get_mut("model.layers.1.mlp.down_proj.weight").unwrap();
    weights.iter_mut().for_each(|w| *w *= -0.5);
    load(&tiny)
}

fn config(model: &Model) -> CacheConfig {
    model.config().cache_config().codec("k5v4".parse().unwrap())
}

fn cache(model: &Model) -> SequenceCache {
    SequenceCache::new(&Device::cpu(), config(model)).unwrap()
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions { max_tokens, ..GenerateOptions::default() }
}

fn plain(model: &Model, prompt: &[u32], options: &GenerateOptions) -> Generated {
    generate(model, &mut cache(model), prompt, options, |_| ControlFlow::Continue(())).unwrap()
}

/// With a draft of so many tokens; and the cache.
fn drafted(model: &Model, small: &Model, tokens: usize, options: &GenerateOptions) -> (Generated, SequenceCache) {
    let (mut large_cache, mut small_cache) = (cache(model), cache(small));
    let mut draft = Draft::new(small, &mut small_cache, tokens).unwrap();
    let go_on = |_| ControlFlow::Continue(());
    let generated = generate_with_draft(model, &mut large_cache, &mut draft, &PROMPT, options, go_on).unwrap();
    (generated, large_cache)
}

#[test]
fn a_draft_changes_no_greedy_text() {
    let (model, other) = (load(&TinyModel::new()), other());
    let expected = plain(&model, &PROMPT, &options(40));
    assert_eq!((expected.drafted, expected.accepted), (0, 0));
    for tokens in [1, 3, 7, 64] {
        for small in [&model, &other] {
            let (generated, mut cache) = drafted(&model, small, tokens, &options(40));
            assert_eq!((&generated.tokens, generated.stop), (&expected.tokens, StopReason::MaxTokens));
            // The last token has not run, as without a draft.
            assert_eq!(cache.tokens().unwrap(), PROMPT.len() + 39);
            assert!(generated.drafted >= 19 && generated.accepted <= generated.drafted);
            let same = std::ptr::eq(small, &model);
            assert_eq!(same, generated.accepted == generated.drafted, "{tokens}: {generated:?}");
            // What is in the cache is what was said.
            let last = *generated.tokens.last().unwrap();
            let more = generate(&model, &mut cache, &[last], &options(8), |_| ControlFlow::Continue(())).unwrap();
            assert_eq!(more.tokens, plain(&model, &PROMPT, &options(48)).tokens[40..]);
        }
    }
}

#[test]
fn a_text_with_a_draft_ends_where_it_ends_without() {
    let mut tiny = TinyModel::new();
    let other = other();
    let model = load(&tiny);
    // The context of 64 is full after 61 tokens.
    for max_tokens in [0, 1, 2, 5, 61, 1000] {
        let expected = plain(&model, &PROMPT, &options(max_tokens));
        for small in [&model, &other] {
            let (generated, _) = drafted(&model, small, 5, &options(max_tokens));
            assert_eq!((&generated.tokens, generated.stop), (&expected.tokens, expected.stop), "{max_tokens}");
        }
    }
    let expected = plain(&model, &PROMPT, &options(40)).tokens;
    let end = expected[17];
    let first = expected.iter().position(|&token| token == end).unwrap();
    tiny.config["eos_token_id"] = end.into();
    let ends = load(&tiny);
    let (generated, cache) = drafted(&ends, &model, 5, &options(40));
    assert_eq!((&generated.tokens[..], generated.stop), (&expected[..first], StopReason::EndToken));
    assert_eq!(cache.tokens().unwrap(), PROMPT.len() + first);
}

#[test]
fn drafts_have_bounds() {
    let model = load(&TinyModel::new());
    for got in [0, 65] {
        let mut cache = cache(&model);
        assert!(matches!(Draft::new(&model, &mut cache, got), Err(Error::DraftTokens { got: g }) if g == got));
    }
    // A draft without room proposes nothing, and the text is the same.
    let mut small = SequenceCache::new(&Device::cpu(), config(&model).capacity(1)).unwrap();
    small.truncate(0).unwrap();
    let mut tiny = TinyModel::new();
    tiny.config["max_position_embeddings"] = 8.into();
    let short = load(&tiny);
    let (generated, _) = drafted(&model, &short, 2, &options(20));
    assert_eq!(generated.tokens, plain(&model, &PROMPT, &options(20)).tokens);
    assert!((1..=4).contains(&generated.drafted), "{generated:?}");
}

#[test]
fn penalties_and_draws_work_with_a_draft() {
    let (model, other) = (load(&TinyModel::new()), other());
    let penalty = GenerateOptions { repetition_penalty: 1.7, ..options(40) };
    assert_eq!(drafted(&model, &other, 4, &penalty).0.tokens, plain(&model, &PROMPT, &penalty).tokens);
    let draws = |seed| GenerateOptions { temperature: 1.0, top_k: 20, seed, ..options(40) };
    let text = |seed| drafted(&model, &other, 4, &draws(seed)).0;
    assert_eq!(text(1).tokens, text(1).tokens);
    assert_ne!(text(1).tokens, text(2).tokens);
    let (drawn, accepted) = (text(1).drafted, text(1).accepted);
    assert!(accepted > 0 && accepted < drawn, "{accepted} of {drawn}");
    // Its own draws hold all, whatever the seed.
    let same = drafted(&model, &model, 4, &draws(3)).0;
    assert_eq!(same.accepted, same.drafted);
}

#[test]
fn texts_of_a_batch_are_those_of_their_prompts() {
    let model = load(&TinyModel::new());
    let prompts: [&[u32]; 3] = [&PROMPT, &[0, 1], &[9; 30]];
    let seeded = GenerateOptions { temperature: 1.0, seed: 5, ..options(50) };
    for options in [options(50), seeded, GenerateOptions { chunk: 7, ..options(3) }, options(0)] {
        let mut attention = Attention::new(&Device::cpu(), config(&model).capacity(3 * 64)).unwrap();
        let texts = prompts.map(|prompt| (attention.cache_mut().add_sequence(), prompt));
        let mut streamed = [(); 3].map(|()| Vec::new());
        let generated = generate_batch(&model, &mut attention, &texts, &options, |text, progress| {
            if let Progress::Token(token) = progress {
                streamed[text].push(token);
            }
            ControlFlow::Continue(())
        });
        for ((generated, prompt), streamed) in generated.unwrap().iter().zip(prompts).zip(&streamed) {
            let alone = plain(&model, prompt, &options);
            assert_eq!((&generated.tokens, generated.stop), (&alone.tokens, alone.stop));
            assert_eq!((streamed, generated.prompt_tokens), (&alone.tokens, prompt.len()));
        }
    }
}

#[test]
fn a_batch_that_fails_leaves_its_sequences_as_they_were() {
    let model = load(&TinyModel::new());
    let mut attention = Attention::new(&Device::cpu(), config(&model).capacity(64)).unwrap();
    let [a, b] = [(); 2].map(|()| attention.cache_mut().add_sequence());
    let mut run = |texts: &[(tqkv::SequenceId, &[u32])]| {
        generate_batch(&model, &mut attention, texts, &options(9), |_, _| ControlFlow::Continue(())).unwrap_err()
    };
    // One page for two.
    assert!(matches!(run(&[(a, &[1; 30]), (b, &[1])]), Error::Cache(tqkv::Error::OutOfPages { .. })));
    assert!(matches!(run(&[]), Error::NoTokens));
    assert!(matches!(run(&[(a, &[1]), (b, &[])]), Error::NoTokens));
    assert!(matches!(run(&[(a, &[1]), (b, &[256])]), Error::Token { got: 256, .. }));
    assert_eq!((attention.cache().len(a).unwrap(), attention.cache().len(b).unwrap()), (0, 0));
}
