"""A decoding step of all layers with PyTorch's attention over an f16 cache: what `tqkv bench --op step` is compared with.

    python benches/peers/torch_step.py [--layers N] [SHAPE...]

Shapes are those of `tqkv bench --shape`: BATCHxHEADS/KV_HEADSxHEAD_DIMxCONTEXT. A layer writes one token a sequence into its cache (as a
static cache does) and attends over it with scaled_dot_product_attention (FLASH_ATTENTION backend, enable_gqa). Prints one JSON object a
shape: `ms_wall` is eager (calls, then waiting), `ms_replay` the replay of a CUDA graph of the step, both by the clock of the host; medians.
Needs PyTorch with CUDA and nothing else.
"""
import json
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPES = ["1x32/8x128x1024", "1x32/8x128x32768", "8x32/8x128x8192", "64x32/8x128x2048"]
WARM, STEPS = 5, 41


def median_ms(run):
    times = []
    for _ in range(WARM + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return sorted(times[WARM:])[STEPS // 2]


def measure(shape, layers):
    batch, heads, d, length = shape.split("x")
    heads, kv_heads = map(int, heads.split("/"))
    batch, d, length = int(batch), int(d), int(length)
    new = dict(device="cuda", dtype=torch.float16)
    caches = [[torch.randn(batch, kv_heads, length, d, **new) for _ in range(2)] for _ in range(layers)]
    k, v = (torch.randn(batch, kv_heads, 1, d, **new) for _ in range(2))
    q = torch.randn(batch, heads, 1, d, **new)
    out = [None] * layers

    def step():
        for layer, (keys, values) in enumerate(caches):
            keys[:, :, -1:].copy_(k)
            values[:, :, -1:].copy_(v)
            out[layer] = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        eager = median_ms(step)
        want = torch.softmax(q[0, 0].double() @ caches[-1][0][0, 0].double().T / d ** 0.5, -1) @ caches[-1][1][0, 0].double()
        error = ((out[-1][0, 0].double() - want).norm() / want.norm()).item()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                step()
        replay = median_ms(graph.replay)
    print(json.dumps({"op": "step_torch", "shape": shape, "codec": "f16", "layers": layers, "ms_wall": eager, "ms_replay": replay,
                      "max_rel_error": error}), flush=True)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    layers = 32
    if arguments[:1] == ["--layers"]:
        layers, arguments = int(arguments[1]), arguments[2:]
    print(f"# {torch.cuda.get_device_name()}, PyTorch {torch.__version__}", file=sys.stderr)
    for shape in arguments or SHAPES:
        measure(shape, layers)
        torch.cuda.empty_cache()
