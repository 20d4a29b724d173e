// Attention of many queries a sequence, on sm_90a: over keys and values that expand.cu has made f16 of.
//
// Kernel `prefill`, one parameter: the struct `Prefill`, by value. One block an item (attention/params.cuh) of up to ROWS query rows of one sequence and
// KV head, against the tiles [tile_begin, tile_end) of TILE positions. Items that share an output are parts, as in attention.cu.
//   block  (128 + 2 * ROWS, 1, 1)
//   dynamic shared memory: SHARED_BYTES
//
// Macros (-D): K_DIM, V_DIM (multiples of 16, up to 256), Q_WIDTH, OUT_WIDTH, Q_TYPE, OUT_TYPE as in attention.cu; TILE (64 or 128); STAGES
// (tiles in flight and in use); SHARED_BYTES.
//
// METHOD
//
// FlashAttention-3 (Shah et al., 2024, https://arxiv.org/abs/2407.08608): one warp copies tiles, two warpgroups of 64 rows each multiply them in turns: while one
// has its softmax the other has the tensor cores; and a warpgroup's products with the next tile's keys and with this tile's values run
// beside its softmax. Rows stay in the rotated domain: queries are rotated when they are read, outputs when they are written.
#define Q_PARTS 1
#include "attention/parts.cuh"
#include "hopper.cuh"

struct Prefill {
    Params p;
    const u8 *keys, *values;  // matrices of tiles
    const float2* units;      // of tiles: a factor of keys, a binary logarithm of values
};

constexpr int GROUPS = 2, ROWS = 64 * GROUPS, CONSUMERS = 128 * GROUPS, THREADS = 128 + CONSUMERS;
constexpr float SLACK = 8.f;  // the running maximum moves when it would grow by more

struct Layout {
    static constexpr int Q_COLUMN = ROWS * 128, COLUMN = TILE * 128;  // bytes of 64 elements of all rows
    static constexpr int Q_BYTES = (K_DIM + 63) / 64 * Q_COLUMN, K_BYTES = (K_DIM + 63) / 64 * COLUMN, V_BYTES = (V_DIM + 63) / 64 * COLUMN;
    static constexpr int Q = 0, KEYS = Q + Q_BYTES, VALUES = KEYS + STAGES * K_BYTES;
    static constexpr int ACC = KEYS, ACC_ROW = V_DIM + 4;  // f32 [ROWS][ACC_ROW]: sums, when tiles are done with
    static constexpr int TILES_END = VALUES + STAGES * V_BYTES, ACC_END = ACC + ROWS * ACC_ROW * 4;
    static constexpr int FLOATS = TILES_END > ACC_END ? TILES_END : ACC_END;  // f32 [4][ROWS]: factors, biases, maxima, sums of weights
    static constexpr int BARRIERS = FLOATS + 4 * ROWS * 4;                      // u64 [4][STAGES]
    static constexpr int LAST = BARRIERS + 4 * STAGES * 8, BYTES = LAST + 16;
};
static_assert(Layout::BYTES == SHARED_BYTES, "as the host has it");
extern __shared__ __align__(1024) u8 shared_memory[];

enum { K_FULL, V_FULL, K_EMPTY, V_EMPTY };
DEVICE u32 barrier(int kind, u32 stage) { return shared_address(shared_memory) + Layout::BARRIERS + (kind * STAGES + stage) * 8; }

struct Stage {
    u32 index = 0, parity = 0;
    DEVICE void next() {
        if (++index == STAGES) index = 0, parity ^= 1;
    }
};

// One thread.
DEVICE void copy_tiles(const Prefill& f, const Item& it) {
    const u32 at = shared_address(shared_memory);
    Stage stage;
    u64 tile = it.tile_at;
    for (u32 i = it.tile_begin; i < it.tile_end; i++, tile++, stage.next()) {
        barrier_wait(barrier(K_EMPTY, stage.index), stage.parity ^ 1);
        barrier_promise(barrier(K_FULL, stage.index), Layout::K_BYTES);
        copy_bulk(at + Layout::KEYS + stage.index * Layout::K_BYTES, f.keys + tile * Layout::K_BYTES, Layout::K_BYTES, barrier(K_FULL, stage.index));
        barrier_wait(barrier(V_EMPTY, stage.index), stage.parity ^ 1);
        barrier_promise(barrier(V_FULL, stage.index), Layout::V_BYTES);
        copy_bulk(at + Layout::VALUES + stage.index * Layout::V_BYTES, f.values + tile * Layout::V_BYTES, Layout::V_BYTES, barrier(V_FULL, stage.index));
    }
}

// The sixteen rows of a warp, from `from` on: rotated, scaled to f16 by powers of two; `factors` has what scores want, `biases` what the shift of the
// keys' channels took from them.
DEVICE void load_queries(const Params& p, const Item& it, int from, int lane, float* factors, float* biases) {
    typedef QueryShape S;
    constexpr int AT_ONCE = S::N <= 4 ? 4 : 2;
    const float scale = p.q_scale * (p.softcap > 0.f ? 1.f : LOG2E), infinity = __int_as_float(0x7f800000);
#pragma unroll 1
    for (int i = 0; i < 16; i += AT_ONCE) {
        float x[AT_ONCE][S::N];
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) load_query(p, it, from + i + j, x[j], lane);
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int row = from + i + j;
            const float bias = p.key.channels ? map_channels(p, it, x[j], lane) : 0.f;
#pragma unroll
            for (int k = 0; k < S::N; k++) x[j][k] *= scale;
            rotate<S>(x[j], p.key.turn, lane % S::GROUP);
            float top = 1e-20f;
#pragma unroll
            for (int k = 0; k < S::N; k++) top = fmaxf(top, fabsf(x[j][k]) < infinity ? fabsf(x[j][k]) : infinity);
#pragma unroll
            for (int k = 1; k < 32; k <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
            const float shrink = inverse_power(fminf(top, 0x1p126f));
#pragma unroll
            for (int k = 0; k < S::N; k++) {
                const int e = S::element(k, lane % S::GROUP);
                *(u16*)(shared_memory + Layout::Q + e / 64 * Layout::Q_COLUMN + swizzled(row, e % 64 / 8) + e % 8 * 2) = f16_from_f32(x[j][k] * shrink);
            }
            // Of a row that is not finite nothing is.
            if (lane == 0) factors[row] = top < infinity ? inverse_power(shrink) : __int_as_float(0x7fffffff), biases[row] = bias;
        }
    }
}

// The scores of a warpgroup's rows, and what becomes of them. Lane 4 g + t of a warp has rows g and g + 8 of its sixteen: `half` 0 and 1.
struct Softmax {
    static constexpr int N = TILE / 2;
    float m[2], l[2], shrink[2];  // running maximum, sum of weights, what sums are to be multiplied by
    bool moved;

    DEVICE Softmax() {
        m[0] = m[1] = -1e30f, l[0] = l[1] = 0.f;
    }
    // Scores to weights; `factor`: of both rows' scores; `log_unit`: of the tile's values.
    DEVICE void weigh(float (&s)[N], const float (&factor)[2], float log_unit) {
        float top[2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            float a = s[2 * half], b = s[2 * half + 1];
#pragma unroll
            for (int i = 4; i < N; i += 4) a = fmaxf(a, s[i + 2 * half]), b = fmaxf(b, s[i + 2 * half + 1]);
            top[half] = fmaxf(a, b) * factor[half] + log_unit;
        }
        moved = __any_sync(~0u, top[0] > m[0] + SLACK || top[1] > m[1] + SLACK);
        if (moved)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float x = fmaxf(m[half], top[half]);
                x = fmaxf(x, __shfl_xor_sync(~0u, x, 1)), x = fmaxf(x, __shfl_xor_sync(~0u, x, 2));
                shrink[half] = exp2_approx(m[half] - x);
                m[half] = x, l[half] *= shrink[half];
            }
        const float back = exp2_approx(-log_unit);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float offset = log_unit - m[half];
            float a = 0.f, b = 0.f;
#pragma unroll
            for (int i = 0; i < N; i += 4) {
                float &x = s[i + 2 * half], &y = s[i + 2 * half + 1];
                x = exp2_approx(fmaf(x, factor[half], offset)), y = exp2_approx(fmaf(y, factor[half], offset));
                a += x, b += y;
            }
            l[half] += (a + b) * back;
        }
    }
    template <int SUMS> DEVICE void rescale(float (&o)[SUMS]) const {
        if (moved)
#pragma unroll
            for (int i = 0; i < SUMS; i += 4) o[i] *= shrink[0], o[i + 1] *= shrink[0], o[i + 2] *= shrink[1], o[i + 3] *= shrink[1];
    }
};

// softcap * tanh(score / softcap), in powers of two; `factor` becomes one.
DEVICE void cap(float (&s)[TILE / 2], float (&factor)[2], const float (&bias)[2], float softcap) {
    const float inverse = 1.f / softcap;
#pragma unroll
    for (int i = 0; i < TILE / 2; i++) s[i] = softcap * LOG2E * tanh_exact((s[i] * factor[i / 2 % 2] + bias[i / 2 % 2]) * inverse);
    factor[0] = factor[1] = 1.f;
}
// Gives positions that a row does not see a score of minus infinity; `base`: the position of this lane's first score.
DEVICE void hide(float (&s)[TILE / 2], const Bounds (&seen)[2], int base) {
#pragma unroll
    for (int i = 0; i < TILE / 2; i++) {
        const int position = base + i / 4 * 8 + i % 2;
        if (position < seen[i / 2 % 2].lo || position >= seen[i / 2 % 2].hi) s[i] = -__int_as_float(0x7f800000);
    }
}

typedef u32 Weights[TILE / 16][4];
DEVICE void to_weights(Weights& w, const float (&s)[TILE / 2]) {
#pragma unroll
    for (int i = 0; i < TILE / 4; i++) w[i / 4][i % 4] = f16x2_from_f32(s[2 * i], s[2 * i + 1]);
}

// A warpgroup's products with keys and with values: issued, not waited for.
DEVICE void multiply_keys(float (&s)[TILE / 2], u32 q, u32 keys) {
#pragma unroll
    for (int k = 0; k < K_DIM / 16; k++)
        multiply_matrices(s, matrix(q + k / 4 * Layout::Q_COLUMN + k % 4 * 32, 0), matrix(keys + k / 4 * Layout::COLUMN + k % 4 * 32, 0), k > 0);
    products_end();
}
DEVICE void multiply_values(float (&o)[V_DIM / 2], const Weights& w, u32 values) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) multiply_rows<V_DIM>(o, w[k], values + k * 2048, Layout::COLUMN);
    products_end();
}

// Both warpgroups, as parts.cuh wants them.
struct Consumers {
    static constexpr int THREADS = CONSUMERS, ROWS = ::ROWS, ACC_ROW = Layout::ACC_ROW;
    static DEVICE int thread() { return threadIdx.x - 128; }
    static DEVICE void wait() { named_wait(5, CONSUMERS); }
};

// Of an output that several blocks share, by the one that came last: as `sum_parts`, for so many rows that what they weigh is worth working out
// before.
DEVICE void sum_many_parts(const Params& p, const Item& it, const Sums& b) {
    const PartSum* const ml = p.partial_ml + (u64)it.part_first * ROWS;
    for (u32 r = Consumers::thread(); r < it.rows; r += CONSUMERS) {
        float top = -1e30f, weight = 0.f;
#pragma unroll 8
        for (u32 k = 0; k < it.part_count; k++) top = fmaxf(top, load_part(ml + k * ROWS + r).m);
#pragma unroll 8
        for (u32 k = 0; k < it.part_count; k++) {
            const PartSum part = load_part(ml + k * ROWS + r);
            weight += exp2_approx(part.m - top) * part.l;
        }
        b.m[r] = top, b.l[r] = weight;
    }
    Consumers::wait();
    constexpr int AT_ONCE = 4, QUADS = V_DIM / 4;
    const float4* const sums = (const float4*)(p.partial + (u64)it.part_first * ROWS * V_DIM);
    for (u32 first = Consumers::thread(); first < it.rows * QUADS; first += AT_ONCE * CONSUMERS) {
        float4 sum[AT_ONCE] = {};
#pragma unroll 4
        for (u32 k = 0; k < it.part_count; k++)
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const u32 i = min(first + j * CONSUMERS, it.rows * QUADS - 1), r = i / QUADS;
                const float factor = exp2_approx(load_part(ml + k * ROWS + r).m - b.m[r]);
                const float4 x = __ldcg(sums + k * ROWS * QUADS + i);
                sum[j].x += factor * x.x, sum[j].y += factor * x.y, sum[j].z += factor * x.z, sum[j].w += factor * x.w;
            }
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const u32 i = first + j * CONSUMERS;
            if (i < it.rows * QUADS) *(float4*)(b.acc + i / QUADS * Layout::ACC_ROW + i % QUADS * 4) = sum[j];
        }
    }
    Consumers::wait();
}

// Sums to outputs, by way of shared memory: of a warp's rows, from `mine` on.
DEVICE void write_outputs(const Params& p, const Item& it, const Softmax& softmax, const float (&o)[V_DIM / 2], int mine, int lane) {
    float* const acc = (float*)(shared_memory + Layout::ACC);
    float *const row_m = (float*)(shared_memory + Layout::FLOATS) + 2 * ROWS, *const row_l = row_m + ROWS;
    const int g = lane >> 2, t = lane & 3;
    Consumers::wait();  // nobody reads tiles any more
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = mine + g + half * 8;
        float l = softmax.l[half];
        l += __shfl_xor_sync(~0u, l, 1), l += __shfl_xor_sync(~0u, l, 2);
        if (t == 0) row_m[row] = softmax.m[half], row_l[row] = l;
        // Of a row that saw nothing no sum stays: zero times a value that is not a number is none either.
#pragma unroll
        for (int i = 0; i < V_DIM / 8; i++)
            *(float2*)(acc + row * Layout::ACC_ROW + i * 8 + 2 * t) = l == 0.f ? make_float2(0.f, 0.f) : make_float2(o[4 * i + 2 * half], o[4 * i + 2 * half + 1]);
    }
    const Sums sums = {acc, row_m, row_l, (u32*)(shared_memory + Layout::LAST)};
    if (it.part_count > 1) {
        Consumers::wait();
        if (!leave_part<Consumers>(p, it, sums)) return;
        sum_many_parts(p, it, sums);
    }
    __syncwarp();
    for (int r = mine; r < min(mine + 16, (int)it.rows); r++) finish_row(p, it, it.row + r, acc + r * Layout::ACC_ROW, row_m[r], row_l[r], lane);
}

// A warpgroup's 64 rows.
DEVICE void attend(const Prefill& f, const Item& it, int group, int warp, int lane) {
    const Params& p = f.p;
    const int g = lane >> 2, t = lane & 3, mine = group * 64 + warp * 16;
    float* const factors = (float*)(shared_memory + Layout::FLOATS);
    float* const biases = factors + ROWS;
    load_queries(p, it, mine, lane, factors, biases);
    stores_to_async();
    named_wait(1 + group, 128);

    float factor[2], bias[2];
    Bounds seen[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = mine + g + half * 8;
        factor[half] = factors[row], bias[half] = biases[row];
        seen[half] = visible(p, it, it.row + min(row, (int)it.rows - 1));
    }
    // Tiles within [all_lo, all_hi) are seen whole by every row of the warpgroup.
    const int last = min(group * 64 + 63, (int)it.rows - 1);
    const int all_lo = visible(p, it, it.row + last).lo, all_hi = visible(p, it, it.row + min(group * 64, last)).hi;

    const u32 at = shared_address(shared_memory), q = at + Layout::Q + group * 64 * 128;
    const float2* units = f.units + it.tile_at;
    float s[TILE / 2], o[V_DIM / 2];
    Weights w;
    Softmax softmax;
    softmax.moved = false;
#pragma unroll
    for (int i = 0; i < V_DIM / 2; i++) o[i] = 0.f;
    const auto soften = [&](u32 tile, float2 unit) {
        float both[2] = {factor[0] * unit.x, factor[1] * unit.x};
        const int base = tile * TILE;
        if (unlikely(p.softcap > 0.f)) cap(s, both, bias, p.softcap);
        if (unlikely(base < all_lo || base + TILE > all_hi)) hide(s, seen, base + 2 * t);
        softmax.weigh(s, both, unit.y);
    };
    const auto turn = [&] { named_wait(3 + group, CONSUMERS); };
    const auto pass = [&] { named_arrive(3 + (group ^ 1), CONSUMERS); };
    const auto leave = [&](int kind, u32 stage) {
        if (lane == 0) barrier_arrive(barrier(kind, stage));
    };

    if (it.tile_begin < it.tile_end) {
        Stage stage, before;  // of the keys and of the values to come
        float2 unit = *units++;
        if (group == 1) named_arrive(3, CONSUMERS);
        turn();
        barrier_wait(barrier(K_FULL, 0), 0);
        products_begin();
        multiply_keys(s, q, at + Layout::KEYS);
        pass();
        products_wait<0>();
        pin(s);
        leave(K_EMPTY, 0);
        soften(it.tile_begin, unit);
        to_weights(w, s);
        stage.next();
#pragma unroll 1
        for (u32 tile = it.tile_begin + 1; tile < it.tile_end; tile++) {
            unit = *units++;
            barrier_wait(barrier(K_FULL, stage.index), stage.parity);
            turn();
            pin(s), pin(o);
            products_begin();
            multiply_keys(s, q, at + Layout::KEYS + stage.index * Layout::K_BYTES);
            barrier_wait(barrier(V_FULL, before.index), before.parity);
            multiply_values(o, w, at + Layout::VALUES + before.index * Layout::V_BYTES);
            pass();
            products_wait<1>();
            pin(s);
            leave(K_EMPTY, stage.index);
            soften(tile, unit);
            products_wait<0>();
            pin(o);
            leave(V_EMPTY, before.index);
            softmax.rescale(o);
            to_weights(w, s);
            stage.next(), before.next();
        }
        barrier_wait(barrier(V_FULL, before.index), before.parity);
        pin(o);
        products_begin();
        multiply_values(o, w, at + Layout::VALUES + before.index * Layout::V_BYTES);
        products_wait<0>();
        pin(o);
        // The one whose turn it was last has been told once more than it asks.
        if (group == 0) turn();
    }

    write_outputs(p, it, softmax, o, mine, lane);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) prefill(const __grid_constant__ Prefill f) {
    const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
    if (threadIdx.x == 0) {
        for (u32 i = 0; i < STAGES; i++) {
            barrier_init(barrier(K_FULL, i), 1), barrier_init(barrier(V_FULL, i), 1);
            barrier_init(barrier(K_EMPTY, i), CONSUMERS / 32), barrier_init(barrier(V_EMPTY, i), CONSUMERS / 32);
        }
        barriers_made();
    }
    begin();
    __syncthreads();
    const Item it = f.p.items[blockIdx.x];
    if (warp < 4) {
        registers_less<24>();
        if (threadIdx.x == 0) copy_tiles(f, it);
    } else {
        registers_more<240>();
        attend(f, it, warp / 4 - 1, warp % 4, lane);
    }
}
