"""Decoding in vLLM by the host's clock: a Llama-3-8B-shaped model of random bf16 weights, over 16 GiB of cache.

    python benches/peers/vllm_decode.py '{"attention_backend": "TRITON_ATTN"}' 1x32768 16x8192
    python benches/peers/vllm_decode.py '{"attention_backend": "CUSTOM", "additional_config": {"tqkv": {"codec": "k4v4"}}}' 1x32768 16x8192

Options are those of vllm.LLM, shapes are requests x positions. Prints a line of JSON: how many tokens the cache holds, and of each shape the
milliseconds of a step and the tokens a second. Prompts are in the prefix cache when the clock runs, and a step is the difference of a
long and a short run by their number of steps. Processes side by side measure one after the other if VLLM_DECODE_LOCK names a file."""

import contextlib
import fcntl
import json
import os
import random
import sys
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_ALLOW_INSECURE_SERIALIZATION="1")
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHORT, LONG, RUNS = 8, 72, 3


def implementations(worker):
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return sorted({type(layer.impl).__name__ for layer in layers})


@contextlib.contextmanager
def alone():
    with open(os.environ.get("VLLM_DECODE_LOCK", os.devnull), "w") as file:
        if file.name != os.devnull:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(options, shapes):
    from vllm import LLM, SamplingParams

    shapes = [tuple(map(int, shape.split("x"))) for shape in shapes]
    with tempfile.TemporaryDirectory() as folder:
        with open(f"{folder}/config.json", "w") as file:
            json.dump(MODEL, file)
        most = max(n for n, _ in shapes)
        llm = LLM(
            folder,
            **{"load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "enable_prefix_caching": True}
            | {"kv_cache_memory_bytes": 16 << 30, "gpu_memory_utilization": 0.2, "max_num_batched_tokens": 8192, "max_num_seqs": most}
            | {"max_model_len": max(n for _, n in shapes), "compilation_config": {"cudagraph_capture_sizes": sorted({n for n, _ in shapes})}}
            | options,
        )

    def seconds(prompts, new):
        sampling = SamplingParams(temperature=0, max_tokens=new, detokenize=False, ignore_eos=True)
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return time.perf_counter() - began

    config = llm.llm_engine.vllm_config
    result = {
        "options": options,
        "implementations": llm.collective_rpc(implementations),
        "graphs": str(config.compilation_config.cudagraph_mode),
        "tokens_held": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
    }
    for requests, positions in shapes:
        draw = random.Random(positions)
        prompts = [[draw.randrange(3, 128000) for _ in range(positions - 2 * LONG)] for _ in range(requests)]
        with alone():
            prefill = seconds(prompts, 1)
            seconds(prompts, SHORT)
            steps = sorted((seconds(prompts, LONG) - seconds(prompts, SHORT)) / (LONG - SHORT) for _ in range(RUNS))
        step = steps[RUNS // 2]
        result[f"{requests}x{positions}"] = {
            "prefill_s": round(prefill, 2), "step_ms": round(1e3 * step, 3), "least_ms": round(1e3 * steps[0], 3),
            "tokens_per_s": round(requests / step, 1),
        }  # fmt: skip
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
