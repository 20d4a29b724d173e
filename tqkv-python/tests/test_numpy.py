"""Operations and the cache against numpy."""

import os
import pathlib
import subprocess
import sys
import threading

import numpy as np
import pytest
from readme import snippet

import tqkv

D, KV, HEADS, PAGE = 64, 2, 6, 16
DEVICE = tqkv.Device()


def normals(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32).astype(dtype)


def oracle(q, k, v, scale=D**-0.5, first=0, window=None, causal=True):
    """Attention of the newest positions in float64: q [new, heads, d], k and v [len, kv_heads, d]; out and lse."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    new, length, group = len(q), len(k), q.shape[1] // k.shape[1]
    out, lse = np.zeros_like(q), np.full(q.shape[:2], -np.inf)
    for i in range(new):
        at = length - new + i
        start = first if window is None else max(first, at + 1 - window)
        end = at + 1 if causal else length
        for h in range(q.shape[1]):
            s = k[start:end, h // group] @ q[i, h] * scale
            if len(s):
                lse[i, h] = np.logaddexp.reduce(s)
                out[i, h] = np.exp(s - lse[i, h]) @ v[start:end, h // group]
    return out, lse


def pools(codec, pages=5):
    return [tqkv.PagePool(DEVICE, codec, D, KV, PAGE, pages) for _ in range(2)]


@pytest.mark.parametrize("codec", ["tq2", "tq3", "tq4", "tq8", "seed4", "f16", "f32"])
def test_attention_over_what_is_stored(codec):
    key, value = pools(codec)
    n, table = 37, [3, 0, 4]
    k, v, q = normals(n, KV, D, seed=1), normals(n, KV, D, seed=2), normals(5, HEADS, D, seed=3)
    tqkv.quantize(tqkv.Batch(DEVICE, PAGE, [n], [n], [table]), [(k, key), (v, value)])
    batch = tqkv.Batch(DEVICE, PAGE, [n], [5], [table])
    stored = [tqkv.dequantize(pool, batch, 0, range(n)) for pool in (key, value)]
    bits = {"f16": 11, "f32": 24}.get(codec) or int(codec[-1])
    for x, y in zip((k, v), stored):
        error = np.sum((x - y) ** 2) / np.sum(x**2)
        assert error <= 4 * 4.0**-bits, "worse than the codec's bits"
        assert bits > 8 or error > 0.5 * 4.0**-bits, "too good to be stored in so few bits"
    out, lse = tqkv.attend(q, key, value, batch, lse=True)
    want, want_lse = oracle(q, *stored)
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)


def test_options_of_attention():
    key, value = pools("f32")
    n, table = 40, [1, 2, 0]
    k, v, q = normals(n, KV, D, seed=1), normals(n, KV, D, seed=2), normals(8, HEADS, D, seed=3)
    tqkv.quantize(tqkv.Batch(DEVICE, PAGE, [n], [n], [table]), [(k, key), (v, value)])
    batch = tqkv.Batch(DEVICE, PAGE, [n], [8], [table])
    for kwargs in [{"window": 5}, {"causal": False}, {"scale": 0.5}]:
        want = oracle(q, k, v, **{"scale": D**-0.5} | kwargs)[0]
        np.testing.assert_allclose(tqkv.attend(q, key, value, batch, **kwargs), want, rtol=1e-4, atol=1e-5)
    padded = tqkv.Batch(DEVICE, PAGE, [n], [8], [table], first=[7])
    np.testing.assert_allclose(tqkv.attend(q, key, value, padded), oracle(q, k, v, first=7)[0], rtol=1e-4, atol=1e-5)
    sinks = np.linspace(-1, 1, HEADS, dtype=np.float32)
    want, lse = oracle(q, k, v)
    want = want * np.exp(lse - np.logaddexp(lse, sinks))[..., None]
    np.testing.assert_allclose(tqkv.attend(q, key, value, batch, sink_logits=sinks), want, rtol=1e-4, atol=1e-5)
    rotated = tqkv.rotate("tq4", D, q)
    np.testing.assert_allclose(np.linalg.norm(rotated, axis=-1), np.linalg.norm(q, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(tqkv.rotate("tq4", D, rotated, inverse=True), q, atol=1e-5)


def test_parts_merge_into_the_whole():
    key, value = pools("tq4")
    n, table = 40, [1, 2, 0]
    k, v, q = normals(n, KV, D, seed=1), normals(n, KV, D, seed=2), normals(1, HEADS, D, seed=3)
    tqkv.quantize(tqkv.Batch(DEVICE, PAGE, [n], [n], [table]), [(k, key), (v, value)])
    part = lambda first, length: tqkv.attend(
        q, key, value, tqkv.Batch(DEVICE, PAGE, [length], [1], [table], first=[first]), lse=True
    )
    out, lse = tqkv.merge([part(0, 13), part(13, 14), part(14, n)], lse=True)
    whole, whole_lse = part(0, n)
    np.testing.assert_allclose(out, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, whole_lse, rtol=1e-6)


def test_pools_in_a_tensor_of_someone_else():
    """One tensor of bytes by position, K and V of a position side by side, scales after codes: the same bytes as in pools."""
    own = pools("tq4", pages=3)
    codes, scale = own[0].row_bytes, own[0].scale_bytes
    row = codes + scale
    tensor = np.full((3, PAGE, KV, 2, row), 0xAB, np.uint8)
    foreign = []
    for side in range(2):
        view = tensor[:, :, :, side].transpose(0, 2, 1, 3)
        scales = np.ndarray((3, KV, PAGE, 1), np.float16, tensor.data, side * row + codes, view.strides)
        foreign.append(tqkv.PagePool.from_arrays(DEVICE, "tq4", D, view[..., :codes], scales))
    assert not foreign[0].overlaps(foreign[1]) and foreign[0].overlaps(foreign[0])
    n, table = 37, [2, 0, 1]
    k, v, q = normals(n, KV, D, seed=1), normals(n, KV, D, seed=2), normals(5, HEADS, D, seed=3)
    results = []
    for key, value in (own, foreign):
        tqkv.quantize(tqkv.Batch(DEVICE, PAGE, [n], [n], [table]), [(k, key), (v, value)])
        results.append(tqkv.attend(q, key, value, tqkv.Batch(DEVICE, PAGE, [n], [5], [table])))
    assert np.array_equal(*results)
    assert (tensor[0, :, 0, 0] != 0xAB).any(), "bytes are in the tensor"
    assert (tensor[1, 37 % PAGE :] == 0xAB).all(), "positions that are not there are not written"


def test_a_batch_goes_on():
    device = tqkv.Device()
    pool = tqkv.PagePool(device, "f32", 32, 1, 4, 4)
    x = np.random.default_rng(3).standard_normal((6, 1, 32), dtype=np.float32)
    batch = tqkv.Batch(device, 4, [1], [1], [[2, -1]])
    for i in range(6):
        batch.update([i + 1], [1], [[2, 0]])
        tqkv.quantize(batch, [(x[i : i + 1], pool)])
    assert np.allclose(tqkv.dequantize(pool, batch, 0, range(6)), x, atol=1e-6)
    for lens, new, pages, error in [
        ([1, 1], [1, 1], [[0], [1]], tqkv.MismatchError),
        ([6], [2], [[2, 0]], tqkv.MismatchError),
        ([6], [1], [[2, 0, 1]], tqkv.MismatchError),
        ([6], [1], [[2, 4]], tqkv.PageError),
    ]:
        with pytest.raises(error):
            batch.update(lens, new, pages)
    assert (batch.sequences, batch.tokens) == (1, 1) and np.allclose(tqkv.dequantize(pool, batch, 0, [5])[0], x[5], atol=1e-6)


def test_slots():
    """Tokens go where slots say: the same bytes as by a batch."""
    (key, value), (by_batch, _) = pools("tq5"), pools("tq5")
    n = 5
    x = normals(n, KV, D, seed=1)
    batch = tqkv.Batch(DEVICE, PAGE, [PAGE + 2], [n], [[3, 1]])
    tqkv.quantize(batch, [(x, by_batch)])
    slots = [(3 if p < PAGE else 1) * PAGE + p % PAGE for p in range(PAGE - 3, PAGE + 2)]
    positions = range(PAGE - 3, PAGE + 2)
    two_more = np.concatenate([x, x[:2]])
    for dtype in np.int64, np.int32:
        count = np.array([3], np.int32)
        tqkv.quantize_at([(two_more, key), (-two_more, value)], np.array([*slots, -1, 1 << 20], dtype), out_of_range=count)
        assert count == [4]
        want = tqkv.dequantize(by_batch, batch, 0, positions)
        assert np.array_equal(tqkv.dequantize(key, batch, 0, positions), want)
        assert np.array_equal(tqkv.dequantize(value, batch, 0, positions), -want)
    tqkv.refresh(batch)  # It is the host's: nothing is to be done.
    assert batch.out_of_range == 0
    with pytest.raises(tqkv.ZeroError):
        tqkv.quantize_at([], np.array(slots))
    with pytest.raises(tqkv.DTypeError, match="slots"):
        tqkv.quantize_at([(x, key)], np.zeros(n, np.float32))
    with pytest.raises(tqkv.ShapeError):
        tqkv.quantize_at([(x, key)], np.array(slots[:4]))
    with pytest.raises(tqkv.UnsupportedError, match="page tables"):
        tqkv.Batch.with_tables(DEVICE, PAGE, np.zeros((1, 2), np.int32), 4, [3], [1])


def test_arrays_of_every_kind():
    key, value = pools("f32")
    n = 10
    k, v, q = normals(n, KV, D, seed=1), normals(n, KV, D, seed=2), normals(1, HEADS, D, seed=3)
    batch = tqkv.Batch(DEVICE, PAGE, np.array([n], np.int32), np.array([n]), np.array([[2]], np.int64))
    strided = normals(n, KV, 2 * D, seed=1)[..., ::2]
    tqkv.quantize(batch, [(strided, key), (v, value)])
    assert np.array_equal(tqkv.dequantize(key, batch, 0, range(n)), strided)
    half = np.empty((KV, 2, D), np.float16)
    got = tqkv.dequantize(key, batch, 0, [7, 3], order="head", out=half)
    assert got is half and np.array_equal(half, strided[[7, 3]].transpose(1, 0, 2).astype(np.float16))
    one = tqkv.Batch(DEVICE, PAGE, [n], [1], [[2]])
    out = tqkv.attend(q.astype(np.float16), key, value, one)
    assert out.dtype == np.float16
    with pytest.raises(tqkv.DTypeError, match="float64"):
        tqkv.attend(q.astype(np.float64), key, value, one)
    with pytest.raises(TypeError, match="list"):
        tqkv.attend([[1.0]], key, value, one)
    frozen = np.empty_like(q)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        tqkv.attend(q, key, value, one, out=frozen)


def test_a_cache():
    cache = tqkv.KvCache(DEVICE, 2, KV, D, "f32", page_size=8, capacity=256)
    a, b = cache.add_sequence(), cache.add_sequence()
    k, v, q = normals(30, KV, D, seed=1), normals(30, KV, D, seed=2), normals(30, HEADS, D, seed=3)
    with cache.step({a: 20, b: 10}) as step:
        for layer in range(2):
            out = step.append_and_attend(layer, k, v, q)
    want = np.concatenate([oracle(q[s], k[s], v[s])[0] for s in (slice(0, 20), slice(20, 30))])
    np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-5)
    twin = cache.fork(a)
    cache.truncate(twin, 5)
    assert (cache.len(a), cache.len(b), cache.len(twin), len(cache)) == (20, 10, 5, 3)
    for layer in range(2):
        cache.append(layer, [(twin, 2)], k[:2], v[:2])
    out = cache.attend(1, {twin: 1}, q[:1])
    both = [np.concatenate([x[:5], x[:2]]) for x in (k, v)]
    np.testing.assert_allclose(out, oracle(q[:1], *both)[0], rtol=1e-4, atol=1e-5)
    assert np.array_equal(cache.dequantize(1, "key", twin), both[0])
    used = cache.usage()["used"]
    cache.free(twin)
    assert cache.usage()["used"] < used and cache.sequences == [a, b]
    with pytest.raises(tqkv.UnknownSequenceError):
        cache.len(twin)


def test_a_step_that_fails_leaves_nothing():
    cache = tqkv.KvCache(DEVICE, 2, KV, D, page_size=8, capacity=64)
    a = cache.add_sequence()
    x = normals(3, KV, D)
    with pytest.raises(KeyError):
        with cache.step({a: 3}) as step:
            step.append(0, x, x)
            with pytest.raises(RuntimeError, match="open"):
                cache.len(a)
            raise KeyError
    assert cache.len(a) == 0 and cache.usage()["used"] == 0
    with pytest.raises(tqkv.UnevenLayersError):
        with cache.step({a: 3}) as step:
            step.append(0, x, x)
    assert cache.len(a) == 0
    with pytest.raises(tqkv.OutOfPagesError):
        cache.step({a: 65})
    assert not cache.fits({a: 65}) and cache.fits({a: 64})
    step = cache.step({a: 1})
    step.abandon()
    with pytest.raises(RuntimeError, match="over"):
        step.commit()


def test_snapshots_and_growth(tmp_path):
    cache = tqkv.KvCache(DEVICE, 2, KV, D, "k5v4", page_size=8, capacity=128)
    a = cache.add_sequence()
    x = normals(20, KV, D)
    with cache.step({a: 20}) as step:
        for layer in range(2):
            step.append(layer, x, x)
    before = cache.dequantize(1, "value", a)
    path = tmp_path / "chat.tqkv"
    assert cache.save(path, fingerprint=b"m") == [a]
    (b,) = cache.load(path, b"m")
    (c,) = cache.loads(cache.dumps([a]))
    for copy in (b, c):
        assert np.array_equal(cache.dequantize(1, "value", copy), before)
    with pytest.raises(tqkv.FingerprintError):
        cache.load(path, b"other")
    with pytest.raises(tqkv.NotASnapshotError):
        cache.loads(b"x" * 100)
    with pytest.raises(tqkv.TruncatedError):
        cache.loads(path.read_bytes()[:-9], b"m")
    with pytest.raises(tqkv.IoError):
        cache.load(tmp_path / "none")
    before_bytes = cache.nbytes
    cache.grow(640)
    assert cache.sequences == [a, b, c] and cache.fits({a: 500}) and cache.nbytes == 5 * before_bytes
    assert np.array_equal(cache.dequantize(1, "value", b), before)


def test_layers_that_differ():
    cache = tqkv.KvCache(
        DEVICE, 4, KV, D, "f32", page_size=8, capacity=128, windows={1: 9}, shared={3: 1}, codec_at={2: "k4v4"}
    )
    a = cache.add_sequence()
    k, v, q = normals(40, KV, D, seed=1), normals(40, KV, D, seed=2), normals(40, HEADS, D, seed=3)
    with cache.step({a: 40}) as step:
        outs = [step.append_and_attend(layer, k, v, q) for layer in range(3)] + [step.attend(3, q)]
    np.testing.assert_allclose(outs[0], oracle(q, k, v)[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(outs[1], oracle(q, k, v, window=9)[0], rtol=1e-4, atol=1e-5)
    assert np.array_equal(outs[3], outs[1]) and np.abs(outs[2] - outs[0]).max() > 1e-3
    with pytest.raises(tqkv.SharedLayerError):
        cache.append(3, {a: 1}, k[:1], v[:1])


def test_codecs_of_extents_and_channels():
    codec = tqkv.Codec("k4v4+s2f16+r16k8v8")
    assert (codec.key, codec.sinks, codec.recent, str(codec)) == ("tq4", 2, 16, "k4v4+s2f16+r16k8v8")
    assert tqkv.Codec("tq8/f16").value == "f16" and codec == tqkv.Codec(codec) and hash(codec) == hash(tqkv.Codec(codec))
    k, v, q = normals(60, KV, D, seed=1), normals(60, KV, D, seed=2), normals(60, HEADS, D, seed=3)
    k += 5 * normals(1, KV, D, seed=4)
    want = oracle(q[-1:], k, v)[0]
    errors = []
    channels = (k.mean(0), np.sqrt(k.var(0)))
    for kwargs in ({"codec": "k4v4"}, {"codec": codec}, {"codec": "k4v4", "channels": {0: channels}}):
        cache = tqkv.KvCache(DEVICE, 1, KV, D, page_size=8, capacity=128, **kwargs)
        a = cache.add_sequence()
        with cache.step({a: 60}) as step:
            out = step.append_and_attend(0, k, v, q)
        errors.append(np.linalg.norm(out[-1:] - want) / np.linalg.norm(want))
    assert errors[1] < errors[0] and errors[2] < errors[0], errors
    for error, name in [(tqkv.UnknownExtentError, "k4v4+x1f16"), (tqkv.RepeatedExtentError, "k4v4+s1f16+s2f16")]:
        with pytest.raises(error):
            tqkv.Codec(name)


def test_every_error_has_a_class():
    import pathlib
    import re
    source = pathlib.Path(__file__).parents[2] / "tqkv" / "src" / "error.rs"
    variants = re.findall(r"^    ([A-Z]\w+)(?: \{|,)$", source.read_text().split("pub enum Error {")[1].split("\n}")[0], re.M)
    assert len(variants) > 35 and [v for v in variants if not hasattr(tqkv, f"{v}Error")] == []


def test_errors_have_classes():
    names = [n for n in dir(tqkv) if n.endswith("Error") and n != "Error"]
    assert len(names) >= 35 and all(issubclass(getattr(tqkv, n), tqkv.Error) for n in names)
    for error, call in [
        (tqkv.UnknownDeviceError, lambda: tqkv.Device("tpu")),
        (tqkv.UnknownCodecError, lambda: tqkv.Codec("k9v9")),
        (tqkv.HeadDimError, lambda: tqkv.PagePool(DEVICE, "seed4", 80, 1, 8, 1)),
        (tqkv.ZeroError, lambda: tqkv.PagePool(DEVICE, "tq4", 64, 0, 8, 1)),
        (tqkv.PageError, lambda: tqkv.quantize(tqkv.Batch(DEVICE, PAGE, [1], [1], [[9]]), [(normals(1, KV, D), pools("tq4")[0])])),
        (tqkv.PositionsError, lambda: tqkv.Batch(DEVICE, PAGE, [17], [1], [[0]])),
        (tqkv.LayerError, lambda: tqkv.KvCache(DEVICE, 1, KV, D).append(1, {}, normals(0, KV, D), normals(0, KV, D))),
        (tqkv.WrongDeviceError, lambda: tqkv.attend(normals(1, HEADS, D), *pools("tq4"), tqkv.Batch(tqkv.Device.cpu(1), PAGE, [1], [1], [[0]]))),
    ]:
        with pytest.raises(error):
            call()


def work(seed):
    key, value = pools("tq4", pages=20)
    k, v, q = (normals(300, n, D, seed=seed + i) for i, n in enumerate((KV, KV, HEADS)))
    batch = tqkv.Batch(DEVICE, PAGE, [300], [300], [list(range(19))])
    tqkv.quantize(batch, [(k, key), (v, value)])
    return tqkv.attend(q, key, value, batch)


def test_threads_and_forks():
    want = [work(seed) for seed in range(4)]
    got = [None] * 4
    def run(i):
        got[i] = work(i)
    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(np.array_equal(a, b) for a, b in zip(want, got))
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(work(2), want[2]) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_stubs_name_everything():
    import ast
    import functools
    import inspect
    import pathlib
    stub = ast.parse((pathlib.Path(tqkv.__file__).parent / "_native.pyi").read_text())
    nodes = [n for n in stub.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))]
    documented = {n.name: n for n in nodes}
    documented |= {f"{c.name}.{m.name}": m for c in nodes if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, ast.FunctionDef)}
    for name, node in documented.items():
        if (doc := ast.get_docstring(node)) and not name.endswith(("__", "append_and_attend")):
            shown = inspect.getdoc(functools.reduce(getattr, name.split("."), tqkv._native))
            assert shown == doc, name
    missing = {n for n in dir(tqkv._native) if not n.startswith("_")} - {n.name for n in nodes}
    for node in nodes:
        found = getattr(tqkv._native, node.name, None)
        assert found is not None, node.name
        if isinstance(node, ast.ClassDef):
            methods = {m.name for m in node.body if isinstance(m, ast.FunctionDef)}
            missing |= {f"{node.name}.{m}" for m in methods if not hasattr(found, m)} - {"Step.append_and_attend"}
            missing |= {f"{node.name}.{m}" for m in vars(found) if not m.startswith("_")} - {f"{node.name}.{m}" for m in methods}
    assert not missing


def test_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet("numpy"), names)
    assert names["out"].shape == (3, 32, 128) and np.abs(names["out"] - 0.1).max() < 0.03
    assert names["cache"].len(names["draft"]) == 3 and (tmp_path / "chat.tqkv").exists()


CALIBRATION = pathlib.Path(__file__).parent / "byte-llama-4m.calibration"


def test_calibrations(tmp_path):
    calibration = tqkv.Calibration.load(CALIBRATION)
    assert len(calibration.channels) == 4 and calibration.origin["tokens"] > 1000 and calibration.plan["codec"].startswith("k")
    calibration.expect(4, 2, 128)
    for shape in [(3, 2, 128), (4, 1, 128), (4, 2, 64)]:
        with pytest.raises(tqkv.CalibrationError, match="made for"):
            calibration.expect(*shape)
    cache = tqkv.KvCache(DEVICE, 4, 2, 128, "k4v4", channels=calibration.channels)
    assert cache.nbytes > 0
    whole, other = CALIBRATION.read_bytes(), tmp_path / "other"
    for i in [*range(0, 400, 7), *range(400, len(whole), 97), len(whole) - 1]:
        for damaged in (whole[:i], whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :], whole + b"x"):
            other.write_bytes(damaged)
            with pytest.raises(tqkv.CalibrationError, match=str(other)):
                tqkv.Calibration.load(other)
    newer = whole.replace(rb'\"version\":1', rb'\"version\":2')
    assert newer != whole
    other.write_bytes(newer)
    with pytest.raises(tqkv.CalibrationError, match="version 2: expected 1"):
        tqkv.Calibration.load(other)
    with pytest.raises(FileNotFoundError):
        tqkv.Calibration.load(tmp_path / "none")


def test_pools_with_channels():
    """Keys with a mean, as a calibration has them, in a pool of one's own memory."""
    k, v, q = normals(60, KV, D, seed=1), normals(60, KV, D, seed=2), normals(60, HEADS, D, seed=3)
    k += 5 * normals(1, KV, D, seed=4)
    want, errors = oracle(q, k, v)[0], []
    row = pools("tq4")[0]
    for channels in (None, (k.mean(0), np.sqrt(k.var(0)))):
        memory = [(np.zeros((5, KV, PAGE, row.row_bytes), np.uint8), np.zeros((5, KV, PAGE, 1), np.float16)) for _ in "kv"]
        key = tqkv.PagePool.from_arrays(DEVICE, "tq4", D, *memory[0], channels)
        value = tqkv.PagePool.from_arrays(DEVICE, "tq4", D, *memory[1])
        batch = tqkv.Batch(DEVICE, PAGE, [60], [60], [[4, 2, 0, 1]])
        tqkv.quantize(batch, [(k, key), (v, value)])
        errors.append(np.linalg.norm(tqkv.attend(q, key, value, batch) - want) / np.linalg.norm(want))
    assert errors[1] < errors[0] / 2, errors
    for channels, error in [((np.zeros((1, D)), np.ones((1, D))), tqkv.ShapeError), ((np.zeros((KV, D)), np.zeros((KV, D))), tqkv.ParameterError)]:
        with pytest.raises(error):
            tqkv.PagePool.from_arrays(DEVICE, "tq4", D, *memory[0], channels)


MANY_THREADS = """
import threading, numpy as np, tqkv
cache = tqkv.KvCache(tqkv.Device(), 1, 2, 64, "k4v4", capacity=64 * 1024)
k, q, done = np.ones((400, 2, 64), np.float32), np.ones((400, 6, 64), np.float32), []

def run():
    sequence = cache.add_sequence()
    for _ in range(10):
        cache.append(0, {sequence: 400}, k, k)
        cache.attend(0, {sequence: 400}, q)
        done.append(cache.len(sequence))

threads = [threading.Thread(target=run) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
assert sorted(done) == sorted([400 * i for i in range(1, 11)] * 4), done
"""


def test_one_cache_in_many_threads():
    """Who waits for the cache does not keep the GIL from who has it."""
    done = subprocess.run([sys.executable, "-P", "-c", MANY_THREADS], timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
