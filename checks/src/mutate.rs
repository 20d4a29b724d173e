//! Variations of bytes, for where no fuzzer leads the way.

use crate::support::Rng;

/// Numbers that lengths and counts break at.
const EDGES: [u64; 12] = [0, 1, 2, 7, 0x7f, 0xff, 0xffff, 0x7fff_ffff, 0xffff_ffff, 1 << 32, i64::MAX as u64, u64::MAX];

/// One of the seeds with a few changes: bits, bytes, numbers, pieces taken out, doubled, or brought from another seed.
pub fn mutated(rng: &mut Rng, seeds: &[Vec<u8>]) -> Vec<u8> {
    let pick = |rng: &mut Rng| seeds.get(rng.below(seeds.len().max(1))).cloned().unwrap_or_default();
    let mut bytes = pick(rng);
    for _ in 0..rng.below(6) {
        let at = rng.below(bytes.len() + 1);
        let some = rng.below(1 + (bytes.len() - at).min(40));
        match rng.below(8) {
            0 | 1 if at < bytes.len() => bytes[at] ^= 1 << rng.below(8),
            2 if at < bytes.len() => bytes[at] = rng.next() as u8,
            3 => {
                let n = 1 << rng.below(4);
                let edge = EDGES[rng.below(EDGES.len())].to_le_bytes();
                bytes[at..].iter_mut().zip(&edge[..n]).for_each(|(to, from)| *to = *from);
            }
            4 => drop(bytes.drain(at..at + some)),
            5 => bytes.truncate(at),
            6 => {
                let twice = bytes[at..at + some].to_vec();
                bytes.splice(at..at, twice);
            }
            _ => {
                let other = pick(rng);
                let from = rng.below(other.len() + 1);
                let end = from + rng.below(1 + (other.len() - from).min(200));
                bytes.splice(at..at + some, other[from..end].iter().copied());
            }
        }
    }
    bytes
}
