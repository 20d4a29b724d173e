//! Caches into files.

use super::geometry::Geometry;
use super::header::{Label, Saved, SavedPages, Snapshot};
use super::inspect::InChunk;
use super::overlap::one_ahead;
use crate::cache::state::{Held, KvCache, SequenceId};
use crate::error::{Error, Result};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

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
            for (g, Held { first, pages: own, .. }) in self.sequence(id)?.held.iter().enumerate() {
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
