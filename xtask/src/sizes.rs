//! No source file is long. (Clippy holds the length of functions in Rust.)

use crate::sources::sources;
use anyhow::{Result, bail};
use std::path::Path;

/// Lines of a file.
const MOST: usize = 600;

/// Fails with every file that has more.
pub fn check(root: &Path) -> Result<String> {
    let (mut wrong, mut count) = (vec![], 0);
    for krate in std::fs::read_dir(root)? {
        let krate = krate?.path();
        if !krate.join("Cargo.toml").exists() {
            continue;
        }
        for folder in ["src", "tests", "benches"].map(|name| krate.join(name)).iter().filter(|f| f.exists()) {
            for file in sources(folder)? {
                let lines = std::fs::read_to_string(&file)?.lines().count();
                if lines > MOST {
                    wrong.push(format!("{}: {lines} lines", file.strip_prefix(root)?.display()));
                }
                count += 1;
            }
        }
    }
    if !wrong.is_empty() {
        bail!("expected at most {MOST} lines a source file:\n{}", wrong.join("\n"));
    }
    Ok(format!("{count} source files of at most {MOST} lines"))
}
