// Rows into the rotated domain, or back. -D: ROW_DIM, X_WIDTH, OUT_WIDTH (elements of a row of `x` and of `out` in memory), X_TYPE, OUT_TYPE,
// BOTH_ALIGNED (to 16 bytes), INVERSE.
#include "transform.cuh"

struct Params {
    const void* x;  // [rows, X_WIDTH]; may be `out`
    void* out;
    Turn turn;
    u32 rows, pad;
};

extern "C" __global__ void __launch_bounds__(256) rotate(const __grid_constant__ Params p) {
    begin();
    typedef Shape<ROW_DIM> S;
    constexpr int ROWS = 256 / S::GROUP;
    const int lane = threadIdx.x % S::GROUP;
    // All lanes of a warp take part in shuffles: those past the end repeat the last row and store nothing.
    for (u32 first = blockIdx.x * ROWS; first < p.rows; first += gridDim.x * ROWS) {
        const u32 row = first + threadIdx.x / S::GROUP, from = min(row, p.rows - 1);
        float x[S::N];
#pragma unroll
        for (int r = 0; r < S::N / 8; r++) load_run<S::D, X_WIDTH, X_TYPE, BOTH_ALIGNED>(p.x, from, S::element(r, lane), x + r * 8);
        if (INVERSE) restore<S>(x, p.turn, lane);
        else rotate<S>(x, p.turn, lane);
#pragma unroll
        for (int r = 0; r < S::N / 8; r++)
            store_run<S, OUT_WIDTH, OUT_TYPE, BOTH_ALIGNED>(p.out, from, S::element(r, lane), x + r * 8, row < p.rows);
    }
}
