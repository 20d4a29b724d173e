//! Caches in files: save and load, whatever the backend. `docs/snapshot.md` describes every byte.

mod geometry;
mod header;
mod transfer;

pub use geometry::{Geometry, LayerGeometry, SinkGeometry};
pub use header::{Label, MAX_FINGERPRINT, MAX_NOTE, SNAPSHOT_VERSION, Snapshot};

use super::{Extent, Held, KvCache, LayerKind, Sequence, SequenceId};
use crate::error::{Error, Result, SnapshotPart};
pub(super) use geometry::GroupGeometry;
#[cfg(feature = "prefix-store")]
pub(super) use header::encode_layer;
use header::{Saved, SavedPages};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
pub(super) use transfer::Stored;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

/// Bytes that go to or from the device at once; a single page may be larger. Two such chunks are in memory.
const CHUNK: u64 = 8 << 20;

impl KvCache {
    /// Writes sequences to a file: all of their positions, in the order given. Pages that several of them share are
    /// written once and shared again after [`load`](KvCache::load).
    ///
    /// `label` says which model the vectors belong to, and what else the caller wants to find there: see [`Label`]. The file
    /// depends on nothing else but content: not on page numbers, and not on the backend.
    ///
    /// The file appears at `path` whole or not at all: it is written beside it under another name (`.NAME.*.tmp`, which a
    /// killed process leaves behind), flushed to the disk and renamed. Appends must have been submitted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::RepeatedSequence`]; [`Error::UnevenLayers`] within a model step;
    /// [`Error::Absurd`] for a label that is too long; [`Error::Io`]; what [`Buffer::read`](crate::Buffer::read)
    /// says.
    ///
    /// ```
    /// # use tqkv::{CacheConfig, Device, Error, KvCache};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let path = dir.path().join("chat.tqkv");
    /// let mut cache = KvCache::new(&Device::cpu(), CacheConfig::new(2, 2, 64))?;
    /// let seq = cache.add_sequence();
    /// cache.save(&[seq], &path, b"llama-8b")?;
    /// let copies = cache.load(&path, b"llama-8b")?;
    /// assert_eq!(cache.len(copies[0])?, 0);
    /// assert!(matches!(cache.load(&path, b"qwen-7b"), Err(Error::Fingerprint { .. })));
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    pub fn save<'a>(
        &self,
        sequences: &[SequenceId],
        path: impl AsRef<Path>,
        label: impl Into<Label<'a>>,
    ) -> Result<()> {
        let whole = sequences.iter().map(|&s| Ok((s, self.len(s)?))).collect::<Result<Vec<_>>>()?;
        self.save_prefixes(&whole, path.as_ref(), label.into())
    }

    /// Writes every sequence to a file; the sequences returned are in the order in which [`load`](KvCache::load) gives them.
    ///
    /// # Errors
    /// As [`save`](KvCache::save).
    pub fn save_all<'a>(&self, path: impl AsRef<Path>, label: impl Into<Label<'a>>) -> Result<Vec<SequenceId>> {
        let all: Vec<_> = self.sequences.keys().copied().collect();
        self.save(&all, path, label)?;
        Ok(all)
    }

    /// Writes the first `len` positions of a sequence to a file, as after [`truncate`](KvCache::truncate).
    ///
    /// # Errors
    /// As [`save`](KvCache::save) and [`truncate`](KvCache::truncate).
    pub fn save_prefix<'a>(
        &self,
        sequence: SequenceId,
        len: usize,
        path: impl AsRef<Path>,
        label: impl Into<Label<'a>>,
    ) -> Result<()> {
        self.save_prefixes(&[(sequence, len)], path.as_ref(), label.into())
    }

    fn save_prefixes(&self, prefixes: &[(SequenceId, usize)], path: &Path, label: Label) -> Result<()> {
        write_atomically(path, |file| self.write_snapshot(prefixes, file, label))
    }

    /// Writes the first positions of sequences, each with its number, to any stream; nothing is flushed.
    ///
    /// # Errors
    /// As [`save_prefix`](KvCache::save_prefix). What was written by then is no snapshot.
    pub fn write_snapshot<'a>(
        &self,
        prefixes: &[(SequenceId, usize)],
        mut out: impl Write,
        label: impl Into<Label<'a>>,
    ) -> Result<()> {
        let (snapshot, numbers) = self.snapshot(prefixes, label.into())?;
        let header = snapshot.encode();
        let failed = |e: io::Error| Error::io("snapshot", &e);
        out.write_all(&header).map_err(failed)?;
        let mut whole = Xxh3Default::new();
        whole.update(&header[header.len() - 8..]);
        let groups = snapshot.geometry.groups();
        let gather = |(group, pages): &(usize, Vec<InChunk>), chunk: &mut Vec<u8>| {
            let stored: Vec<_> = pages.iter().map(|p| p.stored(numbers[p.index])).collect();
            chunk.clear();
            chunk.resize(pages.iter().map(|p| p.bytes).sum(), 0);
            self.download(*group, &groups[*group].layout, &stored, chunk)?;
            for page in pages {
                let (payload, checksum) = page.split_mut(chunk);
                checksum.copy_from_slice(&xxh3_64(payload).to_le_bytes());
            }
            Ok(())
        };
        one_ahead(snapshot.chunks(), gather, |(_, pages), chunk| {
            pages.iter().for_each(|page| whole.update(page.split_mut(chunk).1));
            out.write_all(chunk).map_err(failed)
        })?;
        out.write_all(&whole.digest().to_le_bytes()).map_err(failed)
    }

    /// What a snapshot of these prefixes says, and the pool's number of each of its pages.
    fn snapshot(&self, prefixes: &[(SequenceId, usize)], label: Label) -> Result<(Snapshot, Vec<u32>)> {
        let geometry = Geometry::of(self)?;
        let groups = geometry.groups();
        let (mut index, mut numbers, mut pages) = (HashMap::new(), vec![], vec![]);
        let mut saved: Vec<Saved> = Vec::with_capacity(prefixes.len());
        let mut seen = std::collections::HashSet::new();
        for &(id, len) in prefixes {
            if !seen.insert(id) {
                return Err(Error::RepeatedSequence { got: id.0 });
            }
            self.len(id)?;
            self.expect_prefix(id, len)?;
            let mut held = vec![];
            for (g, Held { first, pages: own }) in self.sequence(id)?.held.iter().enumerate() {
                let range = groups[g].stored(*first, len);
                let own = if range.is_empty() { &[] } else { &own[..range.len()] };
                let mut stored = Vec::with_capacity(own.len());
                for (i, &page) in own.iter().enumerate() {
                    let next = pages.len();
                    let at = *index.entry((g, page)).or_insert(next);
                    if at == next {
                        pages.push((g as u32, 0));
                        numbers.push(page);
                    }
                    pages[at].1 = (groups[g].positions(len, range.start + i) as u32).max(pages[at].1);
                    stored.push(at as u32);
                }
                held.push(SavedPages { dropped: range.start, pages: stored });
            }
            saved.push(Saved { len, held });
        }
        Ok((Snapshot::new(label, geometry, pages, saved)?, numbers))
    }

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
            source.verify_pages(&snapshot, checksum)?;
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

    /// Takes free pages and fills them with those of a snapshot; on an error they are free again.
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
        if let Err(error) = self.fill_pages(source, snapshot, checksum, &numbers) {
            for (&(group, _), &page) in snapshot.pages.iter().zip(&numbers).rev() {
                self.groups[group as usize].pages.release(page);
            }
            return Err(error);
        }
        Ok(numbers)
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
                held.push(Held { first: (dropped * group.page_size).min(len), pages });
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

impl Snapshot {
    /// What a file holds; its pages are not looked at.
    ///
    /// # Errors
    /// Those of [`KvCache::load`] that need no cache.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let (mut source, bytes) = Source::open(path.as_ref())?;
        Ok(Snapshot::decode(&mut source, Some(bytes))?.0)
    }

    /// What a file holds, after a look at every byte: whoever has the model and room enough can load it.
    ///
    /// # Errors
    /// As [`open`](Snapshot::open), and [`Error::Checksum`] with the first page that is damaged.
    pub fn verify(path: impl AsRef<Path>) -> Result<Self> {
        let (mut source, bytes) = Source::open(path.as_ref())?;
        let (snapshot, checksum) = Snapshot::decode(&mut source, Some(bytes))?;
        source.verify_pages(&snapshot, checksum)?;
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

    /// Pages of one group that follow one another in the file, as many as fit a chunk and at least one.
    fn chunks(&self) -> impl Iterator<Item = (usize, Vec<InChunk>)> {
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
struct InChunk {
    /// Among the pages of the snapshot.
    index: usize,
    positions: usize,
    /// First byte within the chunk, and bytes.
    at: usize,
    bytes: usize,
}

impl InChunk {
    fn stored(&self, page: u32) -> Stored {
        Stored { page, positions: self.positions, at: self.at }
    }

    /// The page's content and its checksum.
    fn split_mut<'a>(&self, chunk: &'a mut [u8]) -> (&'a mut [u8], &'a mut [u8]) {
        chunk[self.at..self.at + self.bytes].split_at_mut(self.bytes - 8)
    }
}

/// Fills a buffer for each chunk on a thread of its own, while `take` works on the one before.
fn one_ahead<T: Send>(
    chunks: impl Iterator<Item = T> + Send,
    mut fill: impl FnMut(&T, &mut Vec<u8>) -> Result<()> + Send,
    mut take: impl FnMut(T, &mut Vec<u8>) -> Result<()>,
) -> Result<()> {
    let (filled, to_take) = mpsc::sync_channel(0);
    let (taken, to_fill) = mpsc::channel::<Vec<u8>>();
    thread::scope(|scope| {
        let work = move || {
            for chunk in chunks {
                let mut buffer = to_fill.try_recv().unwrap_or_default();
                let result = fill(&chunk, &mut buffer).map(|()| (chunk, buffer));
                // After an error on either side nobody waits for more.
                let last = result.is_err();
                if filled.send(result).is_err() || last {
                    return;
                }
            }
        };
        thread::Builder::new().spawn_scoped(scope, work).map_err(|e| Error::io("a thread for snapshots", &e))?;
        for result in to_take {
            let (chunk, mut buffer) = result?;
            take(chunk, &mut buffer)?;
            // Nobody fills it again after the last chunk.
            let _ = taken.send(buffer);
        }
        Ok(())
    })
}

/// A stream that says where it ended.
struct Source<R> {
    path: String,
    inner: R,
    /// Bytes read.
    at: u64,
}

impl Source<File> {
    /// A file and its size.
    fn open(path: &Path) -> Result<(Self, u64)> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|e| Error::io(&name, &e))?;
        let bytes = file.metadata().map_err(|e| Error::io(&name, &e))?.len();
        Ok((Source::new(&name, file), bytes))
    }
}

impl<R: Read> Source<R> {
    fn new(path: &str, inner: R) -> Self {
        Source { path: path.to_owned(), inner, at: 0 }
    }

    /// Goes on at a byte.
    fn seek(&mut self, at: u64) -> Result<()>
    where
        R: Seek,
    {
        self.at = self.inner.seek(SeekFrom::Start(at)).map_err(|e| Error::io(&self.path, &e))?;
        Ok(())
    }

    /// The next bytes, fewer at the end of the stream. Memory grows with what is there, not with what is asked for.
    fn read_up_to(&mut self, n: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        self.inner.by_ref().take(n).read_to_end(&mut bytes).map_err(|e| Error::io(&self.path, &e))?;
        self.at += bytes.len() as u64;
        Ok(bytes)
    }

    fn read_exact(&mut self, mut out: &mut [u8]) -> Result<()> {
        let expected = self.at + out.len() as u64;
        while !out.is_empty() {
            match self.inner.read(out) {
                Ok(0) => return Err(Error::Truncated { got: self.at, expected }),
                Ok(n) => {
                    self.at += n as u64;
                    out = &mut out[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(Error::io(&self.path, &e)),
            }
        }
        Ok(())
    }

    /// Reads all pages and compares their checksums.
    fn verify_pages(&mut self, snapshot: &Snapshot, checksum: u64) -> Result<()> {
        let mut whole = Xxh3Default::new();
        whole.update(&checksum.to_le_bytes());
        let mut buffer = vec![0; 1 << 20];
        for (index, (_, _, bytes)) in snapshot.slots().enumerate() {
            let (mut hash, mut left) = (Xxh3Default::new(), bytes - 8);
            while left > 0 {
                let part = left.min(buffer.len() as u64) as usize;
                self.read_exact(&mut buffer[..part])?;
                hash.update(&buffer[..part]);
                left -= part as u64;
            }
            let mut stored = [0; 8];
            self.read_exact(&mut stored)?;
            expect_checksum(SnapshotPart::Page(index), hash.digest(), &stored)?;
            whole.update(&stored);
        }
        self.expect_whole(&whole)
    }

    /// Reads the last checksum.
    fn expect_whole(&mut self, whole: &Xxh3Default) -> Result<()> {
        let mut stored = [0; 8];
        self.read_exact(&mut stored)?;
        expect_checksum(SnapshotPart::Whole, whole.digest(), &stored)
    }
}

fn expect_checksum(part: SnapshotPart, got: u64, stored: &[u8]) -> Result<()> {
    let mut expected = [0; 8];
    expected.copy_from_slice(stored);
    let expected = u64::from_le_bytes(expected);
    if got != expected {
        return Err(Error::Checksum { part, got, expected });
    }
    Ok(())
}

/// A file that appears whole or not at all, and then stays.
fn write_atomically(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let failed = |e: io::Error| Error::io(path.display().to_string(), &e);
    let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let prefix = format!(".{}.", name.to_string_lossy());
    let mut builder = tempfile::Builder::new();
    builder.prefix(&prefix).suffix(".tmp");
    // As any other new file: whatever the umask leaves.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut file = builder.tempfile_in(directory).map_err(failed)?;
    write(file.as_file_mut()).map_err(|error| match error {
        Error::Io { kind, message, .. } => Error::Io { path: path.display().to_string(), kind, message },
        error => error,
    })?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|e| failed(e.error))?;
    // The new name too must outlive a power failure; only Unix lets a directory be flushed.
    #[cfg(unix)]
    File::open(directory).and_then(|d| d.sync_all()).map_err(failed)?;
    Ok(())
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
