//! How the codes of a row are chosen.

/// How a writer chooses the codes of a native codec's rows. Readers need not know: the bytes mean the same. Rows of other codecs
/// leave no choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Encoding {
    /// The levels that are nearest to the elements, scaled to unit variance.
    #[default]
    Nearest,
    /// The same with 13 gains around that one, of which the one is kept whose levels' direction is nearest to the vector's. Errors
    /// are smaller, by a fifth at 4 bits and D = 64, and writing takes several times as long; see `docs/choosing-bits.md`. On the
    /// CPU only.
    Search,
}

/// 1 + k/32 for k = -6 … 6.
const GAINS: [f32; 13] =
    [0.8125, 0.84375, 0.875, 0.90625, 0.9375, 0.96875, 1.0, 1.03125, 1.0625, 1.09375, 1.125, 1.15625, 1.1875];

impl Encoding {
    /// Factors of the usual gain that are tried before one is taken.
    pub(crate) fn gains(self) -> &'static [f32] {
        match self {
            Encoding::Nearest => &[],
            Encoding::Search => &GAINS,
        }
    }
}
