// Rows of a pool back to floats. -D: ROW_HEAD_DIM, ROW_BITS, ROW_PACKING, ROW_SCALING, CODE_ALIGN (bytes), OUT_TYPE,
// OUT_ALIGNED (to 16 bytes).
#include "row.cuh"

struct Params {
    const u8* codes;
    const u8* scales;
    const float* levels;
    const u32* table;      // of the sequence, [width]
    const u32* positions;  // or null
    void* out;
    Turn turn;
    u32 start;             // the first position, if no list
    u32 count, kv_heads, page_size, width;
    u32 restored;    // else the rows stay rotated
    u32 head_major;  // out is [kv_heads, count, D], else [count, kv_heads, D]
    float unit;      // what a stored scale is multiplied by, or divided by if it is a block's
};
static_assert(sizeof(Params) == PARAMS_BYTES, "as the host sees it");

constexpr int THREADS = 128;

template <typename R> DEVICE void decode(const Params& p) {
    constexpr int ROWS = THREADS / R::GROUP;
    __shared__ float levels[R::CODED ? R::TABLE : 1];
    if (R::CODED) {
        for (int i = threadIdx.x; i < R::TABLE; i += THREADS) levels[i] = p.levels[i / R::REPLICAS];
        __syncthreads();
    }
    const int lane = threadIdx.x % R::GROUP;
    const float* const mine = levels + threadIdx.x % R::REPLICAS;
    const u32 rows = p.count * p.kv_heads;
    const Divisor inner(p.head_major ? p.count : p.kv_heads), page_size(p.page_size);
    // All lanes of a warp take part in shuffles: those past the end repeat the last row and store nothing.
    for (u32 first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
        const u32 wanted = first + threadIdx.x / R::GROUP;
        u32 rest;
        const u32 outer = inner.divide(min(wanted, rows - 1), rest);
        const u32 head = p.head_major ? outer : rest, i = p.head_major ? rest : outer;
        const u32 position = p.positions ? p.positions[i] : p.start + i;
        const u64 row = locate(p.table, position, page_size, p.width, p.kv_heads, head);
        const u8* const codes = p.codes + row * R::BYTES;
        float x[R::N];
        if constexpr (R::CODED) {
            u64 packed[R::N / 8];
#pragma unroll
            for (int r = 0; r < R::N / 8; r++) packed[r] = load_run<R>(codes, R::element(r, lane));
            float factor[R::SCALES];
#pragma unroll
            for (int s = 0; s < R::SCALES; s++) factor[s] = load_factor<R>(p.scales, row * R::SCALES + s, p.unit);
#pragma unroll
            for (int k = 0; k < R::N; k++) {
                const u32 code = (u32)(packed[k / 8] >> (k % 8 * R::FIELD)) & (R::LEVELS - 1);
                x[k] = __fmul_rn(mine[code * R::REPLICAS], factor[k * R::SCALES / R::N]);
            }
        } else {
#pragma unroll
            for (int r = 0; r < R::N / 8; r++)
                load8<R::PACKING == PACK_F16 ? TYPE_F16 : TYPE_F32, R::ALIGN >= 16>(codes, R::element(r, lane), x + r * 8);
        }
        if (p.restored) restore<R>(x, p.turn, lane);
#pragma unroll
        for (int k = 0; k < R::N / 8; k++)
            store_run<R, OUT_TYPE, OUT_ALIGNED>(p.out, (u64)wanted * R::D + R::element(k, lane), x + k * 8, wanted < rows);
    }
}

typedef Row<ROW_HEAD_DIM, ROW_BITS, ROW_PACKING, ROW_SCALING, CODE_ALIGN> R;
extern "C" __global__ void __launch_bounds__(THREADS, R::N <= 32 ? 10 : R::N <= 40 ? 6 : 2) dequantize(const __grid_constant__ Params p) {
    decode<R>(p);
}
