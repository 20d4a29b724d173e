//! What operations of the host take, over the size of what the cache holds; and a snapshot that is larger than memory.

use crate::soak::resident;
use std::hint::black_box;
use std::io::{self, Write};
use std::time::Instant;
use tqkv::{CacheConfig, Codec, CodecPair, DType, Device, Error, KvCache, SequenceId};

const PAGE: usize = 64;

/// Times, and a snapshot of so many GiB.
#[derive(Clone, Debug, clap::Args)]
pub struct Scale {
    /// Size of the snapshot.
    #[arg(long, default_value_t = 64)]
    pub gib: usize,
}

impl Scale {
    /// Prints a line for each size.
    ///
    /// # Errors
    /// What a cache says.
    pub fn run(&self) -> Result<(), String> {
        positions()
            .and_then(|()| sequences())
            .and_then(|()| forks())
            .and_then(|()| freed())
            .map_err(|e| e.to_string())?;
        let (bytes, grown, seconds) = streamed(self.gib).map_err(|e| e.to_string())?;
        println!(
            "snapshot of {:.2} GiB streamed in {seconds:.0} s, {} MiB more in memory at most",
            bytes as f64 / (1u64 << 30) as f64,
            grown >> 20
        );
        Ok(())
    }
}

/// One small layer.
fn cache(positions: usize) -> Result<KvCache, Error> {
    let config = CacheConfig::new(1, 1, 16).codec("k2v2".parse()?).page_size(PAGE).capacity(positions);
    KvCache::new(&Device::cpu(), config)
}

/// New positions that count, though nothing is written.
fn append(cache: &mut KvCache, tokens: &[(SequenceId, usize)]) -> Result<(), Error> {
    let n: usize = tokens.iter().map(|t| t.1).sum();
    let (device, config) = (cache.device().clone(), cache.config().clone());
    let x = device.zeros(DType::F32, &[n, config.kv_heads(), config.head_dim()])?;
    let (mut encoder, mut step) = (device.encoder()?, cache.step(tokens)?);
    (0..config.layers()).try_for_each(|layer| step.append(&mut encoder, layer, &x, &x))?;
    step.commit()
}

/// Microseconds of one of `n` calls.
fn time(n: usize, mut run: impl FnMut() -> Result<(), Error>) -> Result<f64, Error> {
    let started = Instant::now();
    (0..n).try_for_each(|_| run())?;
    Ok(started.elapsed().as_secs_f64() * 1e6 / n as f64)
}

fn positions() -> Result<(), Error> {
    println!(
        "positions of a sequence: microseconds to append a token, to fork and free, to cut a token, to ask for usage"
    );
    for len in [1 << 10, 1 << 14, 1 << 17, 1 << 20] {
        let mut cache = cache(len + 300 * PAGE)?;
        let id = cache.add_sequence();
        append(&mut cache, &[(id, len)])?;
        let token = time(100, || append(&mut cache, &[(id, 1)]))?;
        let fork = time(100, || {
            let twin = cache.fork(id)?;
            cache.free_sequence(twin)
        })?;
        let mut left = cache.len(id)?;
        let cut = time(100, || {
            left -= 1;
            cache.truncate(id, left)
        })?;
        let usage = time(1000, || {
            black_box(cache.usage());
            Ok(())
        })?;
        println!("{len:>8} {token:>9.2} {fork:>9.2} {cut:>7.2} {usage:>6.3}");
    }
    Ok(())
}

fn sequences() -> Result<(), Error> {
    println!("sequences: microseconds to append a token to one, and to each in a step of all");
    for n in [1, 64, 4096] {
        let mut cache = cache(2 * n * PAGE)?;
        let all: Vec<_> = (0..n).map(|_| (cache.add_sequence(), 1)).collect();
        append(&mut cache, &all)?;
        let one = time(30, || append(&mut cache, &all[n / 2..n / 2 + 1]))?;
        let each = time(20, || append(&mut cache, &all))? / n as f64;
        println!("{n:>8} {one:>9.2} {each:>9.3}");
    }
    Ok(())
}

fn forks() -> Result<(), Error> {
    println!("forks of a prefix of 64 pages: microseconds of a further fork, and to end one");
    let mut cache = cache(65 * PAGE)?;
    let prefix = cache.add_sequence();
    append(&mut cache, &[(prefix, 64 * PAGE)])?;
    let mut twins = vec![];
    for n in [1000, 10_000, 100_000] {
        while twins.len() < n {
            twins.push(cache.fork(prefix)?);
        }
        let fork = time(100, || cache.fork(prefix).map(|twin| twins.push(twin)))?;
        let end = time(100, || twins.pop().map_or(Ok(()), |twin| cache.free_sequence(twin)))?;
        println!("{n:>8} {fork:>9.2} {end:>9.2}");
    }
    Ok(())
}

fn freed() -> Result<(), Error> {
    println!("pages held, freed at random: microseconds to free one");
    for n in [100, 1000, 10_000] {
        let mut cache = cache(n * PAGE)?;
        let mut all: Vec<_> = (0..n).map(|_| (cache.add_sequence(), PAGE)).collect();
        append(&mut cache, &all)?;
        let mut rng = crate::support::Rng(1);
        let free = time(n, || {
            let at = rng.below(all.len());
            cache.free_sequence(all.swap_remove(at).0)
        })?;
        println!("{n:>8} {free:>9.3}");
    }
    Ok(())
}

/// Counts what it is given, and how much memory the process has meanwhile.
#[derive(Default)]
struct Sink {
    bytes: u64,
    most: u64,
}

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.bytes >> 28 != (self.bytes + data.len() as u64) >> 28 {
            self.most = self.most.max(resident().unwrap_or(0));
        }
        self.bytes += data.len() as u64;
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A snapshot of memory that was never written, which the system need not have: bytes, how much memory grew, seconds.
///
/// # Errors
/// What a cache says.
pub fn streamed(gib: usize) -> Result<(u64, u64, f64), Error> {
    // 8 layers of 4 KiB a position and side.
    let positions = (gib << 30) / (8 * 8192);
    let config = CacheConfig::new(8, 2, 512).codec(CodecPair::both(Codec::F32)).page_size(PAGE).capacity(positions);
    let mut cache = KvCache::new(&Device::cpu(), config)?;
    let id = cache.add_sequence();
    append(&mut cache, &[(id, positions)])?;
    let (before, started) = (resident().unwrap_or(0), Instant::now());
    let mut sink = Sink::default();
    cache.write_snapshot(&[(id, positions)], &mut sink, b"m")?;
    Ok((sink.bytes, sink.most.saturating_sub(before), started.elapsed().as_secs_f64()))
}
