//! Executables for a remote machine that has a GPU but no Rust: built here, copied there as a folder.

use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Fills `.remote/<name>` with the tests of the library, the `tqkv` program, what they read, and `run.sh`.
pub fn stage(root: &Path, name: &str) -> Result<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    ensure!(!name.is_empty() && name.chars().all(plain), "{name:?}: expected letters, digits, - and _");
    let folder = root.join(".remote").join(name);
    fs::create_dir_all(&folder)?;

    // Cargo says on standard error which executable each test target became: `Executable tests/golden.rs (path)`.
    let own = cargo(root, &["test", "--release", "--no-run", "-p", "tqkv"])?;
    let schedules = cargo(root, &["test", "--release", "--no-run", "-p", "tqkv-checks", "--test", "schedules"])?;
    let mut names = vec![];
    for line in own.lines().chain(schedules.lines()).filter_map(|l| l.trim().strip_prefix("Executable ")) {
        let (target, path) = line.rsplit_once(" (").context("cargo's list of executables")?;
        let source = target.trim_start_matches("unittests ");
        let stem = Path::new(source).file_stem().context("a test's name")?.to_string_lossy().into_owned();
        copy_stripped(&root.join(path.trim_end_matches(')')), &folder.join(&stem))?;
        names.push(stem);
    }
    ensure!(!names.is_empty(), "cargo built no tests");
    cargo(root, &["build", "--release", "-p", "tqkv-cli"])?;
    copy_stripped(&root.join("target/release/tqkv"), &folder.join("tqkv"))?;

    // Tests look for their data where the repository was built.
    let data = folder.join("testdata/golden");
    fs::create_dir_all(&data)?;
    for entry in fs::read_dir(root.join("testdata/golden"))? {
        let entry = entry?;
        fs::copy(entry.path(), data.join(entry.file_name()))?;
    }
    let script = format!(
        "#!/usr/bin/env bash\n\
         # run.sh [DEVICE...]: the tests on these devices, then the benchmark. cuda needs the driver and NVRTC (CUDA 12 or 13), wgpu\n\
         # a Vulkan loader.\n\
         set -u\n\
         here=$(cd \"$(dirname \"$0\")\" && pwd)\n\
         built={built:?}\n\
         [ -e \"$built\" ] || {{ mkdir -p \"$built/tqkv\" && ln -s \"$here/testdata\" \"$built/testdata\"; }}\n\
         export TQKV_CACHE_DIR=\"$here/kernels\"\n\
         failed=0\n\
         for device in \"${{@:-cuda}}\"; do\n    \
             export TQKV_REQUIRE=$device\n    \
             for test in {tests}; do\n        \
                 echo \"== $test $device\"\n        \
                 \"$here/$test\" --nocapture $device || failed=1\n    \
             done\n    \
             \"$here/tqkv\" bench --device $device || failed=1\n\
         done\n\
         exit $failed\n",
        built = root,
        tests = names.join(" "),
    );
    fs::write(folder.join("run.sh"), script)?;
    Ok(folder)
}

/// Runs cargo and returns what it says on standard error.
fn cargo(root: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new("cargo").args(args).current_dir(root).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "cargo {}:\n{said}", args.join(" "));
    Ok(said)
}

fn copy_stripped(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    // Only smaller without its symbols; a machine that lacks `strip` sends more.
    let _ = Command::new("strip").arg(to).status();
    Ok(())
}
