"""The cache inside transformers: with rows of f32 it gives the text of the default cache, token for token."""

import copy
import pathlib

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import generation  # noqa: E402
from generation import MODEL, PROMPTS, cache, load, padded  # noqa: E402
from readme import snippet  # noqa: E402

import tqkv  # noqa: E402
import tqkv.transformers as tt  # noqa: E402
from tqkv.transformers import TqkvCache  # noqa: E402

NEW = 32


@pytest.fixture(scope="module")
def stock():
    return load("sdpa")


@pytest.fixture(scope="module")
def model():
    return load("tqkv")


def ids(text):
    return torch.tensor([list(text.encode())])


def generate(model, tokens, mask=None, cache=None, **kwargs):
    return generation.generate(model, tokens, mask, cache, **{"max_new_tokens": NEW} | kwargs)


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 4, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "chunked prefill": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text", [PROMPTS[0], PROMPTS[3]])
def test_modes_of_generation(stock, model, mode, text):
    want = generate(stock, ids(text), **MODES[mode])
    assert generate(model, ids(text), cache=cache(model), **MODES[mode]) == want


@pytest.mark.parametrize("mode", ["greedy", "beams", "chunked prefill"])
def test_padding_on_the_left(stock, model, mode):
    tokens, mask = padded(PROMPTS)
    own = cache(model)
    got = generate(model, tokens, mask, own, **MODES[mode])
    assert got == generate(stock, tokens, mask, **MODES[mode])
    if mode == "greedy":
        stored = [own._store.len(row) for row in own._rows]
        assert stored == [len(p) + NEW - 1 for p in PROMPTS], "padding is not stored"


def test_an_assistant(stock, model):
    want = generate(stock, ids(PROMPTS[0]))
    assert generate(model, ids(PROMPTS[0]), cache=cache(model), assistant_model=stock) == want


def test_extents(stock, model):
    """What is kept a second time in f16 is what attention reads: sinks and newest positions alone here."""
    tokens, mask = padded(PROMPTS[:2])
    codec = "k2v2+s8f16+r120f16"
    assert generate(model, tokens, mask, cache(model, codec)) == generate(model, tokens, mask, cache(model, "f16"))
    other = load("sdpa")
    past = cache(other, "f32+s8f32")
    assert generate(other, tokens, mask, past) == generate(stock, tokens, mask)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_functions_read_it(stock, implementation):
    other = load(implementation)
    tokens, mask = padded(PROMPTS)
    assert generate(other, tokens, mask, cache(other)) == generate(stock, tokens, mask)
    want = generate(stock, ids(PROMPTS[0]), num_beams=3)
    assert generate(other, ids(PROMPTS[0]), cache=cache(other), num_beams=3) == want


def test_turns_files_and_growth(stock, model, tmp_path):
    def turns(model, past, again=None):
        first = generate(model, ids(PROMPTS[0]), cache=past, max_new_tokens=10)
        text = ids(PROMPTS[0]).tolist()[0] + first[0] + list(b" and so")
        past = past if again is None else again(past)
        return first, generate(model, torch.tensor([text]), cache=past)

    want = turns(stock, transformers.DynamicCache(config=stock.config))
    assert turns(model, cache(model)) == want

    def through_a_file(past):
        past.save(tmp_path / "chat.tqkv", b"byte-llama-4m")
        fresh = cache(model, capacity=8)
        with pytest.raises(tqkv.FingerprintError):
            fresh.load(tmp_path / "chat.tqkv", b"another")
        fresh.load(tmp_path / "chat.tqkv", b"byte-llama-4m")
        assert fresh.get_seq_length() == past.get_seq_length()
        return fresh

    small = cache(model, capacity=8)
    before = small.nbytes
    assert turns(model, small, through_a_file) == want
    assert small.nbytes > before


def test_crop_and_reset(stock, model):
    own = cache(model)
    text = ids(PROMPTS[2])
    logits = lambda m, past, x: m(x, past_key_values=past).logits  # noqa: E731
    with torch.no_grad():
        logits(model, own, text)
        own.crop(-30)
        assert own.get_seq_length() == text.shape[1] - 30
        again = logits(model, own, text[:, -30:])
        want = stock(text).logits[:, -30:]
    torch.testing.assert_close(again, want, rtol=1e-4, atol=1e-4)
    own.reset()
    assert own.get_seq_length() == 0 and own.usage()["used"] == 0
    assert generate(model, ids(PROMPTS[1]), cache=own) == generate(stock, ids(PROMPTS[1]))


def both(kind, config):
    """One model of random weights under stock attention and under tqkv's."""
    torch.manual_seed(1)
    stock, model = (
        kind._from_config(copy.deepcopy(config), attn_implementation=name).eval() for name in ("sdpa", "tqkv")
    )
    model.load_state_dict(stock.state_dict())
    return stock, model


@pytest.mark.parametrize("window", [8, 40])
def test_sliding_windows(window):
    config = transformers.MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, sliding_window=window, pad_token_id=0,
    )
    stock, model = both(transformers.MistralForCausalLM, config)
    tokens, mask = padded(PROMPTS)
    for kwargs in ({}, {"prefill_chunk_size": 16}, {"num_beams": 2}):
        own = cache(model)
        assert own.is_sliding == [True] * 3
        assert generate(model, tokens, mask, own, **kwargs) == generate(stock, tokens, mask, **kwargs)
        assert generate(stock, tokens, mask, cache(stock), **kwargs) == generate(stock, tokens, mask, **kwargs)


def test_layers_that_differ():
    config = transformers.Gemma3TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=32, sliding_window=16, pad_token_id=0, query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )
    stock, model = both(transformers.Gemma3ForCausalLM, config)
    tokens, mask = padded(PROMPTS)
    assert generate(model, tokens, mask, cache(model)) == generate(stock, tokens, mask)


@pytest.mark.parametrize("windows", [False, True])
def test_steps_of_all_layers(stock, model, windows):
    """What a CUDA graph is captured of: one token a row in a step of the cache, here without a graph."""
    if windows:
        config = transformers.MistralConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, sliding_window=8, pad_token_id=0,
        )
        stock, model = both(transformers.MistralForCausalLM, config)
    tokens, mask = padded(PROMPTS)
    want = generate(stock, tokens, mask)
    own = cache(model)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=own).logits
        step = tt._Decoding(model.forward, tokens[:, :1])
        got = []
        for i in range(NEW):
            got.append(logits[:, -1].argmax(-1))
            own._make_room([1] * len(PROMPTS))
            logits = step(own, got[-1][:, None], positions[:, -1:] + i + 1)
    assert torch.stack(got, dim=1).tolist() == want
    assert own.get_seq_length() == tokens.shape[1] + NEW
    with tt.decoding_graph(model):
        assert generate(model, tokens, mask, cache(model)) == want, "as ever on a CPU"
    assert "forward" not in vars(model)


def test_codecs_cost_what_they_should(stock, model):
    text = ids((PROMPTS[2] + " " + PROMPTS[0]) * 2)
    with torch.no_grad():
        want = stock(text).logits.log_softmax(-1)
        kld = {}
        for codec in ("f32", "f16", "k8v8", "k5v4", "k2v2"):
            got = model(text, past_key_values=cache(model, codec)).logits.log_softmax(-1)
            kld[codec] = (want.exp() * (want - got)).sum(-1).mean().item()
    assert abs(kld["f32"]) < 1e-8 and kld["f16"] < 1e-5
    assert kld["f16"] < kld["k8v8"] < kld["k5v4"] < kld["k2v2"] and kld["k5v4"] < 0.05, kld
    sizes = [cache(model, codec, capacity=4096).nbytes for codec in ("f32", "k4v4")]
    assert sizes[0] / sizes[1] > 7.5


def test_bfloat16(model):
    half = load("tqkv").to(torch.bfloat16)
    stock = load("sdpa").to(torch.bfloat16)
    with torch.no_grad():
        text = ids(PROMPTS[2])
        got, want = (m(text, past_key_values=p).logits.float() for m, p in ((half, cache(half)), (stock, None)))
    assert got.isfinite().all() and (got - want).abs().max() < 0.5


def test_what_it_cannot_do_is_refused(model):
    text = ids(PROMPTS[1])
    with pytest.raises(TypeError, match="TqkvCache"):
        model(text)
    with pytest.raises(ValueError, match="left only"):
        generate(model, *padded(PROMPTS)[:1], mask=padded(PROMPTS)[1].flip(-1), cache=cache(model))
    with pytest.raises(NotImplementedError, match="more to it"):
        tt.mask(1, 1, 1, mask_function=lambda *a: True)
    with pytest.raises(ValueError, match=r"\[batch, positions\]"):
        model(text, attention_mask=torch.zeros(1, 1, 6, 6), past_key_values=cache(model))
    config = transformers.LlamaConfig(num_hidden_layers=1)
    config.layer_types = ["chunked_attention"]
    with pytest.raises(ValueError, match="chunked_attention"):
        TqkvCache(config)
    with pytest.raises(tqkv.UnknownCodecError):
        cache(model, "k9v9")


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def __call__(self, text, return_tensors):
        tokens = ids(text)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def test_the_readme(monkeypatch):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Bytes())
    names = {"name": MODEL}
    exec(snippet("transformers"), names)
    assert names["text"].shape[1] > len("Once upon a time") and names["cache"].usage()["used"] > 0


def test_a_real_model(tmp_path):
    import smollm2

    folder = smollm2.convert(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
    prompts = torch.tensor([[504, 3575, 282, 4649, 314, 253, 1789, 282], [504, 5575, 282, 4649, 314, 260, 3575, 28]])
    want = generate(model, prompts)
    assert len(set(want[0])) > 8, "it has something to say"
    model.set_attn_implementation("tqkv")
    own, small = TqkvCache(model.config, "f32"), TqkvCache(model.config, "k8v8")
    assert generate(model, prompts, cache=own) == want
    got = generate(model, prompts, cache=small)
    same = sum(a == b for x, y in zip(got, want) for a, b in zip(x, y))
    assert same >= NEW and small.usage()["used"] < own.usage()["used"] / 3


def test_the_benchmark():
    import json
    import subprocess
    import sys

    options = ["--layers", "1", "--shapes", "96x2", "--times", "1", "--dtype", "float32", "--codecs", "k4v4", "--json"]
    options += ["--model", "--heads", "4", "--kv-heads", "2", "--head-dim", "32", "--prompt", "200"]
    done = subprocess.run([sys.executable, "-P", "-m", "tqkv.bench", *options], capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    names = ["torch float32", "tqkv k4v4", "model, default cache", "model, tqkv k4v4", "logits, tqkv k4v4"]
    assert [row["what"] for row in rows] == names, done.stderr
    assert all(row.get("ms_wall", 0) > 0 and row["context"] == 96 and row["batch"] == 2 for row in rows[:-1]), rows
    assert abs(rows[-1]["kld"]) < 0.1 and rows[-1]["same_top"] > 0.5, rows


CALIBRATION = pathlib.Path(__file__).parent / "byte-llama-4m.calibration"


def test_calibrations(stock, model):
    """Keys are stored better as the file says, also with extents; the plan's codecs by name."""
    text = ids(" ".join(PROMPTS))
    with torch.no_grad():
        want = stock(text).logits

        def lost(codec, **kwargs):
            return float((model(text, past_key_values=cache(model, codec, **kwargs)).logits - want).norm())

        calibrated = lost("k3v8", calibration=CALIBRATION)
        assert calibrated < 0.9 * lost("k3v8")
        assert lost("k3v8+s1f16+r16k8v8", calibration=CALIBRATION) < 0.5 * calibrated
        assert lost("f32", calibration=CALIBRATION) < 1e-3 * float(want.norm())
    calibration = tqkv.Calibration.load(CALIBRATION)
    auto = cache(model, "auto", calibration=calibration)
    assert str(auto._codec) == calibration.plan["codec"] and len(calibration.plan["layers"]) == 4
    assert len(generate(model, text, cache=auto)[0]) == NEW
    with pytest.raises(ValueError, match="budget"):
        cache(model, "auto")
    with pytest.raises(tqkv.CalibrationError, match="made for"):
        TqkvCache(transformers.LlamaConfig(num_hidden_layers=2), calibration=calibration)


def test_the_guide(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.calibration").write_bytes(CALIBRATION.read_bytes())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Bytes())
    exec(snippet("transformers", "docs/transformers.md"), {"name": MODEL})
