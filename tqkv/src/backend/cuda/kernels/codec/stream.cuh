// Codes in a little-endian bit stream, or one a byte, looked up in a table of levels.
//
// Tensor cores want values in pairs: two neighbours of one row (keys) or one element of two rows (values), so where it fits a look-up
// takes as many codes as it can: of 2 bits four codes for two pairs, of 4 bits two codes for a pair, of 5 to 8 bits one code.
#pragma once
#include "codec/bytes.cuh"
#include "codec/tile.cuh"

// What scalar quantizers share: a table of levels in f32, replicated so that neighbouring lanes read different banks, and codes of eight
// elements in fields of FIELD_ bits of one word. What lies above a code is anything.
template <typename R, int FIELD_> struct CodeRuns {
    typedef u64 Run;
    static constexpr int FIELD = FIELD_;
    static constexpr int REPLICAS = R::LEVELS <= 32 ? 32 : 1024 / R::LEVELS;
    static constexpr int TABLE = R::LEVELS * REPLICAS;

    // `values` has one for each level.
    static DEVICE void fill(float* table, const float* values, int thread, int threads) {
        for (int i = thread; i < TABLE; i += threads) table[i] = values[i / REPLICAS];
    }
    // The level of element k of a run, as `levels` has them.
    static DEVICE float level(const float* levels, Run run, int k) { return levels[(u32)(run >> k * FIELD) & (R::LEVELS - 1)]; }
    // Of the code that is not masked yet.
    static DEVICE float look(const float* table, u32 code) { return table[(code & (R::LEVELS - 1)) * REPLICAS + threadIdx.x % REPLICAS]; }
    static DEVICE float decode(const float* table, Run run, int k, float factor) {
        return __fmul_rn(look(table, (u32)(run >> k * FIELD)), factor);
    }
};

template <typename R, int ALIGN> struct StreamRuns : CodeRuns<R, R::STORED> {
    static constexpr int OWN = R::STORED & -R::STORED, UNIT = OWN < ALIGN ? OWN : ALIGN;
    static DEVICE u64 load(const u8* row, int element) { return load_bytes<R::STORED, UNIT>(row + element / 8 * R::STORED); }
    // Nothing may lie above a code.
    static DEVICE void store(u8* row, int element, u64 codes) { store_bytes<R::STORED, UNIT>(row + element / 8 * R::STORED, codes); }
};

// Words of a row's bits to f16 pairs, by the table of either part.
template <typename R, int PARTS> struct Lookup {
    static constexpr int BITS = R::STORED;
    typedef LevelTable<R, BITS, PARTS> Table;
    static constexpr bool FINITE = true;

    // Code I of a row, one look-up.
    template <int I> static DEVICE u32 code(const u8* table, const u32* words, u32 lane) {
        if constexpr (BITS == 8) return look(table, byte_line<I % 4>(words[I / 4], lane));
        else return look(table, bit_line<I * BITS, BITS>(words, lane));
    }
    // The pair of codes I of row a and J of row b.
    template <int I, int J> static DEVICE u32 pair(const u8* table, const u32* a, const u32* b, u32 lane) {
        const u32 x = code<I>(table, a, lane), y = code<J>(table + (Table::HALVES ? 128 << BITS : 0), b, lane);
        return Table::HALVES ? f16x2_add(x, y) : __byte_perm(x, y, 0x5410);
    }
    // Codes I to I + 3 of a row: two pairs of neighbours.
    template <int I> static DEVICE void row(const u32* w, const u8* table, u32 lane, u32& x, u32& y) {
        if constexpr (BITS == 4) {
            x = look(table, byte_line<I / 2 % 4>(w[I / 8], lane));
            y = look(table, byte_line<I / 2 % 4 + 1>(w[I / 8], lane));
        } else {
            x = pair<I, I + 1>(table, w, w, lane), y = pair<I + 2, I + 3>(table, w, w, lane);
        }
    }
    // Codes I to I + 3 of two rows as a key's fragment: (row a, row b) of the first pair, (row a, row b) of the second.
    template <int I> static DEVICE void keys(const u32* a, const u32* b, const u8* table, u32 lane, u32 (&x)[4]) {
        if constexpr (BITS == 2) {
            // The rows' pairs merged, so that what a look-up gives lies in neighbouring registers of the fragment.
            constexpr u32 M = 0x0f0f0f0f;
            const u32 p = a[I / 16], q = b[I / 16];
            const uint2 first = look2(table, byte_line<I / 4 % 4>(merge<M>(p, q << 4), lane));
            const uint2 second = look2(table, byte_line<I / 4 % 4>(merge<M>(p >> 4, q), lane));
            x[0] = first.x, x[1] = first.y, x[2] = second.x, x[3] = second.y;
        } else {
            row<I>(a, table, lane, x[0], x[2]);
            row<I>(b, table, lane, x[1], x[3]);
        }
    }
    template <int I> static DEVICE void rows2(const u32* a, const u32* b, const u8* table, u32 lane, u32& x, u32& y) {
        if constexpr (BITS == 4) {
            constexpr u32 M = 0x0f0f0f0f;
            u32 p = a[I / 8], q = b[I / 8];
            x = look(table, byte_line<I / 2 % 4>(merge<M>(p, q << 4), lane));
            y = look(table, byte_line<I / 2 % 4>(merge<M>(p >> 4, q), lane));
        } else {
            x = pair<I, I>(table, a, b, lane), y = pair<I + 1, I + 1>(table, a, b, lane);
        }
    }
    // Codes I to I + 3 of two rows, I even (beyond the last code: unspecified), as a value's fragments: element by element the pair
    // (row a, row b). Merging the rows' codes first, so that one index holds both, halves the look-ups. The order of the four is
    // that of `element`: two for each of two fragments (PAIR), or for the one that is left.
    template <bool PAIR, int I> static DEVICE void rows(const u32* a, const u32* b, const u8* table, u32 lane, u32 (&x)[4]) {
        if constexpr (BITS == 2) {
            static_assert(I % 4 == 0, "a look-up spans four codes");
            constexpr u32 M = 0x33333333;
            const u32 p = a[I / 16], q = b[I / 16];
            const uint2 even = look2(table, byte_line<I / 4 % 4>(merge<M>(p, q << 2), lane));
            const uint2 odd = look2(table, byte_line<I / 4 % 4>(merge<M>(p >> 2, q), lane));
            x[0] = even.x, x[1] = PAIR ? even.y : odd.x, x[2] = odd.x, x[3] = odd.y;
        } else {
            rows2<I>(a, b, table, lane, x[0], x[1]);
            rows2<I + 2>(a, b, table, lane, x[2], x[3]);
        }
    }
    static DEVICE constexpr int element(int fragment, int fragments, int e) {
        return BITS == 2 && (fragment | 1) < fragments ? fragment / 2 * 4 + fragment % 2 + e * 2 : fragment * 2 + e;
    }
};

// What f16 loses of a number.
DEVICE float lost_by_f16(float x) { return x - f32_from_f16(f16_from_f32(x)); }

// Keys whose words DECODE turns to f16 pairs.
template <typename R, typename DECODE, int ROW_TILES, bool PAIRED, int PARTS> struct LookupKeys {
    typedef typename DECODE::Table Table;
    static constexpr bool UNITS = false;
    static constexpr int SPAN_STEPS = R::SPAN / 16, STEPS = R::D / 16;
    typedef Lane<R, R::SPANS, R::SPAN * R::STORED, R::SPAN / 4 * R::STORED> Part;
    // PAIRED columns hold both parts.
    static constexpr int QUERY_WORDS = PAIRED ? 2 : 2 * PARTS;
    struct __align__(4 * QUERY_WORDS) Query {
        u32 word[QUERY_WORDS];
    };
    Part part;
    const u8* table;
    u32 lane;

    DEVICE LookupKeys(const float*) {}
    DEVICE void init(const u8* table_, int lane_) {
        table = table_, lane = opaque(Table::lane_offset(lane_));
        part.init(fragment_row(lane_ >> 2), lane_ & 3);
    }
    DEVICE float unit(float) const { return 1.f; }
    static DEVICE Query query(const float* row, float, bool rest, int step, int t, float to_log2) {
        const float* const x = row + step / SPAN_STEPS * R::SPAN + t * (R::SPAN / 4) + step % SPAN_STEPS * 4;
        float v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            v[k] = x[k] * to_log2;
            if (rest) v[k] = lost_by_f16(v[k]);
        }
        Query out;
        out.word[0] = f16x2_from_f32(v[0], v[1]), out.word[1] = f16x2_from_f32(v[2], v[3]);
        if constexpr (QUERY_WORDS > 2) {
            out.word[2] = f16x2_from_f32(lost_by_f16(v[0]), lost_by_f16(v[1]));
            out.word[3] = f16x2_from_f32(lost_by_f16(v[2]), lost_by_f16(v[3]));
        }
        return out;
    }
    // Where f16 is all there is, the squared length of a row's part that this lane holds, of the row of the run's upper half and of the lower.
    DEVICE void squares(const u8* run, float (&sum)[2]) const {
        if constexpr (!R::CODED) {
            u32 w[Part::WORDS + 2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                part.template load<0>(w, run + half * 8 * R::BYTES);
                sum[half] = 0.f;
#pragma unroll
                for (int k = 0; k < Part::WORDS; k++) {
                    const float lower = f32_from_f16((u16)w[k]), upper = f32_from_f16((u16)(w[k] >> 16));
                    sum[half] += lower * lower + upper * upper;
                }
            }
        }
    }
    template <int H, typename QUERY> DEVICE void multiply(const u8* run, const QUERY& query, float (&dot)[ROW_TILES][4]) const {
        u32 a[Part::WORDS + 2], b[Part::WORDS + 2];
        part.template load<H>(a, run);
        part.template load<H>(b, run + 8 * R::BYTES);
        repeat<SPAN_STEPS>([&](auto j) {
            constexpr int J = decltype(j)::value;
            u32 k[4], rest[4];
            DECODE::template keys<4 * J>(a, b, table, lane, k);
            if constexpr (Table::PARTS > 1) DECODE::template keys<4 * J>(a, b, table + Table::PART_BYTES, lane, rest);
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                const Query x = query(n, H * SPAN_STEPS + J);
                if constexpr (PARTS == 1) {
                    mma(dot[n], k[0], k[1], k[2], k[3], x.word[0], x.word[1]);
                } else {
                    // Tensor cores cut sums off instead of rounding them: every step has a sum of its own, the smallest first.
                    float step[4] = {};
                    if constexpr (Table::PARTS > 1) mma(step, rest[0], rest[1], rest[2], rest[3], x.word[0], x.word[1]);
                    if constexpr (!PAIRED) mma(step, k[0], k[1], k[2], k[3], x.word[QUERY_WORDS - 2], x.word[QUERY_WORDS - 1]);
                    mma(step, k[0], k[1], k[2], k[3], x.word[0], x.word[1]);
#pragma unroll
                    for (int e = 0; e < 4; e++) dot[n][e] += step[e];
                }
            }
        });
        if constexpr (PAIRED)
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) dot[n][0] += dot[n][1], dot[n][2] += dot[n][3];
    }
};

// Weights of 16 positions as fragments, with their low parts in columns of their own (PAIRED) or besides.
template <int ROW_TILES, bool PAIRED, int PARTS> struct Weights {
    static constexpr int N = PAIRED ? 1 : PARTS;
    u32 b0[N][ROW_TILES], b1[N][ROW_TILES];

    // Of row tile n: two rows' weights of a lane's position (PAIRED: one row's, y is 0), and those of the position 8 further.
    DEVICE void set(int n, float x0, float y0, float x1, float y1) {
        if (PAIRED && PARTS > 1) y0 = lost_by_f16(x0), y1 = lost_by_f16(x1);
        b0[0][n] = transpose8(f16x2_from_f32(x0, y0)), b1[0][n] = transpose8(f16x2_from_f32(x1, y1));
        if constexpr (N > 1) {
            b0[1][n] = transpose8(f16x2_from_f32(lost_by_f16(x0), lost_by_f16(y0)));
            b1[1][n] = transpose8(f16x2_from_f32(lost_by_f16(x1), lost_by_f16(y1)));
        }
    }
    // Adds a value's part, of which the lower is not multiplied by the weights' low parts.
    template <int PART, int FRAGMENT, int FRAGMENTS> DEVICE void multiply(float (&o)[ROW_TILES][FRAGMENTS][4], u32 a0, u32 a1, u32 a2, u32 a3) const {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            if constexpr (N > 1 && PART == 0) mma(o[n][FRAGMENT], a0, a1, a2, a3, b0[1][n], b1[1][n]);
            mma(o[n][FRAGMENT], a0, a1, a2, a3, b0[0][n], b1[0][n]);
        }
    }
};

template <typename R, typename DECODE, int ROW_TILES, bool PAIRED, int PARTS> struct LookupValues {
    typedef typename DECODE::Table Table;
    typedef Weights<ROW_TILES, PAIRED, PARTS> W;
    static constexpr bool FINITE = DECODE::FINITE;
    static constexpr int TILES = R::SPAN / 16, FRAGMENTS = R::SPANS * TILES;
    typedef Lane<R, R::SPANS, R::SPAN * R::STORED, R::SPAN / 8 * R::STORED> Part;
    Part part[2];
    const u8* table;
    u32 lane;

    DEVICE void init(const u8* table_, int lane_) {
        table = table_, lane = opaque(Table::lane_offset(lane_));
        part[0].init(lane_ & 3, lane_ >> 2), part[1].init((lane_ & 3) + 4, lane_ >> 2);
    }
    static DEVICE int element(int fragment, int g, int e) {
        return fragment / TILES * R::SPAN + g * (R::SPAN / 8) + DECODE::element(fragment % TILES, TILES, e);
    }
    template <int H> DEVICE void multiply(const u8* run, const W& weights, float (&o)[ROW_TILES][FRAGMENTS][4]) const {
        u32 x0[Part::WORDS + 2], x1[Part::WORDS + 2], x2[Part::WORDS + 2], x3[Part::WORDS + 2];
        part[0].template load<H>(x0, run);
        part[1].template load<H>(x1, run);
        part[0].template load<H>(x2, run + 8 * R::BYTES);
        part[1].template load<H>(x3, run + 8 * R::BYTES);
        repeat<TILES, 2>([&](auto i) {
            constexpr int I = decltype(i)::value;
            repeat<Table::PARTS>([&](auto part) {
                constexpr int PART = Table::PARTS - 1 - decltype(part)::value;
                u32 a[4], b[4];
                DECODE::template rows<(I + 1 < TILES), 2 * I>(x0, x1, table + PART * Table::PART_BYTES, lane, a);
                DECODE::template rows<(I + 1 < TILES), 2 * I>(x2, x3, table + PART * Table::PART_BYTES, lane, b);
                weights.template multiply<PART, H * TILES + I>(o, a[0], a[1], b[0], b[1]);
                if constexpr (I + 1 < TILES) weights.template multiply<PART, H * TILES + I + 1>(o, a[2], a[3], b[2], b[3]);
            });
        });
    }
};
