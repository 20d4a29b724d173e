//! Language models on [candle](candle_core) whose attention runs on a tqkv compressed KV cache: Llama, Mistral, Qwen 2 and
//! 3, Gemma 2 and 3, Phi 3, from GGUF files and from Hugging Face directories.
//!
//! A model computes in f32 on the CPU, from quantized weights if the file has them; its keys (after the rotary embedding)
//! and values live in a [`tqkv::KvCache`], on any device that tqkv has. [`Attention`] does the same for a candle model of
//! your own.
//!
//! ```no_run
//! use std::{ops::ControlFlow, path::Path};
//! use tqkv_candle::{GenerateOptions, Model, SequenceCache, Vocabulary, generate};
//!
//! let dir = Path::new("models/Llama-3.2-1B");
//! let model = Model::load(dir)?;
//! let vocabulary = Vocabulary::load(dir, model.config())?;
//! // Keys in 5 bits, values in 4; room for 4096 tokens.
//! let config = model.config().cache_config().codec("k5v4".parse()?).capacity(4096);
//! let mut cache = SequenceCache::new(&tqkv::Device::cpu(), config)?;
//!
//! let prompt = vocabulary.encode_prompt("Once upon a time")?;
//! let mut decoder = vocabulary.decoder();
//! generate(&model, &mut cache, &prompt, &GenerateOptions::default(), |token| {
//!     print!("{}", decoder.push(token).unwrap_or_default());
//!     ControlFlow::Continue(())
//! })?;
//! # Ok::<(), tqkv_candle::Error>(())
//! ```

mod attention;
mod batch;
mod cache;
mod calibration;
mod draft;
mod error;
mod eval;
mod fields;
mod fingerprint;
mod generate;
mod models;
mod room;
mod sampling;
mod text;
mod tokenizer;

pub use attention::{Attention, AttentionStep};
pub use batch::generate_batch;
pub use cache::SequenceCache;
pub use calibration::{Calibration, CalibrationError, Origin, Plan, Search, Tried};
pub use draft::Draft;
pub use error::{Error, Result};
pub use eval::{Fidelity, Found, Haystack, Peer, Windows, evaluate, find_needles, first_difference, run_freely};
pub use fingerprint::fingerprint;
pub use generate::{GenerateOptions, Generated, Progress, StopReason, generate, generate_with, generate_with_draft};
pub use models::{Activation, GgufError, Metadata, Model, ModelConfig, Rope, RopeScaling, Weights};
pub use sampling::Sampler;
pub use text::{TextProgress, TextStream, generate_text};
pub use tokenizer::{ChatTemplate, Decoder, Encoded, GgufTokenizer, Message, Tokenizer, Vocabulary};

/// The guide's snippets, compiled and run by `cargo test --doc`.
#[cfg(doctest)]
mod guides {
    #[doc = include_str!("../../docs/candle.md")]
    struct Candle;
}
