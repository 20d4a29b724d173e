//! The kernel for many queries a sequence, on compute capability 9.0: keys and values are first made tiles of f16 (expand.cu), which many
//! rows of queries then share (prefill.cu).

use super::params::Params;
use super::plan::{Group, Item, Problem, Sequences, groups_of};
use crate::backend::cuda::codec::{Needs, row_values};
use crate::backend::cuda::driver::lock;
use crate::backend::cuda::gpu::{Gpu, Recording};
use crate::backend::cuda::kernel::{KernelKey, KernelText, kernel_struct, type_number};
use crate::backend::cuda::memory::{Memory, batch_addresses};
use crate::backend::cuda::rows::code_alignment;
use crate::backend::cuda::tables::{Side, side_asserts};
use crate::backend::cuda::workspace::Use;
use crate::error::{Error, Result};
use crate::format::{DType, RowFormat};
use crate::problem::op::Attention;
use crate::problem::{Batch, Domain, SpanInfo, Visible};
use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

/// Query rows of a block: two warpgroups of 64.
const ROWS: usize = 128;
/// Tiles in flight and in use.
const STAGES: usize = 2;
/// The most memory that tiles take at once: as many KV heads as fit are expanded and attended to, then the next ones.
const MOST_BYTES: usize = 256 << 20;
/// Blocks of expand.cu: for each tile, and at most so many a multiprocessor.
const EXPAND_TILE_BLOCKS: usize = 8;
const EXPAND_BLOCKS: usize = 8;

static EXPAND: KernelText = KernelText {
    name: "expand",
    text: include_str!("../kernels/expand.cu"),
    options: &[],
    macros: &[
        "TILE",
        "K_DIM",
        "K_BITS",
        "K_PACKING",
        "K_SCALING",
        "K_ALIGN",
        "V_DIM",
        "V_BITS",
        "V_PACKING",
        "V_SCALING",
        "V_ALIGN",
    ],
    asserts: || side_asserts() + &Stretch::asserts() + &ExpandParams::asserts(),
    shared_memory_symbol: None,
};

static PREFILL: KernelText = KernelText {
    name: "prefill",
    text: include_str!("../kernels/prefill.cu"),
    options: &[],
    macros: &["K_DIM", "V_DIM", "Q_WIDTH", "OUT_WIDTH", "Q_TYPE", "OUT_TYPE", "TILE", "STAGES", "SHARED_BYTES"],
    asserts: || super::params::asserts() + &PrefillParams::asserts(),
    shared_memory_symbol: None,
};

kernel_struct! {
    #[derive(Debug, Default, PartialEq)]
    struct Stretch as "Stretch" {
        sequence: u32,
        head: u32,
        tile_begin: u32,
        tiles: u32,
        base: u32,
        first: u32,
        len: u32,
        pad: u32,
    }
}

kernel_struct! {
    struct ExpandParams as "Params" {
        key: Side,
        value: Side,
        page_table: u64,
        stretches: u64,
        keys: u64,
        values: u64,
        units: u64,
        count: u32,
        total: u32,
        kv_heads: u32,
        page_size: u32,
        width: u32,
        pad: u32,
    }
}

kernel_struct! {
    struct PrefillParams as "Prefill" { p: Params, keys: u64, values: u64, units: u64 }
}

/// How tiles of a shape lie in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::backend::cuda) struct Tiles {
    /// Positions of a tile.
    pub positions: usize,
    /// Bytes of a tile's matrix of keys, and of values.
    sides: [usize; 2],
    /// Bytes of a block of queries.
    queries: usize,
    /// Elements of a stored value.
    value_dim: usize,
}

impl Tiles {
    /// `None` for rows that are too long for the registers.
    pub fn of(key: &RowFormat, value: &RowFormat) -> Option<Self> {
        let longest = key.row_dim().max(value.row_dim());
        let positions = match longest {
            0..=128 => 128,
            129..=256 => 64,
            _ => return None,
        };
        // Matrices are columns of 64 elements of two bytes.
        let bytes = |row: &RowFormat, rows: usize| row.row_dim().div_ceil(64) * rows * 128;
        let sides = [key, value].map(|row| bytes(row, positions));
        Some(Tiles { positions, sides, queries: bytes(key, ROWS), value_dim: value.row_dim() })
    }

    /// Of a tile: its matrices and units.
    fn bytes(&self) -> usize {
        self.sides[0] + self.sides[1] + 8
    }

    /// Dynamic shared memory of a block: `Layout` of prefill.cu.
    pub fn shared_bytes(&self) -> usize {
        let tiles = STAGES * (self.sides[0] + self.sides[1]);
        let sums = ROWS * (self.value_dim + 4) * 4;
        self.queries + tiles.max(sums) + 4 * ROWS * 4 + 4 * STAGES * 8 + 16
    }
}

/// Some KV heads of some sequences, whose tiles are in the workspace together.
#[derive(Debug, Default, PartialEq)]
struct Pass {
    stretches: Vec<Stretch>,
    items: Vec<Item>,
    tiles: usize,
    /// Parts of outputs that several blocks share.
    parts: usize,
}

/// What a plan is made from, but for the lengths.
#[derive(Clone, Debug, PartialEq)]
struct Wanted {
    problem: Problem,
    sequences: Vec<usize>,
    /// The most tiles at once.
    most_tiles: usize,
}

impl Wanted {
    /// Empty if the tiles of one KV head are too many.
    fn passes(&self, spans: &[SpanInfo]) -> Vec<Pass> {
        let mut passes = vec![(Pass::default(), vec![])];
        for &sequence in &self.sequences {
            let groups = groups_of(&self.problem, sequence, &spans[sequence]);
            let begin = groups.iter().map(|g| g.begin).min().unwrap_or(0);
            let tiles = groups.iter().map(|g| g.end).max().map_or(0, |end| end.saturating_sub(begin)).max(1);
            let mut head = 0;
            while head < self.problem.kv_heads {
                let Some((pass, taken)) = passes.last_mut() else { break };
                let heads = ((self.most_tiles - pass.tiles) / tiles).min(self.problem.kv_heads - head);
                if heads > 0 {
                    let heads = head..head + heads;
                    taken.extend(pass.expand(sequence, &spans[sequence], heads.clone(), begin, tiles, &groups));
                    head = heads.end;
                } else if pass.tiles > 0 {
                    passes.push(Default::default());
                } else {
                    return vec![];
                }
            }
        }
        passes.into_iter().map(|(pass, groups)| pass.attend(&self.problem, &groups)).collect()
    }
}

impl Pass {
    /// Takes some heads of a sequence; gives their groups.
    fn expand(
        &mut self,
        sequence: usize,
        span: &SpanInfo,
        heads: Range<usize>,
        begin: usize,
        tiles: usize,
        groups: &[Group],
    ) -> Vec<Group> {
        let base = self.tiles;
        self.tiles += heads.len() * tiles;
        self.stretches.push(Stretch {
            sequence: sequence as u32,
            head: heads.start as u32,
            tile_begin: begin as u32,
            tiles: tiles as u32,
            base: base as u32,
            first: span.first,
            len: span.len,
            pad: 0,
        });
        let at = |g: &Group| base + (g.item.kv_head as usize - heads.start) * tiles + g.begin - begin;
        let mine = groups.iter().filter(|g| heads.contains(&(g.item.kv_head as usize)));
        mine.map(|g| Group { item: Item { tile_at: at(g) as u32, ..g.item }, ..*g }).collect()
    }

    /// One block an item, or several where there are blocks left.
    fn attend(mut self, problem: &Problem, groups: &[Group]) -> Self {
        let pieces = pieces(problem.blocks, groups);
        for (group, pieces) in groups.iter().zip(pieces) {
            let at = |piece: usize| group.begin + group.tiles() * piece / pieces;
            self.items.extend((0..pieces).map(|piece| Item {
                tile_begin: at(piece) as u32,
                tile_end: at(piece + 1) as u32,
                tile_at: group.item.tile_at + (at(piece) - group.begin) as u32,
                part: (self.parts + piece) as u32,
                part_first: self.parts as u32,
                part_count: pieces as u32,
                ..group.item
            }));
            self.parts += if pieces > 1 { pieces } else { 0 };
        }
        // The longest first: blocks take them in this order as they become free.
        self.items.sort_by_key(|item| Reverse(item.tile_end - item.tile_begin));
        self
    }
}

/// Into how many parts of as many tiles each group is cut, where there are fewer groups than blocks: as many as make the longest the shortest, a
/// part that is joined to others being longer by what joining costs (in tiles, fitted to measured times).
fn pieces(blocks: usize, groups: &[Group]) -> Vec<usize> {
    const JOINING: usize = 5;
    if groups.len() > blocks {
        return vec![1; groups.len()];
    }
    let longest = groups.iter().map(Group::tiles).max().unwrap_or(0);
    let cut = |most: usize| groups.iter().map(move |g| g.tiles().div_ceil(most.max(1)).max(1));
    let cost = |&most: &usize| if most < longest { most + JOINING + longest.div_ceil(most) / 2 } else { longest };
    let fits = |&most: &usize| most == longest || cut(most).sum::<usize>() <= blocks;
    let mut candidates: Vec<_> = (1..=blocks).map(|parts| longest.div_ceil(parts)).collect();
    candidates.dedup();
    let best = candidates.into_iter().filter(|&n| n > 0).filter(fits).min_by_key(cost);
    cut(best.unwrap_or(longest)).collect()
}

/// A plan on the device, kept with its batch: the stretches of all passes, then the items.
struct DevicePlan {
    wanted: Wanted,
    passes: Vec<Pass>,
    memory: Arc<Memory>,
}

impl DevicePlan {
    /// Whether all launches would be the same.
    fn lasts(&self, batch: &Batch) -> bool {
        let shape = |p: &Pass| (p.tiles, p.parts, p.stretches.len(), p.items.len());
        self.wanted.passes(batch.spans()).iter().map(shape).eq(self.passes.iter().map(shape))
    }
}

fn words(passes: &[Pass]) -> Vec<u32> {
    let stretches = passes.iter().flat_map(|p| bytemuck::cast_slice::<_, u32>(&p.stretches));
    // Items are aligned to their size.
    let count: usize = passes.iter().map(|p| p.stretches.len()).sum();
    let padding = std::iter::repeat_n(&0, if count.is_multiple_of(2) { 0 } else { 8 });
    let items = passes.iter().flat_map(|p| bytemuck::cast_slice::<_, u32>(&p.items));
    stretches.chain(padding).chain(items).copied().collect()
}

impl crate::problem::Plan for DevicePlan {
    fn suits(&self, batch: &Batch) -> bool {
        self.lasts(batch)
    }

    /// Blocks and tiles are those of the launch.
    fn expect(&self, batch: &Batch) -> Result<()> {
        match self.lasts(batch) {
            true => Ok(()),
            false => Err(Error::Mismatch {
                what: "position tiles of a batch with many new positions",
                got: self.wanted.passes(batch.spans()).iter().map(|p| p.tiles).sum(),
                expected: self.passes.iter().map(|p| p.tiles).sum::<usize>().to_string(),
            }),
        }
    }

    fn follow(&self, batch: &Batch) -> Result<bool> {
        let passes = self.wanted.passes(batch.spans());
        self.memory.write(0, bytemuck::cast_slice(&words(&passes))).map(|()| true)
    }
}

/// What is to be done for sequences of many queries.
pub(super) struct Prefill {
    tiles: Tiles,
    plan: Arc<DevicePlan>,
}

pub(in crate::backend::cuda) fn prefill_key(
    [key, value]: [&RowFormat; 2],
    [q, out]: [DType; 2],
    original: bool,
    tiles: &Tiles,
) -> KernelKey {
    let width = |row: &RowFormat| if original { row.head_dim() as u32 } else { row.row_dim() as u32 };
    PREFILL.with([
        key.row_dim() as u32,
        value.row_dim() as u32,
        width(key),
        width(value),
        type_number(q),
        type_number(out),
        tiles.positions as u32,
        STAGES as u32,
        tiles.shared_bytes() as u32,
    ])
}

pub(in crate::backend::cuda) fn expand_key(
    [key, value]: [&RowFormat; 2],
    [k_align, v_align]: [u32; 2],
    tiles: &Tiles,
) -> KernelKey {
    let [k_dim, k_bits, k_packing, k_scaling] = row_values(key);
    let [v_dim, v_bits, v_packing, v_scaling] = row_values(value);
    let positions = tiles.positions as u32;
    EXPAND.with([positions, k_dim, k_bits, k_packing, k_scaling, k_align, v_dim, v_bits, v_packing, v_scaling, v_align])
}

impl Tiles {
    /// `None` where the kernel does not take the operation.
    fn for_operation(gpu: &Gpu, op: &Attention) -> Option<Self> {
        let (key, value) = (op.key.row(), op.value.row());
        let limits = &gpu.stream.context.limits;
        // The only one with products by a warpgroup.
        let able = limits.capability == (9, 0)
            && op.q.dtype() != DType::F32
            && op.near.is_empty()
            && [key, value].iter().all(|row| Needs::of(row, false, 1).is_some());
        Tiles::of(key, value).filter(|t| able && t.shared_bytes() <= limits.shared_memory as usize)
    }
}

impl Prefill {
    /// What kernels are to do, and what is left to this one: nothing where no sequence has many queries, or tiles would take too much memory.
    pub fn of(gpu: &Gpu, op: &Attention) -> Result<(Sequences, Option<Self>)> {
        let (spans, kv_heads) = (op.batch.spans(), op.key.kv_heads());
        let group = op.heads / kv_heads;
        // What the host does not know it cannot plan.
        let known = op.batch.bounds().is_none();
        let Some(tiles) = Tiles::for_operation(gpu, op).filter(|_| known) else {
            return Ok((Sequences::all_few(spans), None));
        };
        let sequences = Sequences::of(spans, group);
        if sequences.many.is_empty() {
            return Ok((sequences, None));
        }
        let problem = Problem {
            kv_heads,
            group,
            rows: ROWS,
            tile: tiles.positions,
            warps: 1,
            blocks: gpu.multiprocessors(),
            visible: Visible { causal: op.params.causal, window: op.params.window },
        };
        let wanted = Wanted { problem, sequences: sequences.many.clone(), most_tiles: MOST_BYTES / tiles.bytes() };
        let plan = op.batch.plans().get(
            |plan: &DevicePlan| plan.wanted == wanted,
            || {
                let passes = wanted.passes(spans);
                let memory = Arc::new(gpu.stream.upload(bytemuck::cast_slice(&words(&passes)))?);
                Ok(DevicePlan { wanted: wanted.clone(), passes, memory })
            },
        )?;
        if plan.passes.is_empty() {
            return Ok((Sequences::all_few(spans), None));
        }
        Ok((sequences, Some(Prefill { tiles, plan })))
    }

    pub fn record(&self, gpu: &Gpu, op: &Attention, to: &mut Recording) -> Result<()> {
        let sides = [op.key.row(), op.value.row()];
        let [k_tables, v_tables] = [gpu.tables(sides[0])?, gpu.tables(sides[1])?];
        let tables = [(&*k_tables, k_tables.levels), (&*v_tables, v_tables.levels)];
        let (plan, tiles) = (&self.plan, &self.tiles);
        let most = plan.passes.iter().map(|p| p.tiles).max().unwrap_or(0);
        let memory = lock(&gpu.workspace).get(&gpu.stream, Use::Tiles, most * tiles.bytes())?;
        let keys = memory.address;
        let values = keys + (most * tiles.sides[0]) as u64;
        let units = values + (most * tiles.sides[1]) as u64;
        let parts = plan.passes.iter().map(|p| p.parts).max().unwrap_or(0);
        let sums = parts * ROWS * tiles.value_dim * 4;
        let [partial, counters] = lock(&gpu.workspace).parts(&gpu.stream, sums + parts * ROWS * 8, parts * 4)?;
        let p = Params {
            partial: partial.address,
            partial_ml: partial.address + sums as u64,
            counters: counters.address,
            ..Params::of(op, tables)?
        };
        let original = op.params.domain == Domain::Original;
        let expand = expand_key(sides, [code_alignment(&op.key), code_alignment(&op.value)], tiles);
        let expand = expand.for_pools([&op.key, &op.value]);
        let prefill = prefill_key(sides, [op.q.dtype(), op.out.dtype()], original, tiles);
        let mut stretches = plan.memory.address;
        let count: usize = plan.passes.iter().map(|p| p.stretches.len()).sum();
        let mut items = stretches + (count.next_multiple_of(2) * size_of::<Stretch>()) as u64;
        for pass in &plan.passes {
            let expanded = ExpandParams {
                key: p.key,
                value: p.value,
                page_table: batch_addresses(&op.batch)?[1],
                stretches,
                keys,
                values,
                units,
                count: pass.stretches.len() as u32,
                total: pass.tiles as u32,
                kv_heads: p.kv_heads,
                page_size: p.page_size,
                width: p.table_width,
                pad: 0,
            };
            gpu.launch(&expand, gpu.blocks(EXPAND_TILE_BLOCKS * pass.tiles, EXPAND_BLOCKS), &expanded, to)?;
            let attended = PrefillParams { p: Params { items, ..p }, keys, values, units };
            gpu.launch(&prefill, pass.items.len() as u32, &attended, to)?;
            stretches += size_of_val(&*pass.stretches) as u64;
            items += size_of_val(&*pass.items) as u64;
        }
        to.memory.extend([memory, partial, counters, plan.memory.clone()]);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(lens: &[(u32, u32, u32)]) -> Vec<SpanInfo> {
        let mut start = 0;
        let span = |&(first, len, new): &(u32, u32, u32)| {
            start += new;
            SpanInfo { first, len, start: start - new, new }
        };
        lens.iter().map(span).collect()
    }

    fn wanted(sequences: Vec<usize>, window: Option<usize>, most_tiles: usize) -> Wanted {
        let visible = Visible { causal: true, window };
        let problem = Problem { kv_heads: 3, group: 4, rows: ROWS, tile: 128, warps: 1, blocks: 132, visible };
        Wanted { problem, sequences, most_tiles }
    }

    /// Every row tile finds each of its position tiles once, where a stretch has put it, and no pass is larger than it may be.
    #[test]
    fn tiles_are_where_items_look_for_them() {
        let spans = spans(&[(0, 530, 530), (0, 40, 1), (100, 9000, 70), (0, 64, 64), (37, 20_000, 4000)]);
        for (window, most_tiles) in [(None, 1 << 20), (None, 200), (Some(300), 1 << 20), (Some(5000), 90)] {
            let wanted = wanted(vec![0, 2, 3, 4], window, most_tiles);
            let passes = wanted.passes(&spans);
            assert!(!passes.is_empty());
            let mut found = vec![];
            for pass in &passes {
                assert!(pass.tiles <= most_tiles && !pass.items.is_empty());
                for item in &pass.items {
                    let stretch = pass.stretches.iter().rfind(|s| s.base <= item.tile_at).unwrap();
                    let head = stretch.head + (item.tile_at - stretch.base) / stretch.tiles;
                    let tile = stretch.tile_begin + (item.tile_at - stretch.base) % stretch.tiles;
                    assert_eq!((stretch.sequence, head, tile), (item.sequence, item.kv_head, item.tile_begin));
                    assert!(item.tile_end <= stretch.tile_begin + stretch.tiles);
                    assert!(item.part_count == 1 || (item.part_first + item.part_count) as usize <= pass.parts);
                    found.push((item.sequence, item.kv_head, item.row, item.tile_begin, item.tile_end));
                }
            }
            found.sort_unstable();
            for &s in &wanted.sequences {
                for group in groups_of(&wanted.problem, s, &spans[s]) {
                    let own = (group.item.sequence, group.item.kv_head, group.item.row);
                    let parts: Vec<_> = found.iter().filter(|f| (f.0, f.1, f.2) == own).collect();
                    assert_eq!(parts.first().map(|p| p.3 as usize), Some(group.begin), "{own:?}");
                    assert_eq!(parts.last().map(|p| p.4 as usize), Some(group.end), "{own:?}");
                    assert!(parts.windows(2).all(|w| w[0].4 == w[1].3), "{own:?}");
                }
            }
        }
    }

    #[test]
    fn few_rows_over_long_contexts_are_shared_by_blocks() {
        let passes = wanted(vec![0], None, 1 << 20).passes(&spans(&[(0, 65_536, 64)]));
        let [pass] = &passes[..] else { panic!("{} passes", passes.len()) };
        assert!((66..=132).contains(&pass.items.len()), "{}", pass.items.len());
        // Where joining would cost more than it saves, and where there is work for all, they are not.
        for (len, new) in [(500, 64), (8192, 8192)] {
            let passes = wanted(vec![0], None, 1 << 20).passes(&spans(&[(0, len, new)]));
            assert_eq!(passes[0].parts, 0, "{len} {new}");
        }
    }

    #[test]
    fn a_head_that_does_not_fit_is_refused() {
        assert_eq!(wanted(vec![0], None, 70).passes(&spans(&[(0, 9000, 64)])), vec![]);
        assert_eq!(wanted(vec![0], None, 71).passes(&spans(&[(0, 9000, 64)])).len(), 3);
    }

    #[test]
    fn shared_memory_suffices_on_hopper() {
        for d in (16..=256).step_by(16) {
            let row = RowFormat::new(crate::format::Codec::tq(4), d).unwrap();
            assert!(Tiles::of(&row, &row).unwrap().shared_bytes() <= 227 << 10, "{d}");
        }
    }
}
