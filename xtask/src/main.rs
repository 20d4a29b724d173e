//! Maintenance commands of the workspace: `cargo xtask <command>`.

mod codebooks;
mod codec_files;
mod layers;
mod python;
mod sources;
mod stage;

use anyhow::{Result, bail};
use std::path::Path;

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace");
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["codebooks"] => {
            let path = root.join("tqkv/src/format/scalar/native.rs");
            std::fs::write(&path, codebooks::source())?;
            println!("wrote {}", path.display());
            Ok(())
        }
        ["codebooks", "--check"] => {
            let path = root.join("tqkv/src/format/scalar/native.rs");
            if std::fs::read_to_string(&path)? != codebooks::source() {
                bail!("{} is not what `cargo xtask codebooks` writes", path.display());
            }
            println!("{} is up to date", path.display());
            Ok(())
        }
        ["layers"] => {
            println!("{}", layers::check(root)?);
            Ok(())
        }
        ["codec-files"] => {
            println!("{}", codec_files::check(root)?);
            Ok(())
        }
        ["stage", name] => {
            println!("filled {}; run its run.sh on the remote machine", stage::stage(root, name)?.display());
            Ok(())
        }
        ["python-test", ref options @ ..] => {
            let release = options.contains(&"--release");
            let rest: Vec<&str> = options.iter().copied().filter(|o| *o != "--release").collect();
            match rest[..] {
                [] => python::test(root, None, release),
                ["--only", part] => python::test(root, Some(part), release),
                _ => bail!("python-test takes --only numpy|transformers|vllm and --release"),
            }
        }
        _ => bail!(
            "commands: codebooks [--check], codec-files, layers, python-test [--only PART] [--release], stage NAME"
        ),
    }
}
