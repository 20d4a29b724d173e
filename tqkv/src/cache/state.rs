//! What a cache consists of: layers over pools, groups of layers that share page numbers, sequences.

use super::config::{CacheConfig, Channels, Heads};
use super::extent::{Extent, LayerKind};
use super::pages::Pages;
use crate::compute::{Buffer, CommandEncoder, Device};
use crate::error::{Error, Result};
use crate::format::{CodecPair, Encoding};
use crate::ops::{self, Batch, ChannelMap, PagePool};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// A sequence of a cache. Numbers are never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub(super) u64);

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
/// All memory is asked for at once. A [`Step`](super::Step) takes the new tokens of some sequences through all layers:
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
/// let mut step = cache.step(&[(seq, 3)])?;
/// for layer in 0..2 {
///     step.append_and_attend(&mut encoder, layer, &k, &k, &q, &out, None, &AttentionParams::for_head_dim(64))?;
/// }
/// step.submit(encoder)?.wait()?;
/// assert_eq!(cache.len(seq)?, 3);
///
/// let draft = cache.fork(seq)?;      // shares all pages until either side writes
/// cache.truncate(draft, 2)?;         // forgets the third token
/// assert_eq!((cache.len(seq)?, cache.len(draft)?), (3, 2));
/// # Ok::<(), tqkv::Error>(())
/// ```
///
/// [`append`](KvCache::append) and [`attend`](KvCache::attend) do the same a layer at a time. Lengths then count from the
/// recording on, so an encoder must be submitted, or what was appended in it must be [`truncate`](KvCache::truncate)d away.
pub struct KvCache {
    pub(super) device: Device,
    pub(super) config: CacheConfig,
    pub(super) layers: Vec<Layer>,
    /// The groups of a layer's extents, each combination once.
    pub(super) shapes: Vec<Vec<usize>>,
    pub(super) groups: Vec<Group>,
    pub(super) sequences: BTreeMap<SequenceId, Sequence>,
    next_id: u64,
    /// Counts changes of page tables.
    pub(super) version: u64,
    /// The last batches, which the layers of one step share.
    pub(super) batches: VecDeque<(BatchKey, Batch)>,
    /// f32, where attention over several extents meets: outputs and log-sum-exps.
    pub(super) scratch: Vec<[Buffer; 2]>,
    /// Tells caches apart.
    pub(super) identity: Arc<()>,
}

pub(super) struct Layer {
    /// Its own positions, then its sinks and its newest positions if it stores them apart; those of its source if it is shared.
    pub extents: Arc<[Pools]>,
    /// Which combination of groups its extents are in.
    pub shape: usize,
    /// The layer whose positions it reads: itself, unless it is shared.
    pub source: usize,
}

/// What layers of a shape store a second time: which of their extents, and how many positions.
#[derive(Clone, Copy, Default)]
pub(super) struct Kept {
    pub sinks: Option<(usize, usize)>,
    pub recent: Option<(usize, usize)>,
}

/// The pools of one extent of a layer.
pub(super) struct Pools {
    pub key: PagePool,
    pub value: PagePool,
    pub group: usize,
}

/// Extents of layers that hold the same positions: they use the same page numbers, each in its own pools.
pub(super) struct Group {
    pub extent: Extent,
    pub page_size: usize,
    /// Bytes of a page in all its layers.
    pub page_bytes: usize,
    pub layers: Vec<usize>,
    pub pages: Pages,
}

#[derive(Clone, Debug)]
pub(super) struct Sequence {
    /// By group.
    pub held: Vec<Held>,
    /// Positions by layer, dropped ones counted: within a model step layers differ. A shared layer has none of its own.
    pub lens: Vec<usize>,
}

/// A sequence's pages in one group.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Held {
    /// The oldest position held; the sequence's length if it holds none.
    pub first: usize,
    /// Those of positions from `first` on: its page, and all that follow.
    pub pages: Vec<u32>,
    /// The last page and its positions, where it is not full, as its group counts it.
    pub end: Option<(u32, u32)>,
}

/// A sequence with its length and its new positions, which are the last of that length.
pub(super) type NewPositions = (SequenceId, usize, usize);

/// What a batch was made from: the group, how many first positions are left out, the sequences, the page tables' version.
pub(super) type BatchKey = (usize, usize, Vec<NewPositions>, u64);

impl KvCache {
    /// Takes all memory that the configuration asks for.
    ///
    /// # Errors
    /// Those of [`CacheConfig::bytes`], [`Error::OutOfMemory`], and [`Error::Unsupported`] for an encoding that the device lacks.
    pub fn new(device: &Device, config: CacheConfig) -> Result<Self> {
        config.bytes()?;
        let (mut layers, mut shapes, mut groups) = (Vec::<Layer>::new(), Vec::<Vec<usize>>::new(), vec![]);
        for index in 0..config.layers() {
            if let LayerKind::Shared(source) = config.layer_kind(index) {
                let Layer { extents, shape, .. } = &layers[source];
                layers.push(Layer { extents: extents.clone(), shape: *shape, source });
                continue;
            }
            let heads = config.layer_heads(index);
            let channels = config
                .layer_channels(index)
                .map(|Channels { shift, scale }| ChannelMap::new(device, heads.kv_heads, heads.head_dim, shift, scale));
            let channels = channels.transpose()?;
            let mut extents = vec![];
            for (extent, codec) in config.layer_extents(index) {
                let group = Group::of(extent, &config, &mut groups);
                let mut pools = Pools::new(device, heads, &groups[group], (codec, config.encodes()), group)?;
                if let Some(channels) = &channels {
                    pools.key = pools.key.with_channels(channels)?;
                }
                groups[group].layers.push(index);
                groups[group].page_bytes += pools.page_bytes();
                extents.push(pools);
            }
            let own: Vec<usize> = extents.iter().map(|pools| pools.group).collect();
            let shape = shapes.iter().position(|s| *s == own).unwrap_or(shapes.len());
            if shape == shapes.len() {
                shapes.push(own);
            }
            layers.push(Layer { extents: extents.into(), shape, source: index });
        }
        Ok(KvCache {
            device: device.clone(),
            config,
            layers,
            shapes,
            groups,
            sequences: BTreeMap::new(),
            next_id: 0,
            version: 0,
            batches: VecDeque::new(),
            scratch: vec![],
            identity: Arc::default(),
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

    /// The pools of a layer, for those who call [`ops`] themselves.
    ///
    /// # Errors
    /// [`Error::Layer`].
    pub fn pool(&self, layer: usize, side: Side) -> Result<&PagePool> {
        // Every layer has an extent of its own, or one that it shares.
        Ok(self.layer(layer)?.extents[0].side(side))
    }

    /// As [`pool`](KvCache::pool), of a layer's sinks; `None` if it has none.
    ///
    /// # Errors
    /// [`Error::Layer`].
    pub fn sink_pool(&self, layer: usize, side: Side) -> Result<Option<&PagePool>> {
        self.pool_of(layer, side, |extent| matches!(extent, Extent::First(_)))
    }

    /// As [`pool`](KvCache::pool), of a layer's newest positions; `None` if it does not store them apart.
    ///
    /// # Errors
    /// [`Error::Layer`].
    pub fn recent_pool(&self, layer: usize, side: Side) -> Result<Option<&PagePool>> {
        self.pool_of(layer, side, |extent| matches!(extent, Extent::Recent(_)))
    }

    fn pool_of(&self, layer: usize, side: Side, is: impl Fn(Extent) -> bool) -> Result<Option<&PagePool>> {
        let mut extents = self.layer(layer)?.extents.iter();
        Ok(extents.find(|pools| is(self.groups[pools.group].extent)).map(|pools| pools.side(side)))
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&Layer> {
        self.layers.get(layer).ok_or(Error::Layer { got: layer, layers: self.layers.len() })
    }

    pub(super) fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        self.sequences.get(&id).ok_or(Error::UnknownSequence { got: id.0 })
    }

    /// The pools of a group.
    pub(super) fn group_pools(&self, group: usize) -> impl Iterator<Item = &Pools> {
        let layers = self.groups[group].layers.iter().map(|&l| &self.layers[l]);
        layers.flat_map(|l| l.extents.iter()).filter(move |pools| pools.group == group)
    }

    /// The extents of a shape that are not its own positions: which of the layer's extents, and how many positions.
    pub(super) fn apart(&self, shape: usize) -> Kept {
        let mut kept = Kept::default();
        for (index, &group) in self.shapes[shape].iter().enumerate() {
            match self.groups[group].extent {
                Extent::First(positions) => kept.sinks = Some((index, positions)),
                Extent::Recent(positions) => kept.recent = Some((index, positions)),
                Extent::All | Extent::Newest(_) => {}
            }
        }
        kept
    }

    /// Lengths by layer where all hold so many positions.
    pub(super) fn lens_of(&self, len: usize) -> Vec<usize> {
        self.layers.iter().enumerate().map(|(l, layer)| if layer.source == l { len } else { 0 }).collect()
    }

    pub(super) fn insert(&mut self, sequence: Sequence) -> SequenceId {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        self.replace(id, sequence);
        id
    }

    /// Puts content under the number of a sequence, in place of what was there.
    pub(super) fn replace(&mut self, id: SequenceId, mut sequence: Sequence) {
        // Ends are counted once they are in the cache.
        sequence.held.iter_mut().for_each(|held| held.end = None);
        if let Some(gone) = self.sequences.insert(id, sequence) {
            self.release(gone);
            self.version += 1;
        }
        self.count_ends(id);
    }

    /// Frees the pages that no other sequence shares.
    pub(super) fn release(&mut self, gone: Sequence) {
        for (group, held) in self.groups.iter_mut().zip(gone.held) {
            held.end.into_iter().for_each(|end| group.pages.unmark(end));
            held.pages.into_iter().rev().for_each(|page| group.pages.release(page));
        }
    }

    /// Tells the groups how full a sequence's last pages are, after its lengths or its pages have changed.
    pub(super) fn count_ends(&mut self, id: SequenceId) {
        let Some(Sequence { held, lens }) = self.sequences.get_mut(&id) else { return };
        for (group, held) in self.groups.iter_mut().zip(held) {
            // In the layer of the group that has most.
            let len = group.extent.end(group.layers.iter().map(|&l| lens[l]).max().unwrap_or(0));
            let last = len.checked_sub(1).map_or(0, |p| p / group.page_size);
            let page = last.checked_sub(held.first / group.page_size).and_then(|i| held.pages.get(i));
            let end = page.map(|&page| (page, (len - last * group.page_size) as u32));
            let end = end.filter(|end| (end.1 as usize) < group.page_size);
            if held.end != end {
                held.end.into_iter().for_each(|end| group.pages.unmark(end));
                end.into_iter().for_each(|end| group.pages.mark(end));
                held.end = end;
            }
        }
    }
}

impl Group {
    /// The group of an extent, which is made if it is the first of its kind.
    fn of(extent: Extent, config: &CacheConfig, groups: &mut Vec<Group>) -> usize {
        let known = groups.iter().position(|g| g.extent == extent);
        known.unwrap_or_else(|| {
            let page_size = extent.page_size(config.positions_per_page());
            let pages = Pages::new(config.pages(extent), page_size);
            groups.push(Group { extent, page_size, page_bytes: 0, layers: vec![], pages });
            groups.len() - 1
        })
    }
}

impl Pools {
    fn new(
        device: &Device,
        heads: Heads,
        of: &Group,
        (codec, encoding): (CodecPair, Encoding),
        group: usize,
    ) -> Result<Self> {
        let pool =
            |row| PagePool::new(device, row, heads.kv_heads, of.page_size, of.pages.total())?.with_encoding(encoding);
        let [key, value] = heads.rows(codec)?;
        Ok(Pools { key: pool(key)?, value: pool(value)?, group })
    }

    pub fn side(&self, side: Side) -> &PagePool {
        match side {
            Side::Key => &self.key,
            Side::Value => &self.value,
        }
    }

    pub fn buffers(&self) -> impl Iterator<Item = &Buffer> {
        self.key.buffers().chain(self.value.buffers())
    }

    fn page_bytes(&self) -> usize {
        (self.key.bytes() + self.value.bytes()) / self.key.pages()
    }

    pub fn copy_page(&self, encoder: &mut CommandEncoder, from: u32, to: u32) -> Result<()> {
        let page = |buffer: &Buffer, page: u32| buffer.slice(page as usize..page as usize + 1);
        self.buffers().try_for_each(|buffer| ops::copy(encoder, &page(buffer, from)?, &page(buffer, to)?))
    }
}

impl Sequence {
    pub fn empty(groups: usize, layers: usize) -> Self {
        Sequence { held: vec![Held::default(); groups], lens: vec![0; layers] }
    }
}
