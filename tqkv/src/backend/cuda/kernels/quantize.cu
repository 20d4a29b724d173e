// Encodes new vectors of one or two pools (K and V) in one launch. For each side A and B, -D: X_HEAD_DIM, X_BITS, X_PACKING,
// X_SCALING, X_TYPE (of the input), X_ALIGNED (the input, to 16 bytes), X_CODE_ALIGN (bytes), X_CELLS, X_CELL_REPLICAS.
// For all: ZERO_NORM, PARAMS_BYTES, SAME (the sides differ in nothing). Dynamic shared memory: the larger of the sides' Encoder::BYTES.
//
// A code is the number of decision boundaries below an element. To find it without a search, the line is cut into cells of one
// size, each with at most one boundary: an entry holds the cell's boundary and the number of those below it.
#include "row.cuh"

struct Side {
    const void* x;       // [tokens, kv_heads, D]
    u8* codes;
    u8* scales;
    const uint2* cells;  // [CELLS]: boundary (f32 bits), boundaries below
    const float* squares;  // [LEVELS]: level * level
    Turn turn;
    u32 kv_heads, rows;  // rows = tokens * kv_heads
    float unit;          // sqrt(D), or what block scales are multiplied by
    float per_cell;      // cells in a unit, a power of two
    float limit;         // elements beyond are in the outermost cell
    float first_cell;    // 1.5 * 2^23, plus the cell that holds zero
};
struct Params {
    Side side[2];
    const Span* spans;
    const u32* table;
    u32 sequences, page_size, width;
    u32 a_blocks;  // the first blocks take side A
};
static_assert(sizeof(Params) == PARAMS_BYTES, "as the host sees it");

constexpr int THREADS = 256;
extern __shared__ __align__(16) u8 shared_memory[];

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

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// Encodes one row of one side; lanes of the group hold `x`. Rows that are not `valid` store nothing.
template <typename R, int CELLS, int REPLICAS> struct Encoder {
    static constexpr int CELL_BYTES = R::CODED ? CELLS * REPLICAS * 8 : 0;
    static constexpr int BYTES = CELL_BYTES + R::TABLE * 4;

    static DEVICE void fill(const Side& s, u8* shared) {
        if (!R::CODED) return;
        for (int i = threadIdx.x; i < CELLS * REPLICAS; i += THREADS) ((uint2*)shared)[i] = s.cells[i / REPLICAS];
        for (int i = threadIdx.x; i < R::TABLE; i += THREADS) ((float*)(shared + CELL_BYTES))[i] = s.squares[i / R::REPLICAS];
    }

    // A run of eight elements to packed codes; `x` becomes the squares of their levels. A zero vector has gain 0: its elements
    // get the code below the boundary at zero.
    static DEVICE u64 assign(const Side& s, const u8* shared, float* x, float gain) {
        // The sum with `first_cell` has the cell's number in its low bits.
        const u32 base = threadIdx.x % REPLICAS * 8 - 0x4b400000u * (REPLICAS * 8);
        const float* squares = (const float*)(shared + CELL_BYTES) + threadIdx.x % R::REPLICAS;
        u32 low = 0, high = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float u = fminf(fmaxf(x[i] * gain, -s.limit), s.limit);
            const u32 at = __float_as_uint(__fmaf_rn(u, s.per_cell, s.first_cell)) * (REPLICAS * 8) + base;
            const uint2 cell = *(const uint2*)(shared + at);
            const u32 code = cell.y + (u > __uint_as_float(cell.x));
            if (R::SCALING == SCALE_CORRECTED) x[i] = squares[code * R::REPLICAS];
            const int bit = i * R::FIELD;
            if (bit < 32) low |= code << bit;
            if (bit < 32 && bit + R::FIELD > 32) high |= code >> (32 - bit);
            if (bit >= 32) high |= code << (bit - 32);
        }
        return (u64)high << 32 | low;
    }

    static DEVICE void run(const Side& s, const u8* shared, float (&x)[R::N], u32 row, int lane, bool valid) {
        u8* const codes = s.codes + (u64)row * R::BYTES;
        if constexpr (!R::CODED) {
            if (valid)
#pragma unroll
                for (int r = 0; r < R::N / 8; r++)
                    store8<R::PACKING == PACK_F16 ? TYPE_F16 : TYPE_F32, R::ALIGN >= 16>(codes, R::element(r, lane), x + r * 8);
            return;
        }
        rotate<R>(x, s.turn, lane);
        constexpr int PARTS = R::SCALING == SCALE_BLOCK_RMS ? R::SCALES : 1, PART = R::N / PARTS, RUNS = R::RUNS / PARTS;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            float square[PART];
#pragma unroll
            for (int k = 0; k < PART; k++) square[k] = x[part * PART + k] * x[part * PART + k];
            const float sum = fold_squares<R::GROUP, RUNS, R::BLOCKS>(square);
            const float norm = __fsqrt_rn(R::SCALING == SCALE_BLOCK_RMS ? __fdiv_rn(sum, 256.f) : sum);
            const bool finite = is_finite(norm);
            const float gain = norm <= ZERO_NORM ? 0.f : __fmul_rn(__fdiv_rn(1.f, norm), s.unit);
#pragma unroll
            for (int r = part * PART / 8; r < (part + 1) * PART / 8; r++) {
                const u64 packed = assign(s, shared, x + r * 8, gain);
                if (valid) store_run_codes<R>(codes, R::element(r, lane), finite ? packed : 0);
            }
            float scale = finite ? norm : __uint_as_float(0x7fc00000u);
            if constexpr (R::SCALING == SCALE_CORRECTED) {
                scale = __fdiv_rn(norm, __fsqrt_rn(fold_squares<R::GROUP, RUNS, R::BLOCKS>(x)));
                if (valid && lane == 0) ((u16*)s.scales)[row] = finite ? f16_from_f32(scale) : 0x7e00;
            } else if (valid && lane == 0) {
                ((float*)s.scales)[(u64)row * PARTS + part] = scale;
            }
        }
    }
};

template <typename R, int CELLS, int REPLICAS, int TYPE, bool ALIGNED>
DEVICE void encode(const Params& p, const Side& s, u32 block, u32 blocks) {
    typedef Encoder<R, CELLS, REPLICAS> E;
    constexpr int ROWS = THREADS / R::GROUP;
    E::fill(s, shared_memory);
    __syncthreads();
    const int lane = threadIdx.x % R::GROUP;
    // All lanes of a warp take part in shuffles: those past the end repeat the last row and store nothing.
    for (u32 first = block * ROWS; first < s.rows; first += blocks * ROWS) {
        const u32 wanted = first + threadIdx.x / R::GROUP, i = min(wanted, s.rows - 1);
        float x[R::N];
#pragma unroll
        for (int r = 0; r < R::N / 8; r++) load8<TYPE, ALIGNED>(s.x, (u64)i * R::D + R::element(r, lane), x + r * 8);
        const u32 token = i / s.kv_heads, sequence = sequence_of(p, token);
        const Span span = p.spans[sequence];
        const u32 position = span.len - span.new_ + token - span.start;
        const u32 row = locate(p.table + (u64)sequence * p.width, position, p.page_size, p.width, s.kv_heads, i - token * s.kv_heads);
        E::run(s, shared_memory, x, row, lane, wanted < s.rows);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) quantize(const __grid_constant__ Params p) {
    typedef Row<A_HEAD_DIM, A_BITS, A_PACKING, A_SCALING, A_CODE_ALIGN> A;
    typedef Row<B_HEAD_DIM, B_BITS, B_PACKING, B_SCALING, B_CODE_ALIGN> B;
    if constexpr (SAME) {
        // One copy of the code serves both.
        const bool b = blockIdx.x >= p.a_blocks;
        encode<A, A_CELLS, A_CELL_REPLICAS, A_TYPE, A_ALIGNED>(
            p, p.side[b], b ? blockIdx.x - p.a_blocks : blockIdx.x, b ? gridDim.x - p.a_blocks : p.a_blocks);
    } else if (blockIdx.x < p.a_blocks) encode<A, A_CELLS, A_CELL_REPLICAS, A_TYPE, A_ALIGNED>(p, p.side[0], blockIdx.x, p.a_blocks);
    else encode<B, B_CELLS, B_CELL_REPLICAS, B_TYPE, B_ALIGNED>(p, p.side[1], blockIdx.x - p.a_blocks, gridDim.x - p.a_blocks);
}
