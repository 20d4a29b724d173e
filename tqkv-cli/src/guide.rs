//! Commands in the guide are commands of this program.

use crate::Arguments;
use clap::{CommandFactory, Parser};
use std::path::{Path, PathBuf};

/// Calls of the program in a page: lines of code blocks, with their continuations, and those within text.
#[derive(Debug, Default, PartialEq)]
struct Calls {
    lines: Vec<String>,
    /// Often only the options that the text is about.
    spans: Vec<String>,
}

impl Calls {
    fn of(page: &str) -> Self {
        let program = Arguments::command();
        let is_call = |code: &str| {
            let mut words = code.split_whitespace();
            words.next() == Some("tqkv") && words.next().is_some_and(|name| program.find_subcommand(name).is_some())
        };
        let mut calls = Self::default();
        for line in page.replace("\\\n", " ").lines() {
            let code = line.trim_start().trim_start_matches("$ ");
            if is_call(code) {
                calls.lines.push(code.split(" #").next().unwrap_or(code).trim().to_owned());
            } else {
                calls.spans.extend(line.split('`').skip(1).step_by(2).filter(|code| is_call(code)).map(str::to_owned));
            }
        }
        calls
    }
}

fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let docs = std::fs::read_dir(root.join("docs")).unwrap().map(|entry| entry.unwrap().path());
    // The lab book tells what was called in its time.
    let docs = docs.filter(|path| path.extension().is_some_and(|e| e == "md") && !path.ends_with("lab-book.md"));
    docs.chain([root.join("README.md"), root.join("tqkv-cli/README.md")]).collect()
}

#[test]
fn every_call_in_the_guide_is_understood() {
    let program = Arguments::command();
    let (mut lines, mut options) = (0, 0);
    for path in pages() {
        let calls = Calls::of(&std::fs::read_to_string(&path).unwrap());
        for call in &calls.lines {
            match Arguments::try_parse_from(call.split_whitespace()) {
                Err(error) if error.use_stderr() => panic!("{}: {call}\n{error}", path.display()),
                _ => lines += 1,
            }
        }
        for call in &calls.spans {
            let command = call.split_whitespace().nth(1).and_then(|name| program.find_subcommand(name)).unwrap();
            for option in call.split_whitespace().filter_map(|word| word.strip_prefix("--")) {
                let known = command.get_arguments().any(|a| a.get_long() == Some(option));
                assert!(known, "{}: `{call}`: no option --{option}", path.display());
                options += 1;
            }
        }
    }
    assert!(lines >= 8 && options >= 20, "{lines} lines, {options} options");
}

#[test]
fn calls_are_found() {
    let page =
        "`tqkv eval --model M`, `tqkv`\ntqkv is\n\n    tqkv bench --op \\\n      step # why\n```sh\n$ tqkv demo\n```\n";
    let calls = Calls::of(page);
    assert_eq!(calls.spans, ["tqkv eval --model M"]);
    assert_eq!(calls.lines, ["tqkv bench --op        step", "tqkv demo"]);
}
