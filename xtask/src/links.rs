//! Links between the pages of the repository.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Fails if a page links to a file that is not there.
pub fn check(root: &Path) -> Result<String> {
    let listed = Command::new("git").args(["ls-files", "*.md"]).current_dir(root).output().context("git ls-files")?;
    ensure!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let pages: Vec<PathBuf> = String::from_utf8(listed.stdout)?.lines().map(PathBuf::from).collect();
    let (mut count, mut broken) = (0, vec![]);
    for page in &pages {
        let folder = page.parent().unwrap_or(Path::new(""));
        for target in targets(&fs::read_to_string(root.join(page))?) {
            count += 1;
            if !root.join(folder).join(&target).exists() {
                broken.push(format!("{}: {target}", page.display()));
            }
        }
    }
    ensure!(broken.is_empty(), "links to nothing:\n{}", broken.join("\n"));
    Ok(format!("{count} links in {} pages lead somewhere", pages.len()))
}

/// Files that a page links to, by their paths from its folder.
fn targets(page: &str) -> Vec<String> {
    let prose: Vec<&str> = page.split("```").step_by(2).collect();
    let links = prose.iter().flat_map(|text| text.split("](").skip(1)).filter_map(|rest| rest.split(')').next());
    let files =
        links.filter(|link| !link.contains("://") && !link.starts_with('#') && !link.contains(char::is_whitespace));
    files.map(|link| link.split('#').next().unwrap_or(link).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found() {
        let page = "[a](b.md), ![c](d/e.svg) and [f](https://g), [h](#i), [j](k.md#l)\n```text\n[m](n)\n```\n[o](p.md)";
        assert_eq!(targets(page), ["b.md", "d/e.svg", "k.md", "p.md"]);
    }
}
