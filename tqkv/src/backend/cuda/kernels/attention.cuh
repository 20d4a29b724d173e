// What the attention kernels share: their parameters, work items, and what a query row sees and leaves. Expects the macros
// HEAD_DIM, PAGE_SIZE, OUT_TYPE; attention.cu describes them all.
#pragma once
#include "common.cuh"
#include "rotate.cuh"

#ifndef PAGE_SIZE
#define PAGE_SIZE 0
#endif

struct Item {
    u32 sequence, kv_head;      // row of the page table, KV head
    u32 row, rows;              // query rows [row, row + rows) of q_len * group
    u32 tile_begin, tile_end;   // position tiles
    u32 part, part_first, part_count;
    u32 first, len;             // the sequence's stored positions [first, len)
    u32 q_start, q_len;         // its queries, the last of which is at position len - 1
    u32 next;                   // this block's next item, or 0
    u32 reserved[2];
};

struct Params {
    const u8* k_codes;        // [pages, kv_heads, page_size, HEAD_DIM * K_BITS / 8]
    const u8* k_scales;       // [pages, kv_heads, page_size, scales a row]
    const float* k_codebook;  // [K_LEVELS], sorted
    const u8* v_codes;
    const u8* v_scales;
    const float* v_codebook;
    const u32* page_table;       // [sequences, table_width]
    const Item* items;           // 64-byte aligned
    const void* q;               // [tokens, kv_heads * group, HEAD_DIM]
    void* out;                   // the same
    float* lse;                  // [tokens, kv_heads * group], natural logarithm, or null
    const float* sinks;          // [kv_heads * group] logits, or null
    const u32* k_signs;          // bit 1 = negate, for the queries' rotation, or null
    const u32* v_signs;          // for the output's, or null
    float* partial;
    float2* partial_ml;
    u32* counters;
    u32 kv_heads, group, page_size, table_width;
    u32 causal;       // a query sees no position after its own
    u32 window;       // a query at P sees only positions > P - window; 0: no window
    u32 rotate_q;     // q is in the original domain
    u32 restore_out;  // out is wanted in the original domain
    float q_scale;    // softmax scale, times what every stored K scale lacks (seed: 1/sqrt(D) or 1/scale_factor)
    float out_scale;  // what every stored V scale lacks
    float softcap;    // 0: none
};

constexpr int D = HEAD_DIM;
constexpr float LOG2E = 1.4426950408889634f;

DEVICE u32 page_size(const Params& p) { return PAGE_SIZE ? PAGE_SIZE : p.page_size; }

// Bounds [lo, hi) of the positions that a query row sees.
struct Bounds {
    int lo, hi;
};
DEVICE Bounds visible(const Params& p, const Item& it, u32 row) {
    int position = (int)(it.len - it.q_len + row / p.group);
    Bounds b = {(int)it.first, (int)it.len};
    if (p.causal) b.hi = min(b.hi, position + 1);
    if (p.window) b.lo = max(b.lo, position - (int)p.window + 1);
    return b;
}

// Where a query row lies in q and out, in rows.
DEVICE u64 query_row(const Params& p, const Item& it, u32 row) {
    return ((u64)(it.q_start + row / p.group) * p.kv_heads + it.kv_head) * p.group + row % p.group;
}

// Softmax denominators to outputs: one warp a row of `acc` (sums under the maximum `m`, in powers of two; weight `l`).
DEVICE void finish_row(const Params& p, const Item& it, u32 row, float* acc, float m, float l, int lane) {
    u64 to = query_row(p, it, row);
    float scale = p.out_scale;
    if (p.sinks) {
        float sink = p.sinks[it.kv_head * p.group + row % p.group] * LOG2E, top = fmaxf(m, sink);
        scale *= exp2_approx(m - top);
        l = l * exp2_approx(m - top) + exp2_approx(sink - top);
        m = top;
    }
    // No weight: nothing was seen. What is not a number stays so.
    scale = l == 0.f ? 0.f : scale / l;
    if (p.lse && lane == 0) p.lse[to] = l == 0.f ? -__int_as_float(0x7f800000) : (m + log2_approx(l)) * 0.6931471805599453f;
    if (p.restore_out) {
        rotate_row<D>(acc, lane);
        for (int d = lane; d < D; d += 32) store_element<OUT_TYPE>(p.out, to * D + d, flip_sign(p.v_signs, d, acc[d] * scale));
    } else {
        for (int d = lane; d < D; d += 32) store_element<OUT_TYPE>(p.out, to * D + d, acc[d] * scale);
    }
}
