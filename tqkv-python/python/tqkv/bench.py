"""``python -m tqkv.bench``: a decoding step's attention, through all layers, on one machine in one run: torch's over an uncompressed
cache, and tqkv's over a compressed one. Wall time in milliseconds, the median of several steps; JSON by ``--json``.

On a GPU torch runs eagerly and in a CUDA graph, and FlashInfer where it is installed. With ``--model`` also a step of a whole Llama of these
sizes and random weights in transformers, with its default cache and with ``tqkv.transformers.TqkvCache``."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any, Callable

import torch

import tqkv


def measure(step: Callable[[], Any], device: str, times: int) -> float:
    """The median wall time of a call in milliseconds, after some that do not count."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    taken = []
    for i in range(times + 3):
        wait()
        start = time.perf_counter()
        step()
        wait()
        taken.append((time.perf_counter() - start) * 1e3)
    return statistics.median(taken[3:])


class Shape:
    """Of the model and of the batch."""

    def __init__(self, args: argparse.Namespace, context: int, batch: int) -> None:
        self.layers, self.heads, self.kv_heads, self.head_dim = args.layers, args.heads, args.kv_heads, args.head_dim
        self.context, self.batch = context, batch
        self.device, self.dtype = args.device, getattr(torch, args.dtype)

    def normals(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)


def sdpa(shape: Shape) -> Callable[[], Any]:
    """torch's attention over caches that are there already, the new token's K and V written in."""
    size = (shape.batch, shape.kv_heads, shape.context, shape.head_dim)
    caches = [(shape.normals(*size), shape.normals(*size)) for _ in range(shape.layers)]
    q = shape.normals(shape.batch, shape.heads, 1, shape.head_dim)
    new = shape.normals(shape.batch, shape.kv_heads, 1, shape.head_dim)

    def step() -> None:
        for k, v in caches:
            k[:, :, -1:], v[:, :, -1:] = new, new
            torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return step


def graphed(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step in a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def flashinfer(shape: Shape) -> Callable[[], Any]:
    """FlashInfer's paged decoding, planned once."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page, pages = 16, -(-shape.context // 16)
    caches = [
        shape.normals(shape.batch * pages, 2, page, shape.kv_heads, shape.head_dim) for _ in range(shape.layers)
    ]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(256 << 20, dtype=torch.uint8, device=shape.device), "NHD")
    number = lambda *x: torch.tensor(x, dtype=torch.int32, device=shape.device)  # noqa: E731
    starts = number(*range(0, (shape.batch + 1) * pages, pages))
    last = number(*[(shape.context - 1) % page + 1] * shape.batch)
    wrapper.plan(
        starts, number(*range(shape.batch * pages)), last, shape.heads, shape.kv_heads, shape.head_dim, page,
        q_data_type=shape.dtype, kv_data_type=shape.dtype,
    )
    q = shape.normals(shape.batch, shape.heads, shape.head_dim)

    def step() -> None:
        for cache in caches:
            wrapper.run(q, cache)

    return step


def compressed(shape: Shape, codec: str) -> Callable[[], Any]:
    """tqkv's step: the new token's K and V encoded, attention over all; the token is taken back after each."""
    device = tqkv.Device()
    if shape.device == "cuda":
        device = tqkv.Device.cuda_on_stream(torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream)
    cache = tqkv.KvCache(
        device, shape.layers, shape.kv_heads, shape.head_dim, codec, capacity=shape.batch * (shape.context + 64)
    )
    rows = [cache.add_sequence() for _ in range(shape.batch)]
    for start in range(0, shape.context - 1, 4096):
        n = min(4096, shape.context - 1 - start)
        x = shape.normals(n, shape.kv_heads, shape.head_dim)
        for row in rows:
            with cache.step({row: n}) as filling:
                for layer in range(shape.layers):
                    filling.append(layer, x, x)
    tokens = {row: 1 for row in rows}
    q = shape.normals(shape.batch, shape.heads, shape.head_dim)
    new = shape.normals(shape.batch, shape.kv_heads, shape.head_dim)
    out = torch.empty_like(q)

    def step() -> None:
        with cache.step(tokens) as one:
            for layer in range(shape.layers):
                one.append_and_attend(layer, new, new, q, out=out)
        for row in rows:
            cache.truncate(row, shape.context - 1)

    return step


def llama(args: argparse.Namespace) -> Any:
    """A model of random weights."""
    import transformers

    hidden = args.heads * args.head_dim
    config = transformers.LlamaConfig(
        vocab_size=32000, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim,
        max_position_embeddings=max(context for context, _ in args.shapes),
    )
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def decoding(model: Any, context: int, batch: int, codec: str | None) -> Callable[[], Any]:
    """One new token a row after a prompt, taken back after each step; over transformers' own cache if there is no codec."""
    from transformers import DynamicCache

    from tqkv.transformers import TqkvCache

    model.set_attn_implementation("sdpa" if codec is None else "tqkv")
    cache = DynamicCache(config=model.config) if codec is None else TqkvCache(model.config, codec, capacity=batch * (context + 64))
    tokens = torch.randint(0, model.config.vocab_size, (batch, context), device=model.device)
    for part in tokens[:, :-1].split(512, dim=1):
        model(part, past_key_values=cache, logits_to_keep=1)

    def step() -> None:
        model(tokens[:, -1:], past_key_values=cache)
        cache.crop(-1)

    return step


def rows(args: argparse.Namespace):
    """Every measurement: context, batch, what, and how it went."""
    model = llama(args) if args.model else None
    for context, batch in args.shapes:
        shape = Shape(args, context, batch)
        ways: list[tuple[str, Callable[[], Callable[[], Any]]]] = [(f"torch {args.dtype}", lambda: sdpa(shape))]
        if args.device == "cuda":
            ways.append((f"torch {args.dtype}, graph", lambda: graphed(sdpa(shape))))
            ways.append((f"flashinfer {args.dtype}", lambda: flashinfer(shape)))
        ways += [(f"tqkv {codec}", lambda codec=codec: compressed(shape, codec)) for codec in args.codecs]
        for codec in [None, *args.codecs] if args.model else []:
            name = f"model, {'default cache' if codec is None else f'tqkv {codec}'}"
            ways.append((name, lambda codec=codec: decoding(model, context, batch, codec)))
        for name, make in ways:
            row = {"context": context, "batch": batch, "layers": args.layers, "what": name}
            try:
                with torch.inference_mode():
                    row["ms_wall"] = measure(make(), args.device, args.times)
            except ImportError as missing:
                row["skipped"] = str(missing)
            except (RuntimeError, torch.OutOfMemoryError, tqkv.Error) as failed:
                row["failed"] = str(failed)
            yield row


def shape(text: str) -> tuple[int, int]:
    context, _, batch = text.partition("x")
    return int(context), int(batch or 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tqkv.bench", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--codecs", nargs="+", default=["f16", "k8v8", "k4v4"], metavar="CODEC")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(1024, 1), (8192, 1)], metavar="CONTEXTxBATCH")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--model", action="store_true", help="also a whole model of random weights")
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print(f"{'context':>8} x batch  {'what':<24} {'ms a step':>10}")
    for row in rows(args):
        if args.json:
            print(json.dumps(row), flush=True)
        else:
            took = f"{row['ms_wall']:10.3f}" if "ms_wall" in row else row.get("skipped", row.get("failed"))
            print(f"{row['context']:>8} x {row['batch']:<5}  {row['what']:<24} {took}", flush=True)


if __name__ == "__main__":
    main()
