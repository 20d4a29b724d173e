//! What an operation of the host does to pages does not grow with what the cache holds besides.

use crate::{CacheConfig, DType, Device, KvCache, SequenceId};

const PAGE: usize = 64;

/// One small layer with room for so many positions.
fn cache(positions: usize) -> KvCache {
    let config = CacheConfig::new(1, 1, 16).codec("k2v2".parse().unwrap()).page_size(PAGE).capacity(positions);
    KvCache::new(&Device::cpu(), config).unwrap()
}

/// New positions that count, though nothing is written: what pages hold does not matter here.
fn append(cache: &mut KvCache, tokens: &[(SequenceId, usize)]) {
    let n: usize = tokens.iter().map(|t| t.1).sum();
    let device = cache.device().clone();
    let (x, mut encoder) = (device.zeros(DType::F32, &[n, 1, 16]).unwrap(), device.encoder().unwrap());
    let mut step = cache.step(tokens).unwrap();
    step.append(&mut encoder, 0, &x, &x).unwrap();
    step.commit().unwrap();
}

/// What `run` does to pages.
fn work<T>(cache: &mut KvCache, run: impl FnOnce(&mut KvCache) -> T) -> (usize, T) {
    let before = cache.groups[0].pages.work;
    let result = run(cache);
    (cache.groups[0].pages.work - before, result)
}

/// A token, a twin of a page that is not full, a cut, a look: the same at any length.
#[test]
fn a_million_positions() {
    let mut cache = cache((1 << 20) + 10 * PAGE);
    let long = cache.add_sequence();
    let mut all = vec![];
    for len in [1000, 100_000, 1 << 20] {
        let held = cache.len(long).unwrap();
        append(&mut cache, &[(long, len - held)]);
        let token = work(&mut cache, |c| append(c, &[(long, 1)])).0;
        let (fork, twin) = work(&mut cache, |c| c.fork(long).unwrap());
        // The twin's last page gets a copy; nothing else is touched.
        let written = work(&mut cache, |c| append(c, &[(twin, 1)])).0;
        let cut = work(&mut cache, |c| c.truncate(twin, len - 1)).0;
        let look = work(&mut cache, |c| (c.usage(), c.len(twin), c.free_pages())).0;
        let free = work(&mut cache, |c| c.free_sequence(twin)).0;
        let pages = (len + 1).div_ceil(PAGE);
        assert!(fork <= pages + 2 && free <= pages + 2, "{fork} to fork, {free} to free of {pages} pages");
        all.push([token, written, cut, look]);
    }
    assert!(all.iter().flatten().all(|&n| n <= 6), "{all:?}");
    assert!(all.iter().all(|work| work[3] == 0), "{all:?}");
}

#[test]
fn many_sequences() {
    let mut cache = cache(2 * 4096 * PAGE);
    let ids: Vec<_> = (0..4096).map(|_| cache.add_sequence()).collect();
    let all: Vec<_> = ids.iter().map(|&id| (id, 3)).collect();
    let first = work(&mut cache, |c| append(c, &all[..1])).0;
    append(&mut cache, &all[1..]);
    let last = work(&mut cache, |c| append(c, &all[4095..])).0;
    assert!(first <= 6 && last <= 6, "{first}, {last}");
    let step = work(&mut cache, |c| append(c, &all)).0;
    assert!(step <= 6 * all.len(), "{step}");
    ids.into_iter().for_each(|id| cache.free_sequence(id).unwrap());
    assert_eq!(cache.usage().used, 0);
}

#[test]
fn a_hundred_thousand_forks_of_a_prefix() {
    let mut cache = cache(100 * PAGE);
    let prefix = cache.add_sequence();
    append(&mut cache, &[(prefix, 3 * PAGE + 5)]);
    let mut twins = vec![];
    let mut most = 0;
    for _ in 0..100_000 {
        let (work, twin) = work(&mut cache, |c| c.fork(prefix).unwrap());
        most = most.max(work);
        twins.push(twin);
    }
    assert!(most <= 6, "{most}");
    assert_eq!(cache.usage().used, cache.bytes() / 100 * 4);
    let written = work(&mut cache, |c| append(c, &[(twins[77], 1)])).0;
    assert!(written <= 6, "{written}");
    for twin in twins {
        most = most.max(work(&mut cache, |c| c.free_sequence(twin).unwrap()).0);
    }
    assert!(most <= 6, "{most}");
    assert_eq!(cache.usage().used, cache.bytes() / 100 * 4);
}

#[test]
fn pages_freed_at_random() {
    let mut cache = cache(10_000 * PAGE);
    let mut ids: Vec<_> = (0..10_000).map(|_| cache.add_sequence()).collect();
    let all: Vec<_> = ids.iter().map(|&id| (id, PAGE)).collect();
    append(&mut cache, &all);
    assert_eq!(cache.free_pages(), 0);
    let mut state = 5u64;
    let mut most = 0;
    while !ids.is_empty() {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let id = ids.swap_remove((state >> 33) as usize % ids.len());
        most = most.max(work(&mut cache, |c| c.free_sequence(id).unwrap()).0);
    }
    assert!(most <= 2, "{most}");
    // One sequence takes them all, in whatever order they are.
    let long = cache.add_sequence();
    append(&mut cache, &[(long, 10_000 * PAGE)]);
    assert_eq!((cache.free_pages(), cache.usage().fragmentation), (0, 0.0));
}
