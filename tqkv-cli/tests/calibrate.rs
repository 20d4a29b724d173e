//! `tqkv calibrate`, and what its files are for.

mod common;

use common::{MODEL, fails, json, run, stdout, write_model};
use serde_json::Value;
use std::path::Path;
use tempfile::tempdir;

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/heldout.txt");
const OTHER_TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../LICENSE-APACHE");

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
fn bits_are_found_for_a_budget() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("planned");
    let file = path.to_str().unwrap();
    let common = ["calibrate", "--model", MODEL, "--text", OTHER_TEXT, "--length", "256", "--out", file, "--json"];
    let tried = json(&[&common[..], &["--budget", "3.6", "--context", "1024"]].concat());
    // The best first, none over the budget, and what is kept besides was tried too.
    let number = |row: &Value, field: &str| row[field].as_f64().unwrap();
    assert!(tried.is_sorted_by_key(|row| number(row, "kld")), "{tried:?}");
    assert!(tried.iter().all(|row| number(row, "bits_per_element") <= 3.6), "{tried:?}");
    let names: Vec<_> = tried.iter().map(|row| row["name"].as_str().unwrap()).collect();
    assert!(["by layer", "k4v2", "k3v3", "k3v3+s1f16"].iter().all(|name| names.contains(name)), "{names:?}");
    assert!(tried.iter().all(|row| row["layers"].as_array().unwrap().len() == 4));

    // What was found best is what `auto` means, and better than the same bits everywhere without it.
    let common = ["eval", "--model", MODEL, "--text", TEXT, "--windows", "2", "--length", "512", "--json", "--codec"];
    let planned = json(&[&common[..], &["auto", "--calibration", file]].concat());
    let plain = json(&[&common[..], &["k4v2,k3v3"]].concat());
    assert_eq!(planned[1]["codec"], "auto");
    assert!(number(&planned[1], "bits_per_element") <= 3.6, "{planned:?}");
    assert!(plain[1..].iter().all(|row| number(&planned[1], "kld") < number(row, "kld")), "{planned:?} and {plain:?}");
    let generated =
        ["generate", "--model", MODEL, "--prompt", "x", "--max-tokens", "4", "--calibration", file, "--json"];
    let saved = dir.path().join("saved");
    let saved = saved.to_str().unwrap();
    json(&[&generated[..], &["--save", saved]].concat());
    json(&[&generated[..], &["--load", saved]].concat());

    let no_out = |budget: &str, words: &[&str]| {
        let out = dir.path().join("no");
        let common = ["calibrate", "--model", MODEL, "--text", OTHER_TEXT, "--length", "64", "--budget", budget];
        fails(&[&common[..], &["--out", out.to_str().unwrap()]].concat(), words);
        assert!(!out.exists());
    };
    no_out("2.1", &["2.1 bits an element, expected at least 2.125"]);
    no_out("NaN", &["NaN bits an element"]);
    no_out("four", &["--budget"]);
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
