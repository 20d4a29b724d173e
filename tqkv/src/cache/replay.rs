//! A step that is recorded once and run for any number of tokens.

use super::plan::{like_reads, like_writes};
use super::reserve::Change;
use super::state::{KvCache, SequenceId};
use super::step::{Plans, Step};
use crate::compute::{CommandEncoder, Repeatable, Submission};
use crate::error::Result;
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

/// A step on the device, and the batches that it reads there.
struct Recorded {
    work: Repeatable,
    cache: Arc<()>,
    shapes: Vec<Plans>,
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
            Some(recorded) if recorded.serves(&mut step)? => Some(recorded),
            _ => None,
        };
        copy_shared(&mut step)?;
        let recorded = match recorded {
            Some(recorded) => {
                recorded.update(&step)?;
                step.appended.fill(true);
                recorded
            }
            None => {
                let mut encoder = step.device().encoder()?;
                (self.record)(&mut step, &mut encoder)?;
                step.expect_complete()?;
                match encoder.repeatable()? {
                    Ok(work) => Recorded::new(work, &mut step),
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

impl Recorded {
    fn new(work: Repeatable, step: &mut Step) -> Self {
        Recorded { work, cache: step.cache.identity.clone(), shapes: std::mem::take(&mut step.shapes) }
    }

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
