// Rows into the rotated domain, or back. -D: HEAD_DIM, X_TYPE, OUT_TYPE, BOTH_ALIGNED (to 16 bytes), INVERSE.
#include "row.cuh"

struct Params {
    const void* x;  // [rows, HEAD_DIM]; may be `out`
    void* out;
    Turn turn;
    u32 rows, pad;
};
static_assert(sizeof(Params) == PARAMS_BYTES, "as the host sees it");

extern "C" __global__ void __launch_bounds__(256) rotate(const __grid_constant__ Params p) {
    typedef Shape<HEAD_DIM> S;
    constexpr int ROWS = 256 / S::GROUP;
    const int lane = threadIdx.x % S::GROUP;
    // All lanes of a warp take part in shuffles: those past the end repeat the last row and store nothing.
    for (u32 first = blockIdx.x * ROWS; first < p.rows; first += gridDim.x * ROWS) {
        const u32 row = first + threadIdx.x / S::GROUP;
        const u64 at = (u64)min(row, p.rows - 1) * S::D;
        float x[S::N];
#pragma unroll
        for (int r = 0; r < S::N / 8; r++) load8<X_TYPE, BOTH_ALIGNED>(p.x, at + S::element(r, lane), x + r * 8);
        if (INVERSE) restore<S>(x, p.turn, lane);
        else rotate<S>(x, p.turn, lane);
#pragma unroll
        for (int r = 0; r < S::N / 8; r++)
            store_run<S, OUT_TYPE, BOTH_ALIGNED>(p.out, at + S::element(r, lane), x + r * 8, row < p.rows);
    }
}
