//! Snapshots: round trips, damage of every kind, writers that are killed.

mod damage;
#[path = "../support/mod.rs"]
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use support::*;
use tqkv::cache::{Heads, Label, LayerKind, SNAPSHOT_VERSION, Side, Sinks};
use tqkv::ops::{Domain, RowOrder};
use tqkv::{CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache, SequenceId, Snapshot, SnapshotPart};

/// The system's memory, and the largest piece that was ever asked for.
struct Watched;
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls go to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: what the caller promises is what the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: what the caller promises is what the system's allocator asks for.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        // SAFETY: what the caller promises is what the system's allocator asks for.
        unsafe { System.realloc(ptr, layout, size) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: what the caller promises is what the system's allocator asks for.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watched = Watched;

const MODEL: &[u8] = b"a model";

/// What every snapshot here says.
const LABEL: Label = Label { model: MODEL, note: b"tokens" };

/// Every kind of codec and layer, one with heads of its own; sinks that fill a page and more, and less than one.
fn config() -> CacheConfig {
    CacheConfig::new(6, 2, 32)
        .codec("k5v4".parse().unwrap())
        .codec_at(1, CodecPair { key: Codec::F16, value: Codec::F32 })
        .codec_at(2, CodecPair { key: Codec::seed(4), value: Codec::seed(5) })
        .heads_at(2, Heads::new(3, 64))
        .kind_at(3, LayerKind::Window(12))
        .kind_at(4, LayerKind::Shared(1))
        .kind_at(5, LayerKind::Window(12))
        .sinks_at(2, Sinks { positions: 11, codec: CodecPair::both(Codec::F16) })
        .sinks_at(5, Sinks { positions: 3, codec: "k8v8".parse().unwrap() })
        .page_size(8)
        .capacity(400)
}

/// One layer and one short page.
fn tiny() -> CacheConfig {
    CacheConfig::new(1, 1, 16).codec("k3v2".parse().unwrap()).page_size(8).capacity(32)
}

/// Appends tokens that are a function of the seed and their position in the call.
fn append(cache: &mut KvCache, sequence: SequenceId, n: usize, seed: u64) {
    let (device, config) = (cache.device().clone(), cache.config().clone());
    let mut encoder = device.encoder().unwrap();
    for layer in (0..config.layers()).filter(|&l| !matches!(config.layer_kind(l), LayerKind::Shared(_))) {
        let heads = config.layer_heads(layer);
        let shape = [n, heads.kv_heads, heads.head_dim];
        let input = |side: u64| {
            let mut rng = Rng(seed * 1000 + layer as u64 * 2 + side);
            device.upload(&rng.normals(shape.iter().product()), &shape).unwrap()
        };
        let (k, v) = (input(0), input(1));
        cache.append(&mut encoder, layer, &[(sequence, n)], &k, &v).unwrap();
    }
    encoder.submit_and_wait().unwrap();
}

/// A cache with one sequence, appended in steps.
fn filled(device: &Device, config: CacheConfig, steps: &[usize]) -> (KvCache, SequenceId) {
    let mut cache = KvCache::new(device, config).unwrap();
    let sequence = cache.add_sequence();
    for (i, &n) in steps.iter().enumerate() {
        append(&mut cache, sequence, n, i as u64 + 1);
    }
    (cache, sequence)
}

/// A snapshot in memory.
fn bytes(cache: &KvCache, sequences: &[SequenceId]) -> Vec<u8> {
    let prefixes: Vec<_> = sequences.iter().map(|&s| (s, cache.len(s).unwrap())).collect();
    let mut out = vec![];
    cache.write_snapshot(&prefixes, &mut out, LABEL).unwrap();
    out
}

/// Whatever of a sequence can be decoded, to the bit, by layer and side; `from` where the oldest positions are left out.
fn decoded(cache: &mut KvCache, sequence: SequenceId) -> Vec<Vec<u32>> {
    let (device, len, config) = (cache.device().clone(), cache.len(sequence).unwrap(), cache.config().clone());
    let mut all = vec![];
    for layer in 0..config.layers() {
        let seen = if let LayerKind::Window(w) = config.layer_kind(layer) { w - 1 } else { len }.min(len);
        let sinks = config.layer_sinks(layer).map_or(0, |s| s.positions).min(len);
        for range in [0..sinks, sinks.max(len - seen)..len] {
            for side in [Side::Key, Side::Value] {
                let heads = config.layer_heads(layer);
                let out = device.zeros(DType::F32, &[range.len(), heads.kv_heads, heads.head_dim]).unwrap();
                let (domain, order) = (Domain::Rotated, RowOrder::TokenMajor);
                run(&device, |e| cache.dequantize(e, layer, side, sequence, range.clone(), domain, order, &out));
                all.push(out.read::<f32>().unwrap().into_iter().map(f32::to_bits).collect());
            }
        }
    }
    all
}

/// A cache whose free pages are in no order, with one sequence in it.
fn used(device: &Device, config: CacheConfig) -> KvCache {
    let mut cache = KvCache::new(device, config).unwrap();
    let ids: Vec<_> = (0..4).map(|_| cache.add_sequence()).collect();
    for step in 0..6 {
        ids.iter().for_each(|&id| append(&mut cache, id, 5, 100 + step));
    }
    for i in [2, 0, 3] {
        cache.free_sequence(ids[i]).unwrap();
    }
    cache
}

#[test]
fn sequences_come_back_to_the_bit() {
    round_trips(&Device::cpu(), &Device::cpu());
}

#[test]
fn snapshots_cross_between_the_cpu_and_wgpu() {
    on("wgpu", |wgpu| {
        round_trips(&Device::cpu(), wgpu);
        round_trips(wgpu, &Device::cpu());
    });
}

#[test]
fn snapshots_cross_between_the_cpu_and_cuda() {
    on("cuda", |cuda| {
        round_trips(&Device::cpu(), cuda);
        round_trips(cuda, &Device::cpu());
    });
}

fn round_trips(writer: &Device, reader: &Device) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    for steps in [&[][..], &[3], &[8], &[20, 20, 1], &[1; 30]] {
        let (mut cache, sequence) = filled(writer, config(), steps);
        cache.save(&[sequence], &path, LABEL).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes(&cache, &[sequence]));
        let mut other = used(reader, config());
        let copy = other.load(&path, MODEL).unwrap()[0];
        assert_eq!(bytes(&other, &[copy]), bytes(&cache, &[sequence]), "{steps:?}");
        assert_eq!(decoded(&mut other, copy), decoded(&mut cache, sequence), "{steps:?}");
        // Both go on alike; what a GPU's encoder may round otherwise is another test's matter.
        append(&mut other, copy, 13, 7);
        append(&mut cache, sequence, 13, 7);
        if reader == writer {
            assert_eq!(bytes(&other, &[copy]), bytes(&cache, &[sequence]), "{steps:?}");
        }
        let snapshot = Snapshot::verify(&path).unwrap();
        let len = steps.iter().sum::<usize>();
        assert_eq!(snapshot.lens().collect::<Vec<_>>(), [len]);
        assert_eq!((snapshot.fingerprint(), snapshot.note()), (LABEL.model, LABEL.note));
        assert_eq!(snapshot.bytes(), std::fs::metadata(&path).unwrap().len());
        assert!(snapshot.pages().all(|(start, bytes)| start % 64 == 0 && bytes % 64 == 0));
        assert_eq!(snapshot.first(0, 4), Some(0));
        assert!(snapshot.first(0, 3).unwrap() <= (len + 1).saturating_sub(12));
        assert_eq!((snapshot.first(1, 0), snapshot.first(0, 6)), (None, None));
    }
}

#[test]
fn a_prefix_is_what_truncation_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let (mut cache, sequence) = filled(&Device::cpu(), config(), &[20, 5]);
    for len in [25, 24, 21, 20, 19] {
        cache.save_prefix(sequence, len, &path, LABEL).unwrap();
        let twin = cache.fork(sequence).unwrap();
        cache.truncate(twin, len).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), bytes(&cache, &[twin]));
        let copy = cache.load(&path, MODEL).unwrap()[0];
        assert_eq!(decoded(&mut cache, copy), decoded(&mut cache, twin));
        cache.free_sequence(twin).unwrap();
        cache.free_sequence(copy).unwrap();
    }
    let before = std::fs::read(&path).unwrap();
    for len in [26, 17, usize::MAX] {
        let error = cache.save_prefix(sequence, len, &path, LABEL);
        assert!(matches!(error, Err(Error::Positions { .. })), "{error:?}");
    }
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
}

#[test]
fn forks_are_stored_once_and_stay_shared() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let (mut cache, a) = filled(&Device::cpu(), config(), &[44]);
    let alone = bytes(&cache, &[a]).len();
    let (b, c) = (cache.fork(a).unwrap(), cache.fork(a).unwrap());
    cache.truncate(b, 41).unwrap();
    append(&mut cache, c, 9, 50);
    let all = cache.save_all(&path, LABEL).unwrap();
    assert_eq!(all, [a, b, c]);
    assert!((std::fs::metadata(&path).unwrap().len() as usize) < alone * 2);
    let mut other = used(&Device::cpu(), config());
    let before = other.usage().used;
    let copies = other.load(&path, MODEL).unwrap();
    assert_eq!(other.usage().used - before, cache.usage().used);
    for (&own, &copy) in all.iter().zip(&copies) {
        assert_eq!(decoded(&mut other, copy), decoded(&mut cache, own));
        assert_eq!(bytes(&other, &[copy]), bytes(&cache, &[own]));
    }
    // Whoever writes to a shared page gets its own: the others keep theirs.
    let kept = decoded(&mut other, copies[0]);
    append(&mut other, copies[1], 10, 60);
    assert_eq!(decoded(&mut other, copies[0]), kept);
    for copy in copies {
        other.free_sequence(copy).unwrap();
    }
    assert_eq!(other.usage().used, before);
    let twice = Err(Error::RepeatedSequence { got: 0 });
    assert_eq!(cache.save(&[a, b, a], &path, LABEL), twice);
}

#[test]
fn streams_are_read_to_the_end_of_the_snapshot_only() {
    let (cache, sequence) = filled(&Device::cpu(), config(), &[30]);
    let one = bytes(&cache, &[sequence]);
    let two = [&one[..], &one, b"rest"].concat();
    let mut other = KvCache::new(&Device::cpu(), config()).unwrap();
    let mut stream = &two[..];
    for _ in 0..2 {
        let copy = other.read_snapshot(stream.by_ref(), MODEL).unwrap();
        assert_eq!(bytes(&other, &copy), one);
    }
    assert_eq!(stream, b"rest");
}

#[test]
fn other_models_shapes_and_versions_are_named() {
    let (cache, sequence) = filled(&Device::cpu(), config(), &[30]);
    let saved = bytes(&cache, &[sequence]);
    let into = |config: CacheConfig| {
        let mut other = KvCache::new(&Device::cpu(), config).unwrap();
        let error = other.read_snapshot(&saved[..], MODEL).unwrap_err();
        assert_eq!(other.usage().used, 0);
        error
    };
    let mut other = KvCache::new(&Device::cpu(), config()).unwrap();
    let (got, expected) = ("\"a model\"".to_owned(), "ff00".to_owned());
    assert_eq!(other.read_snapshot(&saved[..], &[255, 0]), Err(Error::Fingerprint { got, expected }));
    let wide = CacheConfig::new(6, 2, 48).page_size(8);
    let heads = CacheConfig::new(6, 1, 32).page_size(8);
    let layers = CacheConfig::new(5, 2, 32).page_size(8);
    let codec = config().codec_at(2, CodecPair::both(Codec::seed(4)));
    let sinks = |positions| config().sinks_at(5, Sinks { positions, codec: "k8v8".parse().unwrap() });
    let held = "3 positions, keys in tq8 with scale_factor_d512 1, values in tq8 with scale_factor_d512 1";
    let cases = [
        (layers, "layers", "6", "5"),
        (heads, "kv_heads of layer 0", "2", "1"),
        (wide, "head_dim of the keys of layer 0", "32", "48"),
        (config().heads_at(2, Heads::new(2, 64)), "kv_heads of layer 2", "3", "2"),
        (config().heads_at(2, Heads::new(3, 128)), "head_dim of the keys of layer 2", "64", "128"),
        (config().page_size(16), "page_size", "8", "16"),
        (codec, "value codec of layer 2", "seed5 with scale_factor_d512 1", "seed4 with scale_factor_d512 1"),
        (config().kind_at(5, LayerKind::Window(13)), "kind of layer 5", "Window(12)", "Window(13)"),
        (sinks(4), "sinks of layer 5", held, &held.replace('3', "4")),
        (sinks(0), "sinks of layer 5", held, "none"),
    ];
    for (config, what, got, expected) in cases {
        let (what, got, expected) = (what.to_owned(), got.to_owned(), expected.to_owned());
        assert_eq!(into(config), Error::Geometry { what, got, expected });
    }
    assert_eq!(into(config().capacity(24)), Error::OutOfPages { needed: 4, free: 3, pages: 3 });
    let mut version = saved.clone();
    version[8] = 9;
    let error = Error::Version { what: "snapshot version", got: 9, expected: SNAPSHOT_VERSION };
    assert_eq!(other.read_snapshot(&version[..], MODEL), Err(error));
    version[8] = saved[8];
    version[12] = 7;
    assert!(matches!(other.read_snapshot(&version[..], MODEL), Err(Error::Version { got: 7, .. })));
    let png = Err(Error::NotASnapshot { got: b"\x89PNG\r\n\x1a\n".to_vec() });
    assert_eq!(other.read_snapshot(&b"\x89PNG\r\n\x1a\n0000"[..], MODEL), png);
    let long = cache.write_snapshot(&[(sequence, 30)], vec![], &[0; 4097]);
    let what = "bytes of the fingerprint";
    assert_eq!(long, Err(Error::Absurd { what, got: 4097, expected: "at most 4096".to_owned() }));
    let missing = other.load("no/such/file", MODEL);
    assert!(
        matches!(missing, Err(Error::Io { kind: std::io::ErrorKind::NotFound, ref path, .. }) if path == "no/such/file")
    );
    let nowhere = cache.save(&[sequence], "no/such/file", LABEL);
    assert!(matches!(nowhere, Err(Error::Io { kind: std::io::ErrorKind::NotFound, .. })));
}

/// A full cache takes a file in place of a sequence, whose pages count as free, or leaves everything as it was.
#[test]
fn a_sequence_is_replaced_by_a_file_or_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    // 5 pages: never two sequences of this length at once.
    let config = || config().capacity(40).sink_sequences(1);
    let (mut saved_cache, saved) = filled(&Device::cpu(), config(), &[14, 19]);
    saved_cache.save(&[saved], &path, LABEL).unwrap();
    let good = std::fs::read(&path).unwrap();
    let want = decoded(&mut saved_cache, saved);

    let (mut cache, sequence) = filled(&Device::cpu(), config(), &[20, 10]);
    let before = (cache.usage(), decoded(&mut cache, sequence));
    let empty = cache.add_sequence();
    let expect_kept = |cache: &mut KvCache, result: Result<(), Error>, right: fn(&Error) -> bool| {
        assert!(result.as_ref().is_err_and(right), "{result:?}");
        assert_eq!((cache.usage(), decoded(cache, sequence)), before);
    };
    // Beside it there is no room, and an empty sequence has none to give up.
    let full = cache.load(&path, MODEL);
    expect_kept(&mut cache, full.map(drop), |e| matches!(e, Error::OutOfPages { needed: 5, free: 1, .. }));
    let full = cache.load_into(empty, &path, MODEL);
    expect_kept(&mut cache, full, |e| matches!(e, Error::OutOfPages { needed: 5, free: 1, .. }));
    // Files that are wrong from their first byte to their last.
    let other = cache.load_into(sequence, &path, b"other");
    expect_kept(&mut cache, other, |e| matches!(e, Error::Fingerprint { .. }));
    for at in (0..good.len()).step_by(211).chain([good.len() - 1]) {
        let mut bad = good.clone();
        bad[at] ^= 16;
        std::fs::write(&path, &bad).unwrap();
        let damaged = cache.load_into(sequence, &path, MODEL);
        expect_kept(&mut cache, damaged, |e| !matches!(e, Error::OutOfPages { .. } | Error::Io { .. }));
        std::fs::write(&path, &good[..at]).unwrap();
        let short = cache.load_into(sequence, &path, MODEL);
        expect_kept(&mut cache, short, |e| matches!(e, Error::Truncated { .. }));
    }
    let fork = saved_cache.fork(saved).unwrap();
    for sequences in [&[][..], &[saved, fork]] {
        saved_cache.save(sequences, &path, LABEL).unwrap();
        let count = cache.load_into(sequence, &path, MODEL);
        expect_kept(&mut cache, count, |e| matches!(e, Error::Mismatch { what: "sequences of the snapshot", .. }));
    }
    saved_cache.free_sequence(fork).unwrap();
    std::fs::write(&path, &good).unwrap();
    // Pages that a fork shares are not its own to give up.
    let twin = cache.fork(sequence).unwrap();
    let shared = cache.load_into(sequence, &path, MODEL);
    expect_kept(&mut cache, shared, |e| matches!(e, Error::OutOfPages { needed: 5, free: 1, .. }));
    cache.free_sequence(twin).unwrap();

    for _ in 0..2 {
        cache.load_into(sequence, &path, MODEL).unwrap();
        assert_eq!((cache.len(sequence), decoded(&mut cache, sequence)), (Ok(33), want.clone()));
        assert_eq!(cache.usage(), saved_cache.usage());
        assert_eq!(bytes(&cache, &[sequence]), good);
    }
    assert_eq!(cache.load_into(twin, &path, MODEL), Err(Error::UnknownSequence { got: 2 }));
    append(&mut cache, sequence, 2, 9);
    append(&mut saved_cache, saved, 2, 9);
    assert_eq!(decoded(&mut cache, sequence), decoded(&mut saved_cache, saved));
    cache.free_sequence(sequence).unwrap();
    assert_eq!(cache.usage().used, 0);
}

/// Where there is room for both, forks keep what the sequence held.
#[test]
fn a_replaced_sequence_leaves_its_forks_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let (mut cache, sequence) = filled(&Device::cpu(), config(), &[30]);
    cache.save(&[sequence], &path, LABEL).unwrap();
    append(&mut cache, sequence, 11, 8);
    let (twin, longer) = (cache.fork(sequence).unwrap(), decoded(&mut cache, sequence));
    cache.load_into(sequence, &path, MODEL).unwrap();
    assert_eq!((cache.len(sequence), cache.len(twin)), (Ok(30), Ok(41)));
    assert_eq!(bytes(&cache, &[sequence]), std::fs::read(&path).unwrap());
    assert_eq!(decoded(&mut cache, twin), longer);
}

const CHILD: &str = "TQKV_SNAPSHOT_CHILD";

/// About 3 MiB a snapshot.
fn large(tokens: usize) -> (KvCache, SequenceId) {
    filled(&Device::cpu(), CacheConfig::new(4, 4, 64).codec(CodecPair::both(Codec::F16)).capacity(1024), &[tokens])
}

/// Not a test of its own: the process that the next test kills. It writes one of two snapshots after the other.
#[test]
fn child_writer() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let caches = [large(700), large(900)];
    for (cache, sequence) in caches.iter().cycle() {
        cache.save(&[*sequence], &path, LABEL).unwrap();
    }
}

#[test]
fn a_killed_writer_leaves_the_old_file_or_the_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let whole: Vec<Vec<u8>> = [large(700), large(900)].iter().map(|(cache, s)| bytes(cache, &[*s])).collect();
    let mut rng = Rng(std::process::id() as u64);
    let mut seen = [0; 3];
    for round in 0..50 {
        if round % 10 == 0 {
            let _ = std::fs::remove_file(&path);
        }
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["child_writer", "--exact", "--quiet"])
            .env(CHILD, &path)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        // From its first write on, at a random moment of the next few.
        let started = std::time::Instant::now();
        let busy = |dir: &Path| std::fs::read_dir(dir).unwrap().any(|f| f.unwrap().path().extension().is_some());
        while !busy(dir.path()) && started.elapsed().as_secs() < 60 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        std::thread::sleep(std::time::Duration::from_micros(rng.below(30_000) as u64));
        child.kill().unwrap();
        child.wait().unwrap();
        match std::fs::read(&path) {
            Ok(found) => {
                let which = whole.iter().position(|w| *w == found).expect("a file that is neither snapshot");
                seen[which] += 1;
                Snapshot::verify(&path).unwrap();
                let (mut cache, _) = large(0);
                let copy = cache.load(&path, MODEL).unwrap();
                assert_eq!(cache.len(copy[0]), Ok([700, 900][which]));
            }
            Err(_) => seen[2] += 1,
        }
        for file in std::fs::read_dir(dir.path()).unwrap() {
            let file = file.unwrap().path();
            if file.extension().is_some() {
                // What the writer left is no snapshot under the name that was asked for, and mostly none at all.
                std::fs::remove_file(file).unwrap();
            }
        }
    }
    println!("first snapshot {}, second {}, none {}", seen[0], seen[1], seen[2]);
    assert!(seen[0] + seen[1] > 0);
}
