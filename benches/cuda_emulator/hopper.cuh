// The emulator's words for what sm_90a has beyond others. Copies and products are done when they are asked for: nothing is late.
#pragma once
#include "ptx.cuh"

// As it lies in shared memory: arrivals of a phase, those that are missing, bytes that are, and the phase's parity.
struct EmuBarrier { int16_t count, missing; int32_t bytes : 31; uint32_t parity : 1; };
static_assert(sizeof(EmuBarrier) == 8, "a barrier is eight bytes");
DEVICE EmuBarrier& emu_barrier(u32 at) { return *(EmuBarrier*)emu_shared(at); }
DEVICE void emu_settle(EmuBarrier& b) {
    emu_block.progress++;
    if (b.missing == 0 && b.bytes == 0) b.missing = b.count, b.parity ^= 1;
}
DEVICE void barrier_init(u32 at, u32 count) { emu_barrier(at) = {(int16_t)count, (int16_t)count, 0, 0}; }
DEVICE void barriers_made() {}
DEVICE void barrier_arrive(u32 at) { emu_barrier(at).missing--, emu_settle(emu_barrier(at)); }
DEVICE void barrier_promise(u32 at, u32 bytes) { emu_barrier(at).bytes += bytes, barrier_arrive(at); }
DEVICE void barrier_wait(u32 at, u32 parity) {
    while (emu_barrier(at).parity == (parity & 1)) emu_yield();
}
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    if (((uintptr_t)from | to | bytes) & 15) { fprintf(stderr, "emu: misaligned bulk copy\n"); abort(); }
    memcpy(emu_shared(to), from, bytes);
    emu_barrier(barrier).bytes -= bytes, emu_settle(emu_barrier(barrier));
}
DEVICE void stores_to_async() {}

DEVICE void named_arrive(int number, int threads) {
    auto& b = emu_block.named[number];
    emu_block.progress++;
    if (++b.arrived == (unsigned)threads) b.arrived = 0, b.generation++;
}
DEVICE void named_wait(int number, int threads) {
    auto& b = emu_block.named[number];
    const unsigned before = b.generation;
    named_arrive(number, threads);
    while (b.generation == before) emu_yield();
}
template <int N> DEVICE void registers_less() {}
template <int N> DEVICE void registers_more() {}

constexpr u32 swizzled(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
DEVICE u64 matrix(u32 at, u32 columns) { return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)(columns >> 4) << 16 | (at & 0x3ffff) >> 4; }
DEVICE void products_begin() {}
DEVICE void products_end() {}
template <int N> DEVICE void products_wait() {}
template <int N> DEVICE void pin(float (&)[N]) {}

// The f16 at a place before the 128-byte swizzle, which moves 16-byte chunks by the number of 128 bytes.
DEVICE float emu_f16(u32 at) { return f32_from_f16(*(const u16*)emu_shared(at ^ (at >> 7 & 7) << 4)); }

// Not cut off as `mma`'s: there are many, and their results are f16 at best.
DEVICE float emu_products(float c, const float (&a)[16], const float (&b)[16]) {
    float sum = 0.f;
    for (int k = 0; k < 16; k++) sum += a[k] * b[k];
    return c + sum;
}

// c[64 x N] += a b^T, by matrices whose rows hold their inner dimension. Each lane finds what it needs in shared memory.
template <int SUMS> DEVICE void multiply_matrices(float (&x)[SUMS], u64 a, u64 b, int keep) {
    const u32 from = (a & 0x3fff) << 4, to = (b & 0x3fff) << 4;
    const int warp = me().warp % 4, g = me().lane / 4, t = me().lane % 4;
    float A[2][16];
    for (int half = 0; half < 2; half++)
        for (int k = 0; k < 16; k++) A[half][k] = emu_f16(from + (warp * 16 + g + half * 8) * 128 + k * 2);
    for (int i = 0; i < SUMS; i++) {
        const int column = i / 4 * 8 + 2 * t + i % 2;
        float B[16];
        for (int k = 0; k < 16; k++) B[k] = emu_f16(to + column * 128 + k * 2);
        x[i] = emu_products(keep ? x[i] : 0.f, A[i / 2 % 2], B);
    }
}
// The same of a warp's own rows in registers and a matrix whose rows are the inner dimension.
template <int N, int SIZE> DEVICE void multiply_rows(float (&x)[SIZE], const u32 (&a)[4], u32 at, u32 columns) {
    struct Words { u32 w[4]; };
    Exchange<Words> e({{a[0], a[1], a[2], a[3]}}, 16);
    const int g = me().lane / 4, t = me().lane % 4;
    float A[2][16];
    for (int s = 0; s < 4; s++) {
        const Words w = e.at(g * 4 + s);
        for (int h = 0; h < 2; h++)
            for (int r = 0; r < 4; r++) A[r % 2][2 * s + h + r / 2 * 8] = f32_from_f16((u16)(w.w[r] >> 16 * h));
    }
    for (int i = 0; i < N / 2; i++) {
        const int column = i / 4 * 8 + 2 * t + i % 2;
        float B[16];
        for (int k = 0; k < 16; k++) B[k] = emu_f16(at + column / 64 * columns + k * 128 + column % 64 * 2);
        x[i] = emu_products(x[i], A[i / 2 % 2], B);
    }
}
