//! What CI runs after it has installed its tools: a list of stages, one after the other, each with its time.

use crate::{codebooks, codec_files, layers, links, plots, python, sizes};
use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// The CPU's kernels, whatever the processor has.
const SANITIZED: &str = "test -p tqkv --no-default-features --target x86_64-unknown-linux-gnu \
                         --lib --test conformance --test golden --test cache cpu";

/// Every feature without the others, and none.
const FEATURES: [&str; 5] = ["", "cuda", "wgpu", "mlx", "prefix-store"];

/// In the order in which they are published.
const PACKAGES: [&str; 3] = ["tqkv", "tqkv-candle", "tqkv-cli"];

/// What crates.io takes.
const PACKAGE_LIMIT: u64 = 10 << 20;

struct Stage {
    name: &'static str,
    run: fn(&Path) -> Result<()>,
}

const STAGES: &[Stage] = &[
    Stage { name: "spelling", run: spelling },
    Stage { name: "format", run: |root| cargo(root, "fmt --all --check", &[]) },
    Stage { name: "guide", run: |root| command(root, "mdbook", &["build", "docs"], &[]) },
    Stage { name: "dependencies", run: dependencies },
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
    Stage { name: "docs", run: docs },
    Stage { name: "package", run: package },
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
    println!("{}", links::check(root)?);
    println!("{}", plots::check(root)?);
    println!("{}", sizes::check(root)?);
    Ok(())
}

/// Licences, duplicates and sources; not advisories, whose database is on GitHub.
fn dependencies(root: &Path) -> Result<()> {
    command(root, "cargo-deny", &["--locked", "check", "--hide-inclusion-graph", "licenses", "bans", "sources"], &[])
}

fn features(root: &Path) -> Result<()> {
    FEATURES.iter().try_for_each(|features| {
        let arguments = format!("clippy -p tqkv --no-default-features --lib --features={features} -- -D warnings");
        cargo(root, &arguments, &[])
    })
}

/// wgpu (through Mesa's Vulkan) and NVRTC must be there. Of CUDA's architectures, one of each kind that kernels and plans tell apart:
/// sm_89 and sm_100 have the text and the shared memory of sm_86 and sm_90a.
fn tests(root: &Path) -> Result<()> {
    let environment = [
        ("TQKV_REQUIRE", "wgpu,nvrtc"),
        ("TQKV_CUDA_HEAD_DIMS", "128"),
        ("TQKV_CUDA_ARCHITECTURES", "sm_80,sm_86,sm_90a,sm_120"),
    ];
    cargo(root, "test --workspace", &environment)
}

/// The soak test, whose program is built beside the tests of its package: built alone, all would be compiled once more.
pub fn soak(root: &Path, options: &[&str]) -> Result<()> {
    cargo(root, "test --workspace --test fuzz --no-run", &[])?;
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

/// As docs.rs has it: every feature, and no driver.
fn docs(root: &Path) -> Result<()> {
    cargo(root, "doc --workspace --no-deps --all-features", &[("RUSTDOCFLAGS", "-D warnings")])
}

/// What the registry would be given. `cargo publish --workspace --dry-run` compiles it too.
fn package(root: &Path) -> Result<()> {
    cargo(
        root,
        "package --workspace --exclude xtask --exclude tqkv-python --exclude tqkv-checks --no-verify --allow-dirty --quiet",
        &[],
    )?;
    for name in PACKAGES {
        let listed = format!("package --list --allow-dirty -p {name}");
        let listed = Command::new(cargo_program()).args(listed.split(' ')).current_dir(root).output()?;
        let files = String::from_utf8(listed.stdout)?;
        for needed in ["README.md", "LICENSE-MIT", "LICENSE-APACHE", "src/"] {
            ensure!(files.lines().any(|file| file.starts_with(needed)), "{name} is packed without {needed}");
        }
        let test =
            files.lines().find(|file| ["tests/", "testdata/", "benches/"].iter().any(|dir| file.starts_with(dir)));
        ensure!(test.is_none(), "{name} is packed with {test:?}");
        let version = env!("CARGO_PKG_VERSION");
        let path = root.join(format!("target/package/{name}-{version}.crate"));
        let bytes = fs::metadata(&path).with_context(|| path.display().to_string())?.len();
        ensure!(bytes < PACKAGE_LIMIT, "{} has {bytes} bytes, the registry takes {PACKAGE_LIMIT}", path.display());
        println!("{name}: {} files, {bytes} bytes", files.lines().count());
    }
    Ok(())
}

/// Types on macOS, with a standard library made from Debian's source of it.
fn macos(root: &Path) -> Result<()> {
    let environment = [("RUSTC", "/usr/bin/rustc"), ("RUSTC_BOOTSTRAP", "1"), ("CARGO_TARGET_DIR", "target/macos")];
    cargo(root, "check --workspace -Zbuild-std=std --target aarch64-apple-darwin", &environment)
}

fn cargo(root: &Path, arguments: &str, environment: &[(&str, &str)]) -> Result<()> {
    let arguments: Vec<_> = arguments.split_whitespace().collect();
    command(root, &cargo_program().to_string_lossy(), &arguments, environment)
}

fn cargo_program() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

fn command(root: &Path, program: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Result<()> {
    let variables: String = environment.iter().map(|(name, value)| format!("{name}={value:?} ")).collect();
    println!("{variables}{program} {}", arguments.join(" "));
    let status = Command::new(program).args(arguments).envs(environment.iter().copied()).current_dir(root).status();
    let status = status.with_context(|| program.to_owned())?;
    ensure!(status.success(), "{program} {}: {status}", arguments.join(" "));
    Ok(())
}
