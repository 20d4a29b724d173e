// Attention over a dense f32 cache: the plain way, exact to f32, any page size. For comparison, not for speed.
//
// Kernel `attention_f32`, parameters and items as in attention.cu, with these differences:
//   grid (items, 1, 1): one block an item; `next` is not followed, and part_count must be 1 (plan without splits)
//   block (128, 1, 1), dynamic shared memory 16 * HEAD_DIM bytes
//   `rows` may be any number, and tiles are of TILE positions (default 64), used only to bound the loop
//   k_codes, v_codes: f32 [pages, kv_heads, page_size, HEAD_DIM]; no scales, no codebooks
// Macros: HEAD_DIM, Q_TYPE, OUT_TYPE, PAGE_SIZE, TILE.
#ifndef TILE
#define TILE 64
#endif
#include "attention.cuh"

extern "C" __global__ void __launch_bounds__(128) attention_f32(const __grid_constant__ Params p) {
    extern __shared__ float rows_shared[];
    constexpr int N = (D + 31) / 32;
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    float* const x = rows_shared + warp * D;
    const Item it = p.items[blockIdx.x];
    const u32* const pages = p.page_table + (u64)it.sequence * p.table_width;
    const u32 capacity = p.table_width * page_size(p);
    for (u32 r = warp; r < it.rows; r += 4) {
        const u32 row = it.row + r;
        const u64 from = query_row(p, it, row) * D;
        for (int d = lane; d < D; d += 32) {
            const float v = load_element<Q_TYPE>(p.q, from + d) * p.q_scale;
            x[d] = p.rotate_q ? flip_sign(p.k_signs, d, v) : v;
        }
        __syncwarp();
        if (p.rotate_q) rotate_row<D>(x, lane);
        float q[N], o[N], m = -1e30f, l = 0.f;
#pragma unroll
        for (int k = 0; k < N; k++) q[k] = lane + 32 * k < D ? x[lane + 32 * k] : 0.f, o[k] = 0.f;
        Bounds seen = visible(p, it, row);
        seen.lo = max(seen.lo, (int)it.tile_begin * TILE), seen.hi = min(seen.hi, (int)it.tile_end * TILE);
        for (int position = seen.lo; position < seen.hi; position++) {
            const u32 slot = (u32)position % capacity;
            const u64 at = (((u64)pages[slot / page_size(p)] * p.kv_heads + it.kv_head) * page_size(p) + slot % page_size(p)) * D;
            const float *key = (const float*)p.k_codes + at, *value = (const float*)p.v_codes + at;
            float s = 0.f;
#pragma unroll
            for (int k = 0; k < N; k++)
                if (lane + 32 * k < D) s += q[k] * key[lane + 32 * k];
#pragma unroll
            for (int k = 16; k; k >>= 1) s += __shfl_xor_sync(~0u, s, k);
            if (p.softcap > 0.f) s = p.softcap * tanh_exact(s / p.softcap);
            s *= LOG2E;
            const float top = fmaxf(m, s), shrink = exp2_approx(m - top), w = exp2_approx(s - top);
            m = top, l = l * shrink + w;
#pragma unroll
            for (int k = 0; k < N; k++)
                if (lane + 32 * k < D) o[k] = o[k] * shrink + w * value[lane + 32 * k];
        }
        __syncwarp();
#pragma unroll
        for (int k = 0; k < N; k++)
            if (lane + 32 * k < D) x[lane + 32 * k] = o[k];
        __syncwarp();
        finish_row(p, it, row, x, m, l, lane);
        __syncwarp();
    }
}
