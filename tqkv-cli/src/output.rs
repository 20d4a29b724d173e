//! What the program prints, and where: results on standard output, all else on standard error.

use anyhow::{Context, Result, ensure};
use comfy_table::{CellAlignment, Table, presets};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;

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
    note(&format!("error: {}", causes(error.chain())));
}

/// An error and what caused it. Some crates say the cause in the error too: it is not said again.
fn causes<'a>(chain: impl Iterator<Item = &'a (dyn std::error::Error + 'static)>) -> String {
    let mut text = String::new();
    for cause in chain.map(ToString::to_string) {
        if !text.ends_with(&cause) {
            text += if text.is_empty() { "" } else { ": " };
            text += &cause;
        }
    }
    text
}

/// Fails unless a file can be written, or made, under this name. A file that is there is not changed.
pub fn expect_writable(path: &Path) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    match path.try_exists().with_context(context)? {
        true => OpenOptions::new().append(true).open(path).map(drop).with_context(context),
        false => expect_new_file(path),
    }
}

/// Fails unless a file can be put under this name in place of what is there.
pub fn expect_replaceable(path: &Path) -> Result<()> {
    ensure!(!path.is_dir(), "cannot write {}: it is a directory", path.display());
    expect_new_file(path)
}

/// Fails unless new files can be made beside this one, and it has a name.
fn expect_new_file(path: &Path) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    ensure!(path.file_name().is_some(), "cannot write {}: expected the name of a file", path.display());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let made = tempfile::Builder::new().prefix(".tqkv").tempfile_in(dir);
    // Without the name of the file that was tried.
    made.map(drop).map_err(|e| std::io::Error::from(e.kind())).with_context(context)
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

/// A sign that something takes its time; invisible unless standard error is a terminal.
pub fn spinner(what: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(std::time::Duration::from_millis(100));
    spinner
}

/// A question beside the results, without an end of line.
pub fn ask(text: &str) {
    let mut out = std::io::stderr();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
}

/// A number of bytes for people.
pub fn bytes(n: usize) -> String {
    indicatif::BinaryBytes(n as u64).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer: {source}")]
    struct Twice {
        source: std::io::Error,
    }

    #[test]
    fn a_cause_is_printed_once() {
        let error = || anyhow::Error::from(Twice { source: std::io::Error::other("inner") });
        assert_eq!(causes(error().chain()), "outer: inner");
        assert_eq!(causes(error().context("while testing").chain()), "while testing: outer: inner");
        assert_eq!(causes(anyhow::anyhow!("inner").context("outer").chain()), "outer: inner");
    }

    #[test]
    fn files_are_looked_at_without_being_touched() {
        let dir = tempfile::tempdir().unwrap();
        let (there, new) = (dir.path().join("there"), dir.path().join("new"));
        std::fs::write(&there, "text").unwrap();
        for path in [&there, &new] {
            expect_writable(path).unwrap();
            expect_replaceable(path).unwrap();
        }
        assert_eq!(std::fs::read_to_string(&there).unwrap(), "text");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        for path in [dir.path(), &there.join("x"), &new.join("x"), Path::new("/"), Path::new("")] {
            let error = format!("{:#}", expect_writable(path).unwrap_err());
            assert!(error.starts_with(&format!("cannot write {}: ", path.display())), "{error}");
            assert!(expect_replaceable(path).is_err(), "{}", path.display());
        }
    }
}
