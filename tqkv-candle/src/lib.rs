//! Llama models on [candle](candle_core) whose attention runs on a tqkv compressed KV cache.
//!
//! The model computes in f32 on the CPU; its keys (after the rotary embedding) and values live in a
//! [`tqkv::KvCache`], on any device that tqkv has.
//!
//! ```no_run
//! use std::{ops::ControlFlow, path::Path};
//! use tqkv_candle::{GenerateOptions, Llama, SequenceCache, Vocabulary, generate};
//!
//! let dir = Path::new("models/Llama-3.2-1B");
//! let model = Llama::load(dir)?;
//! let vocabulary = Vocabulary::load(dir, model.config())?;
//! // Keys in 5 bits, values in 4; room for 4096 tokens.
//! let config = model.config().cache_config().codec("k5v4".parse()?).capacity(4096);
//! let mut cache = SequenceCache::new(&tqkv::Device::cpu(), config, model.config())?;
//!
//! let prompt = vocabulary.encode_prompt("Once upon a time")?;
//! let mut decoder = vocabulary.decoder();
//! generate(&model, &mut cache, &prompt, &GenerateOptions::default(), |token| {
//!     print!("{}", decoder.push(token).unwrap_or_default());
//!     ControlFlow::Continue(())
//! })?;
//! # Ok::<(), tqkv_candle::Error>(())
//! ```

mod cache;
mod config;
mod error;
mod eval;
mod generate;
mod model;
mod room;
mod sampling;
mod text;
mod tokenizer;
mod weights;

pub use cache::SequenceCache;
pub use config::{Llama3Rope, LlamaConfig};
pub use error::{Error, Result};
pub use eval::{Fidelity, Windows, evaluate};
pub use generate::{GenerateOptions, Generated, Progress, StopReason, generate, generate_with};
pub use model::Llama;
pub use sampling::Sampler;
pub use text::{TextProgress, generate_text};
pub use tokenizer::{ChatTemplate, Decoder, Encoded, GgufTokenizer, Message, Tokenizer, Vocabulary};
pub use weights::Weights;
