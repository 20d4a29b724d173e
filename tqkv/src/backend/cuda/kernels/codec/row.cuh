// How a row is stored: its bits, packing and scaling, as docs/format.md has them.
#pragma once
#ifndef STRIDED
#define STRIDED 0
#endif
#include "codec/kinds.cuh"  // PACK_* and SCALE_*: of the host's codec.rs
#include "transform.cuh"

template <int D_, int BITS_, int PACKING_, int SCALING_> struct Row {
    static constexpr int D = D_, BITS = BITS_, PACKING = PACKING_, SCALING = SCALING_;
    static constexpr bool CODED = PACKING != PACK_F16 && PACKING != PACK_F32;
    static constexpr int STORED = PACKING == PACK_BYTE ? 8 : BITS;  // bits that an element takes
    static constexpr int BYTES = D * STORED / 8;
    static constexpr int LEVELS = CODED ? 1 << BITS : 0;
    static constexpr int SCALES = SCALING == SCALE_NONE ? 0 : SCALING == SCALE_BLOCK_RMS ? D / 256 : 1;
    static constexpr int SCALE_BYTES = SCALING == SCALE_NONE ? 0 : SCALING == SCALE_CORRECTED ? 2 : 4;
    static constexpr int SPANS = SCALES ? SCALES : 1, SPAN = D / SPANS;  // elements under one scale
};

template <typename A, typename B> struct Same {
    static constexpr bool value = false;
};
template <typename A> struct Same<A, A> {
    static constexpr bool value = true;
};

// Where rows of a pool are, with -DSTRIDED=1: bytes from one page, KV head and position to the next, of codes and of scales. Else they lie one behind
// the other.
struct Strides {
    u64 page, head, row;
};
struct RowStrides {
    Strides codes, scales;
    u32 kv_heads, page_size;
    static DEVICE u64 at(const Strides& s, u32 page, u32 head, u32 slot) { return page * s.page + head * s.head + slot * s.row; }
    DEVICE u64 at(const Strides& s, u32 row) const { return at(s, row / page_size / kv_heads, row / page_size % kv_heads, row % page_size); }
};
// Bytes before the codes, and before the scales, of row (page * kv_heads + head) * page_size + slot.
template <typename R> DEVICE u64 codes_at(const RowStrides& p, u32 row) { return STRIDED ? p.at(p.codes, row) : (u64)row * R::BYTES; }
template <typename R> DEVICE u64 scales_at(const RowStrides& p, u32 row) {
    return STRIDED ? p.at(p.scales, row) : (u64)row * (R::SCALES * R::SCALE_BYTES);
}

// One side of the cache, keys or values, as kernels get it.
struct Side {
    const u8* codes;      // [pages, kv_heads, page_size, BYTES]
    const u8* scales;     // [pages, kv_heads, page_size, SCALES]
    const float* levels;  // [LEVELS], sorted
    Turn turn;
    float unit;           // what a stored norm is multiplied by, or a block's scale divided by
    u32 pad;
    const float* channels;  // of keys in the original domain, [3, kv_heads, head_dim]: shift, 1 / scale, scale; or null
    RowStrides strides;
};

// A stored scale's bits, and the number that they are; 1 if there is none.
template <typename R> DEVICE u32 scale_bits(const u8* scales, u64 i) {
    if (R::SCALING == SCALE_NONE) return 0;
    return R::SCALE_BYTES == 2 ? ((const u16*)scales)[i] : ((const u32*)scales)[i];
}
template <typename R> DEVICE float scale_of(u32 bits) {
    if (R::SCALING == SCALE_NONE) return 1.f;
    return R::SCALE_BYTES == 2 ? f32_from_f16((u16)bits) : __uint_as_float(bits);
}
template <typename R> DEVICE float load_scale(const u8* scales, u64 i) { return scale_of<R>(scale_bits<R>(scales, i)); }
// What levels are multiplied by.
template <typename R> DEVICE float factor_of(float scale, float unit) {
    return R::SCALING == SCALE_NORM ? __fmul_rn(scale, unit) : R::SCALING == SCALE_BLOCK_RMS ? __fdiv_rn(scale, unit) : scale;
}
template <typename R> DEVICE float load_factor(const u8* scales, u64 i, float unit) { return factor_of<R>(load_scale<R>(scales, i), unit); }

// Where positions are: problem::SpanInfo, and page tables [sequences, width].
struct Span {
    u32 first, len, start, new_;
};
// A number that many are divided by: its reciprocal is made once.
struct Divisor {
    u32 value, reciprocal;
    DEVICE Divisor(u32 value) : value(value), reciprocal(~0u / value) {}
    DEVICE u32 divide(u32 n, u32& rest) const {
        u32 quotient = __umulhi(n, reciprocal);  // or one less
        rest = n - quotient * value;
        if (rest >= value) quotient++, rest -= value;
        return quotient;
    }
};
DEVICE u32 locate(const u32* table, u32 position, Divisor page_size, u32 width, u32 kv_heads, u32 head) {
    const u32 capacity = page_size.value * width;
    if (position >= capacity) position %= capacity;
    u32 slot;
    const u32 page = page_size.divide(position, slot);
    return (table[page] * kv_heads + head) * page_size.value + slot;
}
