//! A codec's constants as kernels read them.

use super::codec::field;
use super::driver::Stream;
use super::kernel::kernel_struct;
use super::memory::{Memory, address};
use crate::error::Result;
use crate::format::{Cells, RowFormat, Scaling, tables as format};
use crate::problem::PagePool;
use std::sync::Arc;

kernel_struct! {
    /// What every kernel knows of the transform.
    pub(super) struct Turn as "Turn" { signs: u64, norm: f32, reflect: f32, rotated: u32, pad: u32 }
}

kernel_struct! {
    /// Bytes from one page, KV head and position to the next.
    pub(super) struct Strides as "Strides" { page: u64, head: u64, row: u64 }
}

kernel_struct! {
    /// Where a pool's rows are, for kernels with `STRIDED`.
    pub(super) struct RowStrides as "RowStrides" { codes: Strides, scales: Strides, kv_heads: u32, page_size: u32 }
}

impl RowStrides {
    pub fn new(pool: &PagePool) -> Self {
        let of = |s: crate::problem::Strides| Strides { page: s.page as u64, head: s.head as u64, row: s.row as u64 };
        let (codes, scales) = pool.strides();
        let (kv_heads, page_size) = (pool.kv_heads() as u32, pool.page_size() as u32);
        RowStrides { codes: of(codes), scales: of(scales), kv_heads, page_size }
    }
}

kernel_struct! {
    /// One side of the cache.
    pub(super) struct Side as "Side" {
        codes: u64,
        scales: u64,
        levels: u64,
        turn: Turn,
        unit: f32,
        pad: u32,
        channels: u64,
        strides: RowStrides,
    }
}

/// What holds `Side` and what it is made of to the host's layout.
pub(super) fn side_asserts() -> String {
    Turn::asserts() + &Strides::asserts() + &RowStrides::asserts() + &Side::asserts()
}

impl Side {
    /// `levels`: those that the kernel takes. `turned`: whether the caller's vectors are in the original domain.
    pub fn new(pool: &PagePool, tables: &Tables, levels: u64, turned: bool) -> Self {
        let turn = Turn { rotated: tables.turn.rotated & turned as u32, ..tables.turn };
        let (codes, scales) = (address(pool.codes()), pool.scales().map_or(0, address));
        let channels = pool.channels().filter(|_| turned).map_or(0, |map| address(map.values()));
        let strides = RowStrides::new(pool);
        Side { codes, scales, levels, turn, unit: scale_unit(pool.row()), pad: 0, channels, strides }
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

/// Elements nearer than this to a boundary are doubtful to tiles (quantize.cu). Elements have an rms of 1, so a row has the length √D,
/// and an error that is spread over a row can at worst meet in one element. In units of 2^-24 √D the exact transform is off by
/// log2 of the block (every stage rounds once), a tile by 16 (sums of sixteen products that lose 2^-24 of the largest each) and log2 of
/// the block - 4, a reflection of n blocks, in either, by 2 √n + 2. At D = 128 that is 26 · 11.3 · 2^-24, or 2^-15.8. The gain is off by
/// 2^-21 of an element, which near a boundary is at most 4.
fn near(row: &RowFormat) -> f32 {
    let (block, blocks) = (row.block(), row.row_dim() / row.block());
    let reflection = if blocks > 1 { 4.0 * (blocks as f32).sqrt() + 4.0 } else { 0.0 };
    let roundings = 2.0 * block.ilog2() as f32 + 12.0 + reflection;
    (roundings * (row.row_dim() as f32).sqrt() + 40.0) / 16_777_216.0
}

/// With more bits too many rows are doubtful: at D = 128 of 6 bits one in thirteen, and twice as many with each bit more.
const MOST_BITS: usize = 6;

/// What tiles look codes up in: `Grid` of quantize.cu.
pub(super) struct Grid {
    pub words: Vec<u32>,
    pub cells: usize,
    /// Cells in a unit, and the cell of zero, as the kernel wants them: floats in [2, 4) step by 2^-22.
    pub step: f32,
    pub zero: f32,
    /// The root of what squares are multiplied by.
    pub square_root: f32,
    /// What distances to a boundary are multiplied by: below 2 they are doubtful.
    pub per_near: f32,
}

impl Grid {
    /// None if tiles do not take such rows.
    pub fn new(row: &RowFormat, cells: &Cells) -> Option<Self> {
        let takes = row.head_dim() == row.row_dim()
            && row.scaling() == Scaling::Corrected
            && row.bits() <= MOST_BITS
            && row.row_dim().is_multiple_of(32)
            && row.row_dim() <= 256;
        let book = row.codebook().filter(|_| takes)?;
        // No element of a row is larger than the root of head_dim.
        let own = cells.entries.len() / 2;
        let half = own.max(((row.row_dim() as f32).sqrt() * cells.per_unit).ceil() as usize + 1);
        let last = (f32::INFINITY, book.boundaries.len() as u32);
        let entry = |cell: usize| match (cell + own).checked_sub(half) {
            None => (f32::INFINITY, 0),
            Some(cell) => cells.entries.get(cell).copied().unwrap_or(last),
        };
        let entries: Vec<_> = (0..=2 * half).map(entry).collect();
        // In a cell without a boundary one far away will do, which the kernel can still scale.
        let per_near = 2.0 / near(row);
        let boundary = |b: f32| (b.min(1000.0) * -per_near).to_bits();
        let field = field(row);
        // The squares of a row's levels sum to less than four times those of its elements.
        let unit = 2f64.powi(32 - field as i32) / (4 * row.row_dim()) as f64;
        let square = |code: u32| f64::from(book.levels[code as usize]).powi(2) * unit;
        let word = |code: u32| code << (32 - field) | square(code).round() as u32;
        let below = entries.iter().chain([&last]).map(|e| e.1);
        Some(Grid {
            words: entries.iter().map(|e| boundary(e.0)).chain(below.map(word)).collect(),
            cells: entries.len(),
            step: cells.per_unit / 4_194_304.0,
            zero: 2.0 + half as f32 / 4_194_304.0,
            square_root: unit.sqrt() as f32,
            per_near,
        })
    }
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
    /// Where cells lie on the device.
    pub cells_at: u64,
    /// What they were made from.
    pub of: Arc<format::Tables>,
    pub grid_at: u64,
    /// Of rows that tiles take.
    pub grid: Option<Grid>,
    _memory: Memory,
}

impl Tables {
    pub fn new(stream: &Arc<Stream>, row: &RowFormat) -> Result<Self> {
        let of = format::tables(row);
        let mut words: Vec<u32> = of.signs.to_vec();
        let (mut offsets, mut gain) = ([0; 5], 1.0);
        let mut grid = None;
        if let (Some(book), Some(cells)) = (of.book, &of.cells) {
            offsets[0] = words.len();
            words.extend(book.levels.iter().map(|l| l.to_bits()));
            offsets[1] = words.len();
            words.extend(book.levels.iter().map(|l| (l * l).to_bits()));
            offsets[2] = words.len();
            words.extend(cells.entries.iter().flat_map(|(b, n)| [b.to_bits(), *n]));
            offsets[3] = words.len();
            gain = f16_gain(&book.levels);
            words.extend(book.levels.iter().map(|l| (l * gain).to_bits()));
            offsets[4] = words.len();
            grid = Grid::new(row, cells);
            words.extend(grid.iter().flat_map(|g| &g.words));
        }
        let memory = stream.upload(bytemuck::cast_slice(&words))?;
        let at = |words: usize| memory.address + 4 * words as u64;
        let (block, blocks) = (row.block(), row.row_dim() / row.block());
        let turn = Turn {
            signs: memory.address,
            norm: 1.0 / (block as f32).sqrt(),
            reflect: 2.0 / blocks as f32,
            rotated: row.is_rotated() as u32,
            pad: 0,
        };
        let [levels, squares, cells_at, tensor_levels, grid_at] = offsets.map(at);
        Ok(Tables { turn, levels, tensor_levels, gain, squares, cells_at, of, grid_at, grid, _memory: memory })
    }
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

    /// As the kernel does it, in f32 and off by as much as it may be.
    #[test]
    fn grids_give_the_code() {
        for (bits, d) in (2..=MOST_BITS as u8).flat_map(|b| [32, 64, 96, 128, 192, 224, 256].map(|d| (b, d))) {
            let row = RowFormat::new(Codec::tq(bits), d).unwrap();
            let book = row.codebook().unwrap();
            let grid = Grid::new(&row, &Cells::new(&book.boundaries)).unwrap();
            let field = if bits == 3 { 4 } else { row.bits() as u32 };
            let unit = 2f64.powi(32 - field as i32) / (4 * d) as f64;
            let root = (d as f32).sqrt();
            let limit = near(&row);
            let near = book.boundaries.iter().flat_map(|&b| [b - 1.01 * limit, b + 1.01 * limit]);
            let far = (-1000..=1000).map(|i| i as f32 / 1000.0 * root);
            for u in near.chain(far) {
                for off in [-limit / 4.0, limit / 4.0] {
                    let v = u + off;
                    let cell = v.mul_add(grid.step, grid.zero).to_bits() as usize - 0x4000_0000;
                    let above = v.mul_add(grid.per_near, f32::from_bits(grid.words[cell]));
                    let word = grid.words[grid.cells + cell + (above > 0.0) as usize];
                    let (code, square) = ((word >> (32 - field)) as u8, f64::from(word << field >> field));
                    if above.abs() >= 2.0 {
                        assert_eq!(u16::from(code), book.code(u), "{bits} bits, D = {d}: {u}");
                    }
                    let exact = f64::from(book.levels[code as usize]).powi(2) * unit;
                    assert!((square - exact).abs() <= 0.5, "{bits} bits, D = {d}: {u}");
                }
            }
        }
    }

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
