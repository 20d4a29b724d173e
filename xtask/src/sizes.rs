//! No source file is long, and no function of CUDA's. (Clippy holds the length of functions in Rust.)

use crate::sources::sources;
use anyhow::{Result, bail};
use std::path::Path;

/// Lines of a file, and of a function.
const FILE: usize = 600;
const FUNCTION: usize = 100;

/// Fails with everything that is longer.
pub fn check(root: &Path) -> Result<String> {
    let (mut wrong, mut count) = (vec![], 0);
    for krate in std::fs::read_dir(root)? {
        let krate = krate?.path();
        if !krate.join("Cargo.toml").exists() {
            continue;
        }
        for folder in ["src", "tests", "benches"].map(|name| krate.join(name)).iter().filter(|f| f.exists()) {
            for file in sources(folder)? {
                let text = std::fs::read_to_string(&file)?;
                let (name, lines) = (file.strip_prefix(root)?.display(), text.lines().count());
                if lines > FILE {
                    wrong.push(format!("{name}: {lines} lines"));
                }
                if file.extension().is_some_and(|e| e == "cu" || e == "cuh") {
                    let long = functions(&text).into_iter().filter(|f| f.1 > FUNCTION);
                    wrong.extend(long.map(|(line, lines)| format!("{name}:{line}: a function of {lines} lines")));
                }
                count += 1;
            }
        }
    }
    if !wrong.is_empty() {
        bail!("expected at most {FILE} lines a file and {FUNCTION} a function:\n{}", wrong.join("\n"));
    }
    Ok(format!("{count} source files of at most {FILE} lines; functions of at most {FUNCTION}"))
}

/// The first line and the number of lines of each function of a CUDA text, which ends where a brace has its indentation.
fn functions(text: &str) -> Vec<(usize, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let begins = |line: &str| line.ends_with('{') && (line.contains("DEVICE ") || line.contains("__global__ "));
    let length = |at: usize| {
        let end = format!("{}}}", &lines[at][..lines[at].len() - lines[at].trim_start().len()]);
        lines[at..].iter().position(|line| *line == end).map_or(0, |n| n + 1)
    };
    (0..lines.len()).filter(|&at| begins(lines[at])).map(|at| (at + 1, length(at))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_end_at_their_own_brace() {
        let text = "struct S {\n    DEVICE int f() {\n        if (x) {\n        }\n    }\n};\nDEVICE int g() { return 1; }\n__global__ void h() {\n}\n";
        assert_eq!(functions(text), [(2, 4), (8, 2)]);
    }
}
