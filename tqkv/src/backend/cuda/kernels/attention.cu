// Attention of a few queries a sequence over a compressed (or f16) paged cache, in one launch.
//
// INTERFACE
//
// Kernel `attention`, one parameter: the struct `Params` below, by value.
//   grid   (blocks, 1, 1): as many as the plan was made for; one block fits on a multiprocessor, so that number or fewer
//   block  (32 * WARPS, 1, 1)
//   dynamic shared memory: the value of the module's global `attention_shared_bytes` (u32), which the host reads back after
//   loading, or the same arithmetic as in `Layout`. Above 48 KiB the function attribute must be raised.
//
// NVRTC options: --std=c++17 -default-device (NVRTC 12.9 to 13.5 were tried); headers: all *.cuh beside this file, nothing else.
//
// Macros (-D), all required unless a default is named:
//   HEAD_DIM               multiple of 16
//   K_BITS, V_BITS         bits a stored code takes: 2 to 8, or 16 for a dense f16 cache. Seed 5 and 6 bit: 8 (a code a byte),
//                          likewise seed 2, 3 and 8; seed 4: 4
//   K_LEVELS, V_LEVELS     entries of the codebook, a power of two of at most 2^BITS (seed 5 bit: 32); 1 if dense
//   K_SCALE, V_SCALE       16: one f16 a row; 32: f32, one for each 256 elements (at least one); 0: none (dense)
//   Q_TYPE, OUT_TYPE       0 f32, 1 f16, 2 bf16
//   TILES_N                query rows of a work item over 8: 1, 2 or 4 (see PLAN). Registers set the limit: TILES_N * HEAD_DIM
//                          of at most 576 and TILES_N of at most 4
//   WARPS, TILE, STAGES    warps a block (1 to 12), positions a warp copies at once (16, 32, 64), copies in flight and in use (2; 1
//                          waits for every copy)
//   NARROW                 1: no item has more than 4 rows (0 by default; needs TILES_N = 1). The tensor cores' eight columns are
//                          then four pairs, of a query in full and what its rounding lost
//   RUN                    positions that are surely contiguous in memory and 16-byte aligned: TILE if page_size % TILE == 0, else
//                          16 if page_size % 16 == 0, else 1 (slow, any page size)
//   PAGE_SIZE              the page size if known when compiling, 0 (default): Params.page_size
//
// Choice: the first of these (WARPS x TILE) whose Layout fits the shared memory that a block may have (227 KiB on sm_90 and sm_100,
// 163 on sm_80, 99 on sm_86, sm_89, sm_120): 12 x 64 (NARROW only), 8 x 64, 12 x 32, 8 x 32, 8 x 16, 4 x 16, 2 x 16, 1 x 16, the
// first three with TILES_N = 1 only, and 12 warps with HEAD_DIM <= 128 only (168 registers); then 1 x 16 with STAGES = 1. Problems
// of less than two tiles of 64 a warp are faster with 8 x 32, and two tables with more than four rows with 12 x 32 than with 8 x 64.
//
// PLAN
//
// Query rows: the queries of a sequence times the `group` query heads of one KV head, flattened as row = query * group + h. A
// work item is up to 8 * TILES_N consecutive rows (from `row`) of one (sequence, KV head) against position tiles
// [tile_begin, tile_end), where tile i holds the absolute positions [i * TILE, (i + 1) * TILE). The items of one row tile must cover
//   lo / TILE .. ceil(hi / TILE),  lo = max(first, causal or not: P_first - window + 1), hi = causal ? P_last + 1 : len,
// with P of a row = len - q_len + row / group. Positions in the tiles that a row may not see are masked in the kernel. A row
// tile without any position still needs one item (tile_begin = tile_end): its output is zero.
// Block b begins with items[b] (rows = 0: it has no work) and goes on with items[next] until next = 0; so there are `blocks` first
// items, and the rest after them. Items that share an output are numbered consecutively as parts: `part` is the item's slot in
// the workspace, `part_first` the first slot of its group, `part_count` their number (1: no workspace is touched).
// Items repeat what the kernel needs of their sequence, so that a block's first copy waits for two reads only, item and page.
//
// Workspace for N parts: partial f32 [N, 8 * TILES_N, HEAD_DIM], partial_ml f32x2 [N, 8 * TILES_N], counters u32 [N], zeroed once;
// every launch leaves the counters zero. Two launches in flight at once need two workspaces.
//
// METHOD
//
// Each warp runs through its own tiles with its own cp.async pipeline and online softmax; no barrier in the main loop. K is the
// A operand (positions x dims) against Q^T (8 rows), V^T the A operand against P^T. Codes decode to plain codebook values (see
// codec.cuh), keys of 3 bits to integers, against queries that are integers too; K's scale multiplies the score and V's the weight.
// A query is multiplied as two numbers where there are columns for it. Weights are multiplied as f16, so the running maximum is one
// of score + log2 of the value's scale: whatever the scales are, no product overflows. It moves only when it may grow by more than 2^8.
// At the end of an item the block's warps are summed, between two barriers, while the next item's queries become fragments; of a
// split output the block that finishes last sums the parts.
#include "attention.cuh"
#include "codec.cuh"

#ifndef NARROW
#define NARROW 0
#endif
constexpr int ROWS = 8 * TILES_N;
constexpr int COLUMNS = NARROW ? 1 : 2;  // query rows of a lane, for each eight
// Keys of 3 bits are multiplied as integers, values of 3 bits decode from planes: see codec.cuh.
constexpr bool K_INTEGER = K_BITS == 3, V_PLANES = V_BITS == 3;
constexpr int PLANE_NIBBLES = D / 16;                    // of a key lane's quarter of a plane
constexpr int PLANE_WORDS = (PLANE_NIBBLES + 7) / 8;
constexpr int PLANE_BYTES = (PLANE_NIBBLES + 1) / 2;     // codes of a value lane in a plane: every other nibble of a quarter
constexpr int CHUNKS = D < 128 ? 1 : D / 128;            // of a plane, where they are read as matrices
// The place in a plane of nibble `i` of those that key lane t reads there.
DEVICE constexpr int key_nibble(int t, int i) { return MATRICES ? i / 8 * 32 + t * 8 + i % 8 : t * PLANE_NIBBLES + i; }

// Compile-time loop.
template <int I> struct Index {
    static constexpr int value = I;
};
template <int N, int STEP = 1, int I = 0, typename F> DEVICE void repeat(F&& f) {
    if constexpr (I < N) {
        f(Index<I>());
        repeat<N, STEP, I + STEP>(f);
    }
}

// Rows of one side in a tile.
template <int BITS, int SCALE> struct Side {
    static constexpr int ROW = D * BITS / 8;                                 // bytes a row
    static constexpr int SCALES = SCALE == 32 && D > 256 ? D / 256 : 1;      // scales a row, each for SPAN elements
    static constexpr int SPAN = D / SCALES;
    static constexpr int SCALE_ROW = SCALE / 8 * SCALES;
    static constexpr bool POW2 = ROW >= 32 && (ROW & (ROW - 1)) == 0;

    // Byte offset in a tile of a row's 16-byte chunk. Rows of a power of two bytes are moved and swizzled so that neither the
    // key's reads (rows r and r + 4, all chunks) nor the value's (rows r to r + 3, neighbouring chunks) meet in a bank; `row` < 8.
    static DEVICE u32 place8(u32 row, u32 chunk) {
        u32 high = row >> 2 & 1, slot = chunk;
        if (!POW2) return row * ROW + chunk * 16;
        if (ROW == 32) row ^= high << 1;
        if (ROW == 64) slot ^= row & 2, row ^= high;
        if (ROW == 128) slot ^= (row & 3) << 1 | high;
        if (ROW == 256) slot ^= ((row & 1) ^ high) | (row & 2) << 1 | (chunk >> 3 & 1) << 1;
        if (ROW >= 512) slot ^= ((row & 3) ^ high) ^ (chunk >> 3 & 3) << 1;
        return row * ROW + slot * 16;
    }
    static DEVICE u32 place(u32 row, u32 chunk) { return (row & ~7u) * ROW + place8(row & 7, chunk); }
};
typedef Side<K_BITS, K_SCALE> K;
typedef Side<V_BITS, V_SCALE> V;

// What a lane multiplies a key's fragment with, for eight rows: of f16, or of the high and (wide) the low bytes of integers.
constexpr int Q_WORDS = K_INTEGER && !NARROW ? 4 : 2;
struct __align__(4 * Q_WORDS) QFragment {
    u32 word[Q_WORDS];
};
constexpr int Q_STEPS = K_INTEGER ? 4 * PLANE_WORDS : D / 16;
constexpr float QUERY_LARGEST = D > 512 ? 16256.f : 32512.f;  // of 16-bit queries, so that sums fit 32 bits

struct Layout {
    static constexpr bool K_LOOK = !K_INTEGER && !Codec<K_BITS>::DENSE;
    static constexpr bool SHARED_TABLE = K_LOOK && K_BITS == V_BITS && K_LEVELS == V_LEVELS && K_SCALE == V_SCALE;
    static constexpr int K_TABLE = 0, AFTER_K = K_LOOK ? Codec<K_BITS>::ENTRIES * 128 : 0;
    static constexpr int V_TABLE = SHARED_TABLE ? K_TABLE : AFTER_K;
    static constexpr int TABLES = AFTER_K + (SHARED_TABLE ? 0 : Codec<V_BITS>::ENTRIES * 128);

    static constexpr int STAGE = (TILE * (K::ROW + V::ROW + K::SCALE_ROW + V::SCALE_ROW) + 127) / 128 * 128;
    static constexpr int PIPES = TABLES;                               // [WARPS][STAGES][STAGE]
    static constexpr int ACC = PIPES + WARPS * STAGES * STAGE;         // f32 [ROWS][D + 4]: sums
    static constexpr int ACC_ROW = D + 4;
    static constexpr int QUERIES = ACC + ROWS * ACC_ROW * 4;           // the same: the next item's queries
    static constexpr int SCRATCH = QUERIES + ROWS * ACC_ROW * 4;       // f32 [WARPS][512], or codebooks
    static constexpr int Q = SCRATCH + WARPS * 2048;                   // queries as fragments
    static constexpr bool Q_REGISTERS = TILES_N * D <= 256;            // those of the item at work are kept in registers
    static constexpr int ML = Q + TILES_N * Q_STEPS * 32 * (int)sizeof(QFragment);
    static constexpr int BYTES = ML + (2 * WARPS + 4) * ROWS * 4 + 16; // per warp m and l, the block's M and L, queries' largest and units, a flag
};
extern "C" __device__ const u32 attention_shared_bytes = Layout::BYTES;

extern __shared__ __align__(128) u8 shared_memory[];

// Walks a warp's tiles across the block's items and copies them, ahead of the computation. The page of the tile to come is read
// one step before its copy needs the address.
struct Fetch {
    const Params& p;
    u32 next, tile, tile_end, first, len, kv_head, slot, capacity;
    const u32* pages;
    u32 page;
    int warp, lane;
    const u8 *k_codes, *v_codes, *k_scales, *v_scales;  // this lane's part of the first row's

    DEVICE Fetch(const Params& p, const Item& it, int warp, int lane) : p(p), warp(warp), lane(lane) {
        capacity = p.table_width * page_size(p);
        k_codes = p.k_codes + lane * 16, v_codes = p.v_codes + lane * 16;
        k_scales = p.k_scales + lane * 16, v_scales = p.v_scales + lane * 16;
        start(it);
    }
    // Goes to this warp's first tile at or after an item's beginning.
    DEVICE void start(Item it) {
        while (it.tile_begin + warp >= it.tile_end && it.next) it = p.items[it.next];
        next = it.next, kv_head = it.kv_head, tile = it.tile_begin + warp, tile_end = it.tile_end;
        first = it.first, len = it.len;
        pages = p.page_table + (u64)it.sequence * p.table_width;
        slot = tile * TILE % capacity;
        load_page();
    }
    DEVICE void load_page() {
        if (RUN >= TILE && tile < tile_end) page = pages[slot / page_size(p)];
    }
    // The row in the store of a slot.
    DEVICE u64 store_row(u32 page, u32 slot) const {
        return ((u64)page * p.kv_heads + kv_head) * page_size(p) + slot % page_size(p);
    }
    DEVICE void issue(u8* stage) {
        if (tile < tile_end) {
            if constexpr (RUN >= TILE) {
                // Pages times heads are below 2^32, rows and bytes need not be.
                const u32 block = page * p.kv_heads + kv_head, slot = PAGE_SIZE == TILE ? 0 : this->slot % page_size(p);
                u32 to = shared_address(stage);
                copy_codes<K>(to, k_codes, block, slot);
                copy_codes<V>(to + TILE * K::ROW, v_codes, block, slot);
                to += TILE * (K::ROW + V::ROW);
                copy_scales<K>(to, k_scales, block, slot);
                copy_scales<V>(to + TILE * K::SCALE_ROW, v_scales, block, slot);
            } else {
                copy_rows(stage);
            }
            tile += WARPS, slot += WARPS * TILE;
            if (unlikely(slot >= capacity)) slot %= capacity;
            if (unlikely(tile >= tile_end && next)) start(p.items[next]);
            else load_page();
        }
        copy_commit();
    }
    template <typename S> DEVICE void copy_codes(u32 to, const u8* from, u32 block, u32 slot) const {
        constexpr int CHUNKS = TILE * S::ROW / 16;
        constexpr int PERIOD = S::POW2 && S::ROW > 64 ? S::ROW / 2 : 32;  // chunks after which a lane's place repeats
        from = opaque(from + (u64)block * (page_size(p) * S::ROW) + slot * S::ROW);
        repeat<(CHUNKS + 31) / 32>([&](auto index) {
            constexpr int I = decltype(index)::value * 32, LEAD = I / PERIOD * PERIOD;
            const u32 c = I - LEAD + lane;
            if (I + 32 > CHUNKS && I + lane >= CHUNKS) return;
            copy_async16_at<LEAD * 16, I * 16>(to + (S::POW2 ? S::place(c / (S::ROW / 16), c % (S::ROW / 16)) : c * 16), from);
        });
    }
    template <typename S> DEVICE void copy_scales(u32 to, const u8* from, u32 block, u32 slot) const {
        constexpr int CHUNKS = TILE * S::SCALE_ROW / 16;
        from += (u64)block * (page_size(p) * S::SCALE_ROW) + slot * S::SCALE_ROW;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 32)
            if (c + 32 <= CHUNKS || c + lane < CHUNKS) copy_async16(to + (c + lane) * 16, from + c * 16);
    }
    // Pages that do not hold whole tiles: each run of 16 positions (or each position) has a page of its own. Runs without a
    // valid position are left out.
    __device__ __noinline__ void copy_rows(u8* stage) const {
        u8* codes_v = stage + TILE * K::ROW;
        u8* scales_k = codes_v + TILE * V::ROW;
        u8* scales_v = scales_k + TILE * K::SCALE_ROW;
        for (u32 r = 0; r < TILE; r += RUN) {
            u32 position = tile * TILE + r;
            if (position >= len || position + RUN <= first) continue;
            u32 s = slot + r;
            if (s >= capacity) s %= capacity;
            u64 row = store_row(pages[s / page_size(p)], s);
            copy_run<K>(stage, p.k_codes + row * K::ROW, r);
            copy_run<V>(codes_v, p.v_codes + row * V::ROW, r);
            copy_halves(scales_k + r * K::SCALE_ROW, p.k_scales + row * K::SCALE_ROW, RUN * K::SCALE_ROW);
            copy_halves(scales_v + r * V::SCALE_ROW, p.v_scales + row * V::SCALE_ROW, RUN * V::SCALE_ROW);
        }
    }
    template <typename S> DEVICE void copy_run(u8* to, const u8* from, u32 r) const {
        if constexpr (RUN >= 16) {
            for (u32 c = lane; c < RUN * S::ROW / 16; c += 32) {
                u32 offset = S::POW2 ? S::place(r + c / (S::ROW / 16), c % (S::ROW / 16)) : r * S::ROW + c * 16;
                copy_async16(shared_address(to) + offset, from + c * 16);
            }
        } else {
            for (u32 b = lane * 2; b < S::ROW; b += 64)
                *(u16*)(to + (S::POW2 ? S::place(r, b / 16) + b % 16 : r * S::ROW + b)) = *(const u16*)(from + b);
        }
    }
    DEVICE void copy_halves(u8* to, const u8* from, u32 bytes) const {
        for (u32 b = lane * 2; b < bytes; b += 64) *(u16*)(to + b) = *(const u16*)(from + b);
    }
};

// What one lane reads of one row: of each of SECTIONS, SECTION_BITS apart, the LANE_BITS from bit index * LANE_BITS on.
template <typename S, int SECTIONS, int SECTION_BITS, int LANE_BITS> struct Lane {
    static constexpr int WORDS = (LANE_BITS + 31) / 32;
    static constexpr bool ALIGNED = LANE_BITS % 32 == 0 && S::ROW % 4 == 0;
    static constexpr int VECTOR = LANE_BITS % 128 == 0 && S::ROW % 16 == 0 ? 4 : LANE_BITS % 64 == 0 && S::ROW % 8 == 0 ? 2 : 1;
    static constexpr int LOADS = ALIGNED ? WORDS / VECTOR : 1;
    static constexpr int ALL = LANE_BITS | SECTION_BITS | S::ROW * 8 | 32, UNIT = ALL & -ALL;  // what divides every offset, in bits
    static constexpr int RAW = (32 - UNIT + LANE_BITS + 31) / 32;
    static_assert(ALIGNED || !S::POW2, "swizzled rows give every lane whole words");

    u32 offset[SECTIONS][LOADS];  // from the first row of a run of 16
    u32 shift[SECTIONS];

    DEVICE void init(u32 row, u32 index) {
#pragma unroll
        for (int h = 0; h < SECTIONS; h++) {
            u32 bit = h * SECTION_BITS + index * LANE_BITS;
            if constexpr (ALIGNED) {
#pragma unroll
                for (int j = 0; j < LOADS; j++) {
                    u32 byte = bit / 8 + j * VECTOR * 4;
                    offset[h][j] = opaque(S::POW2 ? S::place(row, byte / 16) + byte % 16 : row * S::ROW + byte);
                }
            } else {
                bit += row * S::ROW * 8;
                offset[h][0] = opaque(bit / 32 * 4), shift[h] = bit % 32;
            }
        }
    }
    // Two words more than needed, for look-ahead within bit fields.
    template <int H> DEVICE void load(u32 (&w)[WORDS + 2], const u8* run) const {
        w[WORDS] = w[WORDS + 1] = 0;
        if constexpr (ALIGNED) {
#pragma unroll
            for (int j = 0; j < LOADS; j++) {
                const u8* from = run + offset[H][j];
                if constexpr (VECTOR == 4) {
                    uint4 v = *(const uint4*)from;
                    w[4 * j] = v.x, w[4 * j + 1] = v.y, w[4 * j + 2] = v.z, w[4 * j + 3] = v.w;
                } else if constexpr (VECTOR == 2) {
                    uint2 v = *(const uint2*)from;
                    w[2 * j] = v.x, w[2 * j + 1] = v.y;
                } else {
                    w[j] = *(const u32*)from;
                }
            }
        } else {
            const u32* from = (const u32*)(run + offset[H][0]);
            u32 raw[RAW + 1];
#pragma unroll
            for (int j = 0; j < RAW; j++) raw[j] = from[j];
            raw[RAW] = 0;
#pragma unroll
            for (int j = 0; j < WORDS; j++) w[j] = __funnelshift_r(raw[j], raw[j + 1], shift[H]);
        }
    }
};

template <int SCALE> DEVICE float load_scale(const u8* scales, int i) {
    if (SCALE == 0) return 1.f;
    return SCALE == 16 ? f32_from_f16(((const u16*)scales)[i]) : ((const float*)scales)[i];
}

// Queries of an item on their way to `acc`: read early, then rotated, in f32, and scaled; zero in rows beyond. One warp a row.
struct Queries {
    static constexpr int N = (D + 31) / 32, MINE = (ROWS + WARPS - 1) / WARPS;
    static constexpr bool EARLY = MINE * N <= 16;  // else registers would not suffice, and each row is read when it is kept
    static constexpr int UNROLL = EARLY ? MINE : 1;
    float x[UNROLL][N];

    DEVICE void load_row(const Params& p, const Item& it, u32 r, float (&to)[N], int lane) {
        const u64 from = query_row(p, it, it.row + r) * D;
#pragma unroll
        for (int k = 0; k < N; k++) to[k] = r < it.rows && lane + 32 * k < D ? load_element<Q_TYPE>(p.q, from + lane + 32 * k) : 0.f;
    }
    DEVICE void load(const Params& p, const Item& it, int warp, int lane) {
        if constexpr (EARLY)
#pragma unroll
            for (int i = 0; i < MINE; i++) load_row(p, it, warp + i * WARPS, x[i], lane);
    }
    // `largest`: of each row, at least 1e-20; NaN if it holds what is not finite.
    DEVICE void keep(const Params& p, const Item& it, float* acc, float* largest, int warp, int lane) {
#pragma unroll UNROLL
        for (int i = 0; i < MINE; i++) {
            const int r = warp + i * WARPS;
            if (r >= ROWS) break;
            float(&x)[N] = this->x[EARLY ? i : 0];
            if constexpr (!EARLY) load_row(p, it, r, x, lane);
            float* to = acc + r * Layout::ACC_ROW;
#pragma unroll
            for (int k = 0; k < N; k++) {
                x[k] *= p.q_scale;
                if (p.rotate_q && lane + 32 * k < D) x[k] = flip_sign(p.k_signs, lane + 32 * k, x[k]);
            }
            if constexpr (D % 32 == 0)
                if (p.rotate_q) rotate_registers<D>(x, lane);
#pragma unroll
            for (int k = 0; k < N; k++)
                if (lane + 32 * k < D) to[lane + 32 * k] = x[k];
            if constexpr (D % 32 != 0)
                if (p.rotate_q) __syncwarp(), rotate_shared<D>(to, lane);
            if constexpr (K_INTEGER) {
                const float infinity = __int_as_float(0x7f800000);
                float top = 1e-20f;
#pragma unroll
                for (int d = lane; d < D; d += 32) top = fmaxf(top, fabsf(to[d]) < infinity ? fabsf(to[d]) : infinity);
#pragma unroll
                for (int k = 1; k < 32; k <<= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, k));
                if (lane == 0) largest[r] = top < infinity ? top : __int_as_float(0x7fffffff);
            }
        }
    }
};

// The query row that column `c` of lane t's fragments stands for.
DEVICE constexpr int tile_row(int n, int t, int c) { return n * 8 + (NARROW ? t : 2 * t + c); }

// The fragment of eight query rows for a step of K, as `lane` holds it.
DEVICE QFragment query_fragment(const float* acc, const float* largest, int n, int step, int lane, float to_log2) {
    constexpr int K_STEPS = K::SPAN / 16;
    const int g = lane >> 2, t = lane & 3, row = n * 8 + (NARROW ? g >> 1 : g);
    const bool rest = NARROW && g & 1;
    const float* const x = acc + row * Layout::ACC_ROW;
    QFragment out;
    if constexpr (K_INTEGER) {
        const float factor = __fdividef(QUERY_LARGEST, largest[row]);
        u32 words[4] = {};  // high bytes, low bytes
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const int i = step % PLANE_WORDS * 8 + b;
            const int v = i < PLANE_NIBBLES ? __float2int_rn(x[plane_element(step / PLANE_WORDS, key_nibble(t, i))] * factor) : 0;
            words[b / 4] |= ((v + 128) >> 8 & 0xff) << b % 4 * 8;
            words[b / 4 + 2] |= (v & 0xff) << b % 4 * 8;
        }
#pragma unroll
        for (int k = 0; k < Q_WORDS; k++) out.word[k] = words[rest ? k ^ 2 : k];
    } else {
        const int d = step / K_STEPS * K::SPAN + t * (K::SPAN / 4) + step % K_STEPS * 4;
        float v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[k] = x[d + k] * to_log2;
            if (rest) v[k] -= f32_from_f16(f16_from_f32(v[k]));
        }
        out.word[0] = f16x2_from_f32(v[0], v[1]), out.word[1] = f16x2_from_f32(v[2], v[3]);
    }
    return out;
}

// Where in a vector the element is that row g (e = 0) or g + 8 (e = 1) of an output's fragment holds; -1: nowhere.
DEVICE int output_element(int fragment, int fragments, int g, int e) {
    if constexpr (V_PLANES) {
        if constexpr (MATRICES) {
            const int code = fragment * 2 + e, i = code % (4 * CHUNKS);
            return plane_element(code / (4 * CHUNKS), i / 4 * 32 + g * 4 + i % 4);
        }
        const int code = fragment * 2 + e, i = code % PLANE_BYTES * 2 + (g & 1);
        return i < PLANE_NIBBLES ? plane_element(code / PLANE_BYTES, (g >> 1) * PLANE_NIBBLES + i) : -1;
    }
    return fragment / fragments * V::SPAN + g * (V::SPAN / 8) + fragment_element<V_BITS>(fragment % fragments, fragments, e);
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1) attention(const __grid_constant__ Params p) {
    constexpr int THREADS = WARPS * 32;
#ifndef SUB_RUNS
#define SUB_RUNS (TILE / 16)
#endif
    constexpr int SUB = TILES_N == 1 ? SUB_RUNS : 1;     // runs of 16 positions whose scores are held at once
    constexpr int K_STEPS = K::SPAN / 16;                 // tensor-core steps over a span of a key
    constexpr int V_TILES = V_PLANES ? 2 * PLANE_BYTES : V::SPAN / 16;  // tensor-core tiles of a span of a value
    constexpr int FRAGMENTS = V::SCALES * V_TILES;
    const float NEVER = -__int_as_float(0x7f800000);

    const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread >> 5, 0), lane = thread & 31, g = lane >> 2, t = lane & 3;
    u8* const pipe = shared_memory + Layout::PIPES + warp * STAGES * Layout::STAGE;
    float* const acc = (float*)(shared_memory + Layout::ACC);
    float* const scratch = (float*)(shared_memory + Layout::SCRATCH);
    u16* const codebooks = (u16*)scratch;
    float* const q_rows = (float*)(shared_memory + Layout::QUERIES);
    QFragment* const q_fragments = (QFragment*)(shared_memory + Layout::Q);
    float* const warp_m = (float*)(shared_memory + Layout::ML);  // [WARPS][ROWS]
    float* const warp_l = warp_m + WARPS * ROWS;
    float* const block_m = warp_l + WARPS * ROWS;                // [ROWS]
    float* const block_l = block_m + ROWS;
    float* const q_largest = block_l + ROWS;
    float* const q_unit = q_largest + ROWS;
    u32* const last = (u32*)(q_unit + ROWS);

    Item it = p.items[blockIdx.x];
    if (it.rows == 0) return;
    const Codebook<Layout::K_LOOK ? K_LEVELS : 1, THREADS> k_codebook(p.k_codebook, thread);
    const Codebook<V_LEVELS, THREADS> v_codebook(p.v_codebook, thread);
    Levels levels;
    if constexpr (K_INTEGER) levels.read();
    const float k_largest = K_INTEGER ? p.k_codebook[7] : 0.f;
    Fetch fetch(p, it, warp, lane);
    Queries queries;
    queries.load(p, it, warp, lane);
    for (int s = 0; s < STAGES - 1; s++) fetch.issue(pipe + s * Layout::STAGE);
    if constexpr (Layout::K_LOOK) k_codebook.keep(thread, codebooks);
    if constexpr (!Codec<V_BITS>::DENSE) v_codebook.keep(thread, codebooks + 256);
    __syncthreads();
    if constexpr (Layout::K_LOOK) build_table<K_BITS>(shared_memory + Layout::K_TABLE, codebooks, K_LEVELS, thread, THREADS);
    if constexpr (!Codec<V_BITS>::DENSE && !Layout::SHARED_TABLE)
        build_table<V_BITS>(shared_memory + Layout::V_TABLE, codebooks + 256, V_LEVELS, thread, THREADS);
    const u8* const k_table = shared_memory + Layout::K_TABLE;
    const u8* const v_table = shared_memory + Layout::V_TABLE;
    const u32 k_lane = lane_offset<K_BITS>(lane), v_lane = lane_offset<V_BITS>(lane);

    // Fragment row r of a run of 16 is position (r % 8) / 2 + r % 2 * 4 + r / 8 * 8: the value's fragments then take rows t, t + 4,
    // t + 8, t + 12. Key lanes hold a quarter of each span's dims, value lanes an eighth.
    const u32 key_row = (g >> 1) + (g & 1) * 4;
    typedef Lane<K, K_INTEGER ? 3 : K::SCALES, K_INTEGER ? D : K::SPAN * K_BITS, K_INTEGER ? D / 4 : K::SPAN / 4 * K_BITS> KLane;
    typedef Lane<V, V_PLANES ? 3 : V::SCALES, V_PLANES ? D : V::SPAN * V_BITS, V_PLANES ? D / 4 : V::SPAN / 8 * V_BITS> VLane;
    // Rows of matrices: of the two halves of a run, in two planes.
    const u32 matrix_row = ((lane & 7) >> 1) + (lane & 1) * 4 + (lane & 8);
    const u32 key_matrices = opaque(matrix_row * K::ROW + lane / 16 * (D / 8)), value_matrices = opaque(matrix_row * V::ROW + lane / 16 * (D / 8));
    KLane k_at;
    k_at.init(key_row, t);
    VLane v_at[2];
    const Nibbles v_nibbles(g);
    const u32 v_swap = V_PLANES && g & 1 ? 4 : 0;
    v_at[0].init(t + v_swap, V_PLANES ? g / 2 : g);
    v_at[1].init(t + 4 - v_swap, V_PLANES ? g / 2 : g);

    const float to_log2 = p.softcap > 0.f ? 1.f : LOG2E;
    // The queries in `q_rows` as fragments, and what a score is to be multiplied by where keys and queries are integers.
    const auto make_fragments = [&] {
        for (int i = thread; i < TILES_N * Q_STEPS * 32; i += THREADS)
            q_fragments[i] = query_fragment(q_rows, q_largest, i / 32 / Q_STEPS, i / 32 % Q_STEPS, i & 31, to_log2);
        if (K_INTEGER && thread < ROWS) q_unit[thread] = q_largest[thread] * (256.f / QUERY_LARGEST / Levels::LARGEST) * k_largest * to_log2;
    };
    queries.keep(p, it, q_rows, q_largest, warp, lane);
    __syncthreads();
    make_fragments();
    __syncthreads();

    u32 stage = 0;  // byte offset in the pipe
    while (true) {
        const u32 rows = it.rows;
        float unit[TILES_N][COLUMNS];
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) unit[n][c] = K_INTEGER ? q_unit[tile_row(n, t, c)] : 1.f;
        QFragment q[Layout::Q_REGISTERS ? TILES_N : 1][Layout::Q_REGISTERS ? Q_STEPS : 1];
        if constexpr (Layout::Q_REGISTERS)
#pragma unroll
            for (int n = 0; n < TILES_N; n++)
#pragma unroll
                for (int j = 0; j < Q_STEPS; j++) q[n][j] = q_fragments[(n * Q_STEPS + j) * 32 + lane];
        const auto query = [&](int n, int step) { return Layout::Q_REGISTERS ? q[n][step] : q_fragments[(n * Q_STEPS + step) * 32 + lane]; };

        if (it.next) queries.load(p, p.items[it.next], warp, lane);

        // Tiles within [all_lo, all_hi) are seen whole by every row.
        const int all_lo = visible(p, it, it.row + rows - 1).lo, all_hi = visible(p, it, it.row).hi;

        float o[TILES_N][FRAGMENTS][4], m[TILES_N][COLUMNS], l[TILES_N][COLUMNS];
        float v_unit = 1.f;  // of f32 scales: a power of two that brings them to where f16 holds them
#pragma unroll
        for (int n = 0; n < TILES_N; n++) {
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) m[n][c] = -1e30f, l[n][c] = 0.f;
#pragma unroll
            for (int i = 0; i < FRAGMENTS; i++) o[n][i][0] = o[n][i][1] = o[n][i][2] = o[n][i][3] = 0.f;
        }

#pragma unroll 1
        for (u32 tile = it.tile_begin + warp; tile < it.tile_end; tile += WARPS) {
            fetch.issue(pipe + (stage ? stage - Layout::STAGE : (STAGES - 1) * Layout::STAGE));
            copy_wait<STAGES - 1>();
            __syncwarp();
            u8* const codes_k = pipe + stage;
            u8* const codes_v = codes_k + TILE * K::ROW;
            u8* const scales_k = codes_v + TILE * V::ROW;
            u8* const scales_v = scales_k + TILE * K::SCALE_ROW;
            constexpr float SLACK = 8.f, LARGEST_SCALE = 0x1p15f, SMALLEST_SCALE = 0x1p-8f;
            const int base = tile * TILE;
            const bool edge = base < all_lo || base + TILE > all_hi;
            if (unlikely(edge)) {
                // What lies outside the sequence may be any bits: its weight is zero, but zero times NaN is not.
                for (int r = lane; r < TILE; r += 32) {
                    if (base + r >= (int)it.first && base + r < (int)it.len) continue;
                    for (int b = 0; b < V::SCALE_ROW; b += 2) *(u16*)(scales_v + r * V::SCALE_ROW + b) = 0;
                    if (Codec<V_BITS>::DENSE)
                        for (int c = 0; c < V::ROW / 16; c++)
                            *(uint4*)(codes_v + V::place(r, c)) = make_uint4(0, 0, 0, 0);
                }
                __syncwarp();
            }

#pragma unroll 1
            for (int sub = 0; sub < TILE / 16; sub += SUB) {
                float s[SUB][TILES_N][2 * COLUMNS], top[TILES_N][COLUMNS];
#pragma unroll
                for (int n = 0; n < TILES_N; n++)
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) top[n][c] = NEVER;
#pragma unroll
                for (int u = 0; u < SUB; u++) {
                    const int run = SUB == TILE / 16 ? u : sub + u;
                    const u8* const from = codes_k + run * 16 * K::ROW;
                    repeat<K::SCALES>([&](auto h) {
                        constexpr int H = decltype(h)::value;
                        float dot[TILES_N][4] = {};
                        if constexpr (K_INTEGER) {
                            int high[TILES_N][4] = {}, low[TILES_N][4] = {};
                            u32 a[4][KLane::WORDS + 2], b[4][KLane::WORDS + 2];
                            if constexpr (MATRICES) {
                                const u32 at = shared_address(from) + key_matrices;
#pragma unroll
                                for (int j = 0; j < CHUNKS; j++) {
                                    load_matrices(a[0][j], b[0][j], a[1][j], b[1][j], at + j * 16);
                                    load_matrices(a[2][j], b[2][j], at + j * 16 + D / 4);
                                }
                            } else {
                                repeat<3>([&](auto plane) {
                                    constexpr int P = decltype(plane)::value;
                                    k_at.template load<P>(a[P], from), k_at.template load<P>(b[P], from + 8 * K::ROW);
                                });
                            }
#pragma unroll
                            for (int j = 0; j < PLANE_WORDS; j++) {
                                a[3][j] = fourth_plane(a[0][j], a[1][j], a[2][j]);
                                b[3][j] = fourth_plane(b[0][j], b[1][j], b[2][j]);
                            }
#pragma unroll
                            for (int j = 0; j < Q_STEPS; j++) {
                                u32 k_high[4], k_low[4];
                                decode_levels(a[j / PLANE_WORDS][j % PLANE_WORDS], b[j / PLANE_WORDS][j % PLANE_WORDS], levels, k_high, k_low);
#pragma unroll
                                for (int n = 0; n < TILES_N; n++) {
                                    const QFragment x = query(n, j);
                                    mma_s8(high[n], k_high, x.word[0], x.word[1]);
                                    mma_s8(low[n], k_low, x.word[0], x.word[1]);
                                    if (!NARROW) mma_s8(low[n], k_high, x.word[Q_WORDS - 2], x.word[Q_WORDS - 1]);
                                }
                            }
                            // Products of two low bytes are left out: they are below 2^-15 of a score's scale.
#pragma unroll
                            for (int n = 0; n < TILES_N; n++)
#pragma unroll
                                for (int e = 0; e < 4; e += NARROW + 1) dot[n][e] = (float)(high[n][e] * 256 + low[n][e] + (NARROW ? high[n][e + NARROW] : 0));
                        } else {
                            u32 a[KLane::WORDS + 2], b[KLane::WORDS + 2];
                            k_at.template load<H>(a, from);
                            k_at.template load<H>(b, from + 8 * K::ROW);
                            repeat<K_STEPS>([&](auto j) {
                                constexpr int J = decltype(j)::value;
                                u32 k[4];
                                decode_keys<K_BITS, 4 * J>(a, b, k_table, k_lane, k);
#pragma unroll
                                for (int n = 0; n < TILES_N; n++) {
                                    const QFragment x = query(n, H * K_STEPS + J);
                                    mma(dot[n], k[0], k[1], k[2], k[3], x.word[0], x.word[1]);
                                }
                            });
                            if constexpr (NARROW)
#pragma unroll
                                for (int n = 0; n < TILES_N; n++) dot[n][0] += dot[n][1], dot[n][2] += dot[n][3];
                        }
                        const int r = (run * 16 + key_row) * K::SCALES + H;
                        const float scale0 = load_scale<K_SCALE>(scales_k, r), scale1 = load_scale<K_SCALE>(scales_k, r + 8 * K::SCALES);
#pragma unroll
                        for (int n = 0; n < TILES_N; n++)
#pragma unroll
                            for (int e = 0; e < 2 * COLUMNS; e++) {
                                const float x = dot[n][e * (NARROW + 1)] * (e < COLUMNS ? scale0 : scale1);
                                s[u][n][e] = H ? s[u][n][e] + x : x;
                            }
                    });
                }
                if (unlikely(p.softcap > 0.f)) {
                    const float inverse = 1.f / p.softcap, factor = p.softcap * LOG2E;
#pragma unroll
                    for (int u = 0; u < SUB; u++)
#pragma unroll
                        for (int n = 0; n < TILES_N; n++)
#pragma unroll
                            for (int e = 0; e < 2 * COLUMNS; e++) {
                                const float scale = unit[n][e % COLUMNS];
                                s[u][n][e] = factor / scale * tanh_exact(s[u][n][e] * (scale * inverse));
                            }
                }
                if (unlikely(edge)) {
#pragma unroll
                    for (int n = 0; n < TILES_N; n++)
#pragma unroll
                        for (int c = 0; c < COLUMNS; c++) {
                            const Bounds seen = visible(p, it, it.row + tile_row(n, t, c));
#pragma unroll
                            for (int u = 0; u < SUB; u++)
#pragma unroll
                                for (int half = 0; half < 2; half++) {
                                    const int position = base + (sub + u) * 16 + half * 8 + (int)key_row;
                                    if (position < seen.lo || position >= seen.hi) s[u][n][half * COLUMNS + c] = NEVER;
                                }
                        }
                }
                // A weight's product with its value's scale: within f16 as long as score + log2 of the scale is near the maximum.
                float v_scale[SUB][V::SCALES][2], largest = 0x1p-60f;
#pragma unroll
                for (int u = 0; u < SUB; u++)
#pragma unroll
                    for (int h = 0; h < V::SCALES; h++)
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int run = SUB == TILE / 16 ? u : sub + u;
                            v_scale[u][h][half] = load_scale<V_SCALE>(scales_v, (run * 16 + key_row + half * 8) * V::SCALES + h);
                            if constexpr (V_SCALE == 32) v_scale[u][h][half] *= v_unit;
                            largest = fmaxf(largest, v_scale[u][h][half]);
                        }
                const float above = V_SCALE ? log2_approx(largest) - SLACK : -SLACK;
                // Where scores are so large that they step by more than SLACK, `above` is lost in them.
                bool grown = V_SCALE == 32 && largest > LARGEST_SCALE;
#pragma unroll
                for (int n = 0; n < TILES_N; n++)
#pragma unroll
                    for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
                        for (int u = 0; u < SUB; u++) top[n][c] = fmaxf(top[n][c], fmaxf(s[u][n][c], s[u][n][c + COLUMNS]));
                        grown |= top[n][c] * unit[n][c] + above > m[n][c];
                    }
                if (unlikely(__any_sync(~0u, grown))) {
                    if constexpr (V_SCALE == 32) {
#pragma unroll
                        for (int k = 1; k < 32; k <<= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, k));
                        const bool none = tile == it.tile_begin + warp && sub == 0;
                        if (largest > LARGEST_SCALE || none && largest < SMALLEST_SCALE) {
                            const float change = inverse_power(fminf(largest, 0x1p100f));
                            v_unit *= change;
#pragma unroll
                            for (int u = 0; u < SUB; u++)
#pragma unroll
                                for (int h = 0; h < V::SCALES; h++) v_scale[u][h][0] *= change, v_scale[u][h][1] *= change;
#pragma unroll
                            for (int n = 0; n < TILES_N; n++)
#pragma unroll
                                for (int i = 0; i < FRAGMENTS; i++)
#pragma unroll
                                    for (int e = 0; e < 4; e++) o[n][i][e] *= change;
                        }
                    }
#pragma unroll
                    for (int n = 0; n < TILES_N; n++)
#pragma unroll
                        for (int c = 0; c < COLUMNS; c++) {
                            float x = m[n][c];
#pragma unroll
                            for (int u = 0; u < SUB; u++)
#pragma unroll
                                for (int half = 0; half < 2; half++) {
                                    float scale = 0x1p-60f;
#pragma unroll
                                    for (int h = 0; h < V::SCALES; h++) scale = fmaxf(scale, v_scale[u][h][half]);
                                    x = fmaxf(x, s[u][n][half * COLUMNS + c] * unit[n][c] + fminf(log2_approx(scale), 100.f));
                                }
#pragma unroll
                            for (int k = 4; k < 32; k <<= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, k));
                            const float shrink = exp2_approx(m[n][c] - x);
                            m[n][c] = x, l[n][c] *= shrink;
#pragma unroll
                            for (int i = 0; i < FRAGMENTS; i++) o[n][i][c] *= shrink, o[n][i][c + 2] *= shrink;
                        }
                }
#pragma unroll
                for (int u = 0; u < SUB; u++) {
                    const int run = SUB == TILE / 16 ? u : sub + u;
                    float w[TILES_N][4] = {};
#pragma unroll
                    for (int n = 0; n < TILES_N; n++)
#pragma unroll
                        for (int e = 0; e < 2 * COLUMNS; e++) {
                            const float x = exp2_approx(s[u][n][e] * unit[n][e % COLUMNS] - m[n][e % COLUMNS]);
                            w[n][e * (NARROW + 1)] = x, l[n][e % COLUMNS] += x;
                        }
                    repeat<V::SCALES>([&](auto h) {
                        constexpr int H = decltype(h)::value;
                        u32 b0[TILES_N], b1[TILES_N];
                        // Rounded once, to f16, as a product: of few positions this is most of the output's error.
                        const float scale0 = v_scale[u][H][0], scale1 = v_scale[u][H][1];
#pragma unroll
                        for (int n = 0; n < TILES_N; n++) {
                            b0[n] = transpose8(f16x2_from_f32(w[n][0] * scale0, NARROW ? 0.f : w[n][1] * scale0));
                            b1[n] = transpose8(f16x2_from_f32(w[n][2] * scale1, NARROW ? 0.f : w[n][3] * scale1));
                        }
                        const u8* from = codes_v + run * 16 * V::ROW;
                        if constexpr (V_PLANES && MATRICES) {
                            u32 x[2][4][CHUNKS];
                            const u32 at = shared_address(from) + value_matrices;
#pragma unroll
                            for (int j = 0; j < CHUNKS; j++) {
                                load_transposed(x[0][0][j], x[1][0][j], x[0][1][j], x[1][1][j], at + j * 16);
                                load_transposed(x[0][2][j], x[1][2][j], at + j * 16 + D / 4);
#pragma unroll
                                for (int pair = 0; pair < 2; pair++) x[pair][3][j] = fourth_plane(x[pair][0][j], x[pair][1][j], x[pair][2][j]);
                            }
                            repeat<V_TILES / 2>([&](auto i) {
                                constexpr int P = decltype(i)::value / CHUNKS, C = decltype(i)::value % CHUNKS;
                                u32 a[2][4];
#pragma unroll
                                for (int pair = 0; pair < 2; pair++) {
                                    // Codes times 16 in bytes, the lower two of one row and the upper two of another.
                                    const u32 even = x[pair][P][C] << 4 & 0x70707070, odd = x[pair][P][C] & 0x70707070;
                                    a[0][2 * pair] = look(v_table, dot_bytes4(8 | 64 << 16, even, v_lane));
                                    a[0][2 * pair + 1] = look(v_table, dot_bytes4(8 | 64 << 16, odd, v_lane));
                                    a[1][2 * pair] = look(v_table, dot_bytes4(8 << 8 | 64 << 24, even, v_lane));
                                    a[1][2 * pair + 1] = look(v_table, dot_bytes4(8 << 8 | 64 << 24, odd, v_lane));
                                }
#pragma unroll
                                for (int k = 0; k < 2; k++)
#pragma unroll
                                    for (int n = 0; n < TILES_N; n++) mma(o[n][(P * CHUNKS + C) * 2 + k], a[k][0], a[k][1], a[k][2], a[k][3], b0[n], b1[n]);
                            });
                        } else if constexpr (V_PLANES) {
                            u32 x[2][4][PLANE_WORDS];  // merged rows
                            repeat<2>([&](auto pair) {
                                repeat<3>([&](auto plane) {
                                    constexpr int I = decltype(pair)::value, P = decltype(plane)::value;
                                    u32 first[VLane::WORDS + 2], second[VLane::WORDS + 2];
                                    v_at[0].template load<P>(first, from + I * 8 * V::ROW);
                                    v_at[1].template load<P>(second, from + I * 8 * V::ROW);
#pragma unroll
                                    for (int j = 0; j < PLANE_WORDS; j++) x[I][P][j] = v_nibbles.merged(first[j], second[j]);
                                });
#pragma unroll
                                for (int j = 0; j < PLANE_WORDS; j++) {
                                    u32(&y)[4][PLANE_WORDS] = x[decltype(pair)::value];
                                    y[3][j] = fourth_plane(y[0][j], y[1][j], y[2][j]);
                                }
                            });
                            repeat<V_TILES>([&](auto i) {
                                constexpr int I = decltype(i)::value;
                                u32 a[4];
                                repeat<4>([&](auto k) {
                                    constexpr int PART = decltype(k)::value, CODE = 2 * I + PART % 2, AT = CODE % PLANE_BYTES;
                                    a[PART] = look(v_table, byte_line<AT % 4>(x[PART / 2][CODE / PLANE_BYTES][AT / 4], v_lane));
                                });
#pragma unroll
                                for (int n = 0; n < TILES_N; n++) mma(o[n][I], a[0], a[1], a[2], a[3], b0[n], b1[n]);
                            });
                        } else {
                            u32 x0[VLane::WORDS + 2], x1[VLane::WORDS + 2], x2[VLane::WORDS + 2], x3[VLane::WORDS + 2];
                            v_at[0].template load<H>(x0, from);
                            v_at[1].template load<H>(x1, from);
                            v_at[0].template load<H>(x2, from + 8 * V::ROW);
                            v_at[1].template load<H>(x3, from + 8 * V::ROW);
                            repeat<V_TILES, 2>([&](auto i) {
                                constexpr int I = decltype(i)::value;
                                u32 a[4], b[4];
                                decode_rows<V_BITS, (I + 1 < V_TILES), 2 * I>(x0, x1, v_table, v_lane, a);
                                decode_rows<V_BITS, (I + 1 < V_TILES), 2 * I>(x2, x3, v_table, v_lane, b);
#pragma unroll
                                for (int n = 0; n < TILES_N; n++) {
                                    mma(o[n][H * V_TILES + I], a[0], a[1], b[0], b[1], b0[n], b1[n]);
                                    if constexpr (I + 1 < V_TILES) mma(o[n][H * V_TILES + I + 1], a[2], a[3], b[2], b[3], b0[n], b1[n]);
                                }
                            });
                        }
                    });
                }
            }
            __syncwarp();
            stage = stage == (STAGES - 1) * Layout::STAGE ? 0 : stage + Layout::STAGE;
        }

        const Item next = p.items[it.next];
#pragma unroll
        for (int n = 0; n < TILES_N; n++)
#pragma unroll
            for (int c = 0; c < COLUMNS; c++) {
#pragma unroll
                for (int k = 4; k < 32; k <<= 1) l[n][c] += __shfl_xor_sync(~0u, l[n][c], k);
                // Of a row that saw nothing no sum stays: zero times a value that is not a number is none either.
                const float kept = l[n][c] == 0.f ? 0.f : V_SCALE == 32 ? inverse_power(v_unit) : 1.f;
                if (unlikely(kept != 1.f))
#pragma unroll
                    for (int i = 0; i < FRAGMENTS; i++) {
                        o[n][i][c] = kept == 0.f ? 0.f : o[n][i][c] * kept;
                        o[n][i][c + 2] = kept == 0.f ? 0.f : o[n][i][c + 2] * kept;
                    }
                if (g == 0) {
                    warp_m[warp * ROWS + tile_row(n, t, c)] = m[n][c];
                    warp_l[warp * ROWS + tile_row(n, t, c)] = l[n][c];
                }
            }
        if (it.next) queries.keep(p, next, q_rows, q_largest, warp, lane);
        // The block's sum, four rows by 128 dims at a time; beside the first, the next item's queries.
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
                                const float* x = o[quad >> 1][from + i] + 2 * e;
                                float* const to = scratch + warp * 512 + ((i * 8 + g) * 2 + e) * 4 + (NARROW ? t : 2 * (t & 1));
                                if (NARROW) *to = x[0];
                                else *(float2*)to = make_float2(x[0], x[1]);
                            }
                __syncthreads();
                if (quad + from == 0 && it.next) make_fragments();
                float top = -1e30f, factor[WARPS];
                const int row = quad * 4 + (thread & 3);
#pragma unroll
                for (int k = 0; k < WARPS; k++) factor[k] = warp_m[k * ROWS + row], top = fmaxf(top, factor[k]);
#pragma unroll
                for (int k = 0; k < WARPS; k++) factor[k] = exp2_approx(factor[k] - top);
                if (from == 0 && thread < 4) {
                    float sum = 0.f;
#pragma unroll
                    for (int k = 0; k < WARPS; k++) sum += factor[k] * warp_l[k * ROWS + row];
                    block_m[row] = top, block_l[row] = sum;
                }
                for (int i = thread; i < FULL * 64; i += THREADS) {
                    const int fragment = from + i / 64;
                    if (fragment >= FRAGMENTS) break;
                    float sum = 0.f;
#pragma unroll
                    for (int k = 0; k < WARPS; k++) sum += factor[k] * scratch[k * 512 + i];
                    const int d = output_element(fragment, V_TILES, i >> 3 & 7, i >> 2 & 1);
                    if (d >= 0) acc[row * Layout::ACC_ROW + d] = sum;
                }
                __syncthreads();
            }
        }

        bool mine = true;
        if (it.part_count > 1) {
            // Leave this part in the workspace; whoever comes last sums the parts.
            for (int i = thread; i < rows * (D / 4); i += THREADS) {
                const int r = i / (D / 4), d = i % (D / 4) * 4;
                __stcg((float4*)(p.partial + ((u64)it.part * ROWS + r) * D + d), *(const float4*)(acc + r * Layout::ACC_ROW + d));
            }
            if (thread < rows) __stcg(p.partial_ml + (u64)it.part * ROWS + thread, make_float2(block_m[thread], block_l[thread]));
            __syncthreads();
            if (thread == 0) {
                *last = atomic_add_acq_rel(p.counters + it.part_first, 1) == it.part_count - 1;
                if (*last) p.counters[it.part_first] = 0;
            }
            __syncthreads();
            mine = *last;
            if (mine) {
                constexpr int BATCH = 16;
                for (int i = thread; i < rows * (D / 2); i += THREADS) {
                    const int r = i / (D / 2), d = i % (D / 2) * 2;
                    float top = -1e30f, weight = 0.f, sum0 = 0.f, sum1 = 0.f;
                    for (u32 k = 0; k < it.part_count; k += BATCH) {
                        float2 ml[BATCH], x[BATCH];
#pragma unroll
                        for (int j = 0; j < BATCH; j++) {
                            const u64 part = (u64)(it.part_first + min(k + j, it.part_count - 1)) * ROWS + r;
                            ml[j] = __ldcg(p.partial_ml + part);
                            x[j] = __ldcg((const float2*)(p.partial + part * D + d));
                            if (k + j >= it.part_count) ml[j] = make_float2(-1e30f, 0.f), x[j] = make_float2(0.f, 0.f);
                        }
                        float higher = top;
#pragma unroll
                        for (int j = 0; j < BATCH; j++) higher = fmaxf(higher, ml[j].x);
                        const float shrink = exp2_approx(top - higher);
                        top = higher, weight *= shrink, sum0 *= shrink, sum1 *= shrink;
#pragma unroll
                        for (int j = 0; j < BATCH; j++) {
                            const float f = exp2_approx(ml[j].x - top);
                            weight += f * ml[j].y, sum0 += f * x[j].x, sum1 += f * x[j].y;
                        }
                    }
                    *(float2*)(acc + r * Layout::ACC_ROW + d) = make_float2(sum0, sum1);
                    if (d == 0) block_m[r] = top, block_l[r] = weight;
                }
                __syncthreads();
            }
        }
        if (mine)
            for (int r = warp; r < rows; r += WARPS)
                finish_row(p, it, it.row + r, acc + r * Layout::ACC_ROW, block_m[r], block_l[r], lane);
        if (it.next == 0) break;
        it = next;
    }
    copy_wait<0>();
}
