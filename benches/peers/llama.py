#!/usr/bin/env python3
"""llama.cpp beside tqkv on the CPU: the same GGUF file, the same text, the same threads.

    python3 -m venv /tmp/peers && /tmp/peers/bin/pip install llama-cpp-python
    cargo build --release -p tqkv-cli
    /tmp/peers/bin/python benches/peers/llama.py --model M.gguf --text T.txt --tqkv target/release/tqkv

Each row: the text's first N - 32 tokens as the prompt (512 at a time), then 32 tokens one by one, the likeliest each time. Tokens a second of
both. llama.cpp with flash attention and an f16 or q8_0 cache; tqkv with the codecs of --codec. JSON, one object a row.
"""

import argparse
import ctypes
import json
import os
import subprocess
import tempfile
import time

GENERATED = 32
CHUNK = 512


def tokenize(llama, vocab, text, room):
    buffer = (llama.llama_token * room)()
    count = llama.llama_tokenize(vocab, text, len(text), buffer, room, True, False)
    if count < 0:
        raise SystemExit(f"the text has {-count} tokens, expected at most {room}")
    return list(buffer[:count])


def run(llama, context, tokens):
    """Decodes all in one batch of one sequence; logits of the last are computed."""
    array = (llama.llama_token * len(tokens))(*tokens)
    if llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))):
        raise SystemExit("llama_decode failed")


def likeliest(llama, context, vocab_size):
    logits = llama.llama_get_logits_ith(context, -1)
    values = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float * vocab_size)).contents
    return max(range(vocab_size), key=values.__getitem__)


def measure_llama(llama, model, prompt, positions, threads, cache_type):
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = positions, CHUNK, CHUNK
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = 1  # enabled
    params.type_k = params.type_v = {"f16": 1, "q8_0": 8}[cache_type]
    context = llama.llama_init_from_model(model, params)
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    started = time.perf_counter()
    for at in range(0, len(prompt), CHUNK):
        run(llama, context, prompt[at : at + CHUNK])
    token = likeliest(llama, context, vocab_size)
    prompt_time, decode_time, tokens = time.perf_counter() - started, 0.0, [token]
    for _ in range(GENERATED - 1):
        started = time.perf_counter()
        run(llama, context, [token])
        # Reading the logits waits for them. Python's search for the largest is not counted.
        llama.llama_get_logits_ith(context, -1)
        decode_time += time.perf_counter() - started
        token = likeliest(llama, context, vocab_size)
        tokens.append(token)
    llama.llama_free(context)
    return len(prompt) / prompt_time, (GENERATED - 1) / decode_time


def measure_tqkv(arguments, text, codec):
    with tempfile.NamedTemporaryFile("wb", suffix=".txt") as file:
        file.write(text)
        file.flush()
        command = [arguments.tqkv, "generate", "--model", arguments.model, "--prompt-file", file.name, "--codec", codec]
        command += ["--max-tokens", str(GENERATED), "--temperature", "0", "--json"]
        environment = {**os.environ, "RAYON_NUM_THREADS": str(arguments.threads)}
        report = json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    return report["prompt_tokens_per_second"], report["tokens_per_second"], report["prompt_tokens"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--tqkv", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--positions", type=int, nargs="+", default=[512, 8192])
    parser.add_argument("--codec", nargs="*", default=["f16", "k8v8", "k4v4"])
    arguments = parser.parse_args()

    import llama_cpp as llama

    llama.llama_backend_init()
    silent = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silent, None)
    model = llama.llama_model_load_from_file(arguments.model.encode(), llama.llama_model_default_params())
    vocab = llama.llama_model_get_vocab(model)
    with open(arguments.text, "rb") as file:
        text = file.read()

    def row(who, cache, positions, tokens, rates):
        names = ("prompt_tokens_per_second", "tokens_per_second")
        rates = {name: round(rate, 1) for name, rate in zip(names, rates)}
        common = {"who": who, "cache": cache, "positions": positions, "prompt_tokens": tokens}
        print(json.dumps({**common, **rates, "threads": arguments.threads}), flush=True)

    for positions in arguments.positions:
        # As much of the text as has the tokens, by halving.
        low, high = 0, len(text)
        while low < high:
            middle = (low + high + 1) // 2
            tokens = len(tokenize(llama, vocab, text[:middle], middle + 8))
            low, high = (middle, high) if tokens <= positions - GENERATED else (low, middle - 1)
        part = text[:low].decode(errors="ignore").encode()
        prompt = tokenize(llama, vocab, part, len(part) + 8)
        for cache in ["f16", "q8_0"]:
            rates = measure_llama(llama, model, prompt, positions, arguments.threads, cache)
            row("llama.cpp", cache, positions, len(prompt), rates)
        for codec in arguments.codec:
            *rates, tokens = measure_tqkv(arguments, part, codec)
            row("tqkv", codec, positions, tokens, rates)


if __name__ == "__main__":
    main()
