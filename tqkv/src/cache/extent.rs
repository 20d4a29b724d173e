//! Which positions of a sequence are stored together.

use crate::format::CodecPair;
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

/// The first positions of a layer kept apart: in codecs of their own, never dropped, and seen by every later query whatever
/// the window (attention sinks; Xiao et al., arXiv:2309.17453).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sinks {
    /// How many; none if 0.
    pub positions: usize,
    /// How they are stored.
    pub codec: CodecPair,
}

/// The newest positions of a layer in codecs of their own, beside all: what a query looks at most is what it sees best. Each query
/// has its own newest positions, itself among them, so results do not depend on how a prompt was cut into chunks.
///
/// Rows are written once and never again. So a sequence that was truncated may hold fewer of its newest positions than these: up to
/// [`RECENT_SLACK`] truncated tokens make no difference, after more the next `positions` tokens read the rows that all positions have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recent {
    /// How many; none if 0.
    pub positions: usize,
    /// How they are stored.
    pub codec: CodecPair,
}

/// Tokens that can be truncated without a loss of what [`Recent`] keeps.
pub const RECENT_SLACK: usize = 64;

/// Which positions a layer stores in one place, in codecs of its own. A layer is a list of extents: its own positions first,
/// then those that it stores a second time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Extent {
    All,
    /// A window: the newest so many, and what else their pages hold.
    Newest(usize),
    /// Sinks: the first so many.
    First(usize),
    /// The newest so many of each query, and as many more as may be truncated.
    Recent(usize),
}

/// Positions that a layer stores a second time, and how.
pub(crate) struct Apart<C> {
    pub positions: usize,
    pub stored: C,
}

impl From<Sinks> for Apart<CodecPair> {
    fn from(Sinks { positions, codec }: Sinks) -> Self {
        Apart { positions, stored: codec }
    }
}

impl From<Recent> for Apart<CodecPair> {
    fn from(Recent { positions, codec }: Recent) -> Self {
        Apart { positions, stored: codec }
    }
}

impl Extent {
    /// The extents of a layer, each with how it is stored: none if it is shared.
    pub fn of<C>(
        kind: LayerKind,
        own: C,
        sinks: Option<impl Into<Apart<C>>>,
        recent: Option<impl Into<Apart<C>>>,
    ) -> Vec<(Extent, C)> {
        let extent = match kind {
            LayerKind::Full => Extent::All,
            LayerKind::Window(window) => Extent::Newest(window),
            LayerKind::Shared(_) => return vec![],
        };
        let apart = |extent: fn(usize) -> Extent, Apart { positions, stored }: Apart<C>| {
            (positions > 0).then(|| (extent(positions), stored))
        };
        let sinks = sinks.and_then(|s| apart(Extent::First, s.into()));
        let recent = recent.and_then(|r| apart(Extent::Recent, r.into()));
        [(extent, own)].into_iter().chain(sinks).chain(recent).collect()
    }

    /// The positions that a token sees of those that it wants to see here, where not all: a window's.
    fn window(self) -> Option<usize> {
        match self {
            Extent::Newest(window) => Some(window),
            Extent::Recent(positions) => Some(positions.saturating_add(RECENT_SLACK)),
            Extent::All | Extent::First(_) => None,
        }
    }

    /// Whether a sequence can go on without what it may have lost here: another extent has it too.
    pub fn is_spare(self) -> bool {
        matches!(self, Extent::Recent(_))
    }

    /// One past the newest position held of a sequence of so many.
    pub fn end(self, len: usize) -> usize {
        if let Extent::First(sinks) = self { len.min(sinks) } else { len }
    }

    /// Positions that it stores of a sequence of so many, ends of pages left out.
    pub fn held(self, len: usize) -> usize {
        self.end(len).min(self.window().unwrap_or(usize::MAX))
    }

    /// The oldest position that the next token of a sequence of so many looks back to.
    pub fn seen(self, len: usize) -> usize {
        Visible { causal: true, window: self.window() }.oldest(len).min(len)
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
