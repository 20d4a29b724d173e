//! What a query sees.

use std::ops::Range;

/// The positions that queries see: the one place of window arithmetic. Kernels repeat it (`visible` in each of them).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Visible {
    /// No position after the query's own.
    pub causal: bool,
    /// So many of the newest positions, the query's own among them.
    pub window: Option<usize>,
}

impl Visible {
    /// The oldest position that the query at `position` looks back to.
    pub fn oldest(self, position: usize) -> usize {
        self.window.map_or(0, |window| position.saturating_add(1).saturating_sub(window))
    }

    /// What the queries at positions `queries` (not empty) see together of the positions `held`: empty, or within `held`.
    pub fn range(self, queries: Range<usize>, held: Range<usize>) -> Range<usize> {
        let start = self.oldest(queries.start).max(held.start);
        let end = if self.causal { queries.end.min(held.end) } else { held.end };
        start..end.max(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_what_single_queries_see() {
        for causal in [true, false] {
            for window in [None, Some(1), Some(3), Some(100)] {
                let visible = Visible { causal, window };
                for first in 0..4 {
                    for len in first..12 {
                        for start in first..len {
                            for end in start + 1..=len {
                                let sees = |q: usize, p: usize| (!causal || p <= q) && window.is_none_or(|w| p + w > q);
                                let want: Vec<_> = (first..len).filter(|&p| (start..end).any(|q| sees(q, p))).collect();
                                let got: Vec<_> = visible.range(start..end, first..len).collect();
                                assert_eq!(got, want, "{visible:?} {start}..{end} of {first}..{len}");
                            }
                        }
                    }
                }
            }
        }
    }
}
