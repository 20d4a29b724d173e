//! Which bits a cache has where.

use super::CalibrationError;
use crate::error::Result;
use serde::{Deserialize, Serialize};
use tqkv::cache::CacheCodec;
use tqkv::{CacheConfig, CodecPair};

/// Codecs by layer, and what is kept besides: what [`Search`](super::Search) found best for a budget.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Text", into = "Text")]
pub struct Plan {
    /// What every layer keeps besides all positions; its codec of all positions is not used.
    pub codec: CacheCodec,
    /// Of all positions, layer by layer.
    pub layers: Vec<CodecPair>,
    /// Bits an element that it keeps to, all counted.
    pub budget: f64,
    /// Positions of the sequences that the budget is for.
    pub context: usize,
}

impl Plan {
    /// A cache of these codecs.
    ///
    /// # Errors
    /// [`CalibrationError::Layers`] if it is another model's.
    pub fn apply(&self, config: CacheConfig) -> Result<CacheConfig> {
        let (got, expected) = (self.layers.len(), config.layers());
        if got != expected {
            return Err(CalibrationError::Layers { got, expected }.into());
        }
        let layers = self.layers.iter().enumerate();
        Ok(layers.fold(config.cache_codec(self.codec), |config, (layer, &codec)| config.codec_at(layer, codec)))
    }
}

/// A plan in JSON: codecs by their names.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    codec: String,
    layers: Vec<String>,
    budget: f64,
    context: usize,
}

impl From<Plan> for Text {
    fn from(plan: Plan) -> Self {
        let Plan { codec, layers, budget, context } = plan;
        let layers = layers.iter().map(CodecPair::to_string).collect();
        Self { codec: codec.to_string(), layers, budget, context }
    }
}

impl TryFrom<Text> for Plan {
    type Error = tqkv::Error;

    fn try_from(text: Text) -> Result<Self, tqkv::Error> {
        let Text { codec, layers, budget, context } = text;
        let layers = layers.iter().map(|name| name.parse()).collect::<Result<_, tqkv::Error>>()?;
        Ok(Self { codec: codec.parse()?, layers, budget, context })
    }
}
