"""The plugin inside vLLM on an NVIDIA GPU, in whole graphs and out of them: with rows of f32 it gives transformers' tokens (vLLM's own attention
rounds f32 to TF32), with rows of f16 those of vLLM's own attention.

Skipped where there is no GPU, unless the variable TQKV_REQUIRE names cuda."""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

torch = pytest.importorskip("torch")
if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed", allow_module_level=True)
if not torch.cuda.is_available():
    assert "cuda" not in os.environ.get("TQKV_REQUIRE", "").split(","), "TQKV_REQUIRE names cuda"
    pytest.skip("torch finds no NVIDIA GPU", allow_module_level=True)

from vllm_run import IMPLEMENTATION, MODEL, prompts, run, tokens  # noqa: E402

MANY = prompts(24, 1024 - 32)
EAGER = {"kv_cache_memory_bytes": 1 << 28, "gpu_memory_utilization": 0.1, "block_size": 16, "environment": {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}}
WHOLE = EAGER | {"enforce_eager": False, "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
BOTH = EAGER | {"enforce_eager": False, "compilation_config": {"cudagraph_mode": "FULL_AND_PIECEWISE"}}
CHUNKS = {"max_num_batched_tokens": 64, "enable_prefix_caching": True, "rounds": 2}
STOCK = {"attention_backend": "TRITON_ATTN", "dtype": "float16"}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
NEW = 32


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


def greedy(folder):
    """transformers' tokens."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to("cuda").eval()
    model.generation_config.eos_token_id = None
    asked = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW}
    rows = (torch.tensor([p], device="cuda") for p in MANY)
    return [model.generate(row, attention_mask=torch.ones_like(row), **asked)[0, row.shape[1] :].tolist() for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs, side by side: most of the time is vLLM's start."""
    seen = windows(tmp_path_factory.mktemp("windows"))
    asked = {
        "stock": (None, EAGER | STOCK),
        "f16": ("f16", WHOLE | {"dtype": "float16"}),
        "eager": ("f32", EAGER),
        "whole": ("f32", WHOLE),
        "both": ("f32", BOTH),
        "chunks": ("f32", WHOLE | CHUNKS),
        "k4v4": ("k4v4", EAGER),
        "k4v4 whole": ("k4v4", WHOLE | CHUNKS),
        "k4v4 both": ("k4v4", BOTH),
        "windows": ("f32", WHOLE | seen),
        "connector": ("k4v4", EAGER | {"kv_transfer_config": CONNECTOR}),
    }
    folders = {name: tmp_path_factory.mktemp(name.replace(" ", "_")) for name in asked}

    def one(name):
        codec, options = asked[name]
        return name, run(folders[name], MANY, codec, NEW, **options)

    with ThreadPoolExecutor(len(asked)) as pool:
        started = pool.map(one, asked)
        wanted = {"transformers": greedy(MODEL), "transformers windows": greedy(seen["model"])}
        return dict(started) | wanted


def equal(name, a, b):
    """How many prompts have the same tokens, and how many tokens are the same."""
    prompts = sum(x == y for x, y in zip(a, b, strict=True))
    same = sum(x == y for p, q in zip(a, b) for x, y in zip(p, q, strict=True))
    print(f"{name}: {prompts} of {len(a)} prompts, {same} of {NEW * len(a)} tokens")
    return prompts, same


@pytest.mark.parametrize("name", ["eager", "whole", "both", "chunks", "windows"])
def test_rows_of_f32(runs, name):
    """Sums are in another order: of two tokens as likely as each other it may be the other one, and another text from there."""
    result, log = runs[name]
    want = runs["transformers windows" if name == "windows" else "transformers"]
    assert equal(name, tokens(result, log), want)[0] >= len(MANY) - 1
    assert result["implementations"] == [[IMPLEMENTATION] * (2 if name == "windows" else 4)]
    if name == "chunks":
        assert equal(name, result["rounds"][1]["tokens"], want)[0] >= len(MANY) - 1
        assert sum(result["rounds"][1]["cached"]) > 0


def test_rows_of_f16(runs):
    """Both round to f16 all over the model, each after sums in its own order."""
    assert equal("f16", tokens(*runs["f16"]), tokens(*runs["stock"]))[0] >= 0.8 * len(MANY)


@pytest.mark.parametrize("name", ["k4v4 whole", "k4v4 both"])
def test_compressed_rows(runs, name):
    """The same bytes are read, in a graph or not, in chunks or not."""
    assert equal(name, tokens(*runs[name]), tokens(*runs["k4v4"]))[0] >= 0.8 * len(MANY)


@pytest.mark.parametrize("name", ["f16", "whole", "both", "chunks", "k4v4 whole", "k4v4 both", "windows"])
def test_decoding_is_in_whole_graphs(runs, name):
    """One for each number of sequences, and nothing that the device read was out of range."""
    result, log = runs[name]
    tokens(result, log)
    (of,) = result["of_tqkv"]
    assert of["out_of_range"] == 0
    assert {tuple(shape) for shape in of["graphs"]} >= {(n, n, 1) for n in (1, 2, 4, 8, 16)}


def test_what_is_not_there_is_refused(runs):
    result, log = runs["connector"]
    assert result is None and "tqkv on CUDA has no KV connectors" in log, log[-3000:]
