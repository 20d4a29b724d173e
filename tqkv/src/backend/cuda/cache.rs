//! Compiled kernels on disk. An entry that is damaged or of another source does not exist; what cannot be written is compiled
//! again next time.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Names the folder, in place of the system's for caches.
const PATH_VARIABLE: &str = "TQKV_CACHE_DIR";

const MAGIC: &[u8; 8] = b"tqkvcub1";

/// FNV-1a of 128 bits (draft-eastlake-fnv): the same in every build, which std's hashers are not.
pub(super) struct Digest(u128);

impl Digest {
    pub fn new() -> Self {
        Digest(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Adds a field: its bytes, then its length, so that fields do not run into each other.
    pub fn add(&mut self, bytes: &[u8]) -> &mut Self {
        let length = (bytes.len() as u64).to_le_bytes();
        for &byte in bytes.iter().chain(&length) {
            self.0 = (self.0 ^ byte as u128).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        self
    }

    pub fn value(&self) -> u128 {
        self.0
    }
}

fn folder() -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|v: &OsString| !v.is_empty()).map(PathBuf::from);
    if let Some(path) = variable(PATH_VARIABLE) {
        return Some(path);
    }
    let system = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else {
        // The XDG base directory specification.
        variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))
    };
    Some(system?.join("tqkv"))
}

fn file(folder: &Path, key: u128) -> PathBuf {
    folder.join(format!("{key:032x}.cubin"))
}

/// The entry of this key, if it is whole.
pub(super) fn load(key: u128) -> Option<Vec<u8>> {
    load_from(&folder()?, key)
}

/// Keeps an entry.
pub(super) fn store(key: u128, cubin: &[u8]) {
    if let Some(folder) = folder()
        && let Err(e) = store_in(&folder, key, cubin)
    {
        tracing::debug!("compiled kernels are not kept in {}: {e}", folder.display());
    }
}

fn load_from(folder: &Path, key: u128) -> Option<Vec<u8>> {
    let mut bytes = fs::read(file(folder, key)).ok()?;
    let header = MAGIC.len() + 32;
    let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
    let (digest, rest) = rest.split_at_checked(32)?;
    let whole = magic == MAGIC && digest[..16] == key.to_le_bytes() && digest[16..] == checksum(rest);
    whole.then(|| bytes.split_off(header))
}

fn store_in(folder: &Path, key: u128, cubin: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(folder)?;
    // Written beside its place and moved there: readers see the whole of it or nothing.
    let path = file(folder, key);
    let unfinished = path.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
    let write = || {
        let mut file = fs::File::create(&unfinished)?;
        for part in [MAGIC.as_slice(), &key.to_le_bytes(), &checksum(cubin), cubin] {
            file.write_all(part)?;
        }
        drop(file);
        fs::rename(&unfinished, &path)
    };
    write().inspect_err(|_| {
        let _ = fs::remove_file(&unfinished);
    })
}

fn checksum(bytes: &[u8]) -> [u8; 16] {
    Digest::new().add(bytes).value().to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_whole_or_absent() {
        let folder = std::env::temp_dir().join(format!("tqkv-cache-test-{}", std::process::id()));
        let (key, other) = (7u128 << 90 | 5, 6);
        assert_eq!(load_from(&folder, key), None);
        store_in(&folder, key, b"machine code").unwrap();
        assert_eq!(load_from(&folder, key).unwrap(), b"machine code");
        assert_eq!(load_from(&folder, other), None);
        let whole = fs::read(file(&folder, key)).unwrap();
        // Every damaged byte, every shorter file, and an entry under another's name.
        for i in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[i] ^= 1;
            fs::write(file(&folder, key), &damaged).unwrap();
            assert_eq!(load_from(&folder, key), None, "byte {i}");
            fs::write(file(&folder, key), &whole[..i]).unwrap();
            assert_eq!(load_from(&folder, key), None, "cut at {i}");
        }
        fs::write(file(&folder, other), &whole).unwrap();
        assert_eq!(load_from(&folder, other), None);
        store_in(&folder, key, b"rebuilt").unwrap();
        assert_eq!(load_from(&folder, key).unwrap(), b"rebuilt");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 2, "no unfinished files stay");
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn fields_do_not_run_together() {
        let digest = |fields: &[&[u8]]| {
            let mut digest = Digest::new();
            fields.iter().for_each(|f| {
                digest.add(f);
            });
            digest.value()
        };
        assert_ne!(digest(&[b"ab", b"c"]), digest(&[b"a", b"bc"]));
        assert_ne!(digest(&[b"a"]), digest(&[b"a", b""]));
    }
}
