//! `tqkv generate` and `tqkv chat`: drawing, stop strings, interruptions, conversations that are kept.

mod common;

use common::{LLAMA2, MODEL, command, fails, json, real_model, run, write_model};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Output, Stdio};
use tempfile::tempdir;

fn generate(more: &[&str]) -> Value {
    let common = ["generate", "--model", MODEL, "--prompt", "## Motivation\n", "--json"];
    json(&[&common[..], more].concat()).remove(0)
}

#[test]
fn text_ends_before_a_stop_string() {
    let text = |report: &Value| report["text"].as_str().unwrap().to_owned();
    let whole = text(&generate(&["--temperature", "0", "--max-tokens", "60"]));
    let stop: String = whole.chars().skip(20).take(3).collect();
    let cut = generate(&["--temperature", "0", "--max-tokens", "60", "--stop", "never there", "--stop", &stop]);
    assert_eq!(text(&cut), whole[..whole.find(&stop).unwrap()]);
    assert_eq!(cut["stop"], "stop_string");
}

#[test]
fn fewer_candidates_make_greedy_text() {
    let greedy = generate(&["--temperature", "0", "--max-tokens", "40"]);
    for narrow in [["--top-k", "1"], ["--top-p", "1e-6"], ["--min-p", "1"]] {
        let report = generate(&[&narrow[..], &["--temperature", "1.5", "--max-tokens", "40"]].concat());
        assert_eq!(report["text"], greedy["text"], "{narrow:?}");
    }
    let penalty = generate(&["--temperature", "0", "--max-tokens", "40", "--repetition-penalty", "1.8"]);
    assert_ne!(penalty["text"], greedy["text"]);
    // Before the model is looked for.
    for (option, value, words) in [
        ("--top-p", "0", "top_p is 0"),
        ("--min-p", "1.5", "min_p is 1.5"),
        ("--repetition-penalty", "0", "repetition_penalty is 0"),
        ("--stop", "", "--stop is empty"),
    ] {
        fails(&["generate", "--model", "no/such/model", "--prompt", "x", option, value], &[words]);
        fails(&["chat", "--model", "no/such/model", option, value], &[words]);
    }
}

#[test]
fn a_draft_changes_no_text_and_says_what_it_was_worth() {
    let greedy = ["--temperature", "0", "--max-tokens", "50", "--codec", "k8v8"];
    let plain = generate(&greedy);
    assert!(plain["draft"].is_null());
    let drafted = generate(&[&greedy[..], &["--draft", MODEL, "--draft-tokens", "6"]].concat());
    assert_eq!((&drafted["text"], &drafted["stop"]), (&plain["text"], &plain["stop"]));
    let count = |field: &str| drafted["draft"][field].as_u64().unwrap();
    assert!(count("proposed") >= 42 && count("accepted") * 10 > count("proposed") * 9, "{drafted}");

    let dir = tempdir().unwrap();
    write_model(dir.path(), 281, 80);
    std::fs::copy(LLAMA2, dir.path().join("tokenizer.json")).unwrap();
    let other = dir.path().to_str().unwrap();
    let common = ["generate", "--model", MODEL, "--prompt", "x"];
    fails(&[&common[..], &["--draft", other]].concat(), &["another vocabulary"]);
    fails(&[&common[..], &["--draft", MODEL, "--draft-tokens", "65"]].concat(), &["65 tokens drafted", "1 to 64"]);
    fails(&[&common[..], &["--draft", "no/such/model"]].concat(), &["draft", "no/such/model"]);
    fails(&[&common[..], &["--draft", MODEL, "--prompt", "y"]].concat(), &["several prompts"]);
}

#[test]
fn several_prompts_give_the_texts_that_each_gives() {
    let dir = tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "# Drawbacks\nSome").unwrap();
    let prompts = ["## Motivation\n", "fn main() {", "# Drawbacks\nSome"];
    let common = ["generate", "--model", MODEL, "--json", "--max-tokens", "30", "--temperature", "0.8", "--seed", "4"];
    let alone: Vec<Value> =
        prompts.iter().map(|prompt| json(&[&common[..], &["--prompt", prompt]].concat()).remove(0)).collect();
    let [first, second, _] = prompts;
    let file = file.to_str().unwrap();
    let together = json(&[&common[..], &["--prompt", first, "--prompt", second, "--prompt-file", file]].concat());
    assert_eq!(together.len(), 3);
    for (together, alone) in together.iter().zip(&alone) {
        for field in ["text", "stop", "prompt_tokens", "tokens"] {
            assert_eq!(together[field], alone[field], "{field}");
        }
    }
}

#[cfg(unix)]
#[test]
fn an_interruption_ends_the_text_and_saves_it() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("saved");
    let file = path.to_str().unwrap();
    // A context that takes long to fill.
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(Path::new(MODEL).join(name), dir.path().join(name)).unwrap();
    }
    let config = std::fs::read_to_string(Path::new(MODEL).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["max_position_embeddings"] = 100_000.into();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let model = dir.path().to_str().unwrap();
    let arguments = ["generate", "--model", model, "--prompt", "A", "--max-tokens", "90000", "--save", file];
    let mut child = command(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // Not before there is text.
    let mut first = [0; 3];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    let kill = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    let notes = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && notes.contains("(interrupted)"), "{notes}");
    let text = [&first[..], &output.stdout].concat();
    assert!(text.ends_with(b"\n") && text.len() < 90_000, "{}", text.len());
    // What was written is what was saved: the start token, the prompt and all but the last new token.
    let report = json(&["snapshot", "inspect", file, "--json"]).remove(0);
    let held = report["sequences"][0].as_u64().unwrap();
    assert_eq!(String::from_utf8_lossy(&text).chars().count() as u64, held + 1 - 2 + 1);
    let more = json(&["generate", "--model", model, "--load", file, "--max-tokens", "5", "--json"]);
    assert_eq!(more[0]["tokens"], 5);
}

/// Writes a model that can be talked to, though it has nothing to say.
fn write_talker(dir: &Path) {
    write_model(dir, 281, 64);
    std::fs::copy(LLAMA2, dir.join("tokenizer.json")).unwrap();
    let template = "{{ bos_token }}{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant ";
    let config = json!({"bos_token": "<s>", "chat_template": template});
    std::fs::write(dir.join("tokenizer_config.json"), config.to_string()).unwrap();
}

fn chat(arguments: &[&str], input: &str) -> Output {
    let mut command = command(&[&["chat"], arguments].concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It may have ended with an error before it reads.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

fn turns(arguments: &[&str], input: &str) -> Vec<Value> {
    let output = chat(&[arguments, &["--json"]].concat(), input);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_conversation_is_kept_with_its_cache() {
    let dir = tempdir().unwrap();
    write_talker(dir.path());
    let (model, path) = (dir.path().to_str().unwrap(), dir.path().join("session"));
    let session = path.to_str().unwrap();
    let common = ["--model", model, "--temperature", "0", "--max-tokens", "3"];
    let kept = [&common[..], &["--session", session]].concat();
    let held = || {
        let report = json(&["snapshot", "inspect", session, "--json"]).remove(0);
        report["sequences"][0].as_u64().unwrap()
    };
    let number = |turn: &Value, field: &str| turn[field].as_u64().unwrap();

    let first = turns(&[&kept[..], &["--system", "the"]].concat(), "he\n");
    assert_eq!((first.len(), &first[0]["role"]), (1, &"assistant".into()));
    let prompt = number(&first[0], "prompt_tokens");
    assert_eq!(held(), prompt + number(&first[0], "tokens") - 1);
    // The next run goes on: the first prompt does not run again.
    let second = turns(&kept, "\nthe\n");
    let again = held() - (number(&second[0], "prompt_tokens") + number(&second[0], "tokens") - 1);
    assert!(again >= prompt - 2, "{again} of {prompt}");
    // As if it had never stopped.
    let whole = turns(&[&common[..], &["--system", "the"]].concat(), "he\r\nthe");
    assert_eq!(whole.iter().map(|t| &t["text"]).collect::<Vec<_>>(), [&first[0]["text"], &second[0]["text"]]);

    // Another model's.
    let other = tempdir().unwrap();
    write_talker(other.path());
    std::fs::write(other.path().join("other.safetensors"), "").unwrap();
    let output = chat(&["--model", other.path().to_str().unwrap(), "--session", session], "he\n");
    assert!(!output.status.success() && output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_conversation_that_cannot_be_held_is_refused() {
    let dir = tempdir().unwrap();
    write_talker(dir.path());
    let model = dir.path().to_str().unwrap();
    fails(&["chat", "--model", MODEL], &["has no chat template"]);
    fails(&["chat", "--model", model, "--session", "no/such/dir/f"], &["cannot write no/such/dir/f"]);
    fails(&["chat", "--model", model, "--template", "no/such/template"], &["cannot read no/such/template"]);
    let template = dir.path().join("template");
    std::fs::write(&template, "{{ raise_exception('no ' + messages[-1].content) }}").unwrap();
    let arguments = ["--model", model, "--template", template.to_str().unwrap()];
    let output = chat(&arguments, "way\n");
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("chat template: no way"));
    std::fs::write(&template, "{% if").unwrap();
    assert!(!chat(&arguments, "").status.success());
    // Longer than the room for it.
    let output = chat(&["--model", model], &"the ".repeat(60));
    assert!(String::from_utf8_lossy(&output.stderr).contains("context is 64"));
}

#[test]
fn a_real_model_answers() {
    let Some(path) = real_model("SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let model = path.to_str().unwrap();
    let greedy = ["--model", model, "--temperature", "0", "--max-tokens", "24"];
    let text = |report: &Value| report["text"].as_str().unwrap().to_owned();
    let generated = json(&[&["generate", "--prompt", "The capital of France is", "--json"], &greedy[..]].concat());
    assert!(text(&generated[0]).starts_with(" Paris"), "{generated:?}");
    assert!(generated[0]["cache_bytes"].as_u64().unwrap() * 3 < generated[0]["cache_bytes_f16"].as_u64().unwrap());
    let answers = turns(&greedy, "What is the capital of France?\nAnd of Germany?\n");
    assert!(text(&answers[0]).contains("Paris") && text(&answers[1]).contains("Berlin"), "{answers:?}");
    // Of the second question only what is new runs.
    assert!(answers[1]["prompt_tokens"].as_u64() < answers[0]["prompt_tokens"].as_u64(), "{answers:?}");

    let Some(path) = real_model("gemma-3-270m-q4_k_m.gguf") else { return };
    let model = path.to_str().unwrap();
    let common = ["generate", "--model", model, "--prompt", "The capital of France is", "--temperature", "0", "--json"];
    let generated = json(&[&common[..], &["--max-tokens", "8"]].concat());
    assert_eq!((&generated[0]["tokens"], text(&generated[0]).is_empty()), (&8.into(), false), "{generated:?}");
    let output = run(&["chat", "--model", model]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("has no chat template"));
}

/// What `generate` has beside the weights and the cache: the program, the vocabulary, activations of 512 tokens.
#[cfg(target_os = "linux")]
#[test]
fn generate_takes_little_more_than_weights_and_cache() {
    const REST: f64 = 64.0 * 1048576.0;
    let Some(model) = real_model("SmolLM2-135M-Instruct.Q4_1.gguf") else { return };
    let dir = tempdir().unwrap();
    let file = dir.path().join("prompt.txt");
    std::fs::write(&file, "The quick brown fox jumps over the lazy dog, twice. ".repeat(170)).unwrap();
    let (model, file) = (model.to_str().unwrap(), file.to_str().unwrap());
    let report =
        json(&["generate", "--model", model, "--prompt-file", file, "--codec", "k4v4", "--json", "--max-tokens", "8"]);
    let bytes = |field: &str| report[0][field].as_f64().unwrap();
    assert!(bytes("prompt_tokens") > 2000.0);
    let known = bytes("weight_bytes") + bytes("cache_reserved_bytes");
    assert!(bytes("peak_bytes") < 1.1 * known + REST, "{report:?}");
}

#[test]
fn a_center_is_taken_from_the_prompt_and_kept() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("saved");
    let file = path.to_str().unwrap();
    let common = ["generate", "--model", MODEL, "--temperature", "0", "--json", "--codec", "k3v3"];
    let prompt = ["--prompt", "## Motivation\nThis RFC proposes", "--center", "prompt"];
    let whole = json(&[&common[..], &prompt, &["--max-tokens", "40"]].concat()).remove(0);
    let first = json(&[&common[..], &prompt, &["--max-tokens", "15", "--save", file]].concat()).remove(0);
    let rest = json(&[&common[..], &["--load", file, "--max-tokens", "25"]].concat()).remove(0);
    let text = |report: &Value| report["text"].as_str().unwrap().to_owned();
    assert_eq!(text(&first) + &text(&rest), text(&whole));
    let plain = json(&[&common[..], &prompt[..2], &["--max-tokens", "15", "--save", file]].concat()).remove(0);
    assert_eq!(plain["tokens"], 15);
    fails(&[&common[..], &["--load", file, "--center", "prompt"]].concat(), &["has no center"]);
    fails(&[&common[..], &["--prompt", "x", "--center", "prompt"]].concat(), &["--center prompt", "tokens"]);
    fails(&[&common[..], &prompt, &["--calibration", "x"]].concat(), &["--calibration"]);
}
