// Attention for every shape and codec, in f32 on plain cores: for what the tensor-core kernel (attention.cu) does not take, and
// its judge. One block a (query token, head); each warp runs through every WARPS-th position with an online softmax.
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
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 token = blockIdx.x / p.heads, head = blockIdx.x % p.heads, kv_head = head / (p.heads / p.kv_heads);
    u32 sequence = 0;
    while (p.spans[sequence].start + p.spans[sequence].new_ <= token) sequence++;
    const Span span = p.spans[sequence];
    const u64 at = ((u64)token * p.heads + head) * D;

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
    const u32 end = p.causal ? position + 1 : span.len;
    const u32 begin = p.window && position + 1 > p.window ? max(span.first, position + 1 - p.window) : span.first;
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

    double all = p.sinks ? (double)p.sinks[head] : -1e300;
    for (int w = 0; w < WARPS; w++) all = fmax(all, tops[w]);
    float total = p.sinks ? expf((float)(p.sinks[head] - all)) : 0.f;
    for (int w = 0; w < WARPS; w++) total += weights[w] > 0.f ? weights[w] * expf((float)(tops[w] - all)) : 0.f;
    for (int d = threadIdx.x; d < D; d += WARPS * 32) {
        float sum = 0.f;
        for (int w = 0; w < WARPS; w++) sum += weights[w] > 0.f ? sums[w][d] * expf((float)(tops[w] - all)) : 0.f;
        shared_row[d] = total > 0.f ? sum / total : 0.f;
    }
    __syncthreads();
    const bool restored = p.original && p.value.turn.rotated;
    if (restored) {
        if (warp == 0) rotate_row<D>(shared_row, lane);
        __syncthreads();
    }
    for (int d = threadIdx.x; d < D; d += WARPS * 32)
        store_element<OUT_TYPE>(p.out, at + d, restored ? flip_sign(p.value.turn.signs, d, shared_row[d]) : shared_row[d]);
    if (p.lse && threadIdx.x == 0)
        p.lse[(u64)token * p.heads + head] = total > 0.f ? (float)(all + log((double)total)) : -__int_as_float(0x7f800000);
}
