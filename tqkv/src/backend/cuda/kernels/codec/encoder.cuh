// How vectors become rows: what quantize.cu asks of a codec. A kind of packing stands in the list at the end.
//
//   BYTES, fill(side, shared)            tables in shared memory
//   run(side, shared, x, row, lane, valid)    encodes a vector, which the lanes of a group hold (S), as row `row`; rows that are not `valid` store nothing
#pragma once
#include "codec/codec.cuh"

constexpr int THREADS = 256;  // of a block
constexpr u32 NOWHERE = ~0u;  // the row of a vector that is not stored
constexpr int min_of(int a, int b) { return a < b ? a : b; }
extern __shared__ __align__(16) u8 shared_memory[];

// New vectors of one side, and what they are encoded with.
struct Input {
    const void* x;         // [tokens, kv_heads, WIDTH]
    const float* channels; // [3, kv_heads, WIDTH]: shift, 1 / scale, scale; or null
    u8* codes;
    u8* scales;
    const uint2* cells;    // [CELLS]: boundary (f32 bits), boundaries below
    const float* squares;  // [LEVELS]: level * level
    Turn turn;
    u32 kv_heads, rows;    // rows = tokens * kv_heads
    float unit;            // sqrt(D), or what block scales are multiplied by
    float per_cell;        // cells in a unit, a power of two
    float limit;           // elements beyond are in the outermost cell
    float first_cell;      // 1.5 * 2^23, plus the cell that holds zero
    const u32* grid;       // see Grid in tile_encoder.cuh, of which these are members too
    float grid_step, grid_zero;
    float square_root;     // of what its squares are multiplied by
    float per_near;        // what distances to a boundary are multiplied by: below 2 they are near
    RowStrides strides;
};

DEVICE bool is_finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// A code is the number of decision boundaries below an element. To find it without a search, the line is cut into cells of one
// size, each with at most one boundary: an entry holds the cell's boundary and the number of those below it.
template <typename R, typename S, typename C, int CELLS, int REPLICAS> struct ScalarEncoder {
    static constexpr int CELL_BYTES = CELLS * REPLICAS * 8;
    static constexpr int BYTES = CELL_BYTES + C::TABLE * 4;

    static DEVICE void fill(const Input& s, u8* shared) {
        for (int i = threadIdx.x; i < CELLS * REPLICAS; i += THREADS) ((uint2*)shared)[i] = s.cells[i / REPLICAS];
        C::fill((float*)(shared + CELL_BYTES), s.squares, threadIdx.x, THREADS);
    }

    // A run of eight elements to packed codes; `x` becomes the squares of their levels. A zero vector has gain 0: its elements
    // get the code below the boundary at zero.
    static DEVICE u64 assign(const Input& s, const u8* shared, float* x, float gain) {
        // The sum with `first_cell` has the cell's number in its low bits.
        const u32 base = threadIdx.x % REPLICAS * 8 - 0x4b400000u * (REPLICAS * 8);
        const float* squares = (const float*)(shared + CELL_BYTES) + threadIdx.x % C::REPLICAS;
        u32 low = 0, high = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const float u = fminf(fmaxf(x[i] * gain, -s.limit), s.limit);
            const u32 at = __float_as_uint(__fmaf_rn(u, s.per_cell, s.first_cell)) * (REPLICAS * 8) + base;
            const uint2 cell = *(const uint2*)(shared + at);
            const u32 code = cell.y + (u > __uint_as_float(cell.x));
            if (R::SCALING == SCALE_CORRECTED) x[i] = squares[code * C::REPLICAS];
            const int bit = i * C::FIELD;
            if (bit < 32) low |= code << bit;
            if (bit < 32 && bit + C::FIELD > 32) high |= code >> (32 - bit);
            if (bit >= 32) high |= code << (bit - 32);
        }
        return (u64)high << 32 | low;
    }

    static DEVICE void run(const Input& s, const u8* shared, float (&x)[S::N], u32 row, int lane, bool valid) {
        u8* const codes = s.codes + codes_at<R>(s.strides, row);
        u8* const scales = s.scales + scales_at<R>(s.strides, row);
        rotate<S>(x, s.turn, lane);
        constexpr int PARTS = R::SCALING == SCALE_BLOCK_RMS ? R::SCALES : 1, PART = S::N / PARTS, RUNS = S::RUNS / PARTS;
#pragma unroll
        for (int part = 0; part < PARTS; part++) {
            float square[PART];
#pragma unroll
            for (int k = 0; k < PART; k++) square[k] = x[part * PART + k] * x[part * PART + k];
            const float sum = fold_squares<S::GROUP, RUNS, S::BLOCKS>(square);
            const float norm = __fsqrt_rn(R::SCALING == SCALE_BLOCK_RMS ? __fdiv_rn(sum, 256.f) : sum);
            const bool finite = is_finite(norm);
            const float gain = norm <= ZERO_NORM ? 0.f : __fmul_rn(__fdiv_rn(1.f, norm), s.unit);
#pragma unroll
            for (int r = part * PART / 8; r < (part + 1) * PART / 8; r++) {
                const u64 packed = assign(s, shared, x + r * 8, gain);
                if (valid) C::store(codes, S::element(r, lane), finite ? packed : 0);
            }
            float scale = finite ? norm : __uint_as_float(0x7fc00000u);
            if constexpr (R::SCALING == SCALE_CORRECTED) {
                scale = __fdiv_rn(norm, __fsqrt_rn(fold_squares<S::GROUP, RUNS, S::BLOCKS>(x)));
                if (valid && lane == 0) *(u16*)scales = finite ? f16_from_f32(scale) : 0x7e00;
            } else if (valid && lane == 0) {
                ((float*)scales)[part] = scale;
            }
        }
    }
};

template <typename R, typename S, typename C> struct FloatEncoder {
    static constexpr int BYTES = 0;
    static DEVICE void fill(const Input&, u8*) {}
    static DEVICE void run(const Input& s, const u8*, float (&x)[S::N], u32 row, int lane, bool valid) {
        if (valid)
#pragma unroll
            for (int r = 0; r < S::N / 8; r++) C::store(s.codes + codes_at<R>(s.strides, row), S::element(r, lane), x + r * 8);
    }
};

template <int PACKING> struct EncoderKind {
    template <typename R, typename S, typename C, int CELLS, int REPLICAS> using Encoder = ScalarEncoder<R, S, C, CELLS, REPLICAS>;
};
template <> struct EncoderKind<PACK_F16> {
    template <typename R, typename S, typename C, int, int> using Encoder = FloatEncoder<R, S, C>;
};
template <> struct EncoderKind<PACK_F32> : EncoderKind<PACK_F16> {};
template <typename R, typename S, typename C, int CELLS, int REPLICAS>
using Encoder = typename EncoderKind<R::PACKING>::template Encoder<R, S, C, CELLS, REPLICAS>;
