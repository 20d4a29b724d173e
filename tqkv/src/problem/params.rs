//! What an operation is asked, beside its buffers.

use crate::compute::Buffer;
use crate::format::{DType, RowFormat};
use std::ops::Range;

/// Which basis vectors are in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    /// The model's own: what was given to [`quantize`](crate::ops::quantize). Vectors have head_dim elements.
    Original,
    /// After signs and transform: what is stored. Vectors have [`RowFormat::row_dim`] elements. Dot products are the same in both.
    Rotated,
}

impl Domain {
    /// Elements of a vector in this domain.
    pub(crate) fn dim(self, row: &RowFormat) -> usize {
        match self {
            Domain::Original => row.head_dim(),
            Domain::Rotated => row.row_dim(),
        }
    }
}

/// Into the rotated domain, or back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Signs, then transform.
    Forward,
    /// Transform, then signs.
    Inverse,
}

/// What attention computes. Start from [`AttentionParams::new`] and change what differs.
#[derive(Clone, Debug)]
pub struct AttentionParams {
    /// Factor on q·k, usually 1/√head_dim.
    pub scale: f32,
    /// Whether a query sees no position after its own (on by default).
    pub causal: bool,
    /// How many of the newest positions up to its own a query sees; all if `None`.
    pub window: Option<usize>,
    /// Scores become c·tanh(score/c) before the softmax (Gemma 2, arXiv:2408.00118, section 2).
    pub softcap: Option<f32>,
    /// One logit a query head, f32 \[heads\], that takes probability and adds no value (gpt-oss; "Efficient streaming
    /// language models with attention sinks", arXiv:2309.17453, section 3.3).
    pub sink_logits: Option<Buffer>,
    /// The domain of queries and output: with [`Domain::Rotated`] the caller rotates both himself.
    pub domain: Domain,
    /// How exact the result must be.
    pub precision: Precision,
}

/// How exact attention must be. A backend may be more exact than it must.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Precision {
    /// As the type of the queries suggests: f32 as sums in f32 are, f16 and bf16 as [`Precision::Half`].
    #[default]
    OfQueries,
    /// As products of half precision are, whatever the type of the queries. On a CPU with AVX-512 VNNI levels, queries and weights
    /// are integers of 16 bits then, twice as many products an instruction: scores are within 2e-5 |q| |k| scale, and outputs within
    /// 5e-4 relative where |q| |k| scale is up to 16 and values do not cancel (1e-3 for a head_dim below 64), in proportion where it is larger. CUDA takes
    /// queries of half types to f16 products (2e-3), and f32 queries to products as exact as f32 whatever is said here.
    Half,
}

impl Precision {
    /// Whether queries of a type may be answered in half precision.
    pub(crate) fn allows_half(self, queries: DType) -> bool {
        self == Precision::Half || matches!(queries, DType::F16 | DType::BF16)
    }
}

impl AttentionParams {
    /// Causal, over all positions, in the model's own domain.
    pub fn new(scale: f32) -> Self {
        AttentionParams {
            scale,
            causal: true,
            window: None,
            softcap: None,
            sink_logits: None,
            domain: Domain::Original,
            precision: Precision::OfQueries,
        }
    }

    /// With 1/√head_dim as scale.
    pub fn for_head_dim(head_dim: usize) -> Self {
        AttentionParams::new(1.0 / (head_dim as f32).sqrt())
    }
}

/// Which positions to decode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Positions {
    /// Consecutive ones.
    Range(Range<usize>),
    /// Any, in any order, repeats allowed.
    List(Vec<u32>),
}

impl Positions {
    /// How many.
    pub fn len(&self) -> usize {
        match self {
            Positions::Range(r) => r.len(),
            Positions::List(l) => l.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether there is one, and none is `end` or more.
    pub(crate) fn all_below(&self, end: usize) -> bool {
        match self {
            Positions::Range(r) => !r.is_empty() && r.end <= end,
            Positions::List(l) => !l.is_empty() && l.iter().all(|&p| (p as usize) < end),
        }
    }

    pub(crate) fn get(&self, i: usize) -> usize {
        match self {
            Positions::Range(r) => r.start + i,
            Positions::List(l) => l[i] as usize,
        }
    }
}

impl From<Range<usize>> for Positions {
    fn from(range: Range<usize>) -> Self {
        Positions::Range(range)
    }
}

impl From<usize> for Positions {
    /// A single position (`usize::MAX` gives the empty range, which decodes nothing).
    fn from(position: usize) -> Self {
        Positions::Range(position..position.saturating_add(1))
    }
}

/// The order of axes of a decoded block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowOrder {
    /// \[positions, kv_heads, head_dim\], as [`quantize`](crate::ops::quantize) takes it.
    TokenMajor,
    /// \[kv_heads, positions, head_dim\], as mlx-native gives it.
    HeadMajor,
}
