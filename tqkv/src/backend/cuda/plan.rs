//! How attention is spread over the blocks of a launch: pure arithmetic, made once for a batch.
//!
//! A *group* is the query rows of one KV head that are handled together, with the position tiles that they see. Groups are
//! cut into items of consecutive tiles, so that every block has about the same number.

use crate::problem::{SpanInfo, Visible};
use bytemuck::{Pod, Zeroable};
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
    pub causal: bool,
    pub window: Option<usize>,
}

/// `Item` of attention.cu.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Item {
    pub sequence: u32,
    pub kv_head: u32,
    pub row: u32,
    pub rows: u32,
    pub tile_begin: u32,
    pub tile_end: u32,
    pub part: u32,
    pub part_first: u32,
    pub part_count: u32,
    pub first: u32,
    pub len: u32,
    pub q_start: u32,
    pub q_len: u32,
    pub next: u32,
    pub reserved: [u32; 2],
}

#[derive(Debug)]
pub(super) struct Plan {
    /// The first item of every block, then the others.
    pub items: Vec<Item>,
    /// Slots of the workspace.
    pub parts: usize,
}

impl Problem {
    /// What starting and summing an item costs, in tiles, and what joining it to others of the same output costs: 512 positions.
    fn overhead(&self) -> usize {
        (512 / self.tile).max(1)
    }

    /// What an item costs, in tiles: a round of the warps is not shorter for being incomplete. Fitted to measured times.
    fn cost(&self, tiles: usize, split: bool) -> usize {
        tiles.next_multiple_of(self.warps) + self.overhead() * (1 + split as usize)
    }

    /// The most that a block has to do.
    fn most(&self, groups: &[Group], work: &[Vec<Piece>]) -> usize {
        let counts = counts(groups, work);
        let cost = |&(g, from, to): &Piece| self.cost(to - from, counts[g] > 1);
        work.iter().map(|block| block.iter().map(cost).sum()).max().unwrap_or(0)
    }
}

struct Group {
    /// All of an item but its tiles and parts.
    item: Item,
    begin: usize,
    end: usize,
}

impl Group {
    fn tiles(&self) -> usize {
        self.end - self.begin
    }
}

/// Tiles [begin, end) of a group.
type Piece = (usize, usize, usize);

fn groups(problem: &Problem, spans: &[SpanInfo]) -> Vec<Group> {
    let mut groups = Vec::new();
    for (s, span) in spans.iter().enumerate() {
        let (first, len, new) = (span.first as usize, span.len as usize, span.new as usize);
        let all = new * problem.group;
        for row in (0..all).step_by(problem.rows) {
            let rows = problem.rows.min(all - row);
            let lowest = len - new + row / problem.group;
            let highest = len - new + (row + rows - 1) / problem.group;
            let visible = Visible { causal: problem.causal, window: problem.window };
            let seen = visible.range(lowest..highest + 1, first..len);
            let begin = seen.start / problem.tile;
            let end = if seen.is_empty() { begin } else { seen.end.div_ceil(problem.tile) };
            for kv_head in 0..problem.kv_heads {
                let item = Item {
                    sequence: s as u32,
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
    }
    groups
}

/// How many pieces each group has become.
fn counts(groups: &[Group], work: &[Vec<Piece>]) -> Vec<u32> {
    let mut counts = vec![0; groups.len()];
    work.iter().flatten().for_each(|&(g, ..)| counts[g] += 1);
    counts
}

/// Every group in `pieces` equal pieces, each on the block that has least to do.
fn whole_pieces(problem: &Problem, groups: &[Group], pieces: &[usize]) -> Vec<Vec<Piece>> {
    let mut load: BinaryHeap<_> = (0..problem.blocks).map(|b| Reverse((0, b))).collect();
    let mut out = vec![Vec::new(); problem.blocks];
    let mut order: Vec<usize> = (0..groups.len()).collect();
    order.sort_by_key(|&g| Reverse(groups[g].tiles().div_ceil(pieces[g])));
    for g in order {
        let (tiles, n) = (groups[g].tiles(), pieces[g]);
        for i in 0..n {
            let (from, to) = (groups[g].begin + tiles * i / n, groups[g].begin + tiles * (i + 1) / n);
            if let Some(Reverse((busy, block))) = load.pop() {
                out[block].push((g, from, to));
                load.push(Reverse((busy + problem.cost(to - from, n > 1), block)));
            }
        }
    }
    out
}

/// One block after the other up to a quota, groups being cut wherever it ends.
fn fill(groups: &[Group], quota: usize, overhead: usize) -> Vec<Vec<Piece>> {
    let (mut out, mut current, mut room) = (Vec::new(), Vec::new(), quota);
    for (g, group) in groups.iter().enumerate() {
        let mut at = group.begin;
        loop {
            let left = group.end - at;
            if !current.is_empty() && room < overhead + overhead.min(left) {
                out.push(std::mem::take(&mut current));
                room = quota;
            }
            let take = left.min(room.saturating_sub(overhead).max(1));
            current.push((g, at, at + take));
            room = room.saturating_sub(take + overhead);
            at += take;
            if at >= group.end {
                break;
            }
        }
    }
    out.push(current);
    out
}

pub(super) fn plan(problem: &Problem, spans: &[SpanInfo]) -> Plan {
    let groups = groups(problem, spans);
    let blocks = problem.blocks;
    let overhead = problem.overhead();
    let total: usize = groups.iter().map(Group::tiles).sum();
    let longest = groups.iter().map(Group::tiles).max().unwrap_or(0);

    // Equal pieces waste nothing where they come out even; cutting at quotas always comes out even but cuts more.
    let mut plans = vec![];
    if groups.len() <= 4 * blocks {
        let mut chunks: Vec<usize> =
            (1..=blocks).map(|s| longest.div_ceil(s)).chain([total.div_ceil(blocks)]).collect();
        chunks.sort_unstable();
        chunks.dedup();
        for chunk in chunks {
            let pieces: Vec<_> = groups.iter().map(|g| g.tiles().div_ceil(chunk.max(1)).max(1)).collect();
            if pieces.iter().sum::<usize>() <= blocks.max(groups.len()) {
                plans.push(whole_pieces(problem, &groups, &pieces));
            }
        }
    }
    let (mut low, mut high) = (overhead + 1, total + overhead * (groups.len() + 1));
    while low < high {
        let middle = (low + high) / 2;
        if fill(&groups, middle, overhead).len() <= blocks {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    let mut even = fill(&groups, low, overhead);
    even.resize(blocks.max(even.len()), Vec::new());
    plans.push(even);
    let work = plans.iter().min_by_key(|work| problem.most(&groups, work)).expect("one at least");
    number(&groups, work)
}

/// Items in the order that blocks find them, with their slots in the workspace.
fn number(groups: &[Group], work: &[Vec<Piece>]) -> Plan {
    let counts = counts(groups, work);
    let (mut firsts, mut parts) = (Vec::with_capacity(groups.len()), 0);
    for &n in &counts {
        firsts.push(parts);
        parts += if n > 1 { n } else { 0 };
    }
    let mut used = vec![0u32; groups.len()];
    let mut items = vec![Item::default(); work.len()];
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
    Plan { items, parts: parts as usize }
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

    /// Items by walking the blocks' chains.
    fn walk(plan: &Plan, blocks: usize) -> Vec<Vec<Item>> {
        (0..blocks)
            .map(|b| {
                let mut mine = vec![];
                let mut at = b;
                while plan.items[at].rows > 0 {
                    mine.push(plan.items[at]);
                    at = plan.items[at].next as usize;
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
                        let problem = Problem { kv_heads, group, rows, tile, warps: 8, blocks: 132, causal, window };
                        let plan = plan(&problem, &spans);
                        let work = walk(&plan, 132);
                        for wanted in groups(&problem, &spans) {
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
                            assert!(found.len() == 1 || end <= plan.parts, "{name}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn long_contexts_fill_the_device_evenly() {
        let problem =
            Problem { kv_heads: 8, group: 4, rows: 8, tile: 64, warps: 8, blocks: 132, causal: true, window: None };
        for lens in [vec![(0, 131_072, 1)], vec![(0, 32_768, 1); 8], vec![(0, 8192, 1); 32]] {
            let plan = plan(&problem, &spans(&lens));
            let tiles = |items: &[Item]| items.iter().map(|i| i.tile_end - i.tile_begin).sum::<u32>();
            let loads: Vec<_> = walk(&plan, 132).iter().map(|b| tiles(b)).collect();
            let most = *loads.iter().max().unwrap() as f64;
            let mean = loads.iter().sum::<u32>() as f64 / 132.0;
            assert!(most <= 1.1 * mean, "{most} of {mean}");
        }
    }
}
