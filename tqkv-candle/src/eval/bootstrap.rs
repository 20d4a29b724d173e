//! How sure a mean is.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Neighbours that are drawn together: predictions of one passage are alike.
const BLOCK: usize = 64;

/// Means that are drawn.
const DRAWS: usize = 1000;

/// Between which values the mean of `values` lies with a probability of 95 %: what 1000 means of as many blocks of 64 in a row,
/// drawn with the same seed each time, leave when the outer 5 % are cut off.
pub fn interval(values: &[f64]) -> [f64; 2] {
    if values.is_empty() {
        return [0.0; 2];
    }
    let blocks: Vec<(f64, usize)> = values.chunks(BLOCK).map(|block| (block.iter().sum(), block.len())).collect();
    let mut random = ChaCha8Rng::seed_from_u64(0);
    let mut mean = || {
        let drawn = (0..blocks.len()).map(|_| blocks[random.random_range(0..blocks.len())]);
        let (sum, n) = drawn.fold((0.0, 0), |(sum, n), block| (sum + block.0, n + block.1));
        sum / n as f64
    };
    let mut means: Vec<f64> = (0..DRAWS).map(|_| mean()).collect();
    means.sort_by(f64::total_cmp);
    [means[DRAWS / 40], means[DRAWS - 1 - DRAWS / 40]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_holds_the_mean_and_narrows_with_more_values() {
        assert_eq!(interval(&[]), [0.0; 2]);
        assert_eq!(interval(&[3.0; 200]), [3.0; 2]);
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let values: Vec<f64> = (0..64 * 1024).map(|_| random.random_range(0.0..1.0)).collect();
        let [low, high] = interval(&values);
        // A uniform number's standard deviation is √(1/12): that of the mean 0.0011, and 1.96 of them on both sides.
        assert!(low < 0.5 && 0.5 < high && (0.0035..0.0055).contains(&(high - low)), "{low} to {high}");
        let [a, b] = interval(&values[..64 * 64]);
        assert!(3.0 * (high - low) < b - a && b - a < 5.0 * (high - low), "{a} to {b}");
        assert_eq!(interval(&values), [low, high]);
    }
}
