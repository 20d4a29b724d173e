//! What is done with random input: by the fuzzers of `fuzz/`, by `cargo xtask soak`, and by the tests of this crate, which do
//! the same on stable.

pub mod config;
pub mod model;
pub mod mutate;
pub mod scale;
pub mod soak;
pub mod step;
pub mod targets;

#[allow(missing_docs, clippy::should_implement_trait)]
#[path = "../../tqkv/tests/support/mod.rs"]
pub mod support;
