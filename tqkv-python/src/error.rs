//! tqkv's errors as Python exceptions: a class for each variant, all of them `tqkv.Error`.

use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::{PyErr, create_exception};

create_exception!(tqkv, Error, PyException, "What went wrong in tqkv; the base of all its exceptions.");

/// Exceptions by variant: `Shape` is raised as `tqkv.ShapeError`.
macro_rules! exceptions {
    ($($variant:ident => $class:ident: $doc:literal,)*) => {
        $( create_exception!(tqkv, $class, Error, $doc); )*

        /// The exception of an error.
        pub fn raise(error: tqkv::Error) -> PyErr {
            let message = error.to_string();
            match error {
                $( tqkv::Error::$variant { .. } => $class::new_err(message), )*
                _ => Error::new_err(message),
            }
        }

        /// Adds the classes to the module.
        pub fn add(m: &Bound<'_, PyModule>) -> PyResult<()> {
            m.add("Error", m.py().get_type::<Error>())?;
            $( m.add(stringify!($class), m.py().get_type::<$class>())?; )*
            Ok(())
        }
    };
}

exceptions! {
    Bits => BitsError: "A codec has no such width.",
    HeadDim => HeadDimError: "A codec cannot store vectors of this size.",
    UnknownCodec => UnknownCodecError: "No codec has this name.",
    UnknownExtent => UnknownExtentError: "A part of a codec's name is none.",
    RepeatedExtent => RepeatedExtentError: "A codec's name has a part twice.",
    UnknownDevice => UnknownDeviceError: "No device has this name.",
    DeviceUnavailable => DeviceUnavailableError: "The device cannot be had on this machine or in this build.",
    Unsupported => UnsupportedError: "The device cannot do this; nothing else is tried in its place.",
    DeviceFailed => DeviceFailedError: "The device failed while it worked. What it wrote is undefined.",
    KernelCompile => KernelCompileError: "A kernel did not compile.",
    UnknownKernel => UnknownKernelError: "A kernel's name is not registered.",
    OutOfMemory => OutOfMemoryError: "Memory ran out.",
    Shape => ShapeError: "An array has another shape than the call needs.",
    DType => DTypeError: "An array holds another type than the call needs.",
    TooSmall => TooSmallError: "An array or file is smaller than what it must hold.",
    WrongDevice => WrongDeviceError: "An array lives on another device.",
    Aliased => AliasedError: "The same memory is read and written by one operation.",
    OutdatedBatch => OutdatedBatchError: "A batch was brought up to date in the meantime.",
    BufferBusy => BufferBusyError: "Another thread is using the memory at this moment.",
    Zero => ZeroError: "A count must not be zero.",
    SizeOverflow => SizeOverflowError: "A size does not fit the integers that count it.",
    TooLarge => TooLargeError: "A count is above a fixed limit.",
    Mismatch => MismatchError: "Two numbers that must agree do not, or one must divide the other.",
    Parameter => ParameterError: "A number is out of its range.",
    Channels => ChannelsError: "A map of channels cannot be.",
    Positions => PositionsError: "Positions that the sequence does not hold.",
    Page => PageError: "A page number past the pool.",
    OutOfPages => OutOfPagesError: "The cache has too few free pages; nothing was appended.",
    UnknownSequence => UnknownSequenceError: "A sequence that the cache does not hold.",
    RepeatedSequence => RepeatedSequenceError: "The same sequence appears twice in one call.",
    Layer => LayerError: "A layer that the cache does not have.",
    SharedLayer => SharedLayerError: "A layer that holds nothing of its own cannot be appended to.",
    RotatedSinks => RotatedSinksError: "Rotated queries over sinks that are rotated otherwise.",
    UnevenLayers => UnevenLayersError: "Layers of a sequence hold different lengths: a step was left half done.",
    NotASnapshot => NotASnapshotError: "The bytes are no snapshot at all.",
    Version => VersionError: "A snapshot was written by another version of the format.",
    Checksum => ChecksumError: "Stored bytes are not those that were written.",
    Truncated => TruncatedError: "A snapshot ends too early.",
    TrailingBytes => TrailingBytesError: "A file goes on after the snapshot.",
    Absurd => AbsurdError: "A count in a snapshot that no snapshot can have.",
    Fingerprint => FingerprintError: "A snapshot of another model.",
    Geometry => GeometryError: "A snapshot of a cache of another shape.",
    Io => IoError: "A file or stream failed.",
}

/// A result of tqkv as one of Python.
pub trait OrRaise<T> {
    /// Raises the error.
    fn or_raise(self) -> PyResult<T>;
}

impl<T> OrRaise<T> for tqkv::Result<T> {
    fn or_raise(self) -> PyResult<T> {
        self.map_err(raise)
    }
}
