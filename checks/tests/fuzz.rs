//! What the fuzzers do, on stable: seeds, inputs that once failed, and random variations of both.
//!
//! `TQKV_FUZZ_SECONDS` is how long each target is varied.

use std::path::Path;
use std::time::{Duration, Instant};
use tqkv_checks::mutate::mutated;
use tqkv_checks::support::Rng;
use tqkv_checks::targets::TARGETS;

/// Inputs that once failed.
fn kept(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/found").join(name);
    let Ok(entries) = std::fs::read_dir(folder) else { return vec![] };
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.into_iter().map(|path| std::fs::read(path).unwrap()).collect()
}

#[test]
fn every_target_keeps_its_promises() {
    let seconds = std::env::var("TQKV_FUZZ_SECONDS").map_or(0.5, |n| n.parse().expect("a number of seconds"));
    for target in TARGETS {
        let mut inputs = (target.seeds)();
        inputs.extend(kept(target.name));
        inputs.iter().for_each(|input| (target.run)(input));
        // The same inputs in every run, as many of them as there is time for.
        let (started, mut runs) = (Instant::now(), 0u64);
        while started.elapsed() < Duration::from_secs_f64(seconds) {
            let input = mutated(&mut Rng(runs), &inputs);
            let result = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(result.is_ok(), "target {}, variation {runs}: {input:?}", target.name);
            runs += 1;
        }
        println!("{:>12}: {} inputs, {runs} variations", target.name, inputs.len());
    }
}
