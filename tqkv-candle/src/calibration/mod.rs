//! Calibrations: what a model's keys are like, measured once, so that a cache stores them better.
//!
//! | file | duty |
//! |---|---|
//! | `measure` | means and variances of keys and queries over text |
//! | `plan` | which bits a cache has where |
//! | `search` | the plan that is best for a budget |
//! | `file` | calibrations in files |
//! | `error` | what can be wrong with one |

mod error;
mod file;
mod measure;
mod plan;
mod search;

pub use error::CalibrationError;
pub use plan::Plan;
pub use search::{Search, Tried};

use crate::error::Result;
use crate::models::Model;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::sync::Arc;
use tqkv::CacheConfig;

/// Shift and scale of the key channels of every layer, measured over text: see [`CacheConfig::channels_at`].
///
/// The shift is a channel's mean, the scale √(rms of the keys about it / rms of the queries), times a factor of each head
/// that keeps the keys' length. Both are of keys after the rotary embedding, and so depend on how far the text goes: calibrate
/// with texts as long as the contexts that the cache is for.
///
/// ```no_run
/// use std::{ops::ControlFlow, path::Path};
/// use tqkv_candle::{Calibration, Model, Origin, Vocabulary, fingerprint};
/// let path = Path::new("models/SmolLM2-135M-Instruct.Q4_1.gguf");
/// let model = Model::load(path)?;
/// let text = Vocabulary::load(path, model.config())?.encode_prompt("A long text.")?;
/// let origin = Origin::new(fingerprint(path)?, vec!["a long text".into()]);
/// let measured = Calibration::measure(&model, &[text], origin, |_| ControlFlow::Continue(()))?;
/// if let Some(calibration) = measured {
///     calibration.save(Path::new("smollm2.calibration"))?;
///     let config = calibration.apply(model.config().cache_config().codec("k4v4".parse()?))?;
/// }
/// # Ok::<(), tqkv_candle::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    origin: Origin,
    layers: Vec<Layer>,
    plan: Option<Plan>,
}

/// Tokens of a prompt that are looked at.
const PROMPT: usize = 2048;

/// Where a calibration comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Origin {
    /// The model, as [`fingerprint`](crate::fingerprint) tells it from others.
    pub model: String,
    /// Names of the texts.
    pub texts: Vec<String>,
    /// Tokens that the model ran over.
    pub tokens: usize,
}

impl Origin {
    /// Of a model and texts; the tokens are counted by [`Calibration::measure`].
    pub fn new(model: String, texts: Vec<String>) -> Self {
        Self { model, texts, tokens: 0 }
    }
}

/// Of one layer, \[kv_heads, head_dim\] each.
#[derive(Debug, Clone, PartialEq)]
struct Layer {
    kv_heads: usize,
    head_dim: usize,
    shift: Arc<[f32]>,
    scale: Arc<[f32]>,
}

impl Calibration {
    /// Runs a model over pieces of text, each from position 0 on, with an uncompressed cache on the CPU. `on_tokens` is called
    /// after every few hundred tokens with the number done; the result is none if it says that this is enough.
    ///
    /// # Errors
    /// [`CalibrationError::Tokens`] if no piece is longer than the four positions that are left out,
    /// [`CalibrationError::Statistics`] for keys or queries that are not finite,
    /// [`Error::ContextOverflow`](crate::Error::ContextOverflow) for a piece that is longer than the model's context; those of
    /// [`Model::forward`].
    pub fn measure(
        model: &Model,
        pieces: &[Vec<u32>],
        origin: Origin,
        on_tokens: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Option<Self>> {
        measure::measure(model, pieces, origin, on_tokens)
    }

    /// Only the shift, as the mean of a prompt's keys: the beginning of the prompt runs with an uncompressed cache for that. For
    /// caches that go on from this prompt, where no texts were measured before.
    ///
    /// # Errors
    /// Those of [`Calibration::measure`]; a prompt must have five tokens at least.
    pub fn of_prompt(model: &Model, prompt: &[u32]) -> Result<Self> {
        let piece = prompt[..prompt.len().min(PROMPT)].to_vec();
        let origin = Origin::new(String::new(), vec!["the prompt".into()]);
        let measured = Self::measure(model, &[piece], origin, |_| ControlFlow::Continue(()))?;
        let mut calibration = measured.ok_or(CalibrationError::Tokens { got: 0, expected: 1 })?;
        for layer in &mut calibration.layers {
            layer.scale = vec![1.0; layer.scale.len()].into();
        }
        Ok(calibration)
    }

    /// Where it comes from.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// Which bits a cache best has where, if that was looked for.
    pub fn plan(&self) -> Option<&Plan> {
        self.plan.as_ref()
    }

    /// With a plan to go with it.
    pub fn with_plan(self, plan: Plan) -> Self {
        Self { plan: Some(plan), ..self }
    }

    /// Layers that it is for.
    pub fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Fails unless it is for the model of this [`fingerprint`](crate::fingerprint).
    ///
    /// # Errors
    /// [`CalibrationError::Model`].
    pub fn expect_model(&self, fingerprint: &str) -> Result<()> {
        if self.origin.model == fingerprint {
            return Ok(());
        }
        let (got, expected) = (self.origin.model.clone(), fingerprint.to_owned());
        Err(CalibrationError::Model { got, expected }.into())
    }

    /// A cache that stores its keys with these shifts and scales.
    ///
    /// # Errors
    /// [`CalibrationError::Layers`] and [`CalibrationError::Shape`] if the cache is another model's.
    pub fn apply(&self, config: CacheConfig) -> Result<CacheConfig> {
        let (got, expected) = (self.layers.len(), config.layers());
        if got != expected {
            return Err(CalibrationError::Layers { got, expected }.into());
        }
        for (i, layer) in self.layers.iter().enumerate() {
            let heads = config.layer_heads(i);
            let (got, expected) = ([layer.kv_heads, layer.head_dim], [heads.kv_heads, heads.head_dim]);
            if got != expected {
                let (tensor, expected) = (file::name(i, "shift"), format!("{expected:?}"));
                return Err(CalibrationError::Shape { tensor, got: got.to_vec(), expected }.into());
            }
        }
        let channels = self.layers.iter().enumerate();
        Ok(channels.fold(config, |config, (i, layer)| config.channels_at(i, layer.shift.clone(), layer.scale.clone())))
    }
}
