"""The compiled part of tqkv. An *array* is a numpy array, a torch tensor or anything with ``__dlpack__``; floats are float32, float16
or bfloat16, each argument of its own type. Memory of an array is read and written while a call runs, without the GIL: another
thread must not write to it meanwhile.

Every error is a :class:`Error`; a violated rule has a class of its own, whose message says what was got and what was expected."""

from os import PathLike
from typing import Any, Literal, Sequence

Array = Any
Domain = Literal["original", "rotated"]
Order = Literal["token", "head"]
Tokens = dict[int, int] | Sequence[tuple[int, int]]
"""Sequences, each named once, with how many tokens."""

__version__: str

class Device:
    """A place that holds memory and runs operations: ``cpu``, ``wgpu``, ``wgpu:N``, ``cuda`` or ``cuda:N``.

    An NVIDIA GPU works on torch's current stream, the calling thread's, once torch uses a GPU: tensors on it are used where they lie, in
    the order of that stream; nothing waits for the host, and calls can be captured in a graph. Where the current stream is another than
    at the last call, its work comes behind all that the device was given before. So threads may share a device, one call behind the
    other; for work side by side give each a device of its own.

    Raises :class:`UnknownDeviceError`, :class:`DeviceUnavailableError`. A CPU works in forked processes too."""

    def __init__(self, name: str = "cpu") -> None: ...
    @staticmethod
    def cpu(threads: int | None = None) -> Device:
        """The host's processor: the process's device, or one with so many threads of its own."""
    @staticmethod
    def cuda_on_stream(ordinal: int = 0, stream: int = 0) -> Device:
        """An NVIDIA GPU whose work all goes to one stream, a ``cudaStream_t``, which must outlive the device; the order of what other
        streams do with its tensors is the caller's."""
    @staticmethod
    def best() -> Device:
        """CUDA, then a GPU through wgpu, else the CPU."""
    @staticmethod
    def list() -> list[tuple[str | None, str]]:
        """Names and descriptions; ``None`` and the reason for what cannot be used."""
    @property
    def kind(self) -> Literal["cpu", "wgpu", "cuda"]: ...
    @property
    def name(self) -> str: ...
    @property
    def details(self) -> dict[str, str]: ...

class Codec:
    """The codecs of keys and of values: ``k5v4`` (2 to 8 bits a side), ``f16``, ``f32``, ``seed4``, or one for each side,
    ``tq8/f16``; and of positions that are kept a second time, ``k4v4+s1f16+r64k8v8``: the first in f16, the newest 64 in 8 bits.

    Raises :class:`UnknownCodecError`, :class:`UnknownExtentError`, :class:`RepeatedExtentError`."""

    def __init__(self, name: str | Codec) -> None: ...
    @property
    def sinks(self) -> int:
        """How many first positions are kept a second time."""
    @property
    def recent(self) -> int:
        """How many newest positions are."""
    @property
    def key(self) -> str: ...
    @property
    def value(self) -> str: ...
    def bits_per_element(self, head_dim: int) -> float:
        """Of K and V together, scales counted."""
    def row_bytes(self, head_dim: int) -> list[tuple[int, int]]:
        """Bytes of codes and of scales of a key, and of a value. Raises :class:`HeadDimError`, :class:`BitsError`."""

class PagePool:
    """Pages of compressed vectors: the K or the V of one layer. ``codec`` is one side's: ``tq4``, ``f16``, ``seed4``."""

    def __init__(self, device: Device, codec: str, head_dim: int, kv_heads: int, page_size: int, pages: int) -> None:
        """A pool of zeros. Raises :class:`ZeroError`, :class:`SizeOverflowError`, :class:`OutOfMemoryError`."""
    @staticmethod
    def from_arrays(
        device: Device,
        codec: str,
        head_dim: int,
        codes: Array,
        scales: Array | None = None,
        channels: tuple[Array, Array] | None = None,
    ) -> PagePool:
        """A pool in memory of someone else's, without a copy, which it keeps alive: ``codes`` is
        uint8 [pages, kv_heads, page_size, row_bytes] (or the floats themselves of a dense codec) and ``scales``
        [pages, kv_heads, page_size, scales] (float16, float32 for seed codecs). Both may be strided views (not on wgpu), also of one
        tensor: pages of [page_size, kv_heads, bytes] are ``.transpose(1, 2)`` of a view.

        ``channels`` shifts and scales keys before they are stored, (shift, scale), both [kv_heads, head_dim].

        Raises :class:`ShapeError`, :class:`MismatchError` for rows that overlap, :class:`AliasedError`, :class:`UnsupportedError`,
        :class:`ParameterError`."""
    @property
    def codec(self) -> str: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def scale_bytes(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def overlaps(self, other: PagePool) -> bool:
        """Whether rows of both have a byte in common."""

class Batch:
    """Some sequences, validated: the plan that every layer of a model step shares.

    Position p of a sequence lies in slot ``p % (len(pages) * page_size)``: page ``pages[slot // page_size]``, row
    ``slot % page_size``. ``lens`` counts the new positions in; ``first`` is the oldest position held (what lies before is neither
    read nor seen: padding on the left, say). ``pages`` has a row of page numbers for each sequence, a list or an array; entries
    that no held position needs may be anything.

    Raises :class:`ZeroError`, :class:`TooLargeError`, :class:`PositionsError`, :class:`PageError`."""

    def __init__(
        self,
        device: Device,
        page_size: int,
        lens: Sequence[int] | Array,
        new: Sequence[int] | Array,
        pages: Sequence[Sequence[int]] | Array,
        first: Sequence[int] | Array | None = None,
    ) -> None: ...
    @staticmethod
    def contiguous(device: Device, capacity: int, len: int, new: int, first: int = 0) -> Batch:
        """One sequence in a pool of one page as long as the cache, in which positions wrap around."""
    @staticmethod
    def with_tables(
        device: Device,
        page_size: int,
        tables: Array,
        pages: int,
        lens: Sequence[int] | Array,
        new: Sequence[int] | Array,
    ) -> Batch:
        """Sequences whose page tables lie in the device's memory (CUDA), and are read there by every :func:`refresh`: ``tables`` is int32 or
        int64, [sequences, width], its rows at any distance; entries that no held position needs may be anything. Pools have ``pages``
        pages. ``lens`` and ``new`` are known to the host, as in a batch of its own.

        Such a batch attends; :func:`quantize_at` writes. An entry that is out of range is not followed: see ``out_of_range``.

        Raises :class:`UnsupportedError` on other devices, :class:`ShapeError`, :class:`DTypeError`, :class:`ZeroError`,
        :class:`PositionsError`, :class:`TooLargeError`, :class:`WrongDeviceError`."""
    @staticmethod
    def on_device(
        device: Device,
        page_size: int,
        tables: Array,
        pages: int,
        lens: Array,
        starts: Array,
        tokens: int,
        most_new: int,
        most_len: int,
    ) -> Batch:
        """Sequences of which the host knows nothing: page tables as in :meth:`with_tables`, and ``lens`` and ``starts`` lie in the device's
        memory, int32 or int64, and are read by every :func:`refresh`, so that a graph that was captured once serves all further steps.

        ``lens`` is [sequences], the new positions counted in; a sequence of length 0 has no part. ``starts`` is [sequences + 1], where each
        sequence's new tokens start, and where the last ones end. ``tokens`` is how many queries and outputs have room for; those of no
        sequence are not written. ``most_new`` and ``most_len`` bound what a sequence has.

        An entry, a length or a start that is out of range is not followed: see ``out_of_range``.

        Raises what :meth:`with_tables` does."""
    @property
    def out_of_range(self) -> int:
        """How many entries of tables, lengths and starts on the device were out of range so far. Waits for the device."""
    def update(
        self,
        lens: Sequence[int] | Array,
        new: Sequence[int] | Array,
        pages: Sequence[Sequence[int]] | Array,
        first: Sequence[int] | Array | None = None,
    ) -> None:
        """Other lengths and pages for as many sequences, with as many new positions each; tables may be as long as the longest was. On an
        NVIDIA GPU a graph that was captured with this batch goes on with them.

        Raises :class:`MismatchError` for other numbers of sequences or new positions or longer tables, :class:`PageError` and
        :class:`AliasedError` for pages that a captured operation could not take, :class:`UnsupportedError` during a capture. Nothing has
        changed then."""
    @property
    def sequences(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def page_size(self) -> int: ...

def quantize(batch: Batch, parts: Sequence[tuple[Array, PagePool]]) -> None:
    """Encodes the new positions of every sequence: each part is an array [tokens, kv_heads, head_dim], the sequences' tokens one
    after the other, and the pool that takes it.

    Raises :class:`ShapeError`, :class:`DTypeError`, :class:`PageError`, :class:`MismatchError`, :class:`AliasedError`."""

def quantize_at(
    parts: Sequence[tuple[Array, PagePool]], slots: Array, *, out_of_range: Array | None = None
) -> None:
    """Encodes vectors into slots: each part is an array [tokens, kv_heads, head_dim] and the pool that takes it, token i of every part
    in slot ``slots[i]``, which is page * page_size + row, or nowhere if it is -1. ``slots`` is int32 or int64, [tokens], and stays in the
    device's memory: the host reads nothing of it. A slot that no pool has is not written; ``out_of_range``, int32 [1], is
    increased by one for each. No two tokens may name one slot.

    Raises :class:`ZeroError` without parts, :class:`ShapeError`, :class:`DTypeError`, :class:`MismatchError`, :class:`AliasedError`,
    :class:`UnsupportedError` on wgpu."""

def refresh(batch: Batch) -> None:
    """Reads the page tables, and lengths, that a batch on the device stands for, and plans for them, on the device: once a step, before all
    operations of all layers, in the same graph or before its replay. For other batches it does nothing."""

def attend(
    q: Array,
    key: PagePool,
    value: PagePool,
    batch: Batch,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Array | None = None,
    domain: Domain = "original",
    out: Array | None = None,
    lse: bool = False,
) -> Any:
    """Softmax(scale · q·Kᵀ)·V for the new positions of every sequence. ``q`` is [tokens, heads, head_dim], ``heads`` a multiple of
    the pools' kv_heads; ``scale`` 1/√head_dim if not given. Gives an array like ``q``, or ``out``; with ``lse`` a pair of it and
    float32 [tokens, heads], the logarithms of the softmax denominators, for :func:`merge`.

    Raises :class:`ShapeError`, :class:`DTypeError`, :class:`MismatchError`, :class:`PageError`, :class:`ParameterError`,
    :class:`ZeroError`, :class:`AliasedError`."""

def dequantize(
    pool: PagePool,
    batch: Batch,
    sequence: int,
    positions: range | Sequence[int] | Array,
    *,
    domain: Domain = "original",
    order: Order = "token",
    out: Array | None = None,
) -> Any:
    """Decodes positions of one sequence of a batch: [positions, kv_heads, head_dim] float32, [kv_heads, positions, head_dim] by
    ``order="head"``, or into ``out``, any float. It is numpy's; torch's on an NVIDIA GPU once torch uses one.

    Raises :class:`PositionsError` for positions that are not held, :class:`MismatchError`, :class:`ShapeError`."""

def merge(
    parts: Sequence[tuple[Array, Array]],
    *,
    device: Device | None = None,
    out: Array | None = None,
    lse: bool = False,
) -> Any:
    """Joins attention over disjoint sets of positions: parts are pairs (out, lse) of :func:`attend`.

    Raises :class:`ZeroError` without parts, :class:`ShapeError`, :class:`DTypeError`."""

def rotate(codec: str, head_dim: int, x: Array, *, inverse: bool = False, device: Device | None = None) -> Any:
    """Vectors [..., head_dim] into the domain in which a codec stores them, or back."""

class KvCache:
    """The compressed K and V of all layers, for sequences of different lengths that share one pool of pages. Sequences are
    numbers, never used twice.

    ``capacity`` counts the positions of all sequences together, in pages of ``page_size``. By layer: ``windows`` says how many
    newest positions are kept, ``shared`` which earlier layer's positions are read, ``codec_at`` other codecs, and ``channels`` how
    keys are shifted and scaled before they are stored, (shift, scale), both [kv_heads, head_dim] (``tqkv calibrate`` measures them).

    Raises :class:`ZeroError`, :class:`HeadDimError`, :class:`MismatchError`, :class:`LayerError`, :class:`OutOfMemoryError`."""

    def __init__(
        self,
        device: Device,
        layers: int,
        kv_heads: int,
        head_dim: int,
        codec: str | Codec | None = None,
        *,
        page_size: int = 64,
        capacity: int = 4096,
        window_capacity: int | None = None,
        windows: dict[int, int] | None = None,
        shared: dict[int, int] | None = None,
        codec_at: dict[int, str | Codec] | None = None,
        channels: dict[int, tuple[Array, Array]] | None = None,
    ) -> None: ...
    def __len__(self) -> int:
        """Sequences."""
    @property
    def device(self) -> Device: ...
    @property
    def sequences(self) -> list[int]: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
    @property
    def free_pages(self) -> int:
        """In the kind of layers that has fewest."""
    def usage(self) -> dict[str, float]:
        """``capacity``, ``used`` and ``free`` in bytes, ``fragmentation`` as a share."""
    def add_sequence(self) -> int: ...
    def fork(self, sequence: int) -> int:
        """A sequence with the same content, which shares all pages until either writes."""
    def truncate(self, sequence: int, len: int) -> None:
        """Drops all positions from ``len`` on. Raises :class:`PositionsError` if a window has dropped what would be seen."""
    def free(self, sequence: int) -> None: ...
    def len(self, sequence: int) -> int:
        """Positions, the same in every layer. Raises :class:`UnevenLayersError` between the layers' appends."""
    def fits(self, tokens: Tokens) -> bool:
        """Whether there are pages for so many new tokens."""
    def step(self, tokens: Tokens) -> Step:
        """Starts a step: the new tokens of some sequences through all layers, as one thing. Until it is over, the cache takes no
        other call. Raises :class:`OutOfPagesError`, :class:`UnknownSequenceError`, :class:`RepeatedSequenceError`."""
    def append(self, layer: int, tokens: Tokens, k: Array, v: Array) -> None:
        """Encodes new tokens at the end of sequences, in one layer: [tokens, kv_heads, head_dim], the sequences' tokens one after
        the other. Raises :class:`OutOfPagesError`, :class:`ShapeError`, :class:`SharedLayerError`; nothing is appended then."""
    def attend(
        self,
        layer: int,
        queries: Tokens,
        q: Array,
        *,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Array | None = None,
        domain: Domain = "original",
        out: Array | None = None,
        lse: bool = False,
    ) -> Any:
        """Attention of the newest positions of sequences in one layer, as :func:`attend`; a layer's window applies on top."""
    def dequantize(
        self,
        layer: int,
        side: Literal["key", "value"],
        sequence: int,
        positions: range | Sequence[int] | Array | None = None,
        *,
        domain: Domain = "original",
        order: Order = "token",
        out: Array | None = None,
    ) -> Any:
        """Decodes positions, all if none are named; as :func:`dequantize`."""
    def save(
        self, path: str | PathLike[str], sequences: Sequence[int] | None = None, fingerprint: bytes | None = None
    ) -> list[int]:
        """Writes sequences to a file, whole or not at all, and gives them in the order in which :meth:`load` will.
        ``fingerprint`` says which model they belong to. Raises :class:`IoError`."""
    def load(self, path: str | PathLike[str], fingerprint: bytes | None = None) -> list[int]:
        """Adds the sequences of a file. Raises :class:`FingerprintError`, :class:`GeometryError`, :class:`ChecksumError`,
        :class:`NotASnapshotError`, :class:`TruncatedError`, :class:`OutOfPagesError`, :class:`IoError`."""
    def dumps(self, sequences: Sequence[int] | None = None, fingerprint: bytes | None = None) -> bytes:
        """As :meth:`save`, to bytes."""
    def loads(self, bytes: bytes, fingerprint: bytes | None = None) -> list[int]:
        """As :meth:`load`, from bytes."""
    def grow(self, capacity: int, window_capacity: int | None = None) -> None:
        """Moves everything to a cache of this capacity. Sequences keep their numbers."""

class Step:
    """New tokens of some sequences on their way through the layers. As a context manager it is committed at the end of its block,
    and abandoned if the block raises: the sequences are then as before."""

    @property
    def tokens(self) -> int: ...
    def append(self, layer: int, k: Array, v: Array) -> None:
        """The tokens' keys and values in one layer, [tokens, kv_heads, head_dim]."""
    def attend(
        self,
        layer: int,
        q: Array,
        *,
        scale: float | None = None,
        causal: bool = True,
        window: int | None = None,
        softcap: float | None = None,
        sink_logits: Array | None = None,
        domain: Domain = "original",
        out: Array | None = None,
        lse: bool = False,
    ) -> Any:
        """Attention of the new tokens in one layer, after their keys and values; [tokens, heads, head_dim]."""
    def append_and_attend(self, layer: int, k: Array, v: Array, q: Array, **kwargs: Any) -> Any:
        """:meth:`append` and :meth:`attend`."""
    def captured(self) -> CapturedStep:
        """What the step's operations read on an NVIDIA GPU, for a graph that they were captured in: :meth:`resume` says how it goes on.
        Run the operations once outside of the graph before. Keep it as long as the graph.

        Raises :class:`UnevenLayersError` if a layer was not appended, :class:`UnsupportedError` on other devices."""
    def resume(self, captured: CapturedStep) -> bool:
        """Brings what a captured step reads up to date with this step's tokens, in place of the step's operations: replay the graph next,
        on the same stream, and commit. Nothing is waited for.

        False where that does not do: for other numbers of new tokens, in a cache that has grown, when a page table has outgrown its
        room (which then doubles), or when other kernels suit the lengths better. Run the step's operations then, and capture them anew;
        the old graph must not be replayed."""
    def commit(self) -> None:
        """The tokens count from now on. Raises :class:`UnevenLayersError` if a layer was not appended."""
    def abandon(self) -> None: ...
    def __enter__(self) -> Step: ...
    def __exit__(self, *error: Any) -> bool: ...

class CapturedStep:
    """What a captured step reads on the device. Made by :meth:`Step.captured`."""

class Error(Exception):
    """What went wrong in tqkv; the base of all its exceptions."""

class BitsError(Error):
    """A codec has no such width."""

class HeadDimError(Error):
    """A codec cannot store vectors of this size."""

class UnknownCodecError(Error):
    """No codec has this name."""

class UnknownExtentError(Error):
    """A part of a codec's name is none."""

class RepeatedExtentError(Error):
    """A codec's name has a part twice."""

class UnknownDeviceError(Error):
    """No device has this name."""

class DeviceUnavailableError(Error):
    """The device cannot be had on this machine or in this build."""

class UnsupportedError(Error):
    """The device cannot do this; nothing else is tried in its place."""

class DeviceFailedError(Error):
    """The device failed while it worked. What it wrote is undefined."""

class KernelCompileError(Error):
    """A kernel did not compile."""

class UnknownKernelError(Error):
    """A kernel's name is not registered."""

class OutOfMemoryError(Error):
    """Memory ran out."""

class ShapeError(Error):
    """An array has another shape than the call needs."""

class DTypeError(Error):
    """An array holds another type than the call needs."""

class TooSmallError(Error):
    """An array or file is smaller than what it must hold."""

class WrongDeviceError(Error):
    """An array lives on another device."""

class AliasedError(Error):
    """The same memory is read and written by one operation."""

class OutdatedBatchError(Error):
    """A batch was brought up to date in the meantime."""

class BufferBusyError(Error):
    """Another thread is using the memory at this moment."""

class ZeroError(Error):
    """A count must not be zero."""

class SizeOverflowError(Error):
    """A size does not fit the integers that count it."""

class TooLargeError(Error):
    """A count is above a fixed limit."""

class MismatchError(Error):
    """Two numbers that must agree do not, or one must divide the other."""

class ParameterError(Error):
    """A number is out of its range."""

class ChannelsError(Error):
    """A map of channels cannot be."""

class PositionsError(Error):
    """Positions that the sequence does not hold."""

class PageError(Error):
    """A page number past the pool."""

class OutOfPagesError(Error):
    """The cache has too few free pages; nothing was appended."""

class UnknownSequenceError(Error):
    """A sequence that the cache does not hold."""

class RepeatedSequenceError(Error):
    """The same sequence appears twice in one call."""

class LayerError(Error):
    """A layer that the cache does not have."""

class SharedLayerError(Error):
    """A layer that holds nothing of its own cannot be appended to."""

class RotatedSinksError(Error):
    """Rotated queries over sinks that are rotated otherwise."""

class UnevenLayersError(Error):
    """Layers of a sequence hold different lengths: a step was left half done."""

class NotASnapshotError(Error):
    """The bytes are no snapshot at all."""

class VersionError(Error):
    """A snapshot was written by another version of the format."""

class ChecksumError(Error):
    """Stored bytes are not those that were written."""

class TruncatedError(Error):
    """A snapshot ends too early."""

class TrailingBytesError(Error):
    """A file goes on after the snapshot."""

class AbsurdError(Error):
    """A count in a snapshot that no snapshot can have."""

class FingerprintError(Error):
    """A snapshot of another model."""

class GeometryError(Error):
    """A snapshot of a cache of another shape."""

class IoError(Error):
    """A file or stream failed."""
