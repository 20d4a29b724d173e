//! A codec's constants as kernels read them.

use super::driver::{Memory, Stream};
use crate::error::Result;
use crate::format::{Packing, RowFormat, Scaling};
use std::sync::Arc;

/// What every kernel knows of the transform.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(super) struct Turn {
    signs: u64,
    norm: f32,
    reflect: f32,
    rotated: u32,
    pad: u32,
}

/// The line of scaled elements, cut into cells that hold one decision boundary at most.
pub(super) struct Cells {
    /// Boundary (infinity if none) and number of boundaries in the cells before.
    pub entries: Vec<(f32, u32)>,
    /// Cells in a unit, a power of two.
    pub per_unit: f32,
    /// Elements beyond are in the outermost cell.
    pub limit: f32,
    /// u · per_unit + this has the cell's number in the low bits of its mantissa.
    pub first: f32,
}

impl Cells {
    pub fn new(boundaries: &[f32]) -> Self {
        let narrowest = boundaries.windows(2).map(|w| w[1] - w[0]).fold(f32::INFINITY, f32::min);
        let mut per_unit = 1.0f32;
        while 1.0 / per_unit >= narrowest {
            per_unit *= 2.0;
        }
        let outermost = boundaries.iter().fold(0f32, |m, b| m.max(b.abs()));
        let half = (outermost * per_unit).ceil() + 1.0;
        // 1.5 · 2^23: floats there step by one.
        let first = 12_582_912.0 + half;
        let mut entries = vec![(f32::INFINITY, 0); 2 * half as usize + 1];
        for &b in boundaries {
            let cell = (b * per_unit + first - 12_582_912.0) as usize;
            entries[cell].0 = b;
            entries[cell + 1..].iter_mut().for_each(|e| e.1 += 1);
        }
        Cells { entries, per_unit, limit: half / per_unit, first }
    }

    /// Copies in shared memory, so that neighbouring lanes read different banks.
    pub fn replicas(&self) -> usize {
        let fit = 8192 / (self.entries.len() * 8);
        if fit < 2 { 1 } else { 1 << fit.min(16).ilog2() }
    }
}

/// The factor in [1, 2) that loses least when levels times it are rounded to f16. Few levels can all be met well: of four bits
/// the squared loss is a thirteenth.
fn f16_gain(levels: &[f32]) -> f32 {
    let loss = |gain: f32| -> f32 {
        let lost = |l: &f32| (half::f16::from_f32(l * gain).to_f32() - l * gain) / gain;
        levels.iter().map(|l| lost(l) * lost(l)).sum()
    };
    let gains = (0..1024).map(|i| 1.0 + i as f32 / 1024.0);
    gains.min_by(|a, b| loss(*a).total_cmp(&loss(*b))).unwrap_or(1.0)
}

/// The tables of a codec at a head_dim, on the device.
pub(super) struct Tables {
    pub turn: Turn,
    pub levels: u64,
    /// Levels times `gain`, for tensor cores, which round them to f16.
    pub tensor_levels: u64,
    pub gain: f32,
    /// Of the levels.
    pub squares: u64,
    /// Where `cells` lies on the device.
    pub cells_at: u64,
    /// None for dense floats.
    pub cells: Option<Cells>,
    _memory: Memory,
}

impl Tables {
    pub fn new(stream: &Arc<Stream>, row: &RowFormat) -> Result<Self> {
        let mut words: Vec<u32> = row.signs().to_vec();
        let (mut offsets, mut gain) = ([0; 4], 1.0);
        let cells = row.codebook().map(|book| Cells::new(&book.boundaries));
        if let (Some(book), Some(cells)) = (row.codebook(), &cells) {
            offsets[0] = words.len();
            words.extend(book.levels.iter().map(|l| l.to_bits()));
            offsets[1] = words.len();
            words.extend(book.levels.iter().map(|l| (l * l).to_bits()));
            offsets[2] = words.len();
            words.extend(cells.entries.iter().flat_map(|(b, n)| [b.to_bits(), *n]));
            offsets[3] = words.len();
            gain = f16_gain(&book.levels);
            words.extend(book.levels.iter().map(|l| (l * gain).to_bits()));
        }
        let memory = stream.upload(bytemuck::cast_slice(&words))?;
        let at = |words: usize| memory.address + 4 * words as u64;
        let (block, blocks) = (row.block(), row.head_dim() / row.block());
        let turn = Turn {
            signs: memory.address,
            norm: 1.0 / (block as f32).sqrt(),
            reflect: 2.0 / blocks as f32,
            rotated: row.is_rotated() as u32,
            pad: 0,
        };
        let [levels, squares, cells_at, tensor_levels] = offsets.map(at);
        Ok(Tables { turn, levels, tensor_levels, gain, squares, cells_at, cells, _memory: memory })
    }

    pub fn signs(&self) -> u64 {
        self.turn.signs
    }
}

/// How kernels are told of a row: bits, packing and scaling as row.cuh counts them.
pub(super) fn row_defines(side: &str, row: &RowFormat) -> [String; 4] {
    let packing = match row.packing() {
        Packing::Dense => 0,
        Packing::Byte => 1,
        Packing::Float(dtype) => {
            if dtype.size() == 2 {
                2
            } else {
                3
            }
        }
        Packing::Planes => 4,
    };
    let scaling = match row.scaling() {
        Scaling::None => 0,
        Scaling::Corrected => 1,
        Scaling::Norm => 2,
        Scaling::BlockRms => 3,
    };
    [
        format!("-D{side}HEAD_DIM={}", row.head_dim()),
        format!("-D{side}BITS={}", row.bits()),
        format!("-D{side}PACKING={packing}"),
        format!("-D{side}SCALING={scaling}"),
    ]
}

/// What a stored scale is multiplied by (norms) or divided by (blocks) to give the factor of levels.
pub(super) fn scale_unit(row: &RowFormat) -> f32 {
    match row.scaling() {
        Scaling::None | Scaling::Corrected => 1.0,
        Scaling::Norm => row.factor(1.0),
        Scaling::BlockRms => row.scale_factor_d512(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Codec;

    #[test]
    fn gains_spare_levels() {
        for bits in 2..=5 {
            let levels = &RowFormat::new(Codec::tq(bits), 128).unwrap().codebook().unwrap().levels;
            let loss = |gain: f32| -> f32 {
                levels.iter().map(|l| ((half::f16::from_f32(l * gain).to_f32() - l * gain) / gain).powi(2)).sum()
            };
            let gain = f16_gain(levels);
            println!("{bits} bits: gain {gain}, loss {:e} of {:e}", loss(gain), loss(1.0));
            assert!((1.0..2.0).contains(&gain) && loss(gain) < loss(1.0) / 2.0, "{bits} bits");
        }
    }

    #[test]
    fn cells_give_the_code() {
        let codecs = (2..=8).map(Codec::tq).chain([2, 3, 4, 5, 6, 8].map(Codec::seed));
        for codec in codecs {
            let row = RowFormat::new(codec, 128).unwrap();
            let book = row.codebook().unwrap();
            let cells = Cells::new(&book.boundaries);
            // As the kernel does it.
            let code = |u: f32| {
                let u = u.clamp(-cells.limit, cells.limit);
                let (boundary, below) = cells.entries[(u * cells.per_unit + cells.first - 12_582_912.0) as usize];
                (below + (u > boundary) as u32) as u8
            };
            let near = book.boundaries.iter().flat_map(|&b| [b, b.next_up(), b.next_down(), b + 0.01, b - 0.01]);
            let far = (-4000..=4000).map(|i| i as f32 / 333.0).chain([f32::MAX, f32::MIN, 0.0, -0.0]);
            for u in near.chain(far) {
                assert_eq!(code(u), book.code(u), "{codec} {u}");
            }
            assert_eq!(code(0.0), book.zero_code(), "{codec}: a zero vector's code is that of zeros");
            assert!(cells.entries.len() * cells.replicas() * 8 <= 8192, "{codec}: {} cells", cells.entries.len());
        }
    }
}
