//! Codecs as arguments.

use crate::output;
use tqkv::cache::CacheCodec;
use tqkv::{Codec, CodecPair};
use tqkv_candle::Peer;

/// What `demo` and `eval` compare unless told otherwise.
pub const USUAL: [&str; 8] = ["f16", "seed4", "seed8", "k8v8", "k6v6", "k5v4", "k4v4", "k3v3"];

/// What `auto` is.
pub const RECOMMENDED: CodecPair = CodecPair { key: Codec::tq(5), value: Codec::tq(4) };

/// Help for a list of codecs.
pub const HELP: &str = "Codecs, separated by commas: f32, f16, seed4, seed5, seed6, seed8, or kXvY with X bits for keys \
                        and Y for values (2 to 8); the first N positions in another with +sN and a codec, the newest N \
                        with +rN, as in k4v4+s1f16+r64k8v8";

/// The same, with other projects' formats, and what is compared unless told otherwise.
pub fn help() -> String {
    let peers: Vec<_> = Peer::names().collect();
    format!(
        "{HELP}; auto for what the calibration found best; other projects', emulated on the CPU: {} [default: {}]",
        peers.join(", "),
        USUAL.join(",")
    )
}

/// What `eval` compares.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Compared {
    Cache(Choice),
    Peer(Peer),
}

impl std::fmt::Display for Compared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cache(codec) => codec.fmt(f),
            Self::Peer(peer) => peer.fmt(f),
        }
    }
}

/// For clap.
pub fn parse_compared(name: &str) -> tqkv::Result<Compared> {
    name.parse().map_or_else(|_| parse_choice(name).map(Compared::Cache), |peer| Ok(Compared::Peer(peer)))
}

/// For clap: names that are unknown are an error that lists the known ones.
pub fn parse(name: &str) -> tqkv::Result<CacheCodec> {
    name.parse()
}

/// The usual codecs that exist for vectors of this size; says on standard error which do not.
pub fn usual(head_dim: usize) -> Vec<CacheCodec> {
    let mut codecs = Vec::new();
    for name in USUAL {
        match parse(name).and_then(|codec| codec.all.bits_per_element(head_dim).map(|_| codec)) {
            Ok(codec) => codecs.push(codec),
            Err(error) => output::note(&format!("{name} is left out: {error}")),
        }
    }
    codecs
}

/// A codec, or what is best for the model: its calibration's plan, if it has one, else the recommended codec.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice {
    Auto,
    Codec(CacheCodec),
}

impl Choice {
    /// With `auto` the codec of a file to go on with, if there is one.
    pub fn or(self, of_file: Option<CacheCodec>) -> Self {
        match self {
            Self::Auto => of_file.map_or(Self::Auto, Self::Codec),
            codec => codec,
        }
    }
}

impl<T: Into<CacheCodec>> From<T> for Choice {
    fn from(codec: T) -> Self {
        Self::Codec(codec.into())
    }
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => write!(f, "auto"),
            Self::Codec(codec) => codec.fmt(f),
        }
    }
}

/// For clap.
pub fn parse_choice(name: &str) -> tqkv::Result<Choice> {
    if name == "auto" { Ok(Choice::Auto) } else { parse(name).map(Choice::Codec) }
}
