// Work items of attention on tensor cores: what a plan is made of.
#pragma once
#include "codec/row.cuh"

struct Item {
    u32 sequence, kv_head;      // row of the page table, KV head
    u32 row, rows;              // query rows [row, row + rows) of q_len * group
    u32 tile_begin, tile_end;   // position tiles
    u32 part, part_first, part_count;
    u32 first, len;             // the sequence's stored positions [first, len)
    u32 q_start, q_len;         // its queries, the last of which is at position len - 1
    u32 next;                   // this block's next item, or 0
    u32 tile_at;                // prefill.cu: where tile_begin is in the workspace
    u32 reserved;
};
