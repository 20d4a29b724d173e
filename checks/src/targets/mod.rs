//! What is fuzzed: functions of bytes that must neither panic nor break a promise, whatever the bytes are.

mod codecs;
mod ops;
pub mod schedule;
mod snapshot;

#[cfg(feature = "models")]
mod calibration;
#[cfg(feature = "models")]
mod gguf;
#[cfg(feature = "models")]
mod tokenizer;
#[cfg(feature = "models")]
mod weights;

use std::path::Path;
use std::sync::OnceLock;
use tqkv::Device;

/// A function of bytes, and where to start from.
pub struct Target {
    /// Its name, also that of the fuzzer.
    pub name: &'static str,
    /// Panics if a promise is broken.
    pub run: fn(&[u8]),
    /// Inputs that get far.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// All of them.
pub const TARGETS: &[Target] = &[
    Target { name: "codecs", run: codecs::run, seeds: codecs::seeds },
    Target { name: "ops", run: ops::run, seeds: ops::seeds },
    Target { name: "schedule", run: schedule::run, seeds: schedule::seeds },
    Target { name: "snapshot", run: snapshot::run, seeds: snapshot::seeds },
    #[cfg(feature = "models")]
    Target { name: "calibration", run: calibration::run, seeds: calibration::seeds },
    #[cfg(feature = "models")]
    Target { name: "gguf", run: gguf::run, seeds: gguf::seeds },
    #[cfg(feature = "models")]
    Target { name: "tokenizer", run: tokenizer::run, seeds: tokenizer::seeds },
    #[cfg(feature = "models")]
    Target { name: "weights", run: weights::run, seeds: weights::seeds },
];

/// Runs the target of this name.
///
/// # Panics
/// If there is none, or a promise is broken.
pub fn run(name: &str, bytes: &[u8]) {
    let target = TARGETS.iter().find(|t| t.name == name).expect("a target of this name");
    (target.run)(bytes);
}

/// The processor, one thread of it.
pub(crate) fn cpu() -> &'static Device {
    static CPU: OnceLock<Device> = OnceLock::new();
    CPU.get_or_init(|| Device::cpu_with_threads(1).expect("a processor"))
}

/// Writes the seeds of all targets to a folder for each, by their numbers.
///
/// # Errors
/// What the system says.
pub fn write_seeds(folder: &Path) -> std::io::Result<()> {
    for target in TARGETS {
        let own = folder.join(target.name);
        std::fs::create_dir_all(&own)?;
        for (i, seed) in (target.seeds)().iter().enumerate() {
            std::fs::write(own.join(format!("seed-{i}")), seed)?;
        }
    }
    Ok(())
}

/// Runs with a folder that holds these files: in memory where the machine has such a folder.
fn in_folder(files: &[(&str, &[u8])], run: impl FnOnce(&Path)) {
    let memory = Path::new("/dev/shm");
    let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let folder = tempfile::tempdir_in(parent).expect("a temporary folder");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("a file in a temporary folder");
    }
    run(folder.path());
}

/// Cuts bytes into so many parts, the lengths of which stand before them in 16 bits each.
fn parts<const N: usize>(bytes: &[u8]) -> [&[u8]; N] {
    let (lengths, mut rest) = bytes.split_at(bytes.len().min(2 * (N - 1)));
    std::array::from_fn(|i| {
        let length = lengths.get(2 * i..2 * i + 2).map_or(usize::MAX, |n| u16::from_le_bytes([n[0], n[1]]).into());
        let (part, after) = rest.split_at(length.min(rest.len()));
        rest = after;
        part
    })
}

/// What [`parts`] cuts.
#[cfg(feature = "models")]
fn joined<const N: usize>(parts: [&[u8]; N]) -> Vec<u8> {
    let mut bytes: Vec<u8> = parts[..N - 1].iter().flat_map(|p| (p.len() as u16).to_le_bytes()).collect();
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes
}
