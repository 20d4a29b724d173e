//! `tqkv generate --save/--load` and `tqkv snapshot`.

use serde_json::Value;
use std::process::{Command, Output};
use tempfile::tempdir;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/byte-llama-4m");

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tqkv")).args(arguments).output().unwrap()
}

fn json(arguments: &[&str]) -> Value {
    let output = run(&[arguments, &["--json"]].concat());
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn fails(arguments: &[&str], word: &str) {
    let output = run(arguments);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{arguments:?}: {error}");
    assert!(error.contains(word) && !error.contains("panicked"), "{arguments:?}: {error}");
}

fn generate(more: &[&str]) -> Value {
    json(&[&["generate", "--model", MODEL, "--temperature", "0"], more].concat())
}

#[test]
fn a_saved_generation_goes_on_as_if_it_had_never_stopped() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("chat.tqkv");
    let file = path.to_str().unwrap();
    let prompt = ["--prompt", "## Motivation\n\nThe"];
    let text = |report: &Value| report["text"].as_str().unwrap().to_owned();
    for codec in ["k5v4", "seed4"] {
        let whole = text(&generate(&[&prompt[..], &["--max-tokens", "90", "--codec", codec]].concat()));
        let mut parts =
            text(&generate(&[&prompt[..], &["--max-tokens", "41", "--codec", codec, "--save", file]].concat()));
        // The file says which codec; 1 token is the shortest there is.
        for tokens in ["1", "30", "18"] {
            let part = generate(&["--max-tokens", tokens, "--load", file, "--save", file]);
            assert_eq!(part["codec"], codec);
            parts += &text(&part);
        }
        assert_eq!(parts, whole, "{codec}");
        // Another prompt goes on from there too.
        let more = generate(&["--max-tokens", "5", "--load", file, "--prompt", "\n\n## Drawbacks\n"]);
        assert_eq!(more["tokens"], 5);
    }
}

/// Greedy, on the CPU and on wgpu in turns, against each of them alone.
#[test]
fn a_saved_generation_goes_on_on_another_device() {
    if let Err(e) = tqkv::Device::open("wgpu") {
        assert!(!std::env::var("TQKV_REQUIRE").is_ok_and(|r| r.split(',').any(|r| r == "wgpu")), "TQKV_REQUIRE: {e}");
        eprintln!("SKIPPED: {e}");
        return;
    }
    let dir = tempdir().unwrap();
    let path = dir.path().join("chat.tqkv");
    let file = path.to_str().unwrap();
    let prompt = ["--prompt", "## Motivation\n\nThe"];
    let text = |device: &str, arguments: &[&str]| {
        let report = generate(&[arguments, &["--device", device]].concat());
        assert!(report["device"].as_str().unwrap().starts_with(device));
        report["text"].as_str().unwrap().to_owned()
    };
    for (first, second) in [("cpu", "wgpu"), ("wgpu", "cpu")] {
        let whole = text(first, &[&prompt[..], &["--max-tokens", "120"]].concat());
        let mut parts = text(first, &[&prompt[..], &["--max-tokens", "41", "--save", file]].concat());
        parts += &text(second, &["--max-tokens", "39", "--load", file, "--save", file]);
        parts += &text(first, &["--max-tokens", "40", "--load", file]);
        assert_eq!(parts, whole, "{first}, {second}, {first}");
    }
}

#[test]
fn saved_caches_are_described_and_checked() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("chat.tqkv");
    let file = path.to_str().unwrap();
    generate(&["--prompt", "A", "--max-tokens", "70", "--save", file]);
    let report = json(&["snapshot", "inspect", file]);
    // The start token, the prompt, and all but the last new token.
    assert_eq!(report["sequences"], serde_json::json!([71]));
    assert_eq!(report["bytes"], std::fs::metadata(&path).unwrap().len());
    assert!(report["model"].as_str().unwrap().starts_with("xxh3-128:"));
    assert!(report["layers"].as_array().unwrap().iter().all(|l| l["codec"] == "k5v4" && l["kind"] == "full"));
    let table = String::from_utf8(run(&["snapshot", "inspect", file]).stdout).unwrap();
    assert!(table.contains("k5v4, full") && table.contains("1 of 71 positions"), "{table}");
    let whole = json(&["snapshot", "verify", file]);
    assert_eq!((&whole["whole"], &whole["error"]), (&Value::Bool(true), &Value::Null));
    assert!(run(&["snapshot", "verify", file]).stdout.ends_with(b"is whole\n"));
    fails(&["generate", "--model", MODEL, "--load", file, "--codec", "k4v4"], "codec of layer 0");

    let mut bytes = std::fs::read(&path).unwrap();
    let last_page = bytes.len() - 100;
    bytes[last_page] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    fails(&["snapshot", "verify", file], "checksum of page 1");
    let verdict = run(&["snapshot", "verify", file, "--json"]);
    assert_eq!(verdict.status.code(), Some(1));
    assert_eq!(serde_json::from_slice::<Value>(&verdict.stdout).unwrap()["whole"], false);
    fails(&["generate", "--model", MODEL, "--load", file], "checksum of page 1");
    std::fs::write(&path, &bytes[..5000]).unwrap();
    fails(&["snapshot", "inspect", file], "ends after 5000 bytes");
    std::fs::write(&path, "text").unwrap();
    fails(&["snapshot", "inspect", file], "not a tqkv snapshot");
    fails(&["snapshot", "verify", "no/such/file"], "no/such/file");
}
