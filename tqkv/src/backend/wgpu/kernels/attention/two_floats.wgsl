// Sums of two floats, the second what rounding the first has lost.
fn times(v: vec2<f32>, f: f32) -> vec2<f32> {
  let p = keep(v.x * f);
  return vec2(p, product_error(v.x, f, p) + v.y * f);
}
fn plus(v: vec2<f32>, w: vec2<f32>) -> vec2<f32> {
  let s = keep(v.x + w.x);
  let z = keep(s - v.x);
  return vec2(s, (v.x - (s - z)) + (w.x - z) + (v.y + w.y));
}
// The same sum, whose first float is all of it rounded: of two sums, the larger one's is no smaller.
fn ordered(v: vec2<f32>) -> vec2<f32> {
  let s = keep(v.x + v.y);
  let z = keep(s - v.x);
  return vec2(s, v.y - z);
}
