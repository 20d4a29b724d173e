"""PyTorch's attention over an f16 cache: what `tqkv bench --device cuda` is compared with.

    python benches/peers/torch_f16.py [SHAPE...]

Shapes are those of `tqkv bench --shape`: BATCHxHEADS/KV_HEADSxHEAD_DIMxCONTEXT. Prints one JSON object a shape, with tqkv's fields.
The faster of two calls of scaled_dot_product_attention (FLASH_ATTENTION backend: enable_gqa, or the head group as queries) counts;
CUDA graph replays, caches larger than the L2 in turn, the median of 30 bursts after a pause, then the mean of half a second. Sequences
of different lengths are padded to the longest, as PyTorch needs them. Needs PyTorch with CUDA and nothing else.
"""
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = ["8x32/8x128x32768", "1x32/8x128x131072", "32x32/8x128x8192", "8x64/8x128x32768", "8x16/8x256x16384", "1x32/8x128x8192",
          "64x32/8x128x16384"]
COLD_BYTES = 400_000_000


def graph_of(launch, n):
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launch(0)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(n):
                launch(i)
    return graph


def time_graph(graph, n):
    """(median of bursts, sustained), ms a launch."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(33):
        torch.cuda.synchronize()
        time.sleep(0.004)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / n)
    burst = sorted(times[3:])[15]
    count = max(1, int(500 / (burst * n)))
    start.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return burst, start.elapsed_time(end) / (n * count)


def read_bandwidth():
    """Bytes a second of a sum over 2 GiB."""
    x = torch.randint(-128, 127, (1 << 29,), device="cuda", dtype=torch.int32)
    return x.numel() * 4 / time_graph(graph_of(lambda i: x.sum(), 4), 4)[0] * 1e3


def error(q, k, v, out):
    """Relative difference to float64, of the first sequence's first head."""
    q, k, v = (x[0, 0].double() for x in (q, k, v))
    want = torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v
    return ((out[0, 0].double() - want).norm() / want.norm()).item()


def measure(shape, bandwidth):
    batch, heads, d, length = shape.split("x")
    heads, kv_heads = map(int, heads.split("/"))
    batch, d, length = int(batch), int(d), int(length)
    size = batch * kv_heads * length * d * 2 * 2
    caches = max(1, min(64, -(-COLD_BYTES // size)))
    kv = [[torch.randn(batch, kv_heads, length, d, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in range(caches)]
    q = torch.randn(batch, heads, 1, d, device="cuda", dtype=torch.float16)
    grouped = q.view(batch, kv_heads, heads // kv_heads, d)
    n = 64 if size < 2e8 else 10
    calls = [lambda i: F.scaled_dot_product_attention(q, *kv[i % caches], enable_gqa=True),
             lambda i: F.scaled_dot_product_attention(grouped, *kv[i % caches])]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        burst, sustained = min(time_graph(graph_of(call, n), n) for call in calls)
        off = error(q, *kv[0], calls[0](0))
    rate = size / burst * 1e3
    print(json.dumps({"op": "attention_torch", "shape": shape, "codec": "f16", "ms": burst, "ms_sustained": sustained, "bytes": size,
                      "gb_per_s": rate / 1e9, "share_of_bandwidth": rate / bandwidth, "max_rel_error": off}), flush=True)


if __name__ == "__main__":
    print(f"# {torch.cuda.get_device_name()}, PyTorch {torch.__version__}", file=sys.stderr)
    bandwidth = read_bandwidth()
    for shape in sys.argv[1:] or SHAPES:
        measure(shape, bandwidth)
        torch.cuda.empty_cache()
