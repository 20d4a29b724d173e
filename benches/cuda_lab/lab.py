"""Harness of the CUDA attention kernels: compiles with NVRTC, plans, checks against a float64 reference, times.

    python lab.py compile [ARCH...]   every specialisation below for each architecture; needs no GPU
    python lab.py check [N]           N random cases against the reference (default 60)
    python lab.py time [NAME...]      the table of shapes and codecs
    python lab.py plain [NAME...]     the kernel for f32 queries, two shapes

Needs NVRTC through cuda-bindings, and PyTorch and a driver for all but `compile`.
"""
import ctypes, itertools, math, os, random, struct, sys, time
from concurrent.futures import ProcessPoolExecutor
import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
KERNELS = os.environ.get("TQKV_KERNELS", os.path.join(HERE, "../../tqkv/src/backend/cuda/kernels"))
F32, F16, BF16 = 0, 1, 2


# ---------------------------------------------------------------- codecs
class Codec:
    def __init__(self, name):
        self.name = name
        if name == "f16":
            self.bits, self.levels, self.scale = 16, 1, 0
        elif name.startswith("seed"):
            b = int(name[4:])
            self.bits, self.levels, self.scale = (4 if b == 4 else 8), 1 << b, 32
        else:
            b = int(name)
            self.bits, self.levels, self.scale = b, 1 << b, 16

    def codebook(self):
        """Near enough to Lloyd-Max for N(0, 1): what matters here is a sorted symmetric table."""
        from statistics import NormalDist
        n = self.levels
        c = np.array([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)])
        for _ in range(200):
            edges = np.concatenate([[-np.inf], (c[1:] + c[:-1]) / 2, [np.inf]])
            pdf = np.exp(-edges**2 / 2) / math.sqrt(2 * math.pi)
            cdf = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
            c = (pdf[:-1] - pdf[1:]) / np.maximum(cdf[1:] - cdf[:-1], 1e-12)
        return c.astype(np.float32)

    def row(self, d):
        return d * self.bits // 8

    def scales(self, d):
        return 0 if self.scale == 0 else (1 if self.scale == 16 else max(1, d // 256))

    def bytes(self, d):
        return self.row(d) + self.scales(d) * self.scale // 8


def codecs(name):
    """k4v3, seed4, f16 -> (key, value)"""
    if name.startswith("k"):
        k, v = name[1:].split("v")
        return Codec(k), Codec(v)
    return Codec(name), Codec(name)


# ---------------------------------------------------------------- specialisation
# (warps, tile, stages), the first that fits
CHOICES = [(w, t, 2) for w, t in ((12, 64), (8, 64), (12, 32), (8, 32), (8, 16), (4, 16), (2, 16), (1, 16))] + [(1, 16, 1)]


class Variant:
    def __init__(self, d, codec, tiles_n=1, page_size=64, contiguous=False, q_type=F16, out_type=F16, warps=None, tile=None, stages=2,
                 shared_limit=227 * 1024, narrow=False, macros=()):
        self.k, self.v = codecs(codec)
        self.d, self.codec, self.tiles_n, self.stages = d, codec, tiles_n, stages
        self.q_type, self.out_type, self.macros, self.narrow = q_type, out_type, macros, narrow
        self.const_page = 0 if contiguous else page_size
        if warps is None:
            for warps, tile, self.stages in CHOICES:
                if tile > 32 and not narrow and codec.startswith('k') and self.k.name != self.v.name and self.k.bits != 3: continue
                if (tile > 32 or warps > 8) and tiles_n > 1 or warps > 8 and d > 128 or warps * tile > 512 and not narrow: continue
                if self.shared(warps, tile) <= shared_limit: break
        self.warps, self.tile = warps, tile
        self.run = tile if page_size % tile == 0 else 16 if page_size % 16 == 0 else 1

    def shared(self, warps, tile):
        """Layout::BYTES of attention.cu."""
        k, v, d = self.k, self.v, self.d
        entries = {2: 256, 3: 256, 4: 256, 5: 64, 6: 128, 7: 256, 8: 256, 16: 0}
        integer = k.bits == 3
        same = (k.bits, k.levels, k.scale) == (v.bits, v.levels, v.scale) and not integer
        if d % 128 == 0: entries[3] = 64
        tables = 128 * ((0 if integer else entries[k.bits]) + (0 if same else entries[v.bits]))
        stage = (tile * (k.bytes(d) + v.bytes(d)) + 127) // 128 * 128
        rows = 8 * self.tiles_n
        steps = 4 * -(-d // 128) if integer else d // 16
        q = self.tiles_n * steps * 32 * (16 if integer and not self.narrow else 8)
        return tables + warps * self.stages * stage + 2 * rows * (d + 4) * 4 + warps * 2048 + q + (2 * warps + 4) * rows * 4 + 16

    def options(self):
        m = dict(HEAD_DIM=self.d, K_BITS=self.k.bits, K_LEVELS=self.k.levels, K_SCALE=self.k.scale, V_BITS=self.v.bits,
                 V_LEVELS=self.v.levels, V_SCALE=self.v.scale, TILES_N=self.tiles_n, WARPS=self.warps, TILE=self.tile, RUN=self.run,
                 STAGES=self.stages, Q_TYPE=self.q_type, OUT_TYPE=self.out_type, PAGE_SIZE=self.const_page,
                 NARROW=int(self.narrow))
        return [f"-D{k}={v}" for k, v in m.items()] + [f"-D{x}" for x in self.macros]

    def key(self):
        return " ".join(self.options())


def nvrtc_compile(args):
    file, options, arch = args
    from cuda.bindings import nvrtc
    source = open(os.path.join(KERNELS, file)).read().encode()
    headers = [h for h in os.listdir(KERNELS) if h.endswith(".cuh")]
    texts = [open(os.path.join(KERNELS, h)).read().encode() for h in headers]
    err, prog = nvrtc.nvrtcCreateProgram(source, file.encode(), len(headers), texts, [h.encode() for h in headers])
    opts = [o.encode() for o in [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", "--ptxas-options=-v", *options]]
    (err,) = nvrtc.nvrtcCompileProgram(prog, len(opts), opts)
    _, n = nvrtc.nvrtcGetProgramLogSize(prog)
    log = b" " * n
    nvrtc.nvrtcGetProgramLog(prog, log)
    if err != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"{arch} {options}\n" + log.decode())
    _, n = nvrtc.nvrtcGetCUBINSize(prog)
    cubin = b" " * n
    nvrtc.nvrtcGetCUBIN(prog, cubin)
    return cubin, log.decode()


# ---------------------------------------------------------------- plan
def plan(sequences, kv_heads, group, rows, tile, warps, blocks, causal, window, overhead=None):
    """sequences: (first, len, q_start, q_len). Returns items [n, 16] u32 and the number of parts."""
    overhead = max(1, 512 // tile) if overhead is None else overhead
    groups = []
    for i, (first, length, _, q_len) in enumerate(sequences):
        for row in range(0, q_len * group, rows):
            lowest = length - q_len + row // group
            highest = length - q_len + (min(row + rows, q_len * group) - 1) // group
            lo = max(first, lowest - window + 1) if window else first
            hi = min(length, highest + 1) if causal else length
            a, b = lo // tile, -(-hi // tile)
            if hi <= lo: b = a
            groups += [(i, h, row, a, b) for h in range(kv_heads)]
    sizes = [g[4] - g[3] for g in groups]

    def cost(tiles, split): return -(-tiles // warps) * warps + overhead * (1 + split)

    def counts(work):
        count = [0] * len(groups)
        for b in work:
            for i, _, _ in b: count[i] += 1
        return count

    def most(work):
        count = counts(work)
        return max(sum(cost(y - x, count[i] > 1) for i, x, y in b) for b in work)

    def whole_pieces(pieces):
        """Every group in equal pieces, each in a block of its own while they last, then on the least loaded."""
        import heapq
        load = [(0, b) for b in range(blocks)]
        heapq.heapify(load)
        out = [[] for _ in range(blocks)]
        jobs = sorted(((-(-n // s), i) for i, (n, s) in enumerate(zip(sizes, pieces))), reverse=True)
        for _, i in jobs:
            n, s = sizes[i], pieces[i]
            for j in range(s):
                w, b = heapq.heappop(load)
                x, y = groups[i][3] + n * j // s, groups[i][3] + n * (j + 1) // s
                out[b].append((i, x, y))
                heapq.heappush(load, (w + cost(y - x, s > 1), b))
        return out

    def fill(quota):
        """One block after the other up to a quota, cutting groups wherever it ends."""
        out, cur, room = [], [], quota
        for i, n in enumerate(sizes):
            at, end = groups[i][3], groups[i][4]
            while True:
                if cur and (room < overhead + min(overhead, end - at)):
                    out.append(cur)
                    cur, room = [], quota
                take = min(end - at, max(room - overhead, 1))
                cur.append((i, at, at + take))
                room -= take + overhead
                at += take
                if at >= end: break
        out.append(cur)
        return out

    total, longest, plans = sum(sizes), max(sizes), []
    if len(groups) <= 4 * blocks:
        for chunk in sorted({-(-longest // n) for n in range(1, blocks + 1)} | {-(-total // blocks)}):
            pieces = [max(1, -(-n // max(chunk, 1))) for n in sizes]
            if sum(pieces) <= max(blocks, len(groups)): plans.append(whole_pieces(pieces))
    lo, hi = overhead + 1, total + overhead * (len(groups) + 1)
    while lo < hi:
        mid = (lo + hi) // 2
        if len(fill(mid)) <= blocks: hi = mid
        else: lo = mid + 1
    even = fill(lo)
    work = min(plans + [even + [[]] * (blocks - len(even))], key=most)

    count = counts(work)
    firsts, parts = [0] * len(groups), 0
    for i, n in enumerate(count):
        firsts[i] = parts
        parts += n if n > 1 else 0
    # First items of all blocks, then the rest, linked.
    used, items, rest = [0] * len(groups), [[0] * 16 for _ in range(blocks)], []
    for b, mine in enumerate(work):
        at = b
        for j, (i, x, y) in enumerate(mine):
            s, h, row, _, _ = groups[i]
            first, length, q_start, q_len = sequences[s]
            if j:
                items[at][13] = at = len(items)
                items.append(None)
            items[at] = [s, h, row, min(rows, q_len * group - row), x, y, firsts[i] + used[i], firsts[i], count[i], first, length, q_start, q_len, 0, 0, 0]
            used[i] += 1
    return np.array(items, np.uint32), parts


# ---------------------------------------------------------------- device
class Gpu:
    def __init__(self):
        import torch
        self.torch = torch
        torch.zeros(1, device="cuda")
        self.cu = ctypes.CDLL("libcuda.so.1")
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count

    def call(self, f, *a):
        r = getattr(self.cu, f)(*a)
        if r: raise RuntimeError(f"{f}: {r}")

    def load(self, cubin, v=None):
        """(function, shared bytes) of a variant, or of the bandwidth kernel."""
        name = b"read_all" if v is None else b"attention"
        module, fn = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), cubin)
        self.call("cuModuleGetFunction", ctypes.byref(fn), module, name)
        shared = 0
        if name == b"attention":
            ptr, size = ctypes.c_uint64(), ctypes.c_size_t()
            self.call("cuModuleGetGlobal_v2", ctypes.byref(ptr), ctypes.byref(size), module, b"attention_shared_bytes")
            value = ctypes.c_uint32()
            self.call("cuMemcpyDtoH_v2", ctypes.byref(value), ptr, ctypes.c_size_t(4))
            shared = value.value
            self.call("cuFuncSetAttribute", fn, 8, shared)
        return fn, shared

    def launch(self, fn, grid, block, shared, blob):
        buf = ctypes.create_string_buffer(blob, len(blob))
        ptrs = (ctypes.c_void_p * 1)(ctypes.addressof(buf))
        stream = ctypes.c_void_p(self.torch.cuda.current_stream().cuda_stream)
        self.call("cuLaunchKernel", fn, grid, 1, 1, block, 1, 1, shared, stream, ptrs, None)


class Store:
    """One side of a cache: `sets` copies of pages with random codes, and what they decode to."""

    def __init__(self, gpu, codec, d, pages, kv_heads, page_size, seed, octaves=0):
        torch = gpu.torch
        self.codec, self.d = codec, d
        g = torch.Generator("cuda").manual_seed(seed)
        shape = (pages, kv_heads, page_size)
        if codec.name == "f16":
            self.codes = torch.randn(*shape, d, generator=g, device="cuda", dtype=torch.float16)
            self.scales = torch.zeros(1, device="cuda")
        else:
            n = pages * kv_heads * page_size * codec.row(d)
            self.codes = torch.randint(-2**31, 2**31, ((n + 3) // 4,), generator=g, device="cuda", dtype=torch.int32).view(torch.uint8)[:n].view(*shape, codec.row(d))
            s = torch.rand(*shape, codec.scales(d), generator=g, device="cuda") * 0.8 + 0.3
            # Scales over so many powers of two, within what f16 holds.
            if octaves: s *= torch.exp2(torch.randint(-octaves, octaves + 1, shape, generator=g, device="cuda")[..., None].float().clamp(-20, 15))
            self.scales = s.half() if codec.scale == 16 else s
        self.codebook = torch.from_numpy(codec.codebook()).cuda() if codec.levels > 1 else torch.zeros(1, device="cuda")

    def decode(self, torch, pages, head, rows):
        """f64 [n, d] of (page, row) index pairs."""
        raw = self.codes[pages, head, rows]
        c, d = self.codec, self.d
        if c.name == "f16": return raw.double()
        scale = self.scales[pages, head, rows].double().repeat_interleave(d // c.scales(d), 1)
        if c.name == "3":
            # Three planes of bytes; element 8r + 2p + h is the low three bits of nibble h of byte r of plane p, and bit k of
            # 8r + 6 + h the top bit of that nibble in plane k.
            nibbles = torch.stack([raw & 15, raw >> 4], 2).view(raw.shape[0], 3, d // 8, 2)
            fourth = sum((nibbles[:, k] >> 3) << k for k in range(3))
            code = torch.cat([nibbles & 7, fourth[:, None]], 1).transpose(1, 2).reshape(raw.shape[0], d).long()
            return self.codebook.double()[code] * scale
        i = torch.arange(d, device="cuda") * c.bits
        padded = torch.cat([raw, raw.new_zeros(raw.shape[0], 1)], 1).int()
        code = ((padded[:, i // 8] | padded[:, i // 8 + 1] << 8) >> (i % 8)) & ((1 << c.bits) - 1) & (c.levels - 1)
        return self.codebook.double()[code] * scale


def rotation(torch, d, signs, dtype):
    """Matrix of T S."""
    b = d & -d
    h = torch.ones(1, 1, dtype=dtype)
    while h.shape[0] < b: h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    m = torch.block_diag(*[h / math.sqrt(b)] * (d // b))
    if d > b:
        e = torch.eye(b, dtype=dtype).repeat(d // b, d // b)
        m = (torch.eye(d, dtype=dtype) - 2 / (d // b) * e) @ m
    s = torch.tensor([-1.0 if signs is not None and signs[i // 32] >> (i % 32) & 1 else 1.0 for i in range(d)], dtype=dtype)
    return (m * s[None, :]).cuda()


class Case:
    """A problem: stores, sequences, queries; runs a variant over it and the reference."""

    def __init__(self, gpu, variant, sequences, kv_heads, group, page_size, table_width, causal=True, window=0, softcap=0.0, sinks=False,
                 rotate=True, signs=True, lse=True, sets=1, seed=1, blocks=None, overhead=None, octaves=0):
        torch = self.torch = gpu.torch
        self.gpu, self.variant, self.sequences, self.kv_heads, self.group = gpu, variant, sequences, kv_heads, group
        self.page_size, self.causal, self.window, self.softcap, self.rotate = page_size, causal, window, softcap, rotate
        v, d = variant, variant.d
        n, self.width = len(sequences), table_width
        pages = n * table_width
        self.sets = []
        rng = np.random.default_rng(seed)
        # Pages lie anywhere; entries that no position needs hold a number that must not be followed.
        for s in range(sets):
            table = rng.permutation(pages).astype(np.uint32).reshape(n, table_width)
            for i, (first, length, _, _) in enumerate(sequences):
                if length - first < table_width * page_size:
                    live = set((p % (table_width * page_size)) // page_size for p in range(first // page_size * page_size, length, page_size)) | (
                        {((length - 1) % (table_width * page_size)) // page_size, (first % (table_width * page_size)) // page_size} if length > first else set())
                    for w in range(table_width):
                        if w not in live: table[i, w] = 0xFFFFFFF0
            self.sets.append((Store(gpu, v.k, d, pages, kv_heads, page_size, 1000 * seed + 2 * s), Store(gpu, v.v, d, pages, kv_heads, page_size, 1000 * seed + 2 * s + 1, octaves),
                              torch.from_numpy(table.view(np.int32)).cuda(), table))
        tokens = max(s[2] + s[3] for s in sequences)
        heads = kv_heads * group
        dtype = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
        g = torch.Generator("cuda").manual_seed(seed + 7)
        self.q = torch.randn(tokens, heads, d, generator=g, device="cuda").to(dtype[v.q_type])
        self.out = torch.full((tokens, heads, d), float("nan"), device="cuda", dtype=dtype[v.out_type])
        self.lse = torch.full((tokens, heads), float("nan"), device="cuda") if lse else None
        self.sinks = torch.randn(heads, generator=g, device="cuda") if sinks else None
        self.signs = rng.integers(0, 2**32, (d + 31) // 32, dtype=np.uint64).astype(np.uint32) if signs else None
        self.signs_dev = torch.from_numpy(self.signs.view(np.int32)).cuda() if signs else None
        self.scale = 1 / math.sqrt(d)
        items, self.parts = plan(sequences, kv_heads, group, 8 * v.tiles_n, v.tile, v.warps, blocks or gpu.sms, causal, window, overhead)
        self.blocks = blocks or gpu.sms
        up = lambda a: torch.from_numpy(np.ascontiguousarray(a).view(np.int32)).cuda()
        self.items = up(items)
        self.partial = torch.full((max(self.parts, 1), 8 * v.tiles_n, d), float("nan"), device="cuda")
        self.partial_ml = torch.full((max(self.parts, 1), 8 * v.tiles_n, 2), float("nan"), device="cuda")
        self.counters = torch.zeros(max(self.parts, 1), device="cuda", dtype=torch.int32)

    def params(self, s=0):
        k, v, table, _ = self.sets[s]
        p = lambda t: 0 if t is None else t.data_ptr()
        return struct.pack("<17Q8I3f4x", p(k.codes), p(k.scales), p(k.codebook), p(v.codes), p(v.scales), p(v.codebook), p(table), p(self.items), p(self.q), p(self.out), p(self.lse), p(self.sinks), p(self.signs_dev), p(self.signs_dev),
                           p(self.partial), p(self.partial_ml), p(self.counters), self.kv_heads, self.group, self.page_size, self.width,
                           int(self.causal), self.window, int(self.rotate), int(self.rotate), self.scale, 1.0, self.softcap)

    def run(self, kernel, s=0):
        fn, shared = kernel
        self.gpu.launch(fn, self.blocks, self.variant.warps * 32, shared, self.params(s))

    def bytes(self, s=0):
        v = self.variant
        return sum(l - f for f, l, _, _ in self.sequences) * self.kv_heads * (v.k.bytes(v.d) + v.v.bytes(v.d))

    def reference(self, s=0, only=None):
        """f64 outputs and log-sum-exp, [tokens, heads, d]."""
        torch, d = self.torch, self.variant.d
        k, v, _, table = self.sets[s]
        out, lse = torch.full(self.out.shape, float("nan"), device="cuda", dtype=torch.float64), torch.full(self.out.shape[:2], float("nan"), device="cuda", dtype=torch.float64)
        r = rotation(torch, d, self.signs, torch.float64) if self.rotate else torch.eye(d, dtype=torch.float64, device="cuda")
        for i, (first, length, q_start, q_len) in enumerate(self.sequences):
            if only is not None and i not in only: continue
            pos = torch.arange(first, length, device="cuda")
            slot = pos % (self.width * self.page_size)
            pages = torch.from_numpy(table[i].astype(np.int64)).cuda()[slot // self.page_size]
            rows = slot % self.page_size
            for h in range(self.kv_heads):
                heads = slice(h * self.group, (h + 1) * self.group)
                q = self.q[q_start:q_start + q_len, heads].double() @ r.T
                kk, vv = k.decode(torch, pages, h, rows), v.decode(torch, pages, h, rows)
                x = q @ kk.T * self.scale
                if self.softcap: x = self.softcap * torch.tanh(x / self.softcap)
                at = torch.arange(length - q_len, length, device="cuda")[:, None]
                hidden = torch.zeros(q_len, len(pos), dtype=torch.bool, device="cuda")
                if self.causal: hidden |= pos[None] > at
                if self.window: hidden |= pos[None] <= at - self.window
                x = x.masked_fill(hidden[:, None], -math.inf)
                if self.sinks is not None: x = torch.cat([x, self.sinks[heads].double()[None, :, None].expand(q_len, -1, 1)], 2)
                z = torch.logsumexp(x, 2)
                w = torch.exp(x - z[..., None])[..., :len(pos)].nan_to_num(0.0)
                out[q_start:q_start + q_len, heads] = (w @ vv) @ r
                lse[q_start:q_start + q_len, heads] = z
        return out, lse

    def error(self, kernel, s=0, only=None):
        torch = self.torch
        self.out.fill_(float("nan"))
        self.run(kernel, s)
        torch.cuda.synchronize()
        ref, lse = self.reference(s, only)
        got = self.out.double()
        written = torch.zeros(got.shape[0], dtype=torch.bool, device="cuda")
        for _, _, start, n in self.sequences: written[start:start + n] = True
        if not torch.isnan(got[~written]).all(): return math.inf, math.inf, False
        if only is None: only = range(len(self.sequences))
        keep = torch.zeros_like(written)
        for i in only: keep[self.sequences[i][2]:self.sequences[i][2] + self.sequences[i][3]] = True
        got, ref, lse = got[keep], ref[keep], lse[keep]
        e = (got - ref).norm() / ref.norm().clamp_min(1e-30)
        e2 = 0.0
        if self.lse is not None:
            mine = self.lse.double()[keep]
            both = torch.isinf(mine) & torch.isinf(lse)
            e2 = (mine - lse).masked_fill(both, 0.0).abs().max().item()
        clean = int(self.counters.abs().sum().item()) == 0
        return e.item(), e2, clean


def time_graph(torch, launch, n_sets, n, reps=30, sustain=1.0):
    """(median of bursts, sustained) in ms a launch."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(n_sets): launch(i)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(n): launch(i % n_sets)
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(3): graph.replay()
        times = []
        for _ in range(reps):
            torch.cuda.synchronize()
            time.sleep(0.004)
            a.record(); graph.replay(); b.record()
            b.synchronize()
            times.append(a.elapsed_time(b) / n)
        burst = sorted(times)[len(times) // 2]
        if not sustain: return burst, None
        count = max(1, int(sustain * 1e3 / (burst * n)))
        a.record()
        for _ in range(count): graph.replay()
        b.record(); b.synchronize()
        return burst, a.elapsed_time(b) / (n * count)


READ = r"""
extern "C" __global__ void __launch_bounds__(512) read_all(const uint4* p, unsigned long long n, unsigned* out) {
    unsigned x = 0;
    unsigned long long step = (unsigned long long)gridDim.x * blockDim.x;
    for (unsigned long long i = blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < n; i += 8 * step) {
        uint4 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = i + j * step < n ? __ldcs(p + i + j * step) : make_uint4(0, 0, 0, 0);
#pragma unroll
        for (int j = 0; j < 8; j++) x ^= v[j].x ^ v[j].y ^ v[j].z ^ v[j].w;
    }
    if (x == 0x12345) *out = x;
}
"""


def bandwidth(gpu):
    """Read bandwidth, GB/s, of a kernel that only reads."""
    import tempfile
    torch = gpu.torch
    from cuda.bindings import nvrtc
    _, prog = nvrtc.nvrtcCreateProgram(READ.encode(), b"read.cu", 0, [], [])
    cc = torch.cuda.get_device_capability()
    nvrtc.nvrtcCompileProgram(prog, 1, [f"--gpu-architecture=sm_{cc[0]}{cc[1]}".encode()])
    _, n = nvrtc.nvrtcGetCUBINSize(prog)
    cubin = b" " * n
    nvrtc.nvrtcGetCUBIN(prog, cubin)
    fn, _ = gpu.load(cubin)
    x = torch.randint(0, 255, (2 << 30,), device="cuda", dtype=torch.uint8)
    out = torch.zeros(1, device="cuda", dtype=torch.int32)
    best = 1e9
    for blocks in (gpu.sms * 4, gpu.sms * 8, gpu.sms * 32):
        def go(_):
            args = (ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(x.numel() // 16), ctypes.c_uint64(out.data_ptr()))
            ptrs = (ctypes.c_void_p * 3)(*[ctypes.addressof(a) for a in args])
            gpu.call("cuLaunchKernel", fn, blocks, 1, 1, 512, 1, 1, 0, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream), ptrs, None)
        best = min(best, time_graph(torch, go, 1, 4, 10, 0)[0])
    return x.numel() / best / 1e6


def torch_attention(gpu, batch, heads, kv_heads, d, length):
    """PyTorch on an f16 cache: the better of its layouts, graph replay."""
    torch = gpu.torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    size = batch * kv_heads * length * d * 2 * 2
    sets = max(1, min(64, -(-400_000_000 // size)))
    kv = [[torch.randn(batch, kv_heads, length, d, device="cuda", dtype=torch.float16) for _ in range(2)] for _ in range(sets)]
    q = torch.randn(batch, heads, 1, d, device="cuda", dtype=torch.float16)
    q2 = q.view(batch, kv_heads, heads // kv_heads, d)
    best = 1e9, None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for f in (lambda i: F.scaled_dot_product_attention(q, *kv[i], enable_gqa=True), lambda i: F.scaled_dot_product_attention(q2, *kv[i])):
            best = min(best, time_graph(torch, f, sets, 64 if size < 2e8 else 10, 30, 0.3))
    return best


def arch_of(gpu):
    a, b = gpu.torch.cuda.get_device_capability()
    return f"sm_{a}{b}" + ("a" if a == 9 else "")


def compile_all(variants, arch):
    unique = {v.key(): v for v in variants}
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = list(pool.map(nvrtc_compile, [("attention.cu", v.options(), arch) for v in unique.values()]))
    return dict(zip(unique, results))


def report_log(log):
    """(registers, spill bytes, warnings)"""
    import re
    regs = re.search(r"Used (\d+) registers", log)
    spill = sum(int(x) for x in re.findall(r"(\d+) bytes spill", log))
    return int(regs.group(1)) if regs else -1, spill, [l for l in log.splitlines() if "warning" in l.lower()]


# ---------------------------------------------------------------- campaigns
SHAPES = [  # batch, heads, kv_heads, d, length, target of k4v4, target of k8v8
    (8, 32, 8, 128, 32768, 0.078, 0.140),
    (1, 32, 8, 128, 131072, 0.047, 0.080),
    (32, 32, 8, 128, 8192, 0.080, 0.142),
    (8, 64, 8, 128, 32768, 0.080, 0.145),
    (8, 16, 8, 256, 16384, 0.080, 0.142),
    (1, 32, 8, 128, 8192, 0.0105, 0.014),
    ("ragged", 32, 8, 128, 16384, None, None),
]
CODECS = ["k4v4", "k8v8", "k3v3", "k2v2", "k5v4", "k4v3", "seed4", "f16"]


def ragged_lengths():
    rng = np.random.default_rng(20261122)
    return [int(round(128 * 128 ** x)) for x in rng.random(64)]


def lengths(shape):
    return ragged_lengths() if shape[0] == "ragged" else [shape[4]] * shape[0]


def shape_variant(shape, codec, **kw):
    """Small problems, not two tiles of 64 a warp, are better cut finer."""
    group = shape[1] // shape[2]
    kw = {"narrow": group <= 4, **kw}
    v = Variant(shape[3], codec, tiles_n=1 if group <= 8 else 2, **kw)
    if v.tile == 64 and kw.get("warps") is None and sum(lengths(shape)) * shape[2] < 132 * 2 * 8 * 64:
        v = Variant(shape[3], codec, tiles_n=v.tiles_n, **{**kw, "warps": min(8, v.warps), "tile": 32})
    return v


def cmd_time(names):
    gpu = Gpu()
    torch = gpu.torch
    jobs = [(s, c) for s in SHAPES for c in CODECS if not names or c in names]
    variants = {(s, c): shape_variant(s, c) for s, c in jobs}
    t0 = time.time()
    built = compile_all(variants.values(), arch_of(gpu))
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}, {len(built)} kernels in {time.time() - t0:.1f} s")
    bw = bandwidth(gpu)
    print(f"# read bandwidth {bw:.0f} GB/s")
    for s in SHAPES:
        lens = lengths(s)
        f16 = torch_attention(gpu, len(lens), s[1], s[2], s[3], max(lens))
        torch.cuda.empty_cache()
        print(f"{s[:5]} PyTorch f16: {f16[0]:.4f} ms, sustained {f16[1]:.4f}", flush=True)
        for c in CODECS:
            if (s, c) not in variants: continue
            v = variants[s, c]
            cubin, log = built[v.key()]
            size = sum(lens) * s[2] * (v.k.bytes(s[3]) + v.v.bytes(s[3]))
            sets = max(2, min(64, -(-300_000_000 // size)))
            case = shape_case(gpu, s, v, sets)
            kernel = gpu.load(cubin, v)
            e = case.error(kernel, 0, only=[0, len(lens) - 1])
            burst, sustained = time_graph(torch, lambda i: case.run(kernel, i), sets, 128 if size < 5e7 else 20, 30, 0.5)
            target = s[5] if c == "k4v4" else s[6] if c == "k8v8" else None
            print(f"  {c:6} {burst:.4f} ms ({sustained:.4f} sustained) {f16[0] / burst:5.2f}x  {size / burst / 1e6:5.0f} GB/s {size / burst / 1e6 / bw * 100:5.1f} %"
                  f"  err {e[0]:.1e}{'' if e[2] else ' COUNTERS'}  parts {case.parts} regs {report_log(log)[0]} tile {v.warps}x{v.tile}"
                  + (f"  target {target} {'ok' if burst <= target else 'MISSED'}" if target else ""), flush=True)
            del case
            torch.cuda.empty_cache()


def shape_case(gpu, shape, v, sets):
    lens = lengths(shape)
    return Case(gpu, v, [(0, n, i, 1) for i, n in enumerate(lens)], shape[2], shape[1] // shape[2], 64, -(-max(lens) // 64), sets=sets, lse=False, signs=False)


def cmd_tune(args):
    """SHAPE CODEC/WARPSxTILE/MACRO=VALUE...: times choices of warps and tile."""
    gpu, shape = Gpu(), SHAPES[int(args[0])]
    jobs = []
    for a in args[1:]:
        codec, wt, *macros = (a + "/").rstrip("/").split("/") if "/" in a else (a, "")
        w, t = map(int, wt.split("x")) if wt else (None, None)
        jobs.append((a, shape_variant(shape, codec, warps=w, tile=t, macros=macros)))
    built = compile_all([v for _, v in jobs], arch_of(gpu))
    for a, v in jobs:
        cubin, log = built[v.key()]
        case = shape_case(gpu, shape, v, 2 if shape[4] * (shape[0] if shape[0] != "ragged" else 20) > 2e5 else 32)
        kernel = gpu.load(cubin, v)
        burst, sustained = time_graph(gpu.torch, lambda i: case.run(kernel, i), len(case.sets), 20, 30, 0.2)
        print(f"{shape[:5]} {a}: {burst:.4f} ms ({sustained:.4f}) {case.bytes() / burst / 1e6:.0f} GB/s regs/spill {report_log(log)[:2]} shared {kernel[1]}", flush=True)
        del case
        gpu.torch.cuda.empty_cache()


def cmd_once(args):
    """SHAPE CODEC: a few launches, for a profiler."""
    gpu, shape = Gpu(), SHAPES[int(args[0])]
    v = shape_variant(shape, args[1])
    case = shape_case(gpu, shape, v, 1)
    kernel = gpu.load(nvrtc_compile(("attention.cu", v.options(), arch_of(gpu)))[0], v)
    for _ in range(3): case.run(kernel)
    gpu.torch.cuda.synchronize()


def cmd_plain(names):
    """What attention.rs does for f32 queries: plain.cu, as many blocks as run at once, three a multiprocessor."""
    gpu = Gpu()
    torch = gpu.torch
    for shape in (SHAPES[0], SHAPES[5]):
        for c in names or ["k4v4", "k8v8", "k3v3"]:
            v = Variant(shape[3], c, q_type=F32, out_type=F32)
            case = shape_case(gpu, shape, v, 2)
            side = lambda x, bits: [f"-D{x}_HEAD_DIM={v.d}", f"-D{x}_BITS={bits}", f"-D{x}_PACKING={4 if bits == 3 else 0}", f"-D{x}_SCALING=1", f"-D{x}_CODE_ALIGN=16"]
            group = shape[1] // shape[2]  # rows of a block
            options = side("K", v.k.bits) + side("V", v.v.bits) + [f"-DHEAD_DIM={v.d}", "-DQ_TYPE=0", "-DOUT_TYPE=0", "-DPARAMS_BYTES=232", f"-DROWS={group}", "-DHELD=3"]
            cubin, _ = nvrtc_compile(("plain.cu", options, arch_of(gpu)))
            module, fn = ctypes.c_void_p(), ctypes.c_void_p()
            gpu.call("cuModuleLoadData", ctypes.byref(module), cubin)
            gpu.call("cuModuleGetFunction", ctypes.byref(fn), module, b"plain")
            tiles, longest = len(case.sequences) * shape[2], max(lengths(shape))
            splits = max(1, min(3 * gpu.sms // tiles, -(-longest // 128)))
            rows = tiles * group
            spans = torch.tensor(case.sequences, device="cuda", dtype=torch.int32)
            signs, counters = torch.zeros(v.d // 32, device="cuda", dtype=torch.int32), torch.zeros(rows, device="cuda", dtype=torch.int32)
            partial, ml = torch.zeros(rows * splits * v.d, device="cuda"), torch.zeros(rows * splits * 2, device="cuda", dtype=torch.float64)

            def launch(i):
                k, val, table, _ = case.sets[i]
                b = b"".join(struct.pack("<4Q2f2IfI", x.codes.data_ptr(), x.scales.data_ptr(), x.codebook.data_ptr(), signs.data_ptr(), 1 / math.sqrt(v.d & -v.d), 2 * (v.d & -v.d) / v.d, 1, 0, 1.0, 0) for x in (k, val))
                b += struct.pack("<9Q10I2f", case.q.data_ptr(), case.out.data_ptr(), 0, 0, spans.data_ptr(), table.data_ptr(), partial.data_ptr(), ml.data_ptr(), counters.data_ptr(),
                                 splits, 0, len(case.sequences), shape[2], shape[1], 64, case.width, 1, 0, 1, case.scale, 0.0)
                gpu.launch(fn, tiles * splits, 256, 0, b)

            launch(0)
            torch.cuda.synchronize()
            ref, _ = case.reference(0, [0])
            e = ((case.out[:1].double() - ref[:1]).norm() / ref[:1].norm()).item()
            burst, _ = time_graph(torch, launch, 2, 4, 10, 0)
            print(f"{shape[:5]} {c}, f32 queries: {burst:.4f} ms  {case.bytes() / burst / 1e6:.0f} GB/s  err {e:.1e}  splits {splits}", flush=True)
            del case
            torch.cuda.empty_cache()


def random_case(rng):
    """Keyword arguments of a Variant and a Case."""
    d = rng.choice([64, 64, 80, 96, 112, 128, 128, 128, 192, 256, 256, 512, 576])
    bits = [2, 3, 4, 5, 6, 7, 8]
    codec = rng.choice([f"k{rng.choice(bits)}v{rng.choice(bits)}"] * 6 + ["f16"])
    if d in (64, 128, 256, 512) and rng.random() < 0.25: codec = f"seed{rng.choice([2, 3, 4, 5, 6, 8])}"
    group = rng.choice([1, 2, 3, 4, 4, 8, 8, 12, 16])
    q_len = rng.choice([1, 1, 1, 1, 2, 3, 5, 16, 40])
    tiles_n = 1 if q_len * group <= 8 else rng.choice([n for n in (1, 2, 4) if n * d <= 576])
    page_size, contiguous = rng.choice([(64, 0), (64, 0), (64, 0), (16, 0), (32, 0), (48, 0), (256, 0), (12, 1), (100, 1), (4096, 1), (1000, 1)])
    n = rng.choice([1, 2, 5])
    width = 1 if contiguous else rng.choice([1, 3, 10, 33])
    capacity = width * page_size
    sequences, q_start = [], rng.choice([0, 3])
    for _ in range(n):
        stored = rng.randint(1, capacity) if rng.random() < 0.7 else capacity
        ring = rng.random() < 0.3
        first = rng.randint(0, 3 * capacity) if ring else rng.choice([0, 0, rng.randint(0, capacity - stored)])
        ql = min(rng.randint(1, q_len), first + stored)
        sequences.append((first, first + stored, q_start, ql))
        q_start += ql
    variant = dict(d=d, codec=codec, narrow=q_len * group <= 4, tiles_n=tiles_n, page_size=page_size, contiguous=bool(contiguous), q_type=rng.randint(0, 2), out_type=rng.randint(0, 2),
                   shared_limit=rng.choice([227, 227, 163, 99, 0]) * 1024)  # 0: one copy at a time, as where nothing else fits
    case = dict(sequences=sequences, kv_heads=rng.choice([1, 2, 3]), group=group, page_size=page_size, table_width=width,
                causal=rng.random() < 0.7, window=rng.choice([0, 0, 0, 1, 17, 200]), softcap=rng.choice([0.0, 0.0, 0.0, 5.0, 50.0]), sinks=rng.random() < 0.3,
                rotate=rng.random() < 0.7, signs=rng.random() < 0.7, seed=rng.randint(1, 10**6), blocks=rng.choice([None, None, 1, 3, 16]),
                overhead=rng.choice([None, 1]))
    # Values whose scales no f16 product with a weight of one holds; then outputs are f32.
    if rng.random() < 0.3: case["octaves"], variant["out_type"] = rng.choice([2, 15]), F32
    return variant, case


def cmd_check(n, seed=1):
    gpu = Gpu()
    rng = random.Random(seed)
    cases = [random_case(rng) for _ in range(n)]
    variants = [Variant(**v) for v, _ in cases]
    t0 = time.time()
    built = compile_all(variants, arch_of(gpu))
    print(f"# {len(built)} kernels in {time.time() - t0:.1f} s", flush=True)
    bad = 0
    for v, (vk, ck) in zip(variants, cases):
        cubin, log = built[v.key()]
        try:
            case = Case(gpu, v, **ck)
            e, e2, clean = case.error(gpu.load(cubin, v))
        except Exception as x:
            print("FAILED", x, vk, ck, "shared", v.shared(v.warps, v.tile), flush=True)
            bad += 1
            if "700" in str(x) or "llegal" in str(x): return bad
            continue
        limit = 6e-3 if v.out_type == BF16 else 2e-3
        ok = e < limit and e2 < 5e-3 and clean
        bad += not ok
        if not ok or os.environ.get("VERBOSE"): print("ok " if ok else "BAD", f"{e:.2e} {e2:.1e} {clean}", vk, ck, "regs/spill", report_log(log)[:2], "tile", v.warps, v.tile, v.run, "parts", case.parts, flush=True)
    print(f"# {n - bad} of {n} right")
    return bad


def coverage():
    """Specialisations that a release must be able to build."""
    for d in (64, 80, 96, 112, 128, 192, 256, 512, 576):
        for c in ("k4v4", "k8v8", "f16"): yield d, c, 1
    for c in ("k2v2", "k3v3", "k5v5", "k6v6", "k7v7", "k5v4", "k4v3", "seed4", "seed5", "seed8"): yield 128, c, 1
    for d, t in ((64, 4), (128, 2), (128, 4), (256, 2)): yield d, "k4v4", t
    yield 512, "seed4", 1


SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100": 227, "sm_120": 99}


def cmd_compile(archs):
    for arch in archs or SHARED:
        variants = [Variant(d, c, tiles_n=t, shared_limit=SHARED[arch] * 1024) for d, c, t in coverage()]
        for v in variants:
            if v.shared(v.warps, v.tile) > SHARED[arch] * 1024: print(arch, "does not fit:", v.d, v.codec, v.tiles_n, v.warps, v.tile, v.shared(v.warps, v.tile))
        for v, (_, log) in zip(variants, compile_all(variants, arch).values()):
            regs, spill, warnings = report_log(log)
            if spill or warnings: print(arch, v.d, v.codec, "tiles_n", v.tiles_n, "warps", v.warps, "tile", v.tile, "regs", regs, "spill", spill, warnings)
        print("#", arch, len(variants), "kernels", flush=True)


if __name__ == "__main__":
    cmd, args = sys.argv[1], sys.argv[2:]
    if cmd == "compile": cmd_compile(args)
    if cmd == "check": sys.exit(bool(cmd_check(int(args[0]) if args else 60, int(args[1]) if len(args) > 1 else 1)))
    if cmd == "time": cmd_time(args)
    if cmd == "plain": cmd_plain(args)
    if cmd == "tune": cmd_tune(args)
    if cmd == "once": cmd_once(args)
