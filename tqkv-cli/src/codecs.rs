//! Codecs as arguments.

use crate::output;
use tqkv::{Codec, CodecPair};

/// What `demo` and `eval` compare unless told otherwise.
pub const USUAL: [&str; 8] = ["f16", "seed4", "seed8", "k8v8", "k6v6", "k5v4", "k4v4", "k3v3"];

/// What `auto` is.
pub const RECOMMENDED: CodecPair = CodecPair { key: Codec::tq(5), value: Codec::tq(4) };

/// Help for a list of codecs.
pub const HELP: &str = "Codecs, separated by commas: f32, f16, seed4, seed5, seed6, seed8, or kXvY with X bits for keys \
                        and Y for values (2 to 8)";

/// The same, with what is compared unless told otherwise.
pub fn help() -> String {
    format!("{HELP} [default: {}]", USUAL.join(","))
}

/// For clap: names that are unknown are an error that lists the known ones.
pub fn parse(name: &str) -> tqkv::Result<CodecPair> {
    name.parse()
}

/// The usual codecs that exist for vectors of this size; says on standard error which do not.
pub fn usual(head_dim: usize) -> Vec<CodecPair> {
    let mut codecs = Vec::new();
    for name in USUAL {
        match parse(name).and_then(|codec| codec.bits_per_element(head_dim).map(|_| codec)) {
            Ok(codec) => codecs.push(codec),
            Err(error) => output::note(&format!("{name} is left out: {error}")),
        }
    }
    codecs
}

/// A codec, or the recommended one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Choice {
    Auto,
    Codec(CodecPair),
}

impl Choice {
    /// The codec; with `auto` that of a file to go on with, if there is one, else the recommended one.
    pub fn unwrap_or(self, of_file: Option<CodecPair>) -> CodecPair {
        match self {
            Self::Codec(codec) => codec,
            Self::Auto => of_file.unwrap_or(RECOMMENDED),
        }
    }
}

/// For clap.
pub fn parse_choice(name: &str) -> tqkv::Result<Choice> {
    if name == "auto" { Ok(Choice::Auto) } else { parse(name).map(Choice::Codec) }
}
