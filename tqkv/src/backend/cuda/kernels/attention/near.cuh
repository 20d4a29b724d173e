// Few positions of a sequence that lie elsewhere, in codecs of their own (the first ones, the newest ones): added to the sums of an item before its
// tiles. The items of a group share them evenly, and a block's warps their item's. Rows are decoded one by one, to the domain of the item's rows,
// and multiplied in f32 on plain cores.
#pragma once
#include "attention/softmax.cuh"

#if NEARS > 0
// How a warp takes rows: a group of lanes has one, in runs of eight elements.
typedef Shape<K::D, 32, 8> NearRow;
static_assert(K::D == V::D && TILES_N == 1 && K::D <= 256, "what the host asks for");
// Rows at once, and where their scores and values lie in a warp's scratch.
constexpr int NEAR_FIT = 448 / K::D, NEAR_LANES = 32 / NearRow::GROUP, NEAR_ROOM = NEAR_FIT >= 4 ? 4 : NEAR_FIT >= 2 ? 2 : 1;
constexpr int NEAR_ROWS = NEAR_LANES < NEAR_ROOM ? NEAR_LANES : NEAR_ROOM, NEAR_VALUES = 64;

// What is stored of a lane's share of a row: asked for, and decoded when it has come.
template <typename R> struct NearShare {
    typedef Codec<R, (R::BYTES & -R::BYTES) < 16 ? (R::BYTES & -R::BYTES) : 16> Runs;
    static constexpr int N = NearRow::N / 8;
    typename Runs::Run runs[N];
    u32 scales[N];

    // Of rows that lie one behind the other.
    DEVICE void load(const Side& s, u64 row, int lane) {
#pragma unroll
        for (int r = 0; r < N; r++) {
            const int e = NearRow::element(r, lane);
            runs[r] = Runs::load(s.codes + row * R::BYTES, e), scales[r] = scale_bits<R>(s.scales, row * R::SPANS + e / R::SPAN);
        }
    }
    DEVICE void decode(const Side& s, float factor, float (&x)[NearRow::N], int lane) const {
#pragma unroll
        for (int r = 0; r < N; r++) {
            const float scale = factor_of<R>(scale_of<R>(scales[r]), s.unit) * factor;
#pragma unroll
            for (int k = 0; k < 8; k++) x[r * 8 + k] = Runs::level(s.levels, runs[r], k) * scale;
        }
        rotate<NearRow>(x, s.turn, lane);
    }
};

DEVICE Bounds visible(const Params& p, const Near& near, const Span& span, u32 row) {
    const int position = (int)(span.len - span.new_ + row / p.group);
    Bounds b = {(int)span.first, (int)span.len};
    if (near.causal) b.hi = min(b.hi, position + 1);
    if (near.window) b.lo = max(b.lo, position - (int)near.window + 1);
    return b;
}

// The scores of a row with the item's rows, in powers of two, of what those see: a lane of its group writes them.
DEVICE void score_near(const Params& p, const Near& near, const Span& span, const Item& it, const QueryRows& q, const float (&key)[NearRow::N], int position,
                       bool valid, float to_log2, Real* scores, int lane, bool keeps) {
#pragma unroll
    for (int r = 0; r < (NARROW ? 4 : 8); r++) {
        Real score = 0;
#pragma unroll
        for (int k = 0; k < NearRow::N; k++) score += (Real)key[k] * q.rows[r * Layout::QUERY_ROW + NearRow::element(k / 8, lane) + k % 8];
#pragma unroll
        for (int k = 1; k < NearRow::GROUP; k <<= 1) score += __shfl_xor_sync(~0u, score, k);
        score *= EXACT ? q.now.size[r] : to_log2;
        if (p.softcap > 0.f) {
            score += p.key.channels ? q.now.bias[r] : 0.f;
            if constexpr (EXACT) score = cap_in_f64(score, p.softcap) * LOG2E;
            else score = p.softcap * tanh_exact(score / p.softcap) * LOG2E;
        }
        const Bounds seen = visible(p, near, span, it.row + r);
        if (!valid || r >= it.rows || position < seen.lo || position >= seen.hi) score = -__int_as_float(0x7f800000);
        if (keeps) scores[r] = score;
    }
}

// Adds rows whose scores and values a warp has in scratch.
DEVICE void sum_near(Softmax& sums, const Real* scores, const float* values, int g, int t) {
#pragma unroll
    for (int c = 0; c < COLUMNS; c++) {
        const int row = tile_row(0, t, c);
        Real top = sums.m[0][c];
#pragma unroll
        for (int j = 0; j < NEAR_ROWS; j++) top = larger(top, scores[j * 8 + row]);
        const float shrink = exp2_approx((float)(sums.m[0][c] - top));
        sums.m[0][c] = top, sums.l[0][c] *= shrink;
#pragma unroll
        for (int i = 0; i < FRAGMENTS; i++) sums.o[0][i][c] *= shrink, sums.o[0][i][c + 2] *= shrink;
#pragma unroll
        for (int j = 0; j < NEAR_ROWS; j++) {
            const float weight = exp2_approx((float)(scores[j * 8 + row] - top));
            // What is not seen may not be a number.
            if (weight == 0.f) continue;
            // Lanes' sums are added up.
            if (g == 0) sums.l[0][c] += weight;
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int d = ValueCodec::element(i, g, e);
                    if (d >= 0) sums.o[0][i][2 * e + c] += weight * values[j * V::D + d];
                }
        }
    }
}

// A warp's rows of an item. Of the first rows at once all is asked for before it is wanted. BACKWARDS: the last warp has the first of them, so that few
// rows of two kinds are not one warp's.
template <typename KR, typename VR, bool BACKWARDS> struct NearRows {
    static constexpr int STEP = WARPS * NEAR_ROWS;
    const Near& near;
    NearShare<KR> key;
    NearShare<VR> value;
    Span span;
    int base, to;

    DEVICE NearRows(const Near& near) : near(near) {}
    DEVICE void load(const Params& p, const Item& it, int from, int lane) {
        const int position = min(from + lane / NearRow::GROUP, to - 1);
        const u64 row = locate(near.table + (u64)it.sequence * near.width, position, Divisor(near.page_size), near.width, p.kv_heads, it.kv_head);
        key.load(near.key, row, lane % NearRow::GROUP), value.load(near.value, row, lane % NearRow::GROUP);
    }
    DEVICE void start(const Params& p, const Item& it, int warp, int lane) {
        span = near.spans[it.sequence];
        const int lo = visible(p, near, span, it.row).lo, hi = visible(p, near, span, it.row + it.rows - 1).hi;
        const u64 count = max(hi - lo, 0), part = it.part - it.part_first;
        base = lo + (int)(count * part / it.part_count) + (BACKWARDS ? WARPS - 1 - warp : warp) * NEAR_ROWS;
        to = lo + (int)(count * (part + 1) / it.part_count);
        if (base < to) load(p, it, base, lane);
    }
    // `scratch`: 512 floats of the warp's own.
    DEVICE void add(Softmax& sums, const Params& p, const Item& it, const QueryRows& q, float to_log2, float* scratch, int lane) {
        const int slot = lane / NearRow::GROUP, own = lane % NearRow::GROUP;
        Real* const scores = (Real*)scratch;
        float* const values = scratch + NEAR_VALUES;
        const bool mine = slot < NEAR_ROWS;
#pragma unroll 1
        for (; base < to; base += STEP) {
            const int position = base + slot;
            float k[NearRow::N], v[NearRow::N];
            key.decode(near.key, near.key_factor, k, own), value.decode(near.value, near.value_factor, v, own);
            if (base + STEP < to) load(p, it, base + STEP, lane);
            score_near(p, near, span, it, q, k, position, position < to, to_log2, scores + slot * 8, own, mine && own == 0);
            if (mine)
#pragma unroll
                for (int i = 0; i < NearRow::N; i++) values[slot * V::D + NearRow::element(i / 8, own) + i % 8] = v[i];
            __syncwarp();
            sum_near(sums, scores, values, lane >> 2, lane & 3);
            __syncwarp();
        }
    }
};
#endif

// All that there are.
struct AllNear {
#if NEARS > 0
    NearRows<Row<K_DIM, A_K_BITS, A_K_PACKING, A_K_SCALING>, Row<V_DIM, A_V_BITS, A_V_PACKING, A_V_SCALING>, false> a;
#endif
#if NEARS > 1
    NearRows<Row<K_DIM, B_K_BITS, B_K_PACKING, B_K_SCALING>, Row<V_DIM, B_V_BITS, B_V_PACKING, B_V_SCALING>, true> b;
#endif
    DEVICE AllNear(const Params& p)
#if NEARS > 1
        : a(p.near[0]), b(p.near[1])
#elif NEARS > 0
        : a(p.near[0])
#endif
    {
    }
    DEVICE void start(const Params& p, const Item& it, int warp, int lane) {
#if NEARS > 0
        a.start(p, it, warp, lane);
#endif
#if NEARS > 1
        b.start(p, it, warp, lane);
#endif
    }
    DEVICE void add(Softmax& sums, const Params& p, const Item& it, const QueryRows& q, float to_log2, float* scratch, int lane) {
#if NEARS > 0
        a.add(sums, p, it, q, to_log2, scratch, lane);
#endif
#if NEARS > 1
        b.add(sums, p, it, q, to_log2, scratch, lane);
#endif
    }
};
