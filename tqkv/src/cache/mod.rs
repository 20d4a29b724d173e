//! The cache of a model: sequences that append, attend, truncate.

mod config;

pub use config::CacheConfig;

use crate::compute::{Buffer, CommandEncoder, Device};
use crate::error::{Error, Result};
use crate::format::RowFormat;
use crate::ops::{self, AttentionParams, Batch, Domain, PagePool, Positions, RowOrder, Span};
use std::collections::BTreeMap;

/// A sequence of a cache. Numbers are never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u64);

/// Keys or values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Keys.
    Key,
    /// Values.
    Value,
}

/// The compressed K and V of all layers, for sequences of different lengths that share one pool of pages.
///
/// All memory is asked for at once. Appending and attending are recorded in an encoder; lengths count from then on, so an
/// encoder must be submitted, or what was appended in it must be [`truncate`](KvCache::truncate)d away.
///
/// ```
/// use tqkv::{CacheConfig, CodecPair, Device, KvCache, ops::AttentionParams, DType};
/// let device = Device::cpu();
/// // Two layers, 2 KV heads of 64; keys in 5 bits, values in 4; room for 1024 positions.
/// let config = CacheConfig::new(2, 2, 64).codec("k5v4".parse()?).capacity(1024);
/// let mut cache = KvCache::new(&device, config)?;
/// let seq = cache.add_sequence();
///
/// let k = device.upload(&vec![0.1f32; 3 * 2 * 64], &[3, 2, 64])?;  // [tokens, kv_heads, head_dim]
/// let q = device.upload(&vec![0.2f32; 3 * 8 * 64], &[3, 8, 64])?;  // [tokens, heads, head_dim]
/// let out = device.zeros(DType::F32, &[3, 8, 64])?;
/// for layer in 0..2 {
///     let mut encoder = device.encoder()?;
///     cache.append(&mut encoder, layer, &[(seq, 3)], &k, &k)?;
///     cache.attend(&mut encoder, layer, &[(seq, 3)], &q, &out, None, &AttentionParams::for_head_dim(64))?;
///     encoder.submit_and_wait()?;
/// }
/// assert_eq!(cache.len(seq)?, 3);
/// # Ok::<(), tqkv::Error>(())
/// ```
pub struct KvCache {
    device: Device,
    config: CacheConfig,
    layers: Vec<Layer>,
    sequences: BTreeMap<SequenceId, Sequence>,
    free: Vec<u32>,
    next_id: u64,
    /// The last batch, which the layers of one step share.
    plan: Option<Plan>,
}

struct Layer {
    key: PagePool,
    value: PagePool,
}

#[derive(Clone, Debug)]
struct Sequence {
    /// Pages by position; every layer uses the same numbers, each in its own pools.
    pages: Vec<u32>,
    /// Positions held, by layer: within a model step layers differ.
    lens: Vec<usize>,
}

/// What a batch was made from.
#[derive(PartialEq)]
struct PlanKey(Vec<(SequenceId, usize, usize, Vec<u32>)>);

struct Plan {
    key: PlanKey,
    batch: Batch,
}

impl KvCache {
    /// Takes all memory that the configuration asks for.
    ///
    /// # Errors
    /// Those of [`CacheConfig::bytes`], and [`Error::OutOfMemory`].
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        config.bytes()?;
        let pages = config.pages();
        let pool = |codec| {
            let row = RowFormat::new(codec, config.head_dim())?;
            PagePool::new(device, row, config.kv_heads(), config.page_size, pages)
        };
        let layers = (0..config.layers())
            .map(|layer| {
                let pair = config.codec_of(layer);
                Ok(Layer { key: pool(pair.key)?, value: pool(pair.value)? })
            })
            .collect::<Result<_>>()?;
        Ok(KvCache {
            device: device.clone(),
            layers,
            sequences: BTreeMap::new(),
            // Popped from the end, so that pages are given out in order.
            free: (0..pages as u32).rev().collect(),
            next_id: 0,
            plan: None,
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &CacheConfig {
        &self.config
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Bytes of all pages.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(|l| l.key.bytes() + l.value.bytes()).sum()
    }

    /// Bytes of the pages that sequences hold.
    pub fn used_bytes(&self) -> usize {
        self.bytes() / self.config.pages() * (self.config.pages() - self.free.len())
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// The pools of a layer, for those who call [`ops`] themselves.
    ///
    /// # Errors
    /// [`Error::Layer`].
    pub fn pool(&self, layer: usize, side: Side) -> Result<&PagePool> {
        let layer = self.layer(layer)?;
        Ok(match side {
            Side::Key => &layer.key,
            Side::Value => &layer.value,
        })
    }

    /// Starts an empty sequence.
    pub fn add_sequence(&mut self) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, Sequence { pages: vec![], lens: vec![0; self.config.layers()] });
        id
    }

    /// Ends a sequence and frees its pages.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free_sequence(&mut self, sequence: SequenceId) -> Result<()> {
        let gone = self.sequences.remove(&sequence).ok_or(Error::UnknownSequence { got: sequence.0 })?;
        self.free.extend(gone.pages.into_iter().rev());
        Ok(())
    }

    /// Positions that a sequence holds, the same in every layer.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::UnevenLayers`] within a model step.
    pub fn len(&self, sequence: SequenceId) -> Result<usize> {
        let lens = &self.sequence(sequence)?.lens;
        match lens.iter().position(|&n| n != lens[0]) {
            None => Ok(lens[0]),
            Some(layer) => {
                Err(Error::UnevenLayers { sequence: sequence.0, layer, got: lens[layer], expected: lens[0] })
            }
        }
    }

    /// Whether no sequence holds a position.
    pub fn is_empty(&self) -> bool {
        self.sequences.values().all(|s| s.lens.iter().all(|&n| n == 0))
    }

    /// Encodes new tokens at the end of sequences, in one layer.
    ///
    /// `tokens` names each sequence once with its number of new tokens; `k` and `v` are \[tokens, kv_heads, head_dim\]
    /// (f32, f16 or bf16) with the sequences' tokens one after the other.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], [`Error::RepeatedSequence`], [`Error::OutOfPages`], and those of
    /// [`ops::quantize`]. Nothing is appended then.
    pub fn append(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        tokens: &[(SequenceId, usize)],
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        self.layer(layer)?;
        let mut grown = Vec::with_capacity(tokens.len());
        let (mut free, mut needed) = (self.free.len(), 0);
        for &(id, new) in tokens {
            let sequence = self.sequence(id)?;
            let len =
                sequence.lens[layer].checked_add(new).ok_or(Error::SizeOverflow { what: "length", limit: "usize" })?;
            let more = len.div_ceil(self.config.page_size).saturating_sub(sequence.pages.len());
            needed += more;
            let taken = more.min(free);
            let mut pages = sequence.pages.clone();
            pages.extend(self.free[free - taken..free].iter().rev());
            free -= taken;
            grown.push((id, len, new, pages));
        }
        if needed > self.free.len() {
            return Err(Error::OutOfPages { needed, free: self.free.len(), pages: self.config.pages() });
        }
        let batch = self.batch(&grown)?;
        let pools = &self.layers[layer];
        ops::quantize(encoder, &[(k, &pools.key), (v, &pools.value)], &batch)?;
        for (id, len, _, pages) in grown {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.lens[layer] = len;
                sequence.pages = pages;
            }
        }
        self.free.truncate(free);
        Ok(())
    }

    /// Attention of the newest positions of sequences, in one layer.
    ///
    /// `queries` names each sequence once with its number of queries, which stand at its newest positions (usually the
    /// tokens just appended). `q` and `out` are \[queries, heads, head_dim\] (f32, f16 or bf16), `lse` f32
    /// \[queries, heads\]; see [`ops::attention`].
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], [`Error::RepeatedSequence`], [`Error::Positions`] for more queries than
    /// positions, and those of [`ops::attention`].
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    pub fn attend(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        queries: &[(SequenceId, usize)],
        q: &Buffer,
        out: &Buffer,
        lse: Option<&Buffer>,
        params: &AttentionParams,
    ) -> Result<()> {
        self.layer(layer)?;
        let spans = queries
            .iter()
            .map(|&(id, new)| self.sequence(id).map(|s| (id, s.lens[layer], new, s.pages.clone())))
            .collect::<Result<Vec<_>>>()?;
        let batch = self.batch(&spans)?;
        let pools = &self.layers[layer];
        ops::attention(encoder, q, &pools.key, &pools.value, &batch, params, out, lse)
    }

    /// Decodes positions of a sequence in one layer; see [`ops::dequantize`].
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], and those of [`ops::dequantize`].
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    pub fn dequantize(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        side: Side,
        sequence: SequenceId,
        positions: impl Into<Positions>,
        domain: Domain,
        order: RowOrder,
        out: &Buffer,
    ) -> Result<()> {
        self.layer(layer)?;
        let positions = positions.into();
        let held = self.sequence(sequence)?;
        let (len, pages) = (held.lens[layer], held.pages.clone());
        if pages.is_empty() && !positions.is_empty() {
            let (start, end) = (positions.get(0), positions.get(0).saturating_add(1));
            return Err(Error::Positions { start, end, first: 0, len: 0 });
        }
        let batch = self.batch(&[(sequence, len, 0, pages)])?;
        ops::dequantize(encoder, self.pool(layer, side)?, &batch, 0, positions, domain, order, out)
    }

    /// Drops all positions of a sequence from `len` on, in every layer: afterwards the cache is as if they had never been
    /// appended.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Positions`] if a layer holds fewer.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        let page_size = self.config.page_size;
        let held = self.sequences.get_mut(&sequence).ok_or(Error::UnknownSequence { got: sequence.0 })?;
        if let Some(&shortest) = held.lens.iter().min().filter(|&&n| n < len) {
            return Err(Error::Positions { start: len, end: len, first: 0, len: shortest });
        }
        held.lens.fill(len);
        let freed = held.pages.split_off(len.div_ceil(page_size).min(held.pages.len()));
        self.free.extend(freed.into_iter().rev());
        Ok(())
    }

    fn layer(&self, layer: usize) -> Result<&Layer> {
        self.layers.get(layer).ok_or(Error::Layer { got: layer, layers: self.layers.len() })
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or(Error::UnknownSequence { got: id.0 })
    }

    /// The batch of these sequences as (id, length, new, pages), the last one if it is the same.
    fn batch(&mut self, spans: &[(SequenceId, usize, usize, Vec<u32>)]) -> Result<Batch> {
        let mut ids: Vec<_> = spans.iter().map(|s| s.0).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::RepeatedSequence { got: pair[0].0 });
        }
        let key = PlanKey(spans.to_vec());
        if let Some(plan) = self.plan.as_ref().filter(|p| p.key == key) {
            return Ok(plan.batch.clone());
        }
        let spans: Vec<_> =
            spans.iter().map(|(_, len, new, pages)| Span { first: 0, len: *len, new: *new, pages }).collect();
        let batch = Batch::new(&self.device, self.config.page_size, &spans)?;
        self.plan = Some(Plan { key, batch: batch.clone() });
        Ok(batch)
    }
}
