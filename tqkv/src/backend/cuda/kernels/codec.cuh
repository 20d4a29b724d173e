// From the bits of a row to f16 values, by look-up in shared memory.
//
// A row is a plain little-endian bit stream of codes. Tensor-core fragments want values in pairs: two neighbours of one row
// (keys) or one element of two rows (values), so where it fits a look-up takes as many codes as it can:
//   2 bits: four codes -> two pairs; 3 and 4 bits: two codes -> a pair; 5 to 8 bits: one code; 16 bits: the row is f16 itself.
// Every table is replicated so that each lane reads a bank of its own: an entry is a line of 128 bytes. Where the index is a
// whole byte (2, 4, 8 bits) lines lie 256 bytes apart, so that one PRMT makes the address; the key's table then has the lower
// half of each 256 bytes and the value's the upper.
#pragma once
#include "common.cuh"

template <int BITS> struct Codec {
    static constexpr bool DENSE = BITS == 16;
    static constexpr int CODES = BITS == 2 ? 4 : BITS <= 4 ? 2 : 1;
    static constexpr bool BYTE_INDEX = BITS == 2 || BITS == 4 || BITS == 8;
    static constexpr int ENTRIES = DENSE ? 0 : 1 << (BITS * CODES % 16);
    static constexpr int STRIDE = BYTE_INDEX ? 256 : 128;
};

// Where a lane's replica lies within a line.
template <int BITS> DEVICE u32 lane_offset(int lane) { return BITS == 2 ? (lane & 15) * 8 : lane * 4; }

// Fills a table from `levels` sorted values in global memory; a code's bits above `levels` are ignored. All threads of the block.
template <int BITS> DEVICE void build_table(u8* table, const float* codebook, int levels, int thread, int threads) {
    constexpr int CODES = Codec<BITS>::CODES;
    // Eight threads write an entry's 128 bytes.
    for (int i = thread; i < Codec<BITS>::ENTRIES * 8; i += threads) {
        int entry = i >> 3;
        float c[4];
#pragma unroll
        for (int k = 0; k < 4; k++) c[k] = k < CODES ? codebook[entry >> (k * BITS) & (levels - 1)] : 0.f;
        uint4 v;
        v.x = f16x2_from_f32(c[0], CODES == 1 ? c[0] : c[1]);
        v.y = CODES == 4 ? f16x2_from_f32(c[2], c[3]) : v.x;
        v.z = v.x, v.w = v.y;
        *(uint4*)(table + entry * Codec<BITS>::STRIDE + (i & 7) * 16) = v;
    }
}

// The line of the index in byte K of a word.
template <int K> DEVICE u32 byte_line(u32 word, u32 lane) { return __byte_perm(word, lane, 0x7604 | K << 4); }
// The line of the index of N bits at bit FIRST of a stream.
template <int FIRST, int N> DEVICE u32 bit_line(const u32* words, u32 lane) {
    constexpr int Q = FIRST / 32, R = FIRST % 32;
    u32 v;
    if constexpr (R + N > 32) v = __funnelshift_r(words[Q], words[Q + 1], R - 7);
    else if constexpr (R >= 7) v = words[Q] >> (R - 7);
    else v = words[Q] << (7 - R);
    return (v & (((1u << N) - 1) << 7)) | lane;
}
template <int BITS, int I> DEVICE u32 code_line(const u32* words, u32 lane) {
    if constexpr (BITS == 8) return byte_line<I % 4>(words[I / 4], lane);
    else return bit_line<I * BITS, BITS>(words, lane);
}
DEVICE u32 look(const u8* table, u32 line) { return *(const u32*)(table + line); }
DEVICE uint2 look2(const u8* table, u32 line) { return *(const uint2*)(table + line); }

// Codes I to I + 3 of a row: two pairs of neighbours.
template <int BITS, int I> DEVICE void decode_row(const u32* w, const u8* table, u32 lane, u32& x, u32& y) {
    if constexpr (BITS == 16) {
        x = w[I / 2], y = w[I / 2 + 1];
    } else if constexpr (BITS == 2) {
        uint2 v = look2(table, byte_line<I / 4 % 4>(w[I / 16], lane));
        x = v.x, y = v.y;
    } else if constexpr (BITS == 4) {
        x = look(table, byte_line<I / 2 % 4>(w[I / 8], lane));
        y = look(table, byte_line<I / 2 % 4 + 1>(w[I / 8], lane));
    } else if constexpr (BITS == 3) {
        x = look(table, bit_line<I * 3, 6>(w, lane));
        y = look(table, bit_line<I * 3 + 6, 6>(w, lane));
    } else {
        u32 a = look(table, code_line<BITS, I>(w, lane)), b = look(table, code_line<BITS, I + 1>(w, lane));
        u32 c = look(table, code_line<BITS, I + 2>(w, lane)), d = look(table, code_line<BITS, I + 3>(w, lane));
        x = __byte_perm(a, b, 0x5410), y = __byte_perm(c, d, 0x5410);
    }
}

// Codes I and I + 1 of two rows: element by element the pair (row a, row b). Merging the rows' codes first, so that one index
// holds both, halves the look-ups. I is even.
template <int BITS, int I> DEVICE void decode_rows(const u32* a, const u32* b, const u8* table, u32 lane, u32& x, u32& y) {
    if constexpr (BITS == 16) {
        x = __byte_perm(a[I / 2], b[I / 2], 0x5410);
        y = __byte_perm(a[I / 2], b[I / 2], 0x7632);
    } else if constexpr (BITS == 4) {
        constexpr u32 M = 0x0f0f0f0f;
        u32 p = a[I / 8], q = b[I / 8];
        x = look(table, byte_line<I / 2 % 4>((p & M) | (q << 4 & ~M), lane));
        y = look(table, byte_line<I / 2 % 4>((p >> 4 & M) | (q & ~M), lane));
    } else if constexpr (BITS == 2) {
        // A look-up of a merged byte gives two elements, I and I + 2; the compiler sees that the next call asks for the same.
        constexpr u32 M = 0x33333333;
        u32 p = a[I / 16], q = b[I / 16];
        uint2 even = look2(table, byte_line<I / 4 % 4>((p & M) | (q << 2 & ~M), lane));
        uint2 odd = look2(table, byte_line<I / 4 % 4>((p >> 2 & M) | (q & ~M), lane));
        x = I & 2 ? even.y : even.x, y = I & 2 ? odd.y : odd.x;
    } else if constexpr (BITS == 3) {
        // Eight codes, 24 bits, at a time.
        constexpr u32 M = 0x1c71c7;
        constexpr int Q = I / 8 * 24 / 32, R = I / 8 * 24 % 32;
        u32 p, q;
        if constexpr (R > 8) p = __funnelshift_r(a[Q], a[Q + 1], R), q = __funnelshift_r(b[Q], b[Q + 1], R);
        else p = a[Q] >> R, q = b[Q] >> R;
        u32 even = (p & M) | (q << 3 & ~M), odd = (p >> 3 & M) | (q & ~M);
        x = look(table, bit_line<I % 8 * 3, 6>(&even, lane));
        y = look(table, bit_line<I % 8 * 3, 6>(&odd, lane));
    } else {
        u32 c = look(table, code_line<BITS, I>(a, lane)), d = look(table, code_line<BITS, I>(b, lane));
        u32 e = look(table, code_line<BITS, I + 1>(a, lane)), f = look(table, code_line<BITS, I + 1>(b, lane));
        x = __byte_perm(c, d, 0x5410), y = __byte_perm(e, f, 0x5410);
    }
}
