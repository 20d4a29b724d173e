//! Caches from files.

use super::geometry::Geometry;
use super::header::{Saved, SavedPages, Snapshot};
use super::inspect::InChunk;
use super::overlap::one_ahead;
use super::source::{Source, expect_checksum};
use crate::cache::state::{Held, KvCache, Sequence, SequenceId};
use crate::error::{Error, Result, SnapshotPart};
use std::io::{Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

impl KvCache {
    /// Adds the sequences of a file to the cache, in the order in which they were saved. It may have been written on any
    /// backend, by a cache of the same layers, codecs and page size.
    ///
    /// # Errors
    /// [`Error::NotASnapshot`], [`Error::Version`], [`Error::Checksum`], [`Error::Truncated`], [`Error::TrailingBytes`],
    /// [`Error::Absurd`] and, for codecs that do not exist, [`Error::Bits`], [`Error::HeadDim`], [`Error::Parameter`] or
    /// [`Error::Zero`]; [`Error::Fingerprint`] for another model, [`Error::Geometry`] for another shape,
    /// [`Error::OutOfPages`], [`Error::Io`]; what [`Buffer::write`](crate::Buffer::write) says. The cache is then as it was.
    pub fn load(&mut self, path: impl AsRef<Path>, fingerprint: &[u8]) -> Result<Vec<SequenceId>> {
        let (mut source, bytes) = Source::open(path.as_ref())?;
        self.load_from(&mut source, Some(bytes), fingerprint)
    }

    /// As [`load`](KvCache::load), from any stream, which is read on another thread; to the end of the snapshot and no further.
    ///
    /// A stream cannot be read twice, so nothing is given up for it: where there is no room for it beside what the cache holds,
    /// write it to a file for [`load_into`](KvCache::load_into), or free a sequence first, which is then gone if the stream is
    /// damaged.
    ///
    /// # Errors
    /// As [`load`](KvCache::load), but what follows a snapshot is not looked at.
    pub fn read_snapshot(&mut self, from: impl Read + Send, fingerprint: &[u8]) -> Result<Vec<SequenceId>> {
        self.load_from(&mut Source::new("snapshot", from), None, fingerprint)
    }

    /// Puts the one sequence of a file in place of what a sequence holds, which keeps its number; forks of it keep theirs. Its
    /// own pages count as free where the cache has too few others.
    ///
    /// Where it has enough, the file is read once, into those. Where it does not, the whole file is verified before the
    /// sequence gives up anything, then read again: a file of any size, in no more memory.
    ///
    /// # Errors
    /// As [`load`](KvCache::load); [`Error::UnknownSequence`]; [`Error::Mismatch`] for a file of more sequences, or of none. The
    /// sequence then holds what it held, but for one case: if the second reading fails though the first went well (the disk or
    /// the device fails, or somebody writes to the open file), it is empty.
    ///
    /// ```
    /// # use tqkv::{CacheConfig, Device, KvCache};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let path = dir.path().join("chat.tqkv");
    /// let mut cache = KvCache::new(&Device::cpu(), CacheConfig::new(2, 2, 64))?;
    /// let seq = cache.add_sequence();
    /// cache.save(&[seq], &path, b"llama-8b")?;
    /// // ... the chat goes on, and is to be taken back:
    /// cache.load_into(seq, &path, b"llama-8b")?;
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn load_into(&mut self, sequence: SequenceId, path: impl AsRef<Path>, fingerprint: &[u8]) -> Result<()> {
        let (source, bytes) = Source::open(path.as_ref())?;
        self.load_into_from(sequence, source, bytes, fingerprint)
    }

    fn load_into_from<R: Read + Seek + Send>(
        &mut self,
        sequence: SequenceId,
        mut source: Source<R>,
        bytes: u64,
        fingerprint: &[u8],
    ) -> Result<()> {
        let (snapshot, checksum) = self.read_header(&mut source, Some(bytes), fingerprint)?;
        if snapshot.sequences.len() != 1 {
            let (got, expected) = (snapshot.sequences.len(), "1".to_owned());
            return Err(Error::Mismatch { what: "sequences of the snapshot", got, expected });
        }
        let (needed, held) = (self.pages_needed(&snapshot), &self.sequence(sequence)?.held);
        let mut room = true;
        for ((group, needed), held) in self.groups.iter().zip(needed).zip(held) {
            let own = held.pages.iter().filter(|&&page| !group.pages.is_shared(page)).count();
            group.pages.expect_free_besides(needed, own)?;
            room &= needed <= group.pages.free();
        }
        if !room {
            snapshot.verify_pages(&mut source, checksum)?;
            source.seek(snapshot.header_bytes)?;
            self.replace(sequence, Sequence::empty(self.groups.len(), self.layers.len()));
        }
        let numbers = self.read_pages(&mut source, &snapshot, checksum)?;
        let loaded = self.sequences_of(snapshot, &numbers);
        loaded.into_iter().for_each(|loaded| self.replace(sequence, loaded));
        Ok(())
    }

    fn load_from<R: Read + Send>(
        &mut self,
        source: &mut Source<R>,
        bytes: Option<u64>,
        fingerprint: &[u8],
    ) -> Result<Vec<SequenceId>> {
        let (snapshot, checksum) = self.read_header(source, bytes, fingerprint)?;
        let numbers = self.read_pages(source, &snapshot, checksum)?;
        let sequences = self.sequences_of(snapshot, &numbers);
        Ok(sequences.into_iter().map(|sequence| self.insert(sequence)).collect())
    }

    /// The header of a snapshot that fits this cache, and its checksum.
    fn read_header<R: Read>(
        &self,
        source: &mut Source<R>,
        bytes: Option<u64>,
        fingerprint: &[u8],
    ) -> Result<(Snapshot, u64)> {
        let (snapshot, checksum) = Snapshot::decode(source, bytes)?;
        if snapshot.fingerprint != fingerprint {
            let (got, expected) = (readable(&snapshot.fingerprint), readable(fingerprint));
            return Err(Error::Fingerprint { got, expected });
        }
        snapshot.geometry.expect(&Geometry::of(self)?)?;
        Ok((snapshot, checksum))
    }

    /// Pages of a snapshot by group.
    fn pages_needed(&self, snapshot: &Snapshot) -> Vec<usize> {
        let mut needed = vec![0; self.groups.len()];
        snapshot.pages.iter().for_each(|&(group, _)| needed[group as usize] += 1);
        needed
    }

    /// Takes free pages and fills them with those of a snapshot; on an error or a panic they are free again.
    fn read_pages<R: Read + Send>(
        &mut self,
        source: &mut Source<R>,
        snapshot: &Snapshot,
        checksum: u64,
    ) -> Result<Vec<u32>> {
        for (group, needed) in self.groups.iter().zip(self.pages_needed(snapshot)) {
            group.pages.expect_free(needed)?;
        }
        let mut numbers = Vec::with_capacity(snapshot.pages.len());
        for &(group, _) in &snapshot.pages {
            numbers.push(self.groups[group as usize].pages.take()?);
        }
        // A stream of the caller's may panic.
        let filled = catch_unwind(AssertUnwindSafe(|| self.fill_pages(source, snapshot, checksum, &numbers)));
        if !matches!(filled, Ok(Ok(()))) {
            for (&(group, _), &page) in snapshot.pages.iter().zip(&numbers).rev() {
                self.groups[group as usize].pages.release(page);
            }
        }
        filled.unwrap_or_else(|panic| resume_unwind(panic)).map(|()| numbers)
    }

    /// The sequences of a snapshot, whose pages lie in the pool's pages of these numbers.
    fn sequences_of(&mut self, snapshot: Snapshot, numbers: &[u32]) -> Vec<Sequence> {
        let mut held_once = vec![false; numbers.len()];
        let mut sequences = Vec::with_capacity(snapshot.sequences.len());
        for Saved { len, held: saved } in snapshot.sequences {
            let mut held = vec![];
            for (group, SavedPages { dropped, mut pages }) in self.groups.iter_mut().zip(saved) {
                for page in &mut pages {
                    let index = *page as usize;
                    *page = numbers[index];
                    if std::mem::replace(&mut held_once[index], true) {
                        group.pages.share(*page);
                    }
                }
                held.push(Held { first: (dropped * group.page_size).min(len), pages, end: None });
            }
            sequences.push(Sequence { held, lens: self.lens_of(len) });
        }
        sequences
    }

    /// Fills free pages; nobody sees them before all checksums agree.
    fn fill_pages<R: Read + Send>(
        &self,
        source: &mut Source<R>,
        snapshot: &Snapshot,
        checksum: u64,
        numbers: &[u32],
    ) -> Result<()> {
        let groups = snapshot.geometry.groups();
        let mut whole = Xxh3Default::new();
        whole.update(&checksum.to_le_bytes());
        let read = |(_, pages): &(usize, Vec<InChunk>), chunk: &mut Vec<u8>| {
            chunk.resize(pages.iter().map(|p| p.bytes).sum(), 0);
            source.read_exact(chunk)
        };
        one_ahead(snapshot.chunks(), read, |(group, pages), chunk| {
            for page in &pages {
                let (payload, stored) = page.split_mut(chunk);
                expect_checksum(SnapshotPart::Page(page.index), xxh3_64(payload), stored)?;
                whole.update(stored);
            }
            let stored: Vec<_> = pages.iter().map(|p| p.stored(numbers[p.index])).collect();
            self.upload(group, &groups[group].layout, &stored, chunk)
        })?;
        source.expect_whole(&whole)
    }
}

/// Text as it is, anything else in hexadecimal.
fn readable(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => format!("{text:?}"),
        Err(_) => bytes.iter().map(|b| format!("{b:02x}")).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheConfig, DType, Device};
    use std::io::{self, SeekFrom};

    /// A file whose second reading fails, once it has gone back.
    struct Worn(io::Cursor<Vec<u8>>, bool);

    impl Read for Worn {
        fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
            if self.1 { Err(io::Error::other("worn")) } else { self.0.read(out) }
        }
    }

    impl Seek for Worn {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.1 = true;
            self.0.seek(to)
        }
    }

    #[test]
    fn a_file_that_fails_after_it_was_verified_leaves_an_empty_sequence() {
        let device = Device::cpu();
        let mut cache = KvCache::new(&device, CacheConfig::new(1, 1, 32).page_size(8).capacity(24)).unwrap();
        let seq = cache.add_sequence();
        let x = device.zeros(DType::F32, &[20, 1, 32]).unwrap();
        let append = |cache: &mut KvCache| {
            let mut encoder = device.encoder().unwrap();
            cache.append(&mut encoder, 0, &[(seq, 20)], &x, &x).unwrap();
            encoder.submit_and_wait().unwrap();
        };
        append(&mut cache);
        let mut file = vec![];
        cache.write_snapshot(&[(seq, 20)], &mut file, b"m").unwrap();
        let (bytes, source) = (file.len() as u64, Source::new("worn", Worn(io::Cursor::new(file), false)));
        let failed = cache.load_into_from(seq, source, bytes, b"m");
        assert!(matches!(failed, Err(Error::Io { ref path, .. }) if path == "worn"), "{failed:?}");
        assert_eq!((cache.len(seq), cache.usage().used), (Ok(0), 0));
        append(&mut cache);
    }
}
