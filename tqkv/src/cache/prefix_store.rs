//! Prefixes that machines share through an object store. `docs/prefix-store.md` describes names and bytes.

use super::extent::Extent;
use super::snapshot::{Geometry, GroupGeometry, LayerGeometry, Stored, encode_apart, encode_heads, encode_layer};
use super::state::{Held, KvCache, Sequence, SequenceId};
use crate::error::{Error, Result};
use crate::format::FORMAT_VERSION;
use futures_util::{StreamExt, TryStreamExt, future, stream};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::io;
use std::ops::Range;
use std::sync::{Arc, mpsc};
use tokio::runtime::Runtime;

/// Pages that are fetched or written at a time.
const PARALLEL: usize = 16;

/// Bytes of the digest that ends each object.
const DIGEST: usize = 32;

/// A place for prefixes in an object store: a local directory, S3, GCS, Azure, memory, whatever the caller opens with the
/// `object_store` crate. Any number of processes may use one place at once.
///
/// Tokens are taken in blocks of a page. A block's name is a hash (BLAKE3) of everything that its keys and values depend on:
/// the model, the cache's geometry and codecs, the format version, and all tokens up to its end. So a longer prompt finds
/// the longest prefix that anyone has stored, and two stores of the same tokens write the same names. What keys and values
/// depend on besides (an adapter, an image), and who may find them (a tenant), the caller adds as a salt: see [`Prompt`].
///
/// Calls block; they may be made from async code too, where they hold up its thread.
///
/// ```
/// use tqkv::{CacheConfig, Device, DType, KvCache, PrefixStore};
/// let store = PrefixStore::new(std::sync::Arc::new(object_store::memory::InMemory::new()), "caches")?;
/// let device = Device::cpu();
/// let mut cache = KvCache::new(&device, CacheConfig::new(1, 1, 64).page_size(16))?;
/// let seq = cache.add_sequence();
/// let tokens: Vec<u32> = (0..40).collect();
/// let x = device.zeros(DType::F32, &[40, 1, 64])?;
/// let mut encoder = device.encoder()?;
/// cache.append(&mut encoder, 0, &[(seq, 40)], &x, &x)?;
/// encoder.submit_and_wait()?;
/// store.put(&cache, seq, &tokens, b"my model")?;
///
/// let longer: Vec<u32> = (0..100).collect();
/// let found = store.get(&mut cache, &longer, b"my model")?.expect("stored above");
/// assert_eq!(found.len, 32);                                // two whole pages of 16
/// assert_eq!(cache.len(found.sequence)?, 32);
/// # Ok::<(), tqkv::Error>(())
/// ```
pub struct PrefixStore {
    store: Arc<dyn ObjectStore>,
    root: Path,
    limit: Option<u64>,
    /// `None` only while it is dropped.
    runtime: Option<Runtime>,
}

/// A prompt: its tokens, and what else its keys and values depend on. Prompts meet in a store as far as their tokens and
/// their salts agree. Tokens alone (`&[u32]`, `&Vec<u32>`) are a prompt without salts.
///
/// ```
/// use tqkv::Prompt;
/// # let (tokens, image_digest) = (vec![1u32; 100], [0u8; 32]);
/// // One tenant's, with an adapter; an image stands behind the placeholder tokens from position 17 on.
/// let prompt = Prompt::new(&tokens).salt(b"tenant 12, adapter legal-v3").salt_at(17, &image_digest);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt<'a> {
    tokens: &'a [u32],
    salt: &'a [u8],
    /// In the order of their positions.
    salts: Vec<(usize, &'a [u8])>,
}

impl<'a> Prompt<'a> {
    /// A prompt without salts.
    pub fn new(tokens: &'a [u32]) -> Self {
        Prompt { tokens, salt: &[], salts: vec![] }
    }

    /// What the whole sequence depends on besides its tokens: say, a tenant and an adapter. Without one: nothing.
    pub fn salt(mut self, salt: &'a [u8]) -> Self {
        self.salt = salt;
        self
    }

    /// What the sequence depends on from a position on: say, a digest of the image behind placeholder tokens, at the first
    /// of them. Blocks before the position's are shared whatever it says, that block and all after it only with prompts
    /// that say the same there. A position may have several; their order does not matter.
    pub fn salt_at(mut self, position: usize, salt: &'a [u8]) -> Self {
        let entry = (position, salt);
        self.salts.insert(self.salts.partition_point(|other| *other < entry), entry);
        self
    }
}

impl<'a> From<&'a [u32]> for Prompt<'a> {
    fn from(tokens: &'a [u32]) -> Self {
        Prompt::new(tokens)
    }
}

impl<'a> From<&'a Vec<u32>> for Prompt<'a> {
    fn from(tokens: &'a Vec<u32>) -> Self {
        Prompt::new(tokens)
    }
}

/// A prefix that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FoundPrefix {
    /// The new sequence that holds it.
    pub sequence: SequenceId,
    /// Its tokens, a multiple of the page size.
    pub len: usize,
    /// Stored pages that were damaged: they were left out, and removed from the store.
    pub damaged: usize,
}

/// What [`PrefixStore::put`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoredPrefix {
    /// Tokens that the store now holds of the prompt, a multiple of the page size.
    pub len: usize,
    /// Objects that were written; the others were there.
    pub written: usize,
}

/// The hash of a block and of all that comes before it.
type Key = blake3::Hash;

/// A page of a group, where it is stored, and how.
#[derive(Clone)]
struct Object {
    path: Path,
    /// Positions, and their bytes.
    positions: usize,
    payload: usize,
}

/// What a fetch brought.
enum Fetched {
    Page(Vec<u8>),
    Missing,
    Damaged,
}

impl PrefixStore {
    /// Uses everything under `root` in an object store, which needs conditional puts (`PutMode::Create`).
    ///
    /// # Errors
    /// [`Error::Io`] for a root that is no path, or if threads cannot be started.
    pub fn new(store: Arc<dyn ObjectStore>, root: &str) -> Result<Self> {
        let invalid = |e: object_store::path::Error| io::Error::new(io::ErrorKind::InvalidInput, e);
        let root = Path::parse(root).map_err(|e| Error::io(root, &invalid(e)))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = Some(runtime.map_err(|e| Error::io("threads of the prefix store", &e))?);
        Ok(PrefixStore { store, root, limit: None, runtime })
    }

    /// Bytes that the store may hold; [`put`](PrefixStore::put) removes what was not used for longest. No limit if not set.
    pub fn limit(mut self, bytes: u64) -> Self {
        self.limit = Some(bytes);
        self
    }

    /// Stores the whole pages of a prompt, unless they are there. Its tokens are the first ones of the sequence.
    ///
    /// A windowed layer stores what it still holds: put a prompt before it grows far past the window, or only prefixes near
    /// its end will be found.
    ///
    /// # Errors
    /// [`Error::UnknownSequence`], [`Error::UnevenLayers`], [`Error::Positions`] for more tokens than the sequence has,
    /// [`Error::Io`] from the store; what [`Buffer::read`](crate::Buffer::read) says. What was stored by then stays, and is
    /// whole.
    pub fn put<'a>(
        &self,
        cache: &KvCache,
        sequence: SequenceId,
        prompt: impl Into<Prompt<'a>>,
        model: &[u8],
    ) -> Result<StoredPrefix> {
        let (prompt, len) = (prompt.into(), cache.len(sequence)?);
        if prompt.tokens.len() > len {
            return Err(Error::Positions { start: 0, end: prompt.tokens.len(), first: 0, len });
        }
        let geometry = Geometry::of(cache)?;
        let keys = keys(&geometry, &prompt, model);
        let page_size = geometry.page_size;
        let mut written = 0;
        for (g, group) in geometry.groups().iter().enumerate() {
            if group.extent.is_spare() {
                continue;
            }
            let Held { first, pages, .. } = &cache.sequence(sequence)?.held[g];
            let (base, whole) = (first / page_size, first.div_ceil(page_size));
            let blocks: Vec<usize> = (whole..blocks(group, page_size, keys.len() - 1).end).collect();
            for blocks in blocks.chunks(PARALLEL) {
                let objects: Vec<Object> = blocks.iter().map(|&b| self.object(&keys, b, g, group)).collect();
                let store = self.store.clone();
                let asked = objects.clone();
                let there =
                    self.wait(async move { future::join_all(asked.iter().map(|o| exists(&*store, &o.path))).await })?;
                let mut puts = vec![];
                for ((&block, object), there) in blocks.iter().zip(objects).zip(there) {
                    if !there? {
                        let mut data = vec![0; object.payload];
                        let page = Stored { page: pages[block - base], positions: object.positions, at: 0 };
                        cache.download(g, &group.layout, &[page], &mut data)?;
                        data.extend(digest(&object.path, &data).as_bytes());
                        puts.push((object.path, data));
                    }
                }
                let store = self.store.clone();
                let done = self.wait(async move {
                    future::join_all(puts.into_iter().map(|(path, data)| create(&*store, path, data))).await
                })?;
                for new in done {
                    written += new? as usize;
                }
            }
        }
        if let Some(leaf) = keys[1..].last() {
            self.touch(leaf)?;
        }
        if written > 0 && self.limit.is_some() {
            self.evict()?;
        }
        Ok(StoredPrefix { len: (keys.len() - 1) * page_size, written })
    }

    /// Adds a sequence with the longest stored prefix of a prompt to the cache; `None` if not even its first page is
    /// stored. A page that is missing or damaged ends the prefix before it.
    ///
    /// # Errors
    /// [`Error::OutOfPages`], [`Error::Io`] from the store, other than for what is missing; what
    /// [`Buffer::write`](crate::Buffer::write) says. The cache is then as it was.
    pub fn get<'a>(
        &self,
        cache: &mut KvCache,
        prompt: impl Into<Prompt<'a>>,
        model: &[u8],
    ) -> Result<Option<FoundPrefix>> {
        let geometry = Geometry::of(cache)?;
        let keys = keys(&geometry, &prompt.into(), model);
        // By group, the pool's page of each block.
        let mut pages = vec![BTreeMap::new(); geometry.groups().len()];
        let mut damaged = 0;
        let found = self.fetch_prefix(cache, &geometry, &keys, &mut pages, &mut damaged);
        let len = *found.as_ref().unwrap_or(&0);
        let mut held = vec![];
        for ((group, own), state) in geometry.groups().iter().zip(pages).zip(&mut cache.groups) {
            let needed = blocks(group, geometry.page_size, len);
            let (keep, rest): (Vec<_>, Vec<_>) = own.into_iter().partition(|(block, _)| needed.contains(block));
            rest.into_iter().rev().for_each(|(_, page)| state.pages.release(page));
            held.push(Held {
                first: needed.start * geometry.page_size,
                pages: keep.into_iter().map(|(_, page)| page).collect(),
                end: None,
            });
        }
        if found? == 0 {
            return Ok(None);
        }
        let len = len * geometry.page_size;
        let sequence = Sequence { held, lens: cache.lens_of(len) };
        let sequence = cache.insert(sequence);
        self.touch(&keys[len / geometry.page_size])
            .unwrap_or_else(|e| tracing::warn!("prefix not marked as used: {e}"));
        Ok(Some(FoundPrefix { sequence, len, damaged }))
    }

    /// Fetches pages until a whole prefix is there; says how many blocks it has.
    fn fetch_prefix(
        &self,
        cache: &mut KvCache,
        geometry: &Geometry,
        keys: &[Key],
        pages: &mut [BTreeMap<usize, u32>],
        damaged: &mut usize,
    ) -> Result<usize> {
        let mut len = keys.len() - 1;
        let groups = geometry.groups();
        // Full layers first: they say how long the prefix can be. A miss in a windowed one makes it shorter, and other
        // pages are needed then.
        let mut order: Vec<usize> = (0..groups.len()).collect();
        order.sort_by_key(|&g| groups[g].extent != Extent::All);
        'shorter: loop {
            for &g in &order {
                let group = &groups[g];
                let missing: Vec<usize> =
                    blocks(group, geometry.page_size, len).filter(|b| !pages[g].contains_key(b)).collect();
                for blocks in missing.chunks(PARALLEL) {
                    let objects: Vec<Object> = blocks.iter().map(|&b| self.object(keys, b, g, group)).collect();
                    let (store, asked) = (self.store.clone(), objects.clone());
                    let fetched =
                        self.wait(
                            async move { future::join_all(asked.iter().map(|object| fetch(&*store, object))).await },
                        )?;
                    for ((&block, object), fetched) in blocks.iter().zip(objects).zip(fetched) {
                        let Fetched::Page(data) =
                            fetched.inspect(|f| *damaged += matches!(f, Fetched::Damaged) as usize)?
                        else {
                            len = block;
                            continue 'shorter;
                        };
                        cache.groups[g].pages.expect_free(1)?;
                        let page = cache.groups[g].pages.take()?;
                        pages[g].insert(block, page);
                        let stored = Stored { page, positions: object.positions, at: 0 };
                        cache.upload(g, &group.layout, &[stored], &data)?;
                    }
                }
            }
            return Ok(len);
        }
    }

    /// Removes blocks that were not used for longest, the ends of prefixes first, until the limit is kept. Returns the bytes
    /// removed. Without a limit nothing is done.
    ///
    /// # Errors
    /// [`Error::Io`] from the store.
    pub fn evict(&self) -> Result<u64> {
        let Some(limit) = self.limit else { return Ok(0) };
        let mut nodes: HashMap<String, Node> = HashMap::new();
        let mut total = 0;
        for meta in self.list("pages")? {
            let Some((own, parent)) = parse(&meta.location) else { continue };
            total += meta.size;
            let node = nodes.entry(own).or_insert_with(|| Node { parent, ..Node::default() });
            node.used = node.used.max(meta.last_modified.timestamp_micros());
            node.objects.push((meta.location, meta.size));
        }
        if total <= limit {
            return Ok(0);
        }
        let mut stale = vec![];
        for meta in self.list("used")? {
            match nodes.get_mut(meta.location.filename().unwrap_or_default()) {
                Some(node) => node.used = node.used.max(meta.last_modified.timestamp_micros()),
                None => stale.push(meta.location),
            }
        }
        // Whoever used a block used all before it. From the newest on, each block passes its time up at most once.
        let mut newest: Vec<(i64, String)> = nodes.iter().map(|(own, node)| (node.used, own.clone())).collect();
        newest.sort_unstable_by(|a, b| b.cmp(a));
        for (_, own) in newest {
            let (used, mut parent) = nodes.get(&own).map(|n| (n.used, n.parent.clone())).unwrap_or_default();
            while let Some(node) = nodes.get_mut(&parent).filter(|n| n.used < used) {
                node.used = used;
                parent = node.parent.clone();
            }
        }
        let parents: Vec<String> = nodes.values().map(|n| n.parent.clone()).collect();
        for parent in parents {
            if let Some(node) = nodes.get_mut(&parent) {
                node.children += 1;
            }
        }
        let entry = |own: &String, node: &Node| std::cmp::Reverse((node.used, own.clone()));
        let mut leaves: BinaryHeap<_> =
            nodes.iter().filter(|(_, n)| n.children == 0).map(|(own, n)| entry(own, n)).collect();
        let (mut gone, mut removed) = (stale, 0);
        while let Some(std::cmp::Reverse((_, own))) = leaves.pop()
            && total - removed > limit
        {
            let Some(node) = nodes.remove(&own) else { continue };
            removed += node.objects.iter().map(|o| o.1).sum::<u64>();
            gone.extend(node.objects.into_iter().map(|o| o.0));
            gone.push(self.root.clone().join("used").join(own));
            if let Some(parent) = nodes.get_mut(&node.parent) {
                parent.children -= 1;
                if parent.children == 0 {
                    leaves.push(entry(&node.parent, parent));
                }
            }
        }
        let store = self.store.clone();
        self.wait(async move {
            let deletions = stream::iter(gone).map(|path| {
                let store = store.clone();
                async move { delete(&*store, &path).await }
            });
            deletions.buffer_unordered(PARALLEL).try_collect::<Vec<()>>().await
        })??;
        Ok(removed)
    }

    /// Bytes of all stored pages.
    ///
    /// # Errors
    /// [`Error::Io`] from the store.
    pub fn bytes(&self) -> Result<u64> {
        Ok(self.list("pages")?.iter().map(|meta| meta.size).sum())
    }

    fn list(&self, directory: &'static str) -> Result<Vec<ObjectMeta>> {
        let (store, path) = (self.store.clone(), self.root.clone().join(directory));
        self.wait(async move {
            let all = store.list(Some(&path)).try_collect::<Vec<_>>().await;
            all.map_err(|e| failed(&path, &e))
        })?
    }

    /// Says that this block and all before it were used now.
    fn touch(&self, leaf: &Key) -> Result<()> {
        let (store, path) = (self.store.clone(), self.root.clone().join("used").join(leaf.to_hex().as_str()));
        self.wait(async move {
            let put = store.put(&path, PutPayload::new()).await;
            put.map(drop).map_err(|e| failed(&path, &e))
        })?
    }

    /// The object of a block in a group. Its name says whom it follows, so that eviction need not open it.
    fn object(&self, keys: &[Key], block: usize, group: usize, geometry: &GroupGeometry) -> Object {
        let name = format!("{}-{}-{group}", keys[block + 1].to_hex(), keys[block].to_hex());
        // A block of tokens fills a page, except where there are fewer sinks.
        let positions = geometry.positions(usize::MAX, block);
        let payload = geometry.layout.payload(positions) as usize;
        Object { path: self.root.clone().join("pages").join(name), positions, payload }
    }

    /// Runs on threads of our own, so that a caller within another runtime does no harm.
    fn wait<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Result<T> {
        let (done, result) = mpsc::sync_channel(1);
        if let Some(runtime) = &self.runtime {
            runtime.spawn(async move { done.send(work.await) });
        }
        result
            .recv()
            .map_err(|_| Error::io("prefix store", &io::Error::other("the store's task ended without a result")))
    }
}

impl Drop for PrefixStore {
    fn drop(&mut self) {
        // Waiting for threads would panic in async code.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl std::fmt::Debug for PrefixStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PrefixStore({} in {}, limit {:?})", self.root, self.store, self.limit)
    }
}

/// A block, as eviction sees it.
#[derive(Default)]
struct Node {
    parent: String,
    objects: Vec<(Path, u64)>,
    /// Microseconds since 1970.
    used: i64,
    children: usize,
}

/// The hash of everything before the first token, then that of each whole block.
fn keys(geometry: &Geometry, prompt: &Prompt, model: &[u8]) -> Vec<Key> {
    let heads = |layer: &LayerGeometry| (layer.kv_heads, layer.key.head_dim(), layer.value.head_dim());
    let first = geometry.layers.first().map_or((0, 0, 0), heads);
    // As it was before layers could differ, where they do not.
    let alike = first.1 == first.2 && geometry.layers.iter().all(|layer| heads(layer) == first);
    let (tag, kv_heads, head_dim) =
        if alike { ("tqkv prefix store 1", first.0, first.1) } else { ("tqkv prefix store 1, heads by layer", 0, 0) };
    let mut start = tag.as_bytes().to_vec();
    start.extend(FORMAT_VERSION.to_le_bytes());
    let counts = [model.len(), kv_heads, head_dim, geometry.page_size, geometry.layers.len()];
    counts.iter().for_each(|&n| start.extend((n as u64).to_le_bytes()));
    for layer in &geometry.layers {
        if !alike {
            encode_heads(layer, &mut start);
        }
        encode_layer(layer, &mut start);
        // As it was before there were such things, where there are none. Newest positions are not stored, but count as a group.
        if let Some(channels) = layer.channels {
            start.extend(b"channels");
            start.extend(channels.to_le_bytes());
        }
        if layer.recent.is_some() {
            start.extend(b"recent");
            encode_apart(layer.recent, &mut start);
        }
    }
    start.extend(model);
    // The model's length is said above, so a model and a salt never read as another model.
    start.extend(prompt.salt);
    let mut keys = vec![blake3::hash(&start)];
    let mut salts = prompt.salts.iter().peekable();
    for (i, block) in prompt.tokens.chunks_exact(geometry.page_size).enumerate() {
        let mut hasher = blake3::Hasher::new();
        hasher.update(keys[i].as_bytes());
        for token in block {
            hasher.update(&token.to_le_bytes());
        }
        // All blocks have the same number of tokens, so what follows is never taken for one.
        while let Some((position, salt)) = salts.next_if(|salt| salt.0 / geometry.page_size <= i) {
            hasher.update(&(*position as u64).to_le_bytes()).update(&(salt.len() as u64).to_le_bytes()).update(salt);
        }
        keys.push(hasher.finalize());
    }
    keys
}

/// The blocks that a sequence of so many blocks needs in a group: what the last token sees, so that it may be taken back. A
/// group's page is a block, the page of few sinks too.
fn blocks(group: &GroupGeometry, page_size: usize, len: usize) -> Range<usize> {
    let end = group.pages(len * page_size);
    if group.extent.is_spare() {
        return end..end;
    }
    let seen = group.extent.seen((len * page_size).saturating_sub(1));
    seen / page_size..end
}

/// Covers the name too: an object that was moved is damaged.
fn digest(path: &Path, payload: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(path.filename().unwrap_or_default().as_bytes());
    hasher.update(payload);
    hasher.finalize()
}

/// The block and the one before it.
fn parse(path: &Path) -> Option<(String, String)> {
    let mut parts = path.filename()?.split('-');
    let (own, parent) = (parts.next()?, parts.next()?);
    (own.len() == 64 && parent.len() == 64 && own != parent).then(|| (own.to_owned(), parent.to_owned()))
}

async fn exists(store: &dyn ObjectStore, path: &Path) -> Result<bool> {
    match store.head(path).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::NotFound { .. }) => Ok(false),
        Err(e) => Err(failed(path, &e)),
    }
}

/// Writes an object unless it is there; says whether it did.
async fn create(store: &dyn ObjectStore, path: Path, data: Vec<u8>) -> Result<bool> {
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(&path, data.into(), options).await {
        Ok(_) => Ok(true),
        Err(object_store::Error::AlreadyExists { .. }) => Ok(false),
        Err(e) => Err(failed(&path, &e)),
    }
}

async fn fetch(store: &dyn ObjectStore, object: &Object) -> Result<Fetched> {
    let path = &object.path;
    let found = match store.get(path).await {
        Ok(found) => found,
        Err(object_store::Error::NotFound { .. }) => return Ok(Fetched::Missing),
        Err(e) => return Err(failed(path, &e)),
    };
    // The size is looked at before that much is read.
    if found.meta.size == (object.payload + DIGEST) as u64 {
        let data = match found.bytes().await {
            Ok(data) => data,
            Err(object_store::Error::NotFound { .. }) => return Ok(Fetched::Missing),
            Err(e) => return Err(failed(path, &e)),
        };
        if data.len() == object.payload + DIGEST {
            let (payload, stored) = data.split_at(object.payload);
            if digest(path, payload).as_bytes() == stored {
                return Ok(Fetched::Page(payload.to_vec()));
            }
        }
    }
    tracing::warn!("{path} in {store} is damaged; removed");
    // Nobody could write it anew otherwise.
    delete(store, path).await?;
    Ok(Fetched::Damaged)
}

async fn delete(store: &dyn ObjectStore, path: &Path) -> Result<()> {
    match store.delete(path).await {
        Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
        Err(e) => Err(failed(path, &e)),
    }
}

fn failed(path: &Path, error: &object_store::Error) -> Error {
    use object_store::Error::*;
    let kind = match error {
        NotFound { .. } => io::ErrorKind::NotFound,
        AlreadyExists { .. } => io::ErrorKind::AlreadyExists,
        PermissionDenied { .. } | Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        NotSupported { .. } | NotImplemented { .. } => io::ErrorKind::Unsupported,
        _ => io::ErrorKind::Other,
    };
    Error::Io { path: path.to_string(), kind, message: error.to_string() }
}
