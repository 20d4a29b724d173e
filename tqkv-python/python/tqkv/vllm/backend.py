"""vLLM's attention backend over tqkv's bytes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """Pages of bytes, [kv_heads, page_size, bytes]: codes and scales of keys, then of values, each dense within a page. On CUDA, whose
    kernels take no strides, each is dense within a layer: the layer has as many pages of as many bytes, but what is in one lies apart."""

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


@dataclass
class TqkvMetadata(AttentionMetadata):
    """A step's plan, which all layers of a group share."""

    batch: tqkv.Batch
    tokens: int


class TqkvBuilder(AttentionMetadataBuilder[TqkvMetadata]):
    _cudagraph_support = AttentionCGSupport.NEVER

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.device_of_tqkv = device_of(torch.device(device))
        self.page_size = kv_cache_spec.block_size
        if device_of(torch.device(device)).kind == "cuda" and vllm_config.kv_transfer_config is not None:
            raise NotImplementedError("tqkv's pages on CUDA are no runs of bytes: a KV connector cannot move them")

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> TqkvMetadata:
        m = common_attn_metadata
        starts = m.query_start_loc_cpu[: m.num_reqs + 1]
        lens = m.seq_lens[: m.num_reqs].tolist()
        width = max(1, -(-max(lens, default=1) // self.page_size))
        pages = m.block_table_tensor[: m.num_reqs, :width]
        batch = tqkv.Batch(self.device_of_tqkv, self.page_size, lens, starts.diff(), pages)
        return TqkvMetadata(batch, batch.tokens)


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
        self.pools: tuple[int, tqkv.PagePool, tqkv.PagePool] | None = None
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
        if self.pools is None or self.pools[0] != kv_cache.data_ptr():
            device = device_of(kv_cache.device)
            widths = sum(self.codec.row_bytes(self.head_size), ())
            views = parts(kv_cache, widths, dense=device.kind == "cuda")
            sides = (self.codec.key, views[:2], self.channels_of(layer_name)), (self.codec.value, views[2:], None)
            made = []
            for name, (codes, scales), channels in sides:
                scales = None if scales is None else scales.view(torch.float16)
                made.append(tqkv.PagePool.from_arrays(device, name, self.head_size, codes, scales, channels))
            self.pools = (kv_cache.data_ptr(), *made)
        return self.pools[1:]

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale=None, output_block_scale=None
    ):
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("tqkv does not quantize its output")
        if attn_metadata is None:  # A run to see how much memory is needed.
            return output.fill_(0)
        batch, n = attn_metadata.batch, attn_metadata.tokens
        heads = lambda x, count: x[:n].view(n, count, self.head_size)  # noqa: E731
        keys, values = self.pools_in(kv_cache, self.source or layer.layer_name)
        if self.source is None and key is not None:
            tqkv.quantize(batch, [(heads(key, self.num_kv_heads), keys), (heads(value, self.num_kv_heads), values)])
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
