//! One error type: every violated rule has a variant of its own, with what was got and what was expected.

use std::fmt::{self, Display};

/// The result of every fallible call.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. After an error nothing has been written, unless the variant says otherwise.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A codec has no such width.
    #[error("{codec} codec of {got} bits: expected {expected}")]
    Bits {
        /// The codec family.
        codec: &'static str,
        /// Bits asked for.
        got: u8,
        /// Bits that exist.
        expected: &'static str,
    },
    /// A codec cannot store vectors of this size.
    #[error("head_dim {got} with codec {codec}: expected {expected}")]
    HeadDim {
        /// The codec's name.
        codec: String,
        /// head_dim asked for.
        got: usize,
        /// What it takes.
        expected: &'static str,
    },
    /// No codec has this name.
    #[error("unknown codec {got:?}: expected f32, f16, seed4, seed5, seed6, seed8 or kXvY with X and Y from 2 to 8")]
    UnknownCodec {
        /// The name.
        got: String,
    },
    /// No part of a cache's codec has this name.
    #[error("unknown part {got:?} of a cache's codec: expected sN or rN and a codec, as in k4v4+s1f16+r64k8v8")]
    UnknownExtent {
        /// The part.
        got: String,
    },
    /// A part of a cache's codec comes twice.
    #[error("a cache's codec has {got:?} besides another of its kind: expected one")]
    RepeatedExtent {
        /// The second.
        got: String,
    },
    /// No device has this name.
    #[error("unknown device {got:?}: expected cpu, wgpu, wgpu:N, cuda or cuda:N")]
    UnknownDevice {
        /// The name.
        got: String,
    },
    /// The device cannot be had on this machine or in this build.
    #[error("device {device} is not available: {reason}")]
    DeviceUnavailable {
        /// The device asked for.
        device: String,
        /// Why not.
        reason: String,
    },
    /// The device cannot do this; nothing else is tried in its place.
    #[error("{device} cannot do this: {what}")]
    Unsupported {
        /// The device.
        device: String,
        /// What it lacks.
        what: String,
    },
    /// The device failed while it worked: lost, out of memory mid-way, a driver error. What it wrote is undefined.
    #[error("{device} failed: {reason}")]
    DeviceFailed {
        /// The device.
        device: String,
        /// What it reported.
        reason: String,
    },
    /// A kernel did not compile.
    #[error("kernel {name} does not compile: {log}")]
    KernelCompile {
        /// The kernel.
        name: String,
        /// The compiler's words.
        log: String,
    },
    /// A kernel's name is not registered.
    #[error("no kernel is registered under the name {name:?}")]
    UnknownKernel {
        /// The name.
        name: String,
    },
    /// Memory ran out.
    #[error("{device} has no room for {requested} bytes")]
    OutOfMemory {
        /// The device.
        device: String,
        /// Bytes asked for.
        requested: usize,
    },
    /// A buffer has another shape than the call needs.
    #[error("{what} has shape {got:?}: expected {expected}")]
    Shape {
        /// The argument.
        what: &'static str,
        /// Its shape.
        got: Vec<usize>,
        /// The shape in words or numbers.
        expected: String,
    },
    /// A buffer holds another type than the call needs.
    #[error("{what} holds {got}: expected {expected}")]
    DType {
        /// The argument.
        what: &'static str,
        /// Its type's name.
        got: &'static str,
        /// What is taken.
        expected: &'static str,
    },
    /// A buffer or file is smaller than what it must hold.
    #[error("{what} holds {got} bytes: expected at least {expected}")]
    TooSmall {
        /// The argument.
        what: &'static str,
        /// Bytes there.
        got: usize,
        /// Bytes needed.
        expected: usize,
    },
    /// A buffer lives on another device.
    #[error("{what} is on {got}: expected {expected}")]
    WrongDevice {
        /// The argument.
        what: &'static str,
        /// Its device; "another device" where the names are the same.
        got: String,
        /// The device that it must be on, usually the encoder's.
        expected: String,
    },
    /// The same memory is read and written by one operation.
    #[error("{what} shares memory with another argument: expected memory of its own")]
    Aliased {
        /// The argument that is written.
        what: &'static str,
    },
    /// A batch has been updated, and this is a clone of what it was.
    #[error("this clone of a batch was made before the batch was updated: expected the updated one")]
    OutdatedBatch,
    /// Another thread is using the buffer's memory at this moment.
    #[error("a buffer is in use by another thread: expected calls that share a written buffer to be ordered")]
    BufferBusy,
    /// A count must not be zero.
    #[error("{what} is 0: expected at least 1")]
    Zero {
        /// Which count.
        what: &'static str,
    },
    /// A size does not fit the machine's integers, or the 32 bits that kernels count with.
    #[error("{what} overflows: expected it to fit {limit}")]
    SizeOverflow {
        /// Which size.
        what: &'static str,
        /// What it must fit.
        limit: &'static str,
    },
    /// A count is above a fixed limit.
    #[error("{what} is {got}: expected at most {expected}")]
    TooLarge {
        /// Which count.
        what: &'static str,
        /// What was given.
        got: usize,
        /// The limit.
        expected: usize,
    },
    /// Two numbers that must agree do not, or one must divide the other.
    #[error("{what} is {got}: expected {expected}")]
    Mismatch {
        /// Which number.
        what: &'static str,
        /// What was given.
        got: usize,
        /// The rule.
        expected: String,
    },
    /// A number is out of its range.
    #[error("{name} is {got}: expected {expected}")]
    Parameter {
        /// Which number.
        name: &'static str,
        /// What was given.
        got: f32,
        /// The rule.
        expected: &'static str,
    },
    /// Rows shift and scale their channels, and are asked for what does not undo that.
    #[error("{what} shift and scale their channels: expected none that do for {operation}")]
    Channels {
        /// The rows.
        what: &'static str,
        /// What was asked.
        operation: &'static str,
    },
    /// Positions that the sequence does not hold: not yet written, or dropped already.
    #[error("positions {start}..{end} asked for: expected them within {first}..{len}")]
    Positions {
        /// First position asked for.
        start: usize,
        /// One past the last.
        end: usize,
        /// First position held.
        first: usize,
        /// One past the last held.
        len: usize,
    },
    /// A page number past the pool.
    #[error("page {got} in the page table: expected less than {pages}")]
    Page {
        /// The page.
        got: usize,
        /// Pages in the pool.
        pages: usize,
    },
    /// The cache has too few free pages; nothing was appended.
    #[error("the cache needs {needed} more pages: {free} of {pages} are free")]
    OutOfPages {
        /// Pages that the call needs.
        needed: usize,
        /// Pages free.
        free: usize,
        /// Pages in all.
        pages: usize,
    },
    /// A sequence that the cache does not hold (never added, or freed).
    #[error("sequence {got} is not in the cache")]
    UnknownSequence {
        /// Its number.
        got: u64,
    },
    /// The same sequence appears twice in one call.
    #[error("sequence {got} is named twice in one call: expected once")]
    RepeatedSequence {
        /// Its number.
        got: u64,
    },
    /// A layer that the cache does not have.
    #[error("layer {got}: expected less than {layers}")]
    Layer {
        /// The layer.
        got: usize,
        /// Layers of the cache.
        layers: usize,
    },
    /// A layer that holds nothing of its own cannot be appended to.
    #[error("layer {layer} shares the positions of layer {source_layer}: expected a layer with its own")]
    SharedLayer {
        /// The layer.
        layer: usize,
        /// The layer that it reads.
        source_layer: usize,
    },
    /// Queries and output in the rotated domain, in a layer whose sinks are rotated otherwise.
    #[error("layer {layer} holds sinks as {got} and the rest as {expected}: expected codecs of one rotation")]
    RotatedSinks {
        /// The layer.
        layer: usize,
        /// The codec of its sinks.
        got: String,
        /// The codec of its other positions.
        expected: String,
    },
    /// Layers of a sequence hold different lengths where one length is needed: a step was left half done.
    #[error("layer {layer} of sequence {sequence} holds {got} positions: expected {expected} as in layer 0")]
    UnevenLayers {
        /// The sequence.
        sequence: u64,
        /// The layer that differs.
        layer: usize,
        /// Positions there.
        got: usize,
        /// Positions in layer 0.
        expected: usize,
    },
    /// The bytes are no snapshot at all.
    #[error("not a tqkv snapshot: it begins with {got:02x?}")]
    NotASnapshot {
        /// The first bytes, at most 8.
        got: Vec<u8>,
    },
    /// A snapshot or its vectors were written by another version of the format.
    #[error("{what} is {got}: expected {expected}")]
    Version {
        /// Which version.
        what: &'static str,
        /// The version found.
        got: u32,
        /// The version that this build reads.
        expected: u32,
    },
    /// Stored bytes are not those that were written.
    #[error("checksum of {part} is {got:016x}: expected {expected:016x}")]
    Checksum {
        /// Which bytes.
        part: SnapshotPart,
        /// The checksum of the bytes found.
        got: u64,
        /// The checksum stored with them.
        expected: u64,
    },
    /// A snapshot ends too early.
    #[error("the snapshot ends after {got} bytes: expected {expected}")]
    Truncated {
        /// Bytes there.
        got: u64,
        /// Bytes that the part read last needs, counted from the start.
        expected: u64,
    },
    /// A file goes on after the snapshot.
    #[error("the file holds {got} bytes: expected {expected} as the snapshot says")]
    TrailingBytes {
        /// Bytes of the file.
        got: u64,
        /// Bytes of the snapshot.
        expected: u64,
    },
    /// A count in a snapshot that no snapshot can have, or that contradicts the rest of it.
    #[error("{what} of the snapshot is {got}: expected {expected}")]
    Absurd {
        /// Which count.
        what: &'static str,
        /// What is stored.
        got: u64,
        /// The rule.
        expected: String,
    },
    /// A snapshot of another model.
    #[error("the snapshot's model fingerprint is {got}: expected {expected}")]
    Fingerprint {
        /// The fingerprint stored, as text if it is text, else in hexadecimal.
        got: String,
        /// The caller's.
        expected: String,
    },
    /// A snapshot of a cache of another shape.
    #[error("{what} of the snapshot is {got}: expected {expected} as in the cache")]
    Geometry {
        /// Which property, with its layer.
        what: String,
        /// As stored.
        got: String,
        /// As in the cache.
        expected: String,
    },
    /// A file or stream failed.
    #[error("{path}: {message}")]
    Io {
        /// The file, or what kind of stream.
        path: String,
        /// The kind of failure.
        kind: std::io::ErrorKind,
        /// The system's words.
        message: String,
    },
}

/// The parts of a snapshot that have a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SnapshotPart {
    /// Everything before the pages.
    Header,
    /// A page, counted from 0.
    Page(usize),
    /// The list of all other checksums.
    Whole,
}

impl Display for SnapshotPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SnapshotPart::Header => f.write_str("the snapshot's header"),
            SnapshotPart::Page(page) => write!(f, "page {page} of the snapshot"),
            SnapshotPart::Whole => f.write_str("the whole snapshot"),
        }
    }
}

impl Error {
    pub(crate) fn io(path: impl Into<String>, error: &std::io::Error) -> Self {
        Error::Io { path: path.into(), kind: error.kind(), message: error.to_string() }
    }

    pub(crate) fn wrong_device(what: &'static str, got: &dyn Display, expected: &dyn Display) -> Self {
        let (got, expected) = (got.to_string(), expected.to_string());
        let got = if got == expected { format!("another device ({got})") } else { got };
        Error::WrongDevice { what, got, expected }
    }

    pub(crate) fn shape(what: &'static str, got: &[usize], expected: impl Into<String>) -> Self {
        Error::Shape { what, got: got.to_vec(), expected: expected.into() }
    }
}

/// The product of sizes, or an error that names what overflowed.
pub(crate) fn checked_product(what: &'static str, factors: &[usize]) -> Result<usize> {
    factors
        .iter()
        .try_fold(1usize, |n, &f| n.checked_mul(f))
        .filter(|&n| n <= isize::MAX as usize)
        .ok_or(Error::SizeOverflow { what, limit: "isize" })
}

/// A count as the u32 that kernels use.
pub(crate) fn to_u32(what: &'static str, n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::SizeOverflow { what, limit: "u32" })
}

#[cfg(test)]
mod tests {
    /// `docs/troubleshooting.md` names every variant.
    #[test]
    fn every_variant_is_in_the_guide() {
        let (source, guide) = (include_str!("error.rs"), include_str!("../../docs/troubleshooting.md"));
        let (_, variants) = source.split_once("pub enum Error {\n").unwrap();
        let (variants, _) = variants.split_once("\n}\n").unwrap();
        let names = variants.lines().filter_map(|line| {
            let name = line.strip_prefix("    ")?.trim_end_matches([' ', '{', ',']);
            name.starts_with(|c: char| c.is_ascii_uppercase()).then_some(name)
        });
        let names: Vec<_> = names.collect();
        assert!(names.len() > 40 && names.contains(&"OutdatedBatch") && names.contains(&"Io"), "{names:?}");
        let missing: Vec<_> = names.iter().filter(|name| !guide.contains(&format!("| `{name}` |"))).collect();
        assert!(missing.is_empty(), "docs/troubleshooting.md lacks {missing:?}");
    }
}
