//! How the tensor-core kernel is specialised for a shape.

use super::layout::Layout;
use super::shape::Shape;
use crate::backend::cuda::codec::{Needs, row_values};
use crate::backend::cuda::kernel::{KernelKey, KernelText, type_number};

/// A specialisation of attention.cu.
#[derive(Clone, Copy)]
pub(in crate::backend::cuda) struct Variant {
    pub key: KernelKey,
    pub tiles_n: usize,
    pub tile: usize,
    pub warps: usize,
    /// See `Shape::parts`.
    pub parts: usize,
    pub short: bool,
}

static ATTENTION: KernelText = KernelText {
    name: "attention",
    text: include_str!("../kernels/attention.cu"),
    options: &[],
    macros: &[
        "K_DIM",
        "K_BITS",
        "K_PACKING",
        "K_SCALING",
        "V_DIM",
        "V_BITS",
        "V_PACKING",
        "V_SCALING",
        "Q_WIDTH",
        "OUT_WIDTH",
        "Q_TYPE",
        "OUT_TYPE",
        "TILES_N",
        "WARPS",
        "TILE",
        "STAGES",
        "NARROW",
        "RUN",
        "PAGE_SIZE",
        "SHARED_BYTES",
        "Q_PARTS",
        "NEARS",
        "A_K_BITS",
        "A_K_PACKING",
        "A_K_SCALING",
        "A_V_BITS",
        "A_V_PACKING",
        "A_V_SCALING",
        "B_K_BITS",
        "B_K_PACKING",
        "B_K_SCALING",
        "B_V_BITS",
        "B_V_PACKING",
        "B_V_SCALING",
    ],
    asserts: super::params::asserts,
    shared_memory_symbol: None,
};

impl Variant {
    /// The largest tiles whose pipelines fit a block of this much shared memory.
    pub fn choose(shape: &Shape, shared_memory: usize) -> Option<Self> {
        let (narrow, parts) = (shape.narrow(), shape.parts());
        let needs = |row| Needs::of(row, narrow, parts);
        let sides = [(&shape.key, needs(&shape.key)?), (&shape.value, needs(&shape.value)?)];
        let d = shape.key.row_dim().max(shape.value.row_dim());
        let wanted = match shape.query_rows {
            0..=8 => 1,
            9..=16 => 2,
            _ => 4,
        };
        // Registers hold the accumulators of a row tile.
        let tiles_n = [4, 2, 1].into_iter().find(|&n| n <= wanted && n * d * parts <= 576)?;
        if tiles_n > 1 && shape.near.iter().any(Option::is_some) {
            return None;
        }
        let sizes = [(12, 64), (8, 64), (12, 32), (8, 32), (8, 16), (4, 16), (2, 16), (1, 16)];
        // Of rows that are looked up in two tables, 12 x 32 does more at once than 8 x 64.
        let two_tables = shape.key.codec() != shape.value.codec() && sides[0].1.looked_up;
        let sizes = sizes.into_iter().filter(|&(warps, tile)| {
            (tile <= 32 || (tiles_n == 1 && !shape.short && (narrow || !two_tables)))
                && (warps <= 8 || (tiles_n == 1 && d <= 128 && !shape.short && parts == 1))
                && (warps * tile <= 512 || narrow)
        });
        let layouts = sizes.map(|(warps, tile)| Layout { warps, tile, stages: 2, tiles_n, parts });
        let last = Layout { warps: 1, tile: 16, stages: 1, tiles_n, parts };
        let layout = layouts.chain([last]).find(|l| l.bytes(sides) <= shared_memory)?;
        Some(Self::with(shape, layout, layout.bytes(sides)))
    }

    fn with(shape: &Shape, layout: Layout, shared_bytes: usize) -> Self {
        let Layout { warps, tile, stages, tiles_n, parts } = layout;
        let run = match shape.page_size {
            n if shape.aligned && n.is_multiple_of(tile) => tile,
            n if shape.aligned && n.is_multiple_of(16) => 16,
            _ => 1,
        };
        let known = run == tile && shape.page_size.is_power_of_two() && shape.page_size <= 256;
        let page_size = if known { shape.page_size } else { 0 };
        let width = |row: &crate::format::RowFormat| if shape.original { row.head_dim() } else { row.row_dim() };
        let [k_dim, k_bits, k_packing, k_scaling] = row_values(&shape.key);
        let [v_dim, v_bits, v_packing, v_scaling] = row_values(&shape.value);
        let mut values = [0; 34];
        values[..21].copy_from_slice(&[
            k_dim,
            k_bits,
            k_packing,
            k_scaling,
            v_dim,
            v_bits,
            v_packing,
            v_scaling,
            width(&shape.key) as u32,
            width(&shape.value) as u32,
            type_number(shape.q),
            type_number(shape.out),
            tiles_n as u32,
            warps as u32,
            tile as u32,
            stages as u32,
            shape.narrow() as u32,
            run as u32,
            page_size as u32,
            shared_bytes as u32,
            parts as u32,
        ]);
        let near = || shape.near.iter().flatten();
        values[21] = near().count() as u32;
        for (to, row) in values[22..].chunks_mut(3).zip(near().flatten()) {
            to.copy_from_slice(&row_values(row)[1..]);
        }
        let key = ATTENTION.with(values);
        Variant { key, tiles_n, tile, warps, parts, short: shape.short }
    }
}
