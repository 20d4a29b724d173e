// Rows of native codecs by tensor cores, with the same bytes as ScalarEncoder's.
//
// A warp takes eight rows at once. Tensor cores do the first stages of the transform: products with +-1 are exact and sums nearly so.
// Norms and sums of levels are added up in any order. All this is off by far less than `near` of tables.rs: so where an element comes
// nearer than that to a boundary, or a scale to the middle between two f16s, or a norm is out of the ordinary, the row is doubtful. Such
// rows wait in a list, and the encoder does them again. A word that holds a level's square leaves so many bits to the code that wider codes
// do not fit: see MOST_BITS of tables.rs.
#pragma once
#include "codec/encoder.cuh"

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

// Cells of one size as far as an element can reach, each with at most one boundary and none with one near its end. In shared memory
// lie the cells' boundaries, negated and times `per_near`, and then a word for what is between the boundary of one cell and that of
// the next: the code in its upper bits, the square of the level, in fixed point, in the others. A cell's number is the low bits of
// a float in [2, 4).
template <int CELLS> struct Grid {
    static constexpr int BYTES = ((2 * CELLS + 1) * 4 + 15) / 16 * 16;
    u32 table;
    float step, zero, per_near;
    float to_cell, to_near;  // what a row's elements are multiplied by

    DEVICE Grid(const Input& s, u8* shared) : step(s.grid_step), zero(s.grid_zero), per_near(s.per_near) {
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

// Four lanes a row: lane 4 g + t holds runs of row g. PLACES finds a vector's row in the pool, or NOWHERE.
template <typename R, int ALIGN, int CELLS, int GRID, int TYPE, typename PLACES> struct Tile {
    typedef Shape<R::D, 4> S;
    typedef Codec<R, ALIGN> C;
    static constexpr int ROWS = 8, RUNS = S::N / 8, STRIDE = (R::BYTES + 15) / 16 * 16 + 16;
    static constexpr int LISTED = 32;  // vectors that wait, at most, a warp
    typedef Encoder<R, S, C, CELLS, 1> Exact;
    // In shared memory, after the grid.
    static constexpr int SIGNS = Grid<GRID>::BYTES, CODES = SIGNS + RUNS * 64, LIST = CODES + THREADS / 4 * STRIDE;
    static constexpr int TABLES = LIST + THREADS / 32 * LISTED * 8, BYTES = TABLES + Exact::BYTES;
    static constexpr int PIECE = min_of(16, min_of(R::BYTES & -R::BYTES, ALIGN)), PIECES = R::BYTES / PIECE;

    const Input& s;
    const PLACES places;
    Grid<GRID> grid;
    const int t, g;
    u32 b[4];          // of the transform's first stages: over bits 0 and 2 of an element's number, and t
    uint4 next[RUNS];  // of the next tile's row g, what lane t holds

    DEVICE Tile(const Input& s, const PLACES& places)
        : s(s), places(places), grid(s, shared_memory), t(opaque(threadIdx.x % 4)), g(opaque(threadIdx.x % 32 / 4)) {
        Exact::fill(s, shared_memory + TABLES);
        // Of two neighbours each, where they lie in a word.
        for (int i = threadIdx.x; i < RUNS * 16; i += THREADS) {
            const int e = S::element(i / 16, i / 4 % 4) + i % 4 * 2;
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
        for (int r = 0; r < RUNS; r++) next[r] = __ldcs(from + S::element(r, 0) / 8);
    }

    // What was fetched, rotated but for the norm of the transform.
    DEVICE void rotate(float (&x)[S::N]) const {
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
        for (int k = 0; k < S::N; k++)
            if (!(k & 2)) butterfly(x[k], x[k + 2]);
        transform_runs<S>(x);
        reflect<S>(x, s.turn);
    }

    // Encodes a row; whether it is doubtful.
    DEVICE bool encode(float (&x)[S::N], u32 place, bool valid) {
        float sums[4] = {0, 0, 0, 0};
#pragma unroll
        for (int k = 0; k < S::N; k++) sums[k % 4] = __fmaf_rn(x[k], x[k], sums[k % 4]);
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
                if (C::FIELD <= 4 || i < 4) low = __funnelshift_l(word, low, C::FIELD);
                else high = __funnelshift_l(word, high, C::FIELD);
            }
            Codec<R, 16>::store(staged, S::element(r, t), (u64)high << 4 * C::FIELD | low);
        }
        // Each of the squares is off by at most a half.
        const float levels = (float)(sum_of_four(sum) << C::FIELD >> C::FIELD), norm = squares * inverse * s.square_root;
        const u16 scale = f16_from_f32(norm * (1 - 0x1p-18f) * rsqrt_approx(levels + R::D / 2));
        const u16 most = f16_from_f32(norm * (1 + 0x1p-18f) * rsqrt_approx(levels - R::D / 2));
        __syncwarp();
        if (valid) {
            u8* const to = s.codes + codes_at<R>(s.strides, place);
#pragma unroll
            for (int k = 0; k < PIECES; k += 4)
                if (k + t < PIECES) copy_bytes<PIECE>(to + (k + t) * PIECE, staged + (k + t) * PIECE);
            if (t == 0) *(u16*)(s.scales + scales_at<R>(s.strides, place)) = scale;
        }
        __syncwarp();
        return valid && (scale != most || !(far & 1 << 30));
    }

    // The warp's list: a vector and its place.
    static DEVICE uint2* list() { return (uint2*)(shared_memory + LIST) + threadIdx.x / 32 * LISTED; }
    DEVICE void again(u32 listed) const {
        for (u32 first = 0; first < listed; first += ROWS) {
            const uint2 entry = list()[min(first + g, listed - 1)];
            float x[S::N];
#pragma unroll
            for (int r = 0; r < RUNS; r++) load8<TYPE, true>(s.x, (u64)entry.x * R::D + S::element(r, t), x + r * 8);
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
                float x[S::N];
                rotate(x);
                fetch(min(tile + step, tiles - 1));
                const u32 place = __shfl_sync(~0u, places_of_four, quarter * ROWS + g);
                u32 doubtful = __ballot_sync(~0u, encode(x, place, tile * ROWS + g < s.rows && place != NOWHERE));
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
