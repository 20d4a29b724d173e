"""PyTorch's attention over f16 for a prompt behind a history: what `tqkv bench --device cuda --op prefill` is compared with.

    python benches/peers/torch_prefill.py [PROMPTxHISTORY...]

32 query heads, 8 KV heads, head_dim 128, causal. Prints one JSON object a shape and kernel (FLASH_ATTENTION, and CUDNN_ATTENTION where there is no history:
behind one PyTorch 2.11 gives it a mask, which is another kernel), with tqkv's fields `op`, `ms` and `tflops`: the median of 9 bursts. Needs PyTorch with CUDA and nothing else.
"""
import json
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
SHAPES = ["2048x0", "8192x0", "32768x0", "2048x32768"]


def milliseconds(call):
    call()
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    n = max(1, min(20, int(20 / max(start.elapsed_time(end), 0.01))))
    times = []
    for _ in range(9):
        start.record()
        for _ in range(n):
            call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / n)
    return sorted(times)[4]


def measure(prompt, history):
    q = torch.randn(1, HEADS, prompt, HEAD_DIM, device="cuda", dtype=torch.float16)
    k, v = (torch.randn(1, KV_HEADS, prompt + history, HEAD_DIM, device="cuda", dtype=torch.float16) for _ in range(2))
    mask = {"is_causal": True} if history == 0 else {"attn_mask": causal_lower_right(prompt, prompt + history)}
    kernels = [SDPBackend.FLASH_ATTENTION] + [SDPBackend.CUDNN_ATTENTION] * (history == 0)
    flops = 4 * HEADS * HEAD_DIM * (prompt * history + prompt * (prompt + 1) // 2)
    for kernel in kernels:
        with sdpa_kernel(kernel):
            ms = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask))
        print(json.dumps({"op": "prefill", "what": f"PyTorch {torch.__version__}, {kernel.name}", "prompt": prompt, "history": history,
                          "ms": round(ms, 4), "tflops": round(flops / ms / 1e9, 1)}), flush=True)


if __name__ == "__main__":
    for shape in sys.argv[1:] or SHAPES:
        measure(*map(int, shape.split("x")))
