//! Where the positions of some sequences are.

use super::PagePool;
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product, to_u32};
use std::any::Any;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An entry of a page table that stands for no page.
pub const NO_PAGE: u32 = u32::MAX;

/// The most positions of a sequence. Kernels count them in 32 bits, some with a sign, to the end of what they take at once.
pub(super) const MOST_POSITIONS: usize = (1 << 31) - (1 << 16);

/// One sequence as a batch sees it.
///
/// Positions are absolute. Position p lies in slot `p mod (pages.len() · page_size)`: page `pages[slot / page_size]`,
/// row `slot mod page_size`. So a ring cache, or a sliding window whose old pages are reused, is no special case.
#[derive(Clone, Debug)]
pub struct Span<'a> {
    /// The oldest position held.
    pub first: usize,
    /// One past the newest position, the new ones included.
    pub len: usize,
    /// How many of the newest positions this step is about: those that [`quantize`](crate::ops::quantize) writes and that
    /// queries of [`attention`](crate::ops::attention) stand at.
    pub new: usize,
    /// Pages by slot; [`NO_PAGE`] where no held position lies.
    pub pages: &'a [u32],
}

/// Some sequences, validated: what every layer of a model step shares. Cheap to clone.
///
/// Devices whose kernels read it from memory get it there with the first operation that is recorded with it, and again with
/// [`update`](Batch::update).
///
/// ```
/// use tqkv::ops::{Batch, NO_PAGE, Span};
///
/// // Pages of 16 positions. The first sequence reads a prompt of 20; the second holds 40 and decodes one more, and its first page
/// // is given up, as a window of 24 has left it.
/// let spans = [
///     Span { first: 0, len: 20, new: 20, pages: &[3, 0] },
///     Span { first: 17, len: 41, new: 1, pages: &[NO_PAGE, 5, 1] },
/// ];
/// let batch = Batch::new(&tqkv::Device::cpu(), 16, &spans)?;
/// assert_eq!((batch.sequences(), batch.tokens()), (2, 21));
/// // Position 17 would lie in a page that is not there.
/// let missing = [Span { first: 17, len: 41, new: 1, pages: &[2, NO_PAGE, 1] }];
/// assert!(matches!(Batch::new(&tqkv::Device::cpu(), 16, &missing), Err(tqkv::Error::Page { .. })));
/// # Ok::<(), tqkv::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Batch(pub(super) Arc<Inner>);

#[derive(Debug)]
pub(super) struct Inner {
    pub page_size: usize,
    pub width: usize,
    /// Of a batch whose lengths are on the device, what they are at most.
    pub spans: Vec<SpanInfo>,
    /// Empty if it is on the device.
    pub table: Vec<u32>,
    pub tokens: usize,
    /// One past the largest page.
    pub pages: usize,
    /// Whether every new position is in a page that nothing else of the batch writes.
    pub writes_apart: bool,
    /// Where page tables, and lengths, are if the device's memory alone has them.
    pub source: Option<Source>,
    pub device: Device,
    /// What the device's memory held when this was made of it.
    pub generation: u64,
    pub kept: Arc<Kept>,
}

/// What lengths on the device are at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Sequences, exactly.
    pub sequences: usize,
    /// Tokens that queries and outputs have room for, exactly. Those of no sequence are not written.
    pub tokens: usize,
    /// New tokens of a sequence.
    pub new: usize,
    /// Positions of a sequence.
    pub len: usize,
}

/// Where a batch's content is.
#[derive(Clone, Debug)]
#[allow(dead_code)] // Not every backend reads it.
pub(crate) struct Source {
    pub entries: Buffer,
    pub stride: usize,
    /// Lengths and starts, and their bounds, unless the host knows them.
    pub lengths: Option<(Buffer, Buffer, Bounds)>,
}

/// What operations that were recorded with a batch read, now or later: the same for all its updates.
#[derive(Debug, Default)]
pub(super) struct Kept {
    /// Spans, then page tables, u32, once kernels have asked for them.
    on_device: Mutex<Option<Buffer>>,
    generation: AtomicU64,
    /// The pages of the smallest pool that it was used with.
    pool_pages: Mutex<Option<usize>>,
    /// Whether it was used to write.
    written: AtomicBool,
    plans: Plans,
}

/// A [`Span`] as kernels see it.
#[derive(Clone, Copy, Debug, PartialEq, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct SpanInfo {
    pub first: u32,
    pub len: u32,
    /// Where its new tokens start among those of the batch.
    pub start: u32,
    pub new: u32,
}

impl Batch {
    /// Checks the sequences.
    ///
    /// # Errors
    /// [`Error::Zero`] for a page_size of 0 or an empty batch; [`Error::TooLarge`] if more positions are new than held,
    /// the first is past the last, or that is past 2^31 - 2^16; [`Error::Positions`] if more are held than the pages have slots for, or a table that is
    /// shorter than the batch's widest would have to wrap; [`Error::Page`] if a held position lies in no page;
    /// [`Error::SizeOverflow`].
    pub fn new(device: &Device, page_size: usize, spans: &[Span]) -> Result<Self> {
        if page_size == 0 {
            return Err(Error::Zero { what: "page_size" });
        }
        let width =
            spans.iter().map(|s| s.pages.len()).max().ok_or(Error::Zero { what: "sequences of a batch" })?.max(1);
        let mut table = vec![NO_PAGE; checked_product("page table", &[spans.len(), width])?];
        to_u32("slots of a sequence", checked_product("slots of a sequence", &[width, page_size])?)?;
        let (mut infos, mut tokens, mut pages) = (Vec::with_capacity(spans.len()), 0usize, 0);
        let mut written = Vec::with_capacity(spans.len());
        for (i, span) in spans.iter().enumerate() {
            let info = span.check(page_size, width, tokens)?;
            infos.push(info);
            tokens =
                tokens.checked_add(span.new).ok_or(Error::SizeOverflow { what: "tokens of a batch", limit: "u32" })?;
            to_u32("tokens of a batch", tokens)?;
            table[i * width..i * width + span.pages.len()].copy_from_slice(span.pages);
            let first_written = (span.len - span.new) / page_size;
            for logical in info.pages(page_size) {
                let page = span.pages[logical % span.pages.len()];
                if page == NO_PAGE {
                    return Err(Error::Page { got: NO_PAGE as usize, pages: NO_PAGE as usize });
                }
                pages = pages.max(page as usize + 1);
                if span.new > 0 && logical >= first_written {
                    written.push((page, i, logical % width));
                }
            }
        }
        // Neighbours then are of one page, and of one entry if they are of one place.
        written.sort_unstable();
        let writes_apart = written.windows(2).all(|w| w[0].0 != w[1].0 || w[0] == w[1]);
        let (device, kept) = (device.clone(), Arc::default());
        let (spans, source) = (infos, None);
        let inner =
            Inner { page_size, width, spans, table, tokens, pages, writes_apart, source, device, generation: 0, kept };
        Ok(Batch(Arc::new(inner)))
    }

    /// Other lengths and pages for as many sequences, with as many new positions each. Page tables may be as long as the longest
    /// was when the batch was made: give it [`NO_PAGE`]s where pages are to come.
    ///
    /// On a device that reads batches from memory (CUDA), whatever was recorded with this batch runs on the new content from now
    /// on: a captured graph, say, goes on with the next token. The kernels stay those that suited the lengths at the recording;
    /// they are right for any, but for those of many new positions a sequence, which hold for as many tiles of 128 positions. Clones made before can be used in no further operation. On the other devices what was recorded
    /// keeps the content that it was recorded with, so submit it before.
    ///
    /// # Errors
    /// Those of [`Batch::new`]; [`Error::Mismatch`] for other numbers of sequences, of new positions or of tiles, or longer tables;
    /// [`Error::Page`] and [`Error::Aliased`] for pages that a recorded operation could not take; [`Error::OutdatedBatch`] of a
    /// clone that was left behind; [`Error::Unsupported`] while the device's stream is captured in a graph, and of a batch whose tables
    /// are [on the device](Batch::on_device). Nothing has changed then.
    pub fn update(&mut self, spans: &[Span]) -> Result<()> {
        if self.0.source.is_some() {
            let what = "update a batch from the host whose tables are on the device".to_owned();
            return Err(Error::Unsupported { device: self.device().to_string(), what });
        }
        let new = Batch::new(self.device(), self.page_size(), spans)?;
        self.expect_current()?;
        self.expect_like(&new)?;
        let generation = self.take_over(&new)?;
        let old = &*self.0;
        let (table, width, kept) = (new.table_of(old.width), old.width, old.kept.clone());
        let Inner { page_size, tokens, pages, writes_apart, .. } = *new.0;
        let (spans, device) = (new.0.spans.clone(), old.device.clone());
        let source = None;
        let inner =
            Inner { page_size, width, spans, table, tokens, pages, writes_apart, source, device, generation, kept };
        self.0 = Arc::new(inner);
        Ok(())
    }

    /// One sequence in a contiguous cache: positions `first..len` of which the last `new` are new. Past `capacity`
    /// positions wrap around, as in a ring.
    ///
    /// # Errors
    /// As [`Batch::new`].
    pub fn contiguous(device: &Device, capacity: usize, first: usize, len: usize, new: usize) -> Result<Self> {
        Batch::new(device, capacity, &[Span { first, len, new, pages: &[0] }])
    }

    /// Sequences.
    pub fn sequences(&self) -> usize {
        self.0.spans.len()
    }

    /// New tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.0.tokens
    }

    /// Positions of a page.
    pub fn page_size(&self) -> usize {
        self.0.page_size
    }

    /// Entries of a sequence's page table.
    pub(crate) fn width(&self) -> usize {
        self.0.width
    }

    pub(crate) fn spans(&self) -> &[SpanInfo] {
        &self.0.spans
    }

    /// The device whose operations it is for.
    pub(crate) fn device(&self) -> &Device {
        &self.0.device
    }

    /// Spans [sequences, 4], page tables [sequences, width] and a count of indices that were out of range in the device's memory, one behind the
    /// other, u32. What is no page there is page 0: whatever a kernel reads, it lies in the pool.
    #[allow(dead_code)] // Not every backend does.
    pub(crate) fn device_words(&self) -> Result<Buffer> {
        let mut on_device = lock(&self.0.kept.on_device);
        if let Some(buffer) = &*on_device {
            return Ok(buffer.clone());
        }
        let words = self.words(self.width());
        Ok(on_device.insert(self.device().upload(&words, &[words.len()])?).clone())
    }

    /// What `on_device` holds, with tables of this width.
    fn words(&self, width: usize) -> Vec<u32> {
        let spans = bytemuck::cast_slice::<_, u32>(&self.0.spans).iter().copied();
        let table = self.table_of(width);
        spans.chain(table.into_iter().map(|page| if page == NO_PAGE { 0 } else { page })).chain([0]).collect()
    }

    /// Page tables of another width, of which no held position needs more.
    fn table_of(&self, width: usize) -> Vec<u32> {
        let Inner { page_size, table, spans, width: own, source, .. } = &*self.0;
        if source.is_some() {
            // It comes with a refresh.
            return vec![0; spans.len() * width];
        }
        if width == *own {
            return table.clone();
        }
        let mut wide = vec![NO_PAGE; spans.len() * width];
        for (i, span) in spans.iter().enumerate() {
            for logical in span.pages(*page_size) {
                wide[i * width + logical % width] = table[i * own + logical % own];
            }
        }
        wide
    }

    /// Fails unless what was recorded with this batch can go on with the other's content.
    pub(crate) fn expect_like(&self, batch: &Batch) -> Result<()> {
        let (old, new) = (&*self.0, &*batch.0);
        let mismatch = |what, got, expected: usize| Err(Error::Mismatch { what, got, expected: expected.to_string() });
        if new.spans.len() != old.spans.len() {
            return mismatch("sequences of the batch", new.spans.len(), old.spans.len());
        }
        if let Some((new, old)) = new.spans.iter().zip(&old.spans).find(|(new, old)| new.new != old.new) {
            return mismatch("new positions of a sequence", new.new as usize, old.new as usize);
        }
        if new.width > old.width {
            let expected = format!("at most {}", old.width);
            return Err(Error::Mismatch { what: "pages of a sequence's table", got: new.width, expected });
        }
        if let Some(pages) = lock(&old.kept.pool_pages).filter(|&pages| new.pages > pages) {
            return Err(Error::Page { got: new.pages - 1, pages });
        }
        if old.kept.written.load(Relaxed) && !new.writes_apart {
            return Err(WRITTEN_TWICE);
        }
        lock(&old.kept.plans.0).iter().try_for_each(|plan| plan.expect(batch))
    }

    /// Whether recording with the other's content would choose the same kernels.
    pub(crate) fn suits(&self, new: &Batch) -> bool {
        lock(&self.0.kept.plans.0).iter().all(|plan| plan.suits(new))
    }

    /// Puts another batch's content where what was recorded with this one reads it, and returns the generation. The other is like this one.
    pub(crate) fn take_over(&self, new: &Batch) -> Result<u64> {
        let kept = &self.0.kept;
        if let Some(buffer) = &*lock(&kept.on_device) {
            buffer.write(&new.words(self.width()))?;
        }
        let mut plans = lock(&kept.plans.0);
        let mut kept_plans = Vec::with_capacity(plans.len());
        for plan in plans.drain(..) {
            if plan.follow(new)? {
                kept_plans.push(plan);
            }
        }
        *plans = kept_plans;
        Ok(kept.generation.fetch_add(1, Relaxed) + 1)
    }

    /// Whether it is the last of its updates.
    pub(crate) fn is_current(&self) -> bool {
        self.0.kept.generation.load(Relaxed) == self.0.generation
    }

    /// Whether both are one.
    pub(crate) fn is_same(&self, other: &Batch) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Whether both say the same.
    pub(crate) fn equals(&self, other: &Batch) -> bool {
        let (a, b) = (&*self.0, &*other.0);
        self.is_same(other)
            || (a.source.is_none()
                && b.source.is_none()
                && (a.page_size, a.width) == (b.page_size, b.width)
                && a.spans == b.spans
                && a.table == b.table)
    }

    fn expect_current(&self) -> Result<()> {
        if self.is_current() { Ok(()) } else { Err(Error::OutdatedBatch) }
    }

    /// Fails if a page would be written from two places: two sequences, or two entries of one table.
    pub(crate) fn expect_writes_apart(&self) -> Result<()> {
        if self.0.source.is_some() {
            let what = "write where tables on the device say: `quantize_at` takes slots".to_owned();
            return Err(Error::Unsupported { device: self.device().to_string(), what });
        }
        self.0.kept.written.store(true, Relaxed);
        if self.0.writes_apart { Ok(()) } else { Err(WRITTEN_TWICE) }
    }

    /// Page tables, [sequences, width].
    #[allow(dead_code)] // Not every backend reads it.
    pub(crate) fn table(&self) -> &[u32] {
        &self.0.table
    }

    /// What backends have worked out for this batch.
    #[allow(dead_code)] // Not every backend plans.
    pub(crate) fn plans(&self) -> &Plans {
        &self.0.kept.plans
    }

    /// Page and row of a held position.
    pub(crate) fn locate(&self, sequence: usize, position: usize) -> (usize, usize) {
        let Inner { page_size, width, table, .. } = &*self.0;
        let slot = position % (width * page_size);
        (table[sequence * width + slot / page_size] as usize, slot % page_size)
    }

    /// Fails unless this batch's pages lie in the pool.
    pub(crate) fn expect_within(&self, pool: &PagePool) -> Result<()> {
        if pool.page_size() != self.page_size() {
            let expected = format!("{} as in the pool", pool.page_size());
            return Err(Error::Mismatch { what: "page_size of the batch", got: self.page_size(), expected });
        }
        if self.0.pages > pool.pages() {
            return Err(Error::Page { got: self.0.pages - 1, pages: pool.pages() });
        }
        self.expect_current()?;
        let mut pages = lock(&self.0.kept.pool_pages);
        *pages = Some(pages.map_or(pool.pages(), |pages| pages.min(pool.pages())));
        Ok(())
    }
}

const WRITTEN_TWICE: Error = Error::Aliased { what: "a page that is written from two places" };

impl Span<'_> {
    /// Checks a sequence of a batch with tables of `width` pages, whose new tokens start at `start`.
    fn check(&self, page_size: usize, width: usize, start: usize) -> Result<SpanInfo> {
        let slots = checked_product("slots of a sequence", &[self.pages.len(), page_size])?;
        let Some(held) = self.len.checked_sub(self.first) else {
            let (got, expected) = (self.first, self.len);
            return Err(Error::TooLarge { what: "first position of a sequence", got, expected });
        };
        if self.new > held {
            return Err(Error::TooLarge { what: "new positions of a sequence", got: self.new, expected: held });
        }
        // A shorter table than the batch's widest would wrap elsewhere, so it must not wrap at all.
        let wraps = self.pages.len() == width;
        if held > slots || (self.len > slots && !wraps) {
            let first = if wraps { self.first } else { 0 };
            let (start, end) = (self.first, self.len);
            return Err(Error::Positions { start, end, first, len: first.saturating_add(slots) });
        }
        if self.len > MOST_POSITIONS {
            let (got, expected) = (self.len, MOST_POSITIONS);
            return Err(Error::TooLarge { what: "length of a sequence", got, expected });
        }
        let start = to_u32("tokens of a batch", start)?;
        Ok(SpanInfo { first: self.first as u32, len: self.len as u32, start, new: self.new as u32 })
    }
}

impl SpanInfo {
    /// The pages of held positions, counted from position 0.
    fn pages(&self, page_size: usize) -> Range<usize> {
        let (first, len) = (self.first as usize, self.len as usize);
        // With no position there is no page to look at.
        if first < len { first / page_size..len.div_ceil(page_size) } else { 0..0 }
    }
}

/// What a backend has worked out for a batch.
pub(crate) trait Plan: Any + Send + Sync {
    /// Whether the same kernels would be chosen for another batch.
    fn suits(&self, _: &Batch) -> bool {
        true
    }

    /// Fails if what was recorded with it is right for its own batch only.
    fn expect(&self, _: &Batch) -> Result<()> {
        Ok(())
    }

    /// Makes it anew for another batch, where those who use it find it; false if it does not last that long.
    fn follow(&self, _: &Batch) -> Result<bool> {
        Ok(false)
    }
}

/// What a backend has worked out for a batch, kept as long as the batch is.
#[derive(Default)]
pub(crate) struct Plans(Mutex<Vec<Arc<dyn Plan>>>);

#[allow(dead_code)] // Not every backend plans.
impl Plans {
    /// The plan of this type that fits, or a new one.
    pub fn get<T: Plan>(&self, fits: impl Fn(&T) -> bool, make: impl FnOnce() -> Result<T>) -> Result<Arc<T>> {
        let mut plans = lock(&self.0);
        if let Some(plan) = plans.iter().filter_map(downcast).find(|plan| fits(plan)) {
            return Ok(plan);
        }
        let plan = Arc::new(make()?);
        plans.push(plan.clone());
        Ok(plan)
    }

    /// Those of this type.
    pub fn all<T: Plan>(&self) -> Vec<Arc<T>> {
        lock(&self.0).iter().filter_map(downcast).collect()
    }
}

#[allow(dead_code)] // Not every backend plans.
fn downcast<T: Plan>(plan: &Arc<dyn Plan>) -> Option<Arc<T>> {
    (plan.clone() as Arc<dyn Any + Send + Sync>).downcast().ok()
}

impl std::fmt::Debug for Plans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Plans")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
