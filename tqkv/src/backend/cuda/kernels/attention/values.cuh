// Values times weights.
#pragma once
#include "attention/softmax.cuh"

DEVICE void load_value_scales(Softmax::ValueScales& to, const u8* stage, int first_run, u32 key_row, float unit) {
#pragma unroll
    for (int u = 0; u < SUB; u++)
#pragma unroll
        for (int h = 0; h < V::SPANS; h++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int run = SUB == TILE / 16 ? u : first_run + u;
                to[u][h][half] = load_scale<V>(stage + Layout::V_SCALES, (run * 16 + key_row + half * 8) * V::SPANS + h);
                if constexpr (Softmax::WIDE) to[u][h][half] *= unit;
            }
}

template <bool FIRST, typename T> DEVICE T& choose(T& first, T& second) {
    if constexpr (FIRST) return first;
    else return second;
}

DEVICE void multiply_values(Softmax& sums, const Scores& s, const Scores& rests, bool large, const Softmax::ValueScales& v_scale, const RowFloats& unit,
                            const ValueCodec& values, const u8* stage, int first_run) {
    // Tensor cores cut sums off instead of rounding them: EXACT ones go through few steps before they are added to the others.
    float fresh[TILES_N][FRAGMENTS][4] = {};
    auto& to = choose<EXACT>(fresh, sums.o);
#pragma unroll
    for (int u = 0; u < SUB; u++) {
        const int run = SUB == TILE / 16 ? u : first_run + u;
        float w[TILES_N][4] = {};
        sums.weigh(s, rests, large, u, unit, w);
        repeat<V::SPANS>([&](auto h) {
            constexpr int H = decltype(h)::value;
            ValueCodec::W weights;
            // Rounded once, to f16, as a product: of few positions this is most of the output's error.
            const float scale0 = v_scale[u][H][0], scale1 = v_scale[u][H][1];
#pragma unroll
            for (int n = 0; n < TILES_N; n++)
                weights.set(n, w[n][0] * scale0, NARROW ? 0.f : w[n][1] * scale0, w[n][2] * scale1, NARROW ? 0.f : w[n][3] * scale1);
            values.template multiply<H>(stage + TILE * K::BYTES + run * 16 * V::BYTES, weights, to);
        });
    }
    if constexpr (EXACT)
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
                for (int e = 0; e < 4; e += NARROW + 1) sums.o[n][i][e] += NARROW ? fresh[n][i][e] + fresh[n][i][e + NARROW] : fresh[n][i][e];
}
