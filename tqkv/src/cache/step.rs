//! A model step: the new tokens of some sequences, through all layers, as one thing.

use super::append::record;
use super::attend::Request;
use super::plan::{Run, Write};
use super::reserve::Change;
use super::state::{KvCache, NewPositions, SequenceId};
use crate::compute::{Buffer, CommandEncoder, Submission};
use crate::error::{Error, Result};
use crate::ops::AttentionParams;

/// New tokens of some sequences on their way through the layers of a model. Made by [`KvCache::step`].
///
/// Sequences, pages and plans are settled when it is made, once for all layers; each layer then takes only its buffers. The
/// tokens count when it is [`submit`](Step::submit)ted or [`commit`](Step::commit)ted. A step that is dropped instead gives its
/// pages back, and the sequences are as long as before. (Pages that windows would have dropped anyhow stay dropped if
/// something was recorded.)
///
/// ```
/// use tqkv::{CacheConfig, DType, Device, KvCache, ops::AttentionParams};
/// let device = Device::cpu();
/// let mut cache = KvCache::new(&device, CacheConfig::new(2, 2, 64))?;
/// let (a, b) = (cache.add_sequence(), cache.add_sequence());
/// let kv = device.zeros(DType::F32, &[5, 2, 64])?;    // 4 tokens of a, then one of b
/// let q = device.zeros(DType::F32, &[5, 8, 64])?;
/// let out = device.zeros(DType::F32, &[5, 8, 64])?;
/// let params = AttentionParams::for_head_dim(64);
///
/// let mut step = cache.step(&[(a, 4), (b, 1)])?;
/// let mut encoder = device.encoder()?;
/// for layer in 0..2 {
///     step.append_and_attend(&mut encoder, layer, &kv, &kv, &q, &out, None, &params)?;
/// }
/// step.submit(encoder)?.wait()?;
/// assert_eq!((cache.len(a)?, cache.len(b)?), (4, 1));
///
/// let abandoned = cache.step(&[(a, 7)])?;
/// drop(abandoned);
/// assert_eq!(cache.len(a)?, 4);
/// # Ok::<(), tqkv::Error>(())
/// ```
#[must_use = "a step that is dropped appends nothing"]
pub struct Step<'a> {
    pub(super) cache: &'a mut KvCache,
    pub(super) spans: Vec<NewPositions>,
    pub(super) changes: Vec<Change>,
    pub(super) shapes: Vec<Plans>,
    /// By layer; of a shared one, whether its source is.
    pub(super) appended: Vec<bool>,
    /// Whether shared pages were copied apart from the layers' appends.
    pub(super) copied: bool,
    committed: bool,
}

/// What the layers of one shape do in a step.
#[derive(Clone)]
pub(super) struct Plans {
    pub writes: Vec<Write>,
    /// Without and with a causal mask, once they are asked for.
    pub reads: [Option<Vec<Run>>; 2],
}

impl KvCache {
    /// Starts a step: `tokens` names each sequence once with its number of new tokens, whose pages are taken for all layers.
    ///
    /// # Errors
    /// [`Error::Zero`] without sequences, [`Error::UnknownSequence`], [`Error::RepeatedSequence`], [`Error::UnevenLayers`]
    /// where [`append`](KvCache::append) was left half done, [`Error::OutOfPages`]. Nothing has changed then.
    pub fn step(&mut self, tokens: &[(SequenceId, usize)]) -> Result<Step<'_>> {
        // Layer 0 is never shared, and all have its length.
        let spans = self.spans(0, tokens, true)?;
        spans.iter().try_for_each(|span| self.len(span.0).map(drop))?;
        let mut changes = vec![];
        let planned = self.reserve(0..self.groups.len(), &spans, &mut changes).and_then(|()| {
            let mut plans = Vec::with_capacity(self.shapes.len());
            for shape in 0..self.shapes.len() {
                plans.push(Plans { writes: self.writes(shape, &spans)?, reads: [None, None] });
            }
            Ok(plans)
        });
        match planned {
            Ok(shapes) => {
                let appended = vec![false; self.layers.len()];
                Ok(Step { cache: self, spans, changes, shapes, appended, copied: false, committed: false })
            }
            Err(error) => {
                self.undo(changes, false);
                Err(error)
            }
        }
    }
}

impl Step<'_> {
    /// New tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.spans.iter().map(|s| s.2).sum()
    }

    /// The cache's device.
    pub fn device(&self) -> &crate::compute::Device {
        self.cache.device()
    }

    /// Encodes the tokens' keys and values in one layer, \[tokens, kv_heads, head_dim\] (f32, f16 or bf16), the sequences'
    /// tokens one after the other.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::SharedLayer`], and those of [`ops::quantize`](crate::ops::quantize). Nothing is recorded
    /// then.
    pub fn append(&mut self, encoder: &mut CommandEncoder, layer: usize, k: &Buffer, v: &Buffer) -> Result<()> {
        let (extents, shape) = self.cache.own_layer(layer)?;
        // Copied already, apart or with the layer's first append.
        let changes = if self.copied || self.appended[layer] { &[] } else { &self.changes[..] };
        let copies = changes.iter().filter_map(Change::copy).flat_map(|(group, from, to)| {
            extents.iter().filter(move |pools| pools.group == group).map(move |pools| (pools, from, to))
        });
        record(encoder, &extents, &self.shapes[shape].writes, k, v, copies)?;
        self.appended[layer] = true;
        Ok(())
    }

    /// Attention of the new tokens in one layer, after their keys and values: `q` and `out` are \[tokens, heads, head_dim\]
    /// (f32, f16 or bf16), `lse` f32 \[tokens, heads\]. As [`KvCache::attend`].
    ///
    /// # Errors
    /// [`Error::Layer`]; [`Error::Positions`] before the layer's (or its source's) [`append`](Step::append), and as
    /// [`KvCache::attend`].
    pub fn attend(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        q: &Buffer,
        out: &Buffer,
        lse: Option<&Buffer>,
        params: &AttentionParams,
    ) -> Result<()> {
        let of = self.cache.layer(layer)?;
        let shape = of.shape;
        if !self.appended[of.source]
            && let Some(&(_, len, new)) = self.spans.iter().find(|span| span.2 > 0)
        {
            return Err(Error::Positions { start: len - new, end: len, first: 0, len: len - new });
        }
        let reads = &mut self.shapes[shape].reads[params.causal as usize];
        let runs = match reads {
            Some(runs) => runs,
            None => reads.insert(self.cache.reads(shape, params.causal, &self.spans)?),
        };
        self.cache.record_attention(encoder, runs, &Request { layer, q, out, lse, params })
    }

    /// [`append`](Step::append) and [`attend`](Step::attend) of a layer that holds positions of its own.
    ///
    /// # Errors
    /// As both. What was recorded by then belongs to a step that must not be submitted.
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    pub fn append_and_attend(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        k: &Buffer,
        v: &Buffer,
        q: &Buffer,
        out: &Buffer,
        lse: Option<&Buffer>,
        params: &AttentionParams,
    ) -> Result<()> {
        self.append(encoder, layer, k, v)?;
        self.attend(encoder, layer, q, out, lse, params)
    }

    /// Hands the encoder with the step's last operations to the device; the tokens count from now on.
    ///
    /// # Errors
    /// As [`commit`](Step::commit), before anything is submitted, and those of
    /// [`CommandEncoder::submit`]. The tokens do not count then.
    pub fn submit(self, encoder: CommandEncoder) -> Result<Submission> {
        self.expect_complete()?;
        let submission = encoder.submit()?;
        self.commit()?;
        Ok(submission)
    }

    /// Says that everything was submitted, in one encoder or several: the tokens count from now on.
    ///
    /// # Errors
    /// [`Error::UnevenLayers`] if a layer was not appended. The tokens do not count then.
    pub fn commit(mut self) -> Result<()> {
        self.expect_complete()?;
        let own: Vec<usize> = (0..self.appended.len()).filter(|&l| self.cache.layers[l].source == l).collect();
        let changes = std::mem::take(&mut self.changes);
        self.cache.settle(changes, &own, &self.spans);
        self.committed = true;
        Ok(())
    }

    pub(super) fn expect_complete(&self) -> Result<()> {
        let Some(&(id, len, new)) = self.spans.iter().find(|span| span.2 > 0) else { return Ok(()) };
        let missing = (0..self.appended.len()).find(|&l| !self.appended[self.cache.layers[l].source]);
        // The layers that were appended hold the new length, if any were.
        missing
            .map_or(Ok(()), |layer| Err(Error::UnevenLayers { sequence: id.0, layer, got: len - new, expected: len }))
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        if !self.committed {
            let copied = self.copied && self.changes.iter().any(|change| change.copy().is_some());
            let written = copied || self.appended.contains(&true);
            self.cache.undo(std::mem::take(&mut self.changes), written);
        }
    }
}
