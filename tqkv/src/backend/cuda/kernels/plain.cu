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
    DEVICE void load(const Side& s, const u64* rows) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int run = min(threadIdx.x + i * THREADS, ALL - 1), element = run % (R::D / 8) * 8;
            const u64 row = rows[run / (R::D / 8)];
            runs[i] = C::load(s.codes + row * R::BYTES, element);
            factor[i] = load_factor<R>(s.scales, row * R::SPANS + element / R::SPAN, s.unit);
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

extern "C" __global__ void __launch_bounds__(THREADS, HELD) plain(const __grid_constant__ Params p) {
    __shared__ float4 tile[TILE * STRIDE], rows4[ROWS * QUADS];  // queries, then outputs
    __shared__ double dots[WARPS][ROWS][TILE];
    __shared__ u64 places[2][TILE];  // rows in the store of a tile's positions and of the next one's
    __shared__ float weights[TILE][ROWS], shrinks[ROWS];
    __shared__ float k_table[KeyCodec::TABLE ? KeyCodec::TABLE : 1], v_table[ValueCodec::TABLE ? ValueCodec::TABLE : 1];
    __shared__ double biases[ROWS];  // what the shift of the keys' channels takes from a row's scores
    __shared__ bool last;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 index = blockIdx.x / p.splits, split = blockIdx.x % p.splits;
    const u32 kv_head = index % p.kv_heads, group = p.heads / p.kv_heads;
    u32 sequence = 0, row0 = index / p.kv_heads;
    for (u32 tiles; tiles = (p.spans[sequence].new_ * group + ROWS - 1) / ROWS, row0 >= tiles; sequence++) row0 -= tiles;
    row0 *= ROWS;
    const Span span = p.spans[sequence];
    const u32 rows = min((u32)ROWS, span.new_ * group - row0);
    const u32* const pages = p.table + (u64)sequence * p.width;
    const Divisor page_size(p.page_size);
    // What row `row0 + r` is called in `q` and sees, in this order: head's row, first position, end.
    const auto row_of = [&](u32 r) { return (u64)(span.start + (row0 + r) / group) * p.heads + kv_head * group + (row0 + r) % group; };
    const auto position_of = [&](u32 r) { return span.len - span.new_ + (row0 + r) / group; };
    const auto begin_of = [&](u32 r) {
        const u32 seen = position_of(r) + 1;
        return p.window && seen > p.window ? max(span.first, seen - p.window) : span.first;
    };
    const auto end_of = [&](u32 r) { return p.causal ? position_of(r) + 1 : span.len; };

    KeyCodec::fill(k_table, p.key.levels, threadIdx.x, THREADS), ValueCodec::fill(v_table, p.value.levels, threadIdx.x, THREADS);
    // A warp has a row, from its query to its softmax and its output.
    float* const own = (float*)(rows4 + min(warp, ROWS - 1) * QUADS);
    const u64 own_row = row_of(min((u32)warp, rows - 1));
    double own_scale = p.scale;
    if (warp < ROWS) {
        typedef WarpShape<K::D> S;
        float x[S::N];
#pragma unroll
        for (int k = 0; k < S::N; k++) {
            const int e = S::element(k, lane % S::GROUP);
            x[k] = Q_WIDTH == K::D || e < Q_WIDTH ? load_element<Q_TYPE>(p.q, own_row * Q_WIDTH + e) : 0.f;
        }
        float bias = 0.f;
        if (p.key.channels) {
            const float* const shift = p.key.channels + kv_head * Q_WIDTH;
            const float* const scale = shift + 2 * p.kv_heads * Q_WIDTH;
#pragma unroll
            for (int k = 0; k < S::N; k++) {
                const int e = S::element(k, lane % S::GROUP);
                if (Q_WIDTH == K::D || e < Q_WIDTH) bias += x[k] * shift[e], x[k] *= scale[e];
            }
#pragma unroll
            for (int k = 1; k < S::GROUP; k <<= 1) bias += __shfl_xor_sync(~0u, bias, k);
        }
        if (lane == 0) biases[warp] = (double)bias * p.scale;
        // Of a size near one, so that neither the transform's sums nor products overflow.
        float largest = 0x1p-126f;
#pragma unroll
        for (int k = 0; k < S::N; k++) largest = fmaxf(largest, fabsf(x[k]));
#pragma unroll
        for (int h = 16; h > 0; h >>= 1) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, h));
        const float factor = inverse_power(fminf(largest, 0x1p126f));
        own_scale /= factor;
#pragma unroll
        for (int k = 0; k < S::N; k++) x[k] *= factor;
        rotate<S>(x, p.key.turn, lane % S::GROUP);
#pragma unroll
        for (int k = 0; k < S::N; k++) own[S::element(k, lane % S::GROUP)] = x[k];
    }
    const u32 own_begin = begin_of(min((u32)warp, rows - 1)), own_end = end_of(min((u32)warp, rows - 1));
    const u32 all_begin = begin_of(0), all_end = end_of(rows - 1);
    const u32 seen = all_end > all_begin ? all_end - all_begin : 0, share = (seen + p.splits - 1) / p.splits;
    const u32 begin = all_begin + min(split * share, seen), end = min(begin + share, all_begin + seen);

    // Scores reach the hundreds, where f32 steps by 3e-5: what is subtracted before exp is finer.
    double top = -1e300;
    float weight = 0.f;
    float4 out[ROWS][MINE] = {};
    // The last position stands for those after it.
    const auto place = [&](u32 first, u64* to) {
        if (threadIdx.x < TILE) to[threadIdx.x] = locate(pages, min(first + threadIdx.x, end - 1), page_size, p.width, p.kv_heads, kv_head);
    };
    Runs<K, KeyCodec> keys;
    Runs<V, ValueCodec> values;
    if (begin < end) {
        place(begin, places[0]);
        __syncthreads();
        keys.load(p.key, places[0]);
    }
    u32 turn = 0;
    for (u32 first = begin; first < end; first += TILE, turn ^= 1) {
        const u32 count = min((u32)TILE, end - first);
        keys.decode(tile, k_table, count);
        values.load(p.value, places[turn]);
        if (first + TILE < end) place(first + TILE, places[turn ^ 1]);
        __syncthreads();
        // A warp multiplies a part of every position's key, in f32 four elements at a time.
        double sum[ROWS] = {};
#pragma unroll 2
        for (int quad = warp * SHARE + lane / TILE; quad < K_QUADS; quad += WARPS * SHARE) {
            const float4 a = tile[lane % TILE * STRIDE + quad];
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float4 x = rows4[r * QUADS + quad];
                sum[r] += __fmaf_rn(a.w, x.w, __fmaf_rn(a.z, x.z, __fmaf_rn(a.y, x.y, a.x * x.x)));
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int h = TILE; h < 32; h <<= 1) sum[r] += __shfl_xor_sync(~0u, sum[r], h);
            if (lane < TILE) dots[warp][r][lane] = sum[r];
        }
        __syncthreads();
        if (warp < ROWS) {
            const u32 position = first + lane;
            const bool seen = lane < count && position >= own_begin && position < own_end;
            double score = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) score += dots[w][warp][lane % TILE];
            score *= own_scale;
            if (p.softcap > 0.f) score = p.softcap * tanh((score + biases[warp]) / p.softcap);
            double higher = seen ? fmax(score, top) : top;
#pragma unroll
            for (int h = 16; h > 0; h >>= 1) higher = fmax(higher, __shfl_xor_sync(~0u, higher, h));
            const float shrink = expf((float)(top - higher)), w = seen ? expf((float)(score - higher)) : 0.f;
            float sum = w;
#pragma unroll
            for (int h = 16; h > 0; h >>= 1) sum += __shfl_xor_sync(~0u, sum, h);
            weight = weight * shrink + sum, top = higher;
            if (lane < TILE) weights[lane][warp] = w;
            if (lane == 0) shrinks[warp] = shrink;
        }
        values.decode(tile, v_table, count);
        if (first + TILE < end) keys.load(p.key, places[turn ^ 1]);
        __syncthreads();
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int k = 0; k < MINE; k++) {
                float4& x = out[r][k];
                x.x *= shrinks[r], x.y *= shrinks[r], x.z *= shrinks[r], x.w *= shrinks[r];
            }
#pragma unroll
        for (int position = warp; position < TILE; position += WARPS)
#pragma unroll
            for (int k = 0; k < MINE; k++) {
                if (lane + 32 * k >= V_QUADS) break;
                const float4 v = tile[position * STRIDE + lane + 32 * k];
#pragma unroll
                for (int r = 0; r < ROWS; r++)
                    // What a row does not see may not be a number.
                    if (weights[position][r] != 0.f) add_product(out[r][k], weights[position][r], v);
            }
        __syncthreads();
    }
    __syncwarp();
    if (warp < ROWS && !(p.softcap > 0.f)) top += biases[warp];
    // The warps' sums, one warp after the other.
    __syncthreads();
    for (int w = 0; w < WARPS; w++) {
        if (w == warp)
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int k = 0; k < MINE; k++) {
                    if (lane + 32 * k >= V_QUADS) break;
                    float4& to = rows4[r * QUADS + lane + 32 * k];
                    if (w == 0) to = out[r][k];
                    else add_product(to, 1.f, out[r][k]);
                }
        __syncthreads();
    }

    if (p.splits > 1) {
        const u64 slot = (u64)index * ROWS + warp;
        float4* const partial = (float4*)p.partial + slot * p.splits * V_QUADS;
        double2* const ml = p.partial_ml + slot * p.splits;
        if (warp < rows) {
            for (int d = lane; d < V_QUADS; d += 32) __stcg(partial + split * V_QUADS + d, rows4[warp * QUADS + d]);
            if (lane == 0) __stcg(ml + split, make_double2(top, weight));
        }
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            last = atomicAdd(p.counters + index, 1) == p.splits - 1;
            if (last) p.counters[index] = 0;
            __threadfence();
        }
        __syncthreads();
        if (!last) return;
        if (warp < rows) {
            top = -1e300, weight = 0.f;
            for (u32 k = 0; k < p.splits; k++) top = fmax(top, __ldcg(ml + k).x);
            float4 sum[MINE] = {};
            for (u32 k = 0; k < p.splits; k++) {
                const double2 part = __ldcg(ml + k);
                const float factor = expf((float)(part.x - top));
                weight += (float)part.y * factor;
#pragma unroll
                for (int i = 0; i < MINE; i++)
                    if (lane + 32 * i < V_QUADS) add_product(sum[i], factor, __ldcg(partial + k * V_QUADS + lane + 32 * i));
            }
#pragma unroll
            for (int i = 0; i < MINE; i++)
                if (lane + 32 * i < V_QUADS) rows4[warp * QUADS + lane + 32 * i] = sum[i];
            __syncwarp();
        }
    }
    if (warp >= rows) return;
    float shrink = 1.f;
    if (p.sink_logits) {
        const float sink = p.sink_logits[own_row % p.heads];
        const double higher = fmax(top, (double)sink);
        shrink = expf((float)(top - higher));
        weight = weight * shrink + expf((float)(sink - higher)), top = higher;
    }
    // No weight at all: nothing was seen. What is not a number stays so.
    if (p.lse && lane == 0) p.lse[own_row] = weight == 0.f ? -__int_as_float(0x7f800000) : (float)(top + log((double)weight));
    typedef WarpShape<V::D> S;
    float x[S::N];
#pragma unroll
    for (int k = 0; k < S::N; k++) x[k] = weight == 0.f ? 0.f : own[S::element(k, lane % S::GROUP)] * shrink / weight;
    restore<S>(x, p.value.turn, lane % S::GROUP);
    if (lane >= S::GROUP) return;
#pragma unroll
    for (int k = 0; k < S::N; k++) {
        const int e = S::element(k, lane);
        if (OUT_WIDTH == V::D || e < OUT_WIDTH) store_element<OUT_TYPE>(p.out, own_row * OUT_WIDTH + e, x[k]);
    }
}
