"""The plugin inside vLLM on an NVIDIA GPU: with rows of f32 it gives the tokens of vLLM's own attention, in whole graphs and out of them.

Skipped where there is no GPU, unless the variable TQKV_REQUIRE names cuda."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("vllm")

if not torch.cuda.is_available():
    assert "cuda" not in os.environ.get("TQKV_REQUIRE", "").split(","), "TQKV_REQUIRE names cuda"
    pytest.skip("torch finds no NVIDIA GPU", allow_module_level=True)

from vllm_run import IMPLEMENTATION, prompts, run, tokens  # noqa: E402

MANY = prompts(24, 1024 - 32)
EAGER = {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.1, "block_size": 16, "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}}
WHOLE = EAGER | {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
BOTH = EAGER | {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}
CHUNKS = {"max_num_batched_tokens": 64, "enable_prefix_caching": True, "rounds": 2}
STOCK = {"attention_backend": "TRITON_ATTN"}


def windows(folder):
    """A model whose layers see 48 positions."""
    import transformers

    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=48, max_position_embeddings=1024,
    )
    config.architectures = ["MistralForCausalLM"]
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    return {"model": str(folder)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, side by side: most of the time is vLLM's start."""
    seen = windows(tmp_path_factory.mktemp("windows"))
    asked = {
        "stock": (None, EAGER | STOCK),
        "eager": ("f32", EAGER),
        "whole": ("f32", WHOLE),
        "both": ("f32", BOTH),
        "chunks": ("f32", WHOLE | CHUNKS),
        "k4v4": ("k4v4", EAGER),
        "k4v4 whole": ("k4v4", WHOLE | CHUNKS),
        "k4v4 both": ("k4v4", BOTH),
        "stock windows": (None, EAGER | STOCK | seen),
        "windows": ("f32", WHOLE | seen),
    }

    def one(name):
        codec, options = asked[name]
        return name, run(tmp_path_factory.mktemp(name.replace(" ", "_")), MANY, codec, **options)

    with ThreadPoolExecutor(len(asked)) as pool:
        return dict(pool.map(one, asked))


def equal(a, b):
    """The share of tokens that are the same."""
    pairs = [x == y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("name", ["eager", "whole", "both", "chunks", "windows"])
def test_rows_of_f32(runs, name):
    """Sums are in another order, so that a token in thousands may be the other of two alike, and what follows it too."""
    result, log = runs[name]
    want = tokens(*runs["stock windows" if name == "windows" else "stock"])
    assert equal(tokens(result, log), want) > 0.99
    assert result["implementations"] == [[IMPLEMENTATION] * (2 if name == "windows" else 4)]
    if name == "chunks":
        assert equal(result["rounds"][1]["tokens"], want) > 0.99 and sum(result["rounds"][1]["cached"]) > 0


@pytest.mark.parametrize("name", ["k4v4 whole", "k4v4 both"])
def test_compressed_rows(runs, name):
    """The same bytes are read, whatever runs in a graph; chunks of a prompt read their own from the cache as well."""
    assert equal(tokens(*runs[name]), tokens(*runs["k4v4"])) > 0.9


@pytest.mark.parametrize("name", ["whole", "both", "chunks", "k4v4 whole", "k4v4 both", "windows"])
def test_decoding_is_in_whole_graphs(runs, name):
    """One for each number of sequences, and nothing that the device read was out of range."""
    result, log = runs[name]
    tokens(result, log)
    (of,) = result["of_tqkv"]
    assert of["out_of_range"] == 0
    assert {tuple(shape) for shape in of["graphs"]} >= {(n, n, 1) for n in (1, 2, 4, 8, 16)}


def test_what_is_not_there_is_refused(tmp_path):
    result, log = run(tmp_path, [[65]], "k4v4", new=1, **EAGER, kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    assert result is None and "tqkv on CUDA has no KV connectors" in log, log[-3000:]
