// Brings a batch whose page tables and lengths are someone else's up to date: its own spans and tables, whose every number is in range, and a plan
// of attention for them.
//
// LAUNCH
//
// Kernel `refresh`, one parameter: the struct `Params`, by value.
//   grid   (1 + readers, 1, 1): block 0 plans, the others read a sequence's table and lengths each in turn; without readers they stay
//   block  (THREADS, 1, 1)
//
// PLAN
//
// What attention.cu wants of `items` (there: PLAN), for as many blocks. Query rows of a sequence are cut into row tiles of at most `rows`; an entry is one
// of them with all its KV heads, each of which is a group: the same tiles, one after the other.
// Few groups get a block for every equal piece, so many that the longest piece costs least. Otherwise groups lie on a line, each as long as it costs: what
// an item costs besides, then its tiles in whole rounds of the warps. Every block gets a stretch of it, and a group's pieces are the stretches that its
// tiles lie in, whole rounds of `overhead` tiles at least. plan.rs does the same on the host with more searching.
#include "attention/item.cuh"

// Query rows of a sequence that are taken together, and the tiles that they see.
struct Entry {
    Span span;
    u32 sequence, row, rows;
    u32 begin, tiles;
    u32 line;           // where its first KV head's group begins
};

struct Params {
    const u8* tables;   // the caller's: entries at sequence * stride + i
    const u8* lens;     // the caller's, [sequences]; or null: spans are known
    const u8* starts;   // the caller's, [sequences + 1]
    Span* spans;        // [sequences]
    u32* own;           // [sequences, width]
    u32* out_of_range;  // counts what was
    Item* items;        // the plan, or null
    Entry* entries;     // room for all
    u64 stride;
    u32 wide_tables, wide_lens;  // whether integers have 64 bits
    u32 sequences, width, page_size, pages, tokens;
    u32 most_new, most_len;
    u32 kv_heads, group, rows, tile, warps, blocks, overhead, causal, window;
};

constexpr u32 THREADS = 1024;  // and no more blocks

DEVICE long long load_integer(const u8* from, u64 i, u32 wide) { return wide ? ((const long long*)from)[i] : ((const int*)from)[i]; }

// A number that must lie within [0, most]: what does not is counted, once where `counts`.
DEVICE u32 checked(const Params& p, long long x, long long most, bool counts) {
    if (x >= 0 && x <= most) return (u32)x;
    if (counts) atomicAdd(p.out_of_range, 1u);
    return x < 0 ? 0 : (u32)most;
}

DEVICE Span span_of(const Params& p, u32 sequence, bool counts) {
    if (!p.lens) return p.spans[sequence];
    const u32 len = checked(p, load_integer(p.lens, sequence, p.wide_lens), p.most_len, counts);
    const long long start = load_integer(p.starts, sequence, p.wide_lens), end = load_integer(p.starts, sequence + 1, p.wide_lens);
    const u32 from = checked(p, start, p.tokens, counts);
    const u32 new_ = checked(p, end - start, min(min(p.most_new, len), p.tokens - from), counts);
    return {0, len, from, new_};
}

DEVICE void copy_table(const Params& p, u32 sequence) {
    const Span span = span_of(p, sequence, threadIdx.x == 0);
    if (p.lens && threadIdx.x == 0) p.spans[sequence] = span;
    const u32 used = (span.len + p.page_size - 1) / p.page_size;
    for (u32 i = threadIdx.x; i < used; i += THREADS) {
        const long long page = load_integer(p.tables, sequence * p.stride + i, p.wide_tables);
        const bool within = page >= 0 && page < (long long)p.pages;
        if (!within) atomicAdd(p.out_of_range, 1u);
        p.own[(u64)sequence * p.width + i] = within ? (u32)page : 0;
    }
}

struct Shared {
    u32 sums[2][THREADS], counts[2][THREADS];
    u32 begun[THREADS];               // groups that begin in an earlier block and go on in another
    u32 line[THREADS], tiles[THREADS];  // of the first entries
    u64 best;
    u32 entries, longest, shortest, total;
};

// Sums of two numbers over the threads before this one, and all of them.
DEVICE void scan(Shared& s, u32& sum, u32& count, u32& all, u32& all_counts) {
    const u32 t = threadIdx.x;
    u32 at = 0;
    s.sums[0][t] = sum, s.counts[0][t] = count;
    __syncthreads();
    for (u32 step = 1; step < THREADS; step *= 2, at ^= 1) {
        s.sums[at ^ 1][t] = s.sums[at][t] + (t >= step ? s.sums[at][t - step] : 0);
        s.counts[at ^ 1][t] = s.counts[at][t] + (t >= step ? s.counts[at][t - step] : 0);
        __syncthreads();
    }
    sum = s.sums[at][t] - sum, count = s.counts[at][t] - count;
    all = s.sums[at][THREADS - 1], all_counts = s.counts[at][THREADS - 1];
    __syncthreads();
}

// What a group costs, in tiles: a round of the warps is not shorter for being incomplete.
DEVICE u32 cost_of(const Params& p, u32 tiles) { return (tiles + p.warps - 1) / p.warps * p.warps + p.overhead; }

DEVICE Entry entry_of(const Params& p, const Span& span, u32 sequence, u32 row) {
    const u32 rows = min(p.rows, span.new_ * p.group - row);
    const u32 before = span.len - span.new_;
    const u32 lowest = before + row / p.group, highest = before + (row + rows - 1) / p.group;
    const u32 lo = p.window && lowest + 1 > p.window ? lowest + 1 - p.window : 0, hi = p.causal ? highest + 1 : span.len;
    Entry e = {span, sequence, row, rows, lo / p.tile, 0, 0};
    e.tiles = hi > lo ? (hi + p.tile - 1) / p.tile - e.begin : 0;
    return e;
}

// All entries, and where each one's first group begins on the line.
DEVICE void find_entries(const Params& p, Shared& s) {
    u32 line = 0, entries = 0;
    if (threadIdx.x == 0) s.longest = 0, s.shortest = ~0u;
    for (u32 base = 0; base < p.sequences; base += THREADS) {
        const u32 sequence = base + threadIdx.x;
        Span span = {0, 0, 0, 0};
        if (sequence < p.sequences) span = span_of(p, sequence, false);
        u32 own = 0, count = 0, all, all_counts;
        for (u32 row = 0; row < span.new_ * p.group; row += p.rows) own += cost_of(p, entry_of(p, span, sequence, row).tiles) * p.kv_heads, count++;
        scan(s, own, count, all, all_counts);
        own += line, count += entries, line += all, entries += all_counts;
        for (u32 row = 0; row < span.new_ * p.group; row += p.rows) {
            Entry e = entry_of(p, span, sequence, row);
            e.line = own;
            if (count < THREADS) s.line[count] = e.line, s.tiles[count] = e.tiles;
            own += cost_of(p, e.tiles) * p.kv_heads;
            p.entries[count++] = e;
            atomicMax(&s.longest, e.tiles), atomicMin(&s.shortest, e.tiles);
        }
    }
    if (threadIdx.x == 0) s.entries = entries, s.total = line;
    __syncthreads();
}
DEVICE u32 line_of(const Params& p, const Shared& s, u32 e) { return e < THREADS ? s.line[e] : p.entries[e].line; }
DEVICE u32 tiles_of(const Params& p, const Shared& s, u32 e) { return e < THREADS ? s.tiles[e] : p.entries[e].tiles; }

DEVICE u32 pieces_of(u32 tiles, u32 chunk) { return max((tiles + chunk - 1) / chunk, 1u); }
// The size of pieces, none of which is more, with which a block for each suffices and the largest costs least: cost, then size, in halves of a word.
DEVICE void find_chunk(const Params& p, Shared& s) {
    if (threadIdx.x == 0) s.best = ~0ull;
    __syncthreads();
    for (u32 n = threadIdx.x + 1; n <= p.blocks; n += THREADS) {
        const u32 chunk = max((s.longest + n - 1) / n, 1u);
        u32 pieces = 0, cost = 0;
        for (u32 e = 0; e < s.entries; e++) {
            const u32 tiles = tiles_of(p, s, e), m = pieces_of(tiles, chunk);
            pieces += m * p.kv_heads, cost = max(cost, cost_of(p, (tiles + m - 1) / m) + (m > 1 ? p.overhead : 0));
        }
        if (pieces <= p.blocks) atomicMin(&s.best, (u64)cost << 32 | chunk);
    }
    __syncthreads();
}

DEVICE Item item_of(const Entry& e, u32 head, u32 from, u32 to, u32 part, u32 first, u32 count) {
    Item it = {};
    it.sequence = e.sequence, it.kv_head = head, it.row = e.row, it.rows = e.rows, it.tile_begin = e.begin + from, it.tile_end = e.begin + to;
    it.part = part, it.part_first = first, it.part_count = count;
    it.first = e.span.first, it.len = e.span.len, it.q_start = e.span.start, it.q_len = e.span.new_;
    return it;
}

// A piece a block.
DEVICE void plan_pieces(const Params& p, const Shared& s, u32 chunk) {
    for (u32 block = threadIdx.x; block < p.blocks; block += THREADS) {
        Item it = {};
        u32 first = 0;
        for (u32 e = 0; e < s.entries; e++) {
            const u32 tiles = tiles_of(p, s, e), n = pieces_of(tiles, chunk), at = block - first;
            if (at < n * p.kv_heads) {
                const u32 i = at % n;
                const u32 from = (u32)((u64)tiles * i / n), to = (u32)((u64)tiles * (i + 1) / n);
                it = item_of(p.entries[e], at / n, from, to, n > 1 ? block : 0, n > 1 ? block - i : 0, n);
                break;
            }
            first += n * p.kv_heads;
        }
        p.items[block] = it;
    }
}

// How a group is cut where stretches of `quota` end: its first and its last block, and what of it a block has.
struct Cuts {
    const Params& p;
    u32 start, quota, tiles, first, last;

    DEVICE Cuts(const Params& p, u32 start, u32 quota, u32 tiles) : p(p), start(start), quota(quota), tiles(tiles) {
        first = start / quota, last = (start + cost_of(p, tiles) - 1) / quota;
        if (first < last && before(first + 1) == 0) first++;
        if (first < last && before(last) == tiles) last--;
    }
    // Tiles before a block's stretch: none, or all, if few would be left on a side.
    DEVICE u32 before(u32 block) const {
        const u32 end = block * quota, from = start + p.overhead;
        const u32 x = end > from ? min((end - from) / p.warps * p.warps, tiles) : 0;
        return x < min(p.overhead, tiles) ? 0 : tiles - x < p.overhead ? tiles : x;
    }
    DEVICE u32 from(u32 block) const { return block == first ? 0 : before(block); }
    DEVICE u32 to(u32 block) const { return block == last ? tiles : before(block + 1); }
};

// Calls `use(entry, head, cuts)` for every group of which a block has a piece.
template <typename F> DEVICE void pieces_of_block(const Params& p, const Shared& s, u32 quota, u32 block, F&& use) {
    const u32 begin = block * quota, end = begin + quota;
    u32 low = 0, high = s.entries;
    while (high - low > 1) {
        const u32 mid = (low + high) / 2;
        if (line_of(p, s, mid) <= begin) low = mid;
        else high = mid;
    }
    for (u32 e = low; e < s.entries; e++) {
        const u32 line = line_of(p, s, e), tiles = tiles_of(p, s, e), each = cost_of(p, tiles);
        if (line >= end) break;
        for (u32 head = line < begin ? (begin - line) / each : 0; head < p.kv_heads && line + head * each < end; head++) {
            const Cuts cuts(p, line + head * each, quota, tiles);
            if (cuts.first <= block && block <= cuts.last) use(e, head, cuts);
        }
    }
}

// Stretches of the line. A part's slot is its block's number and how many split groups begin before its own: so those of a group are consecutive,
// and all differ.
DEVICE void plan_stretches(const Params& p, Shared& s, u32 quota) {
    const u32 block = threadIdx.x;
    u32 count = 0, splits = 0, all_counts;
    if (block < p.blocks)
        pieces_of_block(p, s, quota, block, [&](u32, u32, const Cuts& cuts) { count++, splits += cuts.first == block && cuts.last > block; });
    u32 begun = splits, after = count ? count - 1 : 0, all;
    scan(s, begun, after, all, all_counts);
    s.begun[block] = begun;
    __syncthreads();
    if (block >= p.blocks) return;
    u32 at = block;
    after += p.blocks;
    Item it = {};
    pieces_of_block(p, s, quota, block, [&](u32 e, u32 head, const Cuts& cuts) {
        if (it.rows) it.next = after, p.items[at] = it, at = after++;
        const u32 n = cuts.last - cuts.first + 1, before = s.begun[cuts.first];
        it = item_of(p.entries[e], head, cuts.from(block), cuts.to(block), n > 1 ? block + before : 0, n > 1 ? cuts.first + before : 0, n);
    });
    p.items[at] = it;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) refresh(const __grid_constant__ Params p) {
    begin();
    if (blockIdx.x > 0) {
        for (u32 sequence = blockIdx.x - 1; sequence < p.sequences; sequence += gridDim.x - 1) copy_table(p, sequence);
        return;
    }
    if (!p.items) return;
    __shared__ Shared s;
    find_entries(p, s);
    const u32 groups = s.entries * p.kv_heads;
    if (groups == 0) {
        for (u32 block = threadIdx.x; block < p.blocks; block += THREADS) p.items[block].rows = 0;
        return;
    }
    // No stretch is so short that a group would be cut twice within the least that a piece has.
    u32 quota = max((s.total + p.blocks - 1) / p.blocks, 3 * p.overhead + p.warps);
    // What a stretch costs besides: a second item that is begun, and two that are joined to others.
    const u32 besides = 3 * p.overhead;
    if (groups <= p.blocks) find_chunk(p, s);
    if (groups <= p.blocks && (s.best >> 32) <= quota + besides) return plan_pieces(p, s, (u32)s.best);
    // Groups that are all alike are best left whole if they come out nearly even.
    const u32 whole = (groups + p.blocks - 1) / p.blocks * cost_of(p, s.longest);
    if (s.shortest == s.longest && whole <= quota + besides) quota = whole;
    plan_stretches(p, s, quota);
}
