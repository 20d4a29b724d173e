#!/usr/bin/env python3
"""Golden logits of tqkv-candle's models: a forward pass in numpy that shares no code with the crate.

    pip install numpy safetensors gguf
    python make.py tiny              # writes tiny.safetensors: every architecture, with weights from a formula
    python make.py real FOLDER       # writes smollm2.safetensors and gemma3.safetensors from the GGUF files in FOLDER
    python make.py blocks            # writes blocks.safetensors: blocks of every quantized type and what they stand for

All in float32, attention over all positions at once, weights dequantized by the gguf package. After transformers'
modeling_*.py of each architecture, whose formulas stand beside the code.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent
F = np.float32


# --- the model -------------------------------------------------------------------------------------------------------


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True, dtype=F) + F(eps)) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def gelu_tanh(x):
    return F(0.5) * x * (1 + np.tanh(F(math.sqrt(2 / math.pi)) * (x + F(0.044715) * x * x * x)))


def inverse_frequencies(rope, dim):
    """rope: a dict as in config.json with rope_theta. Returns frequencies and the factor on sines and cosines."""
    frequencies = 1 / F(rope["rope_theta"]) ** (np.arange(0, dim, 2, dtype=F) / F(dim))
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        return frequencies / F(rope["factor"]), 1.0
    if kind == "llama3":
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        result = []
        for f in frequencies:
            wavelength = 2 * math.pi / f
            smooth = (rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]) / (
                rope["high_freq_factor"] - rope["low_freq_factor"])
            smooth = 1.0 if wavelength < high else 0.0 if wavelength > low else smooth
            result.append((1 - smooth) * f / rope["factor"] + smooth * f)
        return np.array(result, F), 1.0
    if kind == "yarn":
        factor, context = rope["factor"], rope["original_max_position_embeddings"]

        def pair(turns):
            return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

        low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        return F(frequencies / factor * ramp + frequencies * (1 - ramp)), 0.1 * math.log(factor) + 1
    if kind == "longrope":
        factor, context = rope["factor"], rope["original_max_position_embeddings"]
        return frequencies / np.array(rope["short_factor"], F), math.sqrt(1 + math.log(factor) / math.log(context))
    if kind == "divisors":
        return frequencies / np.array(rope["divisors"], F), 1.0
    assert kind == "default", kind
    return frequencies, 1.0


def rotate(x, frequencies, factor):
    """x: [tokens, heads, head_dim]; element i turns with element i + dim/2 of the first dim."""
    half = len(frequencies)
    angles = np.arange(len(x), dtype=F)[:, None] * frequencies
    cos, sin = (np.cos(angles) * F(factor))[:, None], (np.sin(angles) * F(factor))[:, None]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def attention(q, k, v, scale, softcap, window):
    tokens, heads, _ = q.shape
    groups = heads // k.shape[1]
    k, v = np.repeat(k, groups, axis=1), np.repeat(v, groups, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, k, optimize=True) * F(scale)
    if softcap:
        scores = np.tanh(scores / F(softcap)) * F(softcap)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    scores = np.where((distance >= 0) & (distance < (window or tokens)), scores, F(-np.inf))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v, optimize=True)


def forward(m, tokens, last_only=False):
    """m: a dict of hyperparameters, with a function `get` that gives tensors by their safetensors names (norms whole)."""
    get, eps = m["get"], m["eps"]
    tokens = np.asarray(tokens)
    x = get("model.embed_tokens.weight")[tokens] * F(m["embedding_scale"])
    for i in range(m["layers"]):
        def linear(name, x, i=i):
            y = x @ get(f"model.layers.{i}.{name}.weight").T
            bias = get(f"model.layers.{i}.{name}.bias")
            return y if bias is None else y + bias

        def norm(name, x, i=i):
            return rms_norm(x, get(f"model.layers.{i}.{name}.weight"), eps)

        h = norm("input_layernorm", x)
        sizes = np.cumsum([m["heads"], m["kv_heads"], m["kv_heads"]]) * m["head_dim"]
        if m["fused"]:
            q, k, v, _ = np.split(linear("self_attn.qkv_proj", h), sizes, axis=-1)
        else:
            q, k, v = (linear(f"self_attn.{n}_proj", h) for n in "qkv")
        q, k, v = (y.reshape(len(tokens), -1, m["head_dim"]) for y in (q, k, v))
        if m["qk_norms"]:
            q, k = norm("self_attn.q_norm", q), norm("self_attn.k_norm", k)
        rope = m["local_rope"] if m["local_rope"] and m["windows"][i] else m["rope"]
        frequencies = inverse_frequencies(rope, m["rotated"])
        q, k = rotate(q, *frequencies), rotate(k, *frequencies)
        h = attention(q, k, v, m["scale"], m["attention_softcap"], m["windows"][i])
        h = linear("self_attn.o_proj", h.reshape(len(tokens), -1))
        if m["post_norms"]:
            h = norm("post_attention_layernorm", h)
        x = x + h
        h = norm("pre_feedforward_layernorm" if m["post_norms"] else "post_attention_layernorm", x)
        if m["fused"]:
            gate, up = np.split(linear("mlp.gate_up_proj", h), 2, axis=-1)
        else:
            gate, up = linear("mlp.gate_proj", h), linear("mlp.up_proj", h)
        h = linear("mlp.down_proj", m["activation"](gate) * up)
        if m["post_norms"]:
            h = norm("post_feedforward_layernorm", h)
        x = x + h
    x = rms_norm(x[-1:] if last_only else x, get("model.norm.weight"), eps)
    logits = x @ get("model.embed_tokens.weight" if m["tied"] else "lm_head.weight").T
    if m["logits_softcap"]:
        logits = np.tanh(logits / F(m["logits_softcap"])) * F(m["logits_softcap"])
    return logits


# --- tiny models with weights from a formula -------------------------------------------------------------------------


def formula(name, shape, centre):
    """Multiples of 2^-10 that depend on the name alone; tests/golden.rs has the same formula."""
    mask = (1 << 64) - 1
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = ((seed ^ byte) * 0x100000001B3) & mask
    count = math.prod(shape)
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = (z >> np.uint64(40)).astype(np.float64) / (1 << 24)
    scale = 0.3 if len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
    values = np.floor((2 * unit - 1) * scale * 1024 + 0.5) / 1024
    return (values + centre).astype(F).reshape(shape)


def tiny_model(c):
    kind = c["model_type"]
    gemma = kind.startswith("gemma")
    heads, hidden, layers = c["num_attention_heads"], c["hidden_size"], c["num_hidden_layers"]
    kv_heads = c.get("num_key_value_heads", heads)
    head_dim = c.get("head_dim", hidden // heads)
    inner, vocab = c["intermediate_size"], c["vocab_size"]
    rope = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", c.get("rope_theta"))
    context = c.get("original_max_position_embeddings", c["max_position_embeddings"])
    rope.setdefault("original_max_position_embeddings", context)
    rope.setdefault("factor", c["max_position_embeddings"] / context)
    every = range(layers)
    window = c.get("sliding_window")
    windowed = {
        "mistral": lambda i: True, "phi3": lambda i: True,
        "qwen2": lambda i: c.get("use_sliding_window", False) and i >= c["max_window_layers"],
        "gemma2": lambda i: i % 2 == 0, "gemma3_text": lambda i: (i + 1) % c["sliding_window_pattern"] != 0,
    }.get(kind, lambda i: False)
    qkv_bias = kind == "qwen2" or c.get("attention_bias", False)
    shapes = {
        "self_attn.q_proj": (heads * head_dim, hidden), "self_attn.k_proj": (kv_heads * head_dim, hidden),
        "self_attn.v_proj": (kv_heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim),
        "self_attn.qkv_proj": ((heads + 2 * kv_heads) * head_dim, hidden),
        "self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
        "mlp.gate_up_proj": (2 * inner, hidden),
    }

    def get(name):
        module = name.removesuffix(".weight").removesuffix(".bias")
        if name.endswith(".bias"):
            part = module.split(".", 3)[3]
            there = qkv_bias if part[10:] in ("q_proj", "k_proj", "v_proj") else \
                c.get("attention_bias", False) if part == "self_attn.o_proj" else c.get("mlp_bias", False)
            return formula(name, shapes[part][:1], 0) if there else None
        if module in ("model.embed_tokens", "lm_head"):
            return formula(name, (vocab, hidden), 0)
        part = module.split(".", 3)[-1]
        # Gemma's files hold norms less one: there the formula's centre is 0, and the model adds 1.
        return formula(name, shapes.get(part, (hidden,)), 1 if "norm" in module else 0)

    return dict(
        get=get, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim, eps=c["rms_norm_eps"],
        embedding_scale=math.sqrt(hidden) if gemma else 1, fused=kind == "phi3",
        qk_norms=kind in ("qwen3", "gemma3_text"), post_norms=gemma, rope=rope,
        local_rope={"rope_theta": c["rope_local_base_freq"]} if kind == "gemma3_text" else None,
        rotated=int(head_dim * c.get("partial_rotary_factor", 1)), windows=[window if windowed(i) else None for i in every],
        scale=c.get("query_pre_attn_scalar", head_dim) ** -0.5, attention_softcap=c.get("attn_logit_softcapping"),
        logits_softcap=c.get("final_logit_softcapping"), activation=gelu_tanh if gemma else silu,
        tied=c.get("tie_word_embeddings", gemma))


def make_tiny():
    golden = {}
    for name, config in json.loads((HERE / "tiny.json").read_text()).items():
        logits = forward(tiny_model(config), [i * 37 % 256 for i in range(64)])
        print(f"{name}: largest logit {abs(logits).max():.3f}, mean {abs(logits).mean():.3f}")
        # Every fifth column: together with 64 positions enough to see every weight.
        golden[name] = np.ascontiguousarray(logits[:, ::5])
    save_file(golden, HERE / "tiny.safetensors")


# --- real models -----------------------------------------------------------------------------------------------------

NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}


def real_model(path):
    import gguf

    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    gemma = kind == "gemma3"

    def meta(key, default=None):
        field = reader.fields.get(f"{kind}.{key}")
        return default if field is None else field.contents()

    heads, kv_heads = meta("attention.head_count"), meta("attention.head_count_kv")
    hidden, layers = meta("embedding_length"), meta("block_count")
    head_dim = meta("attention.key_length", hidden // heads)
    names = dict(NAMES)
    if gemma:
        names |= {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
                  "post_ffw_norm": "post_feedforward_layernorm"}
    else:
        names |= {"ffn_norm": "post_attention_layernorm"}
    tensors = {}
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(F)
        part, kind_of = tensor.name.rsplit(".", 1)
        if part.startswith("blk."):
            _, layer, part = part.split(".", 2)
            if kind == "llama" and part in ("attn_q", "attn_k"):
                # llama.cpp's converter puts elements i and i + head_dim/2 of a head side by side: put them back.
                data = data.reshape(-1, head_dim // 2, 2, hidden).swapaxes(1, 2).reshape(-1, hidden)
            tensors[f"model.layers.{layer}.{names[part]}.{kind_of}"] = data
        else:
            tensors[f"{names[part]}.{kind_of}"] = data
    window = meta("attention.sliding_window")
    model = dict(
        get=tensors.get, layers=layers, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        eps=meta("attention.layer_norm_rms_epsilon"), embedding_scale=math.sqrt(hidden) if gemma else 1, fused=False,
        qk_norms=gemma, post_norms=gemma, rope={"rope_theta": meta("rope.freq_base")},
        local_rope={"rope_theta": 10000.0} if gemma else None, rotated=head_dim,
        windows=[window if gemma and (i + 1) % 6 else None for i in range(layers)],
        scale=head_dim**-0.5, attention_softcap=None, logits_softcap=None, activation=gelu_tanh if gemma else silu,
        tied="lm_head.weight" not in tensors)
    return model, reader.fields["tokenizer.ggml.tokens"].contents()


def longest_match(text, vocabulary, space):
    """Not how a tokenizer cuts a text, but words of the vocabulary all the same."""
    numbers = {token: i for i, token in enumerate(vocabulary)}
    text, tokens = text.replace(" ", space), []
    while text:
        length = next(n for n in range(min(len(text), 32), 0, -1) if text[:n] in numbers)
        tokens.append(numbers[text[:length]])
        text = text[length:]
    return tokens


TEXT = (
    "The history of astronomy begins with the first people who looked up at the sky and wondered what the lights were. "
    "They saw that some of the stars moved while others stayed in place, and they gave names to the shapes that they made. "
    "Later the Greeks measured the size of the Earth with nothing more than a stick, a well and the light of the Sun."
)
PROMPT = "The capital of France is Paris. The capital of Italy is"


def make_real(folder):
    for name, file, space, start in [
        ("smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "\u0120", []),
        ("gemma3", "gemma-3-270m-q4_k_m.gguf", "\u2581", [2]),
    ]:
        model, vocabulary = real_model(folder / file)
        tokens = (start + longest_match(TEXT, vocabulary, space))[:64]
        logits = forward(model, tokens)
        best = np.argsort(-logits, axis=-1, kind="stable")[:, :8]
        # Columns spread over the vocabulary, and the best of each position.
        columns = np.arange(0, logits.shape[1], logits.shape[1] // 48)
        greedy = start + longest_match(PROMPT, vocabulary, space)
        prompt, gaps = len(greedy), []
        for _ in range(64):
            last = forward(model, greedy, last_only=True)[0]
            order = np.argsort(-last, kind="stable")
            gaps.append(last[order[0]] - last[order[1]])
            greedy.append(int(order[0]))
        print(f"{name}: largest logit {abs(logits).max():.3f}, smallest gap {min(gaps):.4f}")
        print("".join(vocabulary[t] for t in greedy).replace(space, " "))
        save_file({
            "tokens": np.array(tokens, np.uint32), "columns": columns.astype(np.uint32),
            "logits": np.ascontiguousarray(logits[:, columns]), "largest": abs(logits).max(axis=-1),
            "best": best.astype(np.uint32), "best_logits": np.take_along_axis(logits, best, axis=-1),
            "prompt": np.array(greedy[:prompt], np.uint32), "greedy": np.array(greedy[prompt:], np.uint32),
            "gaps": np.array(gaps, F),
        }, HERE / f"{name}.safetensors")


# --- blocks ----------------------------------------------------------------------------------------------------------


def make_blocks():
    import gguf
    from gguf import GGMLQuantizationType as T

    generator = np.random.default_rng(16)
    golden = {}
    for kind in [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.Q2_K, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K]:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 256, (512 // block, size), dtype=np.uint8)
        # Where each type has its scales in halves; any other bytes are right.
        scales = {T.Q4_1: [0, 2], T.Q5_1: [0, 2], T.Q2_K: [80, 82], T.Q3_K: [108], T.Q4_K: [0, 2], T.Q5_K: [0, 2],
                  T.Q6_K: [208]}.get(kind, [0])
        for at in scales:
            halves = generator.uniform(-0.05, 0.05, len(data)).astype(np.float16)
            data[:, at:at + 2] = halves[:, None].view(np.uint8)
        golden[f"{kind.name}.bytes"] = data.reshape(-1)
        golden[f"{kind.name}.values"] = gguf.quants.dequantize(data, kind).astype(F).reshape(-1)
    save_file(golden, HERE / "blocks.safetensors")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["tiny"]:
            make_tiny()
        case ["blocks"]:
            make_blocks()
        case ["real", folder]:
            make_real(Path(folder))
        case _:
            sys.exit(__doc__)
