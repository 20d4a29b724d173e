//! What the scales of a row mean.

use super::DType;

/// What scales mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scaling {
    /// None: dense floats.
    None,
    /// One f16: the factor from codebook levels to the decoded vector, chosen so that the vector keeps its norm.
    Corrected,
    /// One f32: the L2 norm of the rotated vector. Factor: norm · (1/√D).
    Norm,
    /// One f32 for each 256 elements: their root mean square. Factor: rms / `scale_factor_d512`.
    BlockRms,
}

impl Scaling {
    /// Scales of a row of so many elements.
    pub(super) fn per_row(self, elements: usize) -> usize {
        match self {
            Scaling::None => 0,
            Scaling::Corrected | Scaling::Norm => 1,
            Scaling::BlockRms => elements / 256,
        }
    }

    /// The type of a scale.
    pub(super) fn dtype(self) -> DType {
        if self == Scaling::Corrected { DType::F16 } else { DType::F32 }
    }
}
