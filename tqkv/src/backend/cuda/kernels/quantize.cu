// Encodes new vectors of one or two pools (K and V) in one launch, and with PAIRS = 2 of two more, whose sides are C and D. For each side, -D: X_DIM, X_BITS, X_PACKING, X_SCALING, X_WIDTH
// (elements of a vector of the input), X_TYPE (of the input), X_ALIGNED (the input, to 16 bytes), X_CODE_ALIGN (bytes), X_CELLS,
// X_CELL_REPLICAS, X_GRID (cells of the tiles' grid; 0: no tiles). For all: ZERO_NORM, SAME and SAME_2 (a pair's sides differ in nothing). Dynamic shared
// memory: `quantize_shared_bytes`.
#include "codec/tile_encoder.cuh"

// Where a pair's vectors go.
struct Batch {
    const Span* spans;   // or null: `table` holds slots
    const u32* table;    // of the sequences; or a slot of 32 or 64 bits for each token, page * page_size + row
    u32* out_of_range;   // counts slots that are not in the pool, or null
    u32 sequences, page_size, width;
    u32 blocks;          // of the pair
    u32 a_blocks;        // the first blocks take its first side
    u32 wide;            // whether slots have 64 bits
    u32 slots, tokens;   // slots of the pool
    u32 pad, pad2;
};

struct Params {
    Input side[4];
    Batch batch[2];
};

// The sequence that holds a token: the first whose new tokens end after it.
DEVICE u32 sequence_of(const Batch& p, u32 token) {
    u32 low = 0, high = p.sequences - 1;
    while (low < high) {
        const u32 mid = (low + high) / 2;
        if (p.spans[mid].start + p.spans[mid].new_ <= token) low = mid + 1;
        else high = mid;
    }
    return low;
}

DEVICE long long slot_of(const Batch& p, u32 token) { return p.wide ? ((const long long*)p.table)[token] : ((const int*)p.table)[token]; }
DEVICE void count_out_of_range(const Batch& p) {
    for (u32 token = threadIdx.x; token < p.tokens; token += THREADS) {
        const long long slot = slot_of(p, token);
        if (slot < -1 || slot >= (long long)p.slots) atomicAdd(p.out_of_range, 1u);
    }
}

// Where new vectors go.
struct Places {
    const Batch& p;
    const Divisor kv_heads, page_size;
    DEVICE Places(const Batch& p, const Input& s) : p(p), kv_heads(s.kv_heads), page_size(p.page_size) {}
    DEVICE u32 of(u32 vector) const {
        u32 head;
        const u32 token = kv_heads.divide(vector, head);
        if (!p.spans) return at_slot(token, head);
        const u32 sequence = sequence_of(p, token);
        const Span span = p.spans[sequence];
        const u32 position = span.len - span.new_ + token - span.start;
        return locate(p.table + (u64)sequence * p.width, position, page_size, p.width, kv_heads.value, head);
    }
    DEVICE u32 at_slot(u32 token, u32 head) const {
        const long long slot = slot_of(p, token);
        if (slot < 0 || slot >= (long long)p.slots) return NOWHERE;
        u32 row;
        const u32 page = page_size.divide((u32)slot, row);
        return (page * kv_heads.value + head) * page_size.value + row;
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
        const u32 place = places.of(i);
        E::run(s, shared_memory, x, place, lane, wanted < s.rows && place != NOWHERE);
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
    static DEVICE void run(const Batch& batch, const Input& s, u32 block, u32 blocks) {
        const Places places(batch, s);
        if constexpr (GRID > 0) Tiles(s, places).run(block, blocks);
        else encode<R, WIDTH, ALIGN, CELLS, REPLICAS, TYPE, ALIGNED>(s, places, block, blocks);
    }
};
typedef Work<Row<A_DIM, A_BITS, A_PACKING, A_SCALING>, A_WIDTH, A_CODE_ALIGN, A_CELLS, A_CELL_REPLICAS, A_GRID, A_TYPE, A_ALIGNED> WorkA;
typedef Work<Row<B_DIM, B_BITS, B_PACKING, B_SCALING>, B_WIDTH, B_CODE_ALIGN, B_CELLS, B_CELL_REPLICAS, B_GRID, B_TYPE, B_ALIGNED> WorkB;

constexpr int max_of(int a, int b) { return a > b ? a : b; }

// Two sides that go to the same places.
template <typename A, typename B, bool ALIKE> struct Pair {
    static constexpr int HELD = min_of(A::HELD, B::HELD);
    static constexpr int bytes() { return max_of(A::bytes(), B::bytes()); }
    static DEVICE void run(const Batch& batch, const Input* side, u32 block) {
        if (block == 0 && batch.out_of_range) count_out_of_range(batch);
        const bool b = block >= batch.a_blocks;
        const u32 own = b ? block - batch.a_blocks : block, blocks = b ? batch.blocks - batch.a_blocks : batch.a_blocks;
        // If both sides are of one kind, one copy of the code serves both.
        if (ALIKE || !b) A::run(batch, side[b], own, blocks);
        else B::run(batch, side[1], own, blocks);
    }
};
typedef Pair<WorkA, WorkB, SAME> First;
#if PAIRS > 1
typedef Work<Row<C_DIM, C_BITS, C_PACKING, C_SCALING>, C_WIDTH, C_CODE_ALIGN, C_CELLS, C_CELL_REPLICAS, C_GRID, C_TYPE, C_ALIGNED> WorkC;
typedef Work<Row<D_DIM, D_BITS, D_PACKING, D_SCALING>, D_WIDTH, D_CODE_ALIGN, D_CELLS, D_CELL_REPLICAS, D_GRID, D_TYPE, D_ALIGNED> WorkD;
typedef Pair<WorkC, WorkD, SAME_2> Second;
#else
typedef First Second;
#endif

extern "C" __device__ u32 quantize_shared_bytes = max_of(First::bytes(), Second::bytes());

extern "C" __global__ void __launch_bounds__(THREADS, min_of(First::HELD, Second::HELD)) quantize(const __grid_constant__ Params p) {
    begin();
    if (PAIRS == 1 || blockIdx.x < p.batch[0].blocks) First::run(p.batch[0], p.side, blockIdx.x);
    else Second::run(p.batch[1], p.side + 2, blockIdx.x - p.batch[0].blocks);
}
