//! `tqkv snapshot`

use crate::output;
use anyhow::{Result, bail};
use serde::Serialize;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use tqkv::cache::LayerKind;
use tqkv::format::RowFormat;
use tqkv::{CodecPair, Snapshot};

/// Looks at saved caches
#[derive(clap::Args)]
pub struct Command {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Say what a saved cache holds, from its header alone
    Inspect(File),
    /// Compare every byte of a saved cache with its checksums; exit status 1 if it is damaged
    Verify(File),
}

#[derive(clap::Args)]
struct File {
    /// The file
    #[arg(value_name = "F")]
    file: PathBuf,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    file: String,
    bytes: u64,
    model: String,
    note_bytes: usize,
    page_size: usize,
    layers: Vec<Layer>,
    pages: usize,
    sequences: Vec<usize>,
}

#[derive(Serialize, PartialEq)]
struct Layer {
    kv_heads: usize,
    head_dim: usize,
    codec: String,
    kind: String,
    sinks: usize,
    sink_codec: Option<String>,
}

#[derive(Serialize)]
struct Verdict {
    file: String,
    whole: bool,
    error: Option<String>,
}

impl Command {
    pub fn run(self) -> Result<ExitCode> {
        match self.action {
            Action::Inspect(File { file, json }) => inspect(&file, json),
            Action::Verify(File { file, json }) => verify(&file, json),
        }
    }
}

fn inspect(file: &Path, json: bool) -> Result<ExitCode> {
    let snapshot = Snapshot::open(file)?;
    let geometry = snapshot.geometry();
    let codec = |key: RowFormat, value: RowFormat| CodecPair { key: key.codec(), value: value.codec() }.to_string();
    let layer = |layer: &tqkv::cache::LayerGeometry| Layer {
        kv_heads: layer.kv_heads,
        head_dim: layer.key.head_dim(),
        codec: codec(layer.key, layer.value),
        kind: match layer.kind {
            LayerKind::Full => "full".to_owned(),
            LayerKind::Window(window) => format!("window of {window}"),
            LayerKind::Shared(with) => format!("shared with layer {with}"),
        },
        sinks: layer.sinks.map_or(0, |s| s.positions),
        sink_codec: layer.sinks.map(|s| codec(s.key, s.value)),
    };
    let report = Report {
        file: file.display().to_string(),
        bytes: snapshot.bytes(),
        model: String::from_utf8_lossy(snapshot.fingerprint()).into_owned(),
        note_bytes: snapshot.note().len(),
        page_size: geometry.page_size,
        layers: geometry.layers.iter().map(layer).collect(),
        pages: snapshot.pages().count(),
        sequences: snapshot.lens().collect(),
    };
    if json {
        output::print_json(&report)?;
    } else {
        output::print(&report.text()?)?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Report {
    fn text(&self) -> Result<String> {
        let mut text = String::new();
        writeln!(text, "{}: {}", self.file, output::bytes(usize::try_from(self.bytes).unwrap_or(usize::MAX)))?;
        writeln!(text, "model      {}", self.model)?;
        writeln!(text, "geometry   pages of {}", self.page_size)?;
        // Layers that are alike in one line.
        let mut first = 0;
        for run in self.layers.chunk_by(|a, b| a == b) {
            let last = first + run.len() - 1;
            let numbers = if first == last { format!("{first}") } else { format!("{first}-{last}") };
            let Layer { kv_heads, head_dim, codec, kind, sinks, sink_codec } = &run[0];
            write!(text, "layers     {numbers}: {kv_heads} KV heads of {head_dim}, {codec}, {kind}")?;
            match sink_codec {
                Some(codec) => writeln!(text, ", {sinks} sinks in {codec}")?,
                None => writeln!(text)?,
            }
            first += run.len();
        }
        let lens: Vec<_> = self.sequences.iter().map(usize::to_string).collect();
        writeln!(text, "sequences  {} of {} positions", lens.len(), lens.join(", "))?;
        writeln!(text, "pages      {}", self.pages)?;
        writeln!(text, "note       {} bytes", self.note_bytes)?;
        Ok(text)
    }
}

fn verify(file: &Path, json: bool) -> Result<ExitCode> {
    let error = Snapshot::verify(file).err();
    let whole = error.is_none();
    let file = file.display().to_string();
    if json {
        output::print_json(&Verdict { file, whole, error: error.map(|e| e.to_string()) })?;
    } else {
        match error {
            None => output::print(&format!("{file} is whole\n"))?,
            Some(error) => bail!("{file}: {error}"),
        }
    }
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
