//! A step that is recorded once and run for any number of tokens.

use super::plan::{like_reads, like_writes};
use super::reserve::Change;
use super::state::{KvCache, SequenceId};
use super::step::{Plans, Step};
use crate::compute::{Buffer, CommandEncoder, DeviceKind, Repeatable, Submission};
use crate::error::{Error, Result};
use crate::ops::Batch;
use std::sync::Arc;

/// What records a step.
type Record<'f> = dyn FnMut(&mut Step, &mut CommandEncoder) -> Result<()> + 'f;

/// A step of decoding that is recorded once and then run for token after token, with what its buffers hold at the time.
///
/// It is made of what records the step, always in the same buffers. On CUDA the recorded step becomes a graph: each further
/// [`run`](Replay::run) takes the new tokens' pages, brings lengths, page tables and plans in the device's memory up to date and launches the
/// graph. Where that does not do, the step is recorded anew, and kept from then on: for other numbers of new tokens, in another cache, when a
/// page table has outgrown its room (which then doubles), or when other kernels suit the lengths better. So a run always computes
/// what the step recorded for it alone would, to the bit. Sequences may be forked, cut, freed or exchanged for others between runs;
/// copies of shared pages are made before the graph. On other devices every run records.
///
/// ```
/// use tqkv::{CacheConfig, DType, Device, KvCache, cache::Replay, ops::AttentionParams};
/// let device = Device::cpu();
/// let mut cache = KvCache::new(&device, CacheConfig::new(2, 2, 64))?;
/// let (a, b) = (cache.add_sequence(), cache.add_sequence());
/// let kv = device.zeros(DType::F16, &[2, 2, 64])?;    // a token of a, then one of b
/// let q = device.zeros(DType::F16, &[2, 8, 64])?;
/// let out = device.zeros(DType::F16, &[2, 8, 64])?;
/// let params = AttentionParams::for_head_dim(64);
///
/// let mut replay = Replay::new(|step, encoder| {
///     (0..2).try_for_each(|layer| step.append_and_attend(encoder, layer, &kv, &kv, &q, &out, None, &params))
/// });
/// for _ in 0..10 {
///     // ... write the next tokens' vectors to kv and q ...
///     replay.run(&mut cache, &[(a, 1), (b, 1)])?.wait()?;
/// }
/// assert_eq!((cache.len(a)?, cache.len(b)?), (10, 10));
/// # Ok::<(), tqkv::Error>(())
/// ```
pub struct Replay<'f> {
    record: Box<Record<'f>>,
    recorded: Option<Recorded>,
}

/// A step on the device.
struct Recorded {
    work: Repeatable,
    step: CapturedStep,
}

/// What the operations of a step read on the device, beside the caller's buffers. Made by [`Step::captured`].
///
/// For callers whose step has more in it than tqkv's operations, a whole model's in a CUDA graph say, and who therefore capture and
/// launch it themselves; [`Replay`] does both for tqkv's alone. Keep it as long as the graph.
pub struct CapturedStep {
    cache: Arc<()>,
    shapes: Vec<Plans>,
    _scratch: Vec<[Buffer; 2]>,
}

impl Step<'_> {
    /// What the step's operations read on the device, as they were recorded last. On a CUDA device a graph that the caller has
    /// captured with them can then be launched for further tokens: see [`resume`](Step::resume).
    ///
    /// Record all of the step's operations once outside of the graph before, and submit them: that takes the memory that they need, which
    /// cannot be taken within. Then record the same again, in the same buffers, while the device's stream is captured.
    ///
    /// # Errors
    /// [`Error::UnevenLayers`] if a layer was not appended, [`Error::Unsupported`] on a device other than CUDA's.
    pub fn captured(&self) -> Result<CapturedStep> {
        self.expect_complete()?;
        if self.device().info().kind != DeviceKind::Cuda {
            let what = "go on with a step that the caller has captured".to_owned();
            return Err(Error::Unsupported { device: self.device().to_string(), what });
        }
        let (cache, shapes) = (self.cache.identity.clone(), self.shapes.clone());
        Ok(CapturedStep { cache, shapes, _scratch: self.cache.scratch.clone() })
    }

    /// Brings what a captured step reads on the device up to date with this step's tokens, in place of recording it: launch the graph next,
    /// on the device's stream, and [`commit`](Step::commit). The graph then computes what this step recorded anew would, to the bit.
    ///
    /// False where that does not do: for other numbers of new tokens, in another cache, when a page table has outgrown its room (which
    /// then doubles), or when other kernels suit the lengths better. Nothing has changed then; record the step, and capture it anew. A
    /// graph is never launched unless this has said true just before: its tables are those of other tokens, or gone.
    ///
    /// # Errors
    /// Those of [`CommandEncoder::submit`], for copies of shared pages, which come before the graph;
    /// [`Error::Unsupported`] while the device's stream is captured. The graph must not be launched then.
    pub fn resume(&mut self, captured: &CapturedStep) -> Result<bool> {
        if !captured.serves(self)? {
            return Ok(false);
        }
        copy_shared(self)?;
        captured.update(self)?;
        self.appended.fill(true);
        Ok(true)
    }
}

impl<'f> Replay<'f> {
    /// A step that `record` records: every layer's [`append`](Step::append), and what else belongs to it. It is called again where
    /// the step must be recorded anew, and must then record the same in the same buffers.
    pub fn new(record: impl FnMut(&mut Step, &mut CommandEncoder) -> Result<()> + 'f) -> Self {
        Replay { record: Box::new(record), recorded: None }
    }

    /// Runs the step for new tokens, which count from now on: `tokens` names each sequence once with their number.
    ///
    /// # Errors
    /// Those of [`KvCache::step`], of what records, and of [`Step::submit`]. The tokens do not count then, and nothing that the cache holds
    /// has changed.
    pub fn run(&mut self, cache: &mut KvCache, tokens: &[(SequenceId, usize)]) -> Result<Submission> {
        let mut step = cache.step(tokens)?;
        // Kept again only if all goes well: what has failed midway is not to be run again.
        let recorded = match self.recorded.take() {
            Some(recorded) if step.resume(&recorded.step)? => recorded,
            _ => {
                copy_shared(&mut step)?;
                let mut encoder = step.device().encoder()?;
                (self.record)(&mut step, &mut encoder)?;
                step.expect_complete()?;
                match encoder.repeatable()? {
                    Ok(work) => Recorded { work, step: step.captured()? },
                    Err(encoder) => return step.submit(encoder),
                }
            }
        };
        let submission = recorded.work.submit()?;
        self.recorded = Some(recorded);
        step.commit()?;
        Ok(submission)
    }

    /// Whether the next run may do without recording, as after each run on CUDA; never on devices that cannot keep what was recorded.
    pub fn is_recorded(&self) -> bool {
        self.recorded.is_some()
    }
}

/// Submits the copies of shared pages that a step writes to, apart from what is recorded.
fn copy_shared(step: &mut Step) -> Result<()> {
    let copies: Vec<_> = step.changes.iter().filter_map(Change::copy).collect();
    step.copied = true;
    if copies.is_empty() {
        return Ok(());
    }
    let mut encoder = step.device().encoder()?;
    for (group, from, to) in copies {
        step.cache.group_pools(group).try_for_each(|pools| pools.copy_page(&mut encoder, from, to))?;
    }
    drop(encoder.submit()?);
    Ok(())
}

impl CapturedStep {
    /// Whether a step recorded anew would be the same but for its batches.
    fn serves(&self, step: &mut Step) -> Result<bool> {
        if !Arc::ptr_eq(&self.cache, &step.cache.identity) {
            return Ok(false);
        }
        for (shape, of) in self.shapes.iter().enumerate() {
            for causal in [false, true] {
                if of.reads[causal as usize].is_some() {
                    step.shapes[shape].reads[causal as usize] = Some(step.cache.reads(shape, causal, &step.spans)?);
                }
            }
        }
        let fits = |(old, new): &(&Batch, &Batch)| old.expect_like(new).is_ok() && old.suits(new);
        Ok(self.batches(step).is_some_and(|batches| batches.iter().all(fits)))
    }

    /// The batches of the recorded step, each with that of the same place in another; `None` if more differs.
    fn batches<'a>(&'a self, step: &'a Step) -> Option<Vec<(&'a Batch, &'a Batch)>> {
        let mut all: Vec<(&Batch, &Batch)> = vec![];
        for (old, new) in self.shapes.iter().zip(&step.shapes) {
            let mut some = like_writes(&old.writes, &new.writes)?;
            for (old, new) in old.reads.iter().zip(&new.reads) {
                if let Some(old) = old {
                    some.extend(like_reads(old, new.as_deref()?)?);
                }
            }
            // Writes and reads of a shape mostly have one batch.
            for pair in some {
                match all.iter().find(|other| other.0.is_same(pair.0)) {
                    None => all.push(pair),
                    Some(other) if other.1.equals(pair.1) => {}
                    Some(_) => return None,
                }
            }
        }
        Some(all)
    }

    /// Brings what the recorded step reads on the device up to date.
    fn update(&self, step: &Step) -> Result<()> {
        let batches = self.batches(step).unwrap_or_default();
        batches.into_iter().try_for_each(|(old, new)| old.take_over(new).map(drop))
    }
}
