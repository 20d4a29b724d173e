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

DEVICE void multiply_values(Softmax& sums, const Scores& s, const Softmax::ValueScales& v_scale, const RowFloats& unit, const ValueCodec& values,
                            const u8* stage, int first_run) {
#pragma unroll
    for (int u = 0; u < SUB; u++) {
        const int run = SUB == TILE / 16 ? u : first_run + u;
        float w[TILES_N][4] = {};
        sums.weigh(s, u, unit, w);
        repeat<V::SPANS>([&](auto h) {
            constexpr int H = decltype(h)::value;
            u32 b0[TILES_N], b1[TILES_N];
            // Rounded once, to f16, as a product: of few positions this is most of the output's error.
            const float scale0 = v_scale[u][H][0], scale1 = v_scale[u][H][1];
#pragma unroll
            for (int n = 0; n < TILES_N; n++) {
                b0[n] = transpose8(f16x2_from_f32(w[n][0] * scale0, NARROW ? 0.f : w[n][1] * scale0));
                b1[n] = transpose8(f16x2_from_f32(w[n][2] * scale1, NARROW ? 0.f : w[n][3] * scale1));
            }
            values.template multiply<H>(stage + TILE * K::BYTES + run * 16 * V::BYTES, b0, b1, sums.o);
        });
    }
}
