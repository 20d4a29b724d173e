fn unpack_f16(w: u32) -> vec2<f32> { return vec2(f16_value(w & 0xffffu), f16_value(w >> 16u)); }
fn pack_f16(x: vec2<f32>) -> u32 { return f16_bits(x.x) | (f16_bits(x.y) << 16u); }
