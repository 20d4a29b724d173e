//! A codec's constants as kernels read them.

use super::driver::{Memory, Stream};
use crate::error::Result;
use crate::format::cells::Cells;
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
}
