"""What is particular to an NVIDIA GPU: torch's tensors where they lie, its streams and graphs, and transformers on it.

Skipped where there is no GPU, unless the variable TQKV_REQUIRE names cuda."""

import contextlib
import gc
import os
import threading

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import generation  # noqa: E402
from generation import PROMPTS, cache  # noqa: E402
from readme import snippet  # noqa: E402

import tqkv  # noqa: E402
from tqkv.transformers import decoding_graph  # noqa: E402

if not torch.cuda.is_available():
    assert "cuda" not in os.environ.get("TQKV_REQUIRE", "").split(","), "TQKV_REQUIRE names cuda"
    pytest.skip("torch finds no NVIDIA GPU", allow_module_level=True)

D, KV_HEADS, HEADS, PAGE = 64, 2, 8, 16
#: Cycles of the GPU's clock: some 50 ms.
LONG = 100_000_000


@pytest.fixture
def device():
    return tqkv.Device("cuda")


def normals(*shape, dtype=torch.float32, seed=0):
    # The same numbers on every device.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def operations(device, place, codec="tq4", n=40):
    """Every operation on one sequence of pages that are out of order, its results on the CPU."""
    x, q = normals(n, KV_HEADS, D, seed=1).to(place), normals(n, HEADS, D, seed=2).to(place)
    key, value = (tqkv.PagePool(device, codec, D, KV_HEADS, PAGE, 5) for _ in range(2))
    batch = tqkv.Batch(device, PAGE, [n], [n], [[3, 0, 4]])
    tqkv.quantize(batch, [(x, key), (2 * x, value)])
    out, lse = tqkv.attend(q, key, value, batch, lse=True)
    given = torch.full_like(q, float("nan"))
    assert tqkv.attend(q, key, value, batch, out=given, window=9, softcap=5.0, sink_logits=q[0, :, 0].clone()) is given
    decoded = torch.full((n - 3, KV_HEADS, D), float("nan"), device=place)
    tqkv.dequantize(key, batch, 0, range(3, n), out=decoded)
    listed = torch.as_tensor(tqkv.dequantize(value, batch, 0, [5, 39], order="head"))
    merged = tqkv.merge([(out, lse), (given, lse + 1)], device=device)
    rotated = tqkv.rotate(codec, D, x, device=device)
    results = [out, lse, given, decoded, listed, merged, rotated]
    assert all(r.device.type == place for r in results)
    return [r.cpu() for r in results]


@pytest.mark.parametrize("codec", ["tq4", "tq8", "seed4", "f16", "f32"])
def test_operations_on_tensors(device, codec):
    on_gpu, on_cpu = operations(device, "cuda", codec), operations(tqkv.Device(), "cpu", codec)
    for got, want in zip(on_gpu, on_cpu):
        torch.testing.assert_close(got, want, rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tables_lengths_and_slots_on_the_device(device, dtype):
    """One graph serves all steps, whatever the tensors hold by then; what is no sequence's is not written."""
    pages, most, width = 40, 4, 12
    key, value = (tqkv.PagePool(device, "tq4", D, KV_HEADS, PAGE, pages) for _ in range(2))
    every = normals(pages * PAGE, KV_HEADS, D, seed=1)
    tqkv.quantize_at([(every, key), (every, value)], torch.arange(pages * PAGE, device="cuda", dtype=dtype))
    # Rows of a wider table.
    tables = torch.full((most, width + 5), 10**9, device="cuda", dtype=dtype)[:, :width]
    lens, starts = (torch.zeros(n, device="cuda", dtype=dtype) for n in (most, most + 1))
    slots, count = torch.full((most,), -1, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int32)
    q, k = torch.zeros(most, HEADS, D, device="cuda"), torch.zeros(most, KV_HEADS, D, device="cuda")
    out = torch.zeros_like(q)
    batch = tqkv.Batch.on_device(device, PAGE, tables, pages, lens, starts, tokens=most, most_new=1, most_len=width * PAGE)

    def step():
        tqkv.refresh(batch)
        tqkv.quantize_at([(k, key), (2 * k, value)], slots, out_of_range=count)
        tqkv.attend(q, key, value, batch, out=out)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    draw = torch.Generator().manual_seed(5)
    for held in ([33, 5, 0, 0], [100, 1, 20, 64], [192, 0, 0, 0]):
        live = [n for n in held if n]
        order = torch.randperm(pages, generator=draw).tolist()
        own = [[order.pop() for _ in range(-(-n // PAGE))] for n in live]
        at = [table[-1] * PAGE + (n - 1) % PAGE for n, table in zip(live, own)]
        for i, table in enumerate(own):
            tables[i, : len(table)] = torch.tensor(table, dtype=dtype)
        lens.copy_(torch.tensor(held))
        starts.copy_(torch.tensor([min(i, len(live)) for i in range(most + 1)]))
        slots.copy_(torch.tensor(at + [-1] * (most - len(live))))
        q.copy_(normals(most, HEADS, D, seed=held[0]))
        k.copy_(normals(most, KV_HEADS, D, seed=held[1]))
        out.fill_(float("nan"))
        graph.replay()
        n = len(live)
        host = tqkv.Batch(device, PAGE, live, [1] * n, [table + [0] * (width - len(table)) for table in own])
        torch.testing.assert_close(out[:n], tqkv.attend(q[:n].contiguous(), key, value, host), rtol=2e-3, atol=2e-3)
        assert out[n:].isnan().all() and (n < most or not out.isnan().any())
        known = tqkv.Batch.with_tables(device, PAGE, tables, pages, held, [int(n > 0) for n in held])
        tqkv.refresh(known)
        torch.testing.assert_close(tqkv.attend(q[:n].contiguous(), key, value, known), out[:n], rtol=2e-3, atol=2e-3)
        newest = tqkv.dequantize(key, host, 0, [live[0] - 1])[0]
        assert (newest - k[0]).norm() < 0.2 * k[0].norm()
    assert batch.out_of_range == count.item() == 0
    tables[0, 0], slots[0] = pages, pages * PAGE
    graph.replay()
    assert batch.out_of_range == count.item() == 1
    with pytest.raises(tqkv.UnsupportedError, match="slots"):
        tqkv.quantize(batch, [(k, key)])


def test_tensors_are_used_where_they_lie(device):
    before = torch.cuda.memory_allocated()
    q = normals(4, HEADS, D, dtype=torch.bfloat16)
    cache = tqkv.KvCache(device, 1, KV_HEADS, D, "k8v8")
    row = cache.add_sequence()
    k = normals(4, KV_HEADS, D, dtype=torch.bfloat16)
    cache.append(0, {row: 4}, k, k)
    held = torch.cuda.memory_allocated()
    out = cache.attend(0, {row: 4}, q)
    assert (out.dtype, out.device, out.shape) == (q.dtype, q.device, q.shape)
    assert torch.cuda.memory_allocated() == held + out.numel() * 2, "an output and nothing else"
    decoded = cache.dequantize(0, "key", row)
    assert decoded.is_cuda and (decoded - k.float()).abs().max() < 0.1
    del q, k, out, decoded
    assert torch.cuda.memory_allocated() == before


def test_what_cannot_be_taken_is_named(device):
    q, k = normals(4, HEADS, D), normals(4, KV_HEADS, D)
    cache = tqkv.KvCache(device, 1, KV_HEADS, D)
    row = cache.add_sequence()
    strided = normals(4, 2 * KV_HEADS, D)[:, ::2]
    cache.append(0, {row: 4}, strided, strided)
    want = strided.contiguous()
    error = (cache.dequantize(0, "key", row) - want).norm() / want.norm()
    assert error < 0.1, "a strided input is copied"
    with pytest.raises(ValueError, match="strided"):
        cache.attend(0, {row: 4}, q, out=normals(4, 2 * HEADS, D)[:, ::2])
    with pytest.raises(tqkv.WrongDeviceError):
        tqkv.KvCache(tqkv.Device(), 1, KV_HEADS, D).append(0, {}, k, k)


def test_pools_in_tensors(device):
    """Heads before positions, or positions before heads: the same rows in the page that is written."""
    k = normals(4, KV_HEADS, D)
    codes, strided = (torch.zeros(3, KV_HEADS, PAGE, D // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    scales, others = (torch.zeros(3, KV_HEADS, PAGE, 1, dtype=torch.float16, device="cuda") for _ in range(2))
    by_position = strided.view(3, PAGE, KV_HEADS, D // 2).transpose(1, 2)
    dense = tqkv.PagePool.from_arrays(device, "tq4", D, codes, scales)
    gaps = tqkv.PagePool.from_arrays(device, "tq4", D, by_position, others)
    tqkv.quantize(tqkv.Batch(device, PAGE, [4], [4], [[2]]), [(k, dense), (2 * k, gaps)])
    assert bool(codes[2].any()) and not bool(codes[:2].any())
    assert torch.equal(by_position, codes) and torch.equal(others, 2 * scales)


def test_host_arrays_on_a_gpu(device):
    import numpy as np

    x = np.random.default_rng(0).standard_normal((5, KV_HEADS, D), dtype=np.float32)
    cache = tqkv.KvCache(device, 1, KV_HEADS, D, "f32")
    row = cache.add_sequence()
    with cache.step({row: 5}) as step:
        out = step.append_and_attend(0, x, x, np.repeat(x, 4, axis=1))
    assert isinstance(out, np.ndarray) and np.abs(out[0, 0] - x[0, 0]).max() < 1e-6


def filled(device, codec="k8v8", layers=1, n=100):
    cache = tqkv.KvCache(device, layers, KV_HEADS, D, codec, page_size=PAGE, capacity=4096)
    row = cache.add_sequence()
    x = normals(n, KV_HEADS, D, seed=3)
    with cache.step({row: n}) as step:
        for layer in range(layers):
            step.append(layer, x, x)
    return cache, row


def test_everything_is_on_the_current_stream(device):
    cache, row = filled(device)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    q = normals(1, HEADS, D)
    want = cache.attend(0, {row: 1}, 3 * q)
    token = normals(1, KV_HEADS, D, seed=4)
    other, other_row = filled(device)
    other.append(0, {other_row: 1}, token, token)
    appended = other.attend(0, {other_row: 1}, q)
    torch.cuda.synchronize()

    with torch.cuda.stream(first):
        torch.cuda._sleep(LONG)
        late = q * 3
        got = cache.attend(0, {row: 1}, late)
        done = first.record_event()
        assert not done.query(), "nothing waits for the host"
        # Its memory is used again, in the order of the stream.
        del late
        torch.full_like(q, float("nan"))
        torch.cuda._sleep(LONG)
        k = token.clone()
        cache.append(0, {row: 1}, k, k)
        assert not first.query()
    # The device comes to another stream behind what it was given before.
    with torch.cuda.stream(second):
        after = cache.attend(0, {row: 1}, q)
        assert not second.query()
    torch.cuda.synchronize()
    assert torch.equal(got, want) and torch.equal(after, appended)


@pytest.mark.parametrize("shared", [False, True])
def test_two_threads_on_two_streams(device, shared):
    want = []
    for seed in (0, 1):
        cache, row = filled(tqkv.Device("cuda"), "k4v4")
        q, k = normals(1, HEADS, D, seed=seed), normals(1, KV_HEADS, D, seed=seed + 9)
        for _ in range(200):
            cache.append(0, {row: 1}, k, k)
        want.append(cache.attend(0, {row: 1}, q))
    torch.cuda.synchronize()
    got, failed = [None, None], []

    def work(seed):
        try:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                cache, row = filled(device if shared else tqkv.Device("cuda"), "k4v4")
                q, k = normals(1, HEADS, D, seed=seed), normals(1, KV_HEADS, D, seed=seed + 9)
                for _ in range(200):
                    cache.append(0, {row: 1}, k.clone(), k.clone())
                    cache.attend(0, {row: 1}, q.clone())
                got[seed] = cache.attend(0, {row: 1}, q)
            stream.synchronize()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert not failed
    assert all(torch.equal(g, w) for g, w in zip(got, want))


def test_operations_in_a_graph(device):
    x, q = normals(30, KV_HEADS, D), normals(1, HEADS, D)
    pool = tqkv.PagePool(device, "tq4", D, KV_HEADS, PAGE, 2)
    tqkv.quantize(tqkv.Batch(device, PAGE, [30], [30], [[1, 0]]), [(x, pool)])
    batch, three = (tqkv.Batch(device, PAGE, [30], [new], [[1, 0]]) for new in (1, 3))
    out = tqkv.attend(q, pool, pool, batch)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tqkv.attend(q, pool, pool, batch, out=out)
        with pytest.raises(tqkv.UnsupportedError, match="captured in a graph"):
            tqkv.attend(q.expand(3, -1, -1).contiguous(), pool, pool, three)
    for factor in (2, -1):
        q.copy_(normals(1, HEADS, D) * factor)
        graph.replay()
        assert torch.equal(out, tqkv.attend(q, pool, pool, batch)), factor
    for n in (17, 8):
        batch.update([n], [1], [[1, 0]])
        graph.replay()
        assert torch.equal(out, tqkv.attend(q, pool, pool, tqkv.Batch(device, PAGE, [n], [1], [[1, 0]]))), n


@pytest.mark.parametrize("codec", ["k4v4", "f16", "k3v3+s4f16+r20k8v8"])
def test_captured_steps_go_on(device, codec):
    """Beside steps recorded anew: across pages, after forks and cuts, in other sequences, to the bit."""
    layers, rows = 2, 2

    def make(device):
        cache = tqkv.KvCache(
            device, layers, KV_HEADS, D, codec, page_size=PAGE, capacity=4096, windows={1: 50} if "+" not in codec else None
        )
        return cache, [cache.add_sequence() for _ in range(rows)]

    (cache, names), (anew, other) = make(device), make(tqkv.Device("cuda"))
    k, q = torch.empty(rows, KV_HEADS, D, device="cuda"), torch.empty(rows, HEADS, D, device="cuda", dtype=torch.float16)
    run = lambda step: torch.stack([step.append_and_attend(i, k * (i + 1), k, q) for i in range(layers)])  # noqa: E731
    graph = captured = out = None
    replayed = 0
    for i in range(200):
        k.copy_(normals(rows, KV_HEADS, D, seed=i))
        q.copy_(normals(rows, HEADS, D, seed=1000 + i))
        with anew.step([(row, 1) for row in other]) as step:
            want = run(step)
        with cache.step([(row, 1) for row in names]) as step:
            if captured is not None and step.resume(captured):
                graph.replay()
                got, replayed = out.clone(), replayed + 1
            else:
                got = run(step)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    out = run(step)
                captured = step.captured()
        assert torch.equal(got, want), i
        if i in (60, 130):
            for each, of in ((cache, names), (anew, other)):
                of[1], gone = each.fork(of[0]), of[1]
                each.free(gone)
        if i == 100:
            cache.truncate(names[0], 99), anew.truncate(other[0], 99)
    assert replayed > 120, replayed
    for layer in range(layers):
        for row, its in zip(names, other):
            held = range(cache.len(row) - 15, cache.len(row))
            both = (c.dequantize(layer, "value", r, held) for c, r in ((cache, row), (anew, its)))
            assert torch.equal(*both)
    with pytest.raises(tqkv.UnsupportedError):
        host = tqkv.KvCache(tqkv.Device(), 1, KV_HEADS, D)
        with host.step({host.add_sequence(): 1}) as step:
            step.append(0, k[:1].cpu(), k[:1].cpu())
            step.captured()


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 16},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}


def load(implementation):
    return generation.load(implementation).to("cuda")


@pytest.fixture(scope="module")
def stock():
    return load("sdpa")


@pytest.fixture(scope="module")
def model():
    return load("tqkv")


def padded(texts):
    return tuple(x.to("cuda") for x in generation.padded(texts))


def generate(model, texts, cache=None, **kwargs):
    return generation.generate(model, *padded(texts), cache, **{"max_new_tokens": 48} | kwargs)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_generation(stock, model, mode, graph):
    for texts in (PROMPTS[:1], PROMPTS) if mode != "prompt lookup" else (PROMPTS[3:],):
        own = cache(model)
        with decoding_graph(model) if graph else contextlib.nullcontext():
            got = generate(model, texts, own, **MODES[mode])
        assert got == generate(stock, texts, **MODES[mode]), texts
        assert type(own.get_seq_length()) is int, "nothing is read of the GPU to know it"
        assert own._device.kind == "cuda" and (graph or own._decoding is None)
        assert own._decoding is not None or not graph or mode == "prompt lookup"
    assert "forward" not in vars(model)


def test_garbage_does_not_spoil_a_capture(stock, model):
    want = generate(stock, PROMPTS[:1], max_new_tokens=3)
    thresholds = gc.get_threshold()
    gc.set_threshold(30)
    try:
        with decoding_graph(model):
            # Each dies with its graph, just captured, in a cycle.
            for _ in range(12):
                assert generate(model, PROMPTS[:1], cache(model), max_new_tokens=3) == want
    finally:
        gc.set_threshold(*thresholds)


def test_turns_crops_and_other_attention(stock, model):
    with torch.no_grad():
        tokens, _ = padded([PROMPTS[2]])
        own = cache(model)
        model(tokens, past_key_values=own)
        own.crop(-30)
        again = model(tokens[:, -30:], past_key_values=own).logits
        want = stock(tokens).logits
        torch.testing.assert_close(again, want[:, -30:], rtol=1e-3, atol=1e-3)
        # The graph goes on after a cut.
        with decoding_graph(model):
            for _ in range(3):
                own.crop(-5)
                got = [model(input_ids=t, past_key_values=own).logits for t in tokens[:, -5:].split(1, dim=1)]
                torch.testing.assert_close(torch.cat(got, dim=1), want[:, -5:], rtol=1e-3, atol=1e-3)
    assert generate(stock, PROMPTS, cache(stock)) == generate(stock, PROMPTS), "sdpa decodes it"


def test_halves_in_a_graph(model):
    half = load("tqkv").to(torch.bfloat16)
    for codec in ("k4v4", "k4v4+s1f16+r16k8v8"):
        eager = generate(half, PROMPTS, cache(half, codec))
        with decoding_graph(half):
            assert generate(half, PROMPTS, cache(half, codec)) == eager


def test_codecs_cost_what_they_do_on_the_host(model):
    host = load("tqkv").cpu()
    tokens, _ = padded([" ".join(PROMPTS)])
    with torch.no_grad():
        for codec in ("k8v8", "k4v4"):
            got = model(tokens, past_key_values=cache(model, codec)).logits.log_softmax(-1).cpu()
            want = host(tokens.cpu(), past_key_values=cache(host, codec)).logits.log_softmax(-1)
            assert (want.exp() * (want - got)).sum(-1).mean() < 1e-4, codec


def test_the_guide():
    tokens, mask = padded(PROMPTS[:1])
    inputs = transformers.BatchEncoding({"input_ids": tokens.cpu(), "attention_mask": mask.cpu()})
    names = {"model": load("tqkv").cpu(), "inputs": inputs, "tqkv": tqkv}
    exec(snippet("transformers cuda", "docs/transformers.md"), names)
    assert names["text"].is_cuda and names["text"].shape == (1, tokens.shape[1] + 32)
    assert names["cache"]._decoding.graph is not None
