// What the warps of a block, and the parts of a split output, add up to; and the output.
#pragma once
#include "attention/softmax.cuh"

// A block's sums in shared memory.
struct BlockSums {
    float* acc;               // [ROWS][ACC_ROW]
    Real* m;                  // [ROWS]
    float* l;                 // [ROWS]
    Real* warp_m;             // [WARPS][ROWS]
    float* warp_l;            // [WARPS][ROWS]
    float* scratch;           // [WARPS][512]
    u32* last;
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

DEVICE void store_part(PartSum* to, float m, float l) { __stcg((float2*)to, make_float2(m, l)); }
DEVICE void store_part(PartSum* to, double m, float l) { __stcg((double2*)to, make_double2(m, l)); }
DEVICE PartSum load_part(const PartSum* from) {
    if constexpr (EXACT) {
        const double2 x = __ldcg((const double2*)from);
        return {(Real)x.x, (Real)x.y};
    } else {
        const float2 x = __ldcg((const float2*)from);
        return {x.x, x.y};
    }
}

// Leaves a part in the workspace; whether this block came last, and is to sum the parts.
DEVICE bool leave_part(const Params& p, const Item& it, const BlockSums& b) {
    const int thread = threadIdx.x;
    for (int i = thread; i < it.rows * (V::D / 4); i += THREADS) {
        const int r = i / (V::D / 4), d = i % (V::D / 4) * 4;
        __stcg((float4*)(p.partial + ((u64)it.part * ROWS + r) * V::D + d), *(const float4*)(b.acc + r * Layout::ACC_ROW + d));
    }
    if (thread < it.rows) store_part(p.partial_ml + (u64)it.part * ROWS + thread, b.m[thread], b.l[thread]);
    __syncthreads();
    if (thread == 0) {
        *b.last = atomic_add_acq_rel(p.counters + it.part_first, 1) == it.part_count - 1;
        if (*b.last) p.counters[it.part_first] = 0;
    }
    __syncthreads();
    return *b.last;
}

DEVICE void sum_parts(const Params& p, const Item& it, const BlockSums& b) {
    constexpr int BATCH = 16;
    for (int i = threadIdx.x; i < it.rows * (V::D / 2); i += THREADS) {
        const int r = i / (V::D / 2), d = i % (V::D / 2) * 2;
        Real top = -1e30f;
        float weight = 0.f, sum0 = 0.f, sum1 = 0.f;
        for (u32 k = 0; k < it.part_count; k += BATCH) {
            PartSum ml[BATCH];
            float2 x[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const u64 part = (u64)(it.part_first + min(k + j, it.part_count - 1)) * ROWS + r;
                ml[j] = load_part(p.partial_ml + part);
                x[j] = __ldcg((const float2*)(p.partial + part * V::D + d));
                if (k + j >= it.part_count) ml[j] = {-1e30f, 0.f}, x[j] = make_float2(0.f, 0.f);
            }
            Real higher = top;
#pragma unroll
            for (int j = 0; j < BATCH; j++) higher = larger(higher, ml[j].m);
            const float shrink = exp2_approx((float)(top - higher));
            top = higher, weight *= shrink, sum0 *= shrink, sum1 *= shrink;
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const float f = exp2_approx((float)(ml[j].m - top));
                weight += f * (float)ml[j].l, sum0 += f * x[j].x, sum1 += f * x[j].y;
            }
        }
        *(float2*)(b.acc + r * Layout::ACC_ROW + d) = make_float2(sum0, sum1);
        if (d == 0) b.m[r] = top, b.l[r] = weight;
    }
    __syncthreads();
}

// What the shift of the keys' channels has taken from all scores of a row, in powers of two, where no softcap has asked for it before.
DEVICE float row_bias(const Params& p, const Item& it, u64 row, int lane) {
    if (!p.key.channels || p.softcap > 0.f) return 0.f;
    float bias = 0.f;
    for (int e = lane; e < Q_WIDTH; e += 32) bias += load_element<Q_TYPE>(p.q, row * Q_WIDTH + e) * p.key.channels[it.kv_head * Q_WIDTH + e];
#pragma unroll
    for (int k = 1; k < 32; k <<= 1) bias += __shfl_xor_sync(~0u, bias, k);
    return bias * p.scale * LOG2E;
}

// Softmax denominators to outputs: one warp a row of `acc` (sums under the maximum `m`, in powers of two; weight `l`).
DEVICE void finish_row(const Params& p, const Item& it, u32 row, const float* acc, Real m, float l, int lane) {
    typedef WarpShape<V::D> S;
    u64 to = query_row(p, it, row);
    float scale = p.out_scale;
    if (p.lse || p.sink_logits) m += row_bias(p, it, to, lane);
    if (p.sink_logits) {
        const Real sink = p.sink_logits[it.kv_head * p.group + row % p.group] * (Real)LOG2E, top = larger(m, sink);
        scale *= exp2_approx((float)(m - top));
        l = l * exp2_approx((float)(m - top)) + exp2_approx((float)(sink - top));
        m = top;
    }
    // No weight: nothing was seen. What is not a number stays so.
    scale = l == 0.f ? 0.f : scale / l;
    if (p.lse && lane == 0) p.lse[to] = l == 0.f ? -__int_as_float(0x7f800000) : (float)((m + log2_approx(l)) * (Real)0.6931471805599453);
    float x[S::N];
#pragma unroll
    for (int k = 0; k < S::N; k++) x[k] = acc[S::element(k, lane % S::GROUP)] * scale;
    restore<S>(x, p.value.turn, lane % S::GROUP);
    if (lane >= S::GROUP) return;
#pragma unroll
    for (int k = 0; k < S::N; k++) {
        const int e = S::element(k, lane);
        if (OUT_WIDTH == V::D || e < OUT_WIDTH) store_element<OUT_TYPE>(p.out, to * OUT_WIDTH + e, x[k]);
    }
}
