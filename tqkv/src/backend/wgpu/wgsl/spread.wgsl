// The butterflies of elements 1, 2 and 4 apart.
fn chunk4(x: vec4<f32>) -> vec4<f32> {
  let y = vec4(x.x + x.y, x.x - x.y, x.z + x.w, x.z - x.w);
  return vec4(y.xy + y.zw, y.xy - y.zw);
}
fn chunk8(v: Eight) -> Eight {
  let x = chunk4(v.a);
  let y = chunk4(v.b);
  return Eight(x + y, x - y);
}
fn put8(j: u32, v: Eight) {
  let a = bitcast<vec4<u32>>(v.a);
  let b = bitcast<vec4<u32>>(v.b);
  buf[j] = a.x; buf[j + 1u] = a.y; buf[j + 2u] = a.z; buf[j + 3u] = a.w;
  buf[j + 4u] = b.x; buf[j + 5u] = b.y; buf[j + 6u] = b.z; buf[j + 7u] = b.w;
}
fn gather4(e: u32) -> vec4<f32> {
  let j = at(e);
  return bitcast<vec4<f32>>(vec4(buf[j], buf[j + 1u], buf[j + 2u], buf[j + 3u]));
}
fn gather8(e: u32) -> Eight { return Eight(gather4(e), gather4(e + 4u)); }
