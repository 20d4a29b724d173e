//! Codecs as the host knows them: what kernels are told of a row, and what its kind of packing takes. The one place of CUDA's host code that tells packings
//! apart; kernels/codec/codec.cuh is that of the kernels.

use crate::format::{DType, Packing, RowFormat, Scaling};

/// A header of the kernels: the name by which they include it, and its text.
macro_rules! header {
    ($name:literal) => {
        ($name, include_str!(concat!("kernels/", $name)))
    };
}
pub(super) use header;

/// What kernels include of codecs.
pub(super) const HEADERS: &[(&str, &str)] = &[
    header!("codec/bytes.cuh"),
    header!("codec/codec.cuh"),
    header!("codec/encoder.cuh"),
    header!("codec/floats.cuh"),
    header!("codec/planes.cuh"),
    header!("codec/row.cuh"),
    header!("codec/stream.cuh"),
    header!("codec/tile.cuh"),
    header!("codec/tile_encoder.cuh"),
    ("codec/kinds.cuh", KINDS),
];

/// Numbers that kernels know too.
macro_rules! kinds {
    ($($name:ident = $number:literal),* $(,)?) => {
        $(const $name: u32 = $number;)*
        /// The same numbers as a header.
        const KINDS: &str = concat!("#pragma once\n", $("#define ", stringify!($name), " ", $number, "\n"),*);
    };
}

kinds! {
    PACK_DENSE = 0,
    PACK_BYTE = 1,
    PACK_F16 = 2,
    PACK_F32 = 3,
    PACK_PLANES = 4,
    SCALE_NONE = 0,
    SCALE_CORRECTED = 1,
    SCALE_NORM = 2,
    SCALE_BLOCK_RMS = 3,
}

/// How kernels are told of a row: elements, bits, packing and scaling.
pub(super) fn row_values(row: &RowFormat) -> [u32; 4] {
    let packing = match row.packing() {
        Packing::Dense => PACK_DENSE,
        Packing::Byte => PACK_BYTE,
        Packing::Float(dtype) if dtype.size() == 2 => PACK_F16,
        Packing::Float(_) => PACK_F32,
        Packing::Planes => PACK_PLANES,
    };
    let scaling = match row.scaling() {
        Scaling::None => SCALE_NONE,
        Scaling::Corrected => SCALE_CORRECTED,
        Scaling::Norm => SCALE_NORM,
        Scaling::BlockRms => SCALE_BLOCK_RMS,
    };
    [row.row_dim() as u32, row.bits() as u32, packing, scaling]
}

/// Bits from one code to the next in the runs that encoders give a codec (`FIELD` of its `Codec`).
pub(super) fn field(row: &RowFormat) -> usize {
    match row.packing() {
        Packing::Planes => 4,
        _ => row.bits(),
    }
}

/// What a codec takes of a block's shared memory on tensor cores, for keys and for values: constants of `Keys` and `Values` in
/// kernels/codec, which the kernel's own count is held to when it is compiled.
#[derive(Clone, Copy, PartialEq)]
pub(super) struct Needs {
    /// Bytes of the tables of keys and of values. Sides of one codec share theirs.
    pub key_table: usize,
    pub value_table: usize,
    /// Steps of a key's fragments, and bytes that a lane has of a query at each.
    pub steps: usize,
    pub query_bytes: usize,
    /// Whether keys are looked up in a table.
    pub looked_up: bool,
}

impl Needs {
    /// `None` if the kernel does not take such rows.
    /// `parts`: see `Shape::parts`.
    pub fn of(row: &RowFormat, narrow: bool, parts: usize) -> Option<Self> {
        let d = row.row_dim();
        let query_bytes = if narrow { 8 } else { 8 * parts };
        let lines = |bits| match bits {
            5 => 64,
            6 => 128,
            _ => 256,
        };
        let looked_up = |bits| {
            let table = 128 * lines(bits) * parts;
            Needs { key_table: table, value_table: table, steps: d / 16, query_bytes, looked_up: true }
        };
        match row.packing() {
            Packing::Dense => Some(looked_up(row.bits())),
            Packing::Byte => Some(looked_up(8)),
            Packing::Planes => {
                let lines = if d.is_multiple_of(128) { 64 } else { 256 };
                let query_bytes = if narrow { 8 * parts } else { 8 * (parts + 1) };
                let steps = 4 * d.div_ceil(128);
                Some(Needs { key_table: 0, value_table: 128 * lines * parts, steps, query_bytes, looked_up: false })
            }
            Packing::Float(DType::F16) => {
                Some(Needs { key_table: 0, value_table: 0, steps: d / 16, query_bytes, looked_up: true })
            }
            _ => None,
        }
    }
}
