//! Which rows a kernel reads or writes.

use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::wgsl::builder::Builder;
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::backend::wgpu::wgsl::transform::Transform;
use crate::format::{Codec, RowFormat};
use crate::problem::PagePool;

/// What stored rows lie on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Align {
    /// Any byte.
    Byte,
    /// Words.
    Word,
    /// 16 bytes.
    Vector,
}

/// How a pool's rows are stored: everything that a kernel is specialised on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stored {
    codec: Codec,
    head_dim: usize,
    d512: u32,
    pub align: Align,
    /// Lanes of a subgroup among which codes are looked up; 0: in the workgroup's memory.
    pub lanes: usize,
    /// Shuffles ignore what a lane's number has above its bits.
    pub wrap: bool,
}

impl Stored {
    /// `offset` and `size` are what the codes' binding starts at and holds.
    pub fn new(pool: &PagePool, offset: usize, size: usize) -> Self {
        let lies_on = |n| [offset, size, pool.row().row_bytes()].iter().all(|x| x.is_multiple_of(n));
        let align = if lies_on(16) {
            Align::Vector
        } else if offset.is_multiple_of(4) && pool.row().row_bytes().is_multiple_of(4) {
            Align::Word
        } else {
            Align::Byte
        };
        Stored::of(pool.row(), align)
    }

    pub fn of(row: &RowFormat, align: Align) -> Self {
        let d512 = row.scale_factor_d512().to_bits();
        Stored { codec: row.codec(), head_dim: row.head_dim(), d512, align, lanes: 0, wrap: false }
    }

    /// The same with a codebook that the lanes of a subgroup hold, if it fits: a look-up is a shuffle then, which takes a
    /// lane's number as it is, where an address takes another shift.
    pub fn in_lanes(self, caps: &Caps) -> Self {
        let fits = (1..=caps.subgroup).contains(&(4 * self.book_vectors()));
        Stored { lanes: if fits { caps.subgroup } else { 0 }, wrap: caps.shuffles_wrap, ..self }
    }

    pub fn format(&self) -> RowFormat {
        let row =
            RowFormat::new(self.codec, self.head_dim).and_then(|r| r.with_scale_factor_d512(f32::from_bits(self.d512)));
        row.expect("it came from a RowFormat")
    }

    /// Vectors of four levels that the codebook has; 0: none.
    pub fn book_vectors(&self) -> usize {
        self.format().codebook().map_or(0, |b| b.levels.len() / 4)
    }
}

/// How a codec's elements are read and written, in WGSL. A fetch brings the stored bits of some consecutive elements, and what else
/// their values depend on, in at most four words; a value is made of what a fetch brought.
///
/// Names begin with `p`, of which a kernel may have several.
pub trait Elements {
    /// The most elements, up to `most`, that one fetch brings.
    fn fetch_size(&self, s: &Stored, most: usize) -> usize;

    /// What rows that are fetched `n` elements at a time are read by.
    fn read_by(&self, s: &Stored, n: usize) -> Align;

    /// Declares `fn {p}_place(row)`, which uses the parameter `{p}_codes_off`: where a row starts, in what its codes are read by;
    /// and `fn {p}_fetch(place, c) -> vec4<u32>`: what elements c·n to c·n + n - 1 take, from bit 0 on.
    fn fetch(&self, s: &Stored, b: &mut Builder, p: &str, n: usize);

    /// The text of elements 4j to 4j + 3 of what a fetch into `w` brought: levels, or floats of a dense codec.
    fn value(&self, s: &Stored, p: &str, w: &str, j: usize) -> String;

    /// Declares `fn {p}_value_at(w, j) -> f32`: element j, which only run time knows, of what a fetch brought.
    fn value_at(&self, s: &Stored, b: &mut Builder, p: &str);

    /// Bytes that an encoder counts `p{i}_codes_off` in.
    fn offset_unit(&self) -> u32 {
        1
    }

    /// Declares `fn encode{i}(wg, tid)`, which encodes the rows of the tensor `x{i}` that are workgroup wg's into pool `p{i}`.
    fn encode(&self, s: &Stored, b: &mut Builder, x: Tensor, i: usize, transform: &Transform);
}
