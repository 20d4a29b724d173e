//! Llama models on [candle](candle_core) whose attention runs on a tqkv compressed KV cache.

mod cache;
mod config;
mod error;
mod eval;
mod generate;
mod model;
mod text;
mod weights;

pub use cache::SequenceCache;
pub use config::{Llama3Rope, LlamaConfig};
pub use error::{Error, Result};
pub use eval::{Fidelity, Windows, evaluate};
pub use generate::{GenerateOptions, Generated, StopReason, generate};
pub use model::Llama;
pub use text::{Decoder, Encoded, Vocabulary};
pub use weights::Weights;
