//! Prefixes in an object store: found, shared by threads, damaged, evicted.

mod support;

use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::{ObjectStore, ObjectStoreExt};
use std::sync::Arc;
use support::*;
use tqkv::cache::{Heads, LayerKind, Side, Sinks};
use tqkv::ops::{AttentionParams, Domain, RowOrder};
use tqkv::{CacheConfig, DType, Device, Error, KvCache, PrefixStore, Prompt, SequenceId};

const PAGE: usize = 8;
const WINDOW: usize = 20;

/// A full layer of each of two codecs, a windowed one, and a shared one.
fn config() -> CacheConfig {
    CacheConfig::new(4, 2, 32)
        .codec("k5v4".parse().unwrap())
        .codec_at(1, "seed4".parse().unwrap())
        .kind_at(2, LayerKind::Window(WINDOW))
        .kind_at(3, LayerKind::Shared(0))
        .page_size(PAGE)
        .capacity(512)
}

fn cache(config: CacheConfig) -> KvCache {
    KvCache::new(&Device::cpu(), config).unwrap()
}

/// Appends tokens whose vectors are a function of the token and its layer.
fn append(cache: &mut KvCache, sequence: SequenceId, tokens: &[u32]) {
    let (device, config) = (cache.device().clone(), cache.config().clone());
    run(&device, |encoder| {
        for layer in 0..config.layers() {
            if matches!(config.layer_kind(layer), LayerKind::Shared(_)) {
                continue;
            }
            let heads = config.layer_heads(layer);
            let shape = [tokens.len(), heads.kv_heads, heads.head_dim];
            let input = |side: u64| {
                let row = |&t: &u32| Rng(t as u64 * 64 + layer as u64 * 2 + side).normals(shape[1] * shape[2]);
                device.upload(&tokens.iter().flat_map(row).collect::<Vec<f32>>(), &shape).unwrap()
            };
            cache.append(encoder, layer, &[(sequence, tokens.len())], &input(0), &input(1))?;
        }
        Ok(())
    });
}

/// A sequence of these tokens, as a model makes it: the prompt in chunks.
fn prefill(cache: &mut KvCache, tokens: &[u32]) -> SequenceId {
    let sequence = cache.add_sequence();
    tokens.chunks(16).for_each(|chunk| append(cache, sequence, chunk));
    sequence
}

/// What can be decoded by layer and side, as far back as the next token sees.
fn decoded(cache: &mut KvCache, sequence: SequenceId) -> Vec<Vec<u32>> {
    let (device, len, config) = (cache.device().clone(), cache.len(sequence).unwrap(), cache.config().clone());
    let mut all = vec![];
    for layer in 0..config.layers() {
        let seen = if let LayerKind::Window(w) = config.layer_kind(layer) { w.min(len) } else { len };
        for side in [Side::Key, Side::Value] {
            let heads = config.layer_heads(layer);
            let out = device.zeros(DType::F32, &[seen, heads.kv_heads, heads.head_dim]).unwrap();
            let (domain, order) = (Domain::Rotated, RowOrder::TokenMajor);
            run(&device, |e| cache.dequantize(e, layer, side, sequence, len - seen..len, domain, order, &out));
            all.push(out.read::<f32>().unwrap().into_iter().map(f32::to_bits).collect());
        }
    }
    all
}

/// What the newest token's query sees, by layer.
fn attended(cache: &mut KvCache, sequence: SequenceId) -> Vec<Vec<f32>> {
    let device = cache.device().clone();
    let q = device.upload(&Rng(1).normals(4 * 32), &[1, 4, 32]).unwrap();
    let layer = |layer| {
        let out = device.zeros(DType::F32, &[1, 4, 32]).unwrap();
        let params = AttentionParams::for_head_dim(32);
        run(&device, |e| cache.attend(e, layer, &[(sequence, 1)], &q, &out, None, &params));
        out.read().unwrap()
    };
    (0..4).map(layer).collect()
}

fn tokens(seed: u32, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| i * 7 + seed * 1000).collect()
}

/// Puts while the window still holds everything that later prefixes need.
fn put(store: &PrefixStore, tokens: &[u32]) {
    let mut cache = cache(config());
    let sequence = cache.add_sequence();
    for (i, chunk) in tokens.chunks(PAGE).enumerate() {
        append(&mut cache, sequence, chunk);
        store.put(&cache, sequence, &tokens[..i * PAGE + chunk.len()], b"model").unwrap();
    }
}

/// The length found, after a look at the content.
fn found(store: &PrefixStore, tokens: &[u32]) -> usize {
    let mut cache = cache(config());
    let Some(found) = store.get(&mut cache, tokens, b"model").unwrap() else {
        assert_eq!(cache.usage().used, 0);
        return 0;
    };
    assert_eq!(cache.len(found.sequence), Ok(found.len));
    let fresh = prefill(&mut cache, &tokens[..found.len]);
    assert_eq!(decoded(&mut cache, found.sequence), decoded(&mut cache, fresh), "{} tokens", found.len);
    // The last token may be taken back and run again for its logits, and the rest follows.
    cache.truncate(found.sequence, found.len - 1).unwrap();
    append(&mut cache, found.sequence, &tokens[found.len - 1..]);
    append(&mut cache, fresh, &tokens[found.len..]);
    assert_eq!(decoded(&mut cache, found.sequence), decoded(&mut cache, fresh));
    found.len
}

/// The body on each kind of store.
fn stores(body: impl Fn(Arc<dyn ObjectStore>)) {
    body(Arc::new(InMemory::new()));
    let dir = tempfile::tempdir().unwrap();
    body(Arc::new(LocalFileSystem::new_with_prefix(dir.path()).unwrap()));
}

/// Everything under the store.
fn objects(store: &Arc<dyn ObjectStore>) -> Vec<object_store::path::Path> {
    use futures_util::TryStreamExt;
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let all = runtime.block_on(store.list(None).try_collect::<Vec<_>>()).unwrap();
    all.into_iter().map(|meta| meta.location).collect()
}

#[test]
fn the_longest_stored_prefix_is_found() {
    stores(|inner| {
        let store = PrefixStore::new(inner.clone(), "caches/here").unwrap();
        let long = tokens(1, 100);
        assert_eq!(found(&store, &long), 0);
        put(&store, &long[..45]);
        assert_eq!(found(&store, &long), 40);
        assert_eq!(found(&store, &long[..39]), 32);
        assert_eq!(found(&store, &long[..7]), 0);
        let mut other = long.clone();
        other[20] += 1;
        assert_eq!(found(&store, &other), 16);
        put(&store, &long);
        assert_eq!(found(&store, &long), 96);
        assert_eq!(found(&store, &[&long[..], &other].concat()), 96);

        // Putting again writes nothing.
        let mut cache = cache(config());
        let sequence = prefill(&mut cache, &long);
        let before = objects(&inner).len();
        let again = store.put(&cache, sequence, &long, b"model").unwrap();
        assert_eq!((again.len, again.written), (96, 0));
        assert_eq!(objects(&inner).len(), before);
        assert!(matches!(
            store.put(&cache, sequence, &[&long[..], &[1]].concat(), b"model"),
            Err(Error::Positions { end: 101, len: 100, .. })
        ));

        // Another model, other codecs, another page size: other names.
        let get = |config: CacheConfig, model: &[u8]| store.get(&mut self::cache(config), &long, model).unwrap();
        assert!(get(config(), b"model").is_some());
        assert!(get(config(), b"models").is_none());
        assert!(get(config().codec_at(1, "seed5".parse().unwrap()), b"model").is_none());
        assert!(get(config().kind_at(2, LayerKind::Window(WINDOW + 1)), b"model").is_none());
        assert!(get(config().page_size(16), b"model").is_none());
    });
}

#[test]
fn a_prompt_past_its_window_is_found_at_its_end() {
    let store = PrefixStore::new(Arc::new(InMemory::new()), "").unwrap();
    let long = tokens(2, 96);
    let mut cache = cache(config());
    let sequence = prefill(&mut cache, &long);
    assert_eq!(store.put(&cache, sequence, &long, b"model").unwrap().len, 96);
    assert_eq!(found(&store, &[&long[..], &[1, 2, 3]].concat()), 96);
    // The windowed layer's pages for this one were dropped before they could be stored.
    assert_eq!(found(&store, &long[..50]), 0);
}

#[test]
fn sinks_are_found_with_their_prefix() {
    for positions in [3, 8, 20] {
        let sinks = Sinks { positions, codec: "k8v8".parse().unwrap() };
        let config = || config().sinks_at(1, sinks).sinks_at(2, sinks);
        let store = PrefixStore::new(Arc::new(InMemory::new()), "").unwrap();
        let long = tokens(12, 44);
        let mut writer = cache(config());
        let sequence = writer.add_sequence();
        for (i, chunk) in long.chunks(PAGE).enumerate() {
            append(&mut writer, sequence, chunk);
            store.put(&writer, sequence, &long[..i * PAGE + chunk.len()], b"model").unwrap();
        }
        for len in [0, 8, 16, 24, 40] {
            let mut reader = cache(config());
            let found = store.get(&mut reader, &long[..len + 3], b"model").unwrap();
            assert_eq!(found.map_or(0, |f| f.len), len);
            let Some(found) = found else { continue };
            // Attention sees sinks and the rest alike.
            let fresh = prefill(&mut reader, &long[..len]);
            [found.sequence, fresh].iter().for_each(|&s| append(&mut reader, s, &long[len..len + 3]));
            assert_eq!(attended(&mut reader, found.sequence), attended(&mut reader, fresh), "{positions} sinks, {len}");
        }
        assert!(
            store.get(&mut cache(self::config()), &long, b"model").unwrap().is_none(),
            "without sinks: another name"
        );
    }
}

/// Names of prompts without salts, computed by `docs/prefix-store.md` with another implementation of BLAKE3: what is stored is
/// found by later versions too.
#[test]
fn names_are_those_of_the_document() {
    let inner: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let store = PrefixStore::new(inner.clone(), "").unwrap();
    put(&store, &tokens(13, PAGE));
    let (own, before) = (
        "087ebc65a67d66851f6aa23e9dd6b632ffe5d7cb96993946bdd5cab56648a19b",
        "cdcb73ecfd05d16c3b4bb6a558ee0d06adaf4234a77d51d5d19b21f47f23c583",
    );
    let names: Vec<String> = objects(&inner).into_iter().map(|path| path.to_string()).collect();
    assert_eq!(names, [format!("pages/{own}-{before}-0"), format!("pages/{own}-{before}-1"), format!("used/{own}")]);
}

#[test]
fn layers_that_differ_have_other_names() {
    let store = PrefixStore::new(Arc::new(InMemory::new()), "").unwrap();
    let long = tokens(15, 32);
    let mut names = vec![];
    for heads in [Heads::new(1, 64), Heads::new(2, 64), Heads::new(2, 128)] {
        let config = || config().heads_at(1, heads);
        let mut writer = cache(config());
        assert!(store.get(&mut writer, &long, b"model").unwrap().is_none(), "{heads:?}");
        let sequence = prefill(&mut writer, &long);
        names.push(store.put(&writer, sequence, &long, b"model").unwrap().written);
        let mut reader = cache(config());
        let found = store.get(&mut reader, &long, b"model").unwrap().unwrap();
        assert_eq!(found.len, 32);
        assert_eq!(decoded(&mut reader, found.sequence), decoded(&mut writer, sequence));
    }
    assert!(names.iter().all(|&written| written == names[0] && written > 0));
    assert!(store.get(&mut cache(config()), &long, b"model").unwrap().is_none());
}

#[test]
fn prompts_meet_as_far_as_their_salts_agree() {
    let store = PrefixStore::new(Arc::new(InMemory::new()), "").unwrap();
    let long = tokens(14, 40);
    let mut writer = cache(config());
    // While the window still holds what prefixes need.
    let mut put = |salted: fn(Prompt) -> Prompt| {
        let sequence = writer.add_sequence();
        for end in (PAGE..=long.len()).step_by(PAGE) {
            append(&mut writer, sequence, &long[end - PAGE..end]);
            let stored = store.put(&writer, sequence, salted(Prompt::new(&long[..end])), b"model").unwrap();
            assert_eq!(stored.len, end);
        }
        writer.free_sequence(sequence).unwrap();
    };
    let found = |prompt: Prompt| {
        let found = store.get(&mut cache(config()), prompt, b"model").unwrap();
        found.map_or(0, |found| found.len)
    };
    let prompt = || Prompt::new(&long);
    put(|prompt| prompt.salt_at(19, b"cat"));
    // Position 19 is in the third block: two are before it.
    assert_eq!(found(prompt().salt_at(19, b"cat")), 40);
    for other in [prompt().salt_at(19, b"dog"), prompt(), prompt().salt_at(18, b"cat"), prompt().salt_at(16, b"")] {
        assert_eq!(found(other), 16);
    }
    assert_eq!(found(prompt().salt_at(19, b"cat").salt_at(19, b"dog")), 16);
    assert_eq!(found(prompt().salt_at(19, b"cat").salt_at(33, b"dog")), 32);
    assert_eq!(found(prompt().salt_at(19, b"cat").salt_at(0, b"dog")), 0);
    // What lies behind the last whole block does not matter yet.
    assert_eq!(found(prompt().salt_at(19, b"cat").salt_at(40, b"dog").salt_at(usize::MAX, b"")), 40);
    // Salts of one position or more come in any order, and do not run into each other.
    put(|prompt| prompt.salt_at(20, b"ab").salt_at(19, b"c").salt_at(19, b"b"));
    assert_eq!(found(prompt().salt_at(19, b"b").salt_at(20, b"ab").salt_at(19, b"c")), 40);
    assert_eq!(found(prompt().salt_at(19, b"bc").salt_at(20, b"ab")), 16);
    assert_eq!(found(prompt().salt_at(19, b"b").salt_at(19, b"ca").salt_at(20, b"b")), 16);

    // Tenants meet nowhere, and nobody's salt reads as part of a model's name.
    put(|prompt| prompt.salt(b"tenant 1"));
    assert_eq!(found(prompt().salt(b"tenant 1")), 40);
    for other in [prompt().salt(b"tenant 2"), prompt().salt(b"tenant"), prompt().salt(b"tenant 1").salt_at(0, b"")] {
        assert_eq!(found(other), 0);
    }
    let other = store.get(&mut cache(config()), prompt().salt(b" 1"), b"modeltenant").unwrap();
    assert!(other.is_none());
    // Without salts, under which nothing was stored.
    assert_eq!(found(prompt()), 16);
    assert_eq!(store.get(&mut cache(config()), &long, b"model").unwrap().map(|f| f.len), Some(16));
}

#[test]
fn running_out_of_pages_changes_nothing() {
    let store = PrefixStore::new(Arc::new(InMemory::new()), "").unwrap();
    let long = tokens(3, 64);
    put(&store, &long);
    let mut small = cache(config().capacity(40));
    let held = prefill(&mut small, &tokens(4, 10));
    let (before, content) = (small.usage(), decoded(&mut small, held));
    assert!(matches!(store.get(&mut small, &long, b"model"), Err(Error::OutOfPages { .. })));
    assert_eq!((small.usage(), decoded(&mut small, held)), (before, content));
    assert_eq!(store.get(&mut small, &long[..24], b"model").unwrap().unwrap().len, 24);
}

#[test]
fn damaged_objects_end_the_prefix_and_are_replaced() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    stores(|inner| {
        let store = PrefixStore::new(inner.clone(), "root").unwrap();
        let long = tokens(5, 64);
        put(&store, &long);
        let mut rng = Rng(9);
        let pages: Vec<_> = objects(&inner).into_iter().filter(|p| p.as_ref().contains("pages")).collect();
        assert_eq!(pages.len(), 16);
        for (i, path) in pages.iter().enumerate() {
            let (whole, swapped) = runtime.block_on(async {
                let other = inner.get(&pages[(i + 2) % 16]).await.unwrap().bytes().await.unwrap();
                (inner.get(path).await.unwrap().bytes().await.unwrap().to_vec(), other.to_vec())
            });
            let bad = match i % 4 {
                0 => {
                    let mut bad = whole.clone();
                    bad[rng.below(whole.len())] ^= 1 << rng.below(8);
                    bad
                }
                1 => whole[..rng.below(whole.len())].to_vec(),
                2 => [&whole[..], &[0]].concat(),
                _ => swapped,
            };
            runtime.block_on(inner.put(path, bad.into())).unwrap();
            let mut reader = cache(config());
            let got = store.get(&mut reader, &long, b"model").unwrap();
            if let Some(got) = got {
                let fresh = prefill(&mut reader, &long[..got.len]);
                assert_eq!(decoded(&mut reader, got.sequence), decoded(&mut reader, fresh));
            }
            // A full layer's page was read and found out; a windowed one only where the window reaches.
            if got.is_none_or(|g| g.len < 64) {
                assert!(got.is_none_or(|g| g.damaged == 1));
                assert!(!objects(&inner).contains(path), "the damaged object is gone");
                put(&store, &long);
                assert_eq!(runtime.block_on(async { inner.get(path).await.unwrap().bytes().await.unwrap() }), whole);
            } else {
                runtime.block_on(inner.put(path, whole.into())).unwrap();
            }
            assert_eq!(found(&store, &long), 64);
        }
    });
}

#[test]
fn least_recently_used_prefixes_go_first() {
    stores(|inner| {
        let [a, b] = [tokens(6, 40), tokens(7, 40)];
        let shared: Vec<u32> = [&a[..16], &tokens(8, 24)].concat();
        let unlimited = PrefixStore::new(inner.clone(), "x").unwrap();
        let pause = || std::thread::sleep(std::time::Duration::from_millis(5));
        for prompt in [&a, &b, &shared] {
            put(&unlimited, prompt);
            pause();
        }
        let block = unlimited.bytes().unwrap() / 13;
        assert_eq!(unlimited.evict().unwrap(), 0);
        // `a` is used again, so `b` is oldest: its end goes first, then its beginning.
        assert_eq!(found(&unlimited, &a), 40);
        let limited = |blocks: u64| PrefixStore::new(inner.clone(), "x").unwrap().limit(blocks * block);
        assert_eq!(limited(12).evict().unwrap(), block);
        assert_eq!((found(&unlimited, &a), found(&unlimited, &shared)), (40, 40));
        pause();
        assert_eq!(found(&unlimited, &b), 32);
        pause();
        assert_eq!(found(&unlimited, &a), 40);
        // Now `shared` is oldest, but its beginning is also that of `a`.
        limited(9).evict().unwrap();
        assert_eq!((found(&unlimited, &shared), found(&unlimited, &b), found(&unlimited, &a)), (16, 32, 40));
        // A put keeps the limit.
        let store = limited(6);
        put(&store, &tokens(9, 16));
        assert!(store.bytes().unwrap() <= 6 * block);
        assert_eq!(found(&store, &tokens(9, 16)), 16);
        limited(0).evict().unwrap();
        assert_eq!(unlimited.bytes().unwrap(), 0);
        assert!(objects(&inner).len() <= 1, "{:?}", objects(&inner));
    });
}

#[test]
fn threads_share_a_store_that_is_too_small() {
    stores(|inner| {
        let prompts: Vec<Vec<u32>> = (0..4).map(|i| [&tokens(10, 24)[..], &tokens(20 + i, 24)].concat()).collect();
        let block = {
            let store = PrefixStore::new(inner.clone(), "y").unwrap();
            put(&store, &prompts[0]);
            store.bytes().unwrap() / 6
        };
        let hits: usize = std::thread::scope(|scope| {
            let worker = |thread: u64| {
                let (inner, prompts) = (inner.clone(), &prompts);
                move || {
                    // Each thread as a process of its own would.
                    let store = PrefixStore::new(inner, "y").unwrap().limit(10 * block);
                    let mut rng = Rng(thread);
                    let mut hits = 0;
                    for _ in 0..25 {
                        let prompt = &prompts[rng.below(prompts.len())];
                        match rng.below(2) {
                            0 => put(&store, prompt),
                            // Whatever the others remove meanwhile: what is found is right.
                            _ => hits += (found(&store, prompt) > 0) as usize,
                        }
                    }
                    hits
                }
            };
            let threads: Vec<_> = (0..4).map(|t| scope.spawn(worker(t))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).sum()
        });
        assert!(hits > 0);
    });
}

#[test]
fn calls_from_async_code_do_not_panic() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let store = PrefixStore::new(Arc::new(InMemory::new()), "z").unwrap();
        put(&store, &tokens(11, 16));
        assert_eq!(found(&store, &tokens(11, 20)), 16);
    });
    let missing = std::io::ErrorKind::InvalidInput;
    assert!(
        matches!(PrefixStore::new(Arc::new(InMemory::new()), "a//b"), Err(Error::Io { kind, .. }) if kind == missing)
    );
}

const CHILD: &str = "TQKV_TEST_STORE";

/// Not a test of its own: the process that the next test kills.
#[test]
fn child_putter() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let store = PrefixStore::new(Arc::new(LocalFileSystem::new_with_prefix(path).unwrap()), "z").unwrap();
    for i in 0.. {
        put(&store, &tokens(i, 48));
    }
}

#[test]
fn a_killed_process_leaves_whole_pages() {
    let dir = tempfile::tempdir().unwrap();
    let inner: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(dir.path()).unwrap());
    let store = PrefixStore::new(inner, "z").unwrap().limit(u64::MAX);
    let mut rng = Rng(3);
    for _ in 0..12 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["child_putter", "--exact", "--quiet"])
            .env(CHILD, dir.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let (started, before) = (std::time::Instant::now(), store.bytes().unwrap());
        while store.bytes().unwrap() == before && started.elapsed().as_secs() < 60 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(rng.below(20_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let mut lengths = vec![];
    for i in 0..100 {
        let mut cache = cache(config());
        let Some(prefix) = store.get(&mut cache, &tokens(i, 48), b"model").unwrap() else { break };
        assert_eq!(prefix.damaged, 0);
        lengths.push(found(&store, &tokens(i, 48)));
    }
    assert!(!lengths.is_empty());
    // Whoever comes next stores what is missing, and removes what is too much.
    put(&store, &tokens(0, 48));
    assert_eq!(found(&store, &tokens(0, 48)), 48);
    let half = store.bytes().unwrap() / 2;
    let inner: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(dir.path()).unwrap());
    let small = PrefixStore::new(inner, "z").unwrap().limit(half);
    small.evict().unwrap();
    assert!(small.bytes().unwrap() <= half);
}
