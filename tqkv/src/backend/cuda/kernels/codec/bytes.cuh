// Little-endian integers of any number of bytes.
#pragma once
#include "ptx.cuh"

// N bytes, little-endian, from an address that is a multiple of ALIGN.
template <int N, int ALIGN> DEVICE u64 load_bytes(const u8* p) {
    if constexpr (N == 8 && ALIGN >= 8) return *(const u64*)p;
    u64 v = 0;
    constexpr int STEP = ALIGN >= 4 && N % 4 == 0 ? 4 : ALIGN >= 2 && N % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int k = 0; k < N; k += STEP) {
        const u32 part = STEP == 4 ? *(const u32*)(p + k) : STEP == 2 ? *(const u16*)(p + k) : p[k];
        v |= (u64)part << (8 * k);
    }
    return v;
}
template <int N, int ALIGN> DEVICE void store_bytes(u8* p, u64 v) {
    if constexpr (N == 8 && ALIGN >= 8) {
        *(u64*)p = v;
        return;
    }
    constexpr int STEP = ALIGN >= 4 && N % 4 == 0 ? 4 : ALIGN >= 2 && N % 2 == 0 ? 2 : 1;
#pragma unroll
    for (int k = 0; k < N; k += STEP) {
        const u32 part = (u32)(v >> (8 * k));
        if (STEP == 4) *(u32*)(p + k) = part;
        else if (STEP == 2) *(u16*)(p + k) = (u16)part;
        else p[k] = (u8)part;
    }
}
