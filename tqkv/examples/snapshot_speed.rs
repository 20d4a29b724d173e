//! How fast caches are saved and loaded, beside the disk's own sequential speed in the same directory.
//!
//! ```text
//! cargo run --release -p tqkv --example snapshot_speed -- DIR [POSITIONS] [DEVICE]
//! ```
//!
//! The cache is that of an 8B model: 32 layers, 8 KV heads of 128, here in f16: 128 KiB a position. Each kind of run is
//! made seven times in turn, and medians are printed. On Linux files are read from the disk, elsewhere perhaps from memory; the
//! output says which.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;
use tqkv::{CacheConfig, Codec, CodecPair, Device, KvCache, Snapshot};

type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

const CHUNK: usize = 16 << 20;
const STEP: usize = 512;
const ROUNDS: usize = 7;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let dir = Path::new(arguments.first().ok_or("usage: snapshot_speed DIR [POSITIONS] [DEVICE]")?);
    let positions: usize = arguments.get(1).map_or(Ok(8192), |n| n.parse())?;
    let device = Device::open(arguments.get(2).map_or("cpu", String::as_str))?;
    let config = CacheConfig::new(32, 8, 128).codec(CodecPair::both(Codec::F16)).capacity(positions);
    let mut cache = KvCache::new(&device, config.clone())?;
    let sequence = cache.add_sequence();
    for start in (0..positions).step_by(STEP) {
        let n = STEP.min(positions - start);
        let x: Vec<u32> =
            (0..n * 8 * 64).map(|i| ((i + start) as u32).wrapping_mul(2_654_435_769) & 0x3fff_3fff).collect();
        let x = device.upload(bytemuck::cast_slice::<_, half::f16>(&x), &[n, 8, 128])?;
        let mut encoder = device.encoder()?;
        for layer in 0..32 {
            cache.append(&mut encoder, layer, &[(sequence, n)], &x, &x)?;
        }
        encoder.submit_and_wait()?;
    }
    let (saved, plain) = (dir.join("snapshot_speed.tqkv"), dir.join("snapshot_speed.raw"));
    let mut target = KvCache::new(&device, config)?;
    let mut times = [const { vec![] }; 4];
    let mut cold = true;
    let mut bytes = 0;
    for _ in 0..ROUNDS {
        // Both start without a file, and with the memory that the old ones took: a virtual machine may be slow to get more.
        for path in [&saved, &plain] {
            let _ = std::fs::remove_file(path);
        }
        times[0].push(timed(|| Ok(cache.save(&[sequence], &saved, b"model")?))?);
        bytes = std::fs::metadata(&saved)?.len();
        times[1].push(timed(|| write(&plain, bytes))?);
        cold &= forget(&saved)?;
        let mut loaded = vec![];
        times[2].push(timed(|| {
            loaded = target.load(&saved, b"model")?;
            Ok(())
        })?);
        cold &= forget(&plain)?;
        times[3].push(timed(|| read(&plain))?);
        for sequence in loaded {
            target.free_sequence(sequence)?;
        }
    }
    Snapshot::verify(&saved)?;
    std::fs::remove_file(&saved)?;
    std::fs::remove_file(&plain)?;
    let [save, write, load, read] = times.map(|mut t| {
        t.sort_by(f64::total_cmp);
        bytes as f64 / t[t.len() / 2] / 1e6
    });
    let from = if cold { "disk" } else { "memory" };
    println!("{device}, {:.0} MB in {}", bytes as f64 / 1e6, dir.display());
    println!("save {save:.0} MB/s, write and flush {write:.0} MB/s: {:.0} %", 100.0 * save / write);
    println!("load {load:.0} MB/s, read from {from} {read:.0} MB/s: {:.0} %", 100.0 * load / read);
    Ok(())
}

fn timed(run: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    run()?;
    Ok(started.elapsed().as_secs_f64())
}

fn write(path: &Path, bytes: u64) -> Result<()> {
    let chunk: Vec<u8> = (0..CHUNK).map(|i| ((i * 31) >> 3) as u8).collect();
    let mut file = File::create(path)?;
    let mut left = bytes as usize;
    while left > 0 {
        let n = left.min(CHUNK);
        file.write_all(&chunk[..n])?;
        left -= n;
    }
    Ok(file.sync_all()?)
}

fn read(path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let mut chunk = vec![0; CHUNK];
    while file.read(&mut chunk)? > 0 {}
    Ok(())
}

/// Makes the system forget what it holds of a file; says whether it can.
fn forget(path: &Path) -> Result<bool> {
    #[cfg(target_os = "linux")]
    {
        rustix::fs::fadvise(File::open(path)?, 0, None, rustix::fs::Advice::DontNeed)?;
        Ok(true)
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = path;
        Ok(false)
    }
}
