//! A cache on disk, with the tokens and the conversation that it belongs to.

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tqkv::cache::{CacheCodec, ExtentGeometry, Label, LayerGeometry, Recent, Sinks};
use tqkv::format::RowFormat;
use tqkv::{CodecPair, Snapshot};
use tqkv_candle::{Calibration, Message, SequenceCache};

/// What is kept beside the cache.
#[derive(Serialize, Deserialize, Default)]
pub struct Session {
    /// All tokens, of which the cache may lack the last.
    pub tokens: Vec<u32>,
    /// The conversation, if it is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub messages: Vec<Message>,
    /// The calibration that was made of the prompt, as hexadecimal digits of its file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    center: Option<String>,
}

impl Session {
    pub fn new(tokens: Vec<u32>, messages: Vec<Message>) -> Self {
        Self { tokens, messages, center: None }
    }

    /// Keeps the calibration too, if it was made of the prompt and is in no file of its own.
    pub fn centered(mut self, center: Option<&Calibration>) -> Result<Self> {
        let hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        self.center = center.map(|center| anyhow::Ok(hex(center.to_bytes()?))).transpose()?;
        Ok(self)
    }

    /// The calibration that was kept.
    pub fn center(&self) -> Result<Option<Calibration>> {
        let Some(hex) = &self.center else { return Ok(None) };
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair)?, 16).map_err(anyhow::Error::from);
        let bytes: Vec<u8> = hex.as_bytes().chunks(2).map(byte).collect::<Result<_>>().context("center")?;
        Ok(Some(Calibration::from_bytes(&bytes).context("center")?))
    }

    /// What a file holds, and the codecs of its cache, if they are the same in all layers.
    pub fn open(path: &Path) -> Result<(Self, Option<CacheCodec>)> {
        let snapshot = Snapshot::open(path)?;
        let session: Self = serde_json::from_slice(snapshot.note())
            .with_context(|| format!("{} was not saved by tqkv generate or chat", path.display()))?;
        let lens: Vec<_> = snapshot.lens().collect();
        let known = matches!(lens[..], [len] if len > 0 && (len..=len + 1).contains(&session.tokens.len()));
        ensure!(known, "{} holds {lens:?} positions, expected one sequence as long as its tokens", path.display());
        let mut codecs = snapshot.geometry().layers.iter().map(codec);
        let first = codecs.next();
        Ok((session, first.filter(|first| codecs.all(|codec| codec == *first))))
    }

    pub fn write(&self, cache: &SequenceCache, path: &Path, model: &str) -> Result<()> {
        let note = serde_json::to_vec(self)?;
        Ok(cache.save(path, Label { model: model.as_bytes(), note: &note })?)
    }
}

fn codec(layer: &LayerGeometry) -> CacheCodec {
    let pair = |key: RowFormat, value: RowFormat| CodecPair { key: key.codec(), value: value.codec() };
    let mut codec = CacheCodec::from(pair(layer.key, layer.value));
    let apart = |part: ExtentGeometry| (part.positions, pair(part.key, part.value));
    codec.sinks = layer.sinks.map(apart).map(|(positions, codec)| Sinks { positions, codec });
    codec.recent = layer.recent.map(apart).map(|(positions, codec)| Recent { positions, codec });
    codec
}
