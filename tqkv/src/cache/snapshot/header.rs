//! The header of a snapshot: what it holds and where. `docs/snapshot.md` describes every byte.

use super::geometry::{ExtentGeometry, Geometry, GroupGeometry, LayerGeometry};
use super::source::Source;
use crate::cache::extent::LayerKind;
use crate::error::{Error, Result, SnapshotPart};
use crate::format::{Codec, FORMAT_VERSION, RowFormat};
use std::io::Read;
use xxhash_rust::xxh3::xxh3_64;

/// The first bytes of every snapshot. As in PNG, they show when a file was taken for text on its way.
pub(super) const MAGIC: [u8; 8] = *b"\x89tqkv\r\n\x1a";

/// The version of the snapshot's own layout; that of the vectors in it is [`FORMAT_VERSION`].
pub const SNAPSHOT_VERSION: u32 = 4;

/// The longest model fingerprint, in bytes.
pub const MAX_FINGERPRINT: usize = 4096;

/// The longest note, in bytes.
pub const MAX_NOTE: usize = 1 << 24;

/// Bytes before the fingerprint.
const FIXED: usize = 64;

/// The header's size is a multiple of this, so that pages begin on a page of virtual memory.
const HEADER_ALIGN: usize = 4096;

/// No header is larger: 16 million page references and more.
const MAX_HEADER: usize = 1 << 28;

/// Bytes of a layer.
const LAYER: usize = 80;

/// More layers than any model has.
const MAX_LAYERS: usize = 4096;

/// What the caller says of a snapshot. `b"a model"` or `"a model"` alone is a label without a note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label<'a> {
    /// Which model the vectors belong to, at most [`MAX_FINGERPRINT`] bytes: say, a hash of its weights. Whoever loads must
    /// give the same.
    pub model: &'a [u8],
    /// Anything, at most [`MAX_NOTE`] bytes: say, the tokens. [`Snapshot::note`] gives it back.
    pub note: &'a [u8],
}

impl<'a> From<&'a [u8]> for Label<'a> {
    fn from(model: &'a [u8]) -> Self {
        Label { model, note: &[] }
    }
}

impl<'a, const N: usize> From<&'a [u8; N]> for Label<'a> {
    fn from(model: &'a [u8; N]) -> Self {
        Label { model, note: &[] }
    }
}

impl<'a> From<&'a str> for Label<'a> {
    fn from(model: &'a str) -> Self {
        Label { model: model.as_bytes(), note: &[] }
    }
}

/// What a snapshot holds: the part before its pages.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    pub(super) fingerprint: Vec<u8>,
    pub(super) note: Vec<u8>,
    pub(super) geometry: Geometry,
    /// Each page's group and its stored positions.
    pub(super) pages: Vec<(u32, u32)>,
    pub(super) sequences: Vec<Saved>,
    /// Where the pages begin.
    pub(super) header_bytes: u64,
    pub(super) file_bytes: u64,
}

/// A sequence of a snapshot.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Saved {
    pub len: usize,
    /// By group.
    pub held: Vec<SavedPages>,
}

/// A sequence's pages of one group.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct SavedPages {
    /// Pages at the front that are not stored.
    pub dropped: usize,
    /// The numbers of all others within the snapshot.
    pub pages: Vec<u32>,
}

impl Snapshot {
    /// Sizes and order as the format has them, checked as a whole.
    pub(super) fn new(label: Label, geometry: Geometry, pages: Vec<(u32, u32)>, sequences: Vec<Saved>) -> Result<Self> {
        at_most("bytes of the fingerprint", label.model.len() as u64, MAX_FINGERPRINT as u64)?;
        at_most("bytes of the note", label.note.len() as u64, MAX_NOTE as u64)?;
        let (fingerprint, note) = (label.model.to_vec(), label.note.to_vec());
        let references: usize = sequences.iter().flat_map(|s| &s.held).map(|h| 8 + 4 * h.pages.len()).sum();
        let bytes = FIXED
            + fingerprint.len().next_multiple_of(8)
            + note.len().next_multiple_of(8)
            + LAYER * geometry.layers.len()
            + 8 * pages.len()
            + 8 * sequences.len()
            + references
            + 8;
        at_most("header size", bytes as u64, MAX_HEADER as u64)?;
        let header_bytes = bytes.next_multiple_of(HEADER_ALIGN) as u64;
        let mut snapshot = Snapshot { fingerprint, note, geometry, pages, sequences, header_bytes, file_bytes: 0 };
        snapshot.check()?;
        let end = snapshot.slots().last().map_or(header_bytes, |(_, at, bytes)| at.saturating_add(bytes));
        snapshot.file_bytes = end.saturating_add(8);
        Ok(snapshot)
    }

    /// The rules that counts must keep to each other.
    fn check(&self) -> Result<()> {
        let Geometry { page_size, layers } = &self.geometry;
        let kv_heads = layers.iter().map(|layer| ("kv_heads", layer.kv_heads));
        if let Some((what, _)) =
            [("layers", layers.len()), ("page_size", *page_size)].into_iter().chain(kv_heads).find(|c| c.1 == 0)
        {
            return Err(Error::Zero { what });
        }
        at_most("layers", layers.len() as u64, MAX_LAYERS as u64)?;
        if !page_size.is_multiple_of(8) {
            return absurd("page_size", *page_size, "a multiple of 8");
        }
        for (l, layer) in layers.iter().enumerate() {
            match layer.kind {
                LayerKind::Window(0) => return Err(Error::Zero { what: "window" }),
                LayerKind::Shared(with) if with >= l || matches!(layers[with].kind, LayerKind::Shared(_)) => {
                    return absurd("shared layer", with, "a layer before it that holds positions of its own");
                }
                _ => {}
            }
            // As `PagePool` has it; below, sums over layers then fit 64 bits.
            let apart = layer.sinks.iter().chain(&layer.recent).flat_map(|apart| [apart.key, apart.value]);
            let rows = [layer.key, layer.value].into_iter().chain(apart);
            let row = rows.map(|row| row.bytes()).max().unwrap_or(0) as u64;
            let page = (layer.kv_heads as u64).checked_mul(*page_size as u64).and_then(|n| n.checked_mul(row));
            at_most("bytes of a page", page.unwrap_or(u64::MAX), u32::MAX as u64)?;
        }
        let groups = self.geometry.groups();
        for &(group, positions) in &self.pages {
            let Some(group) = groups.get(group as usize) else {
                return absurd("group of a page", group as usize, &format!("less than {}", groups.len()));
            };
            if positions == 0 || positions as usize > group.layout.page_size() {
                return absurd(
                    "positions of a page",
                    positions as usize,
                    &format!("1 to {}", group.layout.page_size()),
                );
            }
        }
        // A page holds as many positions as the sequence that fills it most has there.
        let mut filled = vec![0; self.pages.len()];
        for sequence in &self.sequences {
            at_most("length of a sequence", sequence.len as u64, u32::MAX as u64)?;
            for (g, (group, SavedPages { dropped, pages })) in groups.iter().zip(&sequence.held).enumerate() {
                check_held(sequence.len, group, *dropped, pages.len())?;
                for (i, &page) in pages.iter().enumerate() {
                    match self.pages.get(page as usize) {
                        Some(&(of, _)) if of as usize == g => {}
                        _ => return absurd("page of a sequence", page as usize, "a page of its group"),
                    }
                    filled[page as usize] = group.positions(sequence.len, dropped + i).max(filled[page as usize]);
                }
            }
        }
        for (&(_, positions), filled) in self.pages.iter().zip(filled) {
            if positions as usize != filled {
                return absurd("positions of a page", positions as usize, &format!("{filled}, as sequences hold"));
            }
        }
        Ok(())
    }

    /// Group, first byte and bytes of each stored page.
    pub(super) fn slots(&self) -> impl Iterator<Item = (usize, u64, u64)> {
        let layouts: Vec<_> = self.geometry.groups().into_iter().map(|g| g.layout).collect();
        let whole: Vec<_> = layouts.iter().map(|l| l.slot(l.page_size())).collect();
        let mut at = self.header_bytes;
        self.pages.iter().map(move |&(group, positions)| {
            let (group, positions) = (group as usize, positions as usize);
            let bytes =
                if positions == layouts[group].page_size() { whole[group] } else { layouts[group].slot(positions) };
            let start = at;
            // Saturates for absurd counts, which then contradict the file's size.
            at = at.saturating_add(bytes);
            (group, start, bytes)
        })
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let Geometry { page_size, layers } = &self.geometry;
        let mut out = Vec::with_capacity(self.header_bytes as usize);
        out.extend(MAGIC);
        out.extend(SNAPSHOT_VERSION.to_le_bytes());
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend(self.file_bytes.to_le_bytes());
        out.extend(self.header_bytes.to_le_bytes());
        let counts = [layers.len(), 0, 0, *page_size];
        let more = [self.fingerprint.len(), self.sequences.len(), self.pages.len(), self.note.len()];
        counts.iter().chain(&more).for_each(|&n| out.extend((n as u32).to_le_bytes()));
        for text in [&self.fingerprint, &self.note] {
            out.extend(text);
            out.resize(out.len().next_multiple_of(8), 0);
        }
        for layer in layers {
            encode_heads(layer, &mut out);
            encode_layer(layer, &mut out);
            encode_apart(layer.recent, &mut out);
            // Nothing has this digest, or a layer without channels would read as one with them.
            out.extend(layer.channels.unwrap_or(0).to_le_bytes());
        }
        for (group, positions) in &self.pages {
            out.extend(group.to_le_bytes());
            out.extend(positions.to_le_bytes());
        }
        for sequence in &self.sequences {
            out.extend((sequence.len as u64).to_le_bytes());
            for held in &sequence.held {
                out.extend((held.dropped as u32).to_le_bytes());
                out.extend((held.pages.len() as u32).to_le_bytes());
                held.pages.iter().for_each(|page| out.extend(page.to_le_bytes()));
            }
        }
        out.resize(self.header_bytes as usize - 8, 0);
        out.extend(xxh3_64(&out).to_le_bytes());
        out
    }

    /// Reads and checks a header. `limit` is the size of the file, if it is known. No more memory is asked for than a small
    /// multiple of the bytes that were there to read.
    pub(super) fn decode<R: Read>(source: &mut Source<R>, limit: Option<u64>) -> Result<(Self, u64)> {
        let mut bytes = source.read_up_to(FIXED as u64)?;
        let magic = &bytes[..bytes.len().min(MAGIC.len())];
        if magic != &MAGIC[..magic.len()] {
            return Err(Error::NotASnapshot { got: magic.to_vec() });
        }
        if bytes.len() < FIXED {
            return Err(Error::Truncated { got: bytes.len() as u64, expected: FIXED as u64 });
        }
        let mut fields = Fields(&bytes[MAGIC.len()..]);
        let versions = [("snapshot version", SNAPSHOT_VERSION), ("format version of the vectors", FORMAT_VERSION)];
        for (what, expected) in versions {
            let got = fields.u32()?;
            if got != expected {
                return Err(Error::Version { what, got, expected });
            }
        }
        let (file_bytes, header_bytes) = (fields.u64()?, fields.u64()?);
        at_most("header size", header_bytes, MAX_HEADER as u64)?;
        if header_bytes < HEADER_ALIGN as u64 || !header_bytes.is_multiple_of(HEADER_ALIGN as u64) {
            return absurd("header size", header_bytes as usize, "a positive multiple of 4096");
        }
        if let Some(limit) = limit.filter(|&n| n < header_bytes) {
            return Err(Error::Truncated { got: limit, expected: header_bytes });
        }
        bytes.extend(source.read_up_to(header_bytes - FIXED as u64)?);
        if (bytes.len() as u64) < header_bytes {
            return Err(Error::Truncated { got: bytes.len() as u64, expected: header_bytes });
        }
        let (body, stored) = bytes.split_at(bytes.len() - 8);
        let (got, expected) = (xxh3_64(body), Fields(stored).u64()?);
        if got != expected {
            return Err(Error::Checksum { part: SnapshotPart::Header, got, expected });
        }
        let snapshot = Self::parse(&body[32..])?;
        for (what, stored, computed) in
            [("header size", header_bytes, snapshot.header_bytes), ("file size", file_bytes, snapshot.file_bytes)]
        {
            if stored != computed {
                return Err(Error::Absurd { what, got: stored, expected: format!("{computed}, as its counts say") });
            }
        }
        match limit {
            Some(got) if got < file_bytes => Err(Error::Truncated { got, expected: file_bytes }),
            Some(got) if got > file_bytes => Err(Error::TrailingBytes { got, expected: file_bytes }),
            _ => Ok((snapshot, expected)),
        }
    }

    /// What follows the sizes, up to the header's checksum.
    fn parse(bytes: &[u8]) -> Result<Self> {
        let mut fields = Fields(bytes);
        let mut counts = [0; 8];
        for n in &mut counts {
            *n = fields.u32()? as usize;
        }
        let [layers, zero, zeros, page_size, fingerprint, sequences, pages, note] = counts;
        if let Some(got) = [zero, zeros].into_iter().find(|&n| n != 0) {
            return absurd("space between counts", got, "0");
        }
        at_most("bytes of the fingerprint", fingerprint as u64, MAX_FINGERPRINT as u64)?;
        at_most("bytes of the note", note as u64, MAX_NOTE as u64)?;
        // Grouping them takes a time that grows with the square of their number.
        at_most("layers", layers as u64, MAX_LAYERS as u64)?;
        let mut text = |n: usize| Ok(&fields.bytes(n.next_multiple_of(8))?[..n]);
        let label = Label { model: text(fingerprint)?, note: text(note)? };
        // Each count is held against the bytes that are left before anything of its size is made.
        let layers = fields.entries("layers", layers, LAYER)?.map(decode_layer);
        let layers = layers.collect::<Result<Vec<_>>>()?;
        let geometry = Geometry { page_size, layers };
        let pages = fields.entries("pages", pages, 8)?.map(|mut f| Ok((f.u32()?, f.u32()?)));
        let pages = pages.collect::<Result<Vec<_>>>()?;
        let groups = geometry.groups().len();
        fields.expect("sequences", sequences, 8 + 8 * groups)?;
        let mut saved = Vec::with_capacity(sequences);
        for _ in 0..sequences {
            let len = usize::try_from(fields.u64()?).unwrap_or(usize::MAX);
            let mut held = Vec::with_capacity(groups);
            for _ in 0..groups {
                let (dropped, count) = (fields.u32()? as usize, fields.u32()? as usize);
                let pages = fields.entries("pages of a sequence", count, 4)?.map(|mut f| f.u32());
                held.push(SavedPages { dropped, pages: pages.collect::<Result<_>>()? });
            }
            saved.push(Saved { len, held });
        }
        Snapshot::new(label, geometry, pages, saved)
    }
}

/// Held pages reach to the end, and begin where the next token can look back to, at the latest.
fn check_held(len: usize, group: &GroupGeometry, dropped: usize, pages: usize) -> Result<()> {
    let unseen = if group.extent.sees_nothing(len) || group.extent.is_spare() {
        group.pages(len)
    } else {
        group.extent.seen(len) / group.layout.page_size()
    };
    at_most("dropped pages of a sequence", dropped as u64, unseen as u64)?;
    let expected = group.pages(len) - dropped;
    if pages != expected {
        return absurd("pages of a sequence", pages, &expected.to_string());
    }
    Ok(())
}

/// The heads of a layer in 16 bytes; the prefix store hashes them too where layers differ.
pub(crate) fn encode_heads(layer: &LayerGeometry, out: &mut Vec<u8>) {
    let dims = [layer.kv_heads, layer.key.head_dim(), layer.value.head_dim(), 0];
    dims.iter().for_each(|&n| out.extend((n as u32).to_le_bytes()));
}

/// Codecs, kind and sinks of a layer in 40 bytes; the prefix store hashes them too.
pub(crate) fn encode_layer(layer: &LayerGeometry, out: &mut Vec<u8>) {
    let codec = |row: RowFormat| row.codec().wire();
    out.extend(codec(layer.key));
    out.extend(codec(layer.value));
    let (kind, argument) = match layer.kind {
        LayerKind::Full => (0u32, 0),
        LayerKind::Window(window) => (1, window),
        LayerKind::Shared(with) => (2, with),
    };
    out.extend(kind.to_le_bytes());
    out.extend((argument as u64).to_le_bytes());
    out.extend(layer.key.scale_factor_d512().to_le_bytes());
    out.extend(layer.value.scale_factor_d512().to_le_bytes());
    encode_apart(layer.sinks, out);
}

/// Positions that a layer stores a second time in 16 bytes, zeros without.
pub(crate) fn encode_apart(apart: Option<ExtentGeometry>, out: &mut Vec<u8>) {
    let Some(ExtentGeometry { positions, key, value }) = apart else { return out.extend([0; 16]) };
    out.extend((positions as u32).to_le_bytes());
    out.extend(key.codec().wire());
    out.extend(value.codec().wire());
    out.extend(key.scale_factor_d512().to_le_bytes());
    out.extend(value.scale_factor_d512().to_le_bytes());
}

fn decode_layer(mut fields: Fields) -> Result<LayerGeometry> {
    let mut dims = [0; 4];
    for n in &mut dims {
        *n = fields.u32()? as usize;
    }
    let [kv_heads, key_dim, value_dim, zero] = dims;
    if zero != 0 {
        return absurd("space in a layer", zero, "0");
    }
    let (key, value) = (fields.codec()?, fields.codec()?);
    let (kind, argument) = (fields.u32()?, fields.u64()?);
    let argument = usize::try_from(argument).unwrap_or(usize::MAX);
    let kind = match kind {
        0 => LayerKind::Full,
        1 => LayerKind::Window(argument),
        2 => LayerKind::Shared(argument),
        _ => return absurd("kind of a layer", kind as usize, "0 to 2"),
    };
    let row = |codec, dim, factor| RowFormat::new(codec, dim)?.with_scale_factor_d512(f32::from_bits(factor));
    let (key, value) = (row(key, key_dim, fields.u32()?)?, row(value, value_dim, fields.u32()?)?);
    let mut apart = |what: &'static str| {
        let mut fields = Fields(fields.bytes(16)?);
        Ok(match fields.u32()? as usize {
            0 if fields.0.iter().all(|&b| b == 0) => None,
            0 => return absurd(what, 0, "at least 1 where they have codecs"),
            positions if matches!(kind, LayerKind::Shared(_)) => return absurd(what, positions, "0 in a shared layer"),
            positions => {
                let (key, value) = (fields.codec()?, fields.codec()?);
                let key = row(key, key_dim, fields.u32()?)?;
                Some(ExtentGeometry { positions, key, value: row(value, value_dim, fields.u32()?)? })
            }
        })
    };
    let (sinks, recent) = (apart("sinks of a layer")?, apart("newest positions of a layer")?);
    let channels = Some(fields.u64()?).filter(|&digest| digest != 0);
    if channels.is_some() && matches!(kind, LayerKind::Shared(_)) {
        return absurd("channels of a shared layer", 1, "none");
    }
    Ok(LayerGeometry { kv_heads, key, value, kind, sinks, recent, channels })
}

fn at_most(what: &'static str, got: u64, limit: u64) -> Result<()> {
    if got > limit {
        return Err(Error::Absurd { what, got, expected: format!("at most {limit}") });
    }
    Ok(())
}

fn absurd<T>(what: &'static str, got: usize, expected: &str) -> Result<T> {
    Err(Error::Absurd { what, got: got as u64, expected: expected.to_owned() })
}

/// Little-endian numbers, one after the other.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn bytes(&mut self, n: usize) -> Result<&'a [u8]> {
        self.expect("bytes of the header", n, 1)?;
        let (bytes, rest) = self.0.split_at(n);
        self.0 = rest;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    fn codec(&mut self) -> Result<Codec> {
        let bytes: [u8; 2] = self.array()?;
        match Codec::of_wire(bytes) {
            Some(codec) => Ok(codec),
            None => absurd("codec", bytes[0] as usize, "0 to 3 with its bits"),
        }
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Fails unless there is room for so many entries of so many bytes.
    fn expect(&self, what: &'static str, count: usize, bytes: usize) -> Result<()> {
        at_most(what, count as u64, (self.0.len() / bytes) as u64)
    }

    fn entries(&mut self, what: &'static str, count: usize, bytes: usize) -> Result<impl Iterator<Item = Fields<'a>>> {
        self.expect(what, count, bytes)?;
        Ok(self.bytes(count * bytes)?.chunks_exact(bytes).map(Fields))
    }
}
