"""A compressed cache for transformers, and attention straight over it.

>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="tqkv")
>>> model.generate(**inputs, past_key_values=TqkvCache(model.config, codec="k5v4"))

``attn_implementation="tqkv"`` is there once this module is imported. Under any other attention function the same cache stays right:
what they read is decoded for them. A mask that is neither causal nor a sliding window with padding on the left is refused.

On an NVIDIA GPU all work is on torch's current stream and nothing is copied to the host; :func:`decoding_graph` decodes in a CUDA graph.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
from typing import Any, Callable, Iterator, Sequence

import torch
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import causal_mask_function, sliding_window_overlay
from transformers.modeling_outputs import CausalLMOutputWithPast

import tqkv

__all__ = ["TqkvCache", "decoding_graph"]

#: Positions that a sliding layer keeps beyond its window, so that as many can be cropped again.
SLACK = 64
#: Arguments of attention functions that change its result and that tqkv has no answer to.
REFUSED = ("position_bias", "head_mask", "cu_seq_lens_q")


class _Compressed(torch.Tensor):
    """What the cache gives in place of K or V: their shape, type and device, but no memory. tqkv's attention takes the layer from
    it; any other operation decodes."""

    @staticmethod
    def __new__(cls, layer: _Layer, side: str, like: torch.Tensor, length: int) -> _Compressed:
        size = (*like.shape[:2], length, like.shape[-1])
        self = torch.Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)
        self.layer, self.side = layer, side
        return self

    def __repr__(self) -> str:
        return f"<{self.side} of layer {self.layer.index}, {tuple(self.shape)}, compressed>"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        decode = lambda x: x.layer.decode(x)  # noqa: E731
        args, kwargs = tree_map_only(cls, decode, args), tree_map_only(cls, decode, kwargs or {})
        return func(*args, **kwargs)


class _Layer(CacheLayerMixin):
    """One layer of a :class:`TqkvCache`, which does the work."""

    is_croppable = True

    def __init__(self, cache: TqkvCache, index: int, window: int | None) -> None:
        super().__init__()
        self.cache, self.index, self.window = cache, index, window
        self.is_sliding = window is not None
        #: Positions, padding included, what is pending too.
        self.length = 0
        #: The newest K and V, until attention says which of them are padding.
        self.pending: tuple[torch.Tensor, torch.Tensor] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.cache._begin(key_states, value_states)
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.flush()
        before, new = self.length, key_states.shape[-2]
        self.pending, self.length = (key_states, value_states), before + new
        shown = new + (before if self.window is None else min(before, self.window - 1))
        return tuple(
            _Compressed(self, side, x, shown) for side, x in (("key", key_states), ("value", value_states))
        )

    def flush(self) -> None:
        """Stores what is pending, all of it as tokens where nobody has said what is padding."""
        if self.pending is not None:
            self.store(self.cache._pads)

    def store(self, pads: Sequence[int]) -> torch.Tensor | None:
        """Stores what is pending but its padding, so many first positions of each row. Gives which of [batch, new] are tokens, or
        None if all are."""
        (k, v), self.pending = self.pending, None
        new, before = k.shape[-2], self.length - k.shape[-2]
        self.cache._expect_pads(pads, before)
        tokens = None
        if any(pad > before for pad in pads):
            at = torch.arange(before, self.length, device=k.device)
            tokens = at[None, :] >= torch.tensor(pads, device=k.device)[:, None]
        counts = [min(new, max(0, self.length - pad)) for pad in pads]
        if self.index == 0:
            self.cache._make_room(counts)
        each = list(zip(self.cache._rows, counts))
        self.cache._store.append(self.index, each, _ragged(k, tokens), _ragged(v, tokens))
        return tokens

    def decode(self, shown: _Compressed) -> torch.Tensor:
        """K or V as a dense tensor, zeros where padding is."""
        self.flush()
        first = self.length - shown.shape[-2]
        out = torch.zeros(shown.shape[0], shown.shape[2], shown.shape[1], shown.shape[3], device=shown.device)
        # Sinks are decoded by themselves.
        sinks = self.cache._codec.sinks
        for row, pad, to in zip(self.cache._rows, self.cache._pads, out):
            start, end = max(0, first - pad), self.length - pad
            for some in (range(start, min(end, sinks)), range(max(start, sinks), end)):
                if some:
                    part = to[some.start + pad - first : some.stop + pad - first]
                    self.cache._store.dequantize(self.index, shown.side, row, some, out=part)
        return out.transpose(1, 2).to(shown.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self.length if self.window is None else min(self.length, self.window - 1)
        return held + query_length, self.length - held

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1 if self.window is None else self.window

    def offload(self) -> None:
        raise NotImplementedError("a TqkvCache is not offloaded: it is small where it is")

    prefetch = offload


class TqkvCache(Cache):
    """The K and V of a decoder, compressed.

    ``codec`` names the codecs of keys and values (``k5v4``, ``f32``, ``k4v4+s1f16+r64k8v8``; see :class:`tqkv.Codec`), ``codec_at``
    others for some layers. ``calibration`` is a file of ``tqkv calibrate`` or a :class:`tqkv.Calibration`: keys are shifted and scaled
    as it says, and ``codec="auto"`` means the codecs that it found best. ``capacity`` counts the positions of all rows for which there is room from the start; the cache grows by itself. Padding on the left is not stored.
    ``device`` is the one that holds the model's tensors if not given: the CPU, or an NVIDIA GPU on torch's current stream.

    Raises ``ValueError`` for layers other than full and sliding attention, :class:`tqkv.CalibrationError` for a calibration that is damaged
    or another model's, and tqkv's errors for codecs that do not fit.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        codec: str | tqkv.Codec = "k5v4",
        *,
        capacity: int = 1024,
        page_size: int = 64,
        codec_at: dict[int, str | tqkv.Codec] | None = None,
        calibration: str | os.PathLike[str] | tqkv.Calibration | None = None,
        device: tqkv.Device | None = None,
    ) -> None:
        config = config.get_text_config(decoder=True)
        windows = _windows(config)
        super().__init__(layers=[_Layer(self, i, window) for i, window in enumerate(windows)])
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self._shape = (getattr(config, "num_key_value_heads", None) or heads, head_dim)
        if calibration is not None and not isinstance(calibration, tqkv.Calibration):
            calibration = tqkv.Calibration.load(calibration)
        if calibration is not None:
            calibration.expect(len(windows), *self._shape)
        if codec == "auto":
            if calibration is None or calibration.plan is None:
                raise ValueError('codec is "auto": expected a calibration of `tqkv calibrate --budget`')
            codec, codec_at = calibration.plan["codec"], dict(enumerate(calibration.plan["layers"])) | (codec_at or {})
        self._device, self._codec = device, tqkv.Codec(codec)
        self._windows = windows
        channels = None if calibration is None else calibration.channels
        self._options = {"page_size": page_size, "codec_at": codec_at, "channels": channels}
        self._made: tqkv.KvCache | None = None
        self._capacity = capacity
        #: Sequences by row, and how many first positions of each row are padding.
        self._rows: list[int] = []
        self._pads: list[int] = []
        #: The step that a model runs in, where it is one for all layers: see :class:`_Decoding`.
        self._step: tqkv.Step | None = None
        self._decoding: _Decoding | None = None

    @property
    def _store(self) -> tqkv.KvCache:
        """The cache of all layers, made when it is first needed."""
        if self._made is None:
            self._made = tqkv.KvCache(
                tqkv.Device() if self._device is None else self._device,
                len(self._windows),
                *self._shape,
                self._codec,
                capacity=self._capacity,
                windows={i: window + SLACK for i, window in enumerate(self._windows) if window is not None},
                **self._options,
            )
        return self._made

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self._store.nbytes

    def usage(self) -> dict[str, float]:
        """``capacity``, ``used`` and ``free`` in bytes, ``fragmentation`` as a share."""
        return self._store.usage()

    def _begin(self, k: torch.Tensor, v: torch.Tensor) -> None:
        for what, x in (("keys", k), ("values", v)):
            if (x.shape[1], x.shape[3]) != self._shape:
                got, want = (x.shape[1], x.shape[3]), self._shape
                raise tqkv.ShapeError(f"{what} have (kv_heads, head_dim) {got}: expected {want} as the config says")
        if self._made is None and self._device is None and k.is_cuda:
            self._device = tqkv.Device(f"cuda:{k.device.index}")
        if not self._rows:
            self._rows = [self._store.add_sequence() for _ in range(k.shape[0])]
            self._pads = [0] * k.shape[0]
        if len(self._rows) != k.shape[0]:
            raise tqkv.ShapeError(f"the cache holds {len(self._rows)} rows: {k.shape[0]} given")

    def _expect_pads(self, pads: Sequence[int], before: int) -> None:
        """Padding that was stored as tokens, or left out, stays so."""
        for row, (known, pad) in enumerate(zip(self._pads, pads)):
            if min(known, before) != min(pad, before):
                raise ValueError(f"row {row} had {known} positions of padding: the attention mask now has {pad}")
        self._pads = list(pads)

    def _make_room(self, counts: Sequence[int]) -> None:
        while not self._store.fits(list(zip(self._rows, counts))):
            self._capacity = max(2 * self._capacity, self._capacity + sum(counts))
            self._store.grow(self._capacity)

    def _settle(self) -> None:
        for layer in self.layers:
            layer.flush()

    def _select(self, indices: Sequence[int]) -> None:
        """Row i becomes what row indices[i] was."""
        self._settle()
        taken: set[int] = set()
        rows = []
        for i in indices:
            rows.append(self._store.fork(self._rows[i]) if i in taken else self._rows[i])
            taken.add(i)
        for i, row in enumerate(self._rows):
            if i not in taken:
                self._store.free(row)
        self._rows, self._pads = rows, [self._pads[i] for i in indices]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Beams go on from other beams: forks, which share what they have in common."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select([i for i in range(len(self._rows)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the newest ``-tokens_to_remove`` positions (or, as older callers mean it, all past a positive length).

        Raises :class:`tqkv.PositionsError` where a sliding layer no longer holds what would be seen (it keeps ``SLACK`` more)."""
        self._settle()
        # Assisted decoding gives a tensor on the GPU.
        tokens_to_remove, length = int(tokens_to_remove), self.get_seq_length()
        left = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        for row, pad in zip(self._rows, self._pads):
            self._store.truncate(row, max(0, left - pad))
        self._pads = [min(pad, left) for pad in self._pads]
        for layer in self.layers:
            layer.length = min(layer.length, left)

    def reset(self) -> None:
        for row in self._rows:
            self._store.free(row)
        self._rows, self._pads = [], []
        for layer in self.layers:
            layer.length, layer.pending, layer.is_initialized = 0, None, False

    @property
    def batch_size(self) -> int:
        return len(self._rows) or -1

    def save(self, path: str | os.PathLike[str], fingerprint: bytes = b"") -> None:
        """Writes all rows to a tqkv snapshot. ``fingerprint`` says which model they belong to."""
        self._settle()
        self._store.save(path, self._rows, fingerprint)

    def load(self, path: str | os.PathLike[str], fingerprint: bytes = b"") -> None:
        """Reads the rows of a snapshot in place of what the cache holds; shorter rows are padded on the left.

        Raises :class:`tqkv.FingerprintError`, :class:`tqkv.GeometryError` for a cache of another shape, and those of
        :meth:`tqkv.KvCache.load`; the cache is then as it was."""
        while True:
            try:
                rows = self._store.load(path, fingerprint)
                break
            except tqkv.OutOfPagesError:
                self._settle()
                self._capacity *= 2
                self._store.grow(self._capacity)
        self.reset()
        self._rows = rows
        lens = [self._store.len(row) for row in rows]
        length = max(lens, default=0)
        self._pads = [length - n for n in lens]
        for layer in self.layers:
            layer.length, layer.is_initialized = length, True


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Each layer's window."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        types = ["full_attention" if window is None else "sliding_attention"] * config.num_hidden_layers
    for i, kind in enumerate(types):
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layer {i} is of {kind}: a TqkvCache has full_attention and sliding_attention")
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError("layers of this model share keys and values: a TqkvCache has no such layers yet")
    return [window if kind == "sliding_attention" else None for kind in types]


def _ragged(x: torch.Tensor, tokens: torch.Tensor | None) -> torch.Tensor:
    """[batch, heads, new, head_dim] as [tokens, heads, head_dim], row after row."""
    x = x.detach().transpose(1, 2)
    return x.reshape(-1, *x.shape[2:]) if tokens is None else x[tokens]


def _padding(mask: torch.Tensor | None, rows: int) -> list[int]:
    """How many first positions of each row are padding; nothing else may be hidden."""
    if mask is None:
        return [0] * rows
    if (known := getattr(mask, "_tqkv_padding", None)) is not None:
        return known
    if mask.ndim != 2:
        raise ValueError(f"the attention mask is {tuple(mask.shape)}: tqkv takes [batch, positions], with padding on the left")
    mask = mask.bool()
    seen = mask.sum(-1)
    # Rows of nothing but padding have no first token.
    if not torch.equal(mask.flip(-1).long().cumprod(-1).sum(-1), seen):
        raise ValueError("the attention mask hides positions after a token: tqkv takes padding on the left only")
    return (mask.shape[-1] - seen).tolist()


class _Decoding:
    """One token a row through a model: in a step of all layers, and from the second on in a CUDA graph."""

    def __init__(self, forward: Callable[..., Any], ids: torch.Tensor) -> None:
        self.forward = forward
        with torch.inference_mode(False):
            self.ids, self.positions = torch.empty_like(ids), torch.empty_like(ids)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.captured: tqkv.CapturedStep | None = None
        self.logits: torch.Tensor | None = None

    def fits(self, forward: Callable[..., Any], ids: torch.Tensor) -> bool:
        return (self.forward, self.ids.shape, self.ids.device) == (forward, ids.shape, ids.device)

    def __call__(self, cache: TqkvCache, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits of [batch, 1] tokens, which the cache then holds."""
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        with cache._store.step([(row, 1) for row in cache._rows]) as step:
            if self.graph is not None and step.resume(self.captured):
                self.graph.replay()
            else:
                self._capture(cache, step)
            logits = self.logits.clone()
        for layer in cache.layers:
            layer.length += 1
        return logits

    def _capture(self, cache: TqkvCache, step: tqkv.Step) -> None:
        """Computes the step, and captures the same again for those to come."""
        self.graph = self.captured = None
        self.logits = self._run(cache, step)
        if self.ids.is_cuda:
            graph = torch.cuda.CUDAGraph()
            with _no_collection(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                logits = self._run(cache, step)
            # What was captured has not run.
            logits.copy_(self.logits)
            self.graph, self.captured, self.logits = graph, step.captured(), logits

    def _run(self, cache: TqkvCache, step: tqkv.Step) -> torch.Tensor:
        lengths = [layer.length for layer in cache.layers]
        cache._step = step
        try:
            return self.forward(
                input_ids=self.ids, position_ids=self.positions, past_key_values=cache, use_cache=True
            ).logits
        finally:
            cache._step = None
            for layer, length in zip(cache.layers, lengths):
                layer.length, layer.pending = length, None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's collector: graphs and memory that it frees during a capture would spoil it."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def decoding_graph(model: torch.nn.Module) -> Iterator[None]:
    """Within this block ``model`` decodes in a CUDA graph wherever it is called, by ``generate`` or otherwise, with one token a row over a
    :class:`TqkvCache` that holds a prompt; all other calls run as ever.

    The first such call captures the model's forward, and so does one for which the graph no longer does: other rows, a cache that has
    grown, twice as many pages as there was room for. In between, the host only brings lengths and page tables up to date and
    replays. Padding stays what the prompt's mask said: the masks of later tokens are not read. What the forward does must be fit for
    capture: no reading on the host, no hooks that must run for each token. While a graph is captured, no other thread may use the cache."""
    own, forward = vars(model).get("forward"), model.forward

    @functools.wraps(forward)
    def decode(*args: Any, **kwargs: Any) -> Any:
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids")
        if args or not _decodes(cache, ids, kwargs):
            return forward(*args, **kwargs)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, cache.get_seq_length())
        cache._settle()
        cache._make_room([1] * len(cache._rows))
        if cache._decoding is None or not cache._decoding.fits(forward, ids):
            cache._decoding = _Decoding(forward, ids)
        with torch.no_grad():
            return CausalLMOutputWithPast(logits=cache._decoding(cache, ids, positions), past_key_values=cache)

    model.forward = decode
    try:
        yield
    finally:
        del model.forward
        if own is not None:
            model.forward = own


#: What a call may say beside its tokens for a graph to do.
DECODING = {"input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "return_dict", "logits_to_keep"}


def _decodes(cache: Any, ids: torch.Tensor | None, kwargs: dict[str, Any]) -> bool:
    """Whether a model's call is a step of decoding that a graph can be."""
    if not isinstance(cache, TqkvCache) or ids is None or not ids.is_cuda or ids.shape != (len(cache._rows), 1):
        return False
    asked = {name for name, value in kwargs.items() if value is not None and value is not False}
    if asked - DECODING or kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
        return False
    mask, positions, length = kwargs.get("attention_mask"), kwargs.get("position_ids"), cache.get_seq_length()
    if positions is not None and positions.ndim != 2:
        return False
    return length > 0 and (mask is None or mask.shape == (len(ids), length + 1))


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function ``tqkv``: [batch, heads, new, head_dim] in, [batch, new, heads, head_dim] out."""
    if not isinstance(key, _Compressed):
        raise TypeError("attn_implementation='tqkv' attends over a TqkvCache: pass past_key_values=TqkvCache(model.config)")
    if dropout or is_causal is False or any(kwargs.get(name) is not None for name in REFUSED):
        raise NotImplementedError("tqkv attends causally, without dropout, biases or packed sequences")
    layer = key.layer
    cache, (batch, heads, new, head_dim) = layer.cache, query.shape
    options = {
        "scale": scaling,
        "window": layer.window,
        "softcap": softcap,
        "sink_logits": None if s_aux is None else s_aux.detach().float(),
    }
    if cache._step is not None:
        (k, v), layer.pending = layer.pending, None
        rows = (_ragged(x, None) for x in (k, v, query))
        attended = cache._step.append_and_attend(layer.index, *rows, **options)
        return attended.view(batch, new, heads, head_dim), None
    pads = _padding(attention_mask, batch)
    if layer.pending is not None:
        tokens = layer.store(pads)
    else:
        cache._expect_pads(pads, layer.length)
        tokens = None
    counts = [min(new, max(0, layer.length - pad)) for pad in pads]
    attended = cache._store.attend(
        layer.index,
        list(zip(cache._rows, counts)),
        _ragged(query, tokens),
        **options,
    )
    if tokens is None:
        return attended.view(batch, new, heads, head_dim), None
    out = query.new_zeros(batch, new, heads, head_dim)
    out[tokens] = attended
    return out, None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> torch.Tensor | None:
    """What ``tqkv`` needs of a mask: [batch, positions up to the newest], or None if nothing is padding."""
    if use_vmap or not _is_causal(mask_function):
        raise NotImplementedError("tqkv attends causally, in a sliding window or not: this model's mask has more to it")
    if attention_mask is None:
        return None
    attention_mask = attention_mask[:, : q_offset + q_length]
    if bool(attention_mask.all()):
        return None
    # Read on the host once for all layers.
    attention_mask._tqkv_padding = _padding(attention_mask, batch_size)
    return attention_mask


def _is_causal(function: Any) -> bool:
    """Causal, or a sliding window of it."""
    if function is causal_mask_function:
        return True
    parts = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    window = sliding_window_overlay.__name__
    match parts:
        case [tuple(parts)] if len(parts) == 2:
            return parts[1] is causal_mask_function and parts[0].__qualname__.startswith(f"{window}.")
    return False


AttentionInterface.register("tqkv", attention)
AttentionMaskInterface.register("tqkv", mask)
