//! A cache on disk, with the tokens and the conversation that it belongs to.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};
use tqkv::cache::Label;
use tqkv::{CodecPair, Snapshot};
use tqkv_candle::{Message, SequenceCache};
use xxhash_rust::xxh3::Xxh3Default;

/// What is kept beside the cache.
#[derive(Serialize, Deserialize, Default)]
pub struct Session {
    /// All tokens, of which the cache may lack the last.
    pub tokens: Vec<u32>,
    /// The conversation, if it is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<Message>,
}

impl Session {
    /// What a file holds, and the codecs of its cache.
    pub fn open(path: &Path) -> Result<(Self, CodecPair)> {
        let snapshot = Snapshot::open(path)?;
        let session: Self = serde_json::from_slice(snapshot.note())
            .with_context(|| format!("{} was not saved by tqkv generate or chat", path.display()))?;
        let lens: Vec<_> = snapshot.lens().collect();
        let known = matches!(lens[..], [len] if len > 0 && (len..=len + 1).contains(&session.tokens.len()));
        ensure!(known, "{} holds {lens:?} positions, expected one sequence as long as its tokens", path.display());
        let layer = snapshot.geometry().layers.first().context("no layers")?;
        Ok((session, CodecPair { key: layer.key.codec(), value: layer.value.codec() }))
    }

    pub fn write(&self, cache: &SequenceCache, path: &Path, model: &str) -> Result<()> {
        let note = serde_json::to_vec(self)?;
        Ok(cache.save(path, Label { model: model.as_bytes(), note: &note })?)
    }
}

/// Which model it is: a hash of its file, or of its directory's configuration and weights.
pub fn fingerprint(model: &Path) -> Result<String> {
    let mut hash = Xxh3Default::new();
    let mut buffer = vec![0; 1 << 20];
    for path in files(model)? {
        let context = || path.display().to_string();
        hash.update(path.file_name().unwrap_or_default().as_encoded_bytes());
        let mut file = std::fs::File::open(&path).with_context(context)?;
        loop {
            match file.read(&mut buffer).with_context(context)? {
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
    let mut files = vec![];
    for entry in std::fs::read_dir(model).with_context(|| model.display().to_string())? {
        let path = entry?.path();
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
