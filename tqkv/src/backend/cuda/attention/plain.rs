//! The kernel for every shape and codec, in f32.

use crate::backend::cuda::codec::row_values;
use crate::backend::cuda::driver::lock;
use crate::backend::cuda::gpu::{Gpu, Recording};
use crate::backend::cuda::kernel::{KernelKey, KernelText, kernel_struct, type_number};
use crate::backend::cuda::memory::{address, batch_addresses};
use crate::backend::cuda::rows::code_alignment;
use crate::backend::cuda::tables::{Side, side_asserts};
use crate::error::{Result, to_u32};
use crate::format::{DType, RowFormat};
use crate::problem::op::Attention;
use crate::problem::{Batch, Domain, Plan};
use std::sync::Arc;

static PLAIN: KernelText = KernelText {
    name: "plain",
    text: include_str!("../kernels/plain.cu"),
    options: &[],
    macros: &[
        "K_DIM",
        "K_BITS",
        "K_PACKING",
        "K_SCALING",
        "K_CODE_ALIGN",
        "V_DIM",
        "V_BITS",
        "V_PACKING",
        "V_SCALING",
        "V_CODE_ALIGN",
        "Q_WIDTH",
        "OUT_WIDTH",
        "Q_TYPE",
        "OUT_TYPE",
        "ROWS",
        "HELD",
    ],
    asserts: || side_asserts() + &Params::asserts(),
    shared_memory_symbol: None,
};

kernel_struct! {
    struct Params as "Params" {
        key: Side,
        value: Side,
        q: u64,
        out: u64,
        lse: u64,
        sink_logits: u64,
        spans: u64,
        table: u64,
        partial: u64,
        partial_ml: u64,
        counters: u64,
        splits: u32,
        pad: u32,
        sequences: u32,
        kv_heads: u32,
        heads: u32,
        page_size: u32,
        width: u32,
        causal: u32,
        window: u32,
        scale: f32,
        softcap: f32,
        pad2: u32,
    }
}

/// Rows of a block, if so many read one KV head.
pub(in crate::backend::cuda) fn plain_rows(row_dim: usize, wanted: usize) -> usize {
    let most = (2048 / row_dim).clamp(1, 8);
    wanted.next_power_of_two().min(1 << most.ilog2())
}

/// Blocks that a multiprocessor holds at once: registers are the limit.
fn held(row_dim: usize, rows: usize) -> usize {
    if rows <= 4 && row_dim <= 128 { 3 } else { 2 }
}

/// `alignments`: of rows of keys' and values' codes. `original`: the domain of queries and outputs.
pub(in crate::backend::cuda) fn plain_key(
    [key, value]: [&RowFormat; 2],
    [k_align, v_align]: [u32; 2],
    [q, out]: [DType; 2],
    original: bool,
    rows: usize,
) -> KernelKey {
    let [k_dim, k_bits, k_packing, k_scaling] = row_values(key);
    let [v_dim, v_bits, v_packing, v_scaling] = row_values(value);
    let width = |row: &RowFormat| if original { row.head_dim() as u32 } else { row.row_dim() as u32 };
    PLAIN.with([
        k_dim,
        k_bits,
        k_packing,
        k_scaling,
        k_align,
        v_dim,
        v_bits,
        v_packing,
        v_scaling,
        v_align,
        width(key),
        width(value),
        type_number(q),
        type_number(out),
        rows as u32,
        held(key.row_dim().max(value.row_dim()), rows) as u32,
    ])
}

/// How many blocks share the positions of a tile of query rows: as many as run at once, of 128 positions at least.
struct Splits {
    most: usize,
    splits: usize,
}

impl Splits {
    fn get(batch: &Batch, most: usize) -> Result<Arc<Self>> {
        let splits = Splits::of(batch, most);
        batch.plans().get(|s: &Splits| (s.most, s.splits) == (most, splits), || Ok(Splits { most, splits }))
    }

    fn of(batch: &Batch, most: usize) -> usize {
        let longest = batch.spans().iter().map(|s| (s.len - s.first) as usize).max().unwrap_or(0);
        most.min(longest.div_ceil(128)).max(1)
    }
}

impl Plan for Splits {
    fn suits(&self, batch: &Batch) -> bool {
        Splits::of(batch, self.most) == self.splits
    }

    // What was recorded keeps its own, which is right for any lengths.
    fn follow(&self, _: &Batch) -> Result<bool> {
        Ok(true)
    }
}

pub(super) fn plain(gpu: &Gpu, op: &Attention, to: &mut Recording) -> Result<()> {
    let sides = [op.key.row(), op.value.row()];
    let [k_tables, v_tables] = [gpu.tables(sides[0])?, gpu.tables(sides[1])?];
    let (d, kv_heads) = (sides[0].row_dim().max(sides[1].row_dim()), op.key.kv_heads());
    let query_rows = || op.batch.spans().iter().map(|s| s.new as usize * (op.heads / kv_heads));
    let rows = plain_rows(d, query_rows().max().unwrap_or(1));
    let tiles = kv_heads * query_rows().map(|n| n.div_ceil(rows)).sum::<usize>();
    let most = (held(d, rows) * gpu.multiprocessors() / tiles.max(1)).max(1);
    let Splits { splits, .. } = *Splits::get(&op.batch, most)?;
    let parts = tiles * rows * splits;
    let sums = parts * sides[1].row_dim() * 4;
    let [partial, counters] = lock(&gpu.workspace).parts(&gpu.stream, sums + parts * 16, tiles * 4)?;
    let original = op.params.domain == Domain::Original;
    let [spans, table] = batch_addresses(&op.batch)?;
    let params = Params {
        key: Side::new(&op.key, &k_tables, k_tables.levels, original),
        value: Side::new(&op.value, &v_tables, v_tables.levels, original),
        q: address(&op.q),
        out: address(&op.out),
        lse: op.lse.as_ref().map_or(0, address),
        sink_logits: op.params.sink_logits.as_ref().map_or(0, address),
        spans,
        table,
        partial: partial.address,
        partial_ml: partial.address + sums as u64,
        counters: counters.address,
        splits: splits as u32,
        pad: 0,
        sequences: op.batch.sequences() as u32,
        kv_heads: kv_heads as u32,
        heads: to_u32("heads", op.heads)?,
        page_size: op.batch.page_size() as u32,
        width: op.batch.width() as u32,
        causal: op.params.causal as u32,
        window: op.params.window.map_or(0, |w| u32::try_from(w).unwrap_or(0)),
        scale: op.params.scale,
        softcap: op.params.softcap.unwrap_or(0.0),
        pad2: 0,
    };
    let blocks = to_u32("query rows", tiles * splits)?;
    let alignments = [code_alignment(&op.key), code_alignment(&op.value)];
    let key = plain_key(sides, alignments, [op.q.dtype(), op.out.dtype()], original, rows);
    let key = key.for_pools([&op.key, &op.value]);
    gpu.launch(&key, blocks, &params, to)?;
    to.memory.extend([partial, counters]);
    Ok(())
}
