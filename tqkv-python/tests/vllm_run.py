"""One run of vLLM, in a process of its own: options and prompts as JSON on standard input, what came of it as JSON in the file that is named.
And `run`, which starts it."""

import json
import os
import pathlib
import random
import subprocess
import sys

MODEL = pathlib.Path(__file__).parents[2] / "tqkv-cli" / "assets" / "byte-llama-4m"
TEXT = "In the beginning of the year there was a great deal of snow upon the hills, and the people of the village said "
IMPLEMENTATION = "tqkv.vllm.backend.TqkvImpl"


def prompts(n, longest, seed=7):
    draw = random.Random(seed)
    text = (TEXT * (longest // len(TEXT) + 2)).encode()
    lengths = [1, longest] + [int(longest ** draw.random()) for _ in range(n - 2)]
    return [list(text[(at := draw.randrange(len(TEXT))) : at + length]) for length in lengths]


def run(tmp_path, prompts, codec=None, new=32, rounds=1, environment=None, calibration=None, **options):
    """The run's results, and what it logged."""
    options = {"model": str(MODEL)} | options
    if codec is not None:
        asked = {"codec": codec} | ({} if calibration is None else {"calibration": str(calibration)})
        options = {"attention_backend": "CUSTOM", "additional_config": {"tqkv": asked}} | options
    out = tmp_path / "out.json"
    asked = json.dumps({"options": options, "prompts": prompts, "new": new, "rounds": rounds})
    done = subprocess.run(
        [sys.executable, __file__, str(out)], input=asked, capture_output=True, text=True,
        env=os.environ | (environment or {}), timeout=900,
    )
    log = done.stdout + done.stderr
    return (json.loads(out.read_text()) if done.returncode == 0 else None), log


def tokens(result, log):
    assert result is not None, log[-4000:]
    return result["rounds"][0]["tokens"]


def implementations(worker):
    """The class of attention in every layer of a worker."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [f"{type(layer.impl).__module__}.{type(layer.impl).__name__}" for layer in layers]


ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def of_tqkv(worker):
    """The shapes of the whole graphs of a worker (sequences, tokens, new tokens of a sequence), and how many tables, lengths and slots on the
    device were out of range."""
    from tqkv.vllm.backend import slots_out_of_range

    builders = [group.get_metadata_builder(0) for groups in worker.model_runner.attn_groups for group in groups]
    captured = {key: batches for builder in builders for key, batches in builder.captured.items()}
    counts = [batch.out_of_range for batches in captured.values() for batch in batches.values()]
    return {
        "graphs": sorted({key[:3] for key in captured}),
        "out_of_range": sum(counts) + slots_out_of_range(worker.model_runner.device).item(),
    }


def main(out):
    os.environ |= ENVIRONMENT | os.environ
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    llm = LLM(
        **{"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16, "seed": 0}
        | {"enforce_eager": True, "enable_prefix_caching": False}
        | asked["options"]
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["new"], detokenize=False, ignore_eos=True)
    rounds = []
    for _ in range(asked.get("rounds", 1)):
        outputs = llm.generate([{"prompt_token_ids": p} for p in asked["prompts"]], sampling, use_tqdm=False)
        rounds.append({"tokens": [list(o.outputs[0].token_ids) for o in outputs], "cached": [o.num_cached_tokens for o in outputs]})
    config_of_all = llm.llm_engine.vllm_config
    config = config_of_all.cache_config
    blocks = config.num_gpu_blocks
    with open(out, "w") as file:
        json.dump(
            {
                "rounds": rounds,
                "implementations": llm.collective_rpc(implementations),
                "of_tqkv": llm.collective_rpc(of_tqkv) if "tqkv" in config_of_all.additional_config else None,
                "positions": blocks * config.block_size if blocks else None,
            },
            file,
        )


if __name__ == "__main__":
    main(sys.argv[1])
