// What the warps of a block add up to.
#pragma once
#include "attention/parts.cuh"
#include "attention/softmax.cuh"

// A block's sums in shared memory, and what they are made in.
struct BlockSums : Sums {
    Real* warp_m;             // [WARPS][ROWS]
    float* warp_l;            // [WARPS][ROWS]
    float* scratch;           // [WARPS][512]
};

// The block's sum, four rows by 128 elements at a time. `meanwhile` is called once between two barriers.
template <typename F> DEVICE void sum_warps(const BlockSums& b, const Softmax& mine, u32 rows, int warp, int g, int t, F&& meanwhile) {
#pragma unroll
    for (int quad = 0; quad < ROWS / 4; quad++) {
        if (quad * 4 >= rows) break;
#pragma unroll
        for (int from = 0; from < FRAGMENTS; from += 8) {
            constexpr int FULL = FRAGMENTS < 8 ? FRAGMENTS : 8;
            if (NARROW || t >> 1 == (quad & 1))
#pragma unroll
                for (int i = 0; i < FULL; i++)
                    if (from + i < FRAGMENTS)
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const float* x = mine.o[quad >> 1][from + i] + 2 * e;
                            float* const to = b.scratch + warp * 512 + ((i * 8 + g) * 2 + e) * 4 + (NARROW ? t : 2 * (t & 1));
                            if (NARROW) *to = x[0];
                            else *(float2*)to = make_float2(x[0], x[1]);
                        }
            __syncthreads();
            if (quad + from == 0) meanwhile();
            Real top = -1e30f;
            float factor[WARPS];
            const int thread = threadIdx.x, row = quad * 4 + (thread & 3);
#pragma unroll
            for (int k = 0; k < WARPS; k++) top = larger(top, b.warp_m[k * ROWS + row]);
#pragma unroll
            for (int k = 0; k < WARPS; k++) factor[k] = exp2_approx((float)(b.warp_m[k * ROWS + row] - top));
            if (from == 0 && thread < 4) {
                float sum = 0.f;
#pragma unroll
                for (int k = 0; k < WARPS; k++) sum += factor[k] * b.warp_l[k * ROWS + row];
                b.m[row] = top, b.l[row] = sum;
            }
            for (int i = thread; i < FULL * 64; i += THREADS) {
                const int fragment = from + i / 64;
                if (fragment >= FRAGMENTS) break;
                float sum = 0.f;
#pragma unroll
                for (int k = 0; k < WARPS; k++) sum += factor[k] * b.scratch[k * 512 + i];
                const int d = ValueCodec::element(fragment, i >> 3 & 7, i >> 2 & 1);
                if (d >= 0) b.acc[row * Layout::ACC_ROW + d] = sum;
            }
            __syncthreads();
        }
    }
}

// All threads of the block, as parts.cuh wants them.
struct Block {
    static constexpr int THREADS = ::THREADS, ROWS = ::ROWS, ACC_ROW = Layout::ACC_ROW;
    static DEVICE int thread() { return threadIdx.x; }
    static DEVICE void wait() { __syncthreads(); }
};
