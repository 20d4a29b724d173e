fn flip4(i: u32, v: vec4<f32>) -> vec4<f32> {
  let bits = tables.signs[i >> 7u][(i >> 5u) & 3u] >> (i & 31u);
  return bitcast<vec4<f32>>(bitcast<vec4<u32>>(v) ^ ((vec4(bits) << vec4(31u, 30u, 29u, 28u)) & vec4(0x80000000u)));
}
fn flip8(i: u32, v: Eight) -> Eight { return Eight(flip4(i, v.a), flip4(i + 4u, v.b)); }
