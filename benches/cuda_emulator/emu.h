// CUDA C++ on a CPU: one block at a time, a fiber per thread.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <immintrin.h>

struct Dim3 { unsigned x, y, z; };
struct uint2 { unsigned x, y; } __attribute__((aligned(8)));
struct uint4 { unsigned x, y, z, w; } __attribute__((aligned(16)));
struct int2 { int x, y; } __attribute__((aligned(8)));
struct float2 { float x, y; } __attribute__((aligned(8)));
struct float4 { float x, y, z, w; } __attribute__((aligned(16)));
struct double2 { double x, y; } __attribute__((aligned(16)));
static inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
static inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
static inline float2 make_float2(float a, float b) { return {a, b}; }
static inline float4 make_float4(float a, float b, float c, float d) { return {a, b, c, d}; }
static inline double2 make_double2(double a, double b) { return {a, b}; }

struct Fiber { void* sp; int warp, lane, done; Dim3 tid; unsigned phase; };
struct Warp { unsigned arrived, generation, live; int op; struct { uint64_t w[8]; } slot[2][32]; };
struct EmuBlock { unsigned arrived, generation, live; unsigned long progress; Warp warps[32]; struct { unsigned arrived, generation; } named[16]; Fiber fibers[1024]; int n, current; void* main_sp; void (*kernel)(const void*); const void* params; Dim3 block_idx, grid_dim, block_dim; };
extern EmuBlock emu_block;
extern "C" void emu_switch(void** from, void* to);
static inline Fiber& me() { return emu_block.fibers[emu_block.current]; }
static void emu_yield() {
    EmuBlock& b = emu_block;
    int from = b.current, to = from;
    do to = to + 1 == b.n ? 0 : to + 1; while (b.fibers[to].done && to != from);
    if (to == 0 || to <= from) { static unsigned long last, idle; if (b.progress == last) { if (++idle > 4) { fprintf(stderr, "emu: deadlock at block %u\n", b.block_idx.x); abort(); } } else last = b.progress, idle = 0; }
    if (to == from) return;
    b.current = to;
    emu_switch(&b.fibers[from].sp, b.fibers[to].sp);
}
static void warp_barrier(int op) {
    EmuBlock& b = emu_block; Fiber& f = me(); Warp& w = b.warps[f.warp];
    if (w.arrived && w.op != op) { fprintf(stderr, "emu: lanes of a warp are in different operations: %d %d\n", w.op, op); abort(); }
    w.op = op;
    unsigned g = w.generation;
    b.progress++;
    if (++w.arrived >= w.live) { w.arrived = 0, w.generation++; return; }
    while (w.generation == g) emu_yield();
}
static inline void __syncthreads() {
    EmuBlock& b = emu_block;
    unsigned g = b.generation;
    b.progress++;
    if (++b.arrived >= b.live) { b.arrived = 0, b.generation++; return; }
    while (b.generation == g) emu_yield();
}
static inline void __syncwarp(unsigned = ~0u) { warp_barrier(1); }
// Deposits a value; the others' are at `all(lane)` until the next exchange but one.
template <typename T> struct Exchange {
    const unsigned phase; Warp& w;
    Exchange(const T& x, int op) : phase(me().phase ^= 1), w(emu_block.warps[me().warp]) {
        static_assert(sizeof(T) <= 64, "slot");
        memcpy(&w.slot[phase][me().lane], &x, sizeof(T));
        warp_barrier(op);
    }
    T at(int lane) const { T x; memcpy(&x, &w.slot[phase][lane & 31], sizeof(T)); return x; }
};
template <typename T> static inline T __shfl_xor_sync(unsigned, T x, int k) { return Exchange<T>(x, 2).at(me().lane ^ k); }
template <typename T> static inline T __shfl_sync(unsigned, T x, int k) { return Exchange<T>(x, 3).at(k); }
template <typename T> static inline T __shfl_up_sync(unsigned, T x, int k) { Exchange<T> e(x, 12); return me().lane >= k ? e.at(me().lane - k) : x; }
template <typename T> static inline T __shfl_down_sync(unsigned, T x, int k) { Exchange<T> e(x, 13); return me().lane + k < 32 ? e.at(me().lane + k) : x; }
static inline int __any_sync(unsigned, bool p) { Exchange<int> e(p, 4); for (int i = 0; i < 32; i++) if (e.at(i)) return 1; return 0; }
static inline int __all_sync(unsigned, bool p) { Exchange<int> e(p, 14); for (int i = 0; i < 32; i++) if (!e.at(i)) return 0; return 1; }
static inline unsigned __ballot_sync(unsigned, bool p) { Exchange<int> e(p, 5); unsigned r = 0; for (int i = 0; i < 32; i++) r |= (unsigned)!!e.at(i) << i; return r; }

template <typename A, typename B> static inline B emu_bits(A a) { static_assert(sizeof(A) == sizeof(B), ""); B b; memcpy(&b, &a, sizeof b); return b; }
static inline float __uint_as_float(unsigned x) { return emu_bits<unsigned, float>(x); }
static inline float __int_as_float(int x) { return emu_bits<int, float>(x); }
static inline unsigned __float_as_uint(float x) { return emu_bits<float, unsigned>(x); }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __fdividef(float a, float b) { return fabsf(b) > 0x1p126f && !std::isinf(a) ? 0.f * (b != b ? b : 1.f) : a / b; }
static inline int __float2int_rn(float x) { return x != x ? 0 : (int)lrintf(x); }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (uint64_t)a * b >> 32; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { return ((uint64_t)hi << 32 | lo) >> (s & 31); }
static inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { return (((uint64_t)hi << 32 | lo) << (s & 31)) >> 32; }
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
    uint64_t v = (uint64_t)b << 32 | a; unsigned r = 0;
    for (int i = 0; i < 4; i++) { unsigned n = s >> 4 * i & 15; unsigned byte = v >> (n & 7) * 8 & 255; if (n & 8) byte = byte & 128 ? 255 : 0; r |= byte << 8 * i; }
    return r;
}
template <typename T> static inline T __ldg(const T* p) { return *p; }
template <typename T> static inline T __ldcg(const T* p) { return *p; }
template <typename T> static inline T __ldcs(const T* p) { return *p; }
template <typename T> static inline void __stcg(T* p, T x) { *p = x; }
template <typename T> static inline void __stcs(T* p, T x) { *p = x; }
static inline void __threadfence() {}
static inline unsigned atomicAdd(unsigned* p, unsigned x) { unsigned b = *p; *p += x; return b; }
static inline unsigned atomicOr(unsigned* p, unsigned x) { unsigned b = *p; *p |= x; return b; }
static inline unsigned long long atomicMin(unsigned long long* p, unsigned long long x) { unsigned long long b = *p; if (x < b) *p = x; return b; }
static inline unsigned atomicMin(unsigned* p, unsigned x) { unsigned b = *p; if (x < b) *p = x; return b; }
static inline unsigned atomicMax(unsigned* p, unsigned x) { unsigned b = *p; if (x > b) *p = x; return b; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
static inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
static inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
static inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
static inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
static inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
static inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
#define threadIdx (me().tid)
#define blockIdx (emu_block.block_idx)
#define gridDim (emu_block.grid_dim)
#define blockDim (emu_block.block_dim)
#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline
#define __noinline__
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
extern "C" unsigned char emu_dynamic[];
