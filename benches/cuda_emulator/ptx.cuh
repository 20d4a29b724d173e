// The emulator's words for PTX.
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
#define unlikely(x) __builtin_expect(!!(x), 0)
DEVICE float f32_from_f16(u16 h) { return _cvtsh_ss(h); }
DEVICE u16 f16_from_f32(float f) { return _cvtss_sh(f, 0); }
DEVICE u32 f16x2_from_f32(float lo, float hi) { return f16_from_f32(lo) | (u32)f16_from_f32(hi) << 16; }
DEVICE u32 f16x2_add(u32 a, u32 b) {
    return f16_from_f32(f32_from_f16(a) + f32_from_f16(b)) | (u32)f16_from_f32(f32_from_f16(a >> 16) + f32_from_f16(b >> 16)) << 16;
}
DEVICE float f32_from_bf16(u16 h) { return __uint_as_float((u32)h << 16); }
DEVICE u16 bf16_from_f32(float f) {
    u32 x = __float_as_uint(f);
    if ((x & 0x7fffffff) > 0x7f800000) return 0x7fff;
    return (x + 0x7fff + (x >> 16 & 1)) >> 16;
}
DEVICE float exp2_approx(float x) { float y = exp2f(x); return y < 0x1p-126f ? 0.f : y; }
DEVICE float log2_approx(float x) { return log2f(x); }
template <typename T> DEVICE T* opaque(T* p) { return p; }
DEVICE u32 opaque(u32 x) { return x; }
template <u32 MASK> DEVICE u32 merge(u32 a, u32 b) { return (a & MASK) | (b & ~MASK); }
DEVICE u32 select_bytes(u32 a, u32 b, u32 select) { return __byte_perm(a, b, select); }
template <int HALF> DEVICE u32 dot_bytes(u32 a, u32 b, u32 c) {
    if (HALF) b >>= 16;
    return c + (a & 0xffff) * (b & 255) + (a >> 16) * (b >> 8 & 255);
}
DEVICE u32 dot_bytes4(u32 a, u32 b, u32 c) {
    for (int i = 0; i < 4; i++) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
    return c;
}
DEVICE u32 upper_half(u32 x) { return x >> 16 | x & 0xffff0000; }
DEVICE float fma_up(float a, float b, float c) {
    double exact = (double)a * b + c;  // near enough
    float v = (float)exact;
    return v < exact ? nextafterf(v, INFINITY) : v;
}
DEVICE float rsqrt_approx(float x) { return 1.f / sqrtf(x); }
DEVICE u32 shared_address(const void* p) { return (u32)((uintptr_t)p - (uintptr_t)emu_dynamic); }
DEVICE u8* emu_shared(u32 at) { return emu_dynamic + (int)at; }
template <int OFFSET> DEVICE u32 load_shared(u32 at) { return *(const u32*)(emu_shared(at + OFFSET)); }
DEVICE void load_volatile4(u32& a, u32& b, u32& c, u32& d, const uint4* p) { a = p->x, b = p->y, c = p->z, d = p->w; }
DEVICE void copy_async16(u32 to, const void* from) {
    if (((uintptr_t)from | to) & 15) { fprintf(stderr, "emu: misaligned copy\n"); abort(); }
    memcpy(emu_shared(to), from, 16);
}
template <int TO, int FROM> DEVICE void copy_async16_at(u32 to, const void* from) { copy_async16(to + TO, (const u8*)from + FROM); }
DEVICE void copy_commit() {}
template <int N> DEVICE void copy_wait() {}
DEVICE u32 atomic_add_acq_rel(u32* p, u32 x) { return atomicAdd(p, x); }
// A sum of products as tensor cores do it: addends are cut off 24 bits below the first of the largest, and so is the sum.
static float emu_sum(float c, const float (&a)[16], const float (&b)[16]) {
    double addend[17] = {c}, largest = fabs(addend[0]), sum = 0;
    for (int k = 0; k < 16; k++) addend[k + 1] = (double)a[k] * b[k], largest = fmax(largest, fabs(addend[k + 1]));
    const double unit = largest > 0 && largest < INFINITY ? ldexp(1, ilogb(largest) - 24) : 0;
    for (double x : addend) sum += unit > 0 ? trunc(x / unit) * unit : x;
    const float rounded = (float)sum;
    return fabs((double)rounded) > fabs(sum) && fabs(sum) < INFINITY ? nextafterf(rounded, 0.f) : rounded;
}
struct EmuAB { u32 a[4], b[2]; };
template <bool BF16> static void emu_mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    Exchange<EmuAB> e({{a0, a1, a2, a3}, {b0, b1}}, 6);
    const int g = me().lane / 4, t = me().lane % 4;
    auto el = [](u32 w, int half) { u16 h = half ? w >> 16 : w; return BF16 ? f32_from_bf16(h) : f32_from_f16(h); };
    float A[2][16], B[2][16];
    for (int s = 0; s < 4; s++) {
        EmuAB x = e.at(g * 4 + s), y = e.at((2 * t) * 4 + s), z = e.at((2 * t + 1) * 4 + s);
        for (int h = 0; h < 2; h++) {
            A[0][2 * s + h] = el(x.a[0], h), A[1][2 * s + h] = el(x.a[1], h), A[0][2 * s + 8 + h] = el(x.a[2], h), A[1][2 * s + 8 + h] = el(x.a[3], h);
            B[0][2 * s + h] = el(y.b[0], h), B[0][2 * s + 8 + h] = el(y.b[1], h), B[1][2 * s + h] = el(z.b[0], h), B[1][2 * s + 8 + h] = el(z.b[1], h);
        }
    }
    for (int r = 0; r < 2; r++)
        for (int n = 0; n < 2; n++) {
            c[2 * r + n] = emu_sum(c[2 * r + n], A[r], B[n]);
        }
}
DEVICE void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { emu_mma<false>(c, a0, a1, a2, a3, b0, b1); }
DEVICE void mma_bf16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) { emu_mma<true>(c, a0, a1, a2, a3, b0, b1); }
DEVICE void mma_s8(int (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Exchange<EmuAB> e({{a[0], a[1], a[2], a[3]}, {b0, b1}}, 7);
    const int g = me().lane / 4, t = me().lane % 4;
    int A[2][32], B[2][32];
    for (int s = 0; s < 4; s++) {
        EmuAB x = e.at(g * 4 + s), y = e.at((2 * t) * 4 + s), z = e.at((2 * t + 1) * 4 + s);
        for (int h = 0; h < 4; h++) {
            auto el = [&](u32 w) { return (int)(signed char)(w >> 8 * h); };
            A[0][4 * s + h] = el(x.a[0]), A[1][4 * s + h] = el(x.a[1]), A[0][4 * s + 16 + h] = el(x.a[2]), A[1][4 * s + 16 + h] = el(x.a[3]);
            B[0][4 * s + h] = el(y.b[0]), B[0][4 * s + 16 + h] = el(y.b[1]), B[1][4 * s + h] = el(z.b[0]), B[1][4 * s + 16 + h] = el(z.b[1]);
        }
    }
    for (int r = 0; r < 2; r++)
        for (int n = 0; n < 2; n++)
            for (int k = 0; k < 32; k++) c[2 * r + n] += A[r][k] * B[n][k];
}
DEVICE u32 transpose8(u32 a) {
    Exchange<u32> e(a, 8);
    const int i = me().lane / 4, j = me().lane % 4;  // wants column i, rows 2 j and 2 j + 1
    auto el = [&](int row, int col) { return e.at(row * 4 + col / 2) >> 16 * (col & 1) & 0xffff; };
    return el(2 * j, i) | el(2 * j + 1, i) << 16;
}
template <int N, bool TRANS> static void emu_ldmatrix(u32* out, u32 from, int op) {
    Exchange<u32> e(from, op);
    const int i = me().lane / 4, j = me().lane % 4;
    for (int m = 0; m < N; m++) {
        auto el = [&](int row, int col) { const u8* p = emu_shared(e.at(8 * m + row)); if ((uintptr_t)p & 15) { fprintf(stderr, "emu: misaligned matrix\n"); abort(); } return (u32)((const u16*)p)[col]; };
        out[m] = TRANS ? el(2 * j, i) | el(2 * j + 1, i) << 16 : el(i, 2 * j) | el(i, 2 * j + 1) << 16;
    }
}
DEVICE void load_matrices(u32& a, u32& b, u32& c, u32& d, u32 from) { u32 o[4]; emu_ldmatrix<4, false>(o, from, 9); a = o[0], b = o[1], c = o[2], d = o[3]; }
DEVICE void load_matrices(u32& a, u32& b, u32 from) { u32 o[2]; emu_ldmatrix<2, false>(o, from, 10); a = o[0], b = o[1]; }
DEVICE void load_transposed(u32& a, u32& b, u32& c, u32& d, u32 from) { u32 o[4]; emu_ldmatrix<4, true>(o, from, 11); a = o[0], b = o[1], c = o[2], d = o[3]; }
DEVICE void load_transposed(u32& a, u32& b, u32 from) { u32 o[2]; emu_ldmatrix<2, true>(o, from, 15); a = o[0], b = o[1]; }
DEVICE void begin() {}
