//! The order of the library's modules, held: no import runs up the list, and no files import each other in a circle.

use crate::sources::{is_test, product, sources};
use anyhow::{Result, bail};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each knows only those before it. `open` is the one file that names every backend.
const LAYERS: [&str; 10] =
    ["error", "format", "reference", "compute", "problem", "backend", "open", "ops", "cache", "mlx"];

/// A module by its path: `["cache", "snapshot", "header"]`.
type Module = Vec<String>;

/// Fails with every violation.
pub fn check(root: &Path) -> Result<String> {
    let src = root.join("tqkv/src");
    let files = sources(&src)?.into_iter().filter(|file| file.extension().is_some_and(|e| e == "rs"));
    let names: BTreeMap<Module, PathBuf> =
        files.filter_map(|file| Some((module(file.strip_prefix(&src).ok()?)?, file))).collect();
    let mut imports: BTreeMap<&Module, BTreeSet<&Module>> = BTreeMap::new();
    let mut wrong = vec![];
    for (name, file) in &names {
        let text = code(&fs::read_to_string(file)?);
        for path in paths(&text, name) {
            let Some(target) = (1..=path.len()).rev().find_map(|n| names.get_key_value(&path[..n])).map(|(m, _)| m)
            else {
                continue;
            };
            if target == name {
                continue;
            }
            imports.entry(name).or_default().insert(target);
            match (layer(name), layer(target)) {
                (Some(own), Some(other)) if other > own => {
                    wrong.push(format!("{} imports {}, which is above it", name.join("::"), target.join("::")));
                }
                (_, None) => wrong.push(format!("{} is in no layer", target[0])),
                _ => {}
            }
        }
    }
    wrong.extend(circles(&imports));
    wrong.sort();
    wrong.dedup();
    if !wrong.is_empty() {
        bail!("layers: {}\n{}", LAYERS.join(", "), wrong.join("\n"));
    }
    Ok(format!("{} files in {} layers: no import runs up, none in a circle", names.len(), LAYERS.len()))
}

fn layer(module: &Module) -> Option<usize> {
    LAYERS.iter().position(|l| *l == module[0])
}

/// None for the crate's root and for tests, which may import anything.
fn module(file: &Path) -> Option<Module> {
    let mut parts: Vec<String> = file.with_extension("").iter().map(|p| p.to_string_lossy().into_owned()).collect();
    if parts.last().is_some_and(|p| p == "mod") {
        parts.pop();
    }
    (!is_test(file) && parts != ["lib"]).then_some(parts)
}

/// The product's part of a file without re-exports.
fn code(text: &str) -> String {
    let text = product(text);
    let mut lines = text.lines();
    let mut out = String::new();
    while let Some(line) = lines.next() {
        let reexport = line.starts_with("pub") && line.contains(" use ") || line.starts_with("pub use ");
        if !reexport {
            out.push_str(line);
            out.push('\n');
        } else if !line.contains(';') {
            lines.by_ref().find(|l| l.contains(';'));
        }
    }
    out
}

/// The module paths that a file names, `use` trees flattened.
fn paths(text: &str, name: &Module) -> Vec<Module> {
    let mut found = vec![];
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in text.match_indices(start) {
            let fresh = !text[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':');
            if fresh && !text[..at].ends_with("$") {
                tree(&text[at..], vec![], &mut found);
            }
        }
    }
    found.into_iter().filter_map(|path| absolute(path, name)).collect()
}

/// Reads `a::b::{c, d::e}` into its paths.
fn tree(text: &str, mut prefix: Module, found: &mut Vec<Module>) -> usize {
    let mut at = 0;
    loop {
        let rest = &text[at..];
        let word = rest.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(rest.len());
        if word == 0 {
            if rest.starts_with('{') {
                at += 1;
                loop {
                    at += text[at..].find(|c: char| !c.is_whitespace() && c != ',').unwrap_or(text.len() - at);
                    if text[at..].starts_with('}') || at >= text.len() {
                        return at + 1;
                    }
                    let read = tree(&text[at..], prefix.clone(), found);
                    at += read.max(1);
                }
            }
            found.push(prefix);
            return at;
        }
        prefix.push(rest[..word].to_owned());
        at += word;
        if !text[at..].starts_with("::") {
            found.push(prefix);
            return at;
        }
        at += 2;
    }
}

fn absolute(path: Module, name: &Module) -> Option<Module> {
    let mut base = name.clone();
    let mut rest = &path[..];
    if rest.first().is_some_and(|p| p == "crate") {
        return Some(rest[1..].to_vec()).filter(|p| !p.is_empty());
    }
    while let Some((first, more)) = rest.split_first() {
        match first.as_str() {
            "super" => {
                base.pop();
            }
            "self" => {}
            _ => break,
        }
        rest = more;
    }
    base.extend(rest.iter().cloned());
    Some(base).filter(|b| !b.is_empty())
}

/// One line for each circle of files.
fn circles(imports: &BTreeMap<&Module, BTreeSet<&Module>>) -> Vec<String> {
    let reach = |from: &Module| {
        let (mut seen, mut next) = (BTreeSet::new(), vec![from]);
        while let Some(at) = next.pop() {
            for &to in imports.get(at).into_iter().flatten() {
                if seen.insert(to) {
                    next.push(to);
                }
            }
        }
        seen
    };
    let all: BTreeMap<&Module, BTreeSet<&Module>> = imports.keys().map(|&m| (m, reach(m))).collect();
    let mut found = BTreeSet::new();
    for (&name, reached) in &all {
        if reached.contains(name) {
            let circle: Vec<String> = reached
                .iter()
                .filter(|m| all.get(**m).is_some_and(|r| r.contains(name)))
                .map(|m| m.join("::"))
                .collect();
            found.insert(format!("a circle: {}", circle.join(", ")));
        }
    }
    found.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(path: &str) -> Module {
        path.split("::").map(str::to_owned).collect()
    }

    #[test]
    fn use_trees_are_flattened() {
        let text = "use crate::a::{self, b::C, d::{E, F}};\nlet x = super::g::h(1);\nuse std::fmt;";
        let got = paths(text, &module("m::n"));
        let want = ["a::self", "a::b::C", "a::d::E", "a::d::F", "m::g::h"].map(module);
        assert_eq!(got, want);
    }

    #[test]
    fn tests_comments_and_reexports_do_not_count() {
        let text = "// crate::x\npub use crate::y;\npub(crate) use crate::{\n    z,\n};\nuse crate::w;\n#[cfg(test)]\nmod tests {\n    use crate::v;\n}\n";
        assert_eq!(paths(&code(text), &module("m")), [module("w")]);
    }

    #[test]
    fn circles_are_found() {
        let [a, b, c, d] = ["a", "b", "c", "d"].map(module);
        let imports = BTreeMap::from([
            (&a, BTreeSet::from([&b])),
            (&b, BTreeSet::from([&c])),
            (&c, BTreeSet::from([&a])),
            (&d, BTreeSet::from([&a])),
        ]);
        assert_eq!(circles(&imports), ["a circle: a, b, c"]);
    }
}
