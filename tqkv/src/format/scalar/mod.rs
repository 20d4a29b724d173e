//! Scalar quantizers of a unit normal variable.

pub(crate) mod cells;
mod native;
mod seed;

pub(super) use seed::{SIGNS_256, SIGNS_512};

use std::sync::LazyLock;

/// Levels and decision boundaries of a scalar quantizer for a unit normal variable, ascending.
#[derive(Debug)]
pub struct Codebook {
    /// The value of each code.
    pub levels: Vec<f32>,
    /// A code is the number of boundaries that the value is strictly greater than: midpoints of the levels, in f32.
    pub boundaries: Vec<f32>,
}

impl Codebook {
    fn new(levels: Vec<f32>) -> Self {
        let boundaries = levels.windows(2).map(|w| (w[0] + w[1]) * 0.5).collect();
        Codebook { levels, boundaries }
    }

    fn symmetric(half: &[f32]) -> Self {
        Codebook::new(half.iter().rev().map(|c| -c).chain(half.iter().copied()).collect())
    }

    /// The code of a scaled element: how many boundaries it is strictly greater than. NaN gives 0.
    pub fn code(&self, u: f32) -> u16 {
        self.boundaries.partition_point(|&b| u > b) as u16
    }

    /// The code that a zero vector is stored as, 2^(bits-1) - 1.
    pub fn zero_code(&self) -> u16 {
        (self.levels.len() / 2 - 1) as u16
    }
}

pub(super) static SEED_BOOKS: LazyLock<[Option<Codebook>; 9]> = LazyLock::new(|| {
    use seed::*;
    [
        None,
        None,
        Some(Codebook::new(BOOK_2.to_vec())),
        Some(Codebook::new(BOOK_3.to_vec())),
        Some(Codebook::new(BOOK_4.to_vec())),
        Some(Codebook::new(BOOK_5.to_vec())),
        Some(Codebook::new(BOOK_6.to_vec())),
        None,
        Some(Codebook::new(BOOK_8.to_vec())),
    ]
});

pub(super) static NATIVE_BOOKS: LazyLock<[Option<Codebook>; 9]> = LazyLock::new(|| {
    use native::*;
    [
        None,
        None,
        Some(Codebook::symmetric(&HALF_2)),
        Some(Codebook::symmetric(&HALF_3)),
        Some(Codebook::symmetric(&HALF_4)),
        Some(Codebook::symmetric(&HALF_5)),
        Some(Codebook::symmetric(&HALF_6)),
        Some(Codebook::symmetric(&HALF_7)),
        Some(Codebook::symmetric(&HALF_8)),
    ]
});
