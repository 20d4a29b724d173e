//! What a file holds, without a cache.

use super::geometry::{Geometry, GroupGeometry};
use super::header::Snapshot;
use super::source::{Source, expect_checksum};
use super::transfer::Stored;
use crate::cache::extent::{Extent, LayerKind};
use crate::error::{Result, SnapshotPart};
use std::io::Read;
use std::path::Path;
use xxhash_rust::xxh3::Xxh3Default;

/// Bytes that go to or from the device at once; a single page may be larger. Two such chunks are in memory.
const CHUNK: u64 = 8 << 20;

impl Snapshot {
    /// What a file holds; its pages are not looked at.
    ///
    /// # Errors
    /// Those of [`KvCache::load`](crate::KvCache::load) that need no cache.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let (mut source, bytes) = Source::open(path.as_ref())?;
        Ok(Snapshot::decode(&mut source, Some(bytes))?.0)
    }

    /// What a file holds, after a look at every byte: whoever has the model and room enough can load it.
    ///
    /// # Errors
    /// As [`open`](Snapshot::open), and [`Error::Checksum`](crate::Error::Checksum) with the first page that is damaged.
    pub fn verify(path: impl AsRef<Path>) -> Result<Self> {
        let (mut source, bytes) = Source::open(path.as_ref())?;
        let (snapshot, checksum) = Snapshot::decode(&mut source, Some(bytes))?;
        snapshot.verify_pages(&mut source, checksum)?;
        Ok(snapshot)
    }

    /// Which model its vectors belong to, in the words of whoever saved it.
    pub fn fingerprint(&self) -> &[u8] {
        &self.fingerprint
    }

    /// What else whoever saved it wanted to be found.
    pub fn note(&self) -> &[u8] {
        &self.note
    }

    /// The shape of the cache that it fits.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Positions of each sequence, those counted that windowed layers have dropped.
    pub fn lens(&self) -> impl ExactSizeIterator<Item = usize> {
        self.sequences.iter().map(|s| s.len)
    }

    /// The oldest position of a sequence that a layer holds, sinks apart; `None` for a sequence or layer that is not there.
    pub fn first(&self, sequence: usize, layer: usize) -> Option<usize> {
        let layers = &self.geometry.layers;
        let source = match layers.get(layer)?.kind {
            LayerKind::Shared(source) => source,
            _ => layer,
        };
        let own = |g: &GroupGeometry| !matches!(g.extent, Extent::First(_)) && g.layers.contains(&source);
        let group = self.geometry.groups().iter().position(own)?;
        let saved = self.sequences.get(sequence)?;
        Some((saved.held.get(group)?.dropped * self.geometry.page_size).min(saved.len))
    }

    /// First byte and bytes of each stored page in the file, the checksum in the last 8 bytes counted.
    pub fn pages(&self) -> impl Iterator<Item = (u64, u64)> {
        self.slots().map(|(_, start, bytes)| (start, bytes))
    }

    /// Bytes of the file.
    pub fn bytes(&self) -> u64 {
        self.file_bytes
    }

    /// Compares the checksums of all pages, which come next in the stream, and the last one.
    pub(super) fn verify_pages<R: Read>(&self, source: &mut Source<R>, checksum: u64) -> Result<()> {
        let mut whole = Xxh3Default::new();
        whole.update(&checksum.to_le_bytes());
        let mut buffer = vec![0; 1 << 20];
        for (index, (_, _, bytes)) in self.slots().enumerate() {
            let (mut hash, mut left) = (Xxh3Default::new(), bytes - 8);
            while left > 0 {
                let part = left.min(buffer.len() as u64) as usize;
                source.read_exact(&mut buffer[..part])?;
                hash.update(&buffer[..part]);
                left -= part as u64;
            }
            let mut stored = [0; 8];
            source.read_exact(&mut stored)?;
            expect_checksum(SnapshotPart::Page(index), hash.digest(), &stored)?;
            whole.update(&stored);
        }
        source.expect_whole(&whole)
    }

    /// Pages of one group that follow one another in the file, as many as fit a chunk and at least one.
    pub(super) fn chunks(&self) -> impl Iterator<Item = (usize, Vec<InChunk>)> {
        let mut slots = self.slots().enumerate().peekable();
        std::iter::from_fn(move || {
            let &(_, (group, first, _)) = slots.peek()?;
            let mut pages: Vec<InChunk> = vec![];
            while let Some((index, (_, start, bytes))) = slots.next_if(|&(_, (g, start, bytes))| {
                g == group && (start == first || start.saturating_add(bytes) - first <= CHUNK)
            }) {
                let positions = self.pages[index].1 as usize;
                pages.push(InChunk { index, positions, at: (start - first) as usize, bytes: bytes as usize });
            }
            Some((group, pages))
        })
    }
}

/// A page of a chunk.
pub(super) struct InChunk {
    /// Among the pages of the snapshot.
    pub index: usize,
    positions: usize,
    /// First byte within the chunk, and bytes.
    at: usize,
    pub bytes: usize,
}

impl InChunk {
    pub fn stored(&self, page: u32) -> Stored {
        Stored { page, positions: self.positions, at: self.at }
    }

    /// The page's content and its checksum.
    pub fn split_mut<'a>(&self, chunk: &'a mut [u8]) -> (&'a mut [u8], &'a mut [u8]) {
        chunk[self.at..self.at + self.bytes].split_at_mut(self.bytes - 8)
    }
}
