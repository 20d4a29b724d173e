"""The plugin inside vLLM: with rows of f32 it gives stock vLLM's tokens."""

import pathlib
import re

import pytest

pytest.importorskip("vllm")

from vllm_run import IMPLEMENTATION, prompts, run, tokens  # noqa: E402


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """Stock vLLM's tokens for 64 prompts of one token to as many as leave room for 32 more."""
    many = prompts(64, 1024 - 32)
    return many, tokens(*run(tmp_path_factory.mktemp("stock"), many))


def test_many_prompts(tmp_path, stock):
    many, want = stock
    result, log = run(tmp_path, many, "f32", max_num_batched_tokens=512)
    assert tokens(result, log) == want
    assert result["implementations"] == [[IMPLEMENTATION] * 4]


def test_prefix_hits_and_small_pages(tmp_path, stock):
    many, want = stock
    result, log = run(tmp_path, many[:12], "f32", rounds=2, enable_prefix_caching=True, block_size=16, max_num_batched_tokens=64)
    assert tokens(result, log) == want[:12]
    assert result["rounds"][1]["tokens"] == want[:12] and sum(result["rounds"][1]["cached"]) > 0


def test_preemption(tmp_path, stock):
    """Room for a fraction of what runs at once: requests give their pages up and begin again."""
    many, want = stock
    long = sorted(range(64), key=lambda i: -len(many[i]))[:6]
    result, log = run(tmp_path, [many[i] for i in long], "f32", block_size=16, num_gpu_blocks_override=100)
    assert tokens(result, log) == [want[i] for i in long]
    assert result["positions"] == 1600 < sum(len(many[i]) for i in long)


@pytest.mark.parametrize("dense", [False, True])
def test_the_parts_of_a_layer(dense):
    """Every byte belongs to one part, in pages or, as on CUDA, in the layer; pools in them do not meet."""
    import torch

    import tqkv
    from tqkv.vllm.backend import parts

    (key, value), shape = tqkv.Codec("k5v4").row_bytes(64), (6, 2, 16)
    layer = torch.zeros(*shape, sum(key + value), dtype=torch.uint8)
    views = parts(layer, key + value, dense)
    for i, part in enumerate(views):
        assert part.shape[:3] == shape and part.is_contiguous() == dense
        part += i + 1
    counts = torch.bincount(layer.flatten().int())
    assert counts.tolist() == [0] + [6 * 2 * 16 * width for width in key + value]
    assert dense or len({tuple(torch.bincount(page.flatten().int()).tolist()) for page in layer}) == 1
    pools = [
        tqkv.PagePool.from_arrays(tqkv.Device(), name, 64, codes, scales.view(torch.float16))
        for name, codes, scales in (("tq5", *views[:2]), ("tq4", *views[2:]))
    ]
    assert not pools[0].overlaps(pools[1])
    if dense:
        with pytest.raises(ValueError, match="dense layer"):
            parts(torch.zeros(6, 2, 2, 16, 70, dtype=torch.uint8)[:, 0], key + value, dense)


def test_sliding_windows(tmp_path):
    import torch
    import transformers

    torch.manual_seed(1)
    config = transformers.MistralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=48, max_position_embeddings=1024,
    )
    config.architectures = ["MistralForCausalLM"]
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "model")
    some = prompts(8, 300)
    want = tokens(*run(tmp_path, some, model=str(tmp_path / "model")))
    result, log = run(tmp_path, some, "f32", model=str(tmp_path / "model"), max_num_batched_tokens=128)
    assert tokens(result, log) == want
    assert result["implementations"] == [[IMPLEMENTATION] * 2]


def test_a_real_model(tmp_path):
    import smollm2

    folder = str(smollm2.convert(tmp_path / "smollm2"))
    some = [[504, 3575, 282, 4649, 314, 253, 1789, 282], [504, 5575, 282, 4649, 314, 260, 3575, 28]]
    want = tokens(*run(tmp_path, some, model=folder))
    assert tokens(*run(tmp_path, some, "f32", model=folder)) == want


def test_the_readme(monkeypatch):
    import vllm
    from readme import snippet

    asked = {}
    monkeypatch.setattr(vllm, "LLM", lambda *args, **kwargs: asked.update(kwargs, model=args[0]))
    for page, options in [("README.md", {}), ("docs/vllm.md", {"calibration": "model.calibration"})]:
        exec(snippet("vllm", page), {"name": "a model"})
        # What every run above is started with.
        want = {"attention_backend": "CUSTOM", "additional_config": {"tqkv": {"codec": "k5v4"} | options}}
        assert asked == {"model": "a model"} | want


CALIBRATION = pathlib.Path(__file__).parent / "byte-llama-4m.calibration"


@pytest.mark.parametrize("ranks", [1, 2])
def test_calibrations(tmp_path, stock, ranks):
    """Rows of f32 pass through the calibration's shift and scale and come out as they were, whichever heads a rank has."""
    many, want = stock
    parallel = {"tensor_parallel_size": ranks, "environment": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}} if ranks > 1 else {}
    result, log = run(tmp_path, many[:12], "f32", calibration=CALIBRATION, **parallel)
    same = [a == b for x, y in zip(tokens(result, log), want) for a, b in zip(x, y)]
    assert len(same) == 32 * 12 and sum(same) > 0.9 * len(same)
    assert result["implementations"] == [[IMPLEMENTATION] * 4] * ranks


def test_a_calibration_of_another_model(tmp_path):
    import smollm2

    folder = str(smollm2.convert(tmp_path / "smollm2"))
    result, log = run(tmp_path, [[504]], "k4v4", new=1, calibration=CALIBRATION, model=folder)
    assert result is None and "expected (30, 3, 64) as the model has" in log, log[-3000:]


@pytest.mark.parametrize("parallel", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_ranks(tmp_path, stock, parallel):
    many, want = stock
    # vLLM's own ranks of a pipeline do not start with enforce_eager on the CPU.
    options = {parallel: 2, "enforce_eager": parallel == "tensor_parallel_size"}
    result, log = run(tmp_path, many[:12], "f32", environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, **options)
    assert tokens(result, log) == want[:12]
    layers = 4 if parallel == "tensor_parallel_size" else 2
    assert result["implementations"] == [[IMPLEMENTATION] * layers] * 2


def test_how_much_fits(tmp_path):
    def fits(codec, dtype):
        result, log = run(tmp_path, [[65]], codec, new=1, dtype=dtype)
        tokens(result, log)
        return int(re.search(r"KV cache size: ([\d,]+) tokens", log)[1].replace(",", ""))

    f32, bf16, k4v4 = fits(None, "float32"), fits(None, "bfloat16"), fits("k4v4", "float32")
    assert k4v4 >= 7.5 * f32 and k4v4 >= 3.8 * bf16, (f32, bf16, k4v4)


def test_nothing_else_is_taken_in_its_place(tmp_path):
    custom = {"attention_backend": "CUSTOM"}
    for options, words in [
        (custom, "is tqkv's: say additional_config"),
        ({"additional_config": {"tqkv": {"codec": "k5v4"}}}, "asks for tqkv, attention_backend is"),
        (custom | {"additional_config": {"tqkv": {"codec": "k9v9"}}}, "unknown codec"),
        (custom | {"additional_config": {"tqkv": {"bits": 4}}}, "expected codec and calibration alone"),
    ]:
        result, log = run(tmp_path, [[65]], new=1, **options)
        assert result is None and words in log, log[-3000:]
