// Query rows in memory: how they are read, and how outputs are written. One warp a row.
#pragma once
#include "attention/params.cuh"

typedef WarpShape<K_DIM> QueryShape;

// A lane's elements of row `r` of an item; zero in rows beyond.
DEVICE void load_query(const Params& p, const Item& it, u32 r, float (&to)[QueryShape::N], int lane) {
    const u64 from = query_row(p, it, it.row + r) * Q_WIDTH;
#pragma unroll
    for (int k = 0; k < QueryShape::N; k++) {
        const int e = QueryShape::element(k, lane % QueryShape::GROUP);
        to[k] = r < it.rows && (Q_WIDTH == K_DIM || e < Q_WIDTH) ? load_element<Q_TYPE>(p.q, from + e) : 0.f;
    }
}
// Multiplies a query by the scales of the keys' channels; gives its product with their shifts, times the softmax scale.
DEVICE float map_channels(const Params& p, const Item& it, float (&x)[QueryShape::N], int lane) {
    const float* const shift = p.key.channels + it.kv_head * Q_WIDTH;
    const float* const scale = shift + 2 * p.kv_heads * Q_WIDTH;
    float bias = 0.f;
#pragma unroll
    for (int k = 0; k < QueryShape::N; k++) {
        const int e = QueryShape::element(k, lane % QueryShape::GROUP);
        if (Q_WIDTH == K_DIM || e < Q_WIDTH) bias += x[k] * shift[e], x[k] *= scale[e];
    }
#pragma unroll
    for (int k = 1; k < QueryShape::GROUP; k <<= 1) bias += __shfl_xor_sync(~0u, bias, k);
    return bias * p.scale;
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
    typedef WarpShape<V_DIM> S;
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
        if (OUT_WIDTH == V_DIM || e < OUT_WIDTH) store_element<OUT_TYPE>(p.out, to * OUT_WIDTH + e, x[k]);
    }
}
