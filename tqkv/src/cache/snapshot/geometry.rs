//! What two caches must share to exchange pages, and how a page lies in a snapshot.

use crate::cache::extent::{Apart, Extent, LayerKind};
use crate::cache::state::{KvCache, Side};
use crate::error::{Error, Result};
use crate::format::RowFormat;
use std::ops::Range;

/// Bytes that a stored page starts at a multiple of, counted from the start of the file: a cache line.
pub(super) const PAGE_ALIGN: u64 = 64;

/// Bytes that each piece of a page starts at a multiple of, counted from the start of the page.
const PIECE_ALIGN: u64 = 16;

/// The shape of a cache: all that must be equal for pages of one to fit another.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Geometry {
    /// Positions of a page.
    pub page_size: usize,
    /// Every layer.
    pub layers: Vec<LayerGeometry>,
}

/// The shape of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct LayerGeometry {
    /// KV heads; the elements of their vectors are those of the rows.
    pub kv_heads: usize,
    /// How keys are stored.
    pub key: RowFormat,
    /// How values are stored.
    pub value: RowFormat,
    /// Which positions it keeps.
    pub kind: LayerKind,
    /// Its sinks, if it holds any.
    pub sinks: Option<ExtentGeometry>,
    /// Its newest positions, if it stores them apart.
    pub recent: Option<ExtentGeometry>,
    /// The digest of its keys' shift and scale by channel, if they have any.
    pub channels: Option<u64>,
}

/// The shape of the positions that a layer stores a second time: its sinks, or its newest.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ExtentGeometry {
    /// How many, at least 1.
    pub positions: usize,
    /// How their keys are stored.
    pub key: RowFormat,
    /// How their values are stored.
    pub value: RowFormat,
}

impl From<ExtentGeometry> for Apart<[RowFormat; 2]> {
    fn from(ExtentGeometry { positions, key, value }: ExtentGeometry) -> Self {
        Apart { positions, stored: [key, value] }
    }
}

/// Layers, or sinks, whose pages are stored together: those that hold the same positions, in the order of first appearance.
pub(crate) struct GroupGeometry {
    pub extent: Extent,
    pub layers: Vec<usize>,
    pub layout: PageLayout,
}

/// How the positions of one page lie in a file: for each layer of the group the codes and scales of keys, then of values,
/// each as [kv_heads, positions, unit bytes].
#[derive(Clone, Debug)]
pub(crate) struct PageLayout {
    page_size: usize,
    /// KV heads, and bytes of a head and position, in each piece.
    units: Vec<(usize, usize)>,
}

/// One of the arrays that a stored page consists of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Piece {
    /// First byte within the page.
    pub start: u64,
    pub bytes: u64,
    pub kv_heads: usize,
}

impl Geometry {
    pub(crate) fn of(cache: &KvCache) -> Result<Self> {
        let config = cache.config();
        let layer = |l| {
            let (key, value) = (*cache.pool(l, Side::Key)?.row(), *cache.pool(l, Side::Value)?.row());
            let pools = cache.sink_pool(l, Side::Key)?.zip(cache.sink_pool(l, Side::Value)?);
            let sinks = config.layer_sinks(l).zip(pools).map(|(sinks, (key, value))| ExtentGeometry {
                positions: sinks.positions,
                key: *key.row(),
                value: *value.row(),
            });
            let pools = cache.recent_pool(l, Side::Key)?.zip(cache.recent_pool(l, Side::Value)?);
            let recent = config.layer_recent(l).zip(pools).map(|(recent, (key, value))| ExtentGeometry {
                positions: recent.positions,
                key: *key.row(),
                value: *value.row(),
            });
            let kv_heads = cache.pool(l, Side::Key)?.kv_heads();
            let channels = config.layer_channels(l).map(|channels| channels.digest());
            Ok(LayerGeometry { kv_heads, key, value, kind: config.layer_kind(l), sinks, recent, channels })
        };
        Ok(Geometry {
            page_size: config.positions_per_page(),
            layers: (0..config.layers()).map(layer).collect::<Result<_>>()?,
        })
    }

    pub(crate) fn groups(&self) -> Vec<GroupGeometry> {
        let mut groups: Vec<GroupGeometry> = vec![];
        for (index, layer) in self.layers.iter().enumerate() {
            for (extent, rows) in Extent::of(layer.kind, [layer.key, layer.value], layer.sinks, layer.recent) {
                let group = groups.iter().position(|g| g.extent == extent).unwrap_or(groups.len());
                if group == groups.len() {
                    let page_size = extent.page_size(self.page_size);
                    let layout = PageLayout { page_size, units: vec![] };
                    groups.push(GroupGeometry { extent, layers: vec![], layout });
                }
                groups[group].layers.push(index);
                for row in rows {
                    let scales = row.scale_bytes();
                    let bytes = [row.row_bytes(), scales].into_iter().filter(|&n| n > 0);
                    groups[group].layout.units.extend(bytes.map(|n| (layer.kv_heads, n)));
                }
            }
        }
        groups
    }

    /// Fails unless pages of `self`, a snapshot's geometry, fit a cache of this geometry.
    pub(crate) fn expect(&self, cache: &Geometry) -> Result<()> {
        let differ = |what: String, got: String, expected: String| Err(Error::Geometry { what, got, expected });
        let counts =
            [("layers", self.layers.len(), cache.layers.len()), ("page_size", self.page_size, cache.page_size)];
        for (what, got, expected) in counts {
            if got != expected {
                return differ(what.to_owned(), got.to_string(), expected.to_string());
            }
        }
        let name = |row: RowFormat| format!("{} with scale_factor_d512 {}", row.codec(), row.scale_factor_d512());
        let apart = |apart: Option<ExtentGeometry>| match apart {
            Some(s) => format!("{} positions, keys in {}, values in {}", s.positions, name(s.key), name(s.value)),
            None => "none".to_owned(),
        };
        for (l, (got, expected)) in self.layers.iter().zip(&cache.layers).enumerate() {
            let dims = |layer: &LayerGeometry| [layer.kv_heads, layer.key.head_dim(), layer.value.head_dim()];
            let names = ["kv_heads", "head_dim of the keys", "head_dim of the values"];
            for (what, (got, expected)) in names.into_iter().zip(dims(got).into_iter().zip(dims(expected))) {
                if got != expected {
                    return differ(format!("{what} of layer {l}"), got.to_string(), expected.to_string());
                }
            }
            for (side, got, expected) in [("key", got.key, expected.key), ("value", got.value, expected.value)] {
                if got != expected {
                    return differ(format!("{side} codec of layer {l}"), name(got), name(expected));
                }
            }
            if got.kind != expected.kind {
                return differ(format!("kind of layer {l}"), format!("{:?}", got.kind), format!("{:?}", expected.kind));
            }
            if got.recent != expected.recent {
                return differ(format!("newest positions of layer {l}"), apart(got.recent), apart(expected.recent));
            }
            if got.channels != expected.channels {
                let digest = |digest: Option<u64>| digest.map_or("none".to_owned(), |d| format!("digest {d:016x}"));
                return differ(format!("channels of layer {l}"), digest(got.channels), digest(expected.channels));
            }
            if got.sinks != expected.sinks {
                return differ(format!("sinks of layer {l}"), apart(got.sinks), apart(expected.sinks));
            }
        }
        Ok(())
    }
}

impl GroupGeometry {
    /// Pages of a sequence of so many positions, dropped ones counted.
    pub fn pages(&self, len: usize) -> usize {
        self.extent.end(len).div_ceil(self.layout.page_size)
    }

    /// The pages that are stored of a sequence of so many positions that holds those from `first` on: none where its next
    /// token sees nothing.
    pub fn stored(&self, first: usize, len: usize) -> Range<usize> {
        let end = self.pages(len);
        match () {
            () if self.extent.sees_nothing(len) => end..end,
            // Of a page that is held in part only the end is a sequence's own.
            () if self.extent.is_spare() => first.div_ceil(self.layout.page_size).min(end)..end,
            () => first / self.layout.page_size..end,
        }
    }

    /// How many positions page `page` of a sequence of so many positions holds.
    pub fn positions(&self, len: usize, page: usize) -> usize {
        (self.extent.end(len) - page * self.layout.page_size).min(self.layout.page_size)
    }
}

impl PageLayout {
    /// The pieces of a page of so many positions.
    pub fn pieces(&self, positions: usize) -> impl Iterator<Item = Piece> {
        let mut end = 0u64;
        self.units.iter().map(move |&(kv_heads, unit)| {
            let (start, bytes) = (end.next_multiple_of(PIECE_ALIGN), (kv_heads * positions) as u64 * unit as u64);
            end = start + bytes;
            Piece { start, bytes, kv_heads }
        })
    }

    /// Bytes of all pieces.
    pub fn payload(&self, positions: usize) -> u64 {
        self.pieces(positions).last().map_or(0, |piece| piece.start + piece.bytes)
    }

    /// Bytes of a stored page: the pieces, zeros, and the checksum in the last 8 bytes.
    pub fn slot(&self, positions: usize) -> u64 {
        (self.payload(positions) + 8).next_multiple_of(PAGE_ALIGN)
    }

    pub fn page_size(&self) -> usize {
        self.page_size
    }
}
