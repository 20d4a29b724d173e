//! Source files, and what of them is the product.

use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Every source file of a folder, in order.
pub fn sources(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = vec![];
    collect(folder, &mut files)?;
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|e| ["rs", "cu", "cuh", "wgsl"].iter().any(|&own| e == own)) {
            files.push(path);
        }
    }
    Ok(())
}

/// Whether a file is of tests only.
pub fn is_test(file: &Path) -> bool {
    let name = |part: &std::ffi::OsStr| part.to_string_lossy().trim_end_matches(".rs").to_owned();
    file.iter().map(name).any(|part| part == "tests" || part.ends_with("_tests"))
}

/// A text without lines of comments and without the tests at its end.
pub fn product(text: &str) -> String {
    let text = text.split("\n#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    text.lines().filter(|l| !l.trim_start().starts_with("//")).flat_map(|l| [l, "\n"]).collect()
}
