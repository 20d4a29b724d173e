// What every kernel here uses.
#pragma once
#include "ptx.cuh"

// Element types of queries and outputs.
#define TYPE_F32 0
#define TYPE_F16 1
#define TYPE_BF16 2

template <int TYPE> DEVICE float load_element(const void* p, u64 i) {
    if (TYPE == TYPE_F32) return ((const float*)p)[i];
    u16 h = ((const u16*)p)[i];
    return TYPE == TYPE_F16 ? f32_from_f16(h) : f32_from_bf16(h);
}
template <int TYPE> DEVICE void store_element(void* p, u64 i, float x) {
    if (TYPE == TYPE_F32) ((float*)p)[i] = x;
    else ((u16*)p)[i] = TYPE == TYPE_F16 ? f16_from_f32(x) : bf16_from_f32(x);
}

// 2^-n of a float from 2^n up to 2^(n + 1), of -126 <= n <= 126.
DEVICE float inverse_power(float x) { return __uint_as_float(0x7f000000u - (__float_as_uint(x) & 0x7f800000u)); }
// tanh to about 1e-6; tanh.approx's 5e-4 would be felt in a logit. The difference from one loses what is small: of that a series.
DEVICE float tanh_exact(float x) {
    const float y = x * x, series = x * (1.f + y * (-1 / 3.f + y * (2 / 15.f + y * (-17 / 315.f + y * (62 / 2835.f)))));
    return fabsf(x) < 0.25f ? series : 1.f - __fdividef(2.f, 1.f + exp2_approx(x * 2.8853900817779268f));
}
