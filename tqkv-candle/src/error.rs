//! What can go wrong, one variant a violated rule.
//!
//! A cause is part of its error's text, and therefore no `source`: who prints the chain of sources prints it once.

use std::path::PathBuf;

/// An error of this crate: each variant says what was got and what was expected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {cause}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {}: {cause}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        cause: std::io::Error,
    },
    /// A file that holds no calibration, or a damaged one.
    #[error("{}: {cause}", path.display())]
    CalibrationFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: crate::calibration::CalibrationError,
    },
    /// A calibration that cannot be made, or is not for the model or the cache at hand.
    #[error("calibration: {0}")]
    Calibration(crate::calibration::CalibrationError),
    /// A draft that proposes too few tokens at a time, or too many.
    #[error("{got} tokens drafted at a time, expected 1 to {}", tqkv::cache::RECENT_SLACK)]
    DraftTokens {
        /// How many.
        got: usize,
    },
    /// A JSON file is no JSON, or not what it should be.
    #[error("{}: {cause}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        cause: serde_json::Error,
    },
    /// A field has a value of the wrong type.
    #[error("{}: {field} is {got}, expected {expected}", path.display())]
    FieldType {
        /// The file.
        path: PathBuf,
        /// The field, with the names of the objects that it stands in.
        field: String,
        /// Its value.
        got: String,
        /// What it should be.
        expected: &'static str,
    },
    /// A field is missing.
    #[error("{}: {field} is missing", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The field, with the names of the objects that it stands in.
        field: String,
    },
    /// A field stands at two places with different values.
    #[error("config: {field} is {got}, but {other} is {expected}")]
    FieldConflict {
        /// The field, with the names of the objects that it stands in.
        field: String,
        /// Its value.
        got: String,
        /// The same field elsewhere.
        other: String,
        /// Its value there.
        expected: String,
    },
    /// The configuration asks for something that this crate does not compute.
    #[error("config: {field} is {got}, but only {expected} is supported")]
    Unsupported {
        /// The field, with the names of the objects that it stands in.
        field: String,
        /// Its value.
        got: String,
        /// What is supported.
        expected: String,
    },
    /// A field of the configuration has a value that makes no sense.
    #[error("config: {field} is {got}, expected {expected}")]
    ConfigValue {
        /// The field, with the names of the objects that it stands in.
        field: String,
        /// Its value.
        got: String,
        /// What it should be.
        expected: String,
    },
    /// A model directory holds neither `model.safetensors` nor `model.safetensors.index.json`.
    #[error("{} holds neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The directory.
        dir: PathBuf,
    },
    /// A safetensors file is truncated, or its header lies.
    #[error("{}: {cause}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        cause: safetensors::SafeTensorError,
    },
    /// A GGUF file is damaged, or says what it does not hold.
    #[error("{}: {cause}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        cause: crate::models::GgufError,
    },
    /// The index names a shard outside of the model's directory.
    #[error("{}: shard {got:?} of tensor {tensor}, expected a plain file name", path.display())]
    ShardName {
        /// The index file.
        path: PathBuf,
        /// The tensor mapped to it.
        tensor: String,
        /// The shard's name.
        got: String,
    },
    /// A shard and the index disagree about where a tensor is.
    #[error("tensor {name}: the index says {expected}, but it is in {got}")]
    ShardMismatch {
        /// The tensor.
        name: String,
        /// Where it was found.
        got: String,
        /// Where the index says that it is.
        expected: String,
    },
    /// The model needs a tensor that no file holds.
    #[error("tensor {name} is missing, expected shape {expected:?}")]
    MissingTensor {
        /// The tensor.
        name: String,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("tensor {name} has shape {got:?}, expected {expected:?}")]
    TensorShape {
        /// The tensor.
        name: String,
        /// Its shape.
        got: Vec<usize>,
        /// The shape that it should have.
        expected: Vec<usize>,
    },
    /// A tensor's elements are of a type that is no float.
    #[error("tensor {name} is {got:?}, expected F16, BF16 or F32")]
    TensorDtype {
        /// The tensor.
        name: String,
        /// Its element type.
        got: safetensors::Dtype,
    },
    /// The files hold a tensor that the model of this configuration does not have, so they are another one's.
    #[error("tensor {name} is no part of the model that the configuration describes")]
    UnexpectedTensor {
        /// The tensor.
        name: String,
    },
    /// The directory has no `tokenizer.json`, and the vocabulary is not the 256 byte values.
    #[error("{} has no tokenizer.json: expected one, or vocab_size 256 (bytes), got vocab_size {vocab_size}", dir.display())]
    NoTokenizer {
        /// The directory.
        dir: PathBuf,
        /// The size of the model's vocabulary.
        vocab_size: usize,
    },
    /// The tokenizer could not be loaded or failed on a text.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The file that it comes from.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A token is not in the model's vocabulary.
    #[error("token {got} is outside of the vocabulary, expected less than {vocab_size}")]
    Token {
        /// The token.
        got: u32,
        /// The size of the vocabulary.
        vocab_size: usize,
    },
    /// A tensor handed to [`Attention`](crate::Attention) is of a type that caches do not take.
    #[error("a tensor of {got:?}, expected F32, F16 or BF16")]
    TensorType {
        /// Its type.
        got: candle_core::DType,
    },
    /// No tokens were given.
    #[error("no tokens given, expected at least one")]
    NoTokens,
    /// More tokens than the model's context holds.
    #[error("{got} tokens are too many, the model's context is {limit}")]
    ContextOverflow {
        /// How many there would be.
        got: usize,
        /// The model's `max_position_embeddings`.
        limit: usize,
    },
    /// A chunk size of zero.
    #[error("a chunk of 0 tokens, expected at least 1")]
    ChunkSize,
    /// A temperature that is negative or no number.
    #[error("temperature {got}, expected a finite number of at least 0")]
    Temperature {
        /// The temperature.
        got: f32,
    },
    /// A sampling option outside of its range.
    #[error("{option} is {got}, expected {expected}")]
    Sampling {
        /// The option.
        option: &'static str,
        /// Its value.
        got: f32,
        /// What it should be.
        expected: &'static str,
    },
    /// A stop string that every text begins with.
    #[error("an empty stop string, expected at least one character")]
    StopString,
    /// The model comes without a chat template.
    #[error("{} has no chat template", path.display())]
    NoChatTemplate {
        /// Where the tokenizer comes from.
        path: PathBuf,
    },
    /// A chat template is no template, or refuses the conversation.
    #[error("{}: chat template: {message}", path.display())]
    ChatTemplate {
        /// Where it comes from.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The model's output holds no finite maximum: the weights or the cache hold NaN or infinity.
    #[error("the logits after position {position} are not finite")]
    NonFiniteLogits {
        /// The position of the token that they follow.
        position: usize,
    },
    /// An evaluation over no windows.
    #[error("0 windows, expected at least 1")]
    NoWindows,
    /// Windows too short to predict anything.
    #[error("windows of {got} tokens, expected at least 2")]
    WindowLength {
        /// The length asked for.
        got: usize,
    },
    /// A text that holds fewer windows than asked for.
    #[error("the text has {got} tokens, expected at least {expected} ({windows} windows of {length})")]
    TextTooShort {
        /// How many tokens the text has.
        got: usize,
        /// How many are needed.
        expected: usize,
        /// How many windows were asked for.
        windows: usize,
        /// Their length.
        length: usize,
    },
    /// Needles that a haystack has no facts for.
    #[error("{got} needles, expected 1 to {most}")]
    Needles {
        /// How many.
        got: usize,
        /// How many it can have.
        most: usize,
    },
    /// No format of another project has this name.
    #[error("unknown format {got:?}, expected {}", crate::Peer::names().collect::<Vec<_>>().join(", "))]
    UnknownPeer {
        /// The name.
        got: String,
    },
    /// A format of another project that has no rows of this size.
    #[error("{peer} has no rows of {got} elements, expected {expected}")]
    PeerHeadDim {
        /// The format.
        peer: crate::Peer,
        /// Elements of a row.
        got: usize,
        /// What it should be.
        expected: &'static str,
    },
    /// An error of the cache.
    #[error(transparent)]
    Cache(#[from] tqkv::Error),
    /// An error of candle.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl From<crate::calibration::CalibrationError> for Error {
    fn from(error: crate::calibration::CalibrationError) -> Self {
        Self::Calibration(error)
    }
}

/// So that a candle model whose functions return candle's results can use [`Attention`](crate::Attention) within.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Candle(error) => error,
            other => candle_core::Error::wrap(other),
        }
    }
}

/// This crate's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;
