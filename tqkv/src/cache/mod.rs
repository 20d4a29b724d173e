//! The cache of a model: sequences that append, attend, truncate and fork over one pool of pages.

mod config;
mod pages;
#[cfg(feature = "prefix-store")]
mod prefix_store;
mod snapshot;

use config::Extent;
pub use config::{CacheConfig, LayerKind, Sinks};
#[cfg(feature = "prefix-store")]
pub use prefix_store::{FoundPrefix, PrefixStore, Prompt, StoredPrefix};
pub use snapshot::{
    Geometry, Label, LayerGeometry, MAX_FINGERPRINT, MAX_NOTE, SNAPSHOT_VERSION, SinkGeometry, Snapshot,
};

use crate::compute::{Buffer, CommandEncoder, DType, Device};
use crate::error::{Error, Result};
use crate::format::{CodecPair, RowFormat};
use crate::ops::{self, AttentionParams, Batch, Domain, NO_PAGE, PagePool, Positions, RowOrder, Span};
use crate::problem::checks::{expect_apart, expect_shape};
use pages::Pages;
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

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

/// How full a cache is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Usage {
    /// Bytes of all pages.
    pub capacity: usize,
    /// Bytes of the pages that sequences hold, each page counted once however many share it.
    pub used: usize,
    /// Bytes of the pages that nobody holds.
    pub free: usize,
    /// The share of the used pages' positions that no sequence holds (ends of last pages); 0 when nothing is used.
    pub fragmentation: f64,
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
/// let mut encoder = device.encoder()?;
/// for layer in 0..2 {
///     cache.append(&mut encoder, layer, &[(seq, 3)], &k, &k)?;
///     cache.attend(&mut encoder, layer, &[(seq, 3)], &q, &out, None, &AttentionParams::for_head_dim(64))?;
/// }
/// encoder.submit_and_wait()?;
/// assert_eq!(cache.len(seq)?, 3);
///
/// let draft = cache.fork(seq)?;      // shares all pages until either side writes
/// cache.truncate(draft, 2)?;         // forgets the third token
/// assert_eq!((cache.len(seq)?, cache.len(draft)?), (3, 2));
/// # Ok::<(), tqkv::Error>(())
/// ```
pub struct KvCache {
    device: Device,
    config: CacheConfig,
    layers: Vec<Layer>,
    groups: Vec<Group>,
    sequences: BTreeMap<SequenceId, Sequence>,
    next_id: u64,
    /// Counts changes of page tables.
    version: u64,
    /// The last batches, which the layers of one step share.
    plans: VecDeque<(PlanKey, Batch)>,
    /// f32, where attention over sinks and over the rest meet: outputs and log-sum-exps of both.
    scratch: Option<[Buffer; 4]>,
}

struct Layer {
    own: Part,
    sinks: Option<Part>,
    /// The layer whose positions it reads: itself, unless it is shared.
    source: usize,
}

/// The pools of a layer, or of its sinks.
#[derive(Clone)]
struct Part {
    key: PagePool,
    value: PagePool,
    group: usize,
}

/// Layers, or sinks of layers, that hold the same positions: they use the same page numbers, each in its own pools.
struct Group {
    extent: Extent,
    page_size: usize,
    layers: Vec<usize>,
    pages: Pages,
}

#[derive(Clone, Debug)]
struct Sequence {
    /// By group.
    held: Vec<Held>,
    /// Positions by layer, dropped ones counted: within a model step layers differ.
    lens: Vec<usize>,
}

/// A sequence's pages in one group.
#[derive(Clone, Debug, Default, PartialEq)]
struct Held {
    /// The oldest position held; the sequence's length if it holds none.
    first: usize,
    /// Those of positions from `first` on: its page, and all that follow.
    pages: Vec<u32>,
}

/// A sequence with its length and its new positions.
type NewPositions = (SequenceId, usize, usize);

/// Batches that are kept: two kinds of layers, with sinks each, need four in a step.
const PLANS: usize = 8;

/// What a batch was made from: the group, how many first positions are left out, the sequences, the page tables' version.
type PlanKey = (usize, usize, Vec<NewPositions>, u64);

/// What an append has changed, so that it can be undone.
enum Change {
    /// Pages at the front that nobody will see any more.
    Dropped { sequence: SequenceId, group: usize, first: usize, pages: Vec<u32> },
    /// A page, in place of a shared one or at the end.
    Taken { sequence: SequenceId, group: usize, index: usize, page: u32, replaces: Option<u32> },
}

impl KvCache {
    /// Takes all memory that the configuration asks for.
    ///
    /// # Errors
    /// Those of [`CacheConfig::bytes`], and [`Error::OutOfMemory`].
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        config.bytes()?;
        let (mut layers, mut groups) = (Vec::<Layer>::new(), Vec::<Group>::new());
        for index in 0..config.layers() {
            if let LayerKind::Shared(source) = config.layer_kind(index) {
                let Layer { own, sinks, .. } = &layers[source];
                layers.push(Layer { own: own.clone(), sinks: sinks.clone(), source });
                continue;
            }
            let mut part = |extent: Extent, codec: CodecPair| -> Result<Part> {
                let group = groups.iter().position(|g| g.extent == extent).unwrap_or(groups.len());
                let (pages, page_size) = (config.pages(extent), extent.page_size(config.positions_per_page()));
                if group == groups.len() {
                    groups.push(Group { extent, page_size, layers: vec![], pages: Pages::new(pages) });
                }
                groups[group].layers.push(index);
                let pool = |codec| {
                    let row = RowFormat::new(codec, config.head_dim())?;
                    PagePool::new(device, row, config.kv_heads(), page_size, pages)
                };
                Ok(Part { key: pool(codec.key)?, value: pool(codec.value)?, group })
            };
            let sinks = config.layer_sinks(index);
            let mut extents = Extent::of(config.layer_kind(index), sinks.map_or(0, |s| s.positions));
            // A layer that is not shared has a part of its own.
            let own = part(extents.next().unwrap_or(Extent::All), config.layer_codec(index))?;
            let sinks = extents.next().zip(sinks).map(|(extent, sinks)| part(extent, sinks.codec)).transpose()?;
            layers.push(Layer { own, sinks, source: index });
        }
        Ok(KvCache {
            device: device.clone(),
            config,
            layers,
            groups,
            sequences: BTreeMap::new(),
            next_id: 0,
            version: 0,
            plans: VecDeque::new(),
            scratch: None,
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
        self.usage().capacity
    }

    /// How full it is.
    pub fn usage(&self) -> Usage {
        let (mut capacity, mut free, mut slots, mut filled) = (0, 0, 0, 0);
        for (g, group) in self.groups.iter().enumerate() {
            let page_size = group.page_size;
            let page: usize = self.parts(g).map(Part::page_bytes).sum();
            capacity += page * group.pages.total();
            free += page * group.pages.free();
            slots += (group.pages.total() - group.pages.free()) * page_size;
            // A page that several sequences share is as full as in the one that fills it most.
            let mut fill = BTreeMap::new();
            for sequence in self.sequences.values() {
                let len = sequence.group_len(group);
                let Held { first, pages } = &sequence.held[g];
                for (i, &page) in pages.iter().enumerate() {
                    let start = (first / page_size + i) * page_size;
                    let most = fill.entry(page).or_insert(0);
                    *most = (*most).max(len.min(start + page_size).saturating_sub(start.max(*first)));
                }
            }
            filled += fill.values().sum::<usize>();
        }
        let fragmentation = if slots == 0 { 0.0 } else { 1.0 - filled as f64 / slots as f64 };
        Usage { capacity, used: capacity - free, free, fragmentation }
    }

    /// Pages that no sequence holds, in the kind of layers that has fewest.
    pub fn free_pages(&self) -> usize {
        self.groups.iter().map(|g| g.pages.free()).min().unwrap_or(0)
    }

    /// The pools of a layer, for those who call [`ops`] themselves.
    ///
    /// # Errors
    /// [`Error::Layer`].
    pub fn pool(&self, layer: usize, side: Side) -> Result<&PagePool> {
        Ok(self.layer(layer)?.own.pool(side))
    }

    /// As [`pool`](KvCache::pool), of a layer's sinks; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Layer`].
    pub fn sink_pool(&self, layer: usize, side: Side) -> Result<Option<&PagePool>> {
        Ok(self.layer(layer)?.sinks.as_ref().map(|sinks| sinks.pool(side)))
    }

    /// Starts an empty sequence.
    pub fn add_sequence(&mut self) -> SequenceId {
        self.insert(Sequence::empty(self.groups.len(), self.layers.len()))
    }

    /// A new sequence with the same content, which shares all pages with `sequence`. Whoever first writes to a shared page
    /// gets a copy of its own. Sharing a prefix is a fork and a [`truncate`](KvCache::truncate).
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::UnevenLayers`] within a model step.
    pub fn fork(&mut self, sequence: SequenceId) -> Result<SequenceId> {
        self.len(sequence)?;
        let twin = self.sequence(sequence)?.clone();
        for (group, held) in self.groups.iter_mut().zip(&twin.held) {
            held.pages.iter().for_each(|&page| group.pages.share(page));
        }
        Ok(self.insert(twin))
    }

    fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.sequences.insert(id, sequence);
        id
    }

    /// Puts other content under the number of a sequence.
    fn replace(&mut self, id: SequenceId, sequence: Sequence) {
        let gone = self.sequences.insert(id, sequence);
        gone.into_iter().for_each(|gone| self.release(gone));
        self.version += 1;
    }

    /// Frees the pages that no other sequence shares.
    fn release(&mut self, gone: Sequence) {
        for (group, held) in self.groups.iter_mut().zip(gone.held) {
            held.pages.into_iter().rev().for_each(|page| group.pages.release(page));
        }
    }

    /// Lengths by layer where all hold so many positions: a shared layer has no length of its own.
    fn lens_of(&self, len: usize) -> Vec<usize> {
        self.layers.iter().enumerate().map(|(l, layer)| if layer.source == l { len } else { 0 }).collect()
    }

    /// Ends a sequence and frees the pages that no other shares.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free_sequence(&mut self, sequence: SequenceId) -> Result<()> {
        let gone = self.sequences.remove(&sequence).ok_or(Error::UnknownSequence { got: sequence.0 })?;
        self.release(gone);
        Ok(())
    }

    /// Positions of a sequence, the same in every layer; those that windows have dropped are counted.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::UnevenLayers`] within a model step.
    pub fn len(&self, sequence: SequenceId) -> Result<usize> {
        let lens = &self.sequence(sequence)?.lens;
        // Layer 0 is never shared; shared layers have the length of their source.
        match (0..lens.len()).find(|&l| lens[self.layers[l].source] != lens[0]) {
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
    /// [`Error::Layer`], [`Error::SharedLayer`], [`Error::UnknownSequence`], [`Error::RepeatedSequence`],
    /// [`Error::OutOfPages`], and those of [`ops::quantize`]. Nothing is appended then.
    pub fn append(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        tokens: &[(SequenceId, usize)],
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        let source = self.layer(layer)?.source;
        if source != layer {
            return Err(Error::SharedLayer { layer, source_layer: source });
        }
        let spans = self.spans(layer, tokens, true)?;
        let mut changes = vec![];
        if let Err(error) = self.record_append(encoder, layer, &spans, k, v, &mut changes) {
            self.undo(changes);
            return Err(error);
        }
        for change in changes {
            if let Change::Taken { group, replaces: Some(page), .. } = change {
                self.groups[group].pages.release(page);
            }
        }
        for (id, len, _) in spans {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.lens[layer] = len;
            }
        }
        Ok(())
    }

    fn record_append(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        spans: &[NewPositions],
        k: &Buffer,
        v: &Buffer,
        changes: &mut Vec<Change>,
    ) -> Result<()> {
        let Layer { own, sinks, .. } = &self.layers[layer];
        let (own, sinks) = (own.clone(), sinks.clone());
        self.drop_unseen(own.group, layer, spans, changes);
        self.take_pages(own.group, spans, changes)?;
        let batch = self.batch(own.group, self.sink_positions(layer), spans)?;
        ops::check_quantize(encoder, &[(k, &own.key), (v, &own.value)], &batch)?;
        let mut writes = vec![(k.clone(), v.clone(), own, batch)];
        // Sinks are written twice. A window's pages may then be dropped as ever, and what shares pages need not know of sinks.
        if let Some(sinks) = sinks {
            let mut start = 0;
            for &(id, len, new) in spans {
                let end = self.groups[sinks.group].extent.end(len);
                let early = end.saturating_sub(len - new);
                if early > 0 {
                    let span = [(id, end, early)];
                    self.take_pages(sinks.group, &span, changes)?;
                    let (k, v) = (k.slice(start..start + early)?, v.slice(start..start + early)?);
                    let batch = self.batch(sinks.group, 0, &span)?;
                    ops::check_quantize(encoder, &[(&k, &sinks.key), (&v, &sinks.value)], &batch)?;
                    writes.push((k, v, sinks.clone(), batch));
                }
                start += new;
            }
        }
        // Nothing is recorded before all is checked: what is recorded cannot be undone.
        for change in changes {
            if let Change::Taken { group, page, replaces: Some(from), .. } = *change {
                self.parts(group).try_for_each(|part| part.copy_page(encoder, from, page))?;
            }
        }
        writes.iter().try_for_each(|(k, v, part, batch)| {
            ops::record_quantize(encoder, &[(k, &part.key), (v, &part.value)], batch)
        })
    }

    /// The pages that the new positions need: more at the end, and copies of shared ones that would be written.
    fn take_pages(&mut self, g: usize, spans: &[NewPositions], changes: &mut Vec<Change>) -> Result<()> {
        let group = &mut self.groups[g];
        // Written pages as (sequence, first and last index within `held`), before anything changes.
        let mut wanted = vec![];
        for &(id, len, new) in spans.iter().filter(|s| s.2 > 0) {
            let held = &self.sequences.get(&id).ok_or(Error::UnknownSequence { got: id.0 })?.held[g];
            let base = held.first / group.page_size;
            wanted.push((id, (len - new) / group.page_size - base, len.div_ceil(group.page_size) - base));
        }
        let needed = wanted.iter().map(|&(id, first, end)| {
            let pages = &self.sequences[&id].held[g].pages;
            let shared = pages[first.min(pages.len())..].iter().filter(|&&p| group.pages.is_shared(p)).count();
            shared + end.saturating_sub(pages.len())
        });
        group.pages.expect_free(needed.sum())?;
        for (id, first, end) in wanted {
            let Some(Sequence { held, .. }) = self.sequences.get_mut(&id) else { continue };
            let pages = &mut held[g].pages;
            for index in first..end {
                let replaces = pages.get(index).copied();
                if replaces.is_some_and(|page| !group.pages.is_shared(page)) {
                    continue;
                }
                let page = group.pages.take()?;
                match pages.get_mut(index) {
                    Some(slot) => *slot = page,
                    None => pages.push(page),
                }
                changes.push(Change::Taken { sequence: id, group: g, index, page, replaces });
                self.version += 1;
            }
        }
        Ok(())
    }

    /// At the start of a model step, frees pages of a windowed group that neither the new tokens nor later ones can see.
    fn drop_unseen(&mut self, g: usize, layer: usize, spans: &[NewPositions], changes: &mut Vec<Change>) {
        let group = &mut self.groups[g];
        for (id, ..) in spans {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            let len = sequence.lens[layer];
            if group.layers.iter().any(|&l| sequence.lens[l] != len) {
                continue; // Within a step: a query of another layer may still look back further.
            }
            let held = &mut sequence.held[g];
            let base = held.first / group.page_size;
            let drop = (group.extent.seen(len) / group.page_size).saturating_sub(base).min(held.pages.len());
            if drop > 0 {
                let pages: Vec<u32> = held.pages.drain(..drop).collect();
                pages.iter().for_each(|&page| group.pages.release(page));
                changes.push(Change::Dropped { sequence: *id, group: g, first: held.first, pages });
                held.first = (base + drop) * group.page_size;
                self.version += 1;
            }
        }
    }

    /// The last change is undone first, so that pages are free, and held, as they were.
    fn undo(&mut self, changes: Vec<Change>) {
        self.version += 1;
        for change in changes.into_iter().rev() {
            let (Change::Dropped { sequence, group, .. } | Change::Taken { sequence, group, .. }) = change;
            let Some(sequence) = self.sequences.get_mut(&sequence) else { continue };
            let (held, free) = (&mut sequence.held[group], &mut self.groups[group].pages);
            match change {
                Change::Dropped { first, pages, .. } => {
                    pages.iter().rev().for_each(|&page| free.undo_release(page));
                    held.first = first;
                    held.pages.splice(..0, pages);
                }
                Change::Taken { index, page, replaces, .. } => {
                    free.release(page);
                    match replaces {
                        Some(old) => held.pages[index] = old,
                        None => held.pages.truncate(index),
                    }
                }
            }
        }
    }

    /// Attention of the newest positions of sequences, in one layer.
    ///
    /// `queries` names each sequence once with its number of queries, which stand at its newest positions (usually the
    /// tokens just appended). `q` and `out` are \[queries, heads, head_dim\] (f32, f16 or bf16), `lse` f32
    /// \[queries, heads\]; see [`ops::attention`]. A windowed layer's window applies on top of `params`.
    ///
    /// A layer with sinks attends to them and to the rest by themselves and merges both, over memory that all its calls share:
    /// encoders of one cache are submitted one after the other. No window hides sinks.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], [`Error::RepeatedSequence`], [`Error::Positions`] for more queries than
    /// positions, queries that would see dropped ones, or queries among sinks that are not causal and would see more than
    /// sinks, [`Error::RotatedSinks`], and those of [`ops::attention`].
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
        let Layer { own, sinks, source } = self.layer(layer)?;
        let (own, sinks, source) = (own.clone(), sinks.clone(), *source);
        let spans = self.spans(source, queries, false)?;
        let mut params = params.clone();
        if let Extent::Newest(window) = self.groups[own.group].extent {
            params.window = Some(params.window.map_or(window, |w| w.min(window)));
        }
        let Some(sinks) = sinks else {
            self.expect_seen(own.group, 0, &spans)?;
            let batch = self.batch(own.group, 0, &spans)?;
            return ops::attention(encoder, q, &own.key, &own.value, &batch, &params, out, lse);
        };
        self.attend_with_sinks(encoder, layer, (&own, &sinks), &spans, q, out, lse, &params)
    }

    /// Attention over sinks and over the rest, each by itself, and both merged.
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    fn attend_with_sinks(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        (own, sinks): (&Part, &Part),
        spans: &[NewPositions],
        q: &Buffer,
        out: &Buffer,
        lse: Option<&Buffer>,
        params: &AttentionParams,
    ) -> Result<()> {
        let first = self.sink_positions(layer);
        if params.domain == Domain::Rotated {
            for side in [Side::Key, Side::Value] {
                let (got, expected) = (sinks.pool(side).row(), own.pool(side).row());
                if (got.is_rotated(), got.signs()) != (expected.is_rotated(), expected.signs()) {
                    return Err(Error::RotatedSinks {
                        layer,
                        got: got.codec().to_string(),
                        expected: expected.codec().to_string(),
                    });
                }
            }
        }
        let tokens = spans.iter().map(|s| s.2).sum();
        let &[n, heads, head_dim] = q.shape() else {
            return Err(Error::shape("q", q.shape(), format!("[{tokens}, heads, {}]", self.config.head_dim())));
        };
        expect_shape("q", q, &[tokens, heads, head_dim])?;
        expect_shape("out", out, q.shape())?;
        expect_apart("out", out, own.buffers().chain(sinks.buffers()).chain([q]))?;
        if let Some(lse) = lse {
            expect_shape("lse", lse, &[n, heads])?;
            expect_apart("lse", lse, own.buffers().chain(sinks.buffers()).chain([q, out]))?;
        }
        // Queries among the sinks see no others; the rest see all sinks.
        let mut parts: Vec<(bool, NewPositions)> = vec![];
        for &(id, len, new) in spans {
            let start = len - new;
            let early = if params.causal || len <= first { first.saturating_sub(start).min(new) } else { 0 };
            if early < new && start + early < first {
                return Err(Error::Positions { start, end: len, first, len });
            }
            parts.extend((early > 0).then_some((true, (id, start + early, early))));
            parts.extend((early < new || new == 0).then_some((false, (id, len, new - early))));
        }
        let rest: Vec<_> = parts.iter().filter(|p| !p.0).map(|p| p.1).collect();
        self.expect_seen(own.group, first, &rest)?;
        let mut start = 0;
        for run in parts.chunk_by(|a, b| a.0 == b.0) {
            let spans: Vec<_> = run.iter().map(|p| p.1).collect();
            let range = start..start + spans.iter().map(|s| s.2).sum::<usize>();
            start = range.end;
            let rows = |buffer: &Buffer| buffer.slice(range.clone());
            let (q, out, lse) = (rows(q)?, rows(out)?, lse.map(rows).transpose()?);
            if run[0].0 {
                let batch = self.batch(sinks.group, 0, &spans)?;
                let params = AttentionParams { window: None, ..params.clone() };
                ops::attention(encoder, &q, &sinks.key, &sinks.value, &batch, &params, &out, lse.as_ref())?;
                continue;
            }
            let batch = self.batch(own.group, first, &spans)?;
            if range.is_empty() {
                ops::attention(encoder, &q, &own.key, &own.value, &batch, params, &out, lse.as_ref())?;
                continue;
            }
            let [rest, rest_lse, early, early_lse] = self.scratch([range.len(), heads, head_dim])?;
            ops::attention(encoder, &q, &own.key, &own.value, &batch, params, &rest, Some(&rest_lse))?;
            // A query stands at a held position, but without a mask it does not matter at which: as many at once as there are.
            let spans: Vec<_> = spans
                .iter()
                .flat_map(|&(id, _, new)| (0..new).step_by(first).map(move |i| (id, first, first.min(new - i))))
                .collect();
            let batch = self.batch(sinks.group, 0, &spans)?;
            let all = AttentionParams { causal: false, window: None, sink_logits: None, ..params.clone() };
            ops::attention(encoder, &q, &sinks.key, &sinks.value, &batch, &all, &early, Some(&early_lse))?;
            ops::merge(encoder, &[(&rest, &rest_lse), (&early, &early_lse)], &out, lse.as_ref())?;
        }
        Ok(())
    }

    /// Buffers for two partial results: outputs of this shape, f32, and their log-sum-exps.
    fn scratch(&mut self, shape: [usize; 3]) -> Result<[Buffer; 4]> {
        let rows = shape[0] * shape[1];
        let sizes = [rows * shape[2], rows];
        let fits = |s: &&[Buffer; 4]| s[0].len() >= sizes[0] && s[1].len() >= sizes[1];
        let [a, a_lse, b, b_lse] = match self.scratch.as_ref().filter(fits) {
            Some(scratch) => scratch.clone(),
            None => {
                let new = |n: usize| self.device.zeros(DType::F32, &[n]);
                self.scratch.insert([new(sizes[0])?, new(sizes[1])?, new(sizes[0])?, new(sizes[1])?]).clone()
            }
        };
        let out = |buffer: &Buffer| buffer.slice(0..sizes[0])?.reshape(&shape);
        let lse = |buffer: &Buffer| buffer.slice(0..sizes[1])?.reshape(&shape[..2]);
        Ok([out(&a)?, lse(&a_lse)?, out(&b)?, lse(&b_lse)?])
    }

    /// Fails if a query would see positions that its window has dropped; those before `first` are looked up elsewhere.
    fn expect_seen(&self, group: usize, first: usize, spans: &[NewPositions]) -> Result<()> {
        for &(id, len, new) in spans.iter().filter(|s| s.2 > 0) {
            // A query stands one before the token that would follow it.
            let start = self.groups[group].extent.seen(len - new).max(first);
            let first = self.first(id, group)?;
            if start < first {
                return Err(Error::Positions { start, end: len, first, len });
            }
        }
        Ok(())
    }

    /// Decodes positions of a sequence in one layer; see [`ops::dequantize`]. A layer's sinks and its other positions are
    /// decoded by a call each.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], and those of [`ops::dequantize`]: [`Error::Positions`] for positions not
    /// yet appended, for those that a window has dropped, and for sinks together with others.
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
        let Layer { own, sinks, source } = self.layer(layer)?;
        let (mut part, sinks, source) = (own.clone(), sinks.clone(), *source);
        let (positions, mut first) = (positions.into(), self.sink_positions(layer));
        let mut spans = self.spans(source, &[(sequence, 0)], false)?;
        if let Some(sinks) = sinks.filter(|_| positions.all_below(first)) {
            spans[0].1 = spans[0].1.min(first);
            (part, first) = (sinks, 0);
        }
        let batch = self.batch(part.group, first, &spans)?;
        ops::dequantize(encoder, part.pool(side), &batch, 0, positions, domain, order, out)
    }

    /// Drops all positions of a sequence from `len` on, in every layer: afterwards the cache is as if they had never been
    /// appended. With a `len` of 0 the sequence is as good as new.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Positions`] if a layer holds fewer, or a windowed one has dropped positions that
    /// the next token would see. A token that sees none but itself (the first one, any in a window of 1) stands in nobody's
    /// way.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        self.expect_prefix(sequence, len)?;
        let Some(Sequence { held, lens }) = self.sequences.get_mut(&sequence) else { return Ok(()) };
        for (group, held) in self.groups.iter_mut().zip(held) {
            held.first = held.first.min(len);
            let keep = group.page_range(held.first, len).len().min(held.pages.len());
            held.pages.split_off(keep).into_iter().rev().for_each(|page| group.pages.release(page));
        }
        // A shared layer has no length of its own.
        lens.iter_mut().for_each(|n| *n = (*n).min(len));
        self.version += 1;
        Ok(())
    }

    /// Fails unless a sequence could go on after its first `len` positions.
    fn expect_prefix(&self, sequence: SequenceId, len: usize) -> Result<()> {
        let Sequence { held, lens } = self.sequence(sequence)?;
        for (group, held) in self.groups.iter().zip(held) {
            let shortest = group.layers.iter().map(|&l| lens[l]).min().unwrap_or(0);
            let start = group.extent.seen(len);
            if len > shortest || (start < held.first && !group.extent.sees_nothing(len)) {
                return Err(Error::Positions { start, end: len, first: held.first, len: shortest });
            }
        }
        Ok(())
    }

    fn layer(&self, layer: usize) -> Result<&Layer> {
        self.layers.get(layer).ok_or(Error::Layer { got: layer, layers: self.layers.len() })
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or(Error::UnknownSequence { got: id.0 })
    }

    /// The pools of a group.
    fn parts(&self, group: usize) -> impl Iterator<Item = &Part> {
        let layers = self.groups[group].layers.iter().map(|&l| &self.layers[l]);
        layers.flat_map(|l| std::iter::once(&l.own).chain(&l.sinks)).filter(move |part| part.group == group)
    }

    /// How many first positions a layer keeps apart.
    fn sink_positions(&self, layer: usize) -> usize {
        let sinks = self.layers[layer].sinks.as_ref();
        sinks.map_or(0, |part| self.groups[part.group].extent.end(usize::MAX))
    }

    /// The oldest position that a sequence holds in a group.
    fn first(&self, id: SequenceId, group: usize) -> Result<usize> {
        Ok(self.sequence(id)?.held[group].first)
    }

    /// Each sequence with its length in a layer (the new tokens added if they are still to come) and its new positions.
    fn spans(&self, layer: usize, tokens: &[(SequenceId, usize)], to_come: bool) -> Result<Vec<NewPositions>> {
        if tokens.is_empty() {
            return Err(Error::Zero { what: "sequences of a batch" });
        }
        let mut ids: Vec<_> = tokens.iter().map(|t| t.0).collect();
        ids.sort_unstable();
        if let Some(pair) = ids.windows(2).find(|w| w[0] == w[1]) {
            return Err(Error::RepeatedSequence { got: pair[0].0 });
        }
        let overflow = Error::SizeOverflow { what: "length of a sequence", limit: "u32" };
        let span = |&(id, new): &(SequenceId, usize)| {
            let held = self.sequence(id)?.lens[layer];
            let len = held.checked_add(if to_come { new } else { 0 }).filter(|&n| n <= u32::MAX as usize);
            let len = len.ok_or_else(|| overflow.clone())?;
            if new > len {
                return Err(Error::Positions { start: 0, end: new, first: 0, len });
            }
            Ok((id, len, new))
        };
        tokens.iter().map(span).collect()
    }

    /// The batch of these sequences, one of the last if nothing has changed since. Those of its positions before `first` are
    /// left out, unless they are new.
    fn batch(&mut self, group: usize, first: usize, spans: &[NewPositions]) -> Result<Batch> {
        let key = (group, first, spans.to_vec(), self.version);
        if let Some((_, batch)) = self.plans.iter().find(|(last, _)| *last == key) {
            return Ok(batch.clone());
        }
        let page_size = self.groups[group].page_size;
        let held = |id: &SequenceId| self.sequence(*id).map(|s| &s.held[group]);
        let mut width = 1;
        for (id, ..) in spans {
            width = width.max(held(id)?.pages.len());
        }
        // A table is a ring of `width` pages; where nothing was dropped it does not wrap.
        let mut table = vec![NO_PAGE; width * spans.len()];
        for ((id, ..), table) in spans.iter().zip(table.chunks_mut(width)) {
            let Held { first, pages } = held(id)?;
            let base = first / page_size;
            pages.iter().enumerate().for_each(|(i, &page)| table[(base + i) % width] = page);
        }
        let mut rows = Vec::with_capacity(spans.len());
        for (&(id, len, new), pages) in spans.iter().zip(table.chunks(width)) {
            let first = self.first(id, group)?.max(first.min(len - new)).min(len);
            rows.push(Span { first, len, new, pages });
        }
        let batch = Batch::new(&self.device, page_size, &rows)?;
        self.plans.truncate(PLANS - 1);
        self.plans.push_front((key, batch.clone()));
        Ok(batch)
    }
}

impl Group {
    /// The pages of positions `first..len`, as far as the group holds them.
    fn page_range(&self, first: usize, len: usize) -> Range<usize> {
        let end = self.extent.end(len);
        if first < end { first / self.page_size..end.div_ceil(self.page_size) } else { 0..0 }
    }
}

impl Part {
    fn pool(&self, side: Side) -> &PagePool {
        match side {
            Side::Key => &self.key,
            Side::Value => &self.value,
        }
    }

    fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        self.key.buffers().chain(self.value.buffers())
    }

    fn page_bytes(&self) -> usize {
        (self.key.bytes() + self.value.bytes()) / self.key.pages()
    }

    fn copy_page(&self, encoder: &mut CommandEncoder, from: u32, to: u32) -> Result<()> {
        let page = |buffer: &Buffer, page: u32| buffer.slice(page as usize..page as usize + 1);
        self.buffers().try_for_each(|buffer| ops::copy(encoder, &page(buffer, from)?, &page(buffer, to)?))
    }
}

impl Sequence {
    fn empty(groups: usize, layers: usize) -> Self {
        Sequence { held: vec![Held::default(); groups], lens: vec![0; layers] }
    }

    /// One past the newest position in the layer of the group that has most.
    fn group_len(&self, group: &Group) -> usize {
        group.extent.end(group.layers.iter().map(|&l| self.lens[l]).max().unwrap_or(0))
    }
}
