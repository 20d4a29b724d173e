// Parameters, work items, and what a query row sees: what every kernel of attention on tensor cores knows.
#pragma once
#include "attention/item.cuh"

constexpr bool EXACT = Q_PARTS > 1;  // results are as of f32
template <bool WIDE> struct RealOf {
    typedef float type;
};
template <> struct RealOf<true> {
    typedef double type;
};
// Maxima of scores. EXACT ones may be so large that f32 steps by more than exp can take.
typedef typename RealOf<EXACT>::type Real;
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE double larger(double a, double b) { return fmax(a, b); }
// Of a part: its maximum and its sum of weights.
struct PartSum {
    Real m, l;
};

// Positions that lie elsewhere: see attention/near.cuh.
struct Near {
    Side key, value;      // levels as they are; `turn`: from these rows' domain to that of the item's
    const Span* spans;    // as of the item's batch
    const u32* table;     // [sequences, width]
    u32 width, page_size, causal, window;
    float key_factor, value_factor;  // what brings them to the units of the item's rows
};

struct Params {
    Side key, value;             // `rotated`: whether queries (outputs) are in the original domain, and rows are not
    const u32* page_table;       // [sequences, table_width]
    const Item* items;           // 64-byte aligned
    const void* q;               // [tokens, kv_heads * group, Q_WIDTH]
    void* out;                   // [tokens, kv_heads * group, OUT_WIDTH]
    float* lse;                  // [tokens, kv_heads * group], natural logarithm, or null
    const float* sink_logits;    // [kv_heads * group], or null
    float* partial;
    PartSum* partial_ml;
    u32* counters;
    u32 kv_heads, group, page_size, table_width;
    u32 causal;       // a query sees no position after its own
    u32 window;       // a query at P sees only positions > P - window; 0: no window
    float q_scale;    // softmax scale, times what every stored K scale lacks (seed: 1/sqrt(D) or 1/scale_factor), over what levels have too much
    float out_scale;  // what every stored V scale lacks
    float softcap;    // 0: none
    float scale;      // softmax scale
    float key_length; // about the length of a key's row under a scale of 1, as `q_scale` has it
    u32 pad;
    Near near[2];
};

constexpr float LOG2E = 1.4426950408889634f;

// Bounds [lo, hi) of the positions that a query row sees: problem::Visible.
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
