//! `tqkv calibrate`, and what its files are for.

mod common;

use common::{MODEL, fails, json, run, stdout, write_model};
use std::path::Path;
use tempfile::tempdir;

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/heldout.txt");
const OTHER_TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");

fn calibrate(out: &Path) -> String {
    let out = out.to_str().unwrap();
    stdout(&["calibrate", "--model", MODEL, "--text", OTHER_TEXT, "--length", "512", "--out", out])
}

#[test]
fn a_calibration_makes_predictions_better() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("byte-llama.calibration");
    let said = calibrate(&path);
    assert!(said.starts_with("4 layers calibrated over ") && said.contains("byte-llama.calibration"), "{said}");
    let file = path.to_str().unwrap();
    let common = ["eval", "--model", MODEL, "--text", TEXT, "--windows", "4", "--length", "512", "--json", "--codec"];
    let kld = |codecs: &str, more: &[&str]| -> Vec<f64> {
        let rows = json(&[&common[..], &[codecs], more].concat());
        assert!(rows[1..].iter().all(|row| row["calibrated"] == !more.is_empty()), "{rows:?}");
        assert_eq!(rows[0]["calibrated"], false);
        rows[1..].iter().map(|row| row["kld"].as_f64().unwrap()).collect()
    };
    let plain = kld("k3v4,k4v4,k5v4,k8v8", &[]);
    let better = kld("k3v4+s1f16,k4v4+s1f16,k5v4+s1f16,k8v8+s1f16", &["--calibration", file]);
    println!("{plain:?} and {better:?}");
    assert!(plain.iter().zip(&better).all(|(plain, better)| better <= plain), "{plain:?} and {better:?}");
    assert!(better[0] < 0.9 * plain[0], "{plain:?} and {better:?}");

    // The same file again is the same calibration.
    let again = dir.path().join("again");
    calibrate(&again);
    assert_eq!(std::fs::read(&path).unwrap(), std::fs::read(again).unwrap());
}

#[test]
fn saved_caches_belong_to_their_calibration() {
    let dir = tempdir().unwrap();
    let (calibration, saved) = (dir.path().join("c"), dir.path().join("saved"));
    calibrate(&calibration);
    let (calibration, saved) = (calibration.to_str().unwrap(), saved.to_str().unwrap());
    let common = ["generate", "--model", MODEL, "--max-tokens", "8", "--temperature", "0", "--json"];
    let codec = ["--codec", "k4v4+s1f16+r8k8v8"];
    let first =
        json(&[&common[..], &codec, &["--prompt", "ROMEO:", "--calibration", calibration, "--save", saved]].concat());
    assert_eq!(first[0]["codec"], "k4v4+s1f16+r8k8v8");
    // The codec, sinks and all, is that of the file.
    let next = json(&[&common[..], &["--load", saved, "--calibration", calibration]].concat());
    assert_eq!(next[0]["codec"], "k4v4+s1f16+r8k8v8");
    fails(&[&common[..], &["--load", saved]].concat(), &["channels of layer 0"]);
}

#[test]
fn what_is_no_calibration_of_the_model_is_refused() {
    let dir = tempdir().unwrap();
    let calibration = dir.path().join("c");
    calibrate(&calibration);
    let file = calibration.to_str().unwrap();
    let other = dir.path().join("other");
    std::fs::create_dir(&other).unwrap();
    write_model(&other, 256, 64);
    let eval = |model: &str, file: &str, words: &[&str]| {
        let text = ["--text", TEXT, "--length", "16", "--codec", "k4v4"];
        fails(&[&["eval", "--model", model, "--calibration", file], &text[..]].concat(), words);
    };
    eval(other.to_str().unwrap(), file, &["made for the model xxh3-128:", "expected xxh3-128:"]);
    eval(MODEL, "no/such/file", &["no/such/file", "No such file"]);
    let mut bytes = std::fs::read(&calibration).unwrap();
    let middle = bytes.len() - 100;
    bytes[middle] ^= 1;
    std::fs::write(&calibration, &bytes).unwrap();
    eval(MODEL, file, &["damaged: checksum xxh3-128:"]);
    std::fs::write(&calibration, &bytes[..50]).unwrap();
    for command in ["generate", "chat"] {
        let prompt: &[&str] = if command == "generate" { &["--prompt", "x"] } else { &[] };
        fails(&[&[command, "--model", MODEL, "--calibration", file], prompt].concat(), &[file]);
    }
}

#[test]
fn what_cannot_be_calibrated_leaves_no_file() {
    let dir = tempdir().unwrap();
    let (out, short) = (dir.path().join("out"), dir.path().join("short"));
    std::fs::write(&short, "abc").unwrap();
    let (out, short) = (out.to_str().unwrap(), short.to_str().unwrap());
    let calibrate = |text: &str, more: &[&str], words: &[&str]| {
        fails(&[&["calibrate", "--model", MODEL, "--text", text, "--out", out], more].concat(), words);
        assert!(!Path::new(out).exists());
    };
    calibrate(short, &[], &["4 tokens to calibrate with, expected at least 5"]);
    calibrate("no/such/text", &[], &["cannot read no/such/text"]);
    calibrate(TEXT, &["--length", "0"], &["--length is 0"]);
    calibrate(TEXT, &["--length", "2048"], &["--length is 2048", "context of 1024"]);
    fails(&["calibrate", "--model", MODEL, "--text", TEXT, "--out", "no/such/dir/x"], &["cannot write no/such/dir/x"]);
    assert!(!run(&["calibrate", "--model", MODEL, "--out", out]).status.success());
}

#[test]
fn emulated_formats_are_rows_of_the_table() {
    let common = ["eval", "--model", MODEL, "--text", TEXT, "--windows", "1", "--length", "128", "--json", "--codec"];
    let rows = json(&[&common[..], &["q8_0,q4_0_rotated,turboquant_3bit_nc"]].concat());
    let bits: Vec<_> = rows.iter().map(|row| row["bits_per_element"].as_f64().unwrap()).collect();
    assert_eq!(bits, [32.0, 8.5, 4.5, 3.1875]);
    let kld: Vec<_> = rows.iter().map(|row| row["kld"].as_f64().unwrap()).collect();
    assert!(kld.is_sorted() && kld[1] > 0.0, "{kld:?}");
    assert_eq!(rows[3]["codec"], "turboquant_3bit_nc");
    fails(&[&common[..], &["turboquant_5bit"]].concat(), &["turboquant_5bit"]);
}
