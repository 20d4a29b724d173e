//! Where the rows of a pool lie.

use crate::error::{Error, Result};

/// Bytes from a page, a head and a row (the vector of one position) of a pool to the next. The row of a page, a head and a slot
/// lies `page · self.page + head · self.head + slot · self.row` bytes after the first one.
///
/// ```
/// use tqkv::{Codec, format::RowFormat, ops::Strides};
/// let row = RowFormat::new(Codec::tq(4), 128)?;
/// // Pages of 16 positions of 8 heads: u8 [pages, page_size, kv_heads, bytes], a row's scale after its codes.
/// let bytes = row.bytes();
/// let token_major = Strides { page: 16 * 8 * bytes, head: bytes, row: 8 * bytes };
/// assert_ne!(token_major, Strides::dense(8, 16, row.row_bytes()));
/// # Ok::<(), tqkv::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Strides {
    /// From page to page.
    pub page: usize,
    /// From KV head to KV head.
    pub head: usize,
    /// From position to position.
    pub row: usize,
}

impl Strides {
    /// Of u8 \[pages, kv_heads, page_size, bytes\] without gaps.
    pub fn dense(kv_heads: usize, page_size: usize, bytes: usize) -> Self {
        Strides { page: kv_heads * page_size * bytes, head: page_size * bytes, row: bytes }
    }

    /// Where a row starts.
    #[inline(always)]
    pub(crate) fn at(&self, page: usize, head: usize, slot: usize) -> usize {
        page * self.page + head * self.head + slot * self.row
    }
}

/// Rows of `bytes` bytes that are strided along up to three axes, the longest stride first.
#[derive(Clone, Debug)]
pub(super) struct Rows {
    /// Steps and stride of each axis that has more than one step.
    axes: Vec<(usize, usize)>,
    bytes: usize,
}

impl Rows {
    /// # Errors
    /// [`Error::SizeOverflow`], and [`Error::Mismatch`] if rows would overlap, or axes interleave.
    pub fn new(what: &'static str, [pages, heads, slots]: [usize; 3], strides: Strides, bytes: usize) -> Result<Self> {
        let mut axes = vec![(pages, strides.page), (heads, strides.head), (slots, strides.row)];
        axes.retain(|(steps, _)| *steps > 1);
        axes.sort_by_key(|(_, stride)| std::cmp::Reverse(*stride));
        let overflow = Error::SizeOverflow { what, limit: "isize" };
        let mut extent = bytes;
        for &(steps, stride) in axes.iter().rev() {
            if stride < extent {
                let expected = format!("at least {extent}, as what it steps over takes so many bytes");
                return Err(Error::Mismatch { what, got: stride, expected });
            }
            let all = stride.checked_mul(steps - 1).and_then(|n| n.checked_add(extent));
            extent = all.filter(|&n| n <= isize::MAX as usize).ok_or(overflow.clone())?;
        }
        Ok(Rows { axes, bytes })
    }

    /// Bytes from the first row's start to the last row's end.
    pub fn extent(&self) -> usize {
        extent(&self.axes, self.bytes)
    }

    /// Whether some row has a byte in common with a row of others, which start `ahead` bytes after these. May say so of rows that
    /// are strided otherwise and merely lie between each other.
    pub fn meet(&self, others: &Rows, ahead: isize) -> bool {
        meet((&self.axes, self.bytes), (&others.axes, others.bytes), ahead)
    }
}

/// Bytes from the first row's start to the last row's end.
fn extent(axes: &[(usize, usize)], bytes: usize) -> usize {
    axes.iter().map(|(steps, stride)| (steps - 1) * stride).sum::<usize>() + bytes
}

type Axes<'a> = (&'a [(usize, usize)], usize);

fn meet(a: Axes, b: Axes, ahead: isize) -> bool {
    if ahead >= extent(a.0, a.1) as isize || -ahead >= extent(b.0, b.1) as isize {
        return false;
    }
    match (a.0.split_first(), b.0.split_first()) {
        // What is within a step is shorter than the stride: a step meets at most two steps of the others.
        (Some((&(_, stride), inner_a)), Some((&(_, other), inner_b))) if stride == other => {
            let (stride, inner_a, inner_b) = (stride as isize, (inner_a, a.1), (inner_b, b.1));
            let rest = ahead.rem_euclid(stride);
            meet(inner_a, inner_b, rest) || meet(inner_a, inner_b, rest - stride)
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every byte of all rows.
    fn bytes(counts: [usize; 3], strides: Strides, bytes: usize, start: usize) -> std::collections::BTreeSet<usize> {
        let [pages, heads, slots] = counts;
        let at = |i: usize| strides.at(i / (heads * slots), i / slots % heads, i % slots) + start;
        (0..pages * heads * slots).flat_map(|i| at(i)..at(i) + bytes).collect()
    }

    #[test]
    fn rows_meet_where_they_share_a_byte() {
        let counts = [3, 2, 4];
        // Dense, by position, with gaps, a gap after each row.
        let layouts = [(96, 48, 12), (96, 12, 24), (200, 48, 12), (200, 80, 20)];
        let mut met = [0, 0];
        for (page, head, row) in layouts {
            let strides = Strides { page, head, row };
            for (a, b) in [(12, 12), (8, 4), (4, 8), (6, 6)] {
                let [x, y] = [a, b].map(|n| Rows::new("rows", counts, strides, n).unwrap());
                for ahead in 0..2 * page {
                    let (one, two) = (bytes(counts, strides, a, 0), bytes(counts, strides, b, ahead));
                    let share = !one.is_disjoint(&two);
                    assert!(x.meet(&y, ahead as isize) >= share, "{strides:?} {a} {b} {ahead}");
                    assert_eq!(x.meet(&y, ahead as isize), y.meet(&x, -(ahead as isize)));
                    if !share && ahead < page {
                        met[x.meet(&y, ahead as isize) as usize] += 1;
                    }
                }
                assert_eq!(x.extent(), 1 + bytes(counts, strides, a, 0).last().unwrap());
            }
        }
        // Of those that lie between each other hardly any is taken for one that meets.
        assert!(met[0] > 20 * met[1], "{met:?}");
    }

    #[test]
    fn rows_that_overlap_are_refused() {
        let strides = |page, head, row| Strides { page, head, row };
        let new = |s| Rows::new("stride", [3, 2, 4], s, 12).map(|rows| rows.extent());
        assert_eq!(new(strides(96, 48, 12)), Ok(288));
        assert_eq!(new(strides(12, 36, 72)), Ok(288), "pages within heads within rows");
        for (bad, got, least) in
            [(strides(96, 48, 11), 11, 12), (strides(96, 47, 12), 47, 48), (strides(95, 48, 12), 95, 96)]
        {
            let expected = format!("at least {least}, as what it steps over takes so many bytes");
            assert_eq!(new(bad), Err(Error::Mismatch { what: "stride", got, expected }));
        }
        assert_eq!(new(strides(usize::MAX / 2, 48, 12)), Err(Error::SizeOverflow { what: "stride", limit: "isize" }));
        assert_eq!(Rows::new("stride", [1, 1, 1], strides(0, 0, 0), 12).unwrap().extent(), 12, "one row has no stride");
    }
}
