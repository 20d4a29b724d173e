// A warp's tiles from global to shared memory.
#pragma once
#include "attention/layout.cuh"

DEVICE u32 page_size(const Params& p) { return PAGE_SIZE ? PAGE_SIZE : p.page_size; }

// Walks a warp's tiles across the block's items and copies them, ahead of the computation. The page of the tile to come is read
// one step before its copy needs the address.
struct Fetch {
    const Params& p;
    u32 next, tile, tile_end, first, len, kv_head, slot, capacity;
    const u32* pages;
    u32 page;
    int warp, lane;
    const u8 *k_codes, *v_codes, *k_scales, *v_scales;  // this lane's part of the first row's

    DEVICE Fetch(const Params& p, const Item& it, int warp, int lane) : p(p), warp(warp), lane(lane) {
        capacity = p.table_width * page_size(p);
        k_codes = p.key.codes + lane * 16, v_codes = p.value.codes + lane * 16;
        k_scales = p.key.scales + lane * 16, v_scales = p.value.scales + lane * 16;
        start(it);
    }
    // Goes to this warp's first tile at or after an item's beginning.
    DEVICE void start(Item it) {
        while (it.tile_begin + warp >= it.tile_end && it.next) it = p.items[it.next];
        next = it.next, kv_head = it.kv_head, tile = it.tile_begin + warp, tile_end = it.tile_end;
        first = it.first, len = it.len;
        pages = p.page_table + (u64)it.sequence * p.table_width;
        slot = tile * TILE % capacity;
        load_page();
    }
    DEVICE void load_page() {
        if (RUN >= TILE && tile < tile_end) page = pages[slot / page_size(p)];
    }
    // The row in the store of a slot.
    DEVICE u32 store_row(u32 page, u32 slot) const {
        return (page * p.kv_heads + kv_head) * page_size(p) + slot % page_size(p);
    }
    DEVICE void issue(u8* stage) {
        if (tile < tile_end) {
            if constexpr (RUN >= TILE) {
                // Pages times heads are below 2^32, rows and bytes need not be.
                const u32 block = page * p.kv_heads + kv_head, slot = PAGE_SIZE == TILE ? 0 : this->slot % page_size(p);
                const u32 to = shared_address(stage);
                copy_codes<K>(to, k_codes, p.key.strides.codes, block, slot);
                copy_codes<V>(to + TILE * K::BYTES, v_codes, p.value.strides.codes, block, slot);
                copy_scales<K>(to + Layout::K_SCALES, k_scales, p.key.strides.scales, block, slot);
                copy_scales<V>(to + Layout::V_SCALES, v_scales, p.value.strides.scales, block, slot);
            } else {
                copy_rows(stage);
            }
            tile += WARPS, slot += WARPS * TILE;
            if (unlikely(slot >= capacity)) slot %= capacity;
            if (unlikely(tile >= tile_end && next)) start(p.items[next]);
            else load_page();
        }
        copy_commit();
    }
    // Bytes before a page's first row of this KV head.
    DEVICE u64 block_at(const Strides& strides, u32 block, u32 row_bytes) const {
        return STRIDED ? RowStrides::at(strides, page, kv_head, 0) : (u64)block * (page_size(p) * row_bytes);
    }
    template <typename R> DEVICE void copy_codes(u32 to, const u8* from, const Strides& strides, u32 block, u32 slot) const {
        typedef Placed<R> P;
        constexpr int CHUNKS = TILE * R::BYTES / 16;
        constexpr int PERIOD = P::POW2 && R::BYTES > 64 ? R::BYTES / 2 : 32;  // chunks after which a lane's place repeats
        from = opaque(from + block_at(strides, block, R::BYTES) + slot * R::BYTES);
        repeat<(CHUNKS + 31) / 32>([&](auto index) {
            constexpr int I = decltype(index)::value * 32, LEAD = I / PERIOD * PERIOD;
            const u32 c = I - LEAD + lane;
            if (I + 32 > CHUNKS && I + lane >= CHUNKS) return;
            copy_async16_at<LEAD * 16, I * 16>(to + (P::POW2 ? P::place(c / (R::BYTES / 16), c % (R::BYTES / 16)) : c * 16), from);
        });
    }
    template <typename R> DEVICE void copy_scales(u32 to, const u8* from, const Strides& strides, u32 block, u32 slot) const {
        constexpr int ROW = R::SCALES * R::SCALE_BYTES, CHUNKS = TILE * ROW / 16;
        from += block_at(strides, block, ROW) + slot * ROW;
#pragma unroll
        for (int c = 0; c < CHUNKS; c += 32)
            if (c + 32 <= CHUNKS || c + lane < CHUNKS) copy_async16(to + (c + lane) * 16, from + c * 16);
    }
    // Pages that do not hold whole tiles: each run of 16 positions (or each position) has a page of its own. Runs without a
    // valid position are left out.
    __device__ __noinline__ void copy_rows(u8* stage) const {
        constexpr int K_SCALE_ROW = K::SCALES * K::SCALE_BYTES, V_SCALE_ROW = V::SCALES * V::SCALE_BYTES;
        for (u32 r = 0; r < TILE; r += RUN) {
            u32 position = tile * TILE + r;
            if (position >= len || position + RUN <= first) continue;
            u32 s = slot + r;
            if (s >= capacity) s %= capacity;
            const u32 row = store_row(pages[s / page_size(p)], s);
            copy_run<K>(stage, p.key.codes + codes_at<K>(p.key.strides, row), r);
            copy_run<V>(stage + TILE * K::BYTES, p.value.codes + codes_at<V>(p.value.strides, row), r);
            copy_halves(stage + Layout::K_SCALES + r * K_SCALE_ROW, p.key.scales + scales_at<K>(p.key.strides, row), RUN * K_SCALE_ROW);
            copy_halves(stage + Layout::V_SCALES + r * V_SCALE_ROW, p.value.scales + scales_at<V>(p.value.strides, row), RUN * V_SCALE_ROW);
        }
    }
    template <typename R> DEVICE void copy_run(u8* to, const u8* from, u32 r) const {
        typedef Placed<R> P;
        if constexpr (RUN >= 16) {
            for (u32 c = lane; c < RUN * R::BYTES / 16; c += 32) {
                u32 offset = P::POW2 ? P::place(r + c / (R::BYTES / 16), c % (R::BYTES / 16)) : r * R::BYTES + c * 16;
                copy_async16(shared_address(to) + offset, from + c * 16);
            }
        } else {
            for (u32 b = lane * 2; b < R::BYTES; b += 64) *(u16*)(to + P::place_byte(r, b)) = *(const u16*)(from + b);
        }
    }
    DEVICE void copy_halves(u8* to, const u8* from, u32 bytes) const {
        for (u32 b = lane * 2; b < bytes; b += 64) *(u16*)(to + b) = *(const u16*)(from + b);
    }
};

// What no row sees, outside [lo, hi), may be any bits: its weight is zero, but zero times NaN is not. One warp.
DEVICE void clear_outside(u8* stage, int base, int lo, int hi, int lane) {
    constexpr int SCALE_ROW = V::SCALES * V::SCALE_BYTES, K_SCALE_ROW = K::SCALES * K::SCALE_BYTES;
    u8* const codes = stage + TILE * K::BYTES;
    for (int r = lane; r < TILE; r += 32) {
        if (base + r >= lo && base + r < hi) continue;
        for (int b = 0; b < SCALE_ROW; b += 2) *(u16*)(stage + Layout::V_SCALES + r * SCALE_ROW + b) = 0;
        if (!ValueCodec::FINITE)
            for (int c = 0; c < V::BYTES / 16; c++) *(uint4*)(codes + Placed<V>::place(r, c)) = make_uint4(0, 0, 0, 0);
        if (EXACT) {
            // Nor may a key that is not seen decide how the others are summed.
            for (int b = 0; b < K_SCALE_ROW; b += 2) *(u16*)(stage + Layout::K_SCALES + r * K_SCALE_ROW + b) = 0;
            if (!K::CODED)
                for (int c = 0; c < K::BYTES / 16; c++) *(uint4*)(stage + Placed<K>::place(r, c)) = make_uint4(0, 0, 0, 0);
        }
    }
    __syncwarp();
}
