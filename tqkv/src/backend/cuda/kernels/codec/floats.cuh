// Rows that are floats: nothing is looked up and nothing scaled.
#pragma once
#include "codec/stream.cuh"

template <typename R, int TYPE, int ALIGN> struct FloatRuns {
    struct Run {
        float x[8];
    };
    static constexpr int TABLE = 0;
    static DEVICE void fill(float*, const float*, int, int) {}
    static DEVICE Run load(const u8* row, int element) {
        Run run;
        load8<TYPE, ALIGN >= 16>(row, element, run.x);
        return run;
    }
    static DEVICE float level(const float*, const Run& run, int k) { return run.x[k]; }
    static DEVICE float decode(const float*, const Run& run, int k, float) { return run.x[k]; }
    static DEVICE void store(u8* row, int element, const float* x) { store8<TYPE, ALIGN >= 16>(row, element, x); }
};

// Words of f16 as they are.
struct Halves {
    typedef NoTable Table;
    static constexpr bool FINITE = false;
    template <int I> static DEVICE void keys(const u32* a, const u32* b, const u8*, u32, u32 (&x)[4]) {
        x[0] = a[I / 2], x[2] = a[I / 2 + 1], x[1] = b[I / 2], x[3] = b[I / 2 + 1];
    }
    template <bool PAIR, int I> static DEVICE void rows(const u32* a, const u32* b, const u8*, u32, u32 (&x)[4]) {
        x[0] = __byte_perm(a[I / 2], b[I / 2], 0x5410), x[1] = __byte_perm(a[I / 2], b[I / 2], 0x7632);
        x[2] = __byte_perm(a[I / 2 + 1], b[I / 2 + 1], 0x5410), x[3] = __byte_perm(a[I / 2 + 1], b[I / 2 + 1], 0x7632);
    }
    static DEVICE constexpr int element(int fragment, int, int e) { return fragment * 2 + e; }
};
