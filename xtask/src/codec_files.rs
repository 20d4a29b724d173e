//! The list of `docs/adding-a-codec.md`, held: the files that name one codec are those that the list says, and few.

use crate::sources::{is_test, product, sources};
use anyhow::{Result, bail, ensure};
use std::collections::BTreeSet;
use std::path::Path;

/// The native codec with 3 bits, whose codes lie in planes, as Rust, CUDA and WGSL name it.
const NAMES: [&str; 4] = ["Native", "Planes", "planes", "PACK_PLANES"];

/// A codec touches no more files than this.
const MOST: usize = 12;

const LIST: &str = "docs/adding-a-codec.md";

/// Fails with every file that is in one of the two only.
pub fn check(root: &Path) -> Result<String> {
    let listed = listed(&std::fs::read_to_string(root.join(LIST))?);
    ensure!(!listed.is_empty(), "{LIST} has no table of files");
    let src = root.join("tqkv/src");
    let mut naming = BTreeSet::new();
    for file in sources(&src)? {
        let name = file.strip_prefix(&src)?.to_string_lossy().replace('\\', "/");
        if !is_test(&file) && names_codec(&std::fs::read_to_string(&file)?) {
            naming.insert(name);
        }
    }
    let mut wrong: Vec<String> =
        naming.difference(&listed).map(|f| format!("{f} names it but is not listed")).collect();
    wrong.extend(listed.difference(&naming).map(|f| format!("{f} is listed but does not name it")));
    if listed.len() > MOST {
        wrong.push(format!("{} files, expected at most {MOST}", listed.len()));
    }
    if !wrong.is_empty() {
        bail!("the codec of {LIST} ({}):\n{}", NAMES.join(", "), wrong.join("\n"));
    }
    Ok(format!("{} files name the codec of {LIST}, which lists them (at most {MOST})", listed.len()))
}

/// The paths of the table whose rows are ``| 1 | `path` | …``.
fn listed(text: &str) -> BTreeSet<String> {
    let row = |line: &str| {
        let mut cells = line.strip_prefix('|')?.split('|').map(str::trim);
        cells.next()?.parse::<usize>().ok()?;
        Some(cells.next()?.split('`').nth(1)?.to_owned())
    };
    text.lines().filter_map(row).collect()
}

fn names_codec(text: &str) -> bool {
    product(text).split(|c: char| !(c.is_alphanumeric() || c == '_')).any(|word| NAMES.contains(&word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_are_read() {
        let text =
            "| | file | says |\n|---|---|---|\n| 1 | `a/b.rs` | `X` |\n| 12 | `c.cuh` (`d`) | |\n| part | `e.rs` | |\n";
        assert_eq!(listed(text).into_iter().collect::<Vec<_>>(), ["a/b.rs", "c.cuh"]);
    }

    #[test]
    fn words_name_a_codec_and_comments_do_not() {
        assert!(names_codec("    Packing::Planes => 4,"));
        assert!(names_codec("#include \"codec/planes.cuh\""));
        assert!(!names_codec("// planes\nlet biplanes = 2;\n#[cfg(test)]\nmod tests {\n    use Planes;\n}\n"));
    }
}
