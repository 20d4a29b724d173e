// Scores of a tile's runs: products of keys and queries, times the keys' scales, in powers of two (or as they are, if they are capped).
#pragma once
#include "attention/queries.cuh"

typedef float Scores[SUB][TILES_N][2 * COLUMNS];
// Of every query row of a lane.
typedef float RowFloats[TILES_N][COLUMNS];

// What scores lack of an item's rows; returns how far they may reach for a key of length one.
DEVICE float load_units(RowFloats& unit, const QueryRows& q, int t) {
    float reach = 0.f;
#pragma unroll
    for (int n = 0; n < TILES_N; n++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const int row = tile_row(n, t, c);
            unit[n][c] = UNITS ? q.unit[row] : 1.f;
            if (EXACT) reach = fmaxf(reach, q.now.length[row] * fabsf(q.now.size[row]));
        }
    return reach;
}

template <typename QUERY> DEVICE void multiply_keys(Scores& s, const KeyCodec& keys, const QUERY& query, const u8* stage, int first_run, u32 key_row) {
#pragma unroll
    for (int u = 0; u < SUB; u++) {
        const int run = SUB == TILE / 16 ? u : first_run + u;
        const u8* const from = stage + run * 16 * K::BYTES;
        repeat<K::SPANS>([&](auto h) {
            constexpr int H = decltype(h)::value;
            float dot[TILES_N][4] = {};
            keys.template multiply<H>(from, query, dot);
            const int r = (run * 16 + key_row) * K::SPANS + H;
            const u8* const scales = stage + Layout::K_SCALES;
            const float scale0 = load_scale<K>(scales, r), scale1 = load_scale<K>(scales, r + 8 * K::SPANS);
#pragma unroll
            for (int n = 0; n < TILES_N; n++)
#pragma unroll
                for (int e = 0; e < 2 * COLUMNS; e++) {
                    const float x = dot[n][e * (NARROW + 1)] * (e < COLUMNS ? scale0 : scale1);
                    s[u][n][e] = H ? s[u][n][e] + x : x;
                }
        });
    }
}

__device__ __noinline__ double cap_in_f64(double x, double softcap) { return softcap * tanh(x / softcap); }
// A score in powers of two as a number of units and what that leaves over.
DEVICE void split_score(double x, float unit, float& score, float& rest) {
    score = (float)(x / unit);
    // What is not finite has no rest.
    rest = fabsf(score) <= 3e38f ? (float)(x - (double)score * unit) : 0.f;
}

// EXACT: scores that are so large that parts do not suffice, one by one in f64, from the tile's rows as they are stored. Rare, and slow.
DEVICE void sum_in_f64(Scores& s, Scores& rests, const Params& p, const RowFloats& unit, const QueryRows& q, const u8* stage, int first_run, u32 key_row, int t) {
    typedef Codec<K, (K::BYTES & -K::BYTES) < 16 ? (K::BYTES & -K::BYTES) : 16> Runs;
#pragma unroll 1
    for (int i = 0; i < 2 * SUB; i++) {
        const u32 row = (SUB == TILE / 16 ? 0 : first_run * 16) + i / 2 * 16 + key_row + i % 2 * 8;
        double sum[TILES_N][COLUMNS] = {};
#pragma unroll 1
        for (int e = 0; e < K::D; e += 8) {
            const u32 byte = e * K::STORED / 8;
            const auto run = Runs::load(stage + Placed<K>::place_byte(row, byte) - byte, e);
            const double scale = load_scale<K>(stage + Layout::K_SCALES, row * K::SPANS + e / K::SPAN);
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const double level = scale * Runs::level(p.key.levels, run, k);
#pragma unroll
                for (int n = 0; n < TILES_N; n++)
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) sum[n][c] += level * q.rows[tile_row(n, t, c) * Layout::QUERY_ROW + e + k];
            }
        }
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                float score, rest;
                split_score(sum[n][c] * q.now.size[tile_row(n, t, c)], unit[n][c], score, rest);
                // Registers have no index that is not a constant.
#pragma unroll
                for (int u = 0; u < SUB; u++)
#pragma unroll
                    for (int half = 0; half < 2; half++)
                        if (i == 2 * u + half) s[u][n][half * COLUMNS + c] = score, rests[u][n][half * COLUMNS + c] = rest;
            }
    }
}

// EXACT: whether a score of the warp may be larger than parts of f16 are exact for. `reach`: the largest length of this lane's queries,
// as scores have it.
DEVICE bool may_be_large(const KeyCodec& keys, float reach, float key_length, const u8* stage, int first_run, u32 key_row) {
    constexpr float LARGE = 64.f * LOG2E;
    float longest = 0.f;
    bool finite = true;
#pragma unroll
    for (int u = 0; u < SUB; u++) {
        const int run = SUB == TILE / 16 ? u : first_run + u;
        float square[2];
        keys.squares(stage + run * 16 * K::BYTES, square);
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
            for (int h = 0; h < K::SPANS; h++) {
                float length;
                if constexpr (K::CODED) {
                    length = load_scale<K>(stage + Layout::K_SCALES, (run * 16 + key_row + half * 8) * K::SPANS + h) * key_length;
                } else {
                    square[half] += __shfl_xor_sync(~0u, square[half], 1), square[half] += __shfl_xor_sync(~0u, square[half], 2);
                    length = sqrtf(square[half]);
                }
                longest = fmaxf(longest, length), finite &= length <= 3e38f;
            }
    }
    return __any_sync(~0u, !finite || !(longest * reach <= LARGE));
}

// Sums scores in f64 that may be large; whether they are.
DEVICE bool sum_large(Scores& s, Scores& rests, const Params& p, const KeyCodec& keys, const RowFloats& unit, float reach, const QueryRows& q,
                      const u8* stage, int first_run, u32 key_row, int t) {
    bool large = false;
    if constexpr (EXACT) {
        large = may_be_large(keys, reach * (p.softcap > 0.f ? LOG2E : 1.f), p.key_length, stage, first_run, key_row);
        if (unlikely(large)) sum_in_f64(s, rests, p, unit, q, stage, first_run, key_row, t);
    }
    return large;
}

// `biases`: of the block's rows, or null.
DEVICE void cap(Scores& s, Scores& rests, const RowFloats& unit, const float* biases, int t, float softcap) {
    const float inverse = 1.f / softcap, factor = softcap * LOG2E;
#pragma unroll
    for (int u = 0; u < SUB; u++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int e = 0; e < 2 * COLUMNS; e++) {
                const float scale = unit[n][e % COLUMNS], bias = biases ? biases[tile_row(n, t, e % COLUMNS)] : 0.f;
                if constexpr (EXACT) {
                    const double x = (double)s[u][n][e] * scale + rests[u][n][e] + bias;
                    split_score(cap_in_f64(x, softcap) * LOG2E, scale, s[u][n][e], rests[u][n][e]);
                } else {
                    s[u][n][e] = factor / scale * tanh_exact(s[u][n][e] * (scale * inverse) + bias * inverse);
                }
            }
}

// Gives positions that a row does not see a score of minus infinity; `base`: of the first run's first row.
DEVICE void hide(Scores& s, Scores& rests, const Params& p, const Item& it, int base, u32 key_row, int t) {
#pragma unroll
    for (int n = 0; n < TILES_N; n++)
#pragma unroll
        for (int c = 0; c < COLUMNS; c++) {
            const Bounds seen = visible(p, it, it.row + tile_row(n, t, c));
#pragma unroll
            for (int u = 0; u < SUB; u++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int position = base + u * 16 + half * 8 + (int)key_row;
                    if (position < seen.lo || position >= seen.hi) s[u][n][half * COLUMNS + c] = -__int_as_float(0x7f800000), rests[u][n][half * COLUMNS + c] = 0.f;
                }
        }
}
