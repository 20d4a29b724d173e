// The online softmax of a warp's rows, and their sums of values.
//
// Weights are multiplied by the values' scales as f16, so the running maximum is one of score + log2 of the scale: whatever the
// scales are, no product overflows. It moves only when it may grow by more than 2^SLACK. Scores so large that their steps hide a scale
// (beyond 2^23) need nothing of f16 scales, which f16 holds; f32 scales are brought near one by `v_unit`.
#pragma once
#include "attention/scores.cuh"

struct Softmax {
    static constexpr float SLACK = 8.f, LARGEST_SCALE = 0x1p15f, SMALLEST_SCALE = 0x1p-8f;
    static constexpr bool WIDE = V::SCALE_BYTES == 4;
    float o[TILES_N][FRAGMENTS][4];  // sums of values
    Real m[TILES_N][COLUMNS];        // running maximum
    RowFloats l;                     // sum of weights
    float v_unit;                    // WIDE: what values' scales are multiplied by, a power of two

    DEVICE Softmax() : v_unit(1.f) {
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) m[n][c] = -1e30f, l[n][c] = 0.f;
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i++) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0.f;
        }
    }

    typedef float ValueScales[SUB][V::SPANS][2];

    // Moves the maxima where scores and scales want it. `first`: nothing is summed yet. `large`: scores that f32 may not tell apart.
    // These become differences to the maxima, as f64 has them.
    DEVICE void grow(Scores& s, Scores& rests, ValueScales& v_scale, const RowFloats& unit, bool first, bool large) {
        float largest = 0x1p-60f, top[TILES_N][COLUMNS];
#pragma unroll
        for (int u = 0; u < SUB; u++)
#pragma unroll
            for (int h = 0; h < V::SPANS; h++)
#pragma unroll
                for (int half = 0; half < 2; half++) largest = fmaxf(largest, v_scale[u][h][half]);
        const float above = V::SCALE_BYTES ? log2_approx(largest) - SLACK : -SLACK;
        bool grown = large || (WIDE && largest > LARGEST_SCALE);
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                top[n][c] = -__int_as_float(0x7f800000);
#pragma unroll
                for (int u = 0; u < SUB; u++) top[n][c] = fmaxf(top[n][c], fmaxf(s[u][n][c], s[u][n][c + COLUMNS]));
                grown |= top[n][c] * unit[n][c] + above > (float)m[n][c];
            }
        if (unlikely(__any_sync(~0u, grown))) {
            if constexpr (WIDE) narrow(v_scale, largest, first);
            move(s, rests, v_scale, unit);
            if (EXACT && large)
#pragma unroll
                for (int u = 0; u < SUB; u++)
#pragma unroll
                    for (int n = 0; n < TILES_N; n++)
#pragma unroll
                        for (int e = 0; e < 2 * COLUMNS; e++) {
                            const Real x = (Real)s[u][n][e] * unit[n][e % COLUMNS] + rests[u][n][e];
                            s[u][n][e] = 0.f, rests[u][n][e] = (float)(x - m[n][e % COLUMNS]);
                        }
        }
    }
    // Brings scales near one that f16 does not hold. The maxima follow, as far as they are not so large that they cannot.
    DEVICE void narrow(ValueScales& v_scale, float largest, bool first) {
#pragma unroll
        for (int k = 1; k < 32; k <<= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, k));
        if (largest > LARGEST_SCALE || (first && largest < SMALLEST_SCALE)) {
            const float change = inverse_power(fminf(largest, 0x1p100f));
            v_unit *= change;
#pragma unroll
            for (int u = 0; u < SUB; u++)
#pragma unroll
                for (int h = 0; h < V::SPANS; h++) v_scale[u][h][0] *= change, v_scale[u][h][1] *= change;
#pragma unroll
            for (int n = 0; n < TILES_N; n++)
#pragma unroll
                for (int c = 0; c < COLUMNS; c++) {
                    const Real before = m[n][c];
                    m[n][c] += log2_approx(change);
                    const float grown = exp2_approx((float)(before - m[n][c])), kept = grown * change;
                    l[n][c] *= grown;
#pragma unroll
                    for (int i = 0; i < FRAGMENTS; i++) o[n][i][c] *= kept, o[n][i][c + 2] *= kept;
                }
        }
    }
    DEVICE void move(const Scores& s, const Scores& rests, const ValueScales& v_scale, const RowFloats& unit) {
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
                Real x = m[n][c];
#pragma unroll
                for (int u = 0; u < SUB; u++)
#pragma unroll
                    for (int half = 0; half < 2; half++) {
                        float scale = 0x1p-60f;
#pragma unroll
                        for (int h = 0; h < V::SPANS; h++) scale = fmaxf(scale, v_scale[u][h][half]);
                        const int e = half * COLUMNS + c;
                        x = larger(x, (Real)s[u][n][e] * unit[n][c] + (EXACT ? rests[u][n][e] : 0.f) + fminf(log2_approx(scale), 100.f));
                    }
#pragma unroll
                for (int k = 4; k < 32; k <<= 1) x = larger(x, __shfl_xor_sync(~0u, x, k));
                const float shrink = exp2_approx((float)(m[n][c] - x));
                m[n][c] = x, l[n][c] *= shrink;
#pragma unroll
                for (int i = 0; i < FRAGMENTS; i++) o[n][i][c] *= shrink, o[n][i][c + 2] *= shrink;
            }
    }

    // Of run `u`: its weights, in the order of a fragment.
    // `large`: as `grow` has left them.
    DEVICE void weigh(const Scores& s, const Scores& rests, bool large, int u, const RowFloats& unit, float (&w)[TILES_N][4]) {
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int e = 0; e < 2 * COLUMNS; e++) {
                const Real top = EXACT && large ? 0.f : m[n][e % COLUMNS];
                const float high = (float)top;
                const float above = EXACT ? __fmaf_rn(s[u][n][e], unit[n][e % COLUMNS], -high) + (rests[u][n][e] - (float)(top - high))
                                          : s[u][n][e] * unit[n][e % COLUMNS] - high;
                const float x = exp2_approx(above);
                w[n][e * (NARROW + 1)] = x, l[n][e % COLUMNS] += x;
            }
    }

    // Sums weights over the lanes, and leaves maxima and sums of this warp's rows to the block.
    DEVICE void close(Real* warp_m, float* warp_l, int g, int t) {
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
                for (int k = 4; k < 32; k <<= 1) l[n][c] += __shfl_xor_sync(~0u, l[n][c], k);
                // Of a row that saw nothing no sum stays: zero times a value that is not a number is none either.
                const float kept = l[n][c] == 0.f ? 0.f : WIDE ? inverse_power(v_unit) : 1.f;
                if (unlikely(kept != 1.f))
#pragma unroll
                    for (int i = 0; i < FRAGMENTS; i++) {
                        o[n][i][c] = kept == 0.f ? 0.f : o[n][i][c] * kept;
                        o[n][i][c + 2] = kept == 0.f ? 0.f : o[n][i][c + 2] * kept;
                    }
                if (g == 0) warp_m[tile_row(n, t, c)] = m[n][c], warp_l[tile_row(n, t, c)] = l[n][c];
            }
    }
};
