// Rows by groups of lanes: load, rotate, encode, decode, store. The arithmetic is the CPU's (backend/cpu/coder.rs) to the last
// bit: the same order of every sum, no contraction (compile with --fmad=false), IEEE division and square root.
//
// A row is a few Walsh-Hadamard blocks. GROUP lanes share it; lane l holds of each block the runs of eight elements
// l, l + GROUP, l + 2 GROUP, ... So a lane loads and stores whole vectors, eight codes are whole bytes at every width, the low
// stages of the transform and the high ones stay in registers, and only log2(GROUP) stages go through shuffles.
#pragma once
#include "common.cuh"

#define PACK_DENSE 0
#define PACK_BYTE 1
#define PACK_F16 2
#define PACK_F32 3
#define PACK_PLANES 4  // 3 bits: three planes of nibbles, see docs/format.md

#define SCALE_NONE 0
#define SCALE_CORRECTED 1
#define SCALE_NORM 2
#define SCALE_BLOCK_RMS 3

constexpr int power_of_two_above(int n) { return n <= 1 ? 1 : 2 * power_of_two_above((n + 1) / 2); }

// LANES: how many share a row, if not the usual number.
template <int HEAD_DIM_, int LANES = 0> struct Shape {
    static constexpr int D = HEAD_DIM_;
    static constexpr int BLOCK = D & -D;
    static constexpr int BLOCKS = D / BLOCK;
    static constexpr int WANTED = LANES ? LANES : power_of_two_above((D + 31) / 32);
    static constexpr int GROUP = WANTED < BLOCK / 8 ? WANTED : BLOCK / 8;
    static constexpr int RUNS = BLOCK / 8 / GROUP;  // of eight elements, a lane and block
    static constexpr int N = D / GROUP;             // elements a lane
    // The first element of a lane's run `r` of BLOCKS * RUNS.
    static DEVICE int element(int r, int lane) { return r / RUNS * BLOCK + (r % RUNS * GROUP + lane) * 8; }
};

// Constants of the transform, computed by the host as the CPU backend does.
struct Turn {
    const u32* signs;  // bit 1 = negate
    float norm;        // 1 / sqrt(BLOCK)
    float reflect;     // 2 / BLOCKS
    u32 rotated;       // 0: dense floats, nothing is done
    u32 pad;
};

template <typename S> DEVICE void apply_signs(float (&x)[S::N], const u32* signs, int lane) {
#pragma unroll
    for (int r = 0; r < S::N / 8; r++) {
        const int e = S::element(r, lane);
        const u32 word = __ldg(signs + (e >> 5)) >> (e & 31);
#pragma unroll
        for (int i = 0; i < 8; i++) x[r * 8 + i] = __uint_as_float(__float_as_uint(x[r * 8 + i]) ^ ((word >> i) << 31));
    }
}

// a + b, a - b
DEVICE void butterfly(float& a, float& b) {
    const float sum = a + b, difference = a - b;
    a = sum, b = difference;
}

// The last stages of the transform, over a lane's runs.
template <typename S> DEVICE void transform_runs(float (&x)[S::N]) {
#pragma unroll
    for (int h = 1; h < S::RUNS; h <<= 1)
#pragma unroll
        for (int k = 0; k < S::N; k++)
            if (!(k / 8 & h)) butterfly(x[k], x[k + 8 * h]);
}
template <typename S> DEVICE void reflect(float (&x)[S::N], const Turn& t) {
    if constexpr (S::BLOCKS > 1) {
        constexpr int PER = S::RUNS * 8;
#pragma unroll
        for (int j = 0; j < PER; j++) {
            float sum = x[j];
#pragma unroll
            for (int b = 1; b < S::BLOCKS; b++) sum += x[b * PER + j];
            sum *= t.reflect;
#pragma unroll
            for (int b = 0; b < S::BLOCKS; b++) x[b * PER + j] -= sum;
        }
    }
}
template <typename S> DEVICE void transform(float (&x)[S::N], const Turn& t, int lane) {
#pragma unroll
    for (int h = 1; h < 8; h <<= 1)
#pragma unroll
        for (int k = 0; k < S::N; k++)
            if (!(k & h)) butterfly(x[k], x[k + h]);
#pragma unroll
    for (int h = 1; h < S::GROUP; h <<= 1) {
        const float sign = lane & h ? -1.f : 1.f;
        // other + x or other - x: the product with one is exact, so that this is rounded once.
#pragma unroll
        for (int k = 0; k < S::N; k++) x[k] = __fmaf_rn(x[k], sign, __shfl_xor_sync(~0u, x[k], h));
    }
    transform_runs<S>(x);
#pragma unroll
    for (int k = 0; k < S::N; k++) x[k] *= t.norm;
    reflect<S>(x, t);
}

template <typename S> DEVICE void rotate(float (&x)[S::N], const Turn& t, int lane) {
    if (!t.rotated) return;
    apply_signs<S>(x, t.signs, lane);
    transform<S>(x, t, lane);
}
template <typename S> DEVICE void restore(float (&x)[S::N], const Turn& t, int lane) {
    if (!t.rotated) return;
    transform<S>(x, t, lane);
    apply_signs<S>(x, t.signs, lane);
}

// Folds the upper half onto the lower, H sums each, and goes on until H is STOP. (A recursion: of loops over shrinking halves
// the compiler makes local memory.)
template <int H, int STOP> DEVICE void fold_halves(float* sum) {
    if constexpr (H > STOP) {
#pragma unroll
        for (int j = 0; j < H; j++) sum[j] += sum[j + H];
        fold_halves<H / 2, STOP>(sum);
    }
}

// The sum of SETS * 8 * RUNS squares a lane: sets first, one after the other, then halves folded onto each other. All lanes of
// the group get it.
template <int GROUP, int RUNS, int SETS> DEVICE float fold_squares(const float* square) {
    float sum[RUNS * 8];
#pragma unroll
    for (int j = 0; j < RUNS * 8; j++) {
        sum[j] = square[j];
#pragma unroll
        for (int b = 1; b < SETS; b++) sum[j] += square[b * RUNS * 8 + j];
    }
    fold_halves<RUNS * 4, 4>(sum);
    // Lanes, the farthest first. As long as it has more than two sums, a lane hands half of them over and adds the other's
    // to those it keeps: odd ones and even ones part at the first step, then those that are left.
    constexpr int SPLITS = GROUP >= 4 ? 2 : GROUP / 2, LEFT = 8 >> SPLITS;
    const int lane = threadIdx.x % GROUP;
#pragma unroll
    for (int step = 0; step < SPLITS; step++) {
        const int h = GROUP / 2 >> step;
#pragma unroll
        for (int j = 0; j < 4 >> step; j++) {
            const float even = sum[2 * j], odd = sum[2 * j + 1];
            const float other = __shfl_xor_sync(~0u, lane & h ? even : odd, h);
            sum[j] = (lane & h ? odd : even) + other;
        }
    }
#pragma unroll
    for (int h = GROUP / 2 >> SPLITS; h > 0; h >>= 1)
#pragma unroll
        for (int j = 0; j < LEFT; j++) sum[j] += __shfl_xor_sync(~0u, sum[j], h);
    // Within the run of eight, the farthest first.
    fold_halves<LEFT / 2, 0>(sum);
#pragma unroll
    for (int step = SPLITS - 1; step >= 0; step--) sum[0] += __shfl_xor_sync(~0u, sum[0], GROUP / 2 >> step);
    return sum[0];
}

// Eight floats of any type; ALIGNED: to 16 bytes.
template <int TYPE, bool ALIGNED> DEVICE void load8(const void* p, u64 i, float* x) {
    if constexpr (!ALIGNED) {
#pragma unroll
        for (int k = 0; k < 8; k++) x[k] = load_element<TYPE>(p, i + k);
    } else if constexpr (TYPE == TYPE_F32) {
        const float4 a = ((const float4*)((const float*)p + i))[0], b = ((const float4*)((const float*)p + i))[1];
        x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
    } else {
        const uint4 v = *(const uint4*)((const u16*)p + i);
        const u32 w[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (TYPE == TYPE_BF16) {
                x[2 * k] = __uint_as_float(w[k] << 16), x[2 * k + 1] = __uint_as_float(w[k] & 0xffff0000u);
            } else {
                x[2 * k] = f32_from_f16((u16)w[k]), x[2 * k + 1] = f32_from_f16((u16)(w[k] >> 16));
            }
        }
    }
}

template <int TYPE> DEVICE u32 pair(float lo, float hi) {
    if (TYPE == TYPE_F16) return f16x2_from_f32(lo, hi);
    return (u32)bf16_from_f32(lo) | (u32)bf16_from_f32(hi) << 16;
}

// Stores are streamed: nothing here reads again what it wrote.
template <int TYPE, bool ALIGNED> DEVICE void store8(void* p, u64 i, const float* x) {
    if constexpr (!ALIGNED) {
#pragma unroll
        for (int k = 0; k < 8; k++) store_element<TYPE>(p, i + k, x[k]);
    } else if constexpr (TYPE == TYPE_F32) {
        float4* to = (float4*)((float*)p + i);
        __stcs(to, make_float4(x[0], x[1], x[2], x[3])), __stcs(to + 1, make_float4(x[4], x[5], x[6], x[7]));
    } else {
        uint4 v;
        v.x = pair<TYPE>(x[0], x[1]), v.y = pair<TYPE>(x[2], x[3]), v.z = pair<TYPE>(x[4], x[5]), v.w = pair<TYPE>(x[6], x[7]);
        __stcs((uint4*)((u16*)p + i), v);
    }
}

// The same for a lane's run of a row, by all lanes of a warp. Neighbours' runs are neighbours: of f32 they exchange halves, so
// that each store of a pair of lanes fills a sector of 32 bytes.
template <typename S, int TYPE, bool ALIGNED> DEVICE void store_run(void* p, u64 i, const float* x, bool valid) {
    if constexpr (TYPE == TYPE_F32 && ALIGNED && S::GROUP > 1) {
        const bool odd = threadIdx.x & 1;
        float4 own = make_float4(x[0], x[1], x[2], x[3]), given = make_float4(x[4], x[5], x[6], x[7]);
        if (odd) {
            const float4 first = own;
            own = given, given = first;
        }
        given.x = __shfl_xor_sync(~0u, given.x, 1), given.y = __shfl_xor_sync(~0u, given.y, 1);
        given.z = __shfl_xor_sync(~0u, given.z, 1), given.w = __shfl_xor_sync(~0u, given.w, 1);
        // The even lane's run, then the odd lane's.
        float4* const to = (float4*)((float*)p + i) - (odd ? 1 : 0);
        if (valid) __stcs(to, odd ? given : own), __stcs(to + 2, odd ? own : given);
    } else if (valid) {
        store8<TYPE, ALIGNED>(p, i, x);
    }
}

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

// How a row is stored.
template <int D_, int BITS_, int PACKING_, int SCALING_, int ALIGN_, int LANES = 0> struct Row : Shape<D_, LANES> {
    static constexpr int BITS = BITS_;
    static constexpr int PACKING = PACKING_;
    static constexpr int SCALING = SCALING_;
    static constexpr int ALIGN = ALIGN_;  // of every row of codes
    static constexpr bool CODED = PACKING != PACK_F16 && PACKING != PACK_F32;
    static constexpr int STORED = PACKING == PACK_BYTE ? 8 : BITS;            // bits a code takes
    static constexpr int FIELD = PACKING == PACK_PLANES ? 4 : STORED;         // bits it takes in the word that load_run gives
    static constexpr int BYTES = D_ * STORED / 8;
    static constexpr int LEVELS = CODED ? 1 << BITS : 0;
    static constexpr int SCALES = SCALING == SCALE_NONE ? 0 : SCALING == SCALE_BLOCK_RMS ? D_ / 256 : 1;
    static constexpr int SCALE_BYTES = SCALING == SCALE_CORRECTED ? 2 : 4;
    // Copies of a table of levels in shared memory: neighbouring lanes read different banks.
    static constexpr int REPLICAS = LEVELS <= 32 ? 32 : 1024 / (LEVELS ? LEVELS : 1);
    static constexpr int TABLE = LEVELS * REPLICAS;
};

// The codes of eight elements from `element` on, as fields of FIELD bits; what lies above a code is anything.
template <typename R> DEVICE u64 load_run(const u8* codes, int element) {
    if constexpr (R::PACKING == PACK_PLANES) {
        const u32 a = codes[element / 8], b = codes[(R::D + element) / 8], c = codes[(2 * R::D + element) / 8];
        return a | b << 8 | c << 16 | ((a >> 3 & 0x11) | (b >> 2 & 0x22) | (c >> 1 & 0x44)) << 24;
    } else {
        constexpr int OWN = R::STORED & -R::STORED;
        return load_bytes<R::STORED, (OWN < R::ALIGN ? OWN : R::ALIGN)>(codes + element / 8 * R::STORED);
    }
}
// Stores them; nothing may lie above a code.
template <typename R> DEVICE void store_run_codes(u8* codes, int element, u64 fields) {
    if constexpr (R::PACKING == PACK_PLANES) {
        const u32 run = (u32)fields;
#pragma unroll
        for (int plane = 0; plane < 3; plane++)
            codes[(plane * R::D + element) / 8] = (u8)(run >> 8 * plane | (run >> (24 + plane) & 0x11) << 3);
    } else {
        constexpr int OWN = R::STORED & -R::STORED;
        store_bytes<R::STORED, (OWN < R::ALIGN ? OWN : R::ALIGN)>(codes + element / 8 * R::STORED, fields);
    }
}

// What a row's levels are multiplied by. `unit`: what a stored norm is multiplied by, or a block's scale divided by.
template <typename R> DEVICE float load_factor(const u8* scales, u64 i, float unit) {
    if (R::SCALING == SCALE_CORRECTED) return f32_from_f16(((const u16*)scales)[i]);
    const float scale = ((const float*)scales)[i];
    return R::SCALING == SCALE_NORM ? __fmul_rn(scale, unit) : __fdiv_rn(scale, unit);
}

// Where positions are: ops::Span, and page tables [sequences, width].
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
