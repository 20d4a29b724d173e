// Parameters, work items, and what a query row sees: what every part of the kernel knows.
#pragma once
#include "codec/codec.cuh"

constexpr bool EXACT = Q_PARTS > 1;  // results are as of f32
template <bool WIDE> struct RealOf {
    typedef float type;
};
template <> struct RealOf<true> {
    typedef double type;
};
// Maxima of scores. EXACT ones may be so large that f32 steps by more than exp can take.
typedef typename RealOf<EXACT>::type Real;
// Of a part: its maximum and its sum of weights.
struct PartSum {
    Real m, l;
};

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

typedef Row<K_DIM, K_BITS, K_PACKING, K_SCALING> K;
typedef Row<V_DIM, V_BITS, V_PACKING, V_SCALING> V;
typedef Keys<K, TILES_N, NARROW, Q_PARTS> KeyCodec;
typedef Values<V, TILES_N, NARROW, Q_PARTS> ValueCodec;
typedef typename KeyCodec::Query Query;

constexpr float LOG2E = 1.4426950408889634f;
constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 8 * TILES_N;
constexpr int COLUMNS = NARROW ? 1 : 2;  // query rows of a lane, for each eight
constexpr int FRAGMENTS = ValueCodec::FRAGMENTS;
#ifndef SUB_RUNS
#define SUB_RUNS (TILE / 16)
#endif
constexpr int SUB = TILES_N == 1 ? SUB_RUNS : 1;  // runs of 16 positions whose scores are held at once

// A block's shared memory; the host computes the same (layout.rs).
struct Layout {
    static constexpr bool SHARED_TABLE = Same<typename KeyCodec::Table, typename ValueCodec::Table>::value;
    static constexpr int K_TABLE = 0, AFTER_K = KeyCodec::Table::BYTES;
    static constexpr int V_TABLE = SHARED_TABLE ? K_TABLE : AFTER_K;
    static constexpr int TABLES = AFTER_K + (SHARED_TABLE ? 0 : ValueCodec::Table::BYTES);

    static constexpr int K_SCALES = TILE * (K::BYTES + V::BYTES), V_SCALES = K_SCALES + TILE * K::SCALES * K::SCALE_BYTES;
    static constexpr int STAGE = (V_SCALES + TILE * V::SCALES * V::SCALE_BYTES + 127) / 128 * 128;  // keys, values, their scales
    static constexpr int PIPES = TABLES;                               // [WARPS][STAGES][STAGE]
    static constexpr int ACC = PIPES + WARPS * STAGES * STAGE;         // f32 [ROWS][V::D + 4]: sums
    static constexpr int ACC_ROW = V::D + 4;
    static constexpr int QUERIES = ACC + ROWS * ACC_ROW * 4;           // f32 [ROWS][K::D + 4]: the next item's queries
    static constexpr int QUERY_ROW = K::D + 4;
    static constexpr int SCRATCH = QUERIES + ROWS * QUERY_ROW * 4;     // f32 [WARPS][512], or levels
    static constexpr int Q = SCRATCH + WARPS * 2048;                   // queries as fragments
    static constexpr bool Q_REGISTERS = TILES_N * K::D * (NARROW ? 1 : Q_PARTS) <= 256;         // those of the item at work are kept in registers
    static constexpr int ML = Q + TILES_N * KeyCodec::STEPS * 32 * (int)sizeof(Query);
    // Per warp m and l; the block's M and L, queries' largest, units, biases, and those that come next (EXACT: sizes and lengths, of both);
    // a flag.
    static constexpr int MAXIMA = (WARPS + 1) * ROWS * (int)sizeof(Real);
    static constexpr int BYTES = ML + MAXIMA + (WARPS + 5 + (EXACT ? 4 : 0)) * ROWS * 4 + 16;
};
static_assert(Layout::BYTES == SHARED_BYTES, "as the host has it");
extern __shared__ __align__(128) u8 shared_memory[];

DEVICE u32 page_size(const Params& p) { return PAGE_SIZE ? PAGE_SIZE : p.page_size; }

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

// The query row that column `c` of lane t's fragments stands for.
DEVICE constexpr int tile_row(int n, int t, int c) { return n * 8 + (NARROW ? t : 2 * t + c); }
