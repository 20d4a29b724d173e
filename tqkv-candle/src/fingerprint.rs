//! What tells a model from others.

use crate::error::{Error, Result};
use std::io::Read;
use std::path::{Path, PathBuf};
use xxhash_rust::xxh3::Xxh3Default;

/// A hash of a GGUF file, or of a directory's configuration and weights: for files that belong to one model.
///
/// # Errors
/// [`Error::Read`].
pub fn fingerprint(model: &Path) -> Result<String> {
    let mut hash = Xxh3Default::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files(model)? {
        let failed = |cause| Error::Read { path: path.clone(), cause };
        let mut file = std::fs::File::open(&path).map_err(failed)?;
        // Where one ends and the next begins. What they are called is no part of the model.
        hash.update(&file.metadata().map_err(failed)?.len().to_le_bytes());
        loop {
            match file.read(&mut buffer).map_err(failed)? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
    }
    Ok(format!("xxh3-128:{:032x}", hash.digest128()))
}

/// The files that a model consists of.
fn files(model: &Path) -> Result<Vec<PathBuf>> {
    if model.is_file() {
        return Ok(vec![model.into()]);
    }
    let failed = |cause| Error::Read { path: model.into(), cause };
    let mut files = vec![];
    for entry in std::fs::read_dir(model).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let of_model = |path: &Path| {
            path.file_name().is_some_and(|n| n == "config.json") || path.extension().is_some_and(|e| e == "safetensors")
        };
        if of_model(&path) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
