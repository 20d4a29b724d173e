// 3 bits: a row is three planes of nibbles, of whose top bits a fourth is made (docs/format.md).
//
// Keys are not looked up: a nibble is what PRMT takes to select one of eight bytes, so the levels are held in registers, as fixed-point numbers
// of two bytes, and queries are integers too. Values are looked up in pairs. Where a plane is whole 16-byte chunks (MATRICES) both are
// read as matrices, of which values' are transposed, so that a word has two rows' nibbles of the same elements; elsewhere two
// rows are merged as those of 4 bits are, in a table that ignores the top bits.
#pragma once
#include "codec/stream.cuh"

template <typename R, int ALIGN> struct PlaneRuns : CodeRuns<R, 4> {
    static DEVICE u64 load(const u8* row, int element) {
        const u32 a = row[element / 8], b = row[(R::D + element) / 8], c = row[(2 * R::D + element) / 8];
        return a | b << 8 | c << 16 | ((a >> 3 & 0x11) | (b >> 2 & 0x22) | (c >> 1 & 0x44)) << 24;
    }
    static DEVICE void store(u8* row, int element, u64 codes) {
        const u32 run = (u32)codes;
#pragma unroll
        for (int plane = 0; plane < 3; plane++) row[(plane * R::D + element) / 8] = (u8)(run >> 8 * plane | (run >> (24 + plane) & 0x11) << 3);
    }
};

// The fourth plane's nibbles; their top bits are anything.
DEVICE u32 fourth_plane(u32 a, u32 b, u32 c) { return merge<0x33333333>(merge<0x11111111>(a >> 3, b >> 2), c >> 1); }
// The element of nibble `i` of plane `plane`.
DEVICE constexpr int plane_element(int plane, int i) { return i / 2 * 8 + plane * 2 + i % 2; }

template <int D> struct Planes {
    static constexpr bool MATRICES = D % 128 == 0;
    static constexpr int NIBBLES = D / 16;                // of a key lane's quarter of a plane
    static constexpr int WORDS = (NIBBLES + 7) / 8;
    static constexpr int HALF = (NIBBLES + 1) / 2;        // codes of a value lane in a plane: every other nibble of a quarter
    static constexpr int CHUNKS = D < 128 ? 1 : D / 128;  // of a plane, where they are read as matrices
    // Rows of matrices: of the two halves of a run, in two planes.
    static DEVICE u32 matrix(int lane) { return ((lane & 7) >> 1) + (lane & 1) * 4 + (lane & 8); }
};

// The eight levels (of the native codebook: no other has 3 bits) as 16-bit integers, +-3703, 11422, 20304 and 32512, each to half
// a unit, split into two signed bytes: level = high * 256 + low. With PARTS = 2 a third byte follows: levels are 24-bit integers.
__device__ const uint4 LEVEL_BYTES = {0xf2d3b181, 0x7f4f2d0e, 0x8962b000, 0x00509e77};
__device__ const uint4 LOWEST_BYTES = {0x1221f700, 0x0009dfee, 0, 0};

template <typename R, int ROW_TILES, bool PAIRED, int PARTS> struct PlaneKeys {
    typedef NoTable Table;
    typedef Planes<R::D> P;
    static constexpr bool UNITS = true, MATRICES = P::MATRICES;
    static constexpr int WORDS = P::WORDS, STEPS = 4 * WORDS, BYTES = PARTS + 1;  // of a level, and of a query's element
    // Units of the lowest byte.
    static constexpr float UNIT = PARTS > 1 ? 256.f : 1.f;
    static constexpr float LARGEST_LEVEL = 32512.f * UNIT, LARGEST_QUERY = (R::D > 512 ? 16256.f : 32512.f) * UNIT;  // so that sums fit 32 bits
    // Two words of each of the queries' bytes, the highest first; a column of a pair has every other of them.
    static constexpr int QUERY_WORDS = PAIRED ? 2 * PARTS : 2 * BYTES;
    struct __align__(QUERY_WORDS == 6 ? 8 : 4 * QUERY_WORDS) Query {
        u32 word[QUERY_WORDS];
    };
    typedef Lane<R, 3, R::D, R::D / 4> Part;
    u32 level_bytes[BYTES][2];  // the highest first
    float top;  // the largest level
    Part part;
    u32 matrices;

    DEVICE PlaneKeys(const float* levels) {
        load_volatile4(level_bytes[0][0], level_bytes[0][1], level_bytes[1][0], level_bytes[1][1], &LEVEL_BYTES);
        u32 none;
        if constexpr (PARTS > 1) load_volatile4(level_bytes[2][0], level_bytes[2][1], none, none, &LOWEST_BYTES);
        top = levels[7];
    }
    DEVICE void init(const u8*, int lane) {
        matrices = opaque(P::matrix(lane) * R::BYTES + lane / 16 * (R::D / 8));
        part.init(fragment_row(lane >> 2), lane & 3);
    }
    DEVICE float unit(float largest) const { return largest * (256.f * UNIT / LARGEST_QUERY / LARGEST_LEVEL) * top; }
    // The place in a plane of nibble `i` of those that key lane t reads there.
    static DEVICE constexpr int nibble(int t, int i) { return MATRICES ? i / 8 * 32 + t * 8 + i % 8 : t * P::NIBBLES + i; }
    static DEVICE Query query(const float* row, float largest, bool rest, int step, int t, float) {
        const float factor = __fdividef(LARGEST_QUERY, largest);
        u32 words[2 * BYTES + 2] = {};  // the highest bytes first; zeros
#pragma unroll
        for (int b = 0; b < 8; b++) {
            const int i = step % WORDS * 8 + b;
            int v = i < P::NIBBLES ? __float2int_rn(row[plane_element(step / WORDS, nibble(t, i))] * factor) : 0;
#pragma unroll
            for (int k = BYTES - 1; k >= 0; k--) words[2 * k + b / 4] |= (v & 0xff) << b % 4 * 8, v = (v + 128) >> 8;
        }
        // A pair's columns: the highest bytes and, if there are three, the lowest; the bytes between.
        Query out;
#pragma unroll
        for (int k = 0; k < QUERY_WORDS; k++) out.word[k] = !PAIRED ? words[k] : rest ? words[k + (k > 1 ? 4 : 2)] : words[k > 1 ? k + 2 : k];
        return out;
    }
    // Eight codes of each of two rows as fragments, of each of the levels' bytes.
    DEVICE void levels(u32 a, u32 b, u32 (&byte)[BYTES][4]) const {
        a &= 0x77777777, b &= 0x77777777;
        const u32 codes[4] = {a, b, upper_half(a), upper_half(b)};
#pragma unroll
        for (int i = 0; i < 4; i++)
#pragma unroll
            for (int k = 0; k < BYTES; k++) byte[k][i] = select_bytes(level_bytes[k][0], level_bytes[k][1], codes[i]);
    }
    DEVICE void squares(const u8*, float (&)[2]) const {}
    template <int H, typename QUERY> DEVICE void multiply(const u8* run, const QUERY& query, float (&dot)[ROW_TILES][4]) const {
        int sum[BYTES][ROW_TILES][4] = {};  // of products that weigh 1, 2^-8 and 2^-16
        u32 a[4][Part::WORDS + 2], b[4][Part::WORDS + 2];
        if constexpr (MATRICES) {
            const u32 at = shared_address(run) + matrices;
#pragma unroll
            for (int j = 0; j < P::CHUNKS; j++) {
                load_matrices(a[0][j], b[0][j], a[1][j], b[1][j], at + j * 16);
                load_matrices(a[2][j], b[2][j], at + j * 16 + R::D / 4);
            }
        } else {
            repeat<3>([&](auto plane) {
                constexpr int I = decltype(plane)::value;
                part.template load<I>(a[I], run), part.template load<I>(b[I], run + 8 * R::BYTES);
            });
        }
#pragma unroll
        for (int j = 0; j < WORDS; j++) {
            a[3][j] = fourth_plane(a[0][j], a[1][j], a[2][j]);
            b[3][j] = fourth_plane(b[0][j], b[1][j], b[2][j]);
        }
#pragma unroll
        for (int j = 0; j < STEPS; j++) {
            u32 k[BYTES][4];
            levels(a[j / WORDS][j % WORDS], b[j / WORDS][j % WORDS], k);
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++) {
                const Query x = query(n, j);
                // Products of a level's byte i with the query's byte l weigh 2^(-8 (i + l)).
#pragma unroll
                for (int i = 0; i < BYTES; i++) {
                    mma_s8(sum[i][n], k[i], x.word[0], x.word[1]);
                    if (!PAIRED && i + 1 < BYTES) mma_s8(sum[i + 1][n], k[i], x.word[2 % QUERY_WORDS], x.word[3 % QUERY_WORDS]);
                }
                if (PARTS > 1) mma_s8(sum[2 % BYTES][n], k[0], x.word[QUERY_WORDS - 2], x.word[QUERY_WORDS - 1]);
            }
        }
        // What weighs less is left out: it is below 2^-15 of a score's scale, or 2^-23.
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
            for (int e = 0; e < 4; e += PAIRED + 1) {
                const int high = sum[0][n][e] * 256 + sum[1][n][e] + (PAIRED ? sum[0][n][e + PAIRED] : 0);
                dot[n][e] = (float)high;
                if constexpr (PARTS > 1) dot[n][e] = dot[n][e] * 256.f + (float)(sum[2][n][e] + (PAIRED ? sum[1][n][e + PAIRED] : 0));
            }
    }
};

// Which nibbles of a word a value lane decodes: lanes of even g the even ones, of odd g the odd ones. An even lane's rows are
// (a, b), an odd lane's (b, a), so that a merged byte is (a, b) in both.
struct Nibbles {
    u32 turn, mask;
    DEVICE void init(int g) { turn = g & 1 ? 28 : 4, mask = g & 1 ? 0xf0f0f0f0 : 0x0f0f0f0f; }
    DEVICE u32 merged(u32 first, u32 second) const { return (first & mask) | (__funnelshift_l(second, second, turn) & ~mask); }
};

template <typename R, int ROW_TILES, bool PAIRED, int PARTS> struct PlaneValues {
    typedef Planes<R::D> P;
    static constexpr bool MATRICES = P::MATRICES, FINITE = true;
    typedef LevelTable<R, MATRICES ? 3 : 4, PARTS> Table;
    typedef Weights<ROW_TILES, PAIRED, PARTS> W;
    static constexpr int TILES = 2 * P::HALF, FRAGMENTS = TILES;
    typedef Lane<R, 3, R::D, R::D / 4> Part;
    Part part[2];
    Nibbles nibbles;
    u32 matrices;
    const u8* table;
    u32 lane;

    DEVICE void init(const u8* table_, int lane_) {
        table = table_, lane = opaque(Table::lane_offset(lane_));
        matrices = opaque(P::matrix(lane_) * R::BYTES + lane_ / 16 * (R::D / 8));
        const int g = lane_ >> 2, t = lane_ & 3;
        const u32 swap = g & 1 ? 4 : 0;
        nibbles.init(g);
        part[0].init(t + swap, g / 2), part[1].init(t + 4 - swap, g / 2);
    }
    static DEVICE int element(int fragment, int g, int e) {
        const int code = fragment * 2 + e;
        if constexpr (MATRICES) {
            const int i = code % (4 * P::CHUNKS);
            return plane_element(code / (4 * P::CHUNKS), i / 4 * 32 + g * 4 + i % 4);
        }
        const int i = code % P::HALF * 2 + (g & 1);
        return i < P::NIBBLES ? plane_element(code / P::HALF, (g >> 1) * P::NIBBLES + i) : -1;
    }
    template <int H> DEVICE void multiply(const u8* run, const W& weights, float (&o)[ROW_TILES][FRAGMENTS][4]) const {
        if constexpr (MATRICES) multiply_matrices(run, weights, o);
        else multiply_merged(run, weights, o);
    }
    DEVICE void multiply_matrices(const u8* run, const W& weights, float (&o)[ROW_TILES][FRAGMENTS][4]) const {
        constexpr int CHUNKS = P::CHUNKS;
        u32 x[2][4][CHUNKS];
        const u32 at = shared_address(run) + matrices;
#pragma unroll
        for (int j = 0; j < CHUNKS; j++) {
            load_transposed(x[0][0][j], x[1][0][j], x[0][1][j], x[1][1][j], at + j * 16);
            load_transposed(x[0][2][j], x[1][2][j], at + j * 16 + R::D / 4);
#pragma unroll
            for (int pair = 0; pair < 2; pair++) x[pair][3][j] = fourth_plane(x[pair][0][j], x[pair][1][j], x[pair][2][j]);
        }
        repeat<TILES / 2>([&](auto i) {
            constexpr int PLANE = decltype(i)::value / CHUNKS, C = decltype(i)::value % CHUNKS;
            repeat<PARTS>([&](auto part) {
                constexpr int PART = PARTS - 1 - decltype(part)::value;
                const u8* const of_part = table + PART * Table::PART_BYTES;
                u32 a[2][4];
#pragma unroll
                for (int pair = 0; pair < 2; pair++) {
                    // Codes times 16 in bytes, the lower two of one row and the upper two of another.
                    const u32 even = x[pair][PLANE][C] << 4 & 0x70707070, odd = x[pair][PLANE][C] & 0x70707070;
                    a[0][2 * pair] = look(of_part, dot_bytes4(8 | 64 << 16, even, lane));
                    a[0][2 * pair + 1] = look(of_part, dot_bytes4(8 | 64 << 16, odd, lane));
                    a[1][2 * pair] = look(of_part, dot_bytes4(8 << 8 | 64 << 24, even, lane));
                    a[1][2 * pair + 1] = look(of_part, dot_bytes4(8 << 8 | 64 << 24, odd, lane));
                }
                weights.template multiply<PART, (PLANE * CHUNKS + C) * 2>(o, a[0][0], a[0][1], a[0][2], a[0][3]);
                weights.template multiply<PART, (PLANE * CHUNKS + C) * 2 + 1>(o, a[1][0], a[1][1], a[1][2], a[1][3]);
            });
        });
    }
    DEVICE void multiply_merged(const u8* run, const W& weights, float (&o)[ROW_TILES][FRAGMENTS][4]) const {
        u32 x[2][4][P::WORDS];  // merged rows
        repeat<2>([&](auto pair) {
            repeat<3>([&](auto plane) {
                constexpr int I = decltype(pair)::value, PLANE = decltype(plane)::value;
                u32 first[Part::WORDS + 2], second[Part::WORDS + 2];
                part[0].template load<PLANE>(first, run + I * 8 * R::BYTES);
                part[1].template load<PLANE>(second, run + I * 8 * R::BYTES);
#pragma unroll
                for (int j = 0; j < P::WORDS; j++) x[I][PLANE][j] = nibbles.merged(first[j], second[j]);
            });
#pragma unroll
            for (int j = 0; j < P::WORDS; j++) {
                u32(&y)[4][P::WORDS] = x[decltype(pair)::value];
                y[3][j] = fourth_plane(y[0][j], y[1][j], y[2][j]);
            }
        });
        repeat<TILES>([&](auto i) {
            constexpr int I = decltype(i)::value;
            repeat<PARTS>([&](auto part) {
                constexpr int PART = PARTS - 1 - decltype(part)::value;
                u32 a[4];
                repeat<4>([&](auto k) {
                    constexpr int K = decltype(k)::value, CODE = 2 * I + K % 2, AT = CODE % P::HALF;
                    a[K] = look(table + PART * Table::PART_BYTES, byte_line<AT % 4>(x[K / 2][CODE / P::HALF][AT / 4], lane));
                });
                weights.template multiply<PART, I>(o, a[0], a[1], a[2], a[3]);
            });
        });
    }
};
