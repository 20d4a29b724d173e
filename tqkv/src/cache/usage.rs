//! How full a cache is. Counts are kept by the groups of pages; nothing is walked through.

use super::state::KvCache;

/// How full a cache is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// Bytes of all pages.
    pub capacity: usize,
    /// Bytes of the pages that sequences hold, each page counted once however many share it.
    pub used: usize,
    /// Bytes of the pages that nobody holds.
    pub free: usize,
    /// The share of the used pages' positions that no sequence holds (ends of last pages); 0 when nothing is used.
    pub fragmentation: f64,
}

impl KvCache {
    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.groups.iter().map(|group| group.page_bytes * group.pages.total()).sum()
    }

    /// How full it is.
    pub fn usage(&self) -> Usage {
        let (mut free, mut positions, mut gaps) = (0, 0, 0);
        for group in &self.groups {
            free += group.page_bytes * group.pages.free();
            positions += (group.pages.total() - group.pages.free()) * group.page_size;
            gaps += group.pages.gaps();
        }
        let capacity = self.bytes();
        let fragmentation = if positions == 0 { 0.0 } else { gaps as f64 / positions as f64 };
        Usage { capacity, used: capacity - free, free, fragmentation }
    }

    /// Pages that no sequence holds, in the kind of layers that has fewest.
    pub fn free_pages(&self) -> usize {
        self.groups.iter().map(|g| g.pages.free()).min().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use crate::cache::{CacheConfig, KvCache, LayerKind, SequenceId, Sinks};
    use crate::{DType, Device};
    use std::collections::BTreeMap;

    /// Positions that no sequence fills, found by looking at every page of every sequence.
    fn gaps(cache: &KvCache) -> Vec<usize> {
        let of_group = |(g, group): (usize, &super::super::state::Group)| {
            let mut filled = BTreeMap::new();
            for sequence in cache.sequences.values() {
                let len = group.extent.end(group.layers.iter().map(|&l| sequence.lens[l]).max().unwrap());
                let held = &sequence.held[g];
                for (i, &page) in held.pages.iter().enumerate() {
                    let start = (held.first / group.page_size + i) * group.page_size;
                    let most = filled.entry(page).or_insert(0);
                    *most = (*most).max((len - start).min(group.page_size));
                }
            }
            filled.values().map(|n| group.page_size - n).sum()
        };
        cache.groups.iter().enumerate().map(of_group).collect()
    }

    #[test]
    fn counts_are_those_of_a_walk() {
        let device = Device::cpu();
        let sinks = Sinks { positions: 11, codec: "k8v8".parse().unwrap() };
        let config = CacheConfig::new(4, 1, 16).page_size(8).capacity(400).sinks_at(0, sinks);
        let config = config.kind_at(1, LayerKind::Window(9)).kind_at(2, LayerKind::Window(1));
        let mut cache = KvCache::new(&device, config).unwrap();
        let x = device.zeros(DType::F32, &[20, 1, 16]).unwrap();
        let mut ids: Vec<SequenceId> = vec![cache.add_sequence()];
        let mut state = 7u64;
        let mut below = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for _ in 0..3000 {
            let id = ids[below(ids.len())];
            match below(6) {
                0 if ids.len() < 9 => ids.push(cache.fork(id).unwrap()),
                1 if ids.len() > 1 => {
                    ids.retain(|&other| other != id);
                    cache.free_sequence(id).unwrap();
                }
                2 => {
                    let len = cache.len(id).unwrap();
                    // What a window has dropped may stand in the way.
                    let _ = cache.truncate(id, [len - below(len + 1).min(12), 0][below(2)]);
                }
                _ => {
                    let n = below(20);
                    let Ok(mut step) = cache.step(&[(id, n)]) else { continue };
                    let (mut encoder, x) = (device.encoder().unwrap(), x.slice(0..n).unwrap());
                    let layers = [4, 2][below(8) / 7];
                    (0..layers).for_each(|layer| step.append(&mut encoder, layer, &x, &x).unwrap());
                    if layers == 4 {
                        step.submit(encoder).unwrap().wait().unwrap();
                    }
                }
            }
            let counted: Vec<usize> = cache.groups.iter().map(|group| group.pages.gaps()).collect();
            assert_eq!(counted, gaps(&cache));
        }
        ids.into_iter().for_each(|id| cache.free_sequence(id).unwrap());
        assert!(cache.groups.iter().all(|group| group.pages.gaps() == 0 && group.pages.free() == group.pages.total()));
    }
}
