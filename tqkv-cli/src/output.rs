//! What the program prints, and where: results on standard output, all else on standard error.

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::Write;

/// Writes to standard output at once. Unlike `print!` it returns an error when the reader has gone.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("cannot write to standard output")
}

/// One line of JSON.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    print(&(serde_json::to_string(value)? + "\n"))
}

/// A note beside the results. Nobody may be reading, which is no error.
pub fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// What ended the program.
pub fn report(error: &anyhow::Error) {
    note(&format!("error: {error:#}"));
}

/// A table whose columns after the first are numbers.
pub fn table<const N: usize>(header: [&str; N], rows: impl IntoIterator<Item = [String; N]>) -> String {
    let mut table = Table::new();
    table.load_style(presets::UTF8_FULL_CONDENSED).set_header(header).add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    format!("{table}\n")
}

/// A progress bar; invisible unless standard error is a terminal.
pub fn progress(what: &'static str, length: usize) -> Result<ProgressBar> {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}, {eta} left")?;
    let bar = ProgressBar::new(length as u64).with_style(style).with_message(what);
    bar.tick();
    Ok(bar)
}

/// A number of bytes for people.
pub fn bytes(n: usize) -> String {
    indicatif::BinaryBytes(n as u64).to_string()
}
