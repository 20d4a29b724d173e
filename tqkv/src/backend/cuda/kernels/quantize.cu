// Encodes new vectors of one or two pools (K and V) in one launch. For each side A and B, -D: X_HEAD_DIM, X_BITS, X_PACKING,
// X_SCALING, X_TYPE (of the input), X_ALIGNED (the input, to 16 bytes), X_CODE_ALIGN (bytes), X_CELLS, X_CELL_REPLICAS, X_GRID (cells
// of the tiles' grid; 0: no tiles). For all: ZERO_NORM, PARAMS_BYTES, SAME (the sides differ in nothing). Dynamic shared memory:
// `quantize_shared_bytes`.
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
    const u32* grid;     // see Grid, of which these are members too
    float grid_step, grid_zero;
    float square_root;   // of what its squares are multiplied by
    float per_near;      // what distances to a boundary are multiplied by: below 2 they are near
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

// Where new vectors go.
struct Places {
    const Params& p;
    const Divisor kv_heads, page_size;
    DEVICE Places(const Params& p, const Side& s) : p(p), kv_heads(s.kv_heads), page_size(p.page_size) {}
    DEVICE u32 of(u32 vector) const {
        u32 head;
        const u32 token = kv_heads.divide(vector, head), sequence = sequence_of(p, token);
        const Span span = p.spans[sequence];
        const u32 position = span.len - span.new_ + token - span.start;
        return locate(p.table + (u64)sequence * p.width, position, page_size, p.width, kv_heads.value, head);
    }
};

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
    const Places places(p, s);
    const int lane = threadIdx.x % R::GROUP;
    // All lanes of a warp take part in shuffles: those past the end repeat the last row and store nothing.
    for (u32 first = block * ROWS; first < s.rows; first += blocks * ROWS) {
        const u32 wanted = first + threadIdx.x / R::GROUP, i = min(wanted, s.rows - 1);
        float x[R::N];
#pragma unroll
        for (int r = 0; r < R::N / 8; r++) load8<TYPE, ALIGNED>(s.x, (u64)i * R::D + R::element(r, lane), x + r * 8);
        E::run(s, shared_memory, x, places.of(i), lane, wanted < s.rows);
    }
}

// ---- Tiles: the same bytes by tensor cores
//
// A warp takes eight rows of native codecs at once. Tensor cores do the first stages of the transform: products with +-1 are exact
// and sums nearly so. Norms and sums of levels are added up in any order, codes are found as above. All this is off by far less
// than `near` of tables.rs: so where an element comes nearer than that to a boundary, or a scale to the middle between two f16s, or a norm is out
// of the ordinary, the row is doubtful. Such rows wait in a list, and Encoder does them again.

// d[16 x 8] = a[16 x 16] b[16 x 8], of f16 or bf16.
template <int TYPE> DEVICE void multiply(float (&d)[4], const uint4& a, u32 b0, u32 b1) {
    d[0] = d[1] = d[2] = d[3] = 0;
    if constexpr (TYPE == TYPE_F16) mma(d, a.x, a.y, a.z, a.w, b0, b1);
    else mma_bf16(d, a.x, a.y, a.z, a.w, b0, b1);
}
template <int N> DEVICE void copy_bytes(u8* to, const u8* from) {
    if constexpr (N == 16) *(uint4*)to = *(const uint4*)from;
    else store_bytes<N, N>(to, load_bytes<N, N>(from));
}
template <typename T> DEVICE T sum_of_four(T x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
constexpr int min_of(int a, int b) { return a < b ? a : b; }

// Cells of one size as far as an element can reach, each with at most one boundary and none with one near its end. In shared memory
// lie the cells' boundaries, negated and times `per_near`, and then a word for what is between the boundary of one cell and that of
// the next: the code in its upper bits, the square of the level, in fixed point, in the others. A cell's number is the low bits of
// a float in [2, 4).
template <int CELLS> struct Grid {
    static constexpr int BYTES = ((2 * CELLS + 1) * 4 + 15) / 16 * 16;
    u32 table;
    float step, zero, per_near;
    float to_cell, to_near;  // what a row's elements are multiplied by

    DEVICE Grid(const Side& s, u8* shared) : step(s.grid_step), zero(s.grid_zero), per_near(s.per_near) {
        for (int i = threadIdx.x; i < 2 * CELLS + 1; i += THREADS) ((u32*)shared)[i] = s.grid[i];
        table = opaque(shared_address(shared));
    }
    DEVICE void set_gain(float gain) { to_cell = gain * step, to_near = gain * per_near; }
    // An element's word. Bit 30 of `far` is cleared if a boundary is near.
    DEVICE u32 find(float x, u32& far) const {
        const float cell = __fmaf_rn(x, to_cell, zero);
        const float above = __fmaf_rn(x, to_near, __uint_as_float(load_shared<0>((__float_as_uint(cell) << 2) + table)));
        far &= __float_as_uint(above);
        // Above the boundary the next number.
        return load_shared<CELLS * 4>((__float_as_uint(fma_up(above, 0x1p-64f, cell)) << 2) + table);
    }
};

// R: four lanes a row. Lane 4 g + t holds runs of row g.
template <typename R, int CELLS, int GRID, int TYPE> struct Tile {
    static constexpr int ROWS = 8, RUNS = R::N / 8, STRIDE = (R::BYTES + 15) / 16 * 16 + 16;
    static constexpr int LISTED = 32;  // vectors that wait, at most, a warp
    typedef Encoder<R, CELLS, 1> Exact;
    // In shared memory, after the grid.
    static constexpr int SIGNS = Grid<GRID>::BYTES, CODES = SIGNS + RUNS * 64, LIST = CODES + THREADS / 4 * STRIDE;
    static constexpr int TABLES = LIST + THREADS / 32 * LISTED * 8, BYTES = TABLES + Exact::BYTES;
    static constexpr int PIECE = min_of(16, min_of(R::BYTES & -R::BYTES, R::ALIGN)), PIECES = R::BYTES / PIECE;
    typedef Row<R::D, R::BITS, R::PACKING, R::SCALING, 16, 4> Staged;

    const Side& s;
    const Places places;
    Grid<GRID> grid;
    const int t, g;
    u32 b[4];          // of the transform's first stages: over bits 0 and 2 of an element's number, and t
    uint4 next[RUNS];  // of the next tile's row g, what lane t holds

    DEVICE Tile(const Params& p, const Side& s)
        : s(s), places(p, s), grid(s, shared_memory), t(opaque(threadIdx.x % 4)), g(opaque(threadIdx.x % 32 / 4)) {
        Exact::fill(s, shared_memory + TABLES);
        // Of two neighbours each, where they lie in a word.
        for (int i = threadIdx.x; i < RUNS * 16; i += THREADS) {
            const int e = R::element(i / 16, i / 4 % 4) + i % 4 * 2;
            const u32 signs = s.turn.signs[e / 32] >> e % 32;
            ((u32*)(shared_memory + SIGNS))[i] = (signs & 1) << 15 | (signs & 2) << 30;
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 low = (__popc(t & g / 2) + (i == 3)) & 1, high = (low + g) & 1;
            b[i] = (TYPE == TYPE_F16 ? 0x3c003c00u : 0x3f803f80u) ^ (low << 15 | high << 31);
        }
        __syncthreads();
    }

    // The vector of a tile's row; past the end the last one.
    DEVICE u32 vector(u32 tile, u32 row) const { return min(tile * ROWS + row, s.rows - 1); }
    DEVICE void fetch(u32 tile) {
        const uint4* const from = (const uint4*)((const u16*)s.x + (u64)vector(tile, g) * R::D) + t;
#pragma unroll
        for (int r = 0; r < RUNS; r++) next[r] = __ldcs(from + R::element(r, 0) / 8);
    }

    // What was fetched, rotated but for the norm of the transform.
    DEVICE void rotate(float (&x)[R::N]) const {
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            const uint4 signs = ((const uint4*)(shared_memory + SIGNS))[r * 4 + t];
            const uint4 a = make_uint4(next[r].x ^ signs.x, next[r].y ^ signs.y, next[r].z ^ signs.z, next[r].w ^ signs.w);
            // The product's rows g and g + 8 are words 0 and 2 and words 1 and 3 of row g.
            float low[4], high[4];
            multiply<TYPE>(low, a, b[0], b[1]);
            multiply<TYPE>(high, a, b[2], b[3]);
#pragma unroll
            for (int i = 0; i < 4; i++) x[r * 8 + i] = low[i], x[r * 8 + 4 + i] = high[i];
        }
#pragma unroll
        for (int k = 0; k < R::N; k++)
            if (!(k & 2)) butterfly(x[k], x[k + 2]);
        transform_runs<R>(x);
        reflect<R>(x, s.turn);
    }

    // Encodes a row; whether it is doubtful.
    DEVICE bool encode(float (&x)[R::N], u32 place, bool valid) {
        float sums[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < R::N; k++) sums[k % 4] = __fmaf_rn(x[k], x[k], sums[k % 4]);
        const float squares = sum_of_four((sums[0] + sums[1]) + (sums[2] + sums[3])) * (s.turn.norm * s.turn.norm);
        if (unlikely(__any_sync(~0u, !(squares > 1e-12f && squares < 1e30f)))) return valid;
        const float inverse = rsqrt_approx(squares);
        grid.set_gain(inverse * s.turn.norm * s.unit);
        u32 far = ~0u, sum = 0;
        u8* const staged = shared_memory + CODES + threadIdx.x / 4 * STRIDE;
#pragma unroll
        for (int r = 0; r < RUNS; r++) {
            u32 low = 0, high = 0;
#pragma unroll
            for (int i = 7; i >= 0; i--) {
                const u32 word = grid.find(x[r * 8 + i], far);
                sum += word;
                if (R::FIELD <= 4 || i < 4) low = __funnelshift_l(word, low, R::FIELD);
                else high = __funnelshift_l(word, high, R::FIELD);
            }
            store_run_codes<Staged>(staged, R::element(r, t), (u64)high << 4 * R::FIELD | low);
        }
        // Each of the squares is off by at most a half.
        const float levels = (float)(sum_of_four(sum) << R::FIELD >> R::FIELD), norm = squares * inverse * s.square_root;
        const u16 scale = f16_from_f32(norm * (1 - 0x1p-18f) * rsqrt_approx(levels + R::D / 2));
        const u16 most = f16_from_f32(norm * (1 + 0x1p-18f) * rsqrt_approx(levels - R::D / 2));
        __syncwarp();
        if (valid) {
            u8* const to = s.codes + (u64)place * R::BYTES;
#pragma unroll
            for (int k = 0; k < PIECES; k += 4)
                if (k + t < PIECES) copy_bytes<PIECE>(to + (k + t) * PIECE, staged + (k + t) * PIECE);
            if (t == 0) ((u16*)s.scales)[place] = scale;
        }
        __syncwarp();
        return valid && (scale != most || !(far & 1 << 30));
    }

    // The warp's list: a vector and its place.
    static DEVICE uint2* list() { return (uint2*)(shared_memory + LIST) + threadIdx.x / 32 * LISTED; }
    DEVICE void again(u32 listed) const {
        for (u32 first = 0; first < listed; first += ROWS) {
            const uint2 entry = list()[min(first + g, listed - 1)];
            float x[R::N];
#pragma unroll
            for (int r = 0; r < RUNS; r++) load8<TYPE, true>(s.x, (u64)entry.x * R::D + R::element(r, t), x + r * 8);
            Exact::run(s, shared_memory + TABLES, x, entry.y, t, first + g < listed);
        }
    }

    DEVICE void run(u32 block, u32 blocks) {
        const u32 tiles = (s.rows + ROWS - 1) / ROWS, step = blocks * (THREADS / 32);
        u32 tile = block * (THREADS / 32) + threadIdx.x / 32;
        while (tile < tiles) {
            u32 places_of_four = 0, listed = 0;
            fetch(tile);
            for (u32 quarter = 0; tile < tiles && listed <= LISTED - ROWS; tile += step, quarter = (quarter + 1) % 4) {
                // Lanes find the places of four tiles' rows.
                if (quarter == 0)
                    places_of_four = places.of(vector(min(tile + threadIdx.x % 32 / ROWS * step, tiles - 1), threadIdx.x % ROWS));
                float x[R::N];
                rotate(x);
                fetch(min(tile + step, tiles - 1));
                const u32 place = __shfl_sync(~0u, places_of_four, quarter * ROWS + g);
                u32 doubtful = __ballot_sync(~0u, encode(x, place, tile * ROWS + g < s.rows));
                if (unlikely(doubtful)) {
                    // A bit for each row, where its first lane's is.
                    doubtful |= doubtful >> 1, doubtful = (doubtful | doubtful >> 2) & 0x11111111u;
                    const u32 lane = threadIdx.x % 32;
                    if (doubtful >> lane & 1) list()[listed + __popc(doubtful & ((1u << lane) - 1))] = make_uint2(vector(tile, g), place);
                    listed += __popc(doubtful);
                }
            }
            __syncwarp();
            again(listed);
            __syncwarp();
        }
    }
};

// What a side's blocks do.
template <typename R, int CELLS, int REPLICAS, int GRID, int TYPE, bool ALIGNED> struct Work {
    typedef Tile<Row<R::D, R::BITS, R::PACKING, R::SCALING, R::ALIGN, 4>, CELLS, GRID, TYPE> Tiles;
    // Blocks that a multiprocessor shall hold at once.
    static constexpr int HELD = GRID ? (R::D <= 128 ? 3 : 2) : R::N <= 32 ? 4 : R::N <= 40 ? 3 : 1;
    static constexpr int bytes() {
        if constexpr (GRID > 0) return Tiles::BYTES;
        else return Encoder<R, CELLS, REPLICAS>::BYTES;
    }
    static DEVICE void run(const Params& p, const Side& s, u32 block, u32 blocks) {
        if constexpr (GRID > 0) Tiles(p, s).run(block, blocks);
        else encode<R, CELLS, REPLICAS, TYPE, ALIGNED>(p, s, block, blocks);
    }
};
typedef Work<Row<A_HEAD_DIM, A_BITS, A_PACKING, A_SCALING, A_CODE_ALIGN>, A_CELLS, A_CELL_REPLICAS, A_GRID, A_TYPE, A_ALIGNED> WorkA;
typedef Work<Row<B_HEAD_DIM, B_BITS, B_PACKING, B_SCALING, B_CODE_ALIGN>, B_CELLS, B_CELL_REPLICAS, B_GRID, B_TYPE, B_ALIGNED> WorkB;

extern "C" __device__ u32 quantize_shared_bytes = WorkA::bytes() > WorkB::bytes() ? WorkA::bytes() : WorkB::bytes();

extern "C" __global__ void __launch_bounds__(THREADS, min_of(WorkA::HELD, WorkB::HELD)) quantize(const __grid_constant__ Params p) {
    const bool b = blockIdx.x >= p.a_blocks;
    const u32 block = b ? blockIdx.x - p.a_blocks : blockIdx.x, blocks = b ? gridDim.x - p.a_blocks : p.a_blocks;
    // If both sides are of one kind, one copy of the code serves both.
    if (SAME || !b) WorkA::run(p, p.side[b], block, blocks);
    else WorkB::run(p, p.side[1], block, blocks);
}
