// Encodes new vectors of one or two pools (K and V) in one launch. For each side A and B, -D: X_DIM, X_BITS, X_PACKING, X_SCALING, X_WIDTH
// (elements of a vector of the input), X_TYPE (of the input), X_ALIGNED (the input, to 16 bytes), X_CODE_ALIGN (bytes), X_CELLS,
// X_CELL_REPLICAS, X_GRID (cells of the tiles' grid; 0: no tiles). For all: ZERO_NORM, SAME (the sides differ in nothing). Dynamic shared
// memory: `quantize_shared_bytes`.
#include "codec/tile_encoder.cuh"

struct Params {
    Input side[2];
    const Span* spans;
    const u32* table;
    u32 sequences, page_size, width;
    u32 a_blocks;  // the first blocks take side A
};

// The sequence that holds a token: the first whose new tokens end after it.
DEVICE u32 sequence_of(const Params& p, u32 token) {
    u32 low = 0, high = p.sequences - 1;
    while (low < high) {
        const u32 mid = (low + high) / 2;
        if (p.spans[mid].start + p.spans[mid].new_ <= token) low = mid + 1;
        else high = mid;
    }
    return low;
}

// Where new vectors go.
struct Places {
    const Params& p;
    const Divisor kv_heads, page_size;
    DEVICE Places(const Params& p, const Input& s) : p(p), kv_heads(s.kv_heads), page_size(p.page_size) {}
    DEVICE u32 of(u32 vector) const {
        u32 head;
        const u32 token = kv_heads.divide(vector, head), sequence = sequence_of(p, token);
        const Span span = p.spans[sequence];
        const u32 position = span.len - span.new_ + token - span.start;
        return locate(p.table + (u64)sequence * p.width, position, page_size, p.width, kv_heads.value, head);
    }
};

template <typename R, int WIDTH, int ALIGN, int CELLS, int REPLICAS, int TYPE, bool ALIGNED>
DEVICE void encode(const Input& s, const Places& places, u32 block, u32 blocks) {
    typedef Shape<R::D> S;
    typedef Encoder<R, S, Codec<R, ALIGN>, CELLS, REPLICAS> E;
    constexpr int ROWS = THREADS / S::GROUP;
    E::fill(s, shared_memory);
    __syncthreads();
    const int lane = threadIdx.x % S::GROUP;
    // All lanes of a warp take part in shuffles: those past the end repeat the last row and store nothing.
    for (u32 first = block * ROWS; first < s.rows; first += blocks * ROWS) {
        const u32 wanted = first + threadIdx.x / S::GROUP, i = min(wanted, s.rows - 1);
        float x[S::N];
#pragma unroll
        for (int r = 0; r < S::N / 8; r++) load_run<R::D, WIDTH, TYPE, ALIGNED>(s.x, i, S::element(r, lane), x + r * 8);
        if (s.channels) {
            const float* const shift = s.channels + i % s.kv_heads * WIDTH;
            const float* const inverse = shift + s.kv_heads * WIDTH;
#pragma unroll
            for (int k = 0; k < S::N; k++) {
                const int e = S::element(k / 8, lane) + k % 8;
                if (WIDTH == R::D || e < WIDTH) x[k] = (x[k] - shift[e]) * inverse[e];
            }
        }
        E::run(s, shared_memory, x, places.of(i), lane, wanted < s.rows);
    }
}

// What a side's blocks do.
template <typename R, int WIDTH, int ALIGN, int CELLS, int REPLICAS, int GRID, int TYPE, bool ALIGNED> struct Work {
    typedef Shape<R::D> S;
    typedef Tile<R, ALIGN, CELLS, GRID, TYPE, Places> Tiles;
    // Blocks that a multiprocessor shall hold at once.
    static constexpr int HELD = GRID ? (R::D <= 128 ? 3 : 2) : S::N <= 32 ? 4 : S::N <= 40 ? 3 : 1;
    static constexpr int bytes() {
        if constexpr (GRID > 0) return Tiles::BYTES;
        else return Encoder<R, S, Codec<R, ALIGN>, CELLS, REPLICAS>::BYTES;
    }
    static DEVICE void run(const Params& p, const Input& s, u32 block, u32 blocks) {
        const Places places(p, s);
        if constexpr (GRID > 0) Tiles(s, places).run(block, blocks);
        else encode<R, WIDTH, ALIGN, CELLS, REPLICAS, TYPE, ALIGNED>(s, places, block, blocks);
    }
};
typedef Work<Row<A_DIM, A_BITS, A_PACKING, A_SCALING>, A_WIDTH, A_CODE_ALIGN, A_CELLS, A_CELL_REPLICAS, A_GRID, A_TYPE, A_ALIGNED> WorkA;
typedef Work<Row<B_DIM, B_BITS, B_PACKING, B_SCALING>, B_WIDTH, B_CODE_ALIGN, B_CELLS, B_CELL_REPLICAS, B_GRID, B_TYPE, B_ALIGNED> WorkB;

extern "C" __device__ u32 quantize_shared_bytes = WorkA::bytes() > WorkB::bytes() ? WorkA::bytes() : WorkB::bytes();

extern "C" __global__ void __launch_bounds__(THREADS, min_of(WorkA::HELD, WorkB::HELD)) quantize(const __grid_constant__ Params p) {
    begin();
    const bool b = blockIdx.x >= p.a_blocks;
    const u32 block = b ? blockIdx.x - p.a_blocks : blockIdx.x, blocks = b ? gridDim.x - p.a_blocks : p.a_blocks;
    // If both sides are of one kind, one copy of the code serves both.
    if (SAME || !b) WorkA::run(p, p.side[b], block, blocks);
    else WorkB::run(p, p.side[1], block, blocks);
}
