// The rotation T S of one row by one warp. S negates the elements whose bit in `signs` is set; T is a Walsh-Hadamard
// transform of every block of the largest power of two that divides the head dim, and across blocks, where there are
// several, a Householder reflection. T is symmetric and its own inverse, so the way back is S T.
#pragma once
#include "common.cuh"

template <int D> struct Rotation {
    static constexpr int BLOCK = D & -D;
    static constexpr int BLOCKS = D / BLOCK;
};
// 1/sqrt(BLOCK), exact to f32.
template <int D> DEVICE float rotation_norm() {
    constexpr int k = Rotation<D>::BLOCK;
    return k == 16     ? 0.25f
           : k == 32   ? 0.17677669529663689f
           : k == 64   ? 0.125f
           : k == 128  ? 0.08838834764831845f
           : k == 256  ? 0.0625f
           : k == 512  ? 0.04419417382415922f
                       : 0.03125f;
}

DEVICE float flip_sign(const u32* signs, int i, float x) {
    return signs ? __uint_as_float(__float_as_uint(x) ^ (signs[i >> 5] >> (i & 31) << 31)) : x;
}

// Element lane + 32 k of the row is x[k].
template <int D> DEVICE void rotate_registers(float (&x)[(D + 31) / 32], int lane) {
    constexpr int BLOCK = Rotation<D>::BLOCK, BLOCKS = Rotation<D>::BLOCKS, N = D / 32;
#pragma unroll
    for (int h = 1; h < 32; h <<= 1)
#pragma unroll
        for (int k = 0; k < N; k++) {
            float other = __shfl_xor_sync(~0u, x[k], h);
            x[k] = lane & h ? other - x[k] : x[k] + other;
        }
#pragma unroll
    for (int h = 1; h < BLOCK / 32; h <<= 1)
#pragma unroll
        for (int k = 0; k < N; k++)
            if (!(k & h)) {
                float a = x[k], b = x[k + h];
                x[k] = a + b, x[k + h] = a - b;
            }
#pragma unroll
    for (int k = 0; k < N; k++) x[k] *= rotation_norm<D>();
    if (BLOCKS > 1)
#pragma unroll
        for (int j = 0; j < BLOCK / 32; j++) {
            float sum = 0;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) sum += x[b * (BLOCK / 32) + j];
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) x[b * (BLOCK / 32) + j] -= sum * (2.f / BLOCKS);
        }
}

// The same for head dims that 32 does not divide, in shared memory.
template <int D> DEVICE void rotate_shared(float* x, int lane) {
    constexpr int BLOCK = Rotation<D>::BLOCK, BLOCKS = Rotation<D>::BLOCKS;
    for (int h = 1; h < BLOCK; h <<= 1) {
        for (int i = lane; i < D / 2; i += 32) {
            int lo = 2 * i - (i & (h - 1)), hi = lo + h;
            float a = x[lo], b = x[hi];
            x[lo] = a + b, x[hi] = a - b;
        }
        __syncwarp();
    }
    for (int i = lane; i < D; i += 32) x[i] *= rotation_norm<D>();
    __syncwarp();
    if (BLOCKS > 1) {
        for (int j = lane; j < BLOCK; j += 32) {
            float sum = 0;
            for (int b = 0; b < BLOCKS; b++) sum += x[b * BLOCK + j];
            for (int b = 0; b < BLOCKS; b++) x[b * BLOCK + j] -= sum * (2.f / BLOCKS);
        }
        __syncwarp();
    }
}

// T of the row `x` in shared memory, by one warp.
template <int D> DEVICE void rotate_row(float* x, int lane) {
    if constexpr (D % 32 == 0) {
        float r[(D + 31) / 32];
#pragma unroll
        for (int k = 0; k < D / 32; k++) r[k] = x[lane + 32 * k];
        rotate_registers<D>(r, lane);
#pragma unroll
        for (int k = 0; k < D / 32; k++) x[lane + 32 * k] = r[k];
        __syncwarp();
    } else {
        rotate_shared<D>(x, lane);
    }
}
