// Scores of a tile's runs: products of keys and queries, times the keys' scales, in powers of two (or as they are, if they are capped).
#pragma once
#include "attention/layout.cuh"

typedef float Scores[SUB][TILES_N][2 * COLUMNS];
// Of every query row of a lane.
typedef float RowFloats[TILES_N][COLUMNS];

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

// `biases`: of the block's rows, or null.
DEVICE void cap(Scores& s, const RowFloats& unit, const float* biases, int t, float softcap) {
    const float inverse = 1.f / softcap, factor = softcap * LOG2E;
#pragma unroll
    for (int u = 0; u < SUB; u++)
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int e = 0; e < 2 * COLUMNS; e++) {
                const float scale = unit[n][e % COLUMNS], bias = biases ? biases[tile_row(n, t, e % COLUMNS)] : 0.f;
                s[u][n][e] = factor / scale * tanh_exact(s[u][n][e] * (scale * inverse) + bias * inverse);
            }
}

// Gives positions that a row does not see a score of minus infinity; `base`: of the first run's first row.
DEVICE void hide(Scores& s, const Params& p, const Item& it, int base, u32 key_row, int t) {
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
                    if (position < seen.lo || position >= seen.hi) s[u][n][half * COLUMNS + c] = -__int_as_float(0x7f800000);
                }
        }
}
