// Attention for every shape and codec, in f32 on plain cores: for f32 queries, whose precision f16 tensor cores (attention.cu)
// would lose, and for shapes that those do not take. A block takes up to ROWS query rows of a sequence (row = query * group + h)
// that read one KV head, and a split of the positions, which it goes through in tiles. Each tile's keys, then its values, are
// decoded to shared memory once for all rows. The block that finishes last joins the splits.
// -D: for K and V: DIM, BITS, PACKING, SCALING, CODE_ALIGN (bytes); Q_WIDTH, OUT_WIDTH (elements in memory, at most K_DIM and V_DIM);
// Q_TYPE, OUT_TYPE; ROWS (up to 8, of 2048 elements or one row); HELD (blocks that a multiprocessor shall hold at once).
#include "codec/codec.cuh"

struct Params {
    Side key, value;
    const void* q;       // [tokens, heads, Q_WIDTH]
    void* out;           // [tokens, heads, OUT_WIDTH]
    float* lse;          // or null
    const float* sink_logits;  // [heads], or null
    const Span* spans;
    const u32* table;
    float* partial;      // [blocks / splits, ROWS, splits, V_DIM], if there are several splits
    double2* partial_ml; // [blocks / splits, ROWS, splits]: maximum and sum
    u32* counters;       // [blocks / splits], zero before and after
    u32 splits, pad;
    u32 sequences, kv_heads, heads, page_size, width;
    u32 causal, window;
    float scale, softcap;  // softcap 0: none
    u32 pad2;
};

typedef Row<K_DIM, K_BITS, K_PACKING, K_SCALING> K;
typedef Row<V_DIM, V_BITS, V_PACKING, V_SCALING> V;
typedef Codec<K, K_CODE_ALIGN> KeyCodec;
typedef Codec<V, V_CODE_ALIGN> ValueCodec;
constexpr int D = K::D > V::D ? K::D : V::D, WARPS = 8, THREADS = WARPS * 32;
constexpr int K_QUADS = K::D / 4, V_QUADS = V::D / 4, QUADS = D / 4, MINE = (V_QUADS + 31) / 32;  // of a row; of a lane
constexpr int TILE = D <= 144 ? 32 : D <= 288 ? 16 : D <= 576 ? 8 : 4, SHARE = 32 / TILE;
constexpr int STRIDE = QUADS + 1;  // of a tile's rows: so neighbours' quads do not meet in a bank

// Runs of eight elements that a thread takes of a tile: read while there is other work, then decoded to shared memory.
template <typename R, typename C> struct Runs {
    static constexpr int ALL = TILE * R::D / 8, N = (ALL + THREADS - 1) / THREADS;
    typename C::Run runs[N];
    float factor[N];

    // `rows`: where the tile's positions lie.
    DEVICE void load(const Side& s, const u32* rows) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int run = min(threadIdx.x + i * THREADS, ALL - 1), element = run % (R::D / 8) * 8;
            const u32 row = rows[run / (R::D / 8)];
            runs[i] = C::load(s.codes + codes_at<R>(s.strides, row), element);
            factor[i] = load_factor<R>(s.scales + scales_at<R>(s.strides, row), element / R::SPAN, s.unit);
        }
    }
    // Positions from `count` on become zero.
    DEVICE void decode(float4* tile, const float* table, u32 count) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int run = threadIdx.x + i * THREADS, position = run / (R::D / 8);
            if (run >= ALL) break;
            float v[8] = {};
            if (position < count)
#pragma unroll
                for (int k = 0; k < 8; k++) v[k] = C::decode(table, runs[i], k, factor[i]);
            float4* const to = tile + position * STRIDE + run % (R::D / 8) * 2;
            to[0] = make_float4(v[0], v[1], v[2], v[3]), to[1] = make_float4(v[4], v[5], v[6], v[7]);
        }
    }
};
DEVICE void add_product(float4& sum, float a, const float4& b) {
    sum.x = __fmaf_rn(a, b.x, sum.x), sum.y = __fmaf_rn(a, b.y, sum.y), sum.z = __fmaf_rn(a, b.z, sum.z), sum.w = __fmaf_rn(a, b.w, sum.w);
}

// What a block shares.
struct Shared {
    float4 rows[ROWS * QUADS], tile[TILE * STRIDE];  // rows: queries, then outputs
    double dots[WARPS][ROWS][TILE];
    double biases[ROWS];  // what the shift of the keys' channels takes from a row's scores
    u32 places[2][TILE];  // rows in the store of a tile's positions and of the next one's
    float weights[TILE][ROWS], shrinks[ROWS];
    float k_table[KeyCodec::TABLE ? KeyCodec::TABLE : 1], v_table[ValueCodec::TABLE ? ValueCodec::TABLE : 1];
    bool last;
};

// The query rows of a block, and the positions that they see.
struct Work {
    const Params& p;
    u32 index, split, kv_head, group, row0, rows;
    Span span;
    const u32* pages;
    Divisor page_size;

    DEVICE Work(const Params& p) : p(p), page_size(p.page_size) {
        index = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
        kv_head = index % p.kv_heads, group = p.heads / p.kv_heads;
        u32 sequence = 0;
        row0 = index / p.kv_heads;
        for (u32 tiles; sequence < p.sequences && (tiles = (p.spans[sequence].new_ * group + ROWS - 1) / ROWS, row0 >= tiles); sequence++) row0 -= tiles;
        row0 *= ROWS, rows = 0;
        // Where spans are the device's, the host knows no more than how many tiles there are at most.
        if (sequence == p.sequences) return;
        span = p.spans[sequence];
        rows = min((u32)ROWS, span.new_ * group - row0);
        pages = p.table + (u64)sequence * p.width;
    }
    // Of row `row0 + r`: its number in `q`, its position, and the positions that it sees.
    DEVICE u64 number(u32 r) const { return (u64)(span.start + (row0 + r) / group) * p.heads + kv_head * group + (row0 + r) % group; }
    DEVICE u32 position(u32 r) const { return span.len - span.new_ + (row0 + r) / group; }
    DEVICE u32 begin(u32 r) const {
        const u32 seen = position(r) + 1;
        return p.window && seen > p.window ? max(span.first, seen - p.window) : span.first;
    }
    DEVICE u32 end(u32 r) const { return p.causal ? position(r) + 1 : span.len; }
    // The split's part of all that the rows see.
    DEVICE void part(u32& from, u32& to) const {
        const u32 first = begin(0), last = end(rows - 1);
        const u32 seen = last > first ? last - first : 0, share = (seen + p.splits - 1) / p.splits;
        from = first + min(split * share, seen), to = min(from + share, first + seen);
    }
    // Where the tile of position `first` lies. The last position stands for those after it.
    DEVICE void place(u32 first, u32 to, u32* places) const {
        if (threadIdx.x < TILE) places[threadIdx.x] = locate(pages, min(first + threadIdx.x, to - 1), page_size, p.width, p.kv_heads, kv_head);
    }
};

template <typename S> DEVICE float sum_of_group(float x) {
#pragma unroll
    for (int k = 1; k < S::GROUP; k <<= 1) x += __shfl_xor_sync(~0u, x, k);
    return x;
}
DEVICE float largest_of_warp(float x) {
#pragma unroll
    for (int h = 16; h > 0; h >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, h));
    return x;
}

// A query of the warp's own: scaled by channel and to a size near one, and rotated, to `own`. Returns what its scores are multiplied by.
DEVICE double load_query(const Work& work, double& bias, float* own, u64 row, int lane) {
    typedef WarpShape<K::D> S;
    const Params& p = work.p;
    float x[S::N];
#pragma unroll
    for (int k = 0; k < S::N; k++) {
        const int e = S::element(k, lane % S::GROUP);
        x[k] = Q_WIDTH == K::D || e < Q_WIDTH ? load_element<Q_TYPE>(p.q, row * Q_WIDTH + e) : 0.f;
    }
    float shifted = 0.f;
    if (p.key.channels) {
        const float* const shift = p.key.channels + work.kv_head * Q_WIDTH;
        const float* const scale = shift + 2 * p.kv_heads * Q_WIDTH;
#pragma unroll
        for (int k = 0; k < S::N; k++) {
            const int e = S::element(k, lane % S::GROUP);
            if (Q_WIDTH == K::D || e < Q_WIDTH) shifted += x[k] * shift[e], x[k] *= scale[e];
        }
        shifted = sum_of_group<S>(shifted);
    }
    if (lane == 0) bias = (double)shifted * p.scale;
    // So that neither the transform's sums nor products overflow.
    float largest = 0x1p-126f;
#pragma unroll
    for (int k = 0; k < S::N; k++) largest = fmaxf(largest, fabsf(x[k]));
    const float factor = inverse_power(fminf(largest_of_warp(largest), 0x1p126f));
#pragma unroll
    for (int k = 0; k < S::N; k++) x[k] *= factor;
    rotate<S>(x, p.key.turn, lane % S::GROUP);
#pragma unroll
    for (int k = 0; k < S::N; k++) own[S::element(k, lane % S::GROUP)] = x[k];
    return (double)p.scale / factor;
}

// Products of a tile's keys with all rows: a warp multiplies a part of every position's key, in f32 four elements at a time.
DEVICE void multiply_keys(Shared& s, int warp, int lane) {
    double sum[ROWS] = {};
#pragma unroll 2
    for (int quad = warp * SHARE + lane / TILE; quad < K_QUADS; quad += WARPS * SHARE) {
        const float4 a = s.tile[lane % TILE * STRIDE + quad];
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float4 x = s.rows[r * QUADS + quad];
            sum[r] += __fmaf_rn(a.w, x.w, __fmaf_rn(a.z, x.z, __fmaf_rn(a.y, x.y, a.x * x.x)));
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
#pragma unroll
        for (int h = TILE; h < 32; h <<= 1) sum[r] += __shfl_xor_sync(~0u, sum[r], h);
        if (lane < TILE) s.dots[warp][r][lane] = sum[r];
    }
}

// A row's running maximum and sum of weights.
struct Softmax {
    u32 begin, end;  // what the row sees
    double scale;
    // Scores reach the hundreds, where f32 steps by 3e-5: what is subtracted before exp is finer.
    double top = -1e300;
    float weight = 0.f;

    // Weights of a tile, from the warps' products: the warp's own row.
    DEVICE void step(const Params& p, Shared& s, u32 first, u32 count, int warp, int lane) {
        const u32 position = first + lane;
        const bool seen = lane < count && position >= begin && position < end;
        double score = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) score += s.dots[w][warp][lane % TILE];
        score *= scale;
        if (p.softcap > 0.f) score = p.softcap * tanh((score + s.biases[warp]) / p.softcap);
        double higher = seen ? fmax(score, top) : top;
#pragma unroll
        for (int h = 16; h > 0; h >>= 1) higher = fmax(higher, __shfl_xor_sync(~0u, higher, h));
        const float shrink = expf((float)(top - higher)), w = seen ? expf((float)(score - higher)) : 0.f;
        float sum = w;
#pragma unroll
        for (int h = 16; h > 0; h >>= 1) sum += __shfl_xor_sync(~0u, sum, h);
        weight = weight * shrink + sum, top = higher;
        if (lane < TILE) s.weights[lane][warp] = w;
        if (lane == 0) s.shrinks[warp] = shrink;
    }
    // A weight without a value. Returns what sums shrink by.
    DEVICE float sink(float logit) {
        const double higher = fmax(top, (double)logit);
        const float shrink = expf((float)(top - higher));
        weight = weight * shrink + expf((float)(logit - higher)), top = higher;
        return shrink;
    }
};

// Products of weights with a tile's values: a warp has every eighth position.
DEVICE void multiply_values(const Shared& s, float4 (&out)[ROWS][MINE], int warp, int lane) {
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int k = 0; k < MINE; k++) {
            float4& x = out[r][k];
            x.x *= s.shrinks[r], x.y *= s.shrinks[r], x.z *= s.shrinks[r], x.w *= s.shrinks[r];
        }
#pragma unroll
    for (int position = warp; position < TILE; position += WARPS)
#pragma unroll
        for (int k = 0; k < MINE; k++) {
            if (lane + 32 * k >= V_QUADS) break;
            const float4 v = s.tile[position * STRIDE + lane + 32 * k];
#pragma unroll
            for (int r = 0; r < ROWS; r++)
                // What a row does not see may not be a number.
                if (s.weights[position][r] != 0.f) add_product(out[r][k], s.weights[position][r], v);
        }
}

// The warps' sums, one warp after the other, to the rows.
DEVICE void add_warps(Shared& s, const float4 (&out)[ROWS][MINE], int warp, int lane) {
    for (int w = 0; w < WARPS; w++) {
        if (w == warp)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int k = 0; k < MINE; k++) {
                    if (lane + 32 * k >= V_QUADS) break;
                    float4& to = s.rows[r * QUADS + lane + 32 * k];
                    if (w == 0) to = out[r][k];
                    else add_product(to, 1.f, out[r][k]);
                }
        __syncthreads();
    }
}

// Hands over the block's part. In the block that comes last, the rows become those of all splits; elsewhere it returns false.
DEVICE bool join_splits(const Work& work, Shared& s, Softmax& own, int warp, int lane) {
    const Params& p = work.p;
    const u64 slot = (u64)work.index * ROWS + warp;
    float4* const partial = (float4*)p.partial + slot * p.splits * V_QUADS;
    double2* const ml = p.partial_ml + slot * p.splits;
    if (warp < work.rows) {
        for (int d = lane; d < V_QUADS; d += 32) __stcg(partial + work.split * V_QUADS + d, s.rows[warp * QUADS + d]);
        if (lane == 0) __stcg(ml + work.split, make_double2(own.top, own.weight));
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        s.last = atomicAdd(p.counters + work.index, 1) == p.splits - 1;
        if (s.last) p.counters[work.index] = 0;
        __threadfence();
    }
    __syncthreads();
    if (!s.last || warp >= work.rows) return s.last;
    own.top = -1e300, own.weight = 0.f;
    for (u32 k = 0; k < p.splits; k++) own.top = fmax(own.top, __ldcg(ml + k).x);
    float4 sum[MINE] = {};
    for (u32 k = 0; k < p.splits; k++) {
        const double2 part = __ldcg(ml + k);
        const float factor = expf((float)(part.x - own.top));
        own.weight += (float)part.y * factor;
#pragma unroll
        for (int i = 0; i < MINE; i++)
            if (lane + 32 * i < V_QUADS) add_product(sum[i], factor, __ldcg(partial + k * V_QUADS + lane + 32 * i));
    }
#pragma unroll
    for (int i = 0; i < MINE; i++)
        if (lane + 32 * i < V_QUADS) s.rows[warp * QUADS + lane + 32 * i] = sum[i];
    __syncwarp();
    return true;
}

// A row's output, and what it is merged by.
DEVICE void write_row(const Params& p, Softmax own, const float* sums, u64 row, int lane) {
    typedef WarpShape<V::D> S;
    const float shrink = p.sink_logits ? own.sink(p.sink_logits[row % p.heads]) : 1.f;
    // No weight at all: nothing was seen. What is not a number stays so.
    const bool none = own.weight == 0.f;
    if (p.lse && lane == 0) p.lse[row] = none ? -__int_as_float(0x7f800000) : (float)(own.top + log((double)own.weight));
    float x[S::N];
#pragma unroll
    for (int k = 0; k < S::N; k++) x[k] = none ? 0.f : sums[S::element(k, lane % S::GROUP)] * shrink / own.weight;
    restore<S>(x, p.value.turn, lane % S::GROUP);
    if (lane >= S::GROUP) return;
#pragma unroll
    for (int k = 0; k < S::N; k++) {
        const int e = S::element(k, lane);
        if (OUT_WIDTH == V::D || e < OUT_WIDTH) store_element<OUT_TYPE>(p.out, row * OUT_WIDTH + e, x[k]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, HELD) plain(const __grid_constant__ Params p) {
    begin();
    __shared__ Shared s;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const Work work(p);
    if (work.rows == 0) return;
    KeyCodec::fill(s.k_table, p.key.levels, threadIdx.x, THREADS), ValueCodec::fill(s.v_table, p.value.levels, threadIdx.x, THREADS);
    // A warp has a row, from its query to its softmax and its output.
    float* const own_sums = (float*)(s.rows + min(warp, ROWS - 1) * QUADS);
    const u32 own_r = min((u32)warp, work.rows - 1);
    const u64 own_row = work.number(own_r);
    Softmax own;
    if (warp < ROWS) own.scale = load_query(work, s.biases[warp], own_sums, own_row, lane);
    own.begin = work.begin(own_r), own.end = work.end(own_r);
    u32 begin, end;
    work.part(begin, end);

    float4 out[ROWS][MINE] = {};
    Runs<K, KeyCodec> keys;
    Runs<V, ValueCodec> values;
    if (begin < end) {
        work.place(begin, end, s.places[0]);
        __syncthreads();
        keys.load(p.key, s.places[0]);
    }
    // A tile's values are read while its keys are multiplied, and the next tile's keys while its values are.
    u32 turn = 0;
    for (u32 first = begin; first < end; first += TILE, turn ^= 1) {
        const u32 count = min((u32)TILE, end - first);
        keys.decode(s.tile, s.k_table, count);
        values.load(p.value, s.places[turn]);
        if (first + TILE < end) work.place(first + TILE, end, s.places[turn ^ 1]);
        __syncthreads();
        multiply_keys(s, warp, lane);
        __syncthreads();
        if (warp < ROWS) own.step(p, s, first, count, warp, lane);
        values.decode(s.tile, s.v_table, count);
        if (first + TILE < end) keys.load(p.key, s.places[turn ^ 1]);
        __syncthreads();
        multiply_values(s, out, warp, lane);
        __syncthreads();
    }
    __syncwarp();
    if (warp < ROWS && !(p.softcap > 0.f)) own.top += s.biases[warp];
    __syncthreads();
    add_warps(s, out, warp, lane);
    if (p.splits > 1 && !join_splits(work, s, own, warp, lane)) return;
    if (warp < work.rows) write_row(p, own, own_sums, own_row, lane);
}
