//! What two caches must share to exchange pages, and how a page lies in a snapshot.

use crate::cache::{KvCache, LayerKind, Side};
use crate::error::{Error, Result};
use crate::format::RowFormat;

/// Bytes that a stored page starts at a multiple of, counted from the start of the file: a cache line.
pub(super) const PAGE_ALIGN: u64 = 64;

/// Bytes that each piece of a page starts at a multiple of, counted from the start of the page.
const PIECE_ALIGN: u64 = 16;

/// The shape of a cache: all that must be equal for pages of one to fit another.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Geometry {
    /// KV heads.
    pub kv_heads: usize,
    /// Elements of a vector.
    pub head_dim: usize,
    /// Positions of a page.
    pub page_size: usize,
    /// Every layer.
    pub layers: Vec<LayerGeometry>,
}

/// The shape of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerGeometry {
    /// How keys are stored.
    pub key: RowFormat,
    /// How values are stored.
    pub value: RowFormat,
    /// Which positions it keeps.
    pub kind: LayerKind,
}

/// Layers whose pages are stored together: those of one kind that is not shared, in the order of first appearance.
pub(crate) struct GroupGeometry {
    pub window: Option<usize>,
    pub layers: Vec<usize>,
    pub layout: PageLayout,
}

/// How the positions of one page lie in a file: for each layer of the group the codes and scales of keys, then of values,
/// each as [kv_heads, positions, unit bytes].
#[derive(Clone, Debug)]
pub(crate) struct PageLayout {
    kv_heads: usize,
    page_size: usize,
    /// Bytes of a head and position in each piece.
    units: Vec<usize>,
}

impl Geometry {
    pub(crate) fn of(cache: &KvCache) -> Result<Self> {
        let config = cache.config();
        let layer = |l| {
            let (key, value) = (*cache.pool(l, Side::Key)?.row(), *cache.pool(l, Side::Value)?.row());
            Ok(LayerGeometry { key, value, kind: config.layer_kind(l) })
        };
        Ok(Geometry {
            kv_heads: config.kv_heads(),
            head_dim: config.head_dim(),
            page_size: config.positions_per_page(),
            layers: (0..config.layers()).map(layer).collect::<Result<_>>()?,
        })
    }

    pub(crate) fn groups(&self) -> Vec<GroupGeometry> {
        let mut groups: Vec<GroupGeometry> = vec![];
        for (index, layer) in self.layers.iter().enumerate() {
            let window = match layer.kind {
                LayerKind::Full => None,
                LayerKind::Window(window) => Some(window),
                LayerKind::Shared(_) => continue,
            };
            let group = groups.iter().position(|g| g.window == window).unwrap_or(groups.len());
            if group == groups.len() {
                let layout = PageLayout { kv_heads: self.kv_heads, page_size: self.page_size, units: vec![] };
                groups.push(GroupGeometry { window, layers: vec![], layout });
            }
            groups[group].layers.push(index);
            for row in [layer.key, layer.value] {
                let scales = row.scales_per_row() * row.scale_dtype().size();
                groups[group].layout.units.extend([row.row_bytes(), scales].into_iter().filter(|&n| n > 0));
            }
        }
        groups
    }

    /// Fails unless pages of `self`, a snapshot's geometry, fit a cache of this geometry.
    pub(crate) fn expect(&self, cache: &Geometry) -> Result<()> {
        let differ = |what: String, got: String, expected: String| Err(Error::Geometry { what, got, expected });
        let counts = [
            ("layers", self.layers.len(), cache.layers.len()),
            ("kv_heads", self.kv_heads, cache.kv_heads),
            ("head_dim", self.head_dim, cache.head_dim),
            ("page_size", self.page_size, cache.page_size),
        ];
        for (what, got, expected) in counts {
            if got != expected {
                return differ(what.to_owned(), got.to_string(), expected.to_string());
            }
        }
        for (l, (got, expected)) in self.layers.iter().zip(&cache.layers).enumerate() {
            for (side, got, expected) in [("key", got.key, expected.key), ("value", got.value, expected.value)] {
                let name =
                    |row: RowFormat| format!("{} with scale_factor_d512 {}", row.codec(), row.scale_factor_d512());
                if got != expected {
                    return differ(format!("{side} codec of layer {l}"), name(got), name(expected));
                }
            }
            if got.kind != expected.kind {
                return differ(format!("kind of layer {l}"), format!("{:?}", got.kind), format!("{:?}", expected.kind));
            }
        }
        Ok(())
    }
}

impl PageLayout {
    /// First byte, bytes, and bytes of a head and position of each piece of a page of so many positions.
    pub fn pieces(&self, positions: usize) -> impl Iterator<Item = (u64, u64, usize)> {
        let rows = (self.kv_heads * positions) as u64;
        let mut end = 0u64;
        self.units.iter().map(move |&unit| {
            let (start, bytes) = (end.next_multiple_of(PIECE_ALIGN), rows * unit as u64);
            end = start + bytes;
            (start, bytes, unit)
        })
    }

    /// Bytes of all pieces.
    pub fn payload(&self, positions: usize) -> u64 {
        self.pieces(positions).last().map_or(0, |(start, bytes, _)| start + bytes)
    }

    /// Bytes of a stored page: the pieces, zeros, and the checksum in the last 8 bytes.
    pub fn slot(&self, positions: usize) -> u64 {
        (self.payload(positions) + 8).next_multiple_of(PAGE_ALIGN)
    }

    pub fn kv_heads(&self) -> usize {
        self.kv_heads
    }

    pub fn page_size(&self) -> usize {
        self.page_size
    }
}
