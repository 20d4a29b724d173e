"""One run of vLLM: options and prompts as JSON on standard input, what came of it as JSON in the file that is named."""

import json
import os
import sys

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def implementations(worker):
    """The class of attention in every layer of a worker."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    return [f"{type(layer.impl).__module__}.{type(layer.impl).__name__}" for layer in layers]


def main(out):
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
    config = llm.llm_engine.vllm_config.cache_config
    blocks = config.num_gpu_blocks
    with open(out, "w") as file:
        json.dump(
            {
                "rounds": rounds,
                "implementations": llm.collective_rpc(implementations),
                "positions": blocks * config.block_size if blocks else None,
            },
            file,
        )


if __name__ == "__main__":
    main(sys.argv[1])
