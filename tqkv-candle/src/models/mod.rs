//! Language models, their configurations and their files. Each architecture is a description ([`architecture`]) that one
//! decoder ([`decoder`]) runs.

mod architecture;
mod blocks;
mod config;
mod decoder;
#[cfg(target_arch = "x86_64")]
mod dot;
mod gguf;
mod json;
mod linear;
mod metadata;
mod product;
mod refused;
mod rope;
mod weights;

pub use architecture::Activation;
pub use config::ModelConfig;
pub use decoder::Model;
pub use gguf::GgufError;
pub use metadata::Metadata;
pub use rope::{Rope, RopeScaling};
pub use weights::Weights;

use crate::error::{Error, Result};
use std::path::Path;

pub(crate) fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|cause| Error::Read { path: path.into(), cause })
}

pub(crate) fn parse_json(json: &[u8], path: &Path) -> Result<serde_json::Value> {
    serde_json::from_slice(json).map_err(|cause| Error::Json { path: path.into(), cause })
}
