//! Codecs as arguments.

use tqkv::CodecPair;

/// What `demo` and `eval` compare unless told otherwise.
pub const USUAL: [&str; 8] = ["f16", "seed4", "seed8", "k8v8", "k6v6", "k5v4", "k4v4", "k3v3"];

/// Help for a list of codecs.
pub const HELP: &str = "Codecs, separated by commas: f32, f16, seed4, seed5, seed6, seed8, or kXvY with X bits for keys \
                        and Y for values (2 to 8)";

/// For clap: names that are unknown are an error that lists the known ones.
pub fn parse(name: &str) -> tqkv::Result<CodecPair> {
    name.parse()
}
