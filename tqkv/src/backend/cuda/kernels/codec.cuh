// From the bits of a row to f16 values, by look-up in shared memory.
//
// A row is a plain little-endian bit stream of codes, but for 3 bits, below. Tensor-core fragments want values in pairs: two
// neighbours of one row (keys) or one element of two rows (values), so where it fits a look-up takes as many codes as it can:
//   2 bits: four codes -> two pairs; 3 and 4 bits: two codes -> a pair; 5 to 8 bits: one code; 16 bits: the row is f16 itself.
// Every table is replicated so that each lane reads a bank of its own: an entry is a line of 128 bytes. An index that is a whole
// byte (2, 3, 4, 8 bits) becomes its line's place by one byte product (DP2A), which leaves the ALU, the busiest pipe, alone.
//
// Other codes are moved there by one too, from a masked word, unless they straddle its halves.
//
// A row of 3 bits is three planes of nibbles, of whose top bits a fourth is made (docs/format.md). Keys are not looked up: a nibble
// is what PRMT takes to select one of eight bytes, so the levels are held in registers, as fixed-point numbers of two bytes.
// Values are looked up in pairs. Where a plane is whole 16-byte chunks they are read as transposed matrices, so that a word has two
// rows' nibbles of the same dims; elsewhere two rows are merged as those of 4 bits are, in a table that ignores the top bits.
#pragma once
#include "common.cuh"

constexpr bool MATRICES = HEAD_DIM % 128 == 0;  // planes are whole 16-byte chunks

template <int BITS> struct Codec {
    static constexpr bool DENSE = BITS == 16;
    static constexpr int CODES = BITS == 2 ? 4 : BITS <= 4 ? 2 : 1;
    static constexpr int PLACE = BITS == 3 && !MATRICES ? 4 : BITS;  // bits of a table's index that a code takes
    static constexpr bool HALVES = BITS >= 5 && BITS <= 7;           // two tables, for the lower and the upper half of a pair
    static constexpr int ENTRIES = DENSE ? 0 : 1 << (PLACE * CODES + HALVES);
};

// Where a lane's replica lies within a line.
template <int BITS> DEVICE u32 lane_offset(int lane) { return BITS == 2 ? (lane & 15) * 8 : lane * 4; }

// A codebook on its way from global memory, as f16 bits, to shared memory: read early, kept late.
template <int LEVELS, int THREADS> struct Codebook {
    static constexpr int N = (LEVELS + THREADS - 1) / THREADS;
    float value[N];
    DEVICE Codebook(const float* codebook, int thread) {
#pragma unroll
        for (int k = 0; k < N; k++) value[k] = LEVELS > 1 && thread + k * THREADS < LEVELS ? codebook[thread + k * THREADS] : 0.f;
    }
    DEVICE void keep(int thread, u16* to) const {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (thread + k * THREADS < LEVELS) to[thread + k * THREADS] = f16_from_f32(value[k]);
    }
};

// Fills a table from `levels` f16 values, which `codebook` holds in shared memory; a code's bits above `levels` are ignored. All threads of the block.
template <int BITS> DEVICE void build_table(u8* table, const u16* codebook, int levels, int thread, int threads) {
    constexpr int CODES = Codec<BITS>::CODES;
    // Eight threads write an entry's 128 bytes.
    for (int i = thread; i < Codec<BITS>::ENTRIES * 8; i += threads) {
        u32 c[4];
#pragma unroll
        for (int k = 0; k < 4; k++) c[k] = codebook[k < CODES ? (i >> 3) >> k * Codec<BITS>::PLACE & (levels - 1) : 0];
        if (Codec<BITS>::HALVES) c[i >> (3 + BITS) ? 1 : 0] = c[0], c[i >> (3 + BITS) ? 0 : 1] = 0;
        uint4 v;
        v.x = c[0] | (CODES == 1 && !Codec<BITS>::HALVES ? c[0] : c[1]) << 16;
        v.y = CODES == 4 ? c[2] | c[3] << 16 : v.x;
        v.z = v.x, v.w = v.y;
        *(uint4*)(table + i * 16) = v;
    }
}

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
// Code I of a row, one look-up.
template <int BITS, int I> DEVICE u32 look_code(const u8* table, const u32* words, u32 lane) {
    if constexpr (BITS == 8) return look(table, byte_line<I % 4>(words[I / 4], lane));
    else return look(table, bit_line<I * BITS, BITS>(words, lane));
}

// The pair of codes I of row a and J of row b.
template <int BITS, int I, int J> DEVICE u32 look_pair(const u8* table, const u32* a, const u32* b, u32 lane) {
    const u32 x = look_code<BITS, I>(table, a, lane), y = look_code<BITS, J>(table + (Codec<BITS>::HALVES ? 128 << BITS : 0), b, lane);
    return Codec<BITS>::HALVES ? f16x2_add(x, y) : __byte_perm(x, y, 0x5410);
}

// Codes I to I + 3 of a row: two pairs of neighbours.
template <int BITS, int I> DEVICE void decode_row(const u32* w, const u8* table, u32 lane, u32& x, u32& y) {
    if constexpr (BITS == 16) {
        x = w[I / 2], y = w[I / 2 + 1];
    } else if constexpr (BITS == 4) {
        x = look(table, byte_line<I / 2 % 4>(w[I / 8], lane));
        y = look(table, byte_line<I / 2 % 4 + 1>(w[I / 8], lane));
    } else {
        x = look_pair<BITS, I, I + 1>(table, w, w, lane), y = look_pair<BITS, I + 2, I + 3>(table, w, w, lane);
    }
}

// Codes I to I + 3 of two rows as a key's fragment: (row a, row b) of the first pair, (row a, row b) of the second.
template <int BITS, int I> DEVICE void decode_keys(const u32* a, const u32* b, const u8* table, u32 lane, u32 (&x)[4]) {
    if constexpr (BITS == 2) {
        // The rows' pairs merged, so that what a look-up gives lies in neighbouring registers of the fragment.
        constexpr u32 M = 0x0f0f0f0f;
        const u32 p = a[I / 16], q = b[I / 16];
        const uint2 first = look2(table, byte_line<I / 4 % 4>(merge<M>(p, q << 4), lane));
        const uint2 second = look2(table, byte_line<I / 4 % 4>(merge<M>(p >> 4, q), lane));
        x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
    } else {
        decode_row<BITS, I>(a, table, lane, x[0], x[2]);
        decode_row<BITS, I>(b, table, lane, x[1], x[3]);
    }
}

template <int BITS, int I> DEVICE void decode_rows2(const u32* a, const u32* b, const u8* table, u32 lane, u32& x, u32& y) {
    if constexpr (BITS == 16) {
        x = __byte_perm(a[I / 2], b[I / 2], 0x5410);
        y = __byte_perm(a[I / 2], b[I / 2], 0x7632);
    } else if constexpr (BITS == 4) {
        constexpr u32 M = 0x0f0f0f0f;
        u32 p = a[I / 8], q = b[I / 8];
        x = look(table, byte_line<I / 2 % 4>(merge<M>(p, q << 4), lane));
        y = look(table, byte_line<I / 2 % 4>(merge<M>(p >> 4, q), lane));
    } else {
        x = look_pair<BITS, I, I>(table, a, b, lane), y = look_pair<BITS, I + 1, I + 1>(table, a, b, lane);
    }
}

// Codes I to I + 3 of two rows, I even (beyond the last code: unspecified), as a value's fragments: element by element the pair
// (row a, row b). Merging the rows' codes first, so that one index holds both, halves the look-ups. The order of the four is
// that of `fragment_element`: two for each of two fragments, or for the one that is left.
template <int BITS> DEVICE constexpr int fragment_element(int fragment, int fragments, int e) {
    return BITS == 2 && (fragment | 1) < fragments ? fragment / 2 * 4 + fragment % 2 + e * 2 : fragment * 2 + e;
}
template <int BITS, bool PAIR, int I> DEVICE void decode_rows(const u32* a, const u32* b, const u8* table, u32 lane, u32 (&x)[4]) {
    if constexpr (BITS == 2) {
        static_assert(I % 4 == 0, "a look-up spans four codes");
        constexpr u32 M = 0x33333333;
        const u32 p = a[I / 16], q = b[I / 16];
        const uint2 even = look2(table, byte_line<I / 4 % 4>(merge<M>(p, q << 2), lane));
        const uint2 odd = look2(table, byte_line<I / 4 % 4>(merge<M>(p >> 2, q), lane));
        x[0] = even.x, x[1] = PAIR ? even.y : odd.x, x[2] = odd.x, x[3] = odd.y;
    } else {
        decode_rows2<BITS, I>(a, b, table, lane, x[0], x[1]);
        decode_rows2<BITS, I + 2>(a, b, table, lane, x[2], x[3]);
    }
}

// ---- 3 bits

// The fourth plane's nibbles; their top bits are anything.
DEVICE u32 fourth_plane(u32 a, u32 b, u32 c) { return merge<0x33333333>(merge<0x11111111>(a >> 3, b >> 2), c >> 1); }
// The element of nibble `i` of plane `plane`.
DEVICE constexpr int plane_element(int plane, int i) { return i / 2 * 8 + plane * 2 + i % 2; }

// The eight levels (of the native codebook: no other has 3 bits) as 16-bit integers, +-3703, 11422, 20304 and 32512, each to half
// a unit, split into two signed bytes: level = high * 256 + low.
__device__ const uint4 LEVEL_BYTES = {0xf2d3b181, 0x7f4f2d0e, 0x8962b000, 0x00509e77};
struct Levels {
    static constexpr float LARGEST = 32512.f;
    u32 high[2], low[2];
    DEVICE void read() { load_volatile4(high[0], high[1], low[0], low[1], &LEVEL_BYTES); }
};

// Eight codes of each of two rows as a key's fragments, of the levels' high bytes and of their low ones.
DEVICE void decode_levels(u32 a, u32 b, const Levels& levels, u32 (&high)[4], u32 (&low)[4]) {
    a &= 0x77777777, b &= 0x77777777;
    const u32 codes[4] = {a, b, upper_half(a), upper_half(b)};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        high[i] = select_bytes(levels.high[0], levels.high[1], codes[i]);
        low[i] = select_bytes(levels.low[0], levels.low[1], codes[i]);
    }
}

// Which nibbles of a word a value lane decodes: lanes of even g the even ones, of odd g the odd ones. An even lane's rows are
// (a, b), an odd lane's (b, a), so that a merged byte is (a, b) in both.
struct Nibbles {
    u32 turn, mask;
    DEVICE Nibbles(int g) : turn(g & 1 ? 28 : 4), mask(g & 1 ? 0xf0f0f0f0 : 0x0f0f0f0f) {}
    DEVICE u32 merged(u32 first, u32 second) const { return (first & mask) | (__funnelshift_l(second, second, turn) & ~mask); }
};
