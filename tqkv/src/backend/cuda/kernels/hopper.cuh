// What sm_90a has beyond others: barriers in shared memory, bulk copies that complete on them, and products by a warpgroup (four
// consecutive warps) of matrices in shared memory. PTX ISA: mbarrier, cp.async.bulk, wgmma.
#pragma once
#include "ptx.cuh"

// A barrier in shared memory: a phase ends when as many threads as `count` have arrived and all bytes that were promised are there.
DEVICE void barrier_init(u32 at, u32 count) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory"); }
// Barriers that were initialised are seen by bulk copies too.
DEVICE void barriers_made() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(u32 at) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory"); }
DEVICE void barrier_promise(u32 at, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity.
DEVICE void barrier_wait(u32 at, u32 parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(at), "r"(parity) : "memory");
}
// From global to shared memory: addresses and `bytes` are multiples of 16.
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}
// Ordinary stores to shared memory before this are seen by products and bulk copies after it.
DEVICE void stores_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Barriers among some of a block's threads, by number (0 is __syncthreads).
DEVICE void named_wait(int number, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory"); }
DEVICE void named_arrive(int number, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory"); }

template <int N> DEVICE void registers_less() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_more() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// A matrix of f16 in shared memory, in columns of 64 elements: each [rows, 64], 128 bytes a row, of which 16-byte chunk c lies at chunk c ^ (row & 7).
// Columns start at multiples of 1024 bytes.
constexpr u32 swizzled(u32 row, u32 chunk) { return row * 128 + ((chunk ^ (row & 7)) << 4); }
// Its descriptor: whole groups of eight rows are 1024 bytes apart. `columns`: bytes from one column of 64 elements to the next, which
// products that take rows as their inner dimension need.
DEVICE u64 matrix(u32 at, u32 columns) { return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)(columns >> 4) << 16 | (at & 0x3ffff) >> 4; }

// Products are issued, and wait for nothing but each other: registers and memory that they use belong to them until `products_wait`.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Until at most N groups are unfinished.
template <int N> DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
// Keeps the compiler from moving what it does with registers past products.
template <int N> DEVICE void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(x[i])::"memory");
}

#define REGISTERS8(a, b, c, d, e, f, g, h) "%" #a ",%" #b ",%" #c ",%" #d ",%" #e ",%" #f ",%" #g ",%" #h
#define REGISTERS_8 REGISTERS8(0, 1, 2, 3, 4, 5, 6, 7)
#define REGISTERS_16 REGISTERS_8 "," REGISTERS8(8, 9, 10, 11, 12, 13, 14, 15)
#define REGISTERS_32 REGISTERS_16 "," REGISTERS8(16, 17, 18, 19, 20, 21, 22, 23) "," REGISTERS8(24, 25, 26, 27, 28, 29, 30, 31)
#define REGISTERS_64                                                                                                       \
    REGISTERS_32 "," REGISTERS8(32, 33, 34, 35, 36, 37, 38, 39) "," REGISTERS8(40, 41, 42, 43, 44, 45, 46, 47) "," REGISTERS8( \
        48, 49, 50, 51, 52, 53, 54, 55) "," REGISTERS8(56, 57, 58, 59, 60, 61, 62, 63)
#define SUMS_8(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3]), "+f"(x[i + 4]), "+f"(x[i + 5]), "+f"(x[i + 6]), "+f"(x[i + 7])
#define SUMS_16(x, i) SUMS_8(x, i), SUMS_8(x, i + 8)
#define SUMS_32(x, i) SUMS_16(x, i), SUMS_16(x, i + 16)
#define SUMS_64(x, i) SUMS_32(x, i), SUMS_32(x, i + 32)

// c[64 x N] += a[64 x 16] b[16 x N], f16 in, f32 out; `c` has N / 2 registers a lane: of fragment i (eight columns) rows g and g + 8 of the warp's 16,
// columns 2 t and 2 t + 1. `keep` 0: c is not read. By matrices both of whose inner dimension are elements of a row, and by a from
// registers (a warp's 16 x 16, as `mma` has it) with b whose inner dimension are rows.
#define PRODUCTS(N, SUMS, A, B, C, D, E, F)                                                                                            \
    DEVICE void multiply_matrices(float (&x)[SUMS], u64 a, u64 b, int keep) {                                                         \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" #C ", 0;\n"                                                                    \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" REGISTERS_##SUMS "}, %" #A ", %" #B ", p, 1, 1, 0, 0;}" \
                     : SUMS_##SUMS(x, 0)                                                                                              \
                     : "l"(a), "l"(b), "r"(keep));                                                                                    \
    }                                                                                                                                 \
    template <int SIZE> DEVICE void multiply_rows_##N(float (&x)[SIZE], int i, const u32 (&a)[4], u64 b) {                            \
        asm volatile("{.reg .pred p; setp.eq.u32 p, 0, 0;\n"                                                                          \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" REGISTERS_##SUMS "}, {%" #A ", %" #B ", %" #C ", %" #D \
                     "}, %" #E ", p, 1, 1, 1;}"                                                                                       \
                     : SUMS_##SUMS(x, i)                                                                                              \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                           \
    }
PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69)
PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37)
PRODUCTS(32, 16, 16, 17, 18, 19, 20, 21)
PRODUCTS(16, 8, 8, 9, 10, 11, 12, 13)
#undef PRODUCTS

// The same for any N that 16 divides: from column FROM on, in the widest products that there are.
template <int N, int FROM = 0, int SIZE> DEVICE void multiply_rows(float (&x)[SIZE], const u32 (&a)[4], u32 at, u32 columns) {
    constexpr int LEFT = N - FROM;
    if constexpr (LEFT > 0) {
        constexpr int STEP = LEFT >= 128 ? 128 : LEFT >= 64 ? 64 : LEFT >= 32 ? 32 : 16;
        const u64 b = matrix(at + FROM / 64 * columns + FROM % 64 * 2, columns);
        if constexpr (STEP == 128) multiply_rows_128(x, FROM / 2, a, b);
        else if constexpr (STEP == 64) multiply_rows_64(x, FROM / 2, a, b);
        else if constexpr (STEP == 32) multiply_rows_32(x, FROM / 2, a, b);
        else multiply_rows_16(x, FROM / 2, a, b);
        multiply_rows<N, FROM + STEP>(x, a, at, columns);
    }
}
