// This device's own conversions round as ours do (checked when it was opened).
fn unpack_f16(w: u32) -> vec2<f32> { return unpack2x16float(w); }
fn pack_f16(x: vec2<f32>) -> u32 { return pack2x16float(x); }
