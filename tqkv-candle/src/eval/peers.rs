//! Other projects' cache formats, emulated: rows become what the format would give back, and lie in an f32 cache.

use crate::attention::Tap;
use crate::error::{Error, Result};
use candle_core::{DType, Tensor};
use half::f16;
use rayon::prelude::*;
use std::fmt;
use std::str::FromStr;

/// A cache format of another project, from its public definition. Its rows lose what they would lose there; queries and sums are
/// as with an f32 cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Peer {
    /// 8-bit floats of 4 exponent bits, without a scale (vLLM's `fp8_e4m3` unless calibrated).
    Fp8,
    /// llama.cpp's blocks of 32: 8 bits and an f16 scale.
    Q8,
    /// llama.cpp's blocks of 32: 4 bits and an f16 scale.
    Q4,
    /// The same after a Hadamard rotation, as llama.cpp stores keys and values since its pull request 21038.
    RotatedQ4,
    /// vLLM's TurboQuant presets, in all layers (vLLM leaves out the first two and the last two): keys as [`Fp8`](Peer::Fp8) (8
    /// bits), or rotated, in Lloyd and Max's 8 or 16 values, with an f16 length (3 or 4 bits); values evenly spaced between the
    /// row's least and largest, f16 both.
    TurboQuant {
        /// Bits of a key's element: 3, 4 or 8.
        key: u8,
        /// Bits of a value's element: 3 or 4.
        value: u8,
    },
}

/// By name.
const ALL: [(&str, Peer); 8] = [
    ("fp8_e4m3", Peer::Fp8),
    ("q8_0", Peer::Q8),
    ("q4_0", Peer::Q4),
    ("q4_0_rotated", Peer::RotatedQ4),
    ("turboquant_k8v4", Peer::TurboQuant { key: 8, value: 4 }),
    ("turboquant_4bit_nc", Peer::TurboQuant { key: 4, value: 4 }),
    ("turboquant_k3v4_nc", Peer::TurboQuant { key: 3, value: 4 }),
    ("turboquant_3bit_nc", Peer::TurboQuant { key: 3, value: 3 }),
];

/// The Gaussian quantizers of Lloyd and Max with 8 and 16 values: the positive halves.
const LLOYD_8: [f32; 4] = [0.2451, 0.7560, 1.3439, 2.1520];
const LLOYD_16: [f32; 8] = [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326];

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = ALL.iter().find(|(_, peer)| peer == self).map_or("turboquant", |(name, _)| name);
        write!(f, "{name}")
    }
}

impl FromStr for Peer {
    type Err = Error;

    /// Reads `fp8_e4m3`, `q8_0`, `q4_0`, `q4_0_rotated`, `turboquant_k8v4`, `turboquant_4bit_nc`, `turboquant_k3v4_nc` or
    /// `turboquant_3bit_nc`.
    fn from_str(name: &str) -> Result<Self> {
        let found = ALL.iter().find(|(known, _)| *known == name);
        found.map(|(_, peer)| *peer).ok_or_else(|| Error::UnknownPeer { got: name.into() })
    }
}

impl Peer {
    /// All names that [`FromStr`] reads.
    pub fn names() -> impl Iterator<Item = &'static str> {
        ALL.iter().map(|(name, _)| *name)
    }

    /// Bits an element of K and V together, scales counted.
    ///
    /// # Errors
    /// [`Error::PeerHeadDim`] if the format has no rows of `head_dim`.
    pub fn bits_per_element(self, head_dim: usize) -> Result<f64> {
        let blocks = matches!(self, Self::Q8 | Self::Q4 | Self::RotatedQ4);
        if blocks && !head_dim.is_multiple_of(32) {
            return Err(Error::PeerHeadDim { peer: self, got: head_dim, expected: "a multiple of 32" });
        }
        let rotated = matches!(self, Self::RotatedQ4 | Self::TurboQuant { key: 3 | 4, .. });
        if rotated && !head_dim.is_power_of_two() {
            return Err(Error::PeerHeadDim { peer: self, got: head_dim, expected: "a power of two" });
        }
        let scale = 16.0 / head_dim as f64;
        Ok(match self {
            Self::Fp8 => 8.0,
            Self::Q8 => 8.5,
            Self::Q4 | Self::RotatedQ4 => 4.5,
            Self::TurboQuant { key, value } => {
                let key_scale = if key == 8 { 0.0 } else { scale };
                (f64::from(key) + key_scale + f64::from(value) + 2.0 * scale) / 2.0
            }
        })
    }

    /// A key, as the format gives it back.
    fn key(self, row: &mut [f32]) {
        match self {
            Self::TurboQuant { key: 8, .. } => Self::Fp8.key(row),
            Self::TurboQuant { key, .. } => lloyd(row, if key == 3 { &LLOYD_8 } else { &LLOYD_16 }),
            Self::Fp8 => row.iter_mut().for_each(|x| *x = e4m3(*x)),
            Self::Q8 => row.chunks_mut(32).for_each(q8_0),
            Self::Q4 => row.chunks_mut(32).for_each(q4_0),
            Self::RotatedQ4 => {
                hadamard(row);
                row.chunks_mut(32).for_each(q4_0);
                hadamard(row);
            }
        }
    }

    /// A value.
    fn value(self, row: &mut [f32]) {
        match self {
            Self::TurboQuant { value, .. } => even(row, value),
            other => other.key(row),
        }
    }
}

impl Tap for Peer {
    fn pass(&mut self, _layer: usize, _q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Option<[Tensor; 2]>> {
        let stored = |x: &Tensor, store: fn(Peer, &mut [f32])| -> Result<Tensor> {
            let head_dim = x.dim(candle_core::D::Minus1)?;
            self.bits_per_element(head_dim)?;
            let mut values: Vec<f32> = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
            values.par_chunks_mut(head_dim).for_each(|row| store(*self, row));
            Ok(Tensor::from_vec(values, x.shape(), x.device())?)
        };
        Ok(Some([stored(k, Self::key)?, stored(v, Self::value)?]))
    }
}

fn to_f16(x: f32) -> f32 {
    f16::from_f32(x).to_f32()
}

/// The nearest 8-bit float of 4 exponent bits (bias 7, no infinities): at most 448, steps of 2^-9 below 2^-6.
fn e4m3(x: f32) -> f32 {
    if x == 0.0 || x.is_nan() {
        return x;
    }
    let exponent = ((x.to_bits() >> 23 & 0xff) as i32 - 127).max(-6);
    let step = 2f32.powi(exponent - 3);
    ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
}

fn q8_0(block: &mut [f32]) {
    let largest = block.iter().fold(0f32, |a, x| a.max(x.abs()));
    let scale = largest / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    block.iter_mut().for_each(|x| *x = (*x * inverse).round() * to_f16(scale));
}

fn q4_0(block: &mut [f32]) {
    // With its sign: it becomes -8.
    let largest = block.iter().fold(0f32, |a, &x| if x.abs() > a.abs() { x } else { a });
    let scale = largest / -8.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    block.iter_mut().for_each(|x| *x = ((*x * inverse + 8.5).floor().clamp(0.0, 15.0) - 8.0) * to_f16(scale));
}

/// Evenly spaced between the least and the largest.
fn even(row: &mut [f32], bits: u8) {
    let (least, largest) = row.iter().fold((f32::MAX, f32::MIN), |(a, b), &x| (a.min(x), b.max(x)));
    let levels = f32::from((1u8 << bits) - 1);
    let step = ((largest - least) / levels).max(1e-8);
    let code = |x: f32| ((x - least) / step + 0.5).floor().clamp(0.0, levels);
    row.iter_mut().for_each(|x| *x = code(*x) * to_f16(step) + to_f16(least));
}

/// Rotated, in the nearest of these values and their negatives, with the length that the row had.
fn lloyd(row: &mut [f32], positive: &[f32]) {
    let length = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>().sqrt();
    let before = length(row);
    if before == 0.0 {
        return;
    }
    hadamard(row);
    let unit = (row.len() as f32).sqrt() / before;
    for x in row.iter_mut() {
        let size = (*x * unit).abs();
        let above = positive.windows(2).filter(|pair| size >= (pair[0] + pair[1]) / 2.0).count();
        *x = positive[above].copysign(*x);
    }
    let scale = to_f16(before) / length(row);
    row.iter_mut().for_each(|x| *x *= scale);
    hadamard(row);
}

/// The orthonormal Hadamard transform; its own inverse.
fn hadamard(row: &mut [f32]) {
    let mut half = 1;
    while half < row.len() {
        for pair in row.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        half *= 2;
    }
    let scale = 1.0 / (row.len() as f32).sqrt();
    row.iter_mut().for_each(|x| *x *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    #[test]
    fn names_are_printed_as_they_are_read() {
        for name in Peer::names() {
            assert_eq!(name.parse::<Peer>().unwrap().to_string(), name);
        }
        assert!(matches!("q5_0".parse::<Peer>(), Err(Error::UnknownPeer { got }) if got == "q5_0"));
    }

    #[test]
    fn eight_bit_floats() {
        // Of the definition: largest, a tie to the even neighbour, the least normal, subnormal and half of it.
        let cases = [(448.0, 448.0), (1e9, 448.0), (17.0, 16.0), (19.0, 20.0), (-1.06, -1.0), (-1.07, -1.125)];
        let small = [(0.015625, 0.015625), (0.002, 0.001953125), (0.0009765625, 0.0), (0.001, 0.001953125), (0.0, 0.0)];
        for (x, expected) in cases.into_iter().chain(small) {
            assert_eq!(e4m3(x), expected, "{x}");
        }
        // Every one of them stays as it is.
        for bits in 0..0x7fu32 {
            let (exponent, mantissa) = ((bits >> 3) as i32, (bits & 7) as f32);
            let x = if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7) };
            assert_eq!(e4m3(x), x);
        }
    }

    #[test]
    fn blocks_of_thirty_two() {
        let mut block = [0f32; 32];
        (block[0], block[1], block[2]) = (-16.0, 5.1, 15.9);
        let mut eight = block;
        q4_0(&mut block);
        // The scale is 2; 15.9 / 2 has no code above 7.
        assert_eq!(block[..4], [-16.0, 6.0, 14.0, 0.0]);
        q8_0(&mut eight);
        assert!((eight[1] - 5.1).abs() < 16.0 / 127.0 / 2.0 + 0.01 && (eight[0] + 16.0).abs() < 0.01, "{eight:?}");
        for store in [q4_0, q8_0] {
            let mut zeros = [0f32; 32];
            store(&mut zeros);
            assert_eq!(zeros, [0.0; 32]);
        }
    }

    #[test]
    fn values_between_the_least_and_the_largest() {
        let mut row = [-1.0, 2.0, 0.4, 0.25];
        even(&mut row, 4);
        // Steps of 0.2, in f16.
        for (x, expected) in row.iter().zip([-1.0, 2.0, 0.4, 0.2]) {
            assert!((x - expected).abs() < 2e-3, "{row:?}");
        }
        let mut same = [0.5f32; 8];
        even(&mut same, 3);
        assert_eq!(same, [0.5; 8]);
    }

    #[test]
    fn errors_are_those_that_theory_gives() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        // A sum of twelve uniform numbers is nearly Gaussian.
        let mut gauss = || (0..12).map(|_| random.random_range(-0.5f32..0.5)).sum::<f32>();
        let rows: Vec<Vec<f32>> = (0..400).map(|_| (0..128).map(|_| gauss()).collect()).collect();
        let error = |store: &dyn Fn(&mut [f32])| {
            let (mut error, mut whole) = (0.0, 0.0);
            for row in &rows {
                let mut got = row.clone();
                store(&mut got);
                error += row.iter().zip(&got).map(|(a, b)| f64::from((a - b) * (a - b))).sum::<f64>();
                whole += row.iter().map(|a| f64::from(a * a)).sum::<f64>();
            }
            error / whole
        };
        let close = |got: f64, expected: f64| assert!((got / expected - 1.0).abs() < 0.1, "{got}, expected {expected}");
        // Lloyd and Max: 0.03454 and 0.009497; keeping the length costs a little.
        close(error(&|row| lloyd(row, &LLOYD_8)), 0.0352);
        close(error(&|row| lloyd(row, &LLOYD_16)), 0.0096);
        // A float's mantissa of 3 bits: 2^-8 / 12 of the squared power of two, on average over the octave.
        close(error(&|row| Peer::Fp8.key(row)), 0.00070);
        let turboquant = Peer::TurboQuant { key: 3, value: 4 };
        assert_eq!(error(&|row| turboquant.key(row)), error(&|row| lloyd(row, &LLOYD_8)));
        assert_eq!(error(&|row| turboquant.value(row)), error(&|row| even(row, 4)));
        // A rotation of Gaussian rows changes nothing on average.
        close(error(&|row| Peer::RotatedQ4.key(row)), error(&|row| Peer::Q4.key(row)));
    }

    #[test]
    fn bits_and_rows_that_do_not_exist() {
        let bits = |name: &str, head_dim| name.parse::<Peer>().unwrap().bits_per_element(head_dim);
        let all = |head_dim| Peer::names().map(|name| bits(name, head_dim).unwrap()).collect::<Vec<_>>();
        assert_eq!(all(128), [8.0, 8.5, 4.5, 4.5, 6.125, 4.1875, 3.6875, 3.1875]);
        assert_eq!(all(64)[4..], [6.25, 4.375, 3.875, 3.375]);
        for (name, head_dim) in [("q8_0", 80), ("q4_0_rotated", 96), ("turboquant_3bit_nc", 96)] {
            assert!(matches!(bits(name, head_dim), Err(Error::PeerHeadDim { got, .. }) if got == head_dim), "{name}");
        }
        assert_eq!(bits("fp8_e4m3", 80).unwrap(), 8.0);
    }
}
