//! How attention is spread over the blocks of a launch: pure arithmetic, made once for a batch.
//!
//! A *group* is the query rows of one KV head that are handled together, with the position tiles that they see. Groups are
//! cut into items of consecutive tiles, so that every block has about the same number.

use crate::backend::cuda::kernel::kernel_struct;
use crate::problem::{SpanInfo, Visible};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What a plan is made from, but for the sequences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub kv_heads: usize,
    /// Query heads of a KV head.
    pub group: usize,
    /// Query rows of an item.
    pub rows: usize,
    /// Positions of a tile.
    pub tile: usize,
    /// Warps of a block, each of which takes a tile of an item in turn.
    pub warps: usize,
    pub blocks: usize,
    pub visible: Visible,
}

kernel_struct! {
    #[derive(Debug, Default, PartialEq, Eq)]
    pub(super) struct Item as "Item" {
        sequence: u32,
        kv_head: u32,
        row: u32,
        rows: u32,
        tile_begin: u32,
        tile_end: u32,
        part: u32,
        part_first: u32,
        part_count: u32,
        first: u32,
        len: u32,
        q_start: u32,
        q_len: u32,
        next: u32,
        tile_at: u32,
        reserved: u32,
    }
}

/// Which sequences of a batch have so many queries that it pays to make their keys and values f16 first, for all of them: the others are
/// answered in one launch, by a kernel that decodes them for every 32 query rows anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Sequences {
    pub few: Vec<usize>,
    pub many: Vec<usize>,
    /// Whether a kernel takes the many.
    split: bool,
}

/// Query rows a KV head from which a sequence may have many.
const MANY_ROWS: usize = 256;
/// Pairs of a query row and a position from which it has: below, two launches cost more than they save (measured: docs/lab-book.md).
const MANY_PAIRS: usize = 1 << 20;

impl Sequences {
    pub fn of(spans: &[SpanInfo], group: usize) -> Self {
        let many = |&s: &usize| {
            let rows = spans[s].new as usize * group;
            rows >= MANY_ROWS && rows.saturating_mul((spans[s].len - spans[s].first) as usize) >= MANY_PAIRS
        };
        let (many, few) = (0..spans.len()).partition(many);
        Sequences { few, many, split: true }
    }

    /// Where one kernel takes all.
    pub fn all_few(spans: &[SpanInfo]) -> Self {
        Sequences { few: (0..spans.len()).collect(), many: vec![], split: false }
    }

    /// Whether these are the ones at other lengths too.
    pub fn suit(&self, spans: &[SpanInfo], group: usize) -> bool {
        !self.split || *self == Self::of(spans, group)
    }
}

impl Problem {
    /// What starting and summing an item costs, in tiles, and what joining it to others of the same output costs: 512 positions.
    pub fn overhead(&self) -> usize {
        (512 / self.tile).max(1)
    }

    /// What an item costs, in tiles: a round of the warps is not shorter for being incomplete. Fitted to measured times.
    fn cost(&self, tiles: usize, split: bool) -> usize {
        tiles.next_multiple_of(self.warps) + self.overhead() * (1 + split as usize)
    }

    /// The most items of a plan for as many new positions a sequence, whatever their lengths: the blocks' first, a group each, and one
    /// more wherever a block ends within a group.
    pub fn most_items(&self, spans: &[SpanInfo]) -> usize {
        let tiles: usize = spans.iter().map(|s| (s.new as usize * self.group).div_ceil(self.rows)).sum();
        2 * self.blocks + self.kv_heads * tiles
    }

    /// The most parts of a plan: blocks have one each if groups are cut evenly, and two where each ends within one.
    pub fn most_parts(&self) -> usize {
        2 * self.blocks
    }
}

pub(super) struct Group {
    /// All of an item but its tiles and parts.
    pub item: Item,
    pub begin: usize,
    pub end: usize,
}

impl Group {
    pub fn tiles(&self) -> usize {
        self.end - self.begin
    }

    fn bounds(&self) -> (usize, usize) {
        (self.begin, self.end)
    }
}

/// Tiles [begin, end) of a group.
type Piece = (usize, usize, usize);

fn groups(problem: &Problem, spans: &[SpanInfo], mine: &[usize]) -> Vec<Group> {
    mine.iter().flat_map(|&s| groups_of(problem, s, &spans[s])).collect()
}

/// The groups of a sequence, the earliest rows first, of all KV heads each.
pub(super) fn groups_of(problem: &Problem, sequence: usize, span: &SpanInfo) -> Vec<Group> {
    let mut groups = Vec::new();
    let (first, len, new) = (span.first as usize, span.len as usize, span.new as usize);
    let all = new * problem.group;
    for row in (0..all).step_by(problem.rows) {
        let rows = problem.rows.min(all - row);
        let lowest = len - new + row / problem.group;
        let highest = len - new + (row + rows - 1) / problem.group;
        let seen = problem.visible.range(lowest..highest + 1, first..len);
        let begin = seen.start / problem.tile;
        let end = if seen.is_empty() { begin } else { seen.end.div_ceil(problem.tile) };
        for kv_head in 0..problem.kv_heads {
            let item = Item {
                sequence: sequence as u32,
                kv_head: kv_head as u32,
                row: row as u32,
                rows: rows as u32,
                first: span.first,
                len: span.len,
                q_start: span.start,
                q_len: span.new,
                ..Item::default()
            };
            groups.push(Group { item, begin, end });
        }
    }
    groups
}

/// Pieces by block.
type Work = Vec<Vec<Piece>>;

/// Into how many equal pieces each group is cut, where there is a block for each piece and the largest costs least.
fn even_pieces(problem: &Problem, groups: &[Group]) -> Vec<usize> {
    let longest = groups.iter().map(Group::tiles).max().unwrap_or(0);
    let total: usize = groups.iter().map(Group::tiles).sum();
    let mut chunks: Vec<usize> =
        (1..=problem.blocks).map(|s| longest.div_ceil(s)).chain([total.div_ceil(problem.blocks)]).collect();
    chunks.sort_unstable();
    chunks.dedup();
    let pieces = |group: &Group, chunk: usize| group.tiles().div_ceil(chunk.max(1)).max(1);
    let cost = |&chunk: &usize| {
        let of = |group| {
            let n = pieces(group, chunk);
            problem.cost(group.tiles().div_ceil(n), n > 1)
        };
        groups.iter().map(of).max()
    };
    let too_many = |&chunk: &usize| groups.iter().map(|g| pieces(g, chunk)).sum::<usize>() > problem.blocks;
    let few_enough = &chunks[chunks.partition_point(too_many)..];
    let chunk = few_enough.iter().copied().min_by_key(cost).unwrap_or(longest);
    groups.iter().map(|g| pieces(g, chunk)).collect()
}

/// Every group in so many equal pieces, the longest first, each on the block that has least to do; and the most that one has.
fn spread(problem: &Problem, groups: &[Group], pieces: &[usize]) -> (Work, usize) {
    let mut load: BinaryHeap<_> = (0..problem.blocks).map(|b| Reverse((0, b))).collect();
    let (mut work, mut most) = (vec![Vec::new(); problem.blocks], 0);
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|&g| Reverse(groups[g].tiles().div_ceil(pieces[g])));
    for g in order {
        let (tiles, n) = (groups[g].tiles(), pieces[g]);
        for i in 0..n {
            let (from, to) = (groups[g].begin + tiles * i / n, groups[g].begin + tiles * (i + 1) / n);
            if let Some(Reverse((busy, block))) = load.pop() {
                work[block].push((g, from, to));
                let busy = busy + problem.cost(to - from, n > 1);
                most = most.max(busy);
                load.push(Reverse((busy, block)));
            }
        }
    }
    (work, most)
}

/// One block after the other up to a quota, groups being cut wherever it ends: says block and piece, and returns how many blocks.
fn fill(groups: &[Group], quota: usize, overhead: usize, mut piece: impl FnMut(usize, Piece)) -> usize {
    let (mut block, mut room, mut begun) = (0, quota, false);
    for (g, group) in groups.iter().enumerate() {
        let mut at = group.begin;
        loop {
            let left = group.end - at;
            if begun && room < overhead + overhead.min(left) {
                block += 1;
                room = quota;
            }
            let take = left.min(room.saturating_sub(overhead).max(1));
            piece(block, (g, at, at + take));
            begun = true;
            room = room.saturating_sub(take + overhead);
            at += take;
            if at >= group.end {
                break;
            }
        }
    }
    block + 1
}

/// Groups cut at the least quota that the blocks suffice for; and the most that a block has to do.
fn quotas(problem: &Problem, groups: &[Group]) -> (Work, usize) {
    let (blocks, overhead) = (problem.blocks, problem.overhead());
    let total: usize = groups.iter().map(Group::tiles).sum();
    let enough = |quota| fill(groups, quota, overhead, |_, _| ()) <= blocks;
    // No quota is below the mean, and few are far above it.
    let mut low = ((total + overhead * groups.len()) / blocks).max(overhead + 1);
    let mut high = low + 4 * overhead;
    if !enough(high) {
        (low, high) = (high, total + overhead * (groups.len() + 1));
    }
    while low < high {
        let middle = (low + high) / 2;
        if enough(middle) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let mut work = vec![Vec::new(); blocks];
    let mut counts = vec![0; groups.len()];
    fill(groups, low, overhead, |block, piece| {
        work[block].push(piece);
        counts[piece.0] += 1;
    });
    let cost = |&(g, from, to): &Piece| problem.cost(to - from, counts[g] > 1);
    let most = work.iter().map(|block| block.iter().map(cost).sum()).max().unwrap_or(0);
    (work, most)
}

/// A plan, which other lengths mostly leave as it is.
pub(super) struct Plan {
    /// The sequences that it is for.
    mine: Vec<usize>,
    /// Begin and end of every group.
    tiles: Vec<(usize, usize)>,
    /// The first item of every block, then the others.
    pub items: Vec<Item>,
}

impl Plan {
    pub fn new(problem: &Problem, spans: &[SpanInfo], mine: Vec<usize>) -> Self {
        let groups = groups(problem, spans, &mine);
        Self::of(problem, &groups, mine)
    }

    /// As a new plan for other lengths, with as many new positions a sequence. Where no sequence has come to another tile nothing is spread
    /// anew: in most steps of decoding.
    pub fn follow(&mut self, problem: &Problem, spans: &[SpanInfo]) {
        let groups = groups(problem, spans, &self.mine);
        if !groups.iter().map(Group::bounds).eq(self.tiles.iter().copied()) {
            *self = Self::of(problem, &groups, std::mem::take(&mut self.mine));
            return;
        }
        for item in self.items.iter_mut().filter(|item| item.rows > 0) {
            let SpanInfo { first, len, .. } = spans[item.sequence as usize];
            (item.first, item.len) = (first, len);
        }
    }

    fn of(problem: &Problem, groups: &[Group], mine: Vec<usize>) -> Self {
        Plan { mine, tiles: groups.iter().map(Group::bounds).collect(), items: plan(problem, groups) }
    }
}

/// The first item of every block, then the others.
fn plan(problem: &Problem, groups: &[Group]) -> Vec<Item> {
    // Equal pieces waste nothing where they come out even; cutting at quotas always comes out even but cuts more.
    let pieces = match groups.len() {
        n if n <= problem.blocks => Some(even_pieces(problem, groups)),
        n if n <= 4 * problem.blocks => Some(vec![1; n]),
        _ => None,
    };
    let (cut, cut_most) = quotas(problem, groups);
    let work = match pieces.map(|pieces| spread(problem, groups, &pieces)) {
        Some((even, most)) if most <= cut_most => even,
        _ => cut,
    };
    number(groups, &work)
}

/// Items in the order that blocks find them, with their slots in the workspace.
fn number(groups: &[Group], work: &Work) -> Vec<Item> {
    let mut counts = vec![0; groups.len()];
    work.iter().flatten().for_each(|&(g, ..)| counts[g] += 1);
    let (mut firsts, mut parts) = (Vec::with_capacity(groups.len()), 0);
    for &n in &counts {
        firsts.push(parts);
        parts += if n > 1 { n } else { 0 };
    }
    let mut used = vec![0u32; groups.len()];
    let mut items = Vec::with_capacity(work.len() + groups.len());
    items.resize(work.len(), Item::default());
    for (block, mine) in work.iter().enumerate() {
        let mut at = block;
        for (i, &(g, begin, end)) in mine.iter().enumerate() {
            if i > 0 {
                let next = items.len();
                items[at].next = next as u32;
                items.push(Item::default());
                at = next;
            }
            items[at] = Item {
                tile_begin: begin as u32,
                tile_end: end as u32,
                part: firsts[g] + used[g],
                part_first: firsts[g],
                part_count: counts[g],
                ..groups[g].item
            };
            used[g] += 1;
        }
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(lens: &[(u32, u32, u32)]) -> Vec<SpanInfo> {
        let mut start = 0;
        lens.iter()
            .map(|&(first, len, new)| {
                let span = SpanInfo { first, len, start, new };
                start += new;
                span
            })
            .collect()
    }

    fn all(spans: &[SpanInfo]) -> Vec<usize> {
        (0..spans.len()).collect()
    }

    /// Items by walking the blocks' chains.
    fn walk(items: &[Item], blocks: usize) -> Vec<Vec<Item>> {
        (0..blocks)
            .map(|b| {
                let mut mine = vec![];
                let mut at = b;
                while items[at].rows > 0 {
                    mine.push(items[at]);
                    at = items[at].next as usize;
                    if at == 0 {
                        break;
                    }
                }
                mine
            })
            .collect()
    }

    #[test]
    fn every_tile_is_taken_once() {
        let cases: &[&[(u32, u32, u32)]] = &[
            &[(0, 1, 1)],
            &[(0, 131_072, 1)],
            &[(0, 0, 0), (0, 100, 100)],
            &[(0, 20, 4), (3, 7, 4), (0, 900, 2), (700, 5000, 1)],
            &[(0, 32_768, 1); 8],
            &[(0, 77, 1); 300],
        ];
        for lens in cases {
            let spans = spans(lens);
            for (kv_heads, group, rows) in [(8, 4, 8), (2, 1, 8), (1, 20, 32), (3, 3, 16)] {
                for tile in [16, 64] {
                    for (causal, window) in [(true, None), (false, None), (true, Some(5)), (true, Some(4000))] {
                        let visible = Visible { causal, window };
                        let problem = Problem { kv_heads, group, rows, tile, warps: 8, blocks: 132, visible };
                        let plan = Plan::new(&problem, &spans, all(&spans)).items;
                        assert!(plan.len() <= problem.most_items(&spans), "{problem:?} {lens:?}");
                        let work = walk(&plan, 132);
                        for wanted in groups(&problem, &spans, &all(&spans)) {
                            let mut found: Vec<_> = work
                                .iter()
                                .flatten()
                                .filter(|i| {
                                    (i.sequence, i.kv_head, i.row)
                                        == (wanted.item.sequence, wanted.item.kv_head, wanted.item.row)
                                })
                                .collect();
                            found.sort_by_key(|i| i.tile_begin);
                            let name = format!("{problem:?} {lens:?}");
                            assert!(!found.is_empty(), "{name}");
                            assert_eq!(found[0].tile_begin as usize, wanted.begin, "{name}");
                            assert!(found.windows(2).all(|w| w[0].tile_end == w[1].tile_begin), "{name}");
                            assert_eq!(found[found.len() - 1].tile_end as usize, wanted.end, "{name}");
                            assert!(found.iter().all(|i| i.part_count as usize == found.len()), "{name}");
                            let mut parts: Vec<_> = found.iter().map(|i| i.part - i.part_first).collect();
                            parts.sort_unstable();
                            assert!(parts.iter().enumerate().all(|(i, &p)| i == p as usize), "{name}");
                            let end = found[0].part_first as usize + found.len();
                            assert!(found.len() == 1 || end <= problem.most_parts(), "{name}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn long_contexts_fill_the_device_evenly() {
        let visible = Visible { causal: true, window: None };
        let problem = Problem { kv_heads: 8, group: 4, rows: 8, tile: 64, warps: 8, blocks: 132, visible };
        for lens in [vec![(0, 131_072, 1)], vec![(0, 32_768, 1); 8], vec![(0, 8192, 1); 32]] {
            let plan = Plan::new(&problem, &spans(&lens), (0..lens.len()).collect()).items;
            let tiles = |items: &[Item]| items.iter().map(|i| i.tile_end - i.tile_begin).sum::<u32>();
            let loads: Vec<_> = walk(&plan, 132).iter().map(|b| tiles(b)).collect();
            let most = *loads.iter().max().unwrap() as f64;
            let mean = loads.iter().sum::<u32>() as f64 / 132.0;
            assert!(most <= 1.1 * mean, "{most} of {mean}");
        }
    }

    #[test]
    fn a_plan_that_follows_is_a_new_one() {
        for window in [None, Some(100)] {
            let visible = Visible { causal: true, window };
            let problem = Problem { kv_heads: 2, group: 4, rows: 8, tile: 64, warps: 8, blocks: 132, visible };
            let at = |step: u32| spans(&[(step / 90, 1000 + step, 1), (0, 70 + step, 3), (step, 5 + step, 1)]);
            let mut plan = Plan::new(&problem, &at(0), vec![0, 1, 2]);
            for step in 1..300 {
                plan.follow(&problem, &at(step));
                assert_eq!(plan.items, Plan::new(&problem, &at(step), vec![0, 1, 2]).items, "{step}");
            }
        }
    }
}
