//! What CI runs after it has installed its tools: a list of stages, one after the other, each with its time.

use crate::{codebooks, codec_files, layers, python, sizes};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The CPU's kernels, whatever the processor has.
const SANITIZED: &str = "test -p tqkv --no-default-features --target x86_64-unknown-linux-gnu \
                         --lib --test conformance --test golden --test cache cpu";

/// Every feature without the others, and none.
const FEATURES: [&str; 5] = ["", "cuda", "wgpu", "mlx", "prefix-store"];

struct Stage {
    name: &'static str,
    run: fn(&Path) -> Result<()>,
}

const STAGES: &[Stage] = &[
    Stage { name: "spelling", run: spelling },
    Stage { name: "format", run: |root| cargo(root, "fmt --all --check", &[]) },
    Stage { name: "clippy", run: |root| cargo(root, "clippy --workspace --all-targets -- -D warnings", &[]) },
    Stage { name: "sources", run: sources },
    Stage { name: "features", run: features },
    Stage { name: "tests", run: tests },
    // Seven seconds a target, and a minute with the same seed in every run.
    Stage { name: "fuzz", run: |root| cargo(root, "test --workspace --test fuzz", &[("TQKV_FUZZ_SECONDS", "7")]) },
    Stage { name: "soak", run: |root| soak(root, &["--minutes", "1", "--device", "cpu", "--seed", "1"]) },
    Stage { name: "models", run: models },
    Stage {
        name: "python",
        run: |root| python::test(root, &["numpy", "transformers"], false).map(|said| println!("{said}")),
    },
    Stage { name: "sanitizer", run: sanitizer },
    Stage { name: "docs", run: |root| cargo(root, "doc --workspace --no-deps", &[("RUSTDOCFLAGS", "-D warnings")]) },
    Stage { name: "macos", run: macos },
];

/// Runs the stages of these names, or all; gives the times.
pub fn run(root: &Path, names: &[&str]) -> Result<String> {
    let known = |name: &&&str| STAGES.iter().any(|s| s.name == **name);
    if let Some(unknown) = names.iter().find(|name| !known(name)) {
        let all: Vec<_> = STAGES.iter().map(|s| s.name).collect();
        bail!("no stage {unknown:?}, expected some of: {}", all.join(", "));
    }
    let mut times: Vec<(&str, Duration)> = vec![];
    for stage in STAGES.iter().filter(|s| names.is_empty() || names.contains(&s.name)) {
        println!("\n== {}", stage.name);
        let started = Instant::now();
        let result = (stage.run)(root);
        times.push((stage.name, started.elapsed()));
        result.with_context(|| format!("stage {}\n{}", stage.name, table(&times)))?;
    }
    Ok(format!("\n{}", table(&times)))
}

fn table(times: &[(&str, Duration)]) -> String {
    times.iter().map(|(name, time)| format!("{name:>12} {:6.1} s\n", time.as_secs_f64())).collect()
}

fn spelling(root: &Path) -> Result<()> {
    command(root, "typos", &["--format", "brief"], &[])
}

fn sources(root: &Path) -> Result<()> {
    println!("{}", codebooks::check(root)?);
    println!("{}", layers::check(root)?);
    println!("{}", codec_files::check(root)?);
    println!("{}", sizes::check(root)?);
    Ok(())
}

fn features(root: &Path) -> Result<()> {
    FEATURES.iter().try_for_each(|features| {
        let arguments = format!("clippy -p tqkv --no-default-features --lib --features={features} -- -D warnings");
        cargo(root, &arguments, &[])
    })
}

/// wgpu (through Mesa's Vulkan) and NVRTC must be there.
fn tests(root: &Path) -> Result<()> {
    cargo(root, "test --workspace", &[("TQKV_REQUIRE", "wgpu,nvrtc"), ("TQKV_CUDA_HEAD_DIMS", "128")])
}

/// The soak test, built as `tests` builds all.
pub fn soak(root: &Path, options: &[&str]) -> Result<()> {
    cargo(root, "build --workspace --bin tqkv-checks", &[])?;
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
    let program = target.join("debug/tqkv-checks");
    command(root, &program.to_string_lossy(), &[&["soak"], options].concat(), &[])
}

/// Tests with real models, which `.ci/models` fetches.
fn models(root: &Path) -> Result<()> {
    command(root, &root.join(".ci/models").to_string_lossy(), &[], &[])?;
    let folder = root.join("target/models");
    let folder = folder.to_string_lossy();
    let environment = [("TQKV_REQUIRE", "models"), ("TQKV_MODELS", &*folder)];
    cargo(root, "test --workspace --test real --test gguf_tokenizer --test chat", &environment)
}

/// Memory errors of the CPU's portable kernels.
fn sanitizer(root: &Path) -> Result<()> {
    let environment = [
        ("RUSTC_BOOTSTRAP", "1"),
        ("RUSTFLAGS", "-Zsanitizer=address"),
        ("CARGO_TARGET_DIR", "target/asan"),
        ("TQKV_CPU", "portable"),
    ];
    cargo(root, SANITIZED, &environment)
}

/// Types on macOS, with a standard library made from Debian's source of it.
fn macos(root: &Path) -> Result<()> {
    let environment = [("RUSTC", "/usr/bin/rustc"), ("RUSTC_BOOTSTRAP", "1"), ("CARGO_TARGET_DIR", "target/macos")];
    cargo(root, "check --workspace -Zbuild-std=std --target aarch64-apple-darwin", &environment)
}

fn cargo(root: &Path, arguments: &str, environment: &[(&str, &str)]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from);
    let arguments: Vec<_> = arguments.split_whitespace().collect();
    command(root, &cargo.to_string_lossy(), &arguments, environment)
}

fn command(root: &Path, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let variables: String = environment.iter().map(|(name, value)| format!("{name}={value:?} ")).collect();
    println!("{variables}{program} {}", arguments.join(" "));
    let status = Command::new(program).args(arguments).envs(environment.iter().copied()).current_dir(root).status();
    let status = status.with_context(|| program.to_owned())?;
    ensure!(status.success(), "{program} {}: {status}", arguments.join(" "));
    Ok(())
}
