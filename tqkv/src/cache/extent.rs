//! Which positions of a sequence are stored together.

use crate::problem::Visible;
use std::ops::Range;

/// Which positions a layer keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerKind {
    /// All.
    Full,
    /// The newest so many that a query sees, its own among them; pages that no later query can see are freed.
    Window(usize),
    /// None of its own: it reads those of an earlier layer, which must not be shared itself.
    Shared(usize),
}

/// Which positions a layer stores in one place, in codecs of its own. A layer is a list of extents: its own positions first,
/// then those that it stores a second time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Extent {
    All,
    /// A window: the newest so many, and what else their pages hold.
    Newest(usize),
    /// Sinks: the first so many.
    First(usize),
}

impl Extent {
    /// The extents of a layer: none if it is shared.
    pub fn of(kind: LayerKind, sinks: usize) -> impl Iterator<Item = Extent> {
        let own = match kind {
            LayerKind::Full => Some(Extent::All),
            LayerKind::Window(window) => Some(Extent::Newest(window)),
            LayerKind::Shared(_) => None,
        };
        own.into_iter().chain((own.is_some() && sinks > 0).then_some(Extent::First(sinks)))
    }

    /// One past the newest position held of a sequence of so many.
    pub fn end(self, len: usize) -> usize {
        if let Extent::First(sinks) = self { len.min(sinks) } else { len }
    }

    /// The oldest position that the next token of a sequence of so many looks back to.
    pub fn seen(self, len: usize) -> usize {
        let window = if let Extent::Newest(window) = self { Some(window) } else { None };
        Visible { causal: true, window }.oldest(len).min(len)
    }

    /// Whether the next token of a sequence of so many sees none of them: then none needs to be there.
    pub fn sees_nothing(self, len: usize) -> bool {
        self.seen(len) >= self.end(len)
    }

    /// How many of the newest `new` positions of a sequence it holds, counted from the oldest of them.
    pub fn of_new(self, len: usize, new: usize) -> usize {
        self.end(len).saturating_sub(len - new)
    }

    /// The pages of positions `first..len`, as far as they are held.
    pub fn pages(self, page_size: usize, first: usize, len: usize) -> Range<usize> {
        let end = self.end(len);
        if first < end { first / page_size..end.div_ceil(page_size) } else { 0..0 }
    }

    /// Positions of a page where a page of all positions has `page_size`: a sequence's sinks fill one, if they fit. Even, so
    /// that pages are whole words.
    pub fn page_size(self, page_size: usize) -> usize {
        match self {
            Extent::First(sinks) => sinks.min(page_size).checked_next_multiple_of(2).unwrap_or(page_size),
            _ => page_size,
        }
    }
}
