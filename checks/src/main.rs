//! The soak test, what large caches take, and the inputs that fuzzers start from.

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv_checks::{scale, soak, targets};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Does random things to caches and compares all that they give with a plain model and the reference.
    Soak(soak::Soak),
    /// Prints what operations take over the size of a cache, and streams a snapshot that is larger than memory.
    Scale(scale::Scale),
    /// Writes the inputs that fuzzers start from to a folder for each target.
    Seeds {
        /// Where the folders are, or will be.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Soak(soak) => soak.run(),
        Command::Scale(scale) => scale.run(),
        Command::Seeds { folder } => targets::write_seeds(&folder).map_err(|e| format!("{}: {e}", folder.display())),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}
