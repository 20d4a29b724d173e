// An item's queries: from global memory through registers to rows in shared memory, and from there to fragments.
#pragma once
#include "attention/layout.cuh"
#include "attention/rows.cuh"

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
    // `largest`: of each row, at least 1e-20; NaN if it holds what is not finite. `biases`: what the shift of the keys' channels takes
    // from its scores.
    DEVICE void keep(const Params& p, const Item& it, float* rows, float* largest, float* biases, int warp, int lane) {
#pragma unroll UNROLL
        for (int i = 0; i < MINE; i++) {
            const int r = warp + i * WARPS;
            if (r >= ROWS) break;
            float(&x)[N] = this->x[EARLY ? i : 0];
            if constexpr (!EARLY) load_query(p, it, r, x, lane);
            float* const to = rows + r * Layout::QUERY_ROW;
            if (p.key.channels) {
                const float bias = map_channels(p, it, x, lane);
                if (lane == 0) biases[r] = bias;
            }
#pragma unroll
            for (int k = 0; k < N; k++) x[k] *= p.q_scale;
            rotate<S>(x, p.key.turn, lane % S::GROUP);
#pragma unroll
            for (int k = 0; k < N; k++) to[S::element(k, lane % S::GROUP)] = x[k];
            if constexpr (KeyCodec::UNITS) {
                const float infinity = __int_as_float(0x7f800000);
                float top = 1e-20f;
#pragma unroll
                for (int k = 0; k < N; k++) top = fmaxf(top, fabsf(x[k]) < infinity ? fabsf(x[k]) : infinity);
#pragma unroll
                for (int k = 1; k < 32; k <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
                if (lane == 0) largest[r] = top < infinity ? top : __int_as_float(0x7fffffff);
            }
        }
    }
};

// The queries in `rows` as fragments, and what scores are to be multiplied by. All threads of the block.
DEVICE void make_fragments(const KeyCodec& keys, const float* rows, const float* largest, const float* next_biases, Query* fragments,
                           float* units, float* biases, float to_log2) {
    constexpr int STEPS = KeyCodec::STEPS;
    for (int i = threadIdx.x; i < TILES_N * STEPS * 32; i += THREADS) {
        const int lane = i & 31, g = lane >> 2, row = i / 32 / STEPS * 8 + (NARROW ? g >> 1 : g);
        fragments[i] = KeyCodec::query(rows + row * Layout::QUERY_ROW, KeyCodec::UNITS ? largest[row] : 0.f, NARROW && g & 1,
                                       i / 32 % STEPS, lane & 3, to_log2);
    }
    if (threadIdx.x < ROWS) biases[threadIdx.x] = next_biases[threadIdx.x];
    if (KeyCodec::UNITS && threadIdx.x < ROWS) units[threadIdx.x] = keys.unit(largest[threadIdx.x]) * to_log2;
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
