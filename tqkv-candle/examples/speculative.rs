//! Speculative decoding on compressed caches: a small model drafts, a large one checks all drafts in one run, and
//! `KvCache::truncate` takes back what it rejects. The text is that of greedy decoding with the large model alone, token for
//! token, which this program checks.
//!
//! ```text
//! cargo run --release -p tqkv-candle --example speculative -- LARGE_MODEL_DIR SMALL_MODEL_DIR [TOKENS] [DRAFTS] [PROMPT]
//! ```

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, Instant};
use tqkv::{CodecPair, Device};
use tqkv_candle::{GenerateOptions, Model, SequenceCache, Vocabulary, generate};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// A model, its cache, and the tokens that the cache holds.
struct Runner<'a> {
    model: &'a Model,
    cache: SequenceCache,
}

impl<'a> Runner<'a> {
    fn new(model: &'a Model, codec: CodecPair) -> Result<Self> {
        let config = model.config();
        let cache = SequenceCache::new(&Device::cpu(), config.cache_config().codec(codec), config)?;
        Ok(Runner { model, cache })
    }

    /// Runs what the cache lacks of `tokens`; the likeliest token after each of the last `n`.
    fn next(&mut self, tokens: &[u32], n: usize) -> Result<Vec<u32>> {
        let hidden = self.model.forward(&tokens[self.cache.tokens()?..], &mut self.cache)?;
        let rows = hidden.dim(0)?;
        let logits = self.model.logits(&hidden.narrow(0, rows - n, n)?)?.to_vec2::<f32>()?;
        Ok(logits.iter().map(|row| likeliest(row)).collect())
    }
}

/// The first of equal maxima, as `generate` takes it.
fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap_or(0) as u32
}

struct Speculated {
    tokens: Vec<u32>,
    rounds: usize,
    /// Tokens that the small model proposed, and those of them that the large one would have chosen.
    drafted: usize,
    agreed: usize,
    time: Duration,
}

/// Greedy decoding of `large`, with `drafts` tokens of `small` checked at a time.
fn speculate(
    large: &mut Runner,
    small: &mut Runner,
    prompt: &[u32],
    count: usize,
    drafts: usize,
) -> Result<Speculated> {
    let mut tokens = prompt.to_vec();
    tokens.extend(large.next(prompt, 1)?);
    small.next(prompt, 1)?;
    let started = Instant::now();
    let (mut rounds, mut drafted, mut all_agreed) = (0, 0, 0);
    while tokens.len() < prompt.len() + count {
        let known = tokens.len();
        let drafts = drafts.min(prompt.len() + count - known);
        for _ in 0..drafts {
            tokens.extend(small.next(&tokens, 1)?);
        }
        // One run of the large model says what follows the last known token and each draft.
        let own = large.next(&tokens, drafts + 1)?;
        let agreed = own.iter().zip(&tokens[known..]).take_while(|(a, b)| a == b).count();
        tokens.truncate(known + agreed);
        // Both caches forget the rejected drafts; the large model's own token comes for nothing.
        large.cache.truncate(tokens.len())?;
        small.cache.truncate(tokens.len().min(small.cache.tokens()?))?;
        tokens.push(own[agreed]);
        (rounds, drafted, all_agreed) = (rounds + 1, drafted + drafts, all_agreed + agreed);
    }
    let time = started.elapsed();
    tokens.truncate(prompt.len() + count);
    Ok(Speculated { tokens: tokens.split_off(prompt.len()), rounds, drafted, agreed: all_agreed, time })
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [large, small, ..] = &arguments[..] else {
        return Err("usage: speculative LARGE_MODEL_DIR SMALL_MODEL_DIR [TOKENS] [DRAFTS] [PROMPT]".into());
    };
    let number = |i: usize, default: usize| arguments.get(i).map_or(Ok(default), |text| text.parse());
    let (count, drafts) = (number(2, 256)?.max(1), number(3, 4)?.max(1));
    let text = arguments.get(4).map_or("## Summary\n\nThis RFC proposes to ", String::as_str);

    let vocabulary = |dir: &str, model: &Model| Vocabulary::load(Path::new(dir), model.config());
    let (large_model, small_model) = (Model::load(Path::new(large))?, Model::load(Path::new(small))?);
    let words = vocabulary(large, &large_model)?;
    let prompt = words.encode_prompt(text)?;
    if prompt != vocabulary(small, &small_model)?.encode_prompt(text)? {
        return Err("the models have different vocabularies".into());
    }
    let codec: CodecPair = "k5v4".parse()?;

    // End tokens are left out of both ways, so that they stop at the same length.
    let mut plain = Runner::new(&large_model, codec)?;
    let options = GenerateOptions { max_tokens: count, ..GenerateOptions::default() };
    let greedy = generate(&large_model, &mut plain.cache, &prompt, &options, |_| ControlFlow::Continue(()))?;
    let (mut l, mut s) = (Runner::new(&large_model, codec)?, Runner::new(&small_model, codec)?);
    let speculated = speculate(&mut l, &mut s, &prompt, greedy.tokens.len(), drafts)?;

    let mut decoder = words.decoder();
    for &token in &speculated.tokens {
        print!("{}", decoder.push(token)?);
    }
    println!("{}\n", decoder.finish());
    let n = greedy.tokens.len();
    let rate = |time: Duration| n.saturating_sub(1) as f64 / time.as_secs_f64();
    println!("greedy:      {n} tokens, {:.0} tokens/s", rate(greedy.decode_time));
    println!(
        "speculative: {n} tokens, {:.0} tokens/s, {:.2} tokens a run of the large model ({drafts} drafts, {:.0} % accepted)",
        rate(speculated.time),
        n.saturating_sub(1) as f64 / speculated.rounds.max(1) as f64,
        100.0 * speculated.agreed as f64 / speculated.drafted.max(1) as f64
    );
    if speculated.tokens != greedy.tokens {
        return Err("speculative decoding gave another text than greedy decoding".into());
    }
    println!("both gave the same tokens");
    Ok(())
}
