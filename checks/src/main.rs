//! The soak test, and the inputs that fuzzers start from.

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use std::process::ExitCode;
use tqkv_checks::{soak, targets};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Does random things to caches and compares all that they give with a plain model and the reference.
    Soak(soak::Soak),
    /// Writes the inputs that fuzzers start from to a folder for each target.
    Seeds {
        /// Where the folders are, or will be.
        folder: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        Command::Soak(soak) => soak.run(),
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
