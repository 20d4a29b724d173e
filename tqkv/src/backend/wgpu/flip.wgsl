fn flip(i: u32, v: Eight) -> Eight {
  let bits = vec4(a.signs[i >> 7u][(i >> 5u) & 3u] >> (i & 31u));
  let low = (bits >> vec4(0u, 1u, 2u, 3u)) << vec4(31u);
  let high = (bits >> vec4(4u, 5u, 6u, 7u)) << vec4(31u);
  return Eight(bitcast<vec4<f32>>(bitcast<vec4<u32>>(v.a) ^ low), bitcast<vec4<f32>>(bitcast<vec4<u32>>(v.b) ^ high));
}
