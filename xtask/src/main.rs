//! Maintenance commands of the workspace: `cargo xtask <command>`.

mod ci;
mod codebooks;
mod codec_files;
mod layers;
mod links;
mod plots;
mod python;
mod sizes;
mod sources;
mod stage;

use anyhow::{Result, bail};
use std::path::Path;

fn main() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace");
    let args: Vec<String> = std::env::args().skip(1).collect();
    let said = match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["ci", ref stages @ ..] => ci::run(root, stages)?,
        ["codebooks"] => codebooks::write(root)?,
        ["codebooks", "--check"] => codebooks::check(root)?,
        ["codec-files"] => codec_files::check(root)?,
        ["layers"] => layers::check(root)?,
        ["links"] => links::check(root)?,
        ["plots"] => plots::write(root)?,
        ["plots", "--check"] => plots::check(root)?,
        ["soak", ref options @ ..] => ci::soak(root, options).map(|()| String::new())?,
        ["sizes"] => sizes::check(root)?,
        ["stage", name] => {
            format!("filled {}; run its run.sh on the remote machine", stage::stage(root, name)?.display())
        }
        ["python-test", ref options @ ..] => {
            let release = options.contains(&"--release");
            let rest: Vec<&str> = options.iter().copied().filter(|o| *o != "--release").collect();
            match rest[..] {
                [] => python::test(root, &python::PARTS, release)?,
                ["--only", part] => python::test(root, &[part], release)?,
                _ => bail!("python-test takes --only numpy|transformers|vllm and --release"),
            }
        }
        _ => bail!(
            "commands: ci [STAGE ...], codebooks [--check], codec-files, layers, links, plots [--check], python-test [--only PART] \
             [--release], sizes, soak [--minutes N] [--device D] [--seed S], stage NAME"
        ),
    };
    println!("{said}");
    Ok(())
}
