//! The program as its users run it.

mod common;

use common::{LLAMA2, MODEL, command, fails, json, run, run_ok, stdout, write_model};
use serde_json::Value;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use tempfile::tempdir;

const TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/heldout.txt");
const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../testdata/golden");

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn verify_passes_every_golden_case() {
    let cases = json(&["verify", "--golden", GOLDEN, "--json"]);
    assert!(cases.len() > 500, "{}", cases.len());
    for case in &cases {
        assert_eq!(keys(case), ["case", "file", "max_error", "ok"]);
        assert_eq!(case["ok"], true, "{case}");
    }
    assert!(stdout(&["verify", "--golden", GOLDEN]).ends_with(&format!("{} cases on cpu, 0 failed\n", cases.len())));
}

#[test]
fn verify_fails_on_other_values() {
    let dir = tempdir().unwrap();
    let mut bytes = std::fs::read(Path::new(GOLDEN).join("d64_b4.safetensors")).unwrap();
    // The largest bit of the last byte: some tensor's last element changes its sign.
    *bytes.last_mut().unwrap() ^= 0x80;
    std::fs::write(dir.path().join("d64_b4.safetensors"), bytes).unwrap();
    let output = run(&["verify", "--golden", dir.path().to_str().unwrap(), "--json"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8(output.stdout).unwrap().contains("\"ok\":false"));
}

#[test]
fn verify_refuses_what_is_no_golden_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    fails(&["verify", "--golden", path], &["no golden files"]);
    fails(&["verify", "--golden", "no/such/directory"], &["no/such/directory", "No such file"]);
    let golden = std::fs::read(Path::new(GOLDEN).join("d64_b4.safetensors")).unwrap();
    for (name, bytes, word) in [
        ("other.safetensors", &golden[..], "expected \"tables\" or d{D}_b{bits}"),
        ("d64_b7.safetensors", &golden, "2, 3, 4, 5, 6 or 8"),
        ("d100000_b4.safetensors", &golden, "head_dim 100000"),
        ("d128_b4.safetensors", &golden, "[kv_heads, at least 9, 128]"),
        ("tables.safetensors", &golden, "codebook.2"),
        ("d64_b4.safetensors", &golden[..1000], "invalid header length"),
        ("d64_b4.safetensors", &[], "header too small"),
    ] {
        let file = dir.path().join(name);
        std::fs::write(&file, bytes).unwrap();
        fails(&["verify", "--golden", path], &[name, word]);
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn eval_compares_codecs() {
    let dir = tempdir().unwrap();
    let plot = dir.path().join("out.svg");
    let common = ["eval", "--model", MODEL, "--text", TEXT, "--windows", "2", "--window-tokens", "96"];
    let arguments = [&common[..], &["--codec", "k8v8,k5v4,seed4,f32", "--plot", plot.to_str().unwrap()]].concat();
    let rows = json(&[&arguments[..], &["--json"]].concat());
    let codecs: Vec<_> = rows.iter().map(|row| row["codec"].as_str().unwrap()).collect();
    assert_eq!(codecs, ["f32", "k8v8", "k5v4", "seed4"]);
    let number = |row: usize, field: &str| rows[row][field].as_f64().unwrap();
    for row in &rows {
        let bits = ["bits_at_length", "bits_per_byte", "bits_per_element"];
        let divergence = ["kld", "kld_interval", "kld_median", "kld_p99", "same_top1", "same_top1_interval"];
        let rest = ["windows"];
        assert_eq!(
            keys(row),
            [&bits[..], &["calibrated", "codec", "delta_percent", "device"], &divergence, &rest].concat()
        );
        assert_eq!((&row["windows"], &row["device"]), (&2.into(), &"cpu".into()));
    }
    assert_eq!((number(0, "kld"), number(0, "same_top1"), number(0, "delta_percent")), (0.0, 1.0, 0.0));
    let bits: Vec<_> = (0..4).map(|row| number(row, "bits_per_element")).collect();
    assert_eq!(bits, [32.0, 8.125, 4.625, 4.25]);
    assert!((0.1..4.0).contains(&number(0, "bits_per_byte")));
    assert!(0.0 < number(1, "kld") && number(1, "kld") < number(2, "kld") && number(2, "kld") < number(3, "kld"));

    for row in &rows {
        let [low, high] = [0, 1].map(|end| row["kld_interval"][end].as_f64().unwrap());
        let kld = row["kld"].as_f64().unwrap();
        assert!(low <= kld && kld <= high && (low < high || kld == 0.0), "{row}");
        assert_eq!(row["bits_at_length"], row["bits_per_element"]);
    }
    let ordered = |row| number(row, "kld_median") <= number(row, "kld") && number(row, "kld") < number(row, "kld_p99");
    assert!((1..4).all(ordered), "{rows:?}");

    let svg = std::fs::read_to_string(&plot).unwrap();
    assert!(svg.starts_with("<svg") && ["k8v8", "k5v4", "seed4"].iter().all(|codec| svg.contains(codec)));
    let table = stdout(&arguments);
    assert!(table.contains("k5v4") && table.contains("2 windows of 96 tokens"), "{table}");
}

#[test]
fn eval_looks_for_needles_and_lets_the_model_write() {
    let common =
        ["eval", "--model", MODEL, "--text", TEXT, "--windows", "2", "--window-tokens", "450", "--codec", "f16,k3v3"];
    let arguments = [&common[..], &["--needle", "--depths", "3", "--free-running", "40"]].concat();
    let rows = json(&[&arguments[..], &["--json"]].concat());
    for row in &rows {
        let depths = row["needles"].as_array().unwrap();
        let at: Vec<_> = depths.iter().map(|depth| depth["depth"].as_f64().unwrap()).collect();
        assert_eq!(at, [0.25, 0.5, 0.75]);
        assert!(
            depths
                .iter()
                .all(|d| d["needles"] == 3 && d["found"].as_u64() <= Some(3) && d["nats"].as_f64() > Some(0.0))
        );
        let run = &row["free_running"];
        assert_eq!((&run["tokens"], &run["texts"]), (&40.into(), &2.into()));
        let different = run["first_differences"].as_array().unwrap().len() as u64;
        assert_eq!(run["identical"].as_u64().unwrap() + different, 2);
    }
    let same = |row: usize| rows[row]["free_running"]["identical"].as_u64().unwrap();
    assert_eq!((rows[1]["codec"].as_str(), same(1)), (Some("f16"), 2));
    // Seven levels of each element are too few for forty characters.
    assert!(same(2) < 2, "{}", rows[2]);
    let table = stdout(&arguments);
    assert!(["depth", "of 3", "same text as f16", "40 tokens written"].iter().all(|w| table.contains(w)), "{table}");
    let eval = |more: &[&str], words: &[&str]| fails(&[&common[..], more].concat(), words);
    eval(&["--needle", "--depths", "0"], &["--depths is 0, expected 1 to 9"]);
    eval(&["--needle", "--depths", "10"], &["--depths is 10"]);
    eval(&["--free-running", "0"], &["--free-running is 0"]);
    eval(&["--free-running", "450"], &["less than the window's 450 tokens"]);
    eval(&["--depths", "2"], &["--needle"]);
    let short = ["eval", "--model", MODEL, "--text", TEXT, "--windows", "1", "--window-tokens", "60", "--needle"];
    fails(&short, &["windows of 60 tokens"]);
}

#[test]
fn eval_searches_for_gains() {
    let kld = |encode| {
        let arguments = ["--windows", "4", "--window-tokens", "250", "--codec", "k4v4", "--encode", encode, "--json"];
        json(&[&["eval", "--model", MODEL, "--text", TEXT], &arguments[..]].concat())[1]["kld"].as_f64().unwrap()
    };
    // A quarter less.
    assert!(kld("search") < 0.85 * kld("nearest"));
}

#[test]
fn eval_gives_perplexity_where_tokens_are_no_bytes() {
    let dir = tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(MODEL).join(name), dir.path().join(name)).unwrap();
    }
    let words = r#"{"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": {"?": 1, "the": 2, "is": 3}, "unk_token": "?"}}"#;
    std::fs::write(dir.path().join("tokenizer.json"), words).unwrap();
    let model = dir.path().to_str().unwrap();
    let common = ["eval", "--model", model, "--text", TEXT, "--window-tokens", "32", "--codec", "k4v4"];
    let rows = json(&[&common[..], &["--windows", "1", "--json"]].concat());
    let perplexity = rows[0]["perplexity"].as_f64().unwrap();
    // 31 words stand for more bytes than that.
    assert!(perplexity > 1.0 && rows[0]["bits_per_byte"].as_f64().unwrap() < perplexity.log2() / 2.0, "{}", rows[0]);
    assert!(stdout(&[&common[..], &["--windows", "1"]].concat()).contains("perplexity"));
}

#[test]
fn eval_refuses_what_it_cannot_evaluate() {
    let dir = tempdir().unwrap();
    let write = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
        dir.path().join(name).to_str().unwrap().to_owned()
    };
    let (empty, short) = (write("empty", ""), write("short", "too short"));
    let eval = |text: &str, more: &[&str], words: &[&str]| {
        fails(&[&["eval", "--model", MODEL, "--text", text, "--codec", "k4v4"], more].concat(), words);
    };
    eval(&empty, &[], &["0 tokens, expected at least 1024"]);
    eval(&short, &[], &["9 tokens, expected at least 1024"]);
    eval("no/such/text", &[], &["no/such/text"]);
    eval(TEXT, &["--windows", "0"], &["0 windows"]);
    eval(TEXT, &["--windows", "9"], &["8192 tokens, expected at least 9216"]);
    eval(TEXT, &["--windows", "18446744073709551615"], &["8192 tokens"]);
    eval(TEXT, &["--window-tokens", "1"], &["windows of 1 tokens"]);
    eval(TEXT, &["--window-tokens", "0"], &["windows of 0 tokens"]);
    eval(TEXT, &["--window-tokens", "2048", "--windows", "1"], &["2047 tokens", "context is 1024"]);
    eval(TEXT, &["--codec", "k9v4"], &["k9v4", "kXvY"]);
    eval(TEXT, &["--codec", ""], &["kXvY"]);
    eval(TEXT, &["--device", "tpu"], &["\"tpu\"", "cpu, wgpu, wgpu:N, cuda or cuda:N"]);
    eval(
        TEXT,
        &["--window-tokens", "16", "--windows", "1", "--plot", "no/such/dir/x.svg"],
        &["cannot write no/such/dir/x.svg"],
    );
}

#[test]
fn a_plot_that_is_not_drawn_does_not_touch_its_file() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("x.svg");
    let plot = path.to_str().unwrap();
    std::fs::write(&path, "a plot").unwrap();
    let common = ["eval", "--model", MODEL, "--text", TEXT, "--windows", "1", "--window-tokens", "16", "--plot", plot];
    fails(&[&common[..], &["--codec", "f32"]].concat(), &["--plot has nothing to draw"]);
    fails(&["eval", "--model", MODEL, "--text", TEXT, "--window-tokens", "1026", "--plot", plot], &["context is 1024"]);
    fails(&["eval", "--model", "no/such/model", "--text", TEXT, "--plot", plot], &["no/such/model"]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "a plot");
    stdout(&[&common[..], &["--codec", "k4v4"]].concat());
    assert!(std::fs::read_to_string(&path).unwrap().starts_with("<svg"));
    fails(&["eval", "--model", MODEL, "--text", TEXT, "--plot", dir.path().to_str().unwrap()], &["cannot write"]);
}

#[test]
fn eval_leaves_out_what_does_not_exist() {
    let dir = tempdir().unwrap();
    write_model(dir.path(), 256, 80);
    let model = dir.path().to_str().unwrap();
    let common = ["eval", "--model", model, "--text", TEXT, "--windows", "1", "--window-tokens", "32", "--json"];
    let output = run_ok(&common);
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(["seed4 is left out", "seed8 is left out", "power of two"].iter().all(|w| error.contains(w)), "{error}");
    let rows = String::from_utf8(output.stdout).unwrap();
    let codec = |row: &str| serde_json::from_str::<Value>(row).unwrap()["codec"].as_str().unwrap().to_owned();
    let codecs: Vec<_> = rows.lines().map(codec).collect();
    assert_eq!(codecs, ["f32", "f16", "k8v8", "k6v6", "k5v4", "k4v4", "k3v3"]);
    // Who asks for it is told.
    fails(&[&common[..], &["--codec", "k4v4,seed4"]].concat(), &["seed4", "power of two"]);
}

#[test]
fn every_cause_is_printed_once() {
    let dir = tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let once = |arguments: &[&str], cause: &str| {
        let error = String::from_utf8(run(arguments).stderr).unwrap();
        assert_eq!(error.matches(cause).count(), 1, "{arguments:?}: {error}");
    };
    let generate = ["generate", "--prompt", "x", "--model"];
    once(&[&generate[..], &["no/such/model"]].concat(), "No such file");
    once(&["eval", "--text", "no/such/text", "--model", MODEL], "No such file");
    once(&["snapshot", "verify", "no/such/file"], "No such file");
    once(&["verify", "--golden", "no/such/dir"], "No such file");
    once(&[&generate[..], &[MODEL, "--load", "no/such/file"]].concat(), "No such file");
    std::fs::write(dir.path().join("config.json"), "{\"vocab_size\": 1").unwrap();
    once(&[&generate[..], &[path]].concat(), "EOF while parsing");
    write_model(dir.path(), 256, 64);
    std::fs::write(dir.path().join("model.safetensors"), b"\x02\0\0\0\0\0\0\0{{").unwrap();
    once(&[&generate[..], &[path]].concat(), "line 1");
}

#[test]
fn a_damaged_tokenizer_is_an_error_and_no_panic() {
    let dir = tempdir().unwrap();
    write_model(dir.path(), 400, 64);
    for name in ["cut-within-decoder.json", "merge-longer-than-any-token.json"] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tqkv-candle/testdata").join(name);
        std::fs::copy(from, dir.path().join("tokenizer.json")).unwrap();
        fails(&["generate", "--model", dir.path().to_str().unwrap(), "--prompt", "q the cat"], &["tokenizer.json: "]);
    }
}

#[test]
fn whatever_tokens_are_drawn_the_text_is_printed_and_saved() {
    let dir = tempdir().unwrap();
    write_model(dir.path(), 281, 64);
    std::fs::copy(LLAMA2, dir.path().join("tokenizer.json")).unwrap();
    let (model, path) = (dir.path().to_str().unwrap(), dir.path().join("saved"));
    for seed in 0..8 {
        let common = ["generate", "--model", model, "--temperature", "3", "--json", "--save", path.to_str().unwrap()];
        let seed = seed.to_string();
        let report = json(&[&common[..], &["--prompt", "the", "--max-tokens", "40", "--seed", &seed]].concat());
        assert_eq!(report[0]["tokens"], 40);
        assert!(path.exists());
        std::fs::remove_file(&path).unwrap();
    }
}

#[test]
fn text_that_goes_on_gets_no_space_before_it() {
    let dir = tempdir().unwrap();
    write_model(dir.path(), 281, 64);
    std::fs::copy(LLAMA2, dir.path().join("tokenizer.json")).unwrap();
    let (model, path) = (dir.path().to_str().unwrap(), dir.path().join("saved"));
    let common = ["generate", "--model", model, "--temperature", "0", "--json", "--max-tokens", "1"];
    let first = json(&[&common[..], &["--prompt", "he", "--save", path.to_str().unwrap()]].concat());
    // The start token, the space, `he`.
    assert_eq!(first[0]["prompt_tokens"], 3);
    let more = json(&[&common[..], &["--prompt", "he", "--load", path.to_str().unwrap()]].concat());
    // The token that the saved cache lacks, and `he`.
    assert_eq!(more[0]["prompt_tokens"], 2);
}

fn generate(arguments: &[&str]) -> Vec<Value> {
    json(&[&["generate", "--model", MODEL, "--prompt", "## Motivation\n", "--json"], arguments].concat())
}

#[test]
fn generate_is_reproducible() {
    let run = |seed: &str| {
        let report = generate(&["--max-tokens", "40", "--seed", seed, "--temperature", "0.9", "--codec", "k4v4"]);
        assert_eq!(report.len(), 1);
        report[0].clone()
    };
    let (first, again, other) = (run("1"), run("1"), run("2"));
    assert_eq!(first["text"], again["text"]);
    assert_ne!(first["text"], other["text"]);
    assert_eq!(
        (&first["tokens"], &first["prompt_tokens"], &first["stop"]),
        (&40.into(), &15.into(), &"max_tokens".into())
    );
    assert_eq!((&first["codec"], &first["device"]), (&"k4v4".into(), &"cpu".into()));
    // A page of 64 positions: 4 layers, 2 KV heads, K and V of 66 and of 256 bytes.
    assert_eq!(first["cache_bytes"], 64 * 4 * 2 * 2 * 66);
    assert_eq!(first["cache_bytes_f16"], 64 * 4 * 2 * 2 * 256);

    let text = first["text"].as_str().unwrap();
    let common = ["generate", "--model", MODEL, "--prompt", "## Motivation\n", "--max-tokens", "40"];
    let output = run_ok(&[&common[..], &["--seed", "1", "--temperature", "0.9", "--codec", "k4v4"]].concat());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{text}\n"));
    assert!(String::from_utf8(output.stderr).unwrap().contains("tokens/s"));
}

#[test]
fn generate_refuses_what_it_cannot_generate() {
    let fails = |model: &str, prompt: &str, more: &[&str], words: &[&str]| {
        fails(&[&["generate", "--model", model, "--prompt", prompt], more].concat(), words);
    };
    fails(MODEL, &"long ".repeat(205), &[], &["1026 tokens", "context is 1024"]);
    fails(MODEL, "x", &["--max-tokens", "0"], &["--max-tokens is 0"]);
    fails(MODEL, "x", &["--temperature", "-1"], &[]);
    fails(MODEL, "x", &["--temperature=-1"], &["temperature -1"]);
    fails(MODEL, "x", &["--temperature", "NaN"], &["temperature NaN"]);
    fails(MODEL, "x", &["--codec", "tq4"], &["tq4", "seed4, seed5, seed6, seed8 or kXvY"]);
    fails(MODEL, "x", &["--device", "cuda:x"], &["cuda:x"]);
    fails("no/such/model", "x", &[], &["no/such/model/config.json"]);
    // Before the model is looked for.
    fails("no/such/model", "x", &["--save", "no/such/dir/f"], &["cannot write no/such/dir/f: "]);
    fails("no/such/model", "x", &["--save", MODEL], &["cannot write", "is a directory"]);

    let dir = tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    let copy = |name: &str| std::fs::read(Path::new(MODEL).join(name)).unwrap();
    std::fs::write(dir.path().join("config.json"), copy("config.json")).unwrap();
    fails(path, "x", &[], &["neither model.safetensors nor model.safetensors.index.json"]);
    let weights = copy("model.safetensors");
    std::fs::write(dir.path().join("model.safetensors"), &weights[..weights.len() - 2]).unwrap();
    fails(path, "x", &[], &["model.safetensors", "not fully covered"]);
    let config = String::from_utf8(copy("config.json")).unwrap();
    std::fs::write(dir.path().join("config.json"), config.replace("\"llama\"", "\"mamba\"")).unwrap();
    fails(path, "x", &[], &["model_type is \"mamba\"", "llama"]);
}

#[test]
fn the_demo_takes_another_model() {
    let dir = tempdir().unwrap();
    write_model(dir.path(), 281, 80);
    std::fs::copy(LLAMA2, dir.path().join("tokenizer.json")).unwrap();
    let model = dir.path().to_str().unwrap();
    let table = stdout(&["demo", "--model", model]);
    let words = [model, "1 layers, 1 KV heads of 80", "tokens at", "k5v4", "cache: 64 tokens"];
    assert!(words.iter().all(|word| table.contains(word)), "{table}");
    fails(&["demo", "--model", "no/such/model"], &["no/such/model"]);
}

#[test]
fn devices_lists_the_processor() {
    assert!(stdout(&["devices"]).starts_with("cpu: "));
}

#[test]
fn a_reader_that_goes_away_is_an_error_and_no_panic() {
    let golden: &[&str] = &["verify", "--golden", GOLDEN];
    let text: &[&str] = &["generate", "--model", MODEL, "--prompt", "x", "--max-tokens", "100"];
    for arguments in [golden, text] {
        let mut child = command(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut error = String::new();
        child.stderr.take().unwrap().read_to_string(&mut error).unwrap();
        assert!(!child.wait().unwrap().success());
        assert!(error.contains("standard output") && !error.contains("panicked"), "{error}");
    }
}

#[test]
fn bench_refuses_what_it_cannot_run() {
    fails(&["bench", "--op", "sort"], &["sort", "quantize, append, dequantize"]);
    fails(&["bench", "--threads", "0"], &["threads is 0"]);
    fails(&["bench", "--device", "gpu"], &["\"gpu\""]);
    fails(&["bench", "--shape", "1x3/2x64x9"], &["heads to be a multiple of kv_heads"]);
    fails(&["bench", "--positions", "0"], &["--positions is 0"]);
    for shape in ["1x1/1x128x18446744073709551615", "18446744073709551615x1/1x128x1", "4294967296x1/1x128x1"] {
        fails(&["bench", "--shape", shape], &["at most 4294967295"]);
    }
    // After what reading and copying take, which need none of them.
    let huge = [
        (["--op", "rotate", "--positions", "1099511627776"], "no room"),
        (["--op", "attention", "--shape", "1x18446744073709551615/1x128x1"], "overflows"),
    ];
    for (arguments, word) in huge {
        let output = run(&[&["bench", "--codec", "k4v4"], &arguments[..]].concat());
        let error = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && error.contains(word), "{arguments:?}: {error}");
    }
}

#[test]
fn bench_measures_every_operation() {
    let small =
        ["bench", "--json", "--cold", "1", "--positions", "64", "--shape", "2x4/2x64x10-100", "--codec", "k4v3"];
    let operations = ["--op", "quantize,append,dequantize,restore,rotate,attention"];
    let rows = json(&[&small[..], &operations].concat());
    let names: Vec<_> = rows.iter().map(|row| row["op"].as_str().unwrap()).collect();
    let decoding = ["dequantize_f32", "dequantize_f16", "restore_f32", "restore_f16"];
    assert_eq!(names, [&["read", "copy", "quantize", "append"][..], &decoding, &["rotate", "attention"]].concat());
    for row in &rows {
        let number = |field: &str| row[field].as_f64().unwrap();
        let per_s = number("bytes") / (number("ms") / 1e3) / 1e9;
        assert!((number("gb_per_s") - per_s).abs() < 1e-6 * per_s, "{row}");
        assert!(number("share_of_bandwidth") > 0.0 && number("max_rel_error") < 1e-3, "{row}");
        assert!(row["shape"].is_string() && row["codec"].is_string() && row["threads"].is_number(), "{row}");
    }
    assert_eq!(rows.last().unwrap()["shape"], "2x4/2x64x10-100");
}
