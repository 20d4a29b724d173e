//! The cache of a model: sequences that append, attend, truncate and fork over one pool of pages.

mod config;
mod pages;
#[cfg(feature = "prefix-store")]
mod prefix_store;
mod snapshot;

pub use config::{CacheConfig, LayerKind};
#[cfg(feature = "prefix-store")]
pub use prefix_store::{FoundPrefix, PrefixStore, StoredPrefix};
pub use snapshot::{Geometry, Label, LayerGeometry, MAX_FINGERPRINT, MAX_NOTE, SNAPSHOT_VERSION, Snapshot};

use crate::compute::{Buffer, CommandEncoder, Device};
use crate::error::{Error, Result};
use crate::format::RowFormat;
use crate::ops::{self, AttentionParams, Batch, Domain, NO_PAGE, PagePool, Positions, RowOrder, Span};
use pages::Pages;
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
    /// The last batch, which the layers of one step share.
    plan: Option<(PlanKey, Batch)>,
}

struct Layer {
    key: PagePool,
    value: PagePool,
    group: usize,
    /// The layer whose positions it reads: itself, unless it is shared.
    source: usize,
}

/// Layers of one kind: they use the same page numbers, each in its own pools.
struct Group {
    window: Option<usize>,
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
    /// Pages dropped at the front: `pages[i]` holds the positions of page `base + i`.
    base: usize,
    pages: Vec<u32>,
}

/// What a batch was made from: the group, each sequence with its length and new positions, the page tables' version.
type PlanKey = (usize, Vec<(SequenceId, usize, usize)>, u64);

/// A page that a sequence takes while it appends, and what it replaces, if it was shared.
struct Taken {
    sequence: SequenceId,
    page: u32,
    replaces: Option<u32>,
}

impl KvCache {
    /// Takes all memory that the configuration asks for.
    ///
    /// # Errors
    /// Those of [`CacheConfig::bytes`], and [`Error::OutOfMemory`].
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        config.bytes()?;
        let pool = |codec, pages| {
            let row = RowFormat::new(codec, config.head_dim())?;
            PagePool::new(device, row, config.kv_heads(), config.positions_per_page(), pages)
        };
        let (mut layers, mut groups) = (Vec::<Layer>::new(), Vec::<Group>::new());
        for index in 0..config.layers() {
            let (kind, codec) = (config.layer_kind(index), config.layer_codec(index));
            let window = match kind {
                LayerKind::Shared(source) => {
                    let Layer { key, value, group, .. } = &layers[source];
                    layers.push(Layer { key: key.clone(), value: value.clone(), group: *group, source });
                    continue;
                }
                LayerKind::Window(window) => Some(window),
                LayerKind::Full => None,
            };
            let group = groups.iter().position(|g| g.window == window).unwrap_or(groups.len());
            if group == groups.len() {
                groups.push(Group { window, layers: vec![], pages: Pages::new(config.pages(kind)) });
            }
            groups[group].layers.push(index);
            let pages = config.pages(kind);
            let (key, value) = (pool(codec.key, pages)?, pool(codec.value, pages)?);
            layers.push(Layer { key, value, group, source: index });
        }
        let (device, sequences) = (device.clone(), BTreeMap::new());
        Ok(KvCache { device, config, layers, groups, sequences, next_id: 0, version: 0, plan: None })
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
        let page_size = self.config.positions_per_page();
        let (mut capacity, mut free, mut slots, mut filled) = (0, 0, 0, 0);
        for (g, group) in self.groups.iter().enumerate() {
            let page: usize = group.layers.iter().map(|&l| self.layers[l].page_bytes()).sum();
            capacity += page * group.pages.total();
            free += page * group.pages.free();
            slots += (group.pages.total() - group.pages.free()) * page_size;
            // A page that several sequences share is as full as in the one that fills it most.
            let mut fill = BTreeMap::new();
            for sequence in self.sequences.values() {
                let len = sequence.group_len(group);
                for (i, &page) in sequence.held[g].pages.iter().enumerate() {
                    let start = (sequence.held[g].base + i) * page_size;
                    let most = fill.entry(page).or_insert(0);
                    *most = (*most).max(len.saturating_sub(start).min(page_size));
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
        let layer = self.layer(layer)?;
        Ok(match side {
            Side::Key => &layer.key,
            Side::Value => &layer.value,
        })
    }

    /// Starts an empty sequence.
    pub fn add_sequence(&mut self) -> SequenceId {
        let held = vec![Held::default(); self.groups.len()];
        self.insert(Sequence { held, lens: vec![0; self.config.layers()] })
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

    /// Ends a sequence and frees the pages that no other shares.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`].
    pub fn free_sequence(&mut self, sequence: SequenceId) -> Result<()> {
        let gone = self.sequences.remove(&sequence).ok_or(Error::UnknownSequence { got: sequence.0 })?;
        for (group, held) in self.groups.iter_mut().zip(gone.held) {
            held.pages.into_iter().rev().for_each(|page| group.pages.release(page));
        }
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
        self.drop_unseen(layer, tokens);
        let taken = self.take_pages(layer, &spans)?;
        let result = self.record_append(encoder, layer, spans, &taken, k, v);
        if result.is_err() {
            self.give_back(layer, &taken);
            return result;
        }
        let pages = &mut self.groups[self.layers[layer].group].pages;
        taken.iter().filter_map(|t| t.replaces).for_each(|page| pages.release(page));
        for &(id, new) in tokens {
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.lens[layer] += new;
            }
        }
        Ok(())
    }

    fn record_append(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        spans: Vec<(SequenceId, usize, usize)>,
        taken: &[Taken],
        k: &Buffer,
        v: &Buffer,
    ) -> Result<()> {
        let group = self.layers[layer].group;
        let batch = self.batch(group, spans)?;
        for taken in taken {
            let Some(from) = taken.replaces else { continue };
            for &l in &self.groups[group].layers {
                self.layers[l].copy_page(encoder, from, taken.page)?;
            }
        }
        let Layer { key, value, .. } = &self.layers[layer];
        ops::quantize(encoder, &[(k, key), (v, value)], &batch)
    }

    /// The pages that the new positions need: more at the end, and copies of shared ones that would be written.
    fn take_pages(&mut self, layer: usize, spans: &[(SequenceId, usize, usize)]) -> Result<Vec<Taken>> {
        let (page_size, g) = (self.config.positions_per_page(), self.layers[layer].group);
        let group = &mut self.groups[g];
        // Written pages as (sequence, first and last index within `held`), before anything changes.
        let mut wanted = vec![];
        for &(id, len, new) in spans.iter().filter(|s| s.2 > 0) {
            let held = &self.sequences.get(&id).ok_or(Error::UnknownSequence { got: id.0 })?.held[g];
            let first = (len - new) / page_size - held.base;
            wanted.push((id, first, len.div_ceil(page_size) - held.base));
        }
        let needed = wanted.iter().map(|&(id, first, end)| {
            let pages = &self.sequences[&id].held[g].pages;
            let shared = pages[first.min(pages.len())..].iter().filter(|&&p| group.pages.is_shared(p)).count();
            shared + end.saturating_sub(pages.len())
        });
        group.pages.expect_free(needed.sum())?;
        let mut taken = vec![];
        for (id, first, end) in wanted {
            let Some(Sequence { held, .. }) = self.sequences.get_mut(&id) else { continue };
            let pages = &mut held[g].pages;
            for i in first..end {
                let replaces = pages.get(i).copied();
                if replaces.is_some_and(|page| !group.pages.is_shared(page)) {
                    continue;
                }
                let page = group.pages.take()?;
                match pages.get_mut(i) {
                    Some(slot) => *slot = page,
                    None => pages.push(page),
                }
                taken.push(Taken { sequence: id, page, replaces });
                self.version += 1;
            }
        }
        Ok(taken)
    }

    /// Undoes [`take_pages`](KvCache::take_pages).
    fn give_back(&mut self, layer: usize, taken: &[Taken]) {
        let g = self.layers[layer].group;
        for taken in taken.iter().rev() {
            let Some(sequence) = self.sequences.get_mut(&taken.sequence) else { continue };
            let pages = &mut sequence.held[g].pages;
            match taken.replaces {
                Some(old) => pages.iter_mut().filter(|p| **p == taken.page).for_each(|p| *p = old),
                None => drop(pages.pop()),
            }
            self.groups[g].pages.release(taken.page);
        }
        self.version += 1;
    }

    /// At the start of a model step, frees pages of a windowed group that neither the new tokens nor later ones can see.
    fn drop_unseen(&mut self, layer: usize, tokens: &[(SequenceId, usize)]) {
        let (page_size, g) = (self.config.positions_per_page(), self.layers[layer].group);
        let group = &mut self.groups[g];
        let Some(window) = group.window else { return };
        for (id, _) in tokens {
            let Some(sequence) = self.sequences.get_mut(id) else { continue };
            let len = sequence.lens[layer];
            if group.layers.iter().any(|&l| sequence.lens[l] != len) {
                continue; // Within a step: a query of another layer may still look back further.
            }
            let held = &mut sequence.held[g];
            // The next token stands at `len` and sees the positions after `len - window`.
            let keep = ((len + 1).saturating_sub(window) / page_size).saturating_sub(held.base).min(held.pages.len());
            held.pages.drain(..keep).for_each(|page| group.pages.release(page));
            held.base += keep;
            self.version += (keep > 0) as u64;
        }
    }

    /// Attention of the newest positions of sequences, in one layer.
    ///
    /// `queries` names each sequence once with its number of queries, which stand at its newest positions (usually the
    /// tokens just appended). `q` and `out` are \[queries, heads, head_dim\] (f32, f16 or bf16), `lse` f32
    /// \[queries, heads\]; see [`ops::attention`]. A windowed layer's window applies on top of `params`.
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], [`Error::RepeatedSequence`], [`Error::Positions`] for more queries than
    /// positions or queries that would see dropped ones, and those of [`ops::attention`].
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
        let Layer { group, source, .. } = *self.layer(layer)?;
        let spans = self.spans(source, queries, false)?;
        let mut params = params.clone();
        if let Some(window) = self.groups[group].window {
            let window = params.window.map_or(window, |w| w.min(window));
            params.window = Some(window);
            for &(id, len, new) in spans.iter().filter(|s| s.2 > 0) {
                let (first, start) = (self.first(id, group)?, (len - new + 1).saturating_sub(window));
                if start < first {
                    return Err(Error::Positions { start, end: len, first, len });
                }
            }
        }
        let batch = self.batch(group, spans)?;
        let Layer { key, value, .. } = &self.layers[layer];
        ops::attention(encoder, q, key, value, &batch, &params, out, lse)
    }

    /// Decodes positions of a sequence in one layer; see [`ops::dequantize`].
    ///
    /// # Errors
    /// [`Error::Layer`], [`Error::UnknownSequence`], and those of [`ops::dequantize`]: [`Error::Positions`] for positions not
    /// yet appended, and for those that a window has dropped.
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
        let Layer { group, source, .. } = *self.layer(layer)?;
        let spans = self.spans(source, &[(sequence, 0)], false)?;
        let batch = self.batch(group, spans)?;
        ops::dequantize(encoder, self.pool(layer, side)?, &batch, 0, positions, domain, order, out)
    }

    /// Drops all positions of a sequence from `len` on, in every layer: afterwards the cache is as if they had never been
    /// appended.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`]; [`Error::Positions`] if a layer holds fewer, or a windowed one has dropped positions that
    /// the next token would see.
    pub fn truncate(&mut self, sequence: SequenceId, len: usize) -> Result<()> {
        let page_size = self.config.positions_per_page();
        self.expect_prefix(sequence, len)?;
        let Some(Sequence { held, lens }) = self.sequences.get_mut(&sequence) else { return Ok(()) };
        for (group, held) in self.groups.iter_mut().zip(held) {
            let keep = (len.div_ceil(page_size) - held.base).min(held.pages.len());
            held.pages.split_off(keep).into_iter().rev().for_each(|page| group.pages.release(page));
        }
        // A shared layer has no length of its own.
        lens.iter_mut().for_each(|n| *n = (*n).min(len));
        self.version += 1;
        Ok(())
    }

    /// Fails unless a sequence could go on after its first `len` positions.
    fn expect_prefix(&self, sequence: SequenceId, len: usize) -> Result<()> {
        let page_size = self.config.positions_per_page();
        let Sequence { held, lens } = self.sequence(sequence)?;
        for (group, held) in self.groups.iter().zip(held) {
            let shortest = group.layers.iter().map(|&l| lens[l]).min().unwrap_or(0);
            let next = len.saturating_add(1);
            let (first, seen) = (held.base * page_size, next.saturating_sub(group.window.unwrap_or(next)));
            if len > shortest || seen < first {
                return Err(Error::Positions { start: seen.min(len), end: len, first, len: shortest });
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

    /// The oldest position that a sequence holds in a group.
    fn first(&self, id: SequenceId, group: usize) -> Result<usize> {
        Ok(self.sequence(id)?.held[group].base * self.config.positions_per_page())
    }

    /// Each sequence with its length in a layer (the new tokens added if they are still to come) and its new positions.
    fn spans(
        &self,
        layer: usize,
        tokens: &[(SequenceId, usize)],
        to_come: bool,
    ) -> Result<Vec<(SequenceId, usize, usize)>> {
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

    /// The batch of these sequences, the last one if nothing has changed since.
    fn batch(&mut self, group: usize, spans: Vec<(SequenceId, usize, usize)>) -> Result<Batch> {
        let key = (group, spans, self.version);
        if let Some((_, batch)) = self.plan.as_ref().filter(|(last, _)| *last == key) {
            return Ok(batch.clone());
        }
        let page_size = self.config.positions_per_page();
        let held = |id: &SequenceId| self.sequence(*id).map(|s| &s.held[group]);
        let mut width = 1;
        for (id, ..) in &key.1 {
            width = width.max(held(id)?.pages.len());
        }
        // A table is a ring of `width` pages; where nothing was dropped it does not wrap.
        let mut table = vec![NO_PAGE; width * key.1.len()];
        for ((id, ..), table) in key.1.iter().zip(table.chunks_mut(width)) {
            let Held { base, pages } = held(id)?;
            pages.iter().enumerate().for_each(|(i, &page)| table[(base + i) % width] = page);
        }
        let mut spans = Vec::with_capacity(key.1.len());
        for (&(id, len, new), pages) in key.1.iter().zip(table.chunks(width)) {
            spans.push(Span { first: self.first(id, group)?.min(len), len, new, pages });
        }
        let batch = Batch::new(&self.device, page_size, &spans)?;
        self.plan = Some((key, batch.clone()));
        Ok(batch)
    }
}

impl Layer {
    fn page_bytes(&self) -> usize {
        (self.key.bytes() + self.value.bytes()) / self.key.pages()
    }

    fn copy_page(&self, encoder: &mut CommandEncoder, from: u32, to: u32) -> Result<()> {
        let page = |buffer: &Buffer, page: u32| buffer.slice(page as usize..page as usize + 1);
        for buffer in self.key.buffers().chain(self.value.buffers()) {
            ops::copy(encoder, &page(buffer, from)?, &page(buffer, to)?)?;
        }
        Ok(())
    }
}

impl Sequence {
    /// Positions in the layer of the group that has most.
    fn group_len(&self, group: &Group) -> usize {
        group.layers.iter().map(|&l| self.lens[l]).max().unwrap_or(0)
    }
}
