//! Where the positions of some sequences are.

use super::PagePool;
use crate::compute::{Buffer, Device};
use crate::error::{Error, Result, checked_product, to_u32};
use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

/// An entry of a page table that stands for no page.
pub const NO_PAGE: u32 = u32::MAX;

/// The most positions of a sequence. Kernels count them in 32 bits, some with a sign, to the end of what they take at once.
const MOST_POSITIONS: usize = (1 << 31) - (1 << 16);

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

/// Some sequences, validated and on the device: the plan that every layer of a model step shares. Cheap to clone.
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
pub struct Batch(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    page_size: usize,
    width: usize,
    spans: Vec<SpanInfo>,
    table: Vec<u32>,
    tokens: usize,
    /// One past the largest page.
    pages: usize,
    device: Device,
    /// Spans and page tables in the device's memory, where its kernels read them there.
    on_device: Option<[Buffer; 2]>,
    plans: Plans,
}

/// A [`Span`] as kernels see it.
#[derive(Clone, Copy, Debug, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C)]
pub(crate) struct SpanInfo {
    pub first: u32,
    pub len: u32,
    /// Where its new tokens start among those of the batch.
    pub start: u32,
    pub new: u32,
}

impl Batch {
    /// Checks the sequences and puts them on the device.
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
        let (mut infos, mut tokens, mut pages) = (Vec::with_capacity(spans.len()), 0usize, 0);
        for (i, span) in spans.iter().enumerate() {
            let slots = checked_product("slots of a sequence", &[span.pages.len(), page_size])?;
            to_u32("slots of a sequence", checked_product("slots of a sequence", &[width, page_size])?)?;
            let Some(held) = span.len.checked_sub(span.first) else {
                let (got, expected) = (span.first, span.len);
                return Err(Error::TooLarge { what: "first position of a sequence", got, expected });
            };
            if span.new > held {
                return Err(Error::TooLarge { what: "new positions of a sequence", got: span.new, expected: held });
            }
            // A shorter table than the batch's widest would wrap elsewhere, so it must not wrap at all.
            let wraps = span.pages.len() == width;
            if held > slots || (span.len > slots && !wraps) {
                let first = if wraps { span.first } else { 0 };
                return Err(Error::Positions {
                    start: span.first,
                    end: span.len,
                    first,
                    len: first.saturating_add(slots),
                });
            }
            if span.len > MOST_POSITIONS {
                let (got, expected) = (span.len, MOST_POSITIONS);
                return Err(Error::TooLarge { what: "length of a sequence", got, expected });
            }
            infos.push(SpanInfo {
                first: span.first as u32,
                len: span.len as u32,
                start: to_u32("tokens of a batch", tokens)?,
                new: span.new as u32,
            });
            tokens =
                tokens.checked_add(span.new).ok_or(Error::SizeOverflow { what: "tokens of a batch", limit: "u32" })?;
            to_u32("tokens of a batch", tokens)?;
            table[i * width..i * width + span.pages.len()].copy_from_slice(span.pages);
            // Positions are held only from first to len; with none there is no page to look at.
            let held_pages = if held > 0 { span.first / page_size..span.len.div_ceil(page_size) } else { 0..0 };
            for page in held_pages {
                let page = span.pages[page % span.pages.len()];
                if page == NO_PAGE {
                    return Err(Error::Page { got: NO_PAGE as usize, pages: NO_PAGE as usize });
                }
                pages = pages.max(page as usize + 1);
            }
        }
        let on_device = match device.driver().reads_batches() {
            true => Some([
                device.upload(bytemuck::cast_slice::<_, u32>(&infos), &[infos.len(), 4])?,
                device.upload(&table, &[infos.len(), width])?,
            ]),
            false => None,
        };
        Ok(Batch(Arc::new(Inner {
            page_size,
            width,
            spans: infos,
            table,
            tokens,
            pages,
            device: device.clone(),
            on_device,
            plans: Plans::default(),
        })))
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

    /// Spans on the device, u32 [sequences, 4], for drivers that read batches.
    #[allow(dead_code)] // Not every backend does.
    pub(crate) fn device_spans(&self) -> &Buffer {
        &self.on_device()[0]
    }

    /// Page tables on the device, u32 [sequences, width], for drivers that read batches.
    #[allow(dead_code)] // Not every backend does.
    pub(crate) fn device_table(&self) -> &Buffer {
        &self.on_device()[1]
    }

    #[allow(dead_code)]
    fn on_device(&self) -> &[Buffer; 2] {
        self.0.on_device.as_ref().unwrap_or_else(|| unreachable!("its driver does not read batches"))
    }

    /// Page tables, [sequences, width].
    #[allow(dead_code)] // Not every backend reads it.
    pub(crate) fn table(&self) -> &[u32] {
        &self.0.table
    }

    /// What backends have worked out for this batch.
    #[allow(dead_code)] // Not every backend plans.
    pub(crate) fn plans(&self) -> &Plans {
        &self.0.plans
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
        Ok(())
    }
}

/// What a backend has worked out for a batch, kept as long as the batch is.
#[derive(Default)]
pub(crate) struct Plans(Mutex<Vec<Arc<dyn Any + Send + Sync>>>);

#[allow(dead_code)] // Not every backend plans.
impl Plans {
    /// The plan of this type that fits, or a new one.
    pub fn get<T: Send + Sync + 'static>(
        &self,
        fits: impl Fn(&T) -> bool,
        make: impl FnOnce() -> Result<T>,
    ) -> Result<Arc<T>> {
        let mut plans = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let found = plans.iter().filter_map(|p| p.clone().downcast::<T>().ok()).find(|p| fits(p));
        if let Some(plan) = found {
            return Ok(plan);
        }
        let plan = Arc::new(make()?);
        plans.push(plan.clone());
        Ok(plan)
    }
}

impl std::fmt::Debug for Plans {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Plans")
    }
}
