// Attention of a few queries a sequence over a compressed (or f16) paged cache, in one launch, on tensor cores.
//
// LAUNCH
//
// Kernel `attention`, one parameter: the struct `Params` (attention/params.cuh), by value.
//   grid   (blocks, 1, 1): as many as the plan was made for; one block fits on a multiprocessor, so that number or fewer
//   block  (32 * WARPS, 1, 1)
//   dynamic shared memory: SHARED_BYTES
//
// Macros (-D), which `variant.rs` chooses:
//   K_DIM, V_DIM           elements of a stored row, multiples of 16; K_ and V_BITS, PACKING, SCALING as codec/row.cuh has them
//   Q_WIDTH, OUT_WIDTH     elements of a query and of an output in memory: K_DIM and V_DIM, or fewer, which stand for zeros after them
//   Q_TYPE, OUT_TYPE       0 f32, 1 f16, 2 bf16
//   TILES_N                query rows of a work item over 8: 1, 2 or 4. Registers set the limit: TILES_N times a row of at most 576
//   WARPS, TILE, STAGES    warps a block (1 to 12), positions a warp copies at once (16, 32, 64), copies in flight and in use (2; 1
//                          waits for every copy)
//   NARROW                 1: no item has more than 4 rows (needs TILES_N = 1). The tensor cores' eight columns are then four
//                          pairs, of a query in full and what its rounding lost
//   NEARS                  how many of Params.near there are (needs TILES_N = 1), with codecs A_K_, A_V_ and B_K_, B_V_ BITS, PACKING, SCALING
//   Q_PARTS                numbers of f16 as whose sum queries, weights and levels are multiplied: 1, or 2, which is as exact as f32
//   RUN                    positions that are surely contiguous in memory and 16-byte aligned: TILE if page_size % TILE == 0, else
//                          16 if page_size % 16 == 0, else 1 (slow, any page size)
//   PAGE_SIZE              the page size if known when compiling, 0: Params.page_size
//   SHARED_BYTES           what the host reckons that Layout takes
//
// PLAN
//
// Query rows: the queries of a sequence times the `group` query heads of one KV head, flattened as row = query * group + h. A
// work item is up to 8 * TILES_N consecutive rows (from `row`) of one (sequence, KV head) against position tiles
// [tile_begin, tile_end), where tile i holds the absolute positions [i * TILE, (i + 1) * TILE). The items of one row tile cover
//   lo / TILE .. ceil(hi / TILE),  lo = max(first, causal or not: P_first - window + 1), hi = causal ? P_last + 1 : len,
// with P of a row = len - q_len + row / group. Positions in the tiles that a row may not see are masked in the kernel. A row
// tile without any position still needs one item (tile_begin = tile_end): its output is zero.
// Block b begins with items[b] (rows = 0: it has no work) and goes on with items[next] until next = 0; so there are `blocks` first
// items, and the rest after them. Items that share an output are numbered consecutively as parts: `part` is the item's slot in
// the workspace, `part_first` the first slot of its group, `part_count` their number (1: no workspace is touched).
// Items repeat what the kernel needs of their sequence, so that a block's first copy waits for two reads only, item and page.
//
// Workspace for N parts: partial f32 [N, 8 * TILES_N, V_DIM], partial_ml PartSum [N, 8 * TILES_N], counters u32 [N], zeroed once;
// every launch leaves the counters zero. Two launches in flight at once need two workspaces.
//
// METHOD
//
// Each warp runs through its own tiles with its own cp.async pipeline and online softmax; no barrier in the main loop. K is the
// A operand (positions x elements) against Q^T (8 rows), V^T the A operand against P^T. K's scale multiplies the score and V's the
// weight. A query is multiplied as two numbers where there are columns for it. At the end of an item the block's warps are summed, between
// two barriers, while the next item's queries become fragments; of a split output the block that finishes last sums the parts.
#include "attention/fetch.cuh"
#include "attention/near.cuh"
#include "attention/queries.cuh"
#include "attention/sum.cuh"
#include "attention/values.cuh"

// Over 100 lines' worth of set-up and phases in one function: all of it works on the same registers.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attention(const __grid_constant__ Params p) {
    begin();
    const int thread = threadIdx.x, warp = __shfl_sync(~0u, thread >> 5, 0), lane = thread & 31, g = lane >> 2, t = lane & 3;
    u8* const pipe = shared_memory + Layout::PIPES + warp * STAGES * Layout::STAGE;
    float* const scratch = (float*)(shared_memory + Layout::SCRATCH);
    u16* const levels = (u16*)scratch;  // of keys, then 512 further of values
    Real* const warp_m = (Real*)(shared_memory + Layout::ML);
    Real* const block_m = warp_m + WARPS * ROWS;
    float* const warp_l = (float*)(block_m + ROWS);
    float* const block_l = warp_l + WARPS * ROWS;
    const QueryRows q(block_l + ROWS);
    u32* const last = (u32*)(block_l + ROWS + QueryRows::FLOATS);
    const BlockSums block = {{(float*)(shared_memory + Layout::ACC), block_m, block_l, last}, warp_m, warp_l, scratch};

    Item it = p.items[blockIdx.x];
    if (it.rows == 0) return;
    const Levels<typename KeyCodec::Table, THREADS> k_levels(p.key.levels, thread);
    const Levels<typename ValueCodec::Table, THREADS> v_levels(p.value.levels, thread);
    KeyCodec keys(p.key.levels);
    ValueCodec values;
    Fetch fetch(p, it, warp, lane);
    Queries queries;
    queries.load(p, it, warp, lane);
    for (int s = 0; s < STAGES - 1; s++) fetch.issue(pipe + s * Layout::STAGE);
    AllNear near(p);
    near.start(p, it, warp, lane);
    k_levels.keep(thread, levels), v_levels.keep(thread, levels + 512);
    __syncthreads();
    KeyCodec::Table::build(shared_memory + Layout::K_TABLE, levels, thread, THREADS);
    if (!Layout::SHARED_TABLE) ValueCodec::Table::build(shared_memory + Layout::V_TABLE, levels + 512, thread, THREADS);
    keys.init(shared_memory + Layout::K_TABLE, lane), values.init(shared_memory + Layout::V_TABLE, lane);
    const u32 key_row = fragment_row(g);

    const float to_log2 = p.softcap > 0.f ? 1.f : LOG2E;
    queries.keep(p, it, q, warp, lane);
    __syncthreads();
    make_fragments(keys, q, to_log2);
    __syncthreads();

    u32 stage = 0;  // byte offset in the pipe
    while (true) {
        RowFloats unit;
        const float reach = load_units(unit, q, t);
        const Fragments query(q.fragments, lane);
        if (it.next) queries.load(p, p.items[it.next], warp, lane);

        // Tiles within [last_row.lo, first_row.hi) are seen whole by every row.
        const Bounds first_row = visible(p, it, it.row), last_row = visible(p, it, it.row + it.rows - 1);
        Softmax sums;
        near.add(sums, p, it, q, to_log2, scratch + warp * 512, lane);

#pragma unroll 1
        for (u32 tile = it.tile_begin + warp; tile < it.tile_end; tile += WARPS) {
            fetch.issue(pipe + (stage ? stage - Layout::STAGE : (STAGES - 1) * Layout::STAGE));
            copy_wait<STAGES - 1>();
            __syncwarp();
            const int base = tile * TILE;
            const bool edge = base < last_row.lo || base + TILE > first_row.hi;
            // Many rows want the registers that the bounds of all would take.
            if (unlikely(edge)) clear_outside(pipe + stage, base, ROWS > 8 ? (int)it.first : first_row.lo, ROWS > 8 ? (int)it.len : last_row.hi, lane);
#pragma unroll 1
            for (int run = 0; run < TILE / 16; run += SUB) {
                Scores s, rests = {};
                multiply_keys(s, keys, query, pipe + stage, run, key_row);
                const bool large = sum_large(s, rests, p, keys, unit, reach, q, pipe + stage, run, key_row, t);
                if (unlikely(p.softcap > 0.f)) cap(s, rests, unit, p.key.channels ? q.now.bias : nullptr, t, p.softcap);
                if (unlikely(edge)) hide(s, rests, p, it, base + run * 16, key_row, t);
                Softmax::ValueScales v_scale;
                load_value_scales(v_scale, pipe + stage, run, key_row, sums.v_unit);
                sums.grow(s, rests, v_scale, unit, tile == it.tile_begin + warp && run == 0, large);
                multiply_values(sums, s, rests, large, v_scale, unit, values, pipe + stage, run);
            }
            __syncwarp();
            stage = stage == (STAGES - 1) * Layout::STAGE ? 0 : stage + Layout::STAGE;
        }

        const Item next = p.items[it.next];
        sums.close(warp_m + warp * ROWS, warp_l + warp * ROWS, g, t);
        // Where the item's own rows are read again, all are done with them first.
        if ((EXACT || NEARS > 0) && it.next) __syncthreads();
        if (it.next) queries.keep(p, next, q, warp, lane);
        sum_warps(block, sums, it.rows, warp, g, t, [&] {
            if (it.next) make_fragments(keys, q, to_log2);
        });
        bool mine = true;
        if (it.part_count > 1) {
            mine = leave_part<Block>(p, it, block);
            if (mine) sum_parts<Block>(p, it, block);
        }
        if (mine)
            for (int r = warp; r < it.rows; r += WARPS)
                finish_row(p, it, it.row + r, block.acc + r * Layout::ACC_ROW, block_m[r], block_l[r], lane);
        if (it.next == 0) break;
        it = next;
        near.start(p, it, warp, lane);
    }
    copy_wait<0>();
}
