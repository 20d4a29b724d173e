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
  buf[j] = v.a.x; buf[j + 1u] = v.a.y; buf[j + 2u] = v.a.z; buf[j + 3u] = v.a.w;
  buf[j + 4u] = v.b.x; buf[j + 5u] = v.b.y; buf[j + 6u] = v.b.z; buf[j + 7u] = v.b.w;
}
fn gather4(e: u32) -> vec4<f32> {
  let j = at(e);
  return vec4(buf[j], buf[j + 1u], buf[j + 2u], buf[j + 3u]);
}
fn gather8(e: u32) -> Eight {
  let j = at(e);
  return Eight(vec4(buf[j], buf[j + 1u], buf[j + 2u], buf[j + 3u]), vec4(buf[j + 4u], buf[j + 5u], buf[j + 6u], buf[j + 7u]));
}
