struct Eight { a: vec4<f32>, b: vec4<f32> }

// The value itself, but behind an exclusive or with a zero that only run time knows: what is computed before is rounded
// as written, never fused with or cancelled against what follows.
fn keep(x: f32) -> f32 { return bitcast<f32>(bitcast<u32>(x) ^ a.zero); }
fn keep4(x: vec4<f32>) -> vec4<f32> { return bitcast<vec4<f32>>(bitcast<vec4<u32>>(x) ^ vec4(a.zero)); }

fn times4(v: vec4<f32>, f: f32) -> vec4<f32> { return v * f; }
fn times8(v: Eight, f: f32) -> Eight { return Eight(v.a * f, v.b * f); }

fn with_signs(v: Eight, signs: Eight) -> Eight {
  let a = bitcast<vec4<u32>>(v.a) ^ bitcast<vec4<u32>>(signs.a);
  let b = bitcast<vec4<u32>>(v.b) ^ bitcast<vec4<u32>>(signs.b);
  return Eight(bitcast<vec4<f32>>(a), bitcast<vec4<f32>>(b));
}

fn is_finite(x: f32) -> bool { return (bitcast<u32>(x) & 0x7f800000u) != 0x7f800000u; }

// x·y - p exactly, for p = x·y rounded: Dekker's product (Numerische Mathematik 18, 1971) over halves of 12 bits.
fn product_error(x: f32, y: f32, p: f32) -> f32 {
  let xh = bitcast<f32>(bitcast<u32>(x) & 0xfffff000u);
  let yh = bitcast<f32>(bitcast<u32>(y) & 0xfffff000u);
  let xl = x - xh;
  let yl = y - yh;
  return ((xh * yh - p) + xh * yl + xl * yh) + xl * yl;
}

// Division and square root of a GPU may be off by some units in the last place: one exact residual repairs them.
fn exact_div(x: f32, y: f32) -> f32 {
  let q = keep(x / y);
  let p = keep(q * y);
  let fixed = q + ((x - p) - product_error(q, y, p)) / y;
  return select(q, fixed, is_finite(q) && is_finite(fixed));
}

fn exact_sqrt(x: f32) -> f32 {
  let s = keep(sqrt(x));
  let p = keep(s * s);
  let fixed = s + ((x - p) - product_error(s, s, p)) / (2.0 * s);
  return select(s, fixed, x > 1e-30 && is_finite(x));
}

fn f16_value(h: u32) -> f32 {
  let sign = (h & 0x8000u) << 16u;
  let exponent = (h >> 10u) & 31u;
  let mantissa = h & 0x3ffu;
  let small = bitcast<u32>(f32(mantissa) * 5.9604644775390625e-8);
  let large = (select(exponent + 112u, 255u, exponent == 31u) << 23u) | (mantissa << 13u);
  return bitcast<f32>(sign | select(large, small, exponent == 0u));
}

// To nearest, ties to even.
fn f16_bits(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  let sign = (bits >> 16u) & 0x8000u;
  let m = bits & 0x7fffffffu;
  if (m > 0x7f800000u) { return sign | 0x7e00u | ((m >> 13u) & 0x3ffu); }
  if (m >= 0x477ff000u) { return sign | 0x7c00u; }
  if (m <= 0x33000000u) { return sign; }
  if (m < 0x38800000u) {
    let shift = 126u - (m >> 23u);
    let mantissa = (m & 0x7fffffu) | 0x800000u;
    let q = mantissa >> shift;
    let rest = mantissa & ((1u << shift) - 1u);
    let tie = 1u << (shift - 1u);
    return sign | (q + select(0u, 1u, rest > tie || (rest == tie && (q & 1u) == 1u)));
  }
  let t = m - 0x38000000u;
  return sign | ((t + 0xfffu + ((t >> 13u) & 1u)) >> 13u);
}

fn bf16_bits(x: f32) -> u32 {
  let bits = bitcast<u32>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) { return (bits >> 16u) | 0x40u; }
  return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn unpack_bf16(w: u32) -> vec2<f32> { return bitcast<vec2<f32>>(vec2(w << 16u, w & 0xffff0000u)); }
fn pack_bf16(x: vec2<f32>) -> u32 { return bf16_bits(x.x) | (bf16_bits(x.y) << 16u); }

fn pack_f16_eight(v: Eight) -> vec4<u32> {
  return vec4(pack_f16(v.a.xy), pack_f16(v.a.zw), pack_f16(v.b.xy), pack_f16(v.b.zw));
}
fn pack_bf16_eight(v: Eight) -> vec4<u32> {
  return vec4(pack_bf16(v.a.xy), pack_bf16(v.a.zw), pack_bf16(v.b.xy), pack_bf16(v.b.zw));
}
