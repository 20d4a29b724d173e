// From the bits of a row to f16 values, by look-up in shared memory.
//
// A row is a plain little-endian bit stream of codes. Tensor-core fragments want values in pairs: two neighbours of one row
// (keys) or one element of two rows (values), so where it fits a look-up takes as many codes as it can:
//   2 bits: four codes -> two pairs; 3 and 4 bits: two codes -> a pair; 5 to 8 bits: one code; 16 bits: the row is f16 itself.
// Every table is replicated so that each lane reads a bank of its own: an entry is a line of 128 bytes. Where the index is a
// whole byte (2, 4, 8 bits) lines lie 256 bytes apart, so that one PRMT makes the address; the key's table then has the lower
// half of each 256 bytes and the value's the upper. Six-bit fields (3 bits in pairs, 6 bits) begin at bit 0, 2, 4 or 6 of a byte;
// shifting the stream by 4 leaves 0 and 2. Where key and value share a codec, both halves of the 256 bytes are theirs: one table
// for fields in a byte's lower six bits and one for the upper, and the index again is a byte.
// WIDE_TABLES=0 keeps all lines 128 bytes apart, at one more instruction a look-up, for devices with little shared memory.
#pragma once
#include "common.cuh"

#ifndef WIDE_TABLES
#define WIDE_TABLES 1
#endif

template <int BITS> struct Codec {
    static constexpr bool DENSE = BITS == 16;
    static constexpr int CODES = BITS == 2 ? 4 : BITS <= 4 ? 2 : 1;
    static constexpr bool SIX = BITS == 3 || BITS == 6;
    static constexpr bool BYTE_INDEX = WIDE_TABLES && (BITS == 2 || BITS == 4 || BITS == 8);
    static constexpr int ENTRIES = DENSE ? 0 : 1 << (BITS * CODES % 16);
    static constexpr int STRIDE = BYTE_INDEX ? 256 : 128;
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
    DEVICE void keep(u16* to, int thread) const {
#pragma unroll
        for (int k = 0; k < N; k++)
            if (thread + k * THREADS < LEVELS) to[thread + k * THREADS] = f16_from_f32(value[k]);
    }
};

// Fills a table from `levels` f16 values in shared memory; a code's bits above `levels` are ignored. All threads of the block.
template <int BITS, bool BOTH> DEVICE void build_table(u8* table, const u16* codebook, int levels, int thread, int threads) {
    constexpr int CODES = Codec<BITS>::CODES, STRIDE = BOTH ? 256 : Codec<BITS>::STRIDE;
    // Eight threads write an entry's 128 bytes.
    for (int i = thread; i < (BOTH ? 256 : Codec<BITS>::ENTRIES) * 8; i += threads) {
        int entry = i >> 3;
#pragma unroll
        for (int place = 0; place <= 2 * BOTH; place += 2) {
            u32 c[4];
#pragma unroll
            for (int k = 0; k < 4; k++) c[k] = codebook[k < CODES ? entry >> (place + k * BITS) & (levels - 1) : 0];
            uint4 v;
            v.x = c[0] | (CODES == 1 ? c[0] : c[1]) << 16;
            v.y = CODES == 4 ? c[2] | c[3] << 16 : v.x;
            v.z = v.x, v.w = v.y;
            *(uint4*)(table + entry * STRIDE + place * 64 + (i & 7) * 16) = v;
        }
    }
}

// The line of the index of N bits at bit FIRST of a stream.
template <int FIRST, int N> DEVICE u32 bit_line(const u32* words, u32 lane) {
    constexpr int Q = FIRST / 32, R = FIRST % 32;
    u32 v;
    if constexpr (R + N > 32) v = __funnelshift_r(words[Q], words[Q + 1], R - 7);
    else if constexpr (R >= 7) v = words[Q] >> (R - 7);
    else v = words[Q] << (7 - R);
    return (v & (((1u << N) - 1) << 7)) | lane;
}
// The line of the index in byte K of a word.
template <int K> DEVICE u32 byte_line(u32 word, u32 lane) {
    return WIDE_TABLES ? __byte_perm(word, lane, 0x7604 | K << 4) : bit_line<8 * K, 8>(&word, lane);
}
DEVICE u32 look(const u8* table, u32 line) { return *(const u32*)(table + line); }
DEVICE uint2 look2(const u8* table, u32 line) { return *(const uint2*)(table + line); }
// The six-bit field at bit FIRST.
template <bool BOTH, int FIRST> DEVICE u32 look_six(const u8* table, const u32* words, u32 lane) {
    if constexpr (BOTH) {
        constexpr int SHIFT = FIRST & 4, AT = FIRST - SHIFT, Q = AT / 32;
        const u32 v = SHIFT ? __funnelshift_r(words[Q], words[Q + 1], SHIFT) : words[Q];
        return look(table + (AT & 2) * 64, byte_line<AT % 32 / 8>(v, lane));
    } else {
        return look(table, bit_line<FIRST, 6>(words, lane));
    }
}
// Code I of a row, one look-up.
template <int BITS, bool BOTH, int I> DEVICE u32 look_code(const u8* table, const u32* words, u32 lane) {
    if constexpr (BITS == 8) return look(table, byte_line<I % 4>(words[I / 4], lane));
    else if constexpr (BITS == 6) return look_six<BOTH, I * 6>(table, words, lane);
    else return look(table, bit_line<I * BITS, BITS>(words, lane));
}

// Codes I to I + 3 of a row: two pairs of neighbours.
template <int BITS, bool BOTH, int I> DEVICE void decode_row(const u32* w, const u8* table, u32 lane, u32& x, u32& y) {
    if constexpr (BITS == 16) {
        x = w[I / 2], y = w[I / 2 + 1];
    } else if constexpr (BITS == 4) {
        x = look(table, byte_line<I / 2 % 4>(w[I / 8], lane));
        y = look(table, byte_line<I / 2 % 4 + 1>(w[I / 8], lane));
    } else if constexpr (BITS == 3) {
        x = look_six<BOTH, I * 3>(table, w, lane);
        y = look_six<BOTH, I * 3 + 6>(table, w, lane);
    } else {
        u32 a = look_code<BITS, BOTH, I>(table, w, lane), b = look_code<BITS, BOTH, I + 1>(table, w, lane);
        u32 c = look_code<BITS, BOTH, I + 2>(table, w, lane), d = look_code<BITS, BOTH, I + 3>(table, w, lane);
        x = __byte_perm(a, b, 0x5410), y = __byte_perm(c, d, 0x5410);
    }
}

// Codes I to I + 3 of two rows as a key's fragment: (row a, row b) of the first pair, (row a, row b) of the second.
template <int BITS, bool BOTH, int I> DEVICE void decode_keys(const u32* a, const u32* b, const u8* table, u32 lane, u32 (&x)[4]) {
    if constexpr (BITS == 2) {
        // The rows' pairs merged, so that what a look-up gives lies in neighbouring registers of the fragment.
        constexpr u32 M = 0x0f0f0f0f;
        const u32 p = a[I / 16], q = b[I / 16];
        const uint2 first = look2(table, byte_line<I / 4 % 4>(merge<M>(p, q << 4), lane));
        const uint2 second = look2(table, byte_line<I / 4 % 4>(merge<M>(p >> 4, q), lane));
        x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
    } else {
        decode_row<BITS, BOTH, I>(a, table, lane, x[0], x[2]);
        decode_row<BITS, BOTH, I>(b, table, lane, x[1], x[3]);
    }
}

// Word Q of two rows of 3-bit codes, merged: six-bit fields of the rows' even codes and of their odd codes. The fields drift by two
// bits from word to word.
template <int Q> DEVICE void merge3(const u32* a, const u32* b, u32& even, u32& odd) {
    constexpr u32 M = Q % 3 == 0 ? 0xc71c71c7 : Q % 3 == 1 ? 0x71c71c71 : 0x1c71c71c;
    even = merge<M>(a[Q], Q ? __funnelshift_l(b[Q - (Q > 0)], b[Q], 3) : b[Q] << 3);
    odd = merge<M>(__funnelshift_r(a[Q], a[Q + 1], 3), b[Q]);
}

template <int BITS, bool BOTH, int I> DEVICE void decode_rows2(const u32* a, const u32* b, const u8* table, u32 lane, u32& x, u32& y) {
    if constexpr (BITS == 16) {
        x = __byte_perm(a[I / 2], b[I / 2], 0x5410);
        y = __byte_perm(a[I / 2], b[I / 2], 0x7632);
    } else if constexpr (BITS == 4) {
        constexpr u32 M = 0x0f0f0f0f;
        u32 p = a[I / 8], q = b[I / 8];
        x = look(table, byte_line<I / 2 % 4>(merge<M>(p, q << 4), lane));
        y = look(table, byte_line<I / 2 % 4>(merge<M>(p >> 4, q), lane));
    } else if constexpr (BITS == 3) {
        // The merged streams of even and of odd codes, as far as this field reaches.
        constexpr int Q = (BOTH ? I * 3 - (I * 3 & 4) : I * 3) / 32, N = I * 3 + 6 > Q * 32 + 32 || (BOTH && I * 3 & 4) ? 2 : 1;
        u32 even[2], odd[2];
        merge3<Q>(a, b, even[0], odd[0]);
        if constexpr (N == 2) merge3<Q + 1>(a, b, even[1], odd[1]);
        x = look_six<BOTH, I * 3 - Q * 32>(table, even, lane);
        y = look_six<BOTH, I * 3 - Q * 32>(table, odd, lane);
    } else {
        u32 c = look_code<BITS, BOTH, I>(table, a, lane), d = look_code<BITS, BOTH, I>(table, b, lane);
        u32 e = look_code<BITS, BOTH, I + 1>(table, a, lane), f = look_code<BITS, BOTH, I + 1>(table, b, lane);
        x = __byte_perm(c, d, 0x5410), y = __byte_perm(e, f, 0x5410);
    }
}

// Codes I to I + 3 of two rows, I even (beyond the last code: unspecified), as a value's fragments: element by element the pair
// (row a, row b). Merging the rows' codes first, so that one index holds both, halves the look-ups. The order of the four is
// that of `fragment_element`: two for each of two fragments, or for the one that is left.
template <int BITS> DEVICE constexpr int fragment_element(int fragment, int fragments, int e) {
    return BITS == 2 && (fragment | 1) < fragments ? fragment / 2 * 4 + fragment % 2 + e * 2 : fragment * 2 + e;
}
template <int BITS, bool BOTH, bool PAIR, int I> DEVICE void decode_rows(const u32* a, const u32* b, const u8* table, u32 lane, u32 (&x)[4]) {
    if constexpr (BITS == 2) {
        static_assert(I % 4 == 0, "a look-up spans four codes");
        constexpr u32 M = 0x33333333;
        const u32 p = a[I / 16], q = b[I / 16];
        const uint2 even = look2(table, byte_line<I / 4 % 4>(merge<M>(p, q << 2), lane));
        const uint2 odd = look2(table, byte_line<I / 4 % 4>(merge<M>(p >> 2, q), lane));
        x[0] = even.x, x[1] = PAIR ? even.y : odd.x, x[2] = odd.x, x[3] = odd.y;
    } else {
        decode_rows2<BITS, BOTH, I>(a, b, table, lane, x[0], x[1]);
        decode_rows2<BITS, BOTH, I + 2>(a, b, table, lane, x[2], x[3]);
    }
}
