// Joins partial results of attention, one warp a row of the output. -D: OUT_TYPE.
#include "common.cuh"

struct Part {
    const void* out;  // [rows, head_dim]
    const float* lse;  // [rows]
    u32 dtype, pad;
};
constexpr u32 FEW = 8;
struct Params {
    Part few[FEW];      // so many at most are here,
    const Part* parts;  // more of them there
    void* out;
    float* lse;  // or null
    u32 count, rows, head_dim, pad;
};

DEVICE const Part& part_of(const Params& p, u32 i) { return p.count <= FEW ? p.few[i] : p.parts[i]; }
DEVICE float load_part(const Part& part, u64 i) {
    return part.dtype == TYPE_F32   ? load_element<TYPE_F32>(part.out, i)
           : part.dtype == TYPE_F16 ? load_element<TYPE_F16>(part.out, i)
                                   : load_element<TYPE_BF16>(part.out, i);
}

extern "C" __global__ void __launch_bounds__(256) merge(const __grid_constant__ Params p) {
    begin();
    const float never = -__int_as_float(0x7f800000);
    const u32 row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= p.rows) return;
    float top = never, total = 0.f;
    for (u32 i = 0; i < p.count; i++) top = fmaxf(top, part_of(p, i).lse[row]);
    // A part that saw nothing has no weight; one that is not a number makes the sum so.
    const auto weight = [&](u32 i) { return part_of(p, i).lse[row] == never ? 0.f : expf(part_of(p, i).lse[row] - top); };
    for (u32 i = 0; i < p.count; i++) total += weight(i);
    const float inverse = total == 0.f ? 0.f : 1.f / total;
    for (u32 d = lane; d < p.head_dim; d += 32) {
        float sum = 0.f;
        for (u32 i = 0; i < p.count; i++)
            // Whatever a part without positions holds does not matter: zero times NaN would be NaN.
            if (part_of(p, i).lse[row] != never) sum += weight(i) * load_part(part_of(p, i), (u64)row * p.head_dim + d);
        store_element<OUT_TYPE>(p.out, (u64)row * p.head_dim + d, sum * inverse);
    }
    if (p.lse && lane == 0) p.lse[row] = total == 0.f ? never : top + logf(total);
}
