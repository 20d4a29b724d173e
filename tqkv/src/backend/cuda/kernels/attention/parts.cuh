// Outputs whose positions several blocks share: each leaves its sums in the workspace, and the one that comes last adds them up. TEAM: the threads of a
// block that do it (thread(), THREADS, wait() for all of them), and how its sums lie (ROWS, ACC_ROW).
#pragma once
#include "attention/rows.cuh"

// Sums in shared memory.
struct Sums {
    float* acc;  // [ROWS][ACC_ROW]
    Real* m;     // [ROWS]
    float* l;    // [ROWS]
    u32* last;   // a flag
};

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
template <typename TEAM> DEVICE bool leave_part(const Params& p, const Item& it, const Sums& b) {
    const int thread = TEAM::thread();
    for (int i = thread; i < it.rows * (V_DIM / 4); i += TEAM::THREADS) {
        const int r = i / (V_DIM / 4), d = i % (V_DIM / 4) * 4;
        __stcg((float4*)(p.partial + ((u64)it.part * TEAM::ROWS + r) * V_DIM + d), *(const float4*)(b.acc + r * TEAM::ACC_ROW + d));
    }
    if (thread < it.rows) store_part(p.partial_ml + (u64)it.part * TEAM::ROWS + thread, b.m[thread], b.l[thread]);
    TEAM::wait();
    if (thread == 0) {
        *b.last = atomic_add_acq_rel(p.counters + it.part_first, 1) == it.part_count - 1;
        if (*b.last) p.counters[it.part_first] = 0;
    }
    TEAM::wait();
    return *b.last;
}

template <typename TEAM> DEVICE void sum_parts(const Params& p, const Item& it, const Sums& b) {
    constexpr int BATCH = 16;
    for (int i = TEAM::thread(); i < it.rows * (V_DIM / 2); i += TEAM::THREADS) {
        const int r = i / (V_DIM / 2), d = i % (V_DIM / 2) * 2;
        Real top = -1e30f;
        float weight = 0.f, sum0 = 0.f, sum1 = 0.f;
        for (u32 k = 0; k < it.part_count; k += BATCH) {
            PartSum ml[BATCH];
            float2 x[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; j++) {
                const u64 part = (u64)(it.part_first + min(k + j, it.part_count - 1)) * TEAM::ROWS + r;
                ml[j] = load_part(p.partial_ml + part);
                x[j] = __ldcg((const float2*)(p.partial + part * V_DIM + d));
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
        *(float2*)(b.acc + r * TEAM::ACC_ROW + d) = make_float2(sum0, sum1);
        if (d == 0) b.m[r] = top, b.l[r] = weight;
    }
    TEAM::wait();
}
