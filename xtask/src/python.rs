//! The wheel of `tqkv-python`, built and tested in a locked environment.

use anyhow::{Context, Result, bail, ensure};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Parts of the tests, each with a lock of packages on top of those before it.
pub const PARTS: [&str; 3] = ["numpy", "transformers", "vllm"];

/// Builds the wheel and runs the tests of some parts. With `release` it is the wheel that is shipped, else one that is built sooner.
pub fn test(root: &Path, parts: &[&str], release: bool) -> Result<String> {
    if let Some(unknown) = parts.iter().find(|part| !PARTS.contains(part)) {
        bail!("no part {unknown:?} of the tests, expected some of: {}", PARTS.join(", "));
    }
    let crate_dir = root.join("tqkv-python");
    let environment = Environment::new(root.join("target/python"))?;
    environment.install(&crate_dir, PARTS[0])?;
    environment.wheel(&crate_dir, release)?;
    for (i, part) in PARTS.iter().enumerate().filter(|(_, part)| parts.contains(part)) {
        PARTS[..=i].iter().try_for_each(|lock| environment.install(&crate_dir, lock))?;
        environment.pytest(&crate_dir, part)?;
    }
    Ok(format!("the wheel is tested with {}: {}", parts.join(", "), environment.root.join("wheels").display()))
}

/// A virtual environment and what is built beside it.
struct Environment {
    root: PathBuf,
    python: PathBuf,
}

impl Environment {
    fn new(root: PathBuf) -> Result<Self> {
        fs::create_dir_all(&root)?;
        let python = root.join("venv/bin/python");
        if !python.exists() {
            run(Command::new("python3").args(["-m", "venv"]).arg(root.join("venv")))?;
        }
        Ok(Environment { root, python })
    }

    /// Installs the packages of a lock, unless they are there.
    fn install(&self, crate_dir: &Path, part: &str) -> Result<()> {
        let lock = crate_dir.join(format!("locks/{part}.txt"));
        let (wanted, stamp) = (fs::read_to_string(&lock)?, self.root.join(format!("venv/{part}.installed")));
        if fs::read_to_string(&stamp).is_ok_and(|installed| installed == wanted) {
            return Ok(());
        }
        let mut pip = self.python(&["-m", "pip", "install", "-q", "--no-deps", "-r"]);
        run(pip.arg(&lock)).with_context(|| format!("a package of {} cannot be had today", lock.display()))?;
        // Which brings torch.
        if part == PARTS[1] {
            let packages = output(&mut self.python(&["-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]))?;
            let mut stubs = self.python(&[]);
            run(stubs.arg(crate_dir.join("tests/cuda_stubs.py")).arg(packages.trim()).arg(self.stubs()))?;
        }
        Ok(fs::write(stamp, wanted)?)
    }

    /// Builds the wheel and installs it.
    fn wheel(&self, crate_dir: &Path, release: bool) -> Result<()> {
        let wheels = self.root.join("wheels");
        if wheels.exists() {
            fs::remove_dir_all(&wheels)?;
        }
        let profile = if release { "release" } else { "dev" };
        let mut maturin = self.python(&["-m", "maturin", "build", "--profile", profile, "--locked", "-i"]);
        run(maturin.arg(&self.python).arg("-o").arg(&wheels).current_dir(crate_dir))?;
        let wheel = fs::read_dir(&wheels)?.next().context("maturin built no wheel")??.path();
        run(self.python(&["-m", "pip", "install", "-q", "--no-deps", "--force-reinstall"]).arg(wheel))
    }

    fn pytest(&self, crate_dir: &Path, part: &str) -> Result<()> {
        let mut tests = vec![crate_dir.join(format!("tests/test_{part}.py"))];
        // Which are skipped where there is no GPU.
        let on_gpus = [(PARTS[1], "test_cuda.py"), (PARTS[2], "test_vllm_cuda.py")];
        tests.extend(on_gpus.iter().filter(|(of, _)| *of == part).map(|(_, file)| crate_dir.join("tests").join(file)));
        println!("== {part}");
        // From elsewhere, so that the package is the wheel's.
        let mut pytest = self.python(&["-P", "-m", "pytest", "-q", "-p", "no:cacheprovider"]);
        run(pytest.args(tests).env("LD_LIBRARY_PATH", self.stubs()).current_dir(&self.root))
    }

    fn stubs(&self) -> PathBuf {
        self.root.join("cuda-stubs")
    }

    fn python(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.python);
        command.args(args);
        command
    }
}

fn run(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("{command:?}"))?;
    ensure!(status.success(), "{command:?}: {status}");
    Ok(())
}

fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
