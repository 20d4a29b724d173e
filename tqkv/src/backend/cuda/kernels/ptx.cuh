// Fixed-width types and the PTX that C++ has no word for. No header of the CUDA toolkit is included, so that NVRTC alone is enough.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DEVICE __device__ __forceinline__

#define unlikely(x) __builtin_expect(!!(x), 0)

DEVICE float f32_from_f16(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
DEVICE u16 f16_from_f32(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
DEVICE u32 f16x2_from_f32(float lo, float hi) {
    u32 v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(hi), "f"(lo));
    return v;
}
DEVICE u32 f16x2_add(u32 a, u32 b) {
    u32 v;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
DEVICE float f32_from_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
DEVICE u16 bf16_from_f32(float f) {
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float log2_approx(float x) {
    float y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Rounded up.
DEVICE float fma_up(float a, float b, float c) {
    float v;
    asm("fma.rp.f32 %0, %1, %2, %3;" : "=f"(v) : "f"(a), "f"(b), "f"(c));
    return v;
}
DEVICE float rsqrt_approx(float x) {
    float v;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(v) : "f"(x));
    return v;
}

// A value whose origin the compiler shall forget, so that it is kept in a register instead of being computed anew.
template <typename T> DEVICE T* opaque(T* p) {
    asm("" : "+l"(p));
    return p;
}
DEVICE u32 opaque(u32 x) {
    asm("" : "+r"(x));
    return x;
}

// The bits of a where the mask is set, of b elsewhere, in one instruction.
template <u32 MASK> DEVICE u32 merge(u32 a, u32 b) {
    u32 v;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(v) : "r"(a), "r"(b), "n"(MASK));
    return v;
}

// The bytes of (a, b) that the nibbles of `select` name; their top bits must be 0. __byte_perm would clear them once more.
DEVICE u32 select_bytes(u32 a, u32 b, u32 select) {
    u32 v;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(select));
    return v;
}

// The upper half of a word, twice, as a product of f16 with 1: the ALU is busier. Neither half may be a NaN.
DEVICE u32 upper_half(u32 x) {
    u32 v;
    asm("{.reg .b16 l, h; .reg .b32 t; mov.b32 {l, h}, %1; mov.b32 t, {h, h}; fma.rn.f16x2 %0, t, %2, %3;}"
        : "=r"(v) : "r"(x), "r"(0x3c003c00), "r"(0x80008000));
    return v;
}

// c plus the products of a's two halves with the lower (HALF = 0) or upper two bytes of b.
template <int HALF> DEVICE u32 dot_bytes(u32 a, u32 b, u32 c) {
    u32 v;
    if constexpr (HALF) asm("dp2a.hi.u32.u32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    else asm("dp2a.lo.u32.u32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}
// c plus the products of the bytes of a and b.
DEVICE u32 dot_bytes4(u32 a, u32 b, u32 c) {
    u32 v;
    asm("dp4a.u32.u32 %0, %1, %2, %3;" : "=r"(v) : "r"(a), "r"(b), "r"(c));
    return v;
}

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

template <int OFFSET> DEVICE u32 load_shared(u32 at) {
    u32 v;
    asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(at), "n"(OFFSET));
    return v;
}
// Four words at once, that are read and not known: the compiler would load constants anew for every use.
DEVICE void load_volatile4(u32& a, u32& b, u32& c, u32& d, const uint4* from) {
    asm volatile("ld.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(from));
}

// Asynchronous copies from global to shared memory.
DEVICE void copy_async16(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
template <int TO, int FROM> DEVICE void copy_async16_at(u32 to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0 + %2], [%1 + %3], 16;" ::"r"(to), "l"(from), "n"(TO), "n"(FROM) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

DEVICE u32 atomic_add_acq_rel(u32* p, u32 x) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(before) : "l"(p), "r"(x) : "memory");
    return before;
}

// Tensor cores: c[16 x 8] += a[16 x 16] b[16 x 8], f16 in, f32 out.
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
DEVICE void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same of signed bytes: c[16 x 8] += a[16 x 32] b[32 x 8], exact.
DEVICE void mma_s8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// Transposes an 8 x 8 matrix of 16-bit elements spread over the warp.
DEVICE u32 transpose8(u32 a) {
    u32 d;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}
// Reads 8 x 8 matrices of 16-bit elements from shared memory: lane 4 i + j gets elements 2 j and 2 j + 1 of row i; transposed, of
// column i. Lane 8 m + i gives the address of row i of matrix m.
DEVICE void load_matrices(u32& a, u32& b, u32& c, u32& d, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(from));
}
DEVICE void load_matrices(u32& a, u32& b, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(from));
}
DEVICE void load_transposed(u32& a, u32& b, u32& c, u32& d, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(from));
}
DEVICE void load_transposed(u32& a, u32& b, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(from));
}
// What every kernel begins with: it may be started while the blocks of the one before end (`Stream::launch`), and waits here until all of
// them have.
DEVICE void begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
