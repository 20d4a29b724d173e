//! The naive oracle: one obvious loop an operation, sums in f64. It judges every backend and is never fast.
//!
//! It works on single vectors and plain slices. What a stored row is (signs, block, codebook, scale factors, unpacked codes) it takes
//! from `format`; rotation, encoding, decoding and attention are its own.

use crate::format::{Packing, RowFormat, Scaling, ZERO_NORM};
use half::f16;

/// Signs, then transform: T·S·x (see [`RowFormat::block`]).
pub fn rotate(row: &RowFormat, x: &[f32]) -> Vec<f64> {
    let mut y: Vec<f64> = x.iter().map(|&x| x as f64).collect();
    y.resize(row.row_dim(), 0.0);
    if row.is_rotated() {
        negate(row, &mut y);
        transform(row, &mut y);
    }
    y
}

/// Transform, then signs: S·T·y, the inverse of [`rotate`].
pub fn restore(row: &RowFormat, y: &[f64]) -> Vec<f64> {
    let mut x = y.to_vec();
    if row.is_rotated() {
        transform(row, &mut x);
        negate(row, &mut x);
    }
    x.truncate(row.head_dim());
    x
}

fn negate(row: &RowFormat, x: &mut [f64]) {
    let signs = row.signs();
    for (i, x) in x.iter_mut().enumerate() {
        if signs[i / 32] >> (i % 32) & 1 == 1 {
            *x = -*x;
        }
    }
}

/// The definition: the Hadamard matrix's entry (i, j) within a block is (-1)^popcount(i & j) / √block.
fn transform(row: &RowFormat, x: &mut [f64]) {
    let (block, blocks) = (row.block(), row.row_dim() / row.block());
    let hadamard: Vec<f64> = (0..x.len())
        .map(|i| {
            let start = i - i % block;
            let sum: f64 = (0..block)
                .map(|j| if ((i % block) & j).count_ones() % 2 == 0 { x[start + j] } else { -x[start + j] })
                .sum();
            sum / (block as f64).sqrt()
        })
        .collect();
    for (i, x) in x.iter_mut().enumerate() {
        let across: f64 = (0..blocks).map(|b| hadamard[b * block + i % block]).sum();
        *x = hadamard[i] - if blocks > 1 { 2.0 / blocks as f64 * across } else { 0.0 };
    }
}

/// An encoded vector, not yet packed.
#[derive(Clone, Debug, PartialEq)]
pub struct Encoded {
    /// One code an element; empty for dense floats.
    pub codes: Vec<u16>,
    /// The scales, as stored but widened to f32.
    pub scales: Vec<f32>,
    /// Distance of each scaled element from the nearest decision boundary: only under 1e-5 may a backend's code differ.
    pub margins: Vec<f64>,
}

/// Encodes one vector of a codec with codes.
///
/// # Panics
/// For dense codecs, which have no codes.
pub fn quantize(row: &RowFormat, x: &[f32]) -> Encoded {
    let book = row.codebook().expect("dense floats have no codes");
    let y = rotate(row, x);
    let d = row.head_dim();
    let mut encoded = Encoded { codes: vec![], scales: vec![], margins: vec![] };
    // One pass for each scale.
    for y in y.chunks(d / row.scales_per_row()) {
        let squares: f64 = y.iter().map(|v| v * v).sum();
        let (norm, unit) = match row.scaling() {
            Scaling::BlockRms => ((squares / y.len() as f64).sqrt(), row.scale_factor_d512() as f64),
            _ => (squares.sqrt(), (d as f64).sqrt()),
        };
        if !(norm as f32).is_finite() {
            encoded.codes.extend(y.iter().map(|_| 0));
            encoded.margins.extend(y.iter().map(|_| f64::INFINITY));
            encoded.scales.push(f32::NAN);
            continue;
        }
        let zero = norm as f32 <= ZERO_NORM;
        let start = encoded.codes.len();
        for v in y {
            let u = if zero { 0.0 } else { v / norm * unit };
            encoded.codes.push(if zero {
                book.zero_code()
            } else {
                book.boundaries.iter().filter(|&&b| u > b as f64).count() as u16
            });
            let margin = book.boundaries.iter().map(|&b| (u - b as f64).abs()).fold(f64::INFINITY, f64::min);
            encoded.margins.push(if zero { f64::INFINITY } else { margin });
        }
        encoded.scales.push(match row.scaling() {
            Scaling::Corrected => {
                let levels = encoded.codes[start..].iter().map(|&c| book.levels[c as usize] as f64);
                f16::from_f64(norm / levels.map(|c| c * c).sum::<f64>().sqrt()).to_f32()
            }
            _ => norm as f32,
        });
    }
    encoded
}

/// Decodes one stored row into the rotated domain, exactly as every backend must: level · factor in f32.
pub fn dequantize(row: &RowFormat, codes: &[u8], scales: &[f32]) -> Vec<f32> {
    let d = row.row_dim();
    match row.packing() {
        Packing::Float(crate::format::DType::F32) => {
            codes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
        }
        Packing::Float(_) => codes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => {
            let levels = row.codebook().map_or(&[][..], |book| &book.levels);
            let per_scale = d / row.scales_per_row();
            (0..d).map(|i| levels[row.get_code(codes, i) as usize] * row.factor(scales[i / per_scale])).collect()
        }
    }
}

/// One query of [`attention`].
#[derive(Clone, Debug)]
pub struct Query<'a> {
    /// The query vector, in the domain of the keys.
    pub q: &'a [f32],
    /// Factor on q·k.
    pub scale: f64,
    /// Softcap, if any.
    pub softcap: Option<f64>,
    /// The sink's logit, if any.
    pub sink: Option<f64>,
}

/// Attention of one query over the keys and values that it sees: the output and the log-sum-exp.
pub fn attention(query: &Query, keys: &[&[f32]], values: &[&[f32]]) -> (Vec<f64>, f64) {
    let scores: Vec<f64> = keys
        .iter()
        .map(|k| {
            let dot: f64 = query.q.iter().zip(*k).map(|(&q, &k)| q as f64 * k as f64).sum();
            let score = dot * query.scale;
            query.softcap.map_or(score, |c| c * (score / c).tanh())
        })
        .collect();
    let max = scores.iter().copied().chain(query.sink).fold(f64::NEG_INFINITY, f64::max);
    let mut out = vec![0.0; query.q.len()];
    if max == f64::NEG_INFINITY {
        return (out, max);
    }
    let total: f64 = scores.iter().copied().chain(query.sink).map(|s| (s - max).exp()).sum();
    for (score, v) in scores.iter().zip(values) {
        let p = (score - max).exp() / total;
        out.iter_mut().zip(*v).for_each(|(o, &v)| *o += p * v as f64);
    }
    (out, max + total.ln())
}
