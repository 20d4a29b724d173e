//! The `tqkv` program.

mod batch;
mod codecs;
mod commands;
#[cfg(test)]
mod guide;
mod interrupt;
mod language;
mod output;
mod plot;
mod session;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// LLM KV caches that stay compressed (TurboQuant), attended over directly.
#[derive(Parser)]
#[command(version, about)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(commands::demo::Demo),
    Devices(commands::devices::Devices),
    Verify(commands::verify::Verify),
    Calibrate(commands::calibrate::Calibrate),
    Eval(commands::eval::Eval),
    Generate(commands::generate::Generate),
    Chat(commands::chat::Chat),
    Bench(commands::bench::Bench),
    Snapshot(commands::snapshot::Command),
}

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("TQKV_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let result = match Arguments::parse().command {
        Command::Demo(command) => command.run(),
        Command::Devices(command) => command.run(),
        Command::Verify(command) => command.run(),
        Command::Calibrate(command) => command.run(),
        Command::Eval(command) => command.run(),
        Command::Generate(command) => command.run(),
        Command::Chat(command) => command.run(),
        Command::Bench(command) => command.run(),
        Command::Snapshot(command) => command.run(),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            output::report(&error);
            ExitCode::FAILURE
        }
    }
}
