//! What can be wrong with a calibration.

/// Why a calibration cannot be read, or is not this model's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CalibrationError {
    /// The file is no safetensors file, or is cut off.
    #[error("{0}")]
    File(safetensors::SafeTensorError),
    /// A safetensors file of something else.
    #[error("no calibration: its metadata lacks {missing}")]
    Metadata {
        /// The entry that is missing.
        missing: &'static str,
    },
    /// The metadata says other things than this version knows.
    #[error("metadata: {0}")]
    Json(serde_json::Error),
    /// Written by another version of the program.
    #[error("version {got}, expected {expected}")]
    Version {
        /// The file's version.
        got: u64,
        /// The one that is read.
        expected: u64,
    },
    /// The content is not what was written.
    #[error("damaged: checksum {got}, expected {expected}")]
    Checksum {
        /// Of what is there.
        got: String,
        /// What the file says.
        expected: String,
    },
    /// A layer's tensor is not there.
    #[error("tensor {tensor} is missing, expected {layers} layers")]
    MissingLayer {
        /// The tensor.
        tensor: String,
        /// How many layers the metadata promises.
        layers: usize,
    },
    /// A tensor that no layer has.
    #[error("tensor {tensor} belongs to none of the {layers} layers")]
    UnexpectedTensor {
        /// The tensor.
        tensor: String,
        /// How many layers the metadata promises.
        layers: usize,
    },
    /// A tensor's elements are no f32.
    #[error("tensor {tensor} is {got:?}, expected F32")]
    Dtype {
        /// The tensor.
        tensor: String,
        /// Its element type.
        got: safetensors::Dtype,
    },
    /// A tensor of another shape.
    #[error("tensor {tensor} has shape {got:?}, expected {expected}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Its shape.
        got: Vec<usize>,
        /// What it should be.
        expected: String,
    },
    /// A shift or a scale that no key can be stored with.
    #[error("tensor {tensor} holds {got}, expected {expected}")]
    Value {
        /// The tensor.
        tensor: String,
        /// The number.
        got: f32,
        /// What it should be.
        expected: &'static str,
    },
    /// Made for another model.
    #[error("made for the model {got}, expected {expected}")]
    Model {
        /// The calibration's model.
        got: String,
        /// The model at hand.
        expected: String,
    },
    /// Made for a cache of other layers.
    #[error("{got} layers, expected {expected}")]
    Layers {
        /// The calibration's layers.
        got: usize,
        /// The cache's layers.
        expected: usize,
    },
    /// Texts too short to calibrate with.
    #[error("{got} tokens to calibrate with, expected at least {expected} in a piece of text")]
    Tokens {
        /// How many the longest piece has.
        got: usize,
        /// How many are needed.
        expected: usize,
    },
    /// The model's keys or queries are not finite.
    #[error("the keys or queries of layer {layer} are not finite")]
    Statistics {
        /// The layer.
        layer: usize,
    },
    /// A budget that no cache keeps to.
    #[error("{got} bits an element, expected at least {expected}")]
    Budget {
        /// The budget.
        got: f64,
        /// The least that a cache takes.
        expected: f64,
    },
}
