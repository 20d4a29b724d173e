// An item's queries: from global memory through registers to rows in shared memory, and from there to fragments.
#pragma once
#include "attention/layout.cuh"
#include "attention/rows.cuh"

constexpr bool UNITS = EXACT || KeyCodec::UNITS;  // whether scores lack a factor

// What a block keeps of queries in shared memory, for each row: of the item at work, and of the next one.
struct QueryRows {
    float* rows;       // [ROWS][QUERY_ROW]: the next item's, once they are kept; the item's own until then
    Query* fragments;
    float* largest;    // UNITS of keys: of each row, at least 1e-20; NaN if it holds what is not finite
    float* unit;       // UNITS: what scores are multiplied by
    struct {
        float* bias;    // where there are channels: what the shift of the keys' channels takes from a row's scores
        float* size;    // EXACT: what scores lack for `rows` being near one
        float* length;  // EXACT: of the row in `rows`
    } now, next;

    DEVICE QueryRows(float* at) {
        rows = (float*)(shared_memory + Layout::QUERIES), fragments = (Query*)(shared_memory + Layout::Q);
        largest = at, unit = at + ROWS, now.bias = at + 2 * ROWS, next.bias = at + 3 * ROWS;
        now.size = at + 4 * ROWS, next.size = at + 5 * ROWS, now.length = at + 6 * ROWS, next.length = at + 7 * ROWS;
    }
    static constexpr int FLOATS = (EXACT ? 8 : 4) * ROWS;
};
DEVICE float largest_of_warp(float x) {
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
    return x;
}

// On their way to `rows`: read early, then rotated, in f32, and scaled; zero in rows beyond. One warp a row.
struct Queries {
    typedef QueryShape S;
    static constexpr int N = S::N, MINE = (ROWS + WARPS - 1) / WARPS;
    static constexpr bool EARLY = MINE * N <= 16;  // else registers would not suffice, and each row is read when it is kept
    static constexpr int UNROLL = EARLY ? MINE : 1;
    float x[UNROLL][N];

    DEVICE void load(const Params& p, const Item& it, int warp, int lane) {
        if constexpr (EARLY)
#pragma unroll
            for (int i = 0; i < MINE; i++) load_query(p, it, warp + i * WARPS, x[i], lane);
    }
    // Brings a query near one, so that neither the transform nor parts of f16 overflow. Returns what its scores lack then.
    static DEVICE float normalize(float (&x)[N]) {
        float top = 0x1p-126f;
#pragma unroll
        for (int k = 0; k < N; k++) top = fmaxf(top, fabsf(x[k]));
        const float factor = inverse_power(fminf(largest_of_warp(top), 0x1p126f));
#pragma unroll
        for (int k = 0; k < N; k++) x[k] *= factor;
        return 1.f / factor;
    }
    DEVICE void keep(const Params& p, const Item& it, const QueryRows& to, int warp, int lane) {
#pragma unroll UNROLL
        for (int i = 0; i < MINE; i++) {
            const int r = warp + i * WARPS;
            if (r >= ROWS) break;
            float(&x)[N] = this->x[EARLY ? i : 0];
            if constexpr (!EARLY) load_query(p, it, r, x, lane);
            float* const row = to.rows + r * Layout::QUERY_ROW;
            if (p.key.channels) {
                const float bias = map_channels(p, it, x, lane);
                if (lane == 0) to.next.bias[r] = bias;
            }
            if constexpr (EXACT) {
                const float size = normalize(x) * p.q_scale;
                if (lane == 0) to.next.size[r] = size;
            } else {
#pragma unroll
                for (int k = 0; k < N; k++) x[k] *= p.q_scale;
            }
            rotate<S>(x, p.key.turn, lane % S::GROUP);
#pragma unroll
            for (int k = 0; k < N; k++) row[S::element(k, lane % S::GROUP)] = x[k];
            if constexpr (KeyCodec::UNITS) {
                const float infinity = __int_as_float(0x7f800000);
                float top = 1e-20f;
#pragma unroll
                for (int k = 0; k < N; k++) top = fmaxf(top, fabsf(x[k]) < infinity ? fabsf(x[k]) : infinity);
                top = largest_of_warp(top);
                if (lane == 0) to.largest[r] = top < infinity ? top : __int_as_float(0x7fffffff);
            }
            if constexpr (EXACT) {
                float square = 0.f;
#pragma unroll
                for (int k = 0; k < N; k++) square += x[k] * x[k];
#pragma unroll
                for (int k = 1; k < S::GROUP; k <<= 1) square += __shfl_xor_sync(~0u, square, k);
                if (lane == 0) to.next.length[r] = sqrtf(square);
            }
        }
    }
};

// The queries in `rows` as fragments, and what scores are to be multiplied by. All threads of the block.
DEVICE void make_fragments(const KeyCodec& keys, const QueryRows& q, float to_log2) {
    constexpr int STEPS = KeyCodec::STEPS;
    const float factor = EXACT ? 1.f : to_log2;
    for (int i = threadIdx.x; i < TILES_N * STEPS * 32; i += THREADS) {
        const int lane = i & 31, g = lane >> 2, row = i / 32 / STEPS * 8 + (NARROW ? g >> 1 : g);
        q.fragments[i] = KeyCodec::query(q.rows + row * Layout::QUERY_ROW, KeyCodec::UNITS ? q.largest[row] : 0.f, NARROW && g & 1,
                                         i / 32 % STEPS, lane & 3, factor);
    }
    const int row = threadIdx.x;
    if (row >= ROWS) return;
    q.now.bias[row] = q.next.bias[row];
    if (UNITS) q.unit[row] = (KeyCodec::UNITS ? keys.unit(q.largest[row]) : 1.f) * (EXACT ? q.next.size[row] : 1.f) * to_log2;
    if (EXACT) q.now.size[row] = q.next.size[row] * to_log2, q.now.length[row] = q.next.length[row];
}

// Fragments of the item at work: in registers if they fit, else where they are.
struct Fragments {
    Query q[Layout::Q_REGISTERS ? TILES_N : 1][Layout::Q_REGISTERS ? KeyCodec::STEPS : 1];
    const Query* from;
    DEVICE Fragments(const Query* fragments, int lane) : from(fragments + lane) {
        if constexpr (Layout::Q_REGISTERS)
#pragma unroll
            for (int n = 0; n < TILES_N; n++)
#pragma unroll
                for (int j = 0; j < KeyCodec::STEPS; j++) q[n][j] = from[(n * KeyCodec::STEPS + j) * 32];
    }
    DEVICE Query operator()(int n, int step) const {
        if constexpr (Layout::Q_REGISTERS) return q[n][step];
        else return from[(n * KeyCodec::STEPS + step) * 32];
    }
};
