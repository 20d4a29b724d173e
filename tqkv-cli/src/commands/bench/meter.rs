//! Times and rows of results.

use super::bandwidth::Bandwidth;
use super::clock::Clock;
use crate::output;
use anyhow::{Result, bail};
use serde::Serialize;
use std::time::{Duration, Instant};
use tqkv::compute::DeviceKind;
use tqkv::format::{Encoding, RowFormat};
use tqkv::ops::PagePool;
use tqkv::{CommandEncoder, DType, Device};

/// On a processor each operation runs for about so long, and at least so often.
const TIME: Duration = Duration::from_millis(600);
const RUNS: usize = 7;
/// On a GPU so many bursts are timed, of about so long each, with pauses in which it cools down; then what is sustained.
const BURSTS: usize = 31;
const BURST: Duration = Duration::from_millis(2);
const PAUSE: Duration = Duration::from_millis(4);
const SUSTAINED: Duration = Duration::from_millis(300);
/// A GPU runs for so long before it is timed; longer, at most, where its clock is low.
const WARM: Duration = Duration::from_millis(250);
const WARM_AT_MOST: Duration = Duration::from_secs(2);
/// Below this share of the highest clock a time is not to be believed.
const LOW: f64 = 0.9;

/// A device with what it is measured against.
pub struct Meter {
    pub device: Device,
    /// Each run takes the next of several copies of its inputs. So many bytes together do not stay in any cache.
    pub cold_bytes: usize,
    /// How codes are chosen.
    pub encoding: Encoding,
    json: bool,
    clock: Option<Clock>,
    /// None until it is measured, with this meter.
    bandwidth: Option<Bandwidth>,
}

/// How long one operation takes.
#[derive(Clone, Copy)]
pub struct Timing {
    /// The median.
    pub seconds: f64,
    /// The mean of many without a pause, on GPUs.
    pub sustained: Option<f64>,
    /// The clock's share of the highest seen, where it may change: before or after, the lower.
    pub clock: Option<f64>,
}

impl Timing {
    pub fn faster(self, other: Timing) -> Timing {
        if other.seconds < self.seconds { other } else { self }
    }
}

/// What bounds an operation.
#[derive(Clone, Copy)]
pub enum Limit {
    Read,
    Copy,
}

/// One result.
pub struct Measurement {
    pub op: &'static str,
    pub shape: String,
    pub codec: String,
    pub timing: Timing,
    pub bytes: usize,
    pub limit: Limit,
    pub error: f64,
    /// What is further off is not worth timing.
    pub tolerance: f64,
    /// Of attention alone.
    pub products: Option<Products>,
}

/// The products of attention.
#[derive(Clone, Copy)]
pub struct Products {
    pub query: DType,
    /// Multiplications and additions of queries with keys and weights with values that are seen.
    pub flops: f64,
}

/// A step's times in milliseconds, in the order in which an engine would look at them.
#[derive(Clone, Copy, Serialize)]
pub struct StepTimes {
    pub layers: usize,
    /// From the first call to the end of waiting.
    pub ms_wall: f64,
    /// What of it the host records.
    pub ms_record: f64,
    /// The device alone.
    pub ms_device: f64,
    /// By the clock of the host where a step is captured once and replayed; null where that does not exist.
    pub ms_replay: Option<f64>,
}

#[derive(Serialize)]
struct Row {
    op: &'static str,
    shape: String,
    codec: String,
    device: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
    ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    ms_sustained: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    clock_share: Option<f64>,
    bytes: usize,
    gb_per_s: f64,
    share_of_bandwidth: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    query: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tflops: Option<f64>,
    max_rel_error: f64,
    #[serde(flatten)]
    step: Option<StepTimes>,
}

impl Meter {
    pub fn new(device: Device, cold_bytes: usize, json: bool) -> Result<Self> {
        let clock = Clock::new(&device)?;
        let mut meter = Meter { device, cold_bytes, encoding: Encoding::default(), json, clock, bandwidth: None };
        let bandwidth = Bandwidth::measure(&meter)?;
        meter.bandwidth = Some(bandwidth);
        let Bandwidth { bytes, read, copy } = bandwidth;
        for (op, timing, moved, limit) in [("read", read, bytes, Limit::Read), ("copy", copy, 2 * bytes, Limit::Copy)] {
            let (shape, codec) = (format!("{} MiB", bytes >> 20), "-".to_owned());
            meter.report(Measurement {
                op,
                shape,
                codec,
                timing,
                bytes: moved,
                limit,
                error: 0.0,
                tolerance: 0.0,
                products: None,
            })?;
        }
        Ok(meter)
    }

    /// A pool whose rows' codes are chosen as the meter says.
    pub fn pool(&self, row: RowFormat, kv_heads: usize, page_size: usize, pages: usize) -> Result<PagePool> {
        Ok(PagePool::new(&self.device, row, kv_heads, page_size, pages)?.with_encoding(self.encoding)?)
    }

    /// Times what `record` records, again and again, with the number of the run.
    pub fn time(&self, record: impl Fn(usize, &mut CommandEncoder) -> tqkv::Result<()>) -> Result<Timing> {
        let several = |first: usize, n: usize| -> Result<f64> {
            let mut encoder = self.device.encoder()?;
            (first..first + n).try_for_each(|run| record(run, &mut encoder))?;
            Ok(encoder.submit_and_time()?.as_secs_f64())
        };
        if self.device.info().kind == DeviceKind::Cpu {
            return median(&mut |run| several(run, 1));
        }
        // Compiles, allocates and warms up.
        several(0, 1)?;
        let one = (several(1, 2)? / 2.0).max(1e-6);
        let n = ((BURST.as_secs_f64() / one) as usize).clamp(1, 256);
        let share = || self.clock.as_ref().map(|clock| clock.share(&self.device)).transpose();
        let (mut before, started) = (None, Instant::now());
        while self.clock.is_some()
            && (started.elapsed() < WARM || before.is_some_and(|s| s < LOW) && started.elapsed() < WARM_AT_MOST)
        {
            several(0, n)?;
            before = share()?;
        }
        let mut bursts = Vec::with_capacity(BURSTS);
        // A driver that runs on the processor does not cool down, and takes its time.
        let (bursts_wanted, sustained) =
            if self.device.info().is_gpu { (BURSTS, SUSTAINED) } else { (RUNS, Duration::ZERO) };
        for burst in 0..bursts_wanted {
            std::thread::sleep(PAUSE);
            bursts.push(several(burst * n, n)? / n as f64);
        }
        bursts.sort_by(f64::total_cmp);
        let (mut spent, mut runs) = (0.0, 0);
        while spent < sustained.as_secs_f64() {
            spent += several(runs, n)?;
            runs += n;
        }
        let clock = before.zip(share()?).map(|(before, after)| before.min(after));
        Ok(Timing { seconds: bursts[bursts.len() / 2], sustained: (runs > 0).then(|| spent / runs as f64), clock })
    }

    /// Times work of the host.
    pub fn time_host(&self, mut run: impl FnMut(usize) -> Result<()>) -> Result<Timing> {
        median(&mut |i| {
            let started = Instant::now();
            run(i)?;
            Ok(started.elapsed().as_secs_f64())
        })
    }

    pub fn once(&self, record: impl FnOnce(&mut CommandEncoder) -> tqkv::Result<()>) -> Result<()> {
        let mut encoder = self.device.encoder()?;
        record(&mut encoder)?;
        Ok(encoder.submit_and_wait()?)
    }

    pub fn report(&self, measurement: Measurement) -> Result<()> {
        self.report_row(measurement, None)
    }

    pub fn report_step(&self, measurement: Measurement, times: StepTimes) -> Result<()> {
        self.report_row(measurement, Some(times))
    }

    fn report_row(&self, measurement: Measurement, step: Option<StepTimes>) -> Result<()> {
        let Measurement { op, shape, codec, timing, bytes, limit, error, tolerance, products } = measurement;
        if error.is_nan() || error > tolerance {
            bail!("{op} {codec} ({shape}) is off by {error:e}, expected at most {tolerance:e}");
        }
        let speed = bytes as f64 / timing.seconds;
        let bandwidth = self.bandwidth.map_or(f64::NAN, |b| b.speed(limit));
        let info = self.device.info();
        let row = Row {
            op,
            shape,
            codec,
            device: info.id,
            threads: info.threads,
            ms: timing.seconds * 1e3,
            ms_sustained: timing.sustained.map(|s| s * 1e3),
            clock_share: timing.clock,
            bytes,
            gb_per_s: speed / 1e9,
            share_of_bandwidth: speed / bandwidth,
            query: products.map(|p| p.query.to_string()),
            tflops: products.map(|p| p.flops / timing.seconds / 1e12),
            max_rel_error: error,
            step,
        };
        let low = timing.clock.filter(|&share| share < LOW);
        if let Some(share) = low {
            output::note(&format!(
                "warning: the GPU's clock is at {:.0} % of what it was: {} {} takes that much longer. A process beside this one that \
                 holds a CUDA context keeps an NVIDIA GPU's clock up.",
                share * 100.0,
                row.op,
                row.codec
            ));
        }
        if self.json {
            return output::print_json(&row);
        }
        if let Some(StepTimes { layers, ms_wall, ms_record, ms_device, ms_replay }) = row.step {
            let replay = ms_replay.map_or(String::new(), |ms| format!(", replayed {ms:.3}"));
            return output::print(&format!(
                "{:<14} {:<26} {:<6} {ms_wall:>9.3} ms wall ({layers} layers: recording {ms_record:.3}, device {ms_device:.3}{replay})   error {:.1e}\n",
                row.op, row.shape, row.codec, row.max_rel_error
            ));
        }
        let sustained = row.ms_sustained.map_or(String::new(), |ms| format!(" ({ms:.4} sustained)"));
        let products = products.map_or(String::new(), |Products { query, flops }| {
            format!(" {:>7.3} TFLOP/s, {query} queries", flops / timing.seconds / 1e12)
        });
        output::print(&format!(
            "{:<14} {:<26} {:<6} {:>9.4} ms{sustained} {:>7.1} GB/s {:>5.1} %{products}   error {:.1e}{}\n",
            row.op,
            row.shape,
            row.codec,
            row.ms,
            row.gb_per_s,
            row.share_of_bandwidth * 100.0,
            row.max_rel_error,
            low.map_or(String::new(), |share| format!("   LOW CLOCK: {:.0} %", share * 100.0))
        ))
    }
}

/// The median of what `run` returns, called again and again on a processor.
fn median(run: &mut dyn FnMut(usize) -> Result<f64>) -> Result<Timing> {
    // The first run is slower: pages are mapped, threads start.
    run(0)?;
    let (started, mut times) = (Instant::now(), Vec::new());
    while times.len() < RUNS || started.elapsed() < TIME {
        times.push(run(times.len() + 1)?);
    }
    times.sort_by(f64::total_cmp);
    Ok(Timing { seconds: times[times.len() / 2], sustained: None, clock: None })
}
