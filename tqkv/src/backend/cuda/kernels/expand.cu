// Rows of pools to f16, in tiles as products by a warpgroup want them (hopper.cuh): what prefill.cu multiplies. -D: K_ and V_DIM, BITS,
// PACKING, SCALING; K_ and V_ALIGN (bytes that codes are aligned to); TILE (positions of a tile).
//
// A tile of one KV head is `TILE` positions from a multiple of it on: a matrix of keys and one of values, [TILE, D], zero where nothing is
// stored. Rows stay in the rotated domain. So that f16 holds them whatever their scales are, those of a tile are brought to 2^10 by a power of two,
// of the largest: rows down to 2^-20 of it keep all bits. `units` has what keys want as a factor, and the binary logarithm of what values want.
// (Levels with their scales beside them would spare keys a rounding; their product with every score costs a ninth of the time.)
#include "codec/codec.cuh"
#include "hopper.cuh"

// Tiles [tile_begin, tile_begin + tiles) of `heads` KV heads of a sequence, head by head, are in the workspace from tile `base` on.
struct Stretch {
    u32 sequence, head, tile_begin, tiles;
    u32 base, first, len, pad;  // positions [first, len) are stored
};

struct Params {
    Side key, value;
    const u32* page_table;      // [sequences, width]
    const Stretch* stretches;   // [count], by base
    u8 *keys, *values;          // [total] matrices
    float2* units;              // [total]
    u32 count, total, kv_heads, page_size, width, pad;
};

constexpr int THREADS = 256, PARTS = 4, PART = TILE / PARTS;  // of a side of a tile, one block each
typedef Row<K_DIM, K_BITS, K_PACKING, K_SCALING> K;
typedef Row<V_DIM, V_BITS, V_PACKING, V_SCALING> V;

// The largest of the block's, to all threads.
DEVICE float block_max(float x, float* scratch) {
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = scratch[0];
#pragma unroll
    for (int k = 1; k < THREADS / 32; k++) x = fmaxf(x, scratch[k]);
    return x;
}

// What the rows of a tile are divided by. `rows`: of the store, by position; none: ~0.
template <typename R> DEVICE float tile_unit(const Side& side, const u32* rows, float* scratch) {
    if (R::SCALING == SCALE_NONE) return 1.f;
    float largest = 0.f;
    for (u32 i = threadIdx.x; i < TILE * R::SPANS; i += THREADS) {
        const u32 row = rows[i / R::SPANS];
        if (row != ~0u) largest = fmaxf(largest, fabsf(load_factor<R>(side.scales + scales_at<R>(side.strides, row), i % R::SPANS, side.unit)));
    }
    return inverse_power(inverse_power(fminf(fmaxf(block_max(largest, scratch), 0x1p-60f), 0x1p126f))) * 0x1p-10f;
}

// Rows [from, from + PART) of one side of a tile; gives what they were divided by.
template <typename R, int ALIGN> DEVICE float expand(const Side& side, const float* table, u8* to, const u32* rows, u32 from, float* scratch) {
    typedef Codec<R, ALIGN> C;
    typedef Shape<R::D> S;
    const float unit = tile_unit<R>(side, rows, scratch), shrink = inverse_power(unit);
    const int lane = threadIdx.x % S::GROUP;
    for (u32 r = from + threadIdx.x / S::GROUP; r < from + PART; r += THREADS / S::GROUP) {
        const u32 row = rows[r];
        float factors[R::SPANS];
#pragma unroll
        for (int s = 0; s < R::SPANS; s++) factors[s] = row == ~0u ? 0.f : load_factor<R>(side.scales + scales_at<R>(side.strides, row), s, side.unit) * shrink;
#pragma unroll
        for (int k = 0; k < S::N / 8; k++) {
            const int e = S::element(k, lane);
            uint4 words = make_uint4(0, 0, 0, 0);
            if (row != ~0u) {
                const typename C::Run run = C::load(side.codes + codes_at<R>(side.strides, row), e);
                float x[8];
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] = C::decode(table, run, i, factors[k * 8 * R::SPANS / S::N]);
                words = make_uint4(f16x2_from_f32(x[0], x[1]), f16x2_from_f32(x[2], x[3]), f16x2_from_f32(x[4], x[5]), f16x2_from_f32(x[6], x[7]));
            }
            *(uint4*)(to + e / 64 * (TILE * 128) + swizzled(r, e % 64 / 8)) = words;
        }
    }
    return unit;
}

extern "C" __global__ void __launch_bounds__(THREADS) expand(const __grid_constant__ Params p) {
    begin();
    typedef Codec<K, K_ALIGN> KC;
    typedef Codec<V, V_ALIGN> VC;
    constexpr int K_BYTES = (K_DIM + 63) / 64 * TILE * 128, V_BYTES = (V_DIM + 63) / 64 * TILE * 128;
    __shared__ float table[KC::TABLE + VC::TABLE ? KC::TABLE + VC::TABLE : 1], scratch[THREADS / 32];
    __shared__ u32 rows[TILE];
    KC::fill(table, p.key.levels, threadIdx.x, THREADS);
    VC::fill(table + KC::TABLE, p.value.levels, threadIdx.x, THREADS);
    for (u32 work = blockIdx.x; work < p.total * (2 * PARTS); work += gridDim.x) {
        const u32 tile = work / (2 * PARTS), from = work % PARTS * PART;
        u32 at = 0, end = p.count;  // the last stretch that does not begin after it
        while (end - at > 1) {
            const u32 middle = (at + end) / 2;
            if (p.stretches[middle].base <= tile) at = middle;
            else end = middle;
        }
        const Stretch s = p.stretches[at];
        const u32 head = s.head + (tile - s.base) / s.tiles, begin = (s.tile_begin + (tile - s.base) % s.tiles) * TILE;
        __syncthreads();
        if (threadIdx.x < TILE) {
            const u32 position = begin + threadIdx.x;
            const bool stored = position >= s.first && position < s.len;
            rows[threadIdx.x] = stored ? locate(p.page_table + (u64)s.sequence * p.width, position, Divisor(p.page_size), p.width, p.kv_heads, head) : ~0u;
        }
        __syncthreads();
        if (work / PARTS % 2 == 0) {
            const float unit = expand<K, K_ALIGN>(p.key, table, p.keys + (u64)tile * K_BYTES, rows, from, scratch);
            if (threadIdx.x + from == 0) p.units[tile].x = unit;
        } else {
            const float unit = expand<V, V_ALIGN>(p.value, table + KC::TABLE, p.values + (u64)tile * V_BYTES, rows, from, scratch);
            if (threadIdx.x + from == 0) p.units[tile].y = (float)((int)(__float_as_uint(unit) >> 23) - 127);
        }
    }
}
