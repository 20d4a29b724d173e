"""vLLM's attention backend over tqkv's bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

import tqkv

from .config import asked, rank

logger = init_logger(__name__)


@functools.cache
def device_of(place: torch.device) -> tqkv.Device:
    """The device of this process's layers and plans."""
    return tqkv.Device(f"cuda:{place.index or 0}" if place.type == "cuda" else "cpu")


@functools.cache
def slots_out_of_range(place: torch.device) -> torch.Tensor:
    """How many of vLLM's slots no layer had: int32 [1]."""
    return torch.zeros(1, dtype=torch.int32, device=place)


def parts(kv_cache: torch.Tensor, widths: Sequence[int], dense: bool) -> list[torch.Tensor | None]:
    """A layer's bytes, [pages, kv_heads, page_size, bytes], as as many tensors of rows of these widths: one behind the other in each page, or,
    if they must be dense, in the whole layer."""
    pages, heads, slots, content = kv_cache.shape
    if kv_cache.dtype != torch.uint8 or kv_cache.stride()[1:] != (slots * content, content, 1):
        raise ValueError(f"the cache is {kv_cache.dtype} with strides {kv_cache.stride()}: expected dense pages of bytes")
    if dense and not kv_cache.is_contiguous():
        raise ValueError(f"the cache has strides {kv_cache.stride()}: expected a dense layer on CUDA")
    page = kv_cache.as_strided((pages, heads * slots * content), (kv_cache.stride(0), 1))
    at, views = 0, []
    for width in widths:
        size = heads * slots * width
        part = page.flatten()[pages * at : pages * (at + size)].view(pages, size) if dense else page[:, at : at + size]
        views.append(part.unflatten(1, (heads, slots, width)) if width else None)
        at += size
    return views


class TqkvBackend(AttentionBackend):
    """Pages of bytes, [kv_heads, page_size, bytes]: codes and scales of keys, then of values, each dense within a page. On CUDA each is dense
    within a layer: the layer has as many pages of as many bytes, but what is in one lies apart."""

    # `forward` encodes the new tokens and attends, with one plan.
    forward_includes_kv_cache_update = True
    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes = ["auto"]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"  # A member of AttentionBackendEnum.

    @staticmethod
    def get_impl_cls() -> type[TqkvImpl]:
        return TqkvImpl

    @staticmethod
    def get_builder_cls() -> type[TqkvBuilder]:
        return TqkvBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None):
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls):
        # A layer is one run of bytes, or at least a page of it is.
        layouts = (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)
        return layouts if current_platform.device_type == "cpu" else layouts[:1]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        if spec.state_content_bytes is not None:
            return spec
        content = sum(map(sum, asked().codec.row_bytes(spec.head_size)))
        return replace(spec, dtype=torch.uint8, state_content_bytes=content)


class TqkvMetadata(AttentionMetadata):
    """A step, which all layers of a group share: where their new tokens go, and the batch that they attend over."""

    def __init__(self, tokens: int, slots: torch.Tensor, make: Callable[[int], tqkv.Batch]):
        self.tokens, self.slots = tokens, slots[:tokens]
        self._make, self._batch = make, None

    def batch(self, pages: int) -> tqkv.Batch:
        """The batch over pools of so many pages. The step's first layer brings it up to date with vLLM's tables and lengths: in a graph, if that
        is captured, so that nothing else is to be done before a replay."""
        if self._batch is None:
            self._batch = self._make(pages)
            tqkv.refresh(self._batch)
        return self._batch


def refuse_on_cuda(vllm_config) -> None:
    """Fails for what has not run on a GPU, or cannot: a KV connector moves pages that are runs of bytes; and with drafts the host's lengths,
    of which batches with prompts are made, are bounds."""
    parallel = vllm_config.parallel_config
    refused = {
        "KV connectors": vllm_config.kv_transfer_config is not None,
        "speculative decoding": vllm_config.speculative_config is not None,
        "several ranks": parallel.tensor_parallel_size * parallel.pipeline_parallel_size > 1,
    }
    if any(refused.values()):
        raise NotImplementedError(f"tqkv on CUDA has no {', '.join(name for name, asked in refused.items() if asked)}")


class TqkvBuilder(AttentionMetadataBuilder[TqkvMetadata]):
    """Steps on the CPU: of the host's lengths and tables. On CUDA tables are read on the device, and so are lengths in whole graphs of
    decoding, whose batches are kept: a replay reads them through vLLM's own tensors."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.device_of_tqkv = device_of(torch.device(device))
        self.page_size = kv_cache_spec.block_size
        self.longest = vllm_config.model_config.max_model_len
        self.captured: dict[tuple, dict[int, tqkv.Batch]] = {}
        if self.device_of_tqkv.kind == "cuda":
            refuse_on_cuda(vllm_config)

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec) -> AttentionCGSupport:
        on_cuda = current_platform.device_type == "cuda"
        return AttentionCGSupport.UNIFORM_BATCH if on_cuda else AttentionCGSupport.NEVER

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> TqkvMetadata:
        m = common_attn_metadata
        if self.device_of_tqkv.kind == "cpu":
            return self.on_the_host(m)
        key = self.key_of(m)
        if key in self.captured:
            return TqkvMetadata(m.num_actual_tokens, m.slot_mapping, functools.partial(self.kept, key, m))
        starts = m.query_start_loc_cpu[: m.num_reqs + 1]
        lens = m.seq_lens_cpu_upper_bound[: m.num_reqs]
        tables = m.block_table_tensor[: m.num_reqs]
        make = lambda pages: tqkv.Batch.with_tables(  # noqa: E731
            self.device_of_tqkv, self.page_size, tables, pages, lens, starts.diff()
        )
        return TqkvMetadata(int(starts[-1]), m.slot_mapping, make)

    def build_for_cudagraph_capture(self, common_attn_metadata) -> TqkvMetadata:
        self.captured.setdefault(self.key_of(common_attn_metadata), {})
        return self.build(0, common_attn_metadata)

    @staticmethod
    def key_of(m) -> tuple:
        """What two steps have in common that one graph serves: how many they are, and vLLM's tensors."""
        places = (x.data_ptr() for x in (m.block_table_tensor, m.seq_lens, m.query_start_loc))
        return m.num_reqs, m.num_actual_tokens, m.max_query_len, *places

    def kept(self, key, m, pages: int) -> tqkv.Batch:
        """The batch of whole graphs of this shape: made in the run before the capture."""
        batches = self.captured[key]
        if pages not in batches:
            batches[pages] = self.on_the_device(m, pages)
        return batches[pages]

    def on_the_device(self, m, pages: int) -> tqkv.Batch:
        n = m.num_reqs
        return tqkv.Batch.on_device(
            self.device_of_tqkv,
            self.page_size,
            m.block_table_tensor[:n],
            pages,
            m.seq_lens[:n],
            m.query_start_loc[: n + 1],
            tokens=m.num_actual_tokens,
            most_new=m.max_query_len,
            most_len=self.longest,
        )

    def on_the_host(self, m) -> TqkvMetadata:
        starts = m.query_start_loc_cpu[: m.num_reqs + 1]
        lens = m.seq_lens[: m.num_reqs].tolist()
        width = max(1, -(-max(lens, default=1) // self.page_size))
        batch = tqkv.Batch(self.device_of_tqkv, self.page_size, lens, starts.diff(), m.block_table_tensor[: m.num_reqs, :width])
        return TqkvMetadata(batch.tokens, m.slot_mapping, lambda pages: batch)


class TqkvImpl(AttentionImpl[TqkvMetadata]):
    """Attention of one layer."""

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads=None,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type=AttentionType.DECODER,
        kv_sharing_target_layer_name=None,
        sinks=None,
        **kwargs,
    ):
        refused = {
            "alibi": alibi_slopes is not None,
            f"attention of {attn_type}": attn_type != AttentionType.DECODER,
            f"kv_cache_dtype {kv_cache_dtype}": kv_cache_dtype != "auto",
        }
        if any(refused.values()):
            raise NotImplementedError(f"tqkv has no {', '.join(name for name, asked in refused.items() if asked)}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads or num_heads, kv_cache_dtype
        self.window, self.softcap = sliding_window, logits_soft_cap or None
        self.sinks = None if sinks is None else sinks.detach().float()
        self.source = kv_sharing_target_layer_name
        self.codec, self.calibration = asked().codec, asked().calibration
        self.rank = rank()
        self.pools: tuple[tuple, tqkv.PagePool, tqkv.PagePool] | None = None
        rows = self.codec.row_bytes(head_size)
        logger.info_once("tqkv stores keys and values as %s: %d bytes a token and KV head", self.codec, sum(map(sum, rows)))

    def channels_of(self, layer_name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The calibration's shift and scale of the keys of this layer, and of this process's heads."""
        if self.calibration is None:
            return None
        layer = extract_layer_index(layer_name)
        shift, scale = self.calibration.channels[layer]
        (rank, ranks), total = self.rank, len(shift)
        # More processes than heads: several have the same one.
        first = rank * total // ranks
        heads = slice(first, first + max(1, total // ranks))
        return shift[heads], scale[heads]

    def pools_in(self, kv_cache: torch.Tensor, layer_name: str) -> tuple[tqkv.PagePool, tqkv.PagePool]:
        """vLLM's [pages, kv_heads, page_size, bytes] as pools of keys and of values, made once."""
        place = (kv_cache.data_ptr(), kv_cache.shape)
        if self.pools is None or self.pools[0] != place:
            device = device_of(kv_cache.device)
            widths = sum(self.codec.row_bytes(self.head_size), ())
            views = parts(kv_cache, widths, dense=device.kind == "cuda")
            sides = (self.codec.key, views[:2], self.channels_of(layer_name)), (self.codec.value, views[2:], None)
            made = []
            for name, (codes, scales), channels in sides:
                scales = None if scales is None else scales.view(torch.float16)
                made.append(tqkv.PagePool.from_arrays(device, name, self.head_size, codes, scales, channels))
            self.pools = (place, *made)
        return self.pools[1:]

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tqkv does not quantize its output")
        if attn_metadata is None:  # A run to see how much memory is needed.
            return output.fill_(0)
        n = attn_metadata.tokens
        heads = lambda x, count: x[:n].view(n, count, self.head_size)  # noqa: E731
        keys, values = self.pools_in(kv_cache, self.source or layer.layer_name)
        batch = attn_metadata.batch(keys.pages)
        if self.source is None and key is not None:
            new = [(heads(key, self.num_kv_heads), keys), (heads(value, self.num_kv_heads), values)]
            tqkv.quantize_at(new, attn_metadata.slots, out_of_range=slots_out_of_range(kv_cache.device))
        tqkv.attend(
            heads(query, self.num_heads),
            keys,
            values,
            batch,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sink_logits=self.sinks,
            out=heads(output, self.num_heads),
        )
        return output
