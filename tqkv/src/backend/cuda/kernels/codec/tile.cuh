// Rows of a tile in shared memory, and which of their bits a lane of a warp reads for tensor cores.
//
// Fragment row r of a run of 16 is position (r % 8) / 2 + r % 2 * 4 + r / 8 * 8: the value's fragments then take rows t, t + 4, t + 8,
// t + 12. Key lanes hold a quarter of each span's elements, value lanes an eighth.
#pragma once
#include "codec/row.cuh"

// The position that fragment row g of a run stands for; g + 8 stands for 8 more.
DEVICE u32 fragment_row(int g) { return (g >> 1) + (g & 1) * 4; }

template <typename R> struct Placed {
    static constexpr int ROW = R::BYTES;
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
    static DEVICE u32 place_byte(u32 row, u32 byte) { return POW2 ? place(row, byte / 16) + byte % 16 : row * ROW + byte; }
};

// What one lane reads of one row: of each of SECTIONS, SECTION_BITS apart, the LANE_BITS from bit index * LANE_BITS on.
template <typename R, int SECTIONS, int SECTION_BITS, int LANE_BITS> struct Lane {
    typedef Placed<R> P;
    static constexpr int WORDS = (LANE_BITS + 31) / 32;
    static constexpr bool ALIGNED = LANE_BITS % 32 == 0 && P::ROW % 4 == 0;
    static constexpr int VECTOR = LANE_BITS % 128 == 0 && P::ROW % 16 == 0 ? 4 : LANE_BITS % 64 == 0 && P::ROW % 8 == 0 ? 2 : 1;
    static constexpr int LOADS = ALIGNED ? WORDS / VECTOR : 1;
    static constexpr int ALL = LANE_BITS | SECTION_BITS | P::ROW * 8 | 32, UNIT = ALL & -ALL;  // what divides every offset, in bits
    static constexpr int RAW = (32 - UNIT + LANE_BITS + 31) / 32;
    static_assert(ALIGNED || !P::POW2, "swizzled rows give every lane whole words");

    u32 offset[SECTIONS][LOADS];  // from the first row of a run of 16
    u32 shift[SECTIONS];

    DEVICE void init(u32 row, u32 index) {
#pragma unroll
        for (int h = 0; h < SECTIONS; h++) {
            u32 bit = h * SECTION_BITS + index * LANE_BITS;
            if constexpr (ALIGNED) {
#pragma unroll
                for (int j = 0; j < LOADS; j++) offset[h][j] = opaque(P::place_byte(row, bit / 8 + j * VECTOR * 4));
            } else {
                bit += row * P::ROW * 8;
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

// A table of a row's levels in shared memory, looked up by PLACE bits a code, CODES codes at once. It is replicated so that each lane reads a
// bank of its own: an entry is a line of 128 bytes. An index that is a whole byte (2, 3, 4, 8 bits) becomes its line's place by one byte
// product (DP2A), which leaves the ALU, the busiest pipe, alone. With PARTS = 2 a table of what rounding to f16 loses follows.
template <typename R, int PLACE_, int PARTS_> struct LevelTable {
    static constexpr int PLACE = PLACE_, LEVELS = R::LEVELS, PARTS = PARTS_;
    static constexpr int CODES = R::STORED == 2 ? 4 : R::STORED <= 4 ? 2 : 1;
    static constexpr bool HALVES = R::STORED >= 5 && R::STORED <= 7;  // two tables, for the lower and the upper half of a pair
    static constexpr int ENTRIES = 1 << (PLACE * CODES + HALVES), PART_BYTES = ENTRIES * 128, BYTES = PARTS * PART_BYTES;

    // Where a lane's replica lies within a line.
    static DEVICE u32 lane_offset(int lane) { return CODES == 4 ? (lane & 15) * 8 : lane * 4; }

    // Fills it from the levels in f16, which `levels` holds in shared memory; a code's bits above are ignored. All threads of the block.
    static DEVICE void build(u8* table, const u16* levels, int thread, int threads) {
        // Eight threads write an entry's 128 bytes.
        for (int i = thread; i < PARTS * ENTRIES * 8; i += threads) {
            const int entry = i / 8 % ENTRIES;
            const u16* const of_part = levels + i / (ENTRIES * 8) * 256;
            u32 c[4];
#pragma unroll
            for (int k = 0; k < 4; k++) c[k] = of_part[k < CODES ? entry >> k * PLACE & (LEVELS - 1) : 0];
            if (HALVES) c[entry >> PLACE ? 1 : 0] = c[0], c[entry >> PLACE ? 0 : 1] = 0;
            uint4 v;
            v.x = c[0] | (CODES == 1 && !HALVES ? c[0] : c[1]) << 16;
            v.y = CODES == 4 ? c[2] | c[3] << 16 : v.x;
            v.z = v.x, v.w = v.y;
            *(uint4*)(table + i * 16) = v;
        }
    }
};
struct NoTable {
    static constexpr int LEVELS = 0, PARTS = 1, PART_BYTES = 0, BYTES = 0;
    static DEVICE u32 lane_offset(int) { return 0; }
    static DEVICE void build(u8*, const u16*, int, int) {}
};

// A table's levels on their way from global memory to shared memory, as f16, and 256 further what that loses: read early, kept late.
template <typename TABLE, int THREADS> struct Levels {
    static constexpr int N = (TABLE::LEVELS + THREADS - 1) / THREADS;
    float value[N ? N : 1];
    DEVICE Levels(const float* levels, int thread) {
#pragma unroll
        for (int k = 0; k < N; k++) value[k] = thread + k * THREADS < TABLE::LEVELS ? levels[thread + k * THREADS] : 0.f;
    }
    DEVICE void keep(int thread, u16* to) const {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (thread + k * THREADS < TABLE::LEVELS) {
                const u16 high = f16_from_f32(value[k]);
                to[thread + k * THREADS] = high;
                if (TABLE::PARTS > 1) to[256 + thread + k * THREADS] = f16_from_f32(value[k] - f32_from_f16(high));
            }
    }
};

// The line of the index of N bits at bit FIRST of a stream; where it lies within half a word, one byte product shifts it.
template <int FIRST, int N> DEVICE u32 bit_line(const u32* words, u32 lane) {
    constexpr int Q = FIRST / 32, R = FIRST % 32, IN = R % 16;
    constexpr u32 MASK = (1u << N) - 1;
    if constexpr (IN + N <= 16) return dot_bytes<R / 16>(128 >> IN | 32768 >> IN << 16, words[Q] & MASK << R, lane);
    else return ((R + N > 32 ? __funnelshift_r(words[Q], words[Q + 1], R - 7) : words[Q] >> (R - 7)) & MASK << 7) | lane;
}
// The line of the index in byte K of a word.
template <int K> DEVICE u32 byte_line(u32 word, u32 lane) { return dot_bytes<K / 2>(128 << K % 2 * 16, word, lane); }
DEVICE u32 look(const u8* table, u32 line) { return *(const u32*)(table + line); }
DEVICE uint2 look2(const u8* table, u32 line) { return *(const uint2*)(table + line); }

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
