//! Hours of random use of caches on a device, compared all the time, in memory that must not grow.

use crate::config::LAYERS;
use crate::model::Model;
use crate::step::Step;
use crate::support::Rng;
use arbitrary::Unstructured;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime};
use tqkv::Device;

/// Steps of a round: a cache from its beginning to its end.
const ROUND: usize = 500;
/// Rounds after which memory has the size that it keeps.
const WARM: u64 = 4;
/// Bytes that allocators and drivers may move by.
const SLACK: u64 = 48 << 20;

/// A soak test.
#[derive(Clone, Debug, clap::Args)]
pub struct Soak {
    /// How long.
    #[arg(long, default_value_t = 1.0)]
    pub minutes: f64,
    /// On which device.
    #[arg(long, default_value = "cpu")]
    pub device: String,
    /// The first round's seed; each further round has the next. Any by default.
    #[arg(long)]
    pub seed: Option<u64>,
}

impl Soak {
    /// Runs whole rounds until the time is over, and prints how many.
    ///
    /// # Errors
    /// What failed, with the command that repeats it.
    pub fn run(&self) -> Result<(), String> {
        let device = Device::open(&self.device).map_err(|e| e.to_string())?;
        let now = || SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |t| t.as_millis() as u64);
        let first = self.seed.unwrap_or_else(now);
        println!("soak on {device} from seed {first}");
        let (started, length) = (Instant::now(), Duration::from_secs_f64(self.minutes.clamp(0.0, 1e6) * 60.0));
        let (mut rounds, mut steps, mut most_warm) = (0, 0, 0);
        while rounds == 0 || started.elapsed() < length {
            let seed = first.wrapping_add(rounds);
            let result = catch_unwind(AssertUnwindSafe(|| round(&device, seed)));
            steps += result.map_err(|_| {
                format!("failed; again: cargo xtask soak --minutes 0 --device {} --seed {seed}", self.device)
            })?;
            rounds += 1;
            let resident = resident().unwrap_or(0);
            if rounds <= WARM {
                most_warm = most_warm.max(resident);
            } else if resident > most_warm + SLACK {
                let [got, expected] = [resident, most_warm].map(|n| n >> 20);
                return Err(format!("memory grew: {got} MiB after round {rounds}, {expected} MiB after {WARM}"));
            }
        }
        let memory = [most_warm, resident().unwrap_or(0)].map(|n| n >> 20);
        println!(
            "{steps} steps in {rounds} rounds and {:.0} s; {} MiB after {} rounds, {} MiB in the end",
            started.elapsed().as_secs_f64(),
            memory[0],
            WARM.min(rounds),
            memory[1]
        );
        Ok(())
    }
}

/// A cache's life; gives the number of its steps.
fn round(device: &Device, seed: u64) -> usize {
    let (mut model, mut rng) = (Model::new(device), Rng(seed));
    for _ in 0..ROUND {
        let bytes = rng.bytes(64);
        if let Ok(step) = Step::draw(&mut Unstructured::new(&bytes), LAYERS) {
            model.run(&step);
        }
    }
    model.finish();
    ROUND
}

/// Bytes of this process in memory, where the system says so.
pub(crate) fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? << 10)
}
