"""``python -m tqkv.bench``: a decoding step's attention, through all layers, on one machine in one run: torch's over an uncompressed
cache, and tqkv's over a compressed one. Wall time in milliseconds, the median of several steps; JSON by ``--json``.

On a GPU torch runs eagerly and in a CUDA graph, and FlashInfer where it is installed. With ``--model`` also a step of a whole Llama of these
sizes and random weights in transformers: over its default cache and over ``tqkv.transformers.TqkvCache``, on a GPU also in a CUDA graph (over
its static cache, and by ``tqkv.transformers.decoding_graph``), with the most memory that each took; and how far a prompt's logits are from those
over the default cache."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from typing import Any, Callable, Iterator

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
    cache = tqkv.KvCache(
        tqkv.Device(shape.device), shape.layers, shape.kv_heads, shape.head_dim, codec, capacity=shape.batch * (shape.context + 64)
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
        vocab_size=args.vocab, hidden_size=hidden, intermediate_size=7 * hidden // 2, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.kv_heads, head_dim=args.head_dim,
        max_position_embeddings=max(args.prompt, *(context for context, _ in args.shapes)),
    )
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            model = transformers.LlamaForCausalLM(config).eval()
        # Tokens outweigh what a layer adds to them, as in models that were trained.
        model.model.embed_tokens.weight.data.mul_(50)
        return model
    finally:
        torch.set_default_dtype(torch.float32)


#: Tokens that a measured model may decode: those that do not count, and the others.
ROOM = 64


def made(model: Any, codec: str | None, context: int, batch: int, static: bool = False) -> Any:
    """A cache, tqkv's or transformers' own."""
    from transformers import DynamicCache, StaticCache

    from tqkv.transformers import TqkvCache

    model.set_attn_implementation("sdpa" if codec is None else "tqkv")
    if static:
        return StaticCache(config=model.config, max_cache_len=context)
    if codec is None:
        return DynamicCache(config=model.config)
    return TqkvCache(model.config, codec, capacity=batch * (context + 64))


def decoding(model: Any, shape: Shape, codec: str | None, graph: bool) -> tuple[Callable[[], Any], Any]:
    """One new token a row up to this context, over keys and values of random numbers; and the cache."""
    from tqkv.transformers import decoding_graph

    cache = made(model, codec, shape.context, shape.batch, static=graph and codec is None)
    x = shape.normals(shape.batch, shape.kv_heads, shape.context - ROOM, shape.head_dim)
    for layer in range(shape.layers):
        cache.update(x, x, layer)
        if codec is not None:
            cache.layers[layer].flush()
    del x
    position = torch.full((shape.batch, 1), shape.context - ROOM, device=shape.device)
    tokens = torch.zeros_like(position)

    def step() -> Any:
        call = lambda: model(input_ids=tokens, position_ids=position, past_key_values=cache)  # noqa: E731
        if codec is None or not graph:
            return call()
        with decoding_graph(model):
            return call()

    return (graphed(step) if codec is None and graph else step), cache


def modelled(model: Any, shape: Shape, codec: str | None, graph: bool, times: int) -> dict[str, float]:
    """A step's time and the most memory: of torch's allocator, and tqkv's pages."""
    cuda = shape.device == "cuda"
    # Caches and their layers know each other.
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step, cache = decoding(model, shape, codec, graph)
    row = {"ms_wall": measure(step, shape.device, min(times, ROOM // 2))}
    if cuda:
        pages = cache.nbytes if codec is not None else 0
        row["gib_peak"] = (torch.cuda.max_memory_allocated() + pages) / 2**30
    return row


def lost(model: Any, codec: str, prompt: int) -> dict[str, float]:
    """How far a prompt's logits are from those over the default cache, and how often both have the same largest."""
    torch.manual_seed(1)
    tokens = torch.randint(0, model.config.vocab_size, (1, prompt), device=model.device)
    logits = []
    for codec in (None, codec):
        cache = made(model, codec, prompt, 1)
        parts = tokens.split(128, dim=1)
        logits.append(torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1).float())
    want, got = (x.log_softmax(-1) for x in logits)
    same = (want.argmax(-1) == got.argmax(-1)).float().mean()
    return {"kld": (want.exp() * (want - got)).sum(-1).mean().item(), "same_top": same.item()}


def ways(args: argparse.Namespace, model: Any, shape: Shape) -> Iterator[tuple[str, Callable[[], dict[str, float]]]]:
    """What is measured of a shape."""
    cuda = args.device == "cuda"

    def timed(make: Callable[[], Callable[[], Any]]) -> Callable[[], dict[str, float]]:
        return lambda: {"ms_wall": measure(make(), args.device, args.times)}

    if not args.only_model:
        yield f"torch {args.dtype}", timed(lambda: sdpa(shape))
        if cuda:
            yield f"torch {args.dtype}, graph", timed(lambda: graphed(sdpa(shape)))
            yield f"flashinfer {args.dtype}", timed(lambda: flashinfer(shape))
        for codec in args.codecs:
            yield f"tqkv {codec}", timed(lambda codec=codec: compressed(shape, codec))
    if model is None:
        return
    for graph in (False, True) if cuda else (False,):
        for codec in (None, *args.codecs):
            name = f"tqkv {codec}" if codec is not None else "static cache" if graph else "default cache"
            yield f"model, {name}{', graph' * graph}", lambda codec=codec, graph=graph: modelled(
                model, shape, codec, graph, args.times
            )


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every measurement: context, batch, what, and how it went."""
    model = llama(args) if args.model or args.only_model else None
    todo = [(Shape(args, *of), *way) for of in args.shapes for way in ways(args, model, Shape(args, *of))]
    if model is not None:
        prompt = Shape(args, args.prompt, 1)
        todo += [(prompt, f"logits, tqkv {codec}", lambda c=codec: lost(model, c, args.prompt)) for codec in args.codecs]
    for shape, name, way in todo:
        row = {"context": shape.context, "batch": shape.batch, "layers": args.layers, "what": name}
        try:
            with torch.inference_mode():
                row |= way()
        except ImportError as missing:
            row["skipped"] = str(missing)
        except (RuntimeError, torch.OutOfMemoryError, tqkv.Error) as failed:
            row["failed"] = " ".join(str(failed).split())[:300]
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
    parser.add_argument("--only-model", action="store_true", help="that alone")
    parser.add_argument("--vocab", type=int, default=32000, help="of the model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens after which logits are compared")
    parser.add_argument("--times", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print(f"{'context':>8} x batch  {'what':<32} {'ms a step':>10} {'GiB':>7}")
    for row in rows(args):
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        said = row.get("skipped", row.get("failed"))
        if "kld" in row:
            said = f"KLD {row['kld']:.3g}, same largest {row['same_top']:.1%}"
        if "ms_wall" in row:
            said = f"{row['ms_wall']:10.3f}" + (f" {row['gib_peak']:7.2f}" if "gib_peak" in row else "")
        print(f"{row['context']:>8} x {row['batch']:<5}  {row['what']:<32} {said}", flush=True)


if __name__ == "__main__":
    main()
