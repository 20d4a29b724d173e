// Attention for every shape and codec, in f32 on plain cores: for f32 queries, whose precision f16 tensor cores (attention.cu)
// would lose, and for shapes that those do not take. Blocks are (query token, head, split of the positions); each warp runs
// through every WARPS-th position of its split with an online softmax, and the block that finishes last joins the splits.
// -D: HEAD_DIM; for K and V: BITS, PACKING, SCALING; Q_TYPE, OUT_TYPE.
#include "row.cuh"
#include "rotate.cuh"

struct Side {
    const u8* codes;
    const u8* scales;
    const float* levels;
    Turn turn;
    float unit;  // what a stored scale is multiplied by, or divided by if it is a block's
    u32 pad;
};
struct Params {
    Side key, value;
    const void* q;
    void* out;
    float* lse;          // or null
    const float* sinks;  // or null
    const Span* spans;
    const u32* table;
    float* partial;      // [rows, splits, HEAD_DIM], if there are several splits
    double2* partial_ml; // [rows, splits]: maximum and sum
    u32* counters;       // [rows], zero before and after
    u32 splits, pad;
    u32 sequences, kv_heads, heads, page_size, width;
    u32 causal, window, original;
    float scale, softcap;  // softcap 0: none
};
static_assert(sizeof(Params) == PARAMS_BYTES, "as the host sees it");

constexpr int D = HEAD_DIM, WARPS = 8, PER_LANE = (D + 31) / 32;
typedef Row<D, K_BITS, K_PACKING, K_SCALING, 1> K;
typedef Row<D, V_BITS, V_PACKING, V_SCALING, 1> V;

template <typename R> DEVICE float decode(const Side& s, u64 row, int e) {
    const u8* const codes = s.codes + row * R::BYTES;
    if (R::PACKING == PACK_F32) return ((const float*)codes)[e];
    if (R::PACKING == PACK_F16) return f32_from_f16(((const u16*)codes)[e]);
    u32 code;
    if (R::PACKING == PACK_BYTE) {
        code = codes[e];
    } else if (R::PACKING == PACK_PLANES) {
        code = (u32)load_run<R>(codes, e & ~7) >> e % 8 * 4;
    } else {
        const int byte = e * R::BITS / 8, shift = e * R::BITS % 8;
        code = codes[byte];
        if (shift + R::BITS > 8) code |= (u32)codes[byte + 1] << 8;
        code >>= shift;
    }
    const float level = s.levels[code & (R::LEVELS - 1)];
    if (R::SCALING == SCALE_CORRECTED) return level * f32_from_f16(((const u16*)s.scales)[row]);
    if (R::SCALING == SCALE_NORM) return level * (((const float*)s.scales)[row] * s.unit);
    return level * __fdiv_rn(((const float*)s.scales)[row * R::SCALES + e / 256], s.unit);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) plain(const __grid_constant__ Params p) {
    __shared__ float shared_row[D], sums[WARPS][D];
    __shared__ double tops[WARPS];
    __shared__ float weights[WARPS];
    __shared__ bool last;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 row_index = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
    const u32 token = row_index / p.heads, head = row_index % p.heads, kv_head = head / (p.heads / p.kv_heads);
    u32 sequence = 0;
    while (p.spans[sequence].start + p.spans[sequence].new_ <= token) sequence++;
    const Span span = p.spans[sequence];
    const u64 at = (u64)row_index * D;

    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
        const float x = load_element<Q_TYPE>(p.q, at + d);
        shared_row[d] = p.original && p.key.turn.rotated ? flip_sign(p.key.turn.signs, d, x) : x;
    }
    __syncthreads();
    if (p.original && p.key.turn.rotated) {
        if (warp == 0) rotate_row<D>(shared_row, lane);
        __syncthreads();
    }
    float q[PER_LANE], out[PER_LANE] = {};
    for (int k = 0; k < PER_LANE; k++) q[k] = lane + 32 * k < D ? shared_row[lane + 32 * k] : 0.f;

    const u32 position = span.len - span.new_ + token - span.start;
    const u32 all_end = p.causal ? position + 1 : span.len;
    const u32 all_begin = p.window && position + 1 > p.window ? max(span.first, position + 1 - p.window) : span.first;
    const u32 seen = all_end > all_begin ? all_end - all_begin : 0, share = (seen + p.splits - 1) / p.splits;
    const u32 begin = all_begin + min(split * share, seen), end = min(begin + share, all_begin + seen);
    // Scores reach the hundreds, where f32 steps by 3e-5: what is subtracted before exp is finer.
    double top = -1e300;
    float weight = 0.f;
    for (u32 i = begin + warp; i < end; i += WARPS) {
        const u64 row = locate(p.table + (u64)sequence * p.width, i, p.page_size, p.width, p.kv_heads, kv_head);
        float dot = 0.f;
        for (int k = 0; k < PER_LANE; k++)
            if (lane + 32 * k < D) dot += q[k] * decode<K>(p.key, row, lane + 32 * k);
        double score = dot;
        for (int h = 16; h > 0; h >>= 1) score += __shfl_xor_sync(~0u, score, h);
        score *= p.scale;
        if (p.softcap > 0.f) score = p.softcap * tanh(score / p.softcap);
        if (score > top) {
            const float shrink = expf((float)(top - score));
            weight *= shrink;
            for (int k = 0; k < PER_LANE; k++) out[k] *= shrink;
            top = score;
        }
        const float w = expf((float)(score - top));
        weight += w;
        for (int k = 0; k < PER_LANE; k++)
            if (lane + 32 * k < D) out[k] += w * decode<V>(p.value, row, lane + 32 * k);
    }
    for (int k = 0; k < PER_LANE; k++)
        if (lane + 32 * k < D) sums[warp][lane + 32 * k] = out[k];
    if (lane == 0) tops[warp] = top, weights[warp] = weight;
    __syncthreads();

    double all = -1e300;
    float total = 0.f;
    for (int w = 0; w < WARPS; w++) all = fmax(all, tops[w]);
    for (int w = 0; w < WARPS; w++) total += weights[w] * expf((float)(tops[w] - all));
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += sums[w][d] * expf((float)(tops[w] - all));
        shared_row[d] = sum;
    }
    if (p.splits > 1) {
        float* const partial = p.partial + (u64)row_index * p.splits * D;
        double2* const ml = p.partial_ml + (u64)row_index * p.splits;
        for (int d = threadIdx.x; d < D; d += WARPS * 32) __stcg(partial + split * D + d, shared_row[d]);
        if (threadIdx.x == 0) __stcg(ml + split, make_double2(all, total));
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(p.counters + row_index, 1) == p.splits - 1;
            if (last) p.counters[row_index] = 0;
            __threadfence();
        }
        __syncthreads();
        if (!last) return;
        all = -1e300, total = 0.f;
        for (u32 k = 0; k < p.splits; k++) all = fmax(all, __ldcg(ml + k).x);
        for (u32 k = 0; k < p.splits; k++) total += (float)__ldcg(ml + k).y * expf((float)(__ldcg(ml + k).x - all));
        for (int d = threadIdx.x; d < D; d += WARPS * 32) {
            float sum = 0.f;
            for (u32 k = 0; k < p.splits; k++) sum += __ldcg(partial + k * D + d) * expf((float)(__ldcg(ml + k).x - all));
            shared_row[d] = sum;
        }
    }
    if (p.sinks) {
        const double top = fmax(all, (double)p.sinks[head]);
        const float shrink = expf((float)(all - top));
        total = total * shrink + expf((float)(p.sinks[head] - top));
        for (int d = threadIdx.x; d < D; d += WARPS * 32) shared_row[d] *= shrink;
        all = top;
    }
    for (int d = threadIdx.x; d < D; d += WARPS * 32) shared_row[d] = total > 0.f ? shared_row[d] / total : 0.f;
    __syncthreads();
    const bool restored = p.original && p.value.turn.rotated;
    if (restored) {
        if (warp == 0) rotate_row<D>(shared_row, lane);
        __syncthreads();
    }
    for (int d = threadIdx.x; d < D; d += WARPS * 32)
        store_element<OUT_TYPE>(p.out, at + d, restored ? flip_sign(p.value.turn.signs, d, shared_row[d]) : shared_row[d]);
    if (p.lse && threadIdx.x == 0)
        p.lse[row_index] = total > 0.f ? (float)(all + log((double)total)) : -__int_as_float(0x7f800000);
}
