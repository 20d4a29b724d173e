// How a block of attention.cu divides its shared memory, and what follows from its macros.
#pragma once
#include "attention/params.cuh"
#include "codec/codec.cuh"

typedef Row<K_DIM, K_BITS, K_PACKING, K_SCALING> K;
typedef Row<V_DIM, V_BITS, V_PACKING, V_SCALING> V;
typedef Keys<K, TILES_N, NARROW, Q_PARTS> KeyCodec;
typedef Values<V, TILES_N, NARROW, Q_PARTS> ValueCodec;
typedef typename KeyCodec::Query Query;

constexpr int THREADS = WARPS * 32;
constexpr int ROWS = 8 * TILES_N;
constexpr int COLUMNS = NARROW ? 1 : 2;  // query rows of a lane, for each eight
constexpr int FRAGMENTS = ValueCodec::FRAGMENTS;
#ifndef SUB_RUNS
#define SUB_RUNS (TILE / 16)
#endif
constexpr int SUB = TILES_N == 1 ? SUB_RUNS : 1;  // runs of 16 positions whose scores are held at once

// A block's shared memory; the host computes the same (layout.rs).
struct Layout {
    static constexpr bool SHARED_TABLE = Same<typename KeyCodec::Table, typename ValueCodec::Table>::value;
    static constexpr int K_TABLE = 0, AFTER_K = KeyCodec::Table::BYTES;
    static constexpr int V_TABLE = SHARED_TABLE ? K_TABLE : AFTER_K;
    static constexpr int TABLES = AFTER_K + (SHARED_TABLE ? 0 : ValueCodec::Table::BYTES);

    static constexpr int K_SCALES = TILE * (K::BYTES + V::BYTES), V_SCALES = K_SCALES + TILE * K::SCALES * K::SCALE_BYTES;
    static constexpr int STAGE = (V_SCALES + TILE * V::SCALES * V::SCALE_BYTES + 127) / 128 * 128;  // keys, values, their scales
    static constexpr int PIPES = TABLES;                               // [WARPS][STAGES][STAGE]
    static constexpr int ACC = PIPES + WARPS * STAGES * STAGE;         // f32 [ROWS][V::D + 4]: sums
    static constexpr int ACC_ROW = V::D + 4;
    static constexpr int QUERIES = ACC + ROWS * ACC_ROW * 4;           // f32 [ROWS][K::D + 4]: the next item's queries
    static constexpr int QUERY_ROW = K::D + 4;
    static constexpr int SCRATCH = QUERIES + ROWS * QUERY_ROW * 4;     // f32 [WARPS][512], or levels
    static constexpr int Q = SCRATCH + WARPS * 2048;                   // queries as fragments
    static constexpr bool Q_REGISTERS = TILES_N * K::D * (NARROW ? 1 : Q_PARTS) <= 256;         // those of the item at work are kept in registers
    static constexpr int ML = Q + TILES_N * KeyCodec::STEPS * 32 * (int)sizeof(Query);
    // Per warp m and l; the block's M and L, queries' largest, units, biases, and those that come next (EXACT: sizes and lengths, of both);
    // a flag.
    static constexpr int MAXIMA = (WARPS + 1) * ROWS * (int)sizeof(Real);
    static constexpr int BYTES = ML + MAXIMA + (WARPS + 5 + (EXACT ? 4 : 0)) * ROWS * 4 + 16;
};
static_assert(Layout::BYTES == SHARED_BYTES, "as the host has it");
extern __shared__ __align__(128) u8 shared_memory[];

// The query row that column `c` of lane t's fragments stands for.
DEVICE constexpr int tile_row(int n, int t, int c) { return n * 8 + (NARROW ? t : 2 * t + c); }
