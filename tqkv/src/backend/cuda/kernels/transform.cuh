// Vectors by groups of lanes: load, rotate, sum squares, store. For encoding and decoding the arithmetic is that of format/exact.rs to
// the last bit: the same order of every sum, no contraction (compile with --fmad=false), IEEE division and square root.
//
// The rotation is T S. S negates the elements whose bit in `signs` is set; T is a Walsh-Hadamard transform of every block of the largest
// power of two that divides the row, and across blocks, where there are several, a Householder reflection. T is symmetric and its
// own inverse, so the way back is S T.
//
// GROUP lanes share a row; lane l holds of each block the runs of STEP elements l, l + GROUP, l + 2 GROUP, ... With runs of eight a lane
// loads and stores whole vectors, eight codes are whole bytes at every width, and only log2(GROUP) stages of the transform go
// through shuffles. With runs of one a warp reads rows in shared memory without bank conflicts.
#pragma once
#include "common.cuh"

constexpr int power_of_two_above(int n) { return n <= 1 ? 1 : 2 * power_of_two_above((n + 1) / 2); }

// LANES: how many share a row, if not the usual number.
template <int D_, int LANES = 0, int STEP_ = 8> struct Shape {
    static constexpr int D = D_, STEP = STEP_;
    static constexpr int BLOCK = D & -D;
    static constexpr int BLOCKS = D / BLOCK;
    static constexpr int WANTED = LANES ? LANES : power_of_two_above((D + 31) / 32);
    static constexpr int GROUP = WANTED < BLOCK / STEP ? WANTED : BLOCK / STEP;
    static constexpr int RUNS = BLOCK / STEP / GROUP;  // a lane and block
    static constexpr int N = D / GROUP;               // elements a lane
    // The first element of a lane's run `r` of N / STEP.
    static DEVICE int element(int r, int lane) { return r / RUNS * BLOCK + (r % RUNS * GROUP + lane) * STEP; }
};
// A row shared by a warp, element by element. If the blocks are short its halves do the same.
template <int D> using WarpShape = Shape<D, 32, 1>;

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
    for (int r = 0; r < S::N / S::STEP; r++) {
        const int e = S::element(r, lane);
        const u32 word = __ldg(signs + (e >> 5)) >> (e & 31);
#pragma unroll
        for (int i = 0; i < S::STEP; i++) x[r * S::STEP + i] = __uint_as_float(__float_as_uint(x[r * S::STEP + i]) ^ ((word >> i) << 31));
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
            if (!(k / S::STEP & h)) butterfly(x[k], x[k + S::STEP * h]);
}
template <typename S> DEVICE void reflect(float (&x)[S::N], const Turn& t) {
    if constexpr (S::BLOCKS > 1) {
        constexpr int PER = S::RUNS * S::STEP;
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
    for (int h = 1; h < S::STEP; h <<= 1)
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

// Eight elements of row `row` from element `e` on, of rows that have WIDTH elements in memory: those past them are zero.
template <int D, int WIDTH, int TYPE, bool ALIGNED> DEVICE void load_run(const void* p, u64 row, int e, float* x) {
    if (WIDTH == D || e + 8 <= WIDTH) return load8<TYPE, ALIGNED>(p, row * WIDTH + e, x);
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = e + k < WIDTH ? load_element<TYPE>(p, row * WIDTH + e + k) : 0.f;
}

// Stores a lane's run, by all lanes of a warp. Neighbours' runs are neighbours: of f32 they exchange halves, so that each store of
// a pair of lanes fills a sector of 32 bytes.
template <typename S, int WIDTH, int TYPE, bool ALIGNED> DEVICE void store_run(void* p, u64 row, int e, const float* x, bool valid) {
    const u64 i = row * WIDTH + e;
    if constexpr (WIDTH == S::D && TYPE == TYPE_F32 && ALIGNED && S::GROUP > 1) {
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
        if (WIDTH == S::D || e + 8 <= WIDTH) return store8<TYPE, ALIGNED>(p, i, x);
#pragma unroll
        for (int k = 0; k < 8; k++)
            if (e + k < WIDTH) store_element<TYPE>(p, i + k, x[k]);
    }
}
