// Rows of a pool back to floats. -D: ROW_DIM, ROW_BITS, ROW_PACKING, ROW_SCALING, CODE_ALIGN (bytes), OUT_TYPE, OUT_ALIGNED (to 16 bytes),
// OUT_WIDTH (elements of an output in memory).
#include "codec/codec.cuh"

struct Params {
    Side side;             // `rotated`: the output is wanted in the original domain, and rows are not
    const u32* table;      // of the sequence, [width]
    const u32* positions;  // or null
    void* out;
    u32 start;             // the first position, if no list
    u32 count, kv_heads, page_size, width;
    u32 head_major;        // out is [kv_heads, count, OUT_WIDTH], else [count, kv_heads, OUT_WIDTH]
};

constexpr int THREADS = 128;
typedef Row<ROW_DIM, ROW_BITS, ROW_PACKING, ROW_SCALING> R;
typedef Codec<R, CODE_ALIGN> C;
typedef Shape<R::D> S;

extern "C" __global__ void __launch_bounds__(THREADS, S::N <= 32 ? 10 : S::N <= 40 ? 6 : 2) dequantize(const __grid_constant__ Params p) {
    begin();
    constexpr int ROWS = THREADS / S::GROUP;
    __shared__ float table[C::TABLE ? C::TABLE : 1];
    C::fill(table, p.side.levels, threadIdx.x, THREADS);
    if (C::TABLE) __syncthreads();
    const int lane = threadIdx.x % S::GROUP;
    const u32 rows = p.count * p.kv_heads;
    const Divisor inner(p.head_major ? p.count : p.kv_heads), page_size(p.page_size);
    // All lanes of a warp take part in shuffles: those past the end repeat the last row and store nothing.
    for (u32 first = blockIdx.x * ROWS; first < rows; first += gridDim.x * ROWS) {
        const u32 wanted = first + threadIdx.x / S::GROUP;
        u32 rest;
        const u32 outer = inner.divide(min(wanted, rows - 1), rest);
        const u32 head = p.head_major ? outer : rest, i = p.head_major ? rest : outer;
        const u32 position = p.positions ? p.positions[i] : p.start + i;
        const u32 row = locate(p.table, position, page_size, p.width, p.kv_heads, head);
        typename C::Run runs[S::N / 8];
#pragma unroll
        for (int r = 0; r < S::N / 8; r++) runs[r] = C::load(p.side.codes + codes_at<R>(p.side.strides, row), S::element(r, lane));
        float factor[R::SPANS], x[S::N];
#pragma unroll
        for (int s = 0; s < R::SPANS; s++) factor[s] = load_factor<R>(p.side.scales + scales_at<R>(p.side.strides, row), s, p.side.unit);
#pragma unroll
        for (int k = 0; k < S::N; k++) x[k] = C::decode(table, runs[k / 8], k % 8, factor[k * R::SPANS / S::N]);
        restore<S>(x, p.side.turn, lane);
        if (p.side.channels) {
            const float* const shift = p.side.channels + head * OUT_WIDTH;
            const float* const scale = shift + 2 * p.kv_heads * OUT_WIDTH;
#pragma unroll
            for (int k = 0; k < S::N; k++) {
                const int e = S::element(k / 8, lane) + k % 8;
                if (OUT_WIDTH == R::D || e < OUT_WIDTH) x[k] = x[k] * scale[e] + shift[e];
            }
        }
#pragma unroll
        for (int k = 0; k < S::N / 8; k++)
            store_run<S, OUT_WIDTH, OUT_TYPE, OUT_ALIGNED>(p.out, wanted, S::element(k, lane), x + k * 8, wanted < rows);
    }
}
