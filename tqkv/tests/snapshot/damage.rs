//! Damaged, cut and foreign files.

use super::*;

/// Loads damaged bytes: an error of the snapshot's own, and a cache that is as it was.
fn expect_refused(cache: &mut KvCache, bytes: &[u8], what: &str) -> Error {
    let before = cache.usage();
    let error = cache.read_snapshot(bytes, MODEL).expect_err(what);
    assert_eq!(cache.usage(), before, "{what}");
    error
}

#[test]
fn every_flipped_bit_is_found() {
    let (cache, sequence) = filled(&Device::cpu(), tiny(), &[11]);
    let mut saved = bytes(&cache, &[sequence]);
    let mut other = KvCache::new(&Device::cpu(), tiny()).unwrap();
    for bit in 0..saved.len() * 8 {
        saved[bit / 8] ^= 1 << (bit % 8);
        let error = expect_refused(&mut other, &saved, "a flipped bit");
        let ok = match bit / 8 {
            0..8 => matches!(error, Error::NotASnapshot { .. }),
            8..16 => matches!(error, Error::Version { .. }),
            24..32 => matches!(error, Error::Absurd { .. } | Error::Truncated { .. } | Error::Checksum { .. }),
            16..4096 => matches!(error, Error::Checksum { part: SnapshotPart::Header, .. }),
            n if n < saved.len() - 8 => {
                let page = SnapshotPart::Page((n - 4096) / ((saved.len() - 8 - 4096) / 2));
                matches!(error, Error::Checksum { part, .. } if part == page)
            }
            _ => matches!(error, Error::Checksum { part: SnapshotPart::Whole, .. }),
        };
        assert!(ok, "bit {bit}: {error}");
        saved[bit / 8] ^= 1 << (bit % 8);
    }
    other.read_snapshot(&saved[..], MODEL).unwrap();
}

#[test]
fn every_truncation_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("cache");
    let (cache, sequence) = filled(&Device::cpu(), tiny(), &[11]);
    let saved = bytes(&cache, &[sequence]);
    let mut other = KvCache::new(&Device::cpu(), tiny()).unwrap();
    for len in 0..saved.len() {
        let error = expect_refused(&mut other, &saved[..len], "a truncated stream");
        assert!(matches!(error, Error::Truncated { got, expected } if got == len as u64 && expected > got), "{error}");
        std::fs::write(&path, &saved[..len]).unwrap();
        let before = other.usage();
        for result in [other.load(&path, MODEL).map(drop), Snapshot::open(&path).map(drop)] {
            assert!(matches!(result, Err(Error::Truncated { got, .. }) if got == len as u64), "{len}: {result:?}");
        }
        assert_eq!(other.usage(), before);
    }
    std::fs::write(&path, [&saved[..], &[0]].concat()).unwrap();
    let (got, expected) = (saved.len() as u64 + 1, saved.len() as u64);
    assert_eq!(Snapshot::verify(&path), Err(Error::TrailingBytes { got, expected }));
}

/// Pages of several groups are several chunks: an error in any of them ends both threads.
#[test]
fn streams_that_fail_midway_are_errors() {
    let (cache, sequence) = filled(&Device::cpu(), config(), &[44]);
    let saved = bytes(&cache, &[sequence]);
    let mut other = KvCache::new(&Device::cpu(), config()).unwrap();
    for len in (0..saved.len()).step_by(509) {
        let error = cache.write_snapshot(&[(sequence, 44)], &mut vec![0; len][..], LABEL);
        assert!(matches!(error, Err(Error::Io { kind: std::io::ErrorKind::WriteZero, .. })), "{len}: {error:?}");
        let error = expect_refused(&mut other, &saved[..len], "a truncated stream");
        assert!(matches!(error, Error::Truncated { got, .. } if got == len as u64), "{len}: {error}");
        let mut damaged = saved.clone();
        damaged[len] ^= 4;
        expect_refused(&mut other, &damaged, "a flipped bit");
    }
}

#[test]
fn garbage_neither_panics_nor_asks_for_much() {
    let (cache, sequence) = filled(&Device::cpu(), tiny(), &[11]);
    let saved = bytes(&cache, &[sequence]);
    let header = 4096;
    let mut other = KvCache::new(&Device::cpu(), tiny()).unwrap();
    let mut rng = Rng(1);
    let mut refused = 0;
    for round in 0..60_000 {
        let garbage = match round % 3 {
            0 => {
                let n = rng.below(200);
                rng.bytes(n)
            }
            1 => {
                let n = rng.below(9000);
                [&saved[..32], &rng.bytes(n)].concat()
            }
            // A header that is wrong in a field or two, under a right checksum.
            _ => {
                let mut bytes = saved.clone();
                for _ in 0..=rng.below(2) {
                    let at = 16 + rng.below(146) / 4 * 4;
                    let value = match rng.below(4) {
                        0 => rng.next() as u32,
                        1 => rng.below(20) as u32,
                        2 => u32::MAX - rng.below(2) as u32,
                        _ => 1 << rng.below(32),
                    };
                    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
                }
                let checksum = xxhash_rust::xxh3::xxh3_64(&bytes[..header - 8]);
                bytes[header - 8..header].copy_from_slice(&checksum.to_le_bytes());
                bytes
            }
        };
        let before = other.usage();
        match other.read_snapshot(&garbage[..], MODEL) {
            Err(_) => {
                refused += 1;
                assert_eq!(other.usage(), before);
            }
            // A field may get the value that it had.
            Ok(ids) => ids.into_iter().for_each(|id| other.free_sequence(id).unwrap()),
        }
    }
    assert!(refused > 55_000, "{refused}");
    assert!(LARGEST.load(Ordering::Relaxed) < 20 << 20, "{} bytes at once", LARGEST.load(Ordering::Relaxed));
}

#[test]
fn too_many_layers_are_refused_before_they_are_looked_at() {
    let (cache, sequence) = filled(&Device::cpu(), tiny(), &[11]);
    let saved = bytes(&cache, &[sequence]);
    // All in groups of their own: 12 MB that took minutes.
    let layers = 300_000u32;
    let mut bytes = saved[..80].to_vec();
    for window in 1..=layers {
        bytes.extend(&saved[80..100]);
        bytes.extend([1, 0, 0, 0]);
        bytes.extend(u64::from(window).to_le_bytes());
        bytes.extend(&saved[112..136]);
    }
    bytes.resize((bytes.len() + 8).next_multiple_of(4096) - 8, 0);
    let header = bytes.len() as u64 + 8;
    bytes[24..32].copy_from_slice(&header.to_le_bytes());
    bytes[32..36].copy_from_slice(&layers.to_le_bytes());
    let checksum = xxhash_rust::xxh3::xxh3_64(&bytes);
    bytes.extend(checksum.to_le_bytes());
    let mut other = KvCache::new(&Device::cpu(), tiny()).unwrap();
    let started = std::time::Instant::now();
    let want = Error::Absurd { what: "layers", got: u64::from(layers), expected: "at most 4096".to_owned() };
    assert_eq!(other.read_snapshot(&bytes[..], MODEL), Err(want));
    assert!(started.elapsed().as_secs() < 5, "{:?}", started.elapsed());
}
