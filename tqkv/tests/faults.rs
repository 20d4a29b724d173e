//! What fails from outside: memory that is refused, streams that break or panic, kernels and callers that panic, locks that are
//! poisoned by them. Afterwards the cache is as it was.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use support::*;
use tqkv::cache::{LayerKind, Recent, Replay, Sinks, Usage};
use tqkv::compute::KernelSource;
use tqkv::ops::AttentionParams;
use tqkv::{Buffer, CacheConfig, DType, Device, Error, KvCache, SequenceId};

thread_local! {
    /// How many buffers this thread may still have; all if none.
    static LEFT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// The system's memory, of which buffers (zeroed integers of 16 bytes) may be refused. What else Rust asks for cannot fail: it aborts.
struct Refusing;

// SAFETY: all calls go to the system's allocator, but those that are refused.
unsafe impl GlobalAlloc for Refusing {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: what the caller promises is what the system's allocator asks for.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() == 16 {
            match LEFT.get() {
                Some(0) => return std::ptr::null_mut(),
                left => LEFT.set(left.map(|n| n - 1)),
            }
        }
        // SAFETY: what the caller promises is what the system's allocator asks for.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: what the caller promises is what the system's allocator asks for.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Refusing = Refusing;

const LAYERS: usize = 4;
const D: usize = 32;

/// A full layer, a window, sinks, and newest positions apart.
fn config() -> CacheConfig {
    let pair = |name: &str| name.parse().unwrap();
    CacheConfig::new(LAYERS, 1, D)
        .codec(pair("k4v3"))
        .kind_at(1, LayerKind::Window(10))
        .sinks_at(2, Sinks { positions: 3, codec: pair("f16") })
        .recent_at(3, Recent { positions: 6, codec: pair("k8v8") })
        .page_size(8)
        .capacity(160)
}

/// Keys, queries and room for results of so many tokens.
fn buffers(device: &Device, n: usize) -> [Buffer; 2] {
    let x = device.upload(&Rng(n as u64).normals(n * D), &[n, 1, D]).unwrap();
    [x, device.zeros(DType::F32, &[n, 1, D]).unwrap()]
}

fn step(cache: &mut KvCache, id: SequenceId, [x, out]: &[Buffer; 2]) -> Result<(), Error> {
    let mut encoder = cache.device().encoder()?;
    let mut step = cache.step(&[(id, x.shape()[0])])?;
    for layer in 0..LAYERS {
        step.append(&mut encoder, layer, x, x)?;
        step.attend(&mut encoder, layer, x, out, None, &AttentionParams::for_head_dim(D))?;
    }
    step.submit(encoder)?.wait()
}

/// A sequence of 22 and a twin of it with one more; the window has dropped what it can.
fn filled() -> (KvCache, [SequenceId; 2]) {
    let device = Device::cpu();
    let mut cache = KvCache::new(&device, config()).unwrap();
    let one = cache.add_sequence();
    step(&mut cache, one, &buffers(&device, 21)).unwrap();
    step(&mut cache, one, &buffers(&device, 1)).unwrap();
    let two = cache.fork(one).unwrap();
    step(&mut cache, two, &buffers(&device, 1)).unwrap();
    (cache, [one, two])
}

/// All that a cache holds.
fn state(cache: &KvCache, ids: [SequenceId; 2]) -> (Vec<u8>, Usage) {
    let lens = ids.map(|id| (id, cache.len(id).unwrap()));
    let mut bytes = vec![];
    cache.write_snapshot(&lens, &mut bytes, b"m").unwrap();
    (bytes, cache.usage())
}

/// An operation on a cache whose second sequence it may change.
type Operation<'a> = &'a dyn Fn(&mut KvCache, SequenceId) -> Result<(), Error>;

#[test]
fn memory_is_refused_at_every_buffer() {
    let device = Device::cpu();
    let (few, many, file) = (buffers(&device, 3), buffers(&device, 40), state(&filled().0, filled().1).0);
    let by_layer = |cache: &mut KvCache, id: SequenceId| {
        let (params, mut encoder) = (AttentionParams::for_head_dim(D), device.encoder()?);
        (0..LAYERS).try_for_each(|l| cache.attend(&mut encoder, l, &[(id, 3)], &few[0], &few[1], None, &params))?;
        encoder.submit_and_wait()
    };
    let operations: [(&str, Operation); 6] = [
        ("step", &|cache, id| step(cache, id, &many)),
        ("attend", &by_layer),
        ("append", &|cache, id| {
            let mut encoder = device.encoder()?;
            cache.append(&mut encoder, 0, &[(id, 3)], &few[0], &few[0])?;
            encoder.submit_and_wait()
        }),
        ("replay", &|cache, id| {
            let params = AttentionParams::for_head_dim(D);
            let mut replay = Replay::new(|step, encoder| {
                (0..LAYERS).try_for_each(|l| {
                    step.append(encoder, l, &many[0], &many[0])?;
                    step.attend(encoder, l, &many[0], &many[1], None, &params)
                })
            });
            replay.run(cache, &[(id, 40)])?.wait()
        }),
        ("truncate and fork", &|cache, id| {
            let twin = cache.fork(id)?;
            cache.truncate(twin, 22)?;
            cache.free_sequence(twin)
        }),
        ("load", &|cache, _| cache.read_snapshot(&file[..], b"m").map(drop)),
    ];
    let mut refused = 0;
    for (name, operation) in operations {
        for n in 0.. {
            assert!(n < 100, "{name} has no end");
            let (mut cache, ids) = filled();
            let before = state(&cache, ids);
            LEFT.set(Some(n));
            let result = operation(&mut cache, ids[1]);
            LEFT.set(None);
            if result.is_ok() {
                break;
            }
            refused += 1;
            assert!(matches!(result, Err(Error::OutOfMemory { .. })), "{name} {n}: {result:?}");
            let after = state(&cache, ids);
            assert!(after.0 == before.0, "{name} {n}: the content has changed");
            // Pages that a window leaves behind may be gone.
            assert!(after.1.used <= before.1.used, "{name} {n}");
            // It goes on as if nothing had been.
            let (mut other, others) = filled();
            operation(&mut cache, ids[1]).unwrap();
            operation(&mut other, others[1]).unwrap();
            if cache.len(ids[1]).is_ok() {
                assert!(state(&cache, ids).0 == state(&other, others).0, "{name} {n}: another result");
            }
        }
    }
    // Partial results of extents in steps, attention and replays; nothing else asks for a buffer.
    assert!(refused >= 3, "{refused}");
    for n in 0.. {
        LEFT.set(Some(n));
        let cache = KvCache::new(&device, config());
        LEFT.set(None);
        match cache {
            Ok(_) => break,
            Err(error) => assert!(matches!(error, Error::OutOfMemory { .. }), "{error}"),
        }
        assert!(n < 100);
    }
}

/// A disk that is full after so many bytes, or a writer that panics there.
struct Disk(usize, bool);

impl Write for Disk {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.0 == 0 {
            assert!(!self.1, "the writer panics");
            return Err(io::ErrorKind::StorageFull.into());
        }
        let n = data.len().min(self.0);
        self.0 -= n;
        Ok(n)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file that cannot be read past some byte, or a reader that panics there.
struct Worn<'a>(&'a [u8], bool);

impl Read for Worn<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            assert!(!self.1, "the reader panics");
            return Err(io::Error::other("worn"));
        }
        self.0.read(out)
    }
}

#[test]
fn streams_break_at_every_byte() {
    let (mut cache, ids) = filled();
    let (file, before) = state(&cache, ids);
    let lens = ids.map(|id| (id, cache.len(id).unwrap()));
    for n in 0..file.len() {
        let full = cache.write_snapshot(&lens, Disk(n, false), b"m");
        assert!(matches!(full, Err(Error::Io { kind: io::ErrorKind::StorageFull, .. })), "{n}: {full:?}");
        let worn = cache.read_snapshot(Worn(&file[..n], false), b"m");
        assert!(matches!(worn, Err(Error::Io { kind: io::ErrorKind::Other, .. })), "{n}: {worn:?}");
        assert_eq!(cache.usage(), before, "{n}");
    }
    assert!(state(&cache, ids).0 == file);
    assert_eq!(cache.read_snapshot(&file[..], b"m").map(|ids| ids.len()), Ok(2));
}

#[test]
fn streams_that_panic_leave_the_cache_as_it_was() {
    let (mut cache, ids) = filled();
    let (file, before) = state(&cache, ids);
    let lens = ids.map(|id| (id, cache.len(id).unwrap()));
    for n in [0, 1, 24, 4095, 4096, 4097, 5000, file.len() - 1] {
        let wrote = catch_unwind(AssertUnwindSafe(|| cache.write_snapshot(&lens, Disk(n, true), b"m")));
        assert!(wrote.is_err(), "{n}");
        let read = catch_unwind(AssertUnwindSafe(|| cache.read_snapshot(Worn(&file[..n], true), b"m")));
        assert!(read.is_err(), "{n}");
        assert_eq!(cache.usage(), before, "{n}");
    }
    assert!(state(&cache, ids).0 == file);
    step(&mut cache, ids[0], &buffers(&Device::cpu(), 3)).unwrap();
}

/// A file that cannot be written leaves the old one, and nothing beside it.
#[cfg(target_os = "linux")]
#[test]
fn a_folder_that_takes_no_file_keeps_the_old_one() {
    let (cache, ids) = filled();
    let missing = cache.save(&ids, "/proc/self/no/cache", b"m");
    assert!(matches!(missing, Err(Error::Io { kind: io::ErrorKind::NotFound, .. })), "{missing:?}");
    let denied = cache.save(&ids, "/proc/cache", b"m");
    assert!(matches!(denied, Err(Error::Io { .. })), "{denied:?}");
}

const FOLDER: &str = "TQKV_TEST_FULL_DISK";

/// Not a test of its own: the process that the next test runs on a disk without room. It says whether there was room.
#[cfg(target_os = "linux")]
#[test]
fn child_saver() {
    let Some(path) = std::env::var_os(FOLDER).map(std::path::PathBuf::from) else { return };
    let files = || {
        let read = |entry: io::Result<std::fs::DirEntry>| std::fs::read(entry.unwrap().path()).unwrap();
        std::fs::read_dir(path.parent().unwrap()).unwrap().map(read).collect::<Vec<_>>()
    };
    let (mut cache, ids) = filled();
    let (file, usage) = state(&cache, ids);
    let before = files();
    let saved = cache.save(&ids, &path, b"m");
    assert_eq!(cache.usage(), usage);
    if saved.is_ok() {
        assert!(files() == [file], "what was saved is not what the cache holds");
        println!("saved");
    } else {
        let full = [io::ErrorKind::StorageFull, io::ErrorKind::FileTooLarge];
        assert!(matches!(&saved, Err(Error::Io { kind, .. }) if full.contains(kind)), "{saved:?}");
        assert!(files() == before, "the old file is not what it was, or not alone");
        println!("refused");
    }
    assert!(state(&cache, ids) == (state(&filled().0, ids).0, usage));
    step(&mut cache, ids[0], &buffers(&Device::cpu(), 3)).unwrap();
}

/// A disk that is full at every block of a file: by a limit on files, and, where the system lets users mount one, by a disk of
/// so few pages. The old file stays, alone; the cache can be saved elsewhere.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_keeps_the_old_file() {
    let (file, dir) = (state(&filled().0, filled().1).0, tempfile::tempdir().unwrap());
    // Signals of the limit are ignored: `write` says that the file is too large.
    let limit = r#"trap "" XFSZ; ulimit -f "$BLOCKS"; exec "$0" "$@""#;
    let mount = r#"mount -t tmpfs -o size="$BLOCKS"k none "${TQKV_TEST_FULL_DISK%/*}" || exit 99
        echo old > "$TQKV_TEST_FULL_DISK"; exec "$0" "$@""#;
    let save = |before: &[&str], script: &str, blocks: usize| {
        std::fs::write(dir.path().join("cache"), "old\n").unwrap();
        let child = std::process::Command::new(before[0])
            .args(&before[1..])
            .args(["sh", "-c", script])
            .arg(std::env::current_exe().unwrap())
            .args(["child_saver", "--exact", "--nocapture"])
            .env(FOLDER, dir.path().join("cache"))
            .env("BLOCKS", blocks.to_string())
            .output()
            .ok()?;
        let text = String::from_utf8_lossy(&child.stdout).into_owned();
        // Without users' own mounts.
        let mounted = before.len() == 1 || text.contains("running 1 test");
        assert!(child.status.success() || !mounted, "{blocks}: {child:?}");
        assert!(!mounted || text.contains("saved") != text.contains("refused"), "{blocks}: {text}");
        mounted.then(|| text.contains("saved"))
    };
    // `ulimit` counts 512 bytes, or 1024 in some shells.
    let (few, enough) = (file.len() / 1024, file.len() / 512 + 1);
    assert!(few > 4, "{}", file.len());
    for blocks in (0..few).step_by(3) {
        assert_eq!(save(&["env"], limit, blocks), Some(false), "{blocks}");
    }
    assert_eq!(save(&["env"], limit, enough), Some(true));
    let own = ["unshare", "--user", "--map-root-user", "--mount"];
    if save(&own, mount, 1024).is_none() {
        return eprintln!("no mounts by users here: a disk that is full was not tried");
    }
    // One page for the old file.
    for blocks in (8..file.len() / 1024).step_by(4) {
        assert_eq!(save(&own, mount, blocks), Some(false), "{blocks}");
    }
    assert_eq!(save(&own, mount, 1024), Some(true));
}

#[test]
fn a_kernel_that_panics_frees_what_it_held() {
    let device = Device::cpu_with_threads(3).unwrap();
    device.kernels().register("panics", KernelSource::Cpu(Arc::new(|_, _| panic!("a caller's kernel"))));
    let mut cache = KvCache::new(&device, config()).unwrap();
    let id = cache.add_sequence();
    let some = buffers(&device, 9);
    step(&mut cache, id, &some).unwrap();
    let before = cache.usage();
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        let mut encoder = device.encoder().unwrap();
        let mut step = cache.step(&[(id, 9)]).unwrap();
        (0..LAYERS).for_each(|layer| step.append(&mut encoder, layer, &some[0], &some[0]).unwrap());
        encoder.dispatch("panics", [1, 1, 1], &[&some[1]], &[]).unwrap();
        step.submit(encoder).map(drop)
    }));
    assert!(panicked.is_err());
    assert_eq!((cache.len(id), cache.usage().used <= before.used), (Ok(9), true));
    // Neither buffers nor threads are left in use.
    some[1].write(&vec![1f32; 9 * D]).unwrap();
    step(&mut cache, id, &some).unwrap();
    assert_eq!(cache.len(id), Ok(18));
}

#[test]
fn a_replay_whose_recording_panics_is_recorded_anew() {
    let (mut cache, ids) = filled();
    let (file, before) = state(&cache, ids);
    let some = buffers(&Device::cpu(), 1);
    let bad = Cell::new(true);
    let mut replay = Replay::new(|step, encoder| {
        step.append(encoder, 0, &some[0], &some[0])?;
        assert!(!bad.get(), "a caller's recording");
        (1..LAYERS).try_for_each(|layer| step.append(encoder, layer, &some[0], &some[0]))
    });
    let panicked = catch_unwind(AssertUnwindSafe(|| replay.run(&mut cache, &[(ids[0], 1)]).map(drop)));
    assert!(panicked.is_err());
    let after = state(&cache, ids);
    assert!(after.0 == file && after.1.used <= before.used);
    bad.set(false);
    replay.run(&mut cache, &[(ids[0], 1)]).unwrap().wait().unwrap();
    assert_eq!(cache.len(ids[0]), Ok(23));
}

/// A caller's lock is poisoned; what it guards is as it was.
#[test]
fn a_thread_that_panics_in_a_step_leaves_its_cache_to_others() {
    let (cache, ids) = filled();
    let (file, before) = state(&cache, ids);
    let shared = Arc::new(Mutex::new(cache));
    let other = shared.clone();
    let panicked = std::thread::spawn(move || {
        let mut cache = other.lock().unwrap();
        let some = buffers(&Device::cpu(), 40);
        let mut encoder = cache.device().encoder().unwrap();
        let mut step = cache.step(&[(ids[0], 40)]).unwrap();
        step.append(&mut encoder, 0, &some[0], &some[0]).unwrap();
        encoder.submit_and_wait().unwrap();
        panic!("a caller's thread");
    });
    assert!(panicked.join().is_err());
    assert!(shared.is_poisoned());
    let mut cache = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let after = state(&cache, ids);
    assert!(after.0 == file && after.1.used <= before.used);
    step(&mut cache, ids[0], &buffers(&Device::cpu(), 40)).unwrap();
    assert_eq!(cache.len(ids[0]), Ok(62));
}
