//! Snapshots as streams.

use crate::error::{Error, Result, SnapshotPart};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;
use xxhash_rust::xxh3::Xxh3Default;

/// A stream that says where it ended.
pub(super) struct Source<R> {
    path: String,
    inner: R,
    /// Bytes read.
    at: u64,
}

impl Source<File> {
    /// A file and its size.
    pub fn open(path: &Path) -> Result<(Self, u64)> {
        let name = path.display().to_string();
        let file = File::open(path).map_err(|e| Error::io(&name, &e))?;
        let bytes = file.metadata().map_err(|e| Error::io(&name, &e))?.len();
        Ok((Source::new(&name, file), bytes))
    }
}

impl<R: Read> Source<R> {
    pub fn new(path: &str, inner: R) -> Self {
        Source { path: path.to_owned(), inner, at: 0 }
    }

    /// Goes on at a byte.
    pub fn seek(&mut self, at: u64) -> Result<()>
    where
        R: Seek,
    {
        self.at = self.inner.seek(SeekFrom::Start(at)).map_err(|e| Error::io(&self.path, &e))?;
        Ok(())
    }

    /// The next bytes, fewer at the end of the stream. Memory grows with what is there, not with what is asked for.
    pub fn read_up_to(&mut self, n: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![];
        self.inner.by_ref().take(n).read_to_end(&mut bytes).map_err(|e| Error::io(&self.path, &e))?;
        self.at += bytes.len() as u64;
        Ok(bytes)
    }

    pub fn read_exact(&mut self, mut out: &mut [u8]) -> Result<()> {
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

    /// Reads the last checksum.
    pub fn expect_whole(&mut self, whole: &Xxh3Default) -> Result<()> {
        let mut stored = [0; 8];
        self.read_exact(&mut stored)?;
        expect_checksum(SnapshotPart::Whole, whole.digest(), &stored)
    }
}

pub(super) fn expect_checksum(part: SnapshotPart, got: u64, stored: &[u8]) -> Result<()> {
    let mut expected = [0; 8];
    expected.copy_from_slice(stored);
    let expected = u64::from_le_bytes(expected);
    if got != expected {
        return Err(Error::Checksum { part, got, expected });
    }
    Ok(())
}
