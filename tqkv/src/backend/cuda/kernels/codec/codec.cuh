// A codec is a piece: all that kernels know of how rows hold their elements. A kind of packing implements three interfaces in a file of its own, and stands
// in the three lists below; no kernel names it.
//
// Codec<R, ALIGN>: runs of eight elements in f32, for rows whose addresses are multiples of ALIGN.
//   TABLE                         floats of the table in shared memory that `decode` looks up, from `fill(table, values)`; 0 if there is none
//   Run load(row, element)        what is stored of eight elements
//   level(levels, run, k)         element k of the run without the factor, of levels as they are in memory
//   decode(table, run, k, factor) element k of the run, times the row's factor
//   FIELD, store(row, element, codes)   of scalar quantizers: codes of eight elements in fields of so many bits, as encoders give them
//
// Keys<R, ROW_TILES, PAIRED, PARTS> and Values<R, ROW_TILES, PAIRED, PARTS>: tiles of rows in shared memory (tile.cuh) on tensor cores, by one warp.
// Lane 4 g + t. With PARTS = 2 products are as exact as f32: queries, weights and levels are sums of two numbers, the second what f16 loses of the
// first, and the smallest products are left out.
//   Table, TABLE_BYTES            a table in shared memory: see Levels below; sides with the same Table share it
//   Keys::Query, STEPS            what a lane multiplies a key's fragment with at each step, for eight query rows
//   Keys::query(row, largest, rest, step, t, to_log2)    makes it of a row in f32 (`rest`: of what its rounding loses)
//   Keys::UNITS                   queries are scaled by their largest element, so that scores want `unit(largest)` as a factor
//   Keys::multiply<H>(run, query, dot)     of 16 rows: products with all query rows over span H
//   Keys::squares(run, sum)       of rows without scales, with PARTS = 2: squared lengths of what this lane holds of two rows
//   Values::TILES, element(fragment, g, e)    output fragments of a span, and the element that row g + 8 e of one stands for (-1: none)
//   Values::multiply<H>(run, weights, o)   of 16 rows: adds their products with `W` (Weights) to the fragments of span H
//   Values::FINITE                whatever bits a row holds, its codes stand for finite numbers
#pragma once
#include "codec/floats.cuh"
#include "codec/planes.cuh"
#include "codec/stream.cuh"

template <int PACKING> struct Kind;
template <> struct Kind<PACK_DENSE> {
    template <typename R, int ALIGN> using Codec = StreamRuns<R, ALIGN>;
    template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Keys = LookupKeys<R, Lookup<R, PARTS>, ROW_TILES, PAIRED, PARTS>;
    template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Values = LookupValues<R, Lookup<R, PARTS>, ROW_TILES, PAIRED, PARTS>;
};
template <> struct Kind<PACK_BYTE> : Kind<PACK_DENSE> {};
template <> struct Kind<PACK_F16> {
    template <typename R, int ALIGN> using Codec = FloatRuns<R, TYPE_F16, ALIGN>;
    template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Keys = LookupKeys<R, Halves, ROW_TILES, PAIRED, PARTS>;
    template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Values = LookupValues<R, Halves, ROW_TILES, PAIRED, PARTS>;
};
template <> struct Kind<PACK_F32> {
    template <typename R, int ALIGN> using Codec = FloatRuns<R, TYPE_F32, ALIGN>;
};
template <> struct Kind<PACK_PLANES> {
    template <typename R, int ALIGN> using Codec = PlaneRuns<R, ALIGN>;
    template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Keys = PlaneKeys<R, ROW_TILES, PAIRED, PARTS>;
    template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Values = PlaneValues<R, ROW_TILES, PAIRED, PARTS>;
};
template <typename R, int ALIGN> using Codec = typename Kind<R::PACKING>::template Codec<R, ALIGN>;
template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Keys = typename Kind<R::PACKING>::template Keys<R, ROW_TILES, PAIRED, PARTS>;
template <typename R, int ROW_TILES, bool PAIRED, int PARTS> using Values = typename Kind<R::PACKING>::template Values<R, ROW_TILES, PAIRED, PARTS>;
