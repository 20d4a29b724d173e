// Both conversions of a word: its halves to f32, and words 1 and 2 of each three to halves.
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) tid: u32) {
  let i = 3u * ((wid.y * grid.x + wid.x) * 128u + tid);
  let pair = unpack2x16float(x[i]);
  y[i] = bitcast<u32>(pair.x);
  y[i + 1u] = bitcast<u32>(pair.y);
  y[i + 2u] = pack2x16float(vec2(bitcast<f32>(x[i + 1u]), bitcast<f32>(x[i + 2u])));
}
