//! Snapshots, from streams and files: refused with the cache as it was, or loaded and as good as any sequence.

use tqkv::cache::{LayerKind, Recent, Sinks};
use tqkv::ops::AttentionParams;
use tqkv::{CacheConfig, DType, Device, Error, KvCache, SequenceId, Snapshot};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

const MODEL: &[u8] = b"m";
const LAYERS: usize = 5;
/// Nothing larger is made of what a header says.
const LARGEST: u64 = 1 << 17;

fn config() -> CacheConfig {
    let pair = |name: &str| name.parse().expect("a pair of codecs");
    CacheConfig::new(LAYERS, 1, 16)
        .codec(pair("k4v3"))
        .kind_at(1, LayerKind::Window(9))
        .sinks_at(2, Sinks { positions: 3, codec: pair("f16") })
        .recent_at(3, Recent { positions: 4, codec: pair("k8v8") })
        .kind_at(4, LayerKind::Shared(1))
        .page_size(8)
        .capacity(96)
}

/// A cache with a sequence, and that sequence.
fn filled(device: &Device) -> (KvCache, SequenceId) {
    let mut cache = KvCache::new(device, config()).expect("a small cache");
    let sequence = cache.add_sequence();
    append(&mut cache, sequence, 20).expect("room for a few tokens");
    (cache, sequence)
}

/// A step of new tokens through all layers.
fn append(cache: &mut KvCache, sequence: SequenceId, tokens: usize) -> Result<(), Error> {
    let device = cache.device().clone();
    let values: Vec<f32> = (0..tokens * 16).map(|i| (i as f32 * 0.7).sin()).collect();
    let (x, out) = (device.upload(&values, &[tokens, 1, 16])?, device.zeros(DType::F32, &[tokens, 1, 16])?);
    let (mut encoder, mut step) = (device.encoder()?, cache.step(&[(sequence, tokens)])?);
    for layer in 0..LAYERS {
        if layer != 4 {
            step.append(&mut encoder, layer, &x, &x)?;
        }
        step.attend(&mut encoder, layer, &x, &out, None, &AttentionParams::for_head_dim(16))?;
    }
    step.submit(encoder)?.wait()
}

pub fn run(bytes: &[u8]) {
    let Some((mode, bytes)) = bytes.split_first() else { return };
    let (mut cache, own) = filled(super::cpu());
    super::in_folder(&[], |folder| {
        let path = folder.join("cache.tqkv");
        let bytes = if mode & 1 == 1 { repaired(bytes.to_vec(), &path) } else { bytes.to_vec() };
        let before = cache.usage();
        match cache.read_snapshot(&bytes[..], MODEL) {
            Ok(ids) => {
                ids.iter().for_each(|&id| use_loaded(&mut cache, id));
                ids.into_iter().for_each(|id| cache.free_sequence(id).expect("a loaded sequence"));
            }
            Err(error) => drop(error.to_string()),
        }
        assert_eq!(cache.usage(), before);
        std::fs::write(&path, &bytes).expect("a temporary file");
        let whole = Snapshot::verify(&path);
        if let Ok(snapshot) = &whole {
            assert_eq!(snapshot.bytes(), bytes.len() as u64);
            assert!(snapshot.pages().all(|(at, n)| at + n <= snapshot.bytes()));
            assert_eq!(snapshot.first(usize::MAX, 0), None);
            (0..snapshot.lens().len())
                .for_each(|s| drop((0..LAYERS).map(|l| snapshot.first(s, l)).collect::<Vec<_>>()));
        }
        match cache.load_into(own, &path, MODEL) {
            Ok(()) => assert!(whole.is_ok()),
            Err(_) => assert_eq!((cache.len(own), cache.usage()), (Ok(20), before)),
        }
    });
    cache.free_sequence(own).expect("its own sequence");
    assert_eq!(cache.usage().used, 0);
}

/// A loaded sequence goes on, is cut, saved and loaded again as any other.
fn use_loaded(cache: &mut KvCache, id: SequenceId) {
    let len = cache.len(id).expect("a loaded sequence");
    let twin = cache.fork(id).expect("a loaded sequence");
    match append(cache, twin, 3) {
        Ok(()) => assert_eq!(cache.len(twin), Ok(len + 3)),
        Err(
            Error::OutOfPages { .. } | Error::SizeOverflow { .. } | Error::TooLarge { .. } | Error::Positions { .. },
        ) => {}
        Err(error) => panic!("a loaded sequence of {len} does not go on: {error}"),
    }
    // Windows may stand in the way.
    let _ = cache.truncate(twin, len / 2);
    cache.free_sequence(twin).expect("its twin");
    let mut again = vec![];
    cache.write_snapshot(&[(id, len)], &mut again, MODEL).expect("a loaded sequence is saved");
    match cache.read_snapshot(&again[..], MODEL) {
        Ok(ids) => ids.into_iter().for_each(|id| cache.free_sequence(id).expect("loaded again")),
        Err(Error::OutOfPages { .. }) => {}
        Err(error) => panic!("what was saved is refused: {error}"),
    }
}

/// With right checksums, and as long as the header says, as far as the header can be read.
fn repaired(mut bytes: Vec<u8>, path: &std::path::Path) -> Vec<u8> {
    let Some(header) = bytes.get(24..32).map(|n| u64::from_le_bytes(n.try_into().expect("8 bytes"))) else {
        return bytes;
    };
    let Some(end) = usize::try_from(header).ok().filter(|n| (40..=bytes.len()).contains(n)) else { return bytes };
    let checksum = xxh3_64(&bytes[..end - 8]);
    bytes[end - 8..end].copy_from_slice(&checksum.to_le_bytes());
    std::fs::write(path, &bytes).expect("a temporary file");
    if let Err(Error::Truncated { expected, .. } | Error::TrailingBytes { expected, .. }) = Snapshot::open(path) {
        bytes.resize(expected.clamp(header, LARGEST) as usize, 0x5a);
        std::fs::write(path, &bytes).expect("a temporary file");
    }
    let Ok(snapshot) = Snapshot::open(path) else { return bytes };
    let mut whole = Xxh3Default::new();
    whole.update(&checksum.to_le_bytes());
    for (at, n) in snapshot.pages() {
        let (at, end) = (at as usize, (at + n) as usize);
        let checksum = xxh3_64(&bytes[at..end - 8]).to_le_bytes();
        bytes[end - 8..end].copy_from_slice(&checksum);
        whole.update(&checksum);
    }
    let end = bytes.len();
    bytes[end - 8..].copy_from_slice(&whole.digest().to_le_bytes());
    bytes
}

pub fn seeds() -> Vec<Vec<u8>> {
    let (mut cache, one) = filled(super::cpu());
    let (two, empty) = (cache.fork(one).expect("a sequence"), cache.add_sequence());
    append(&mut cache, two, 5).expect("room for a few tokens");
    let saved = |prefixes: &[(SequenceId, usize)]| {
        let mut bytes = vec![1];
        cache.write_snapshot(prefixes, &mut bytes, MODEL).expect("a snapshot");
        bytes
    };
    let mut seeds = vec![saved(&[(one, 20)]), saved(&[(one, 20), (two, 25)]), saved(&[(empty, 0)]), saved(&[])];
    let mut raw = seeds[0].clone();
    raw[0] = 0;
    seeds.push(raw);
    seeds
}
