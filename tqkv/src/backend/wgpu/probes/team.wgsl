// Words that the threads of a subgroup pass around in the workgroup's memory, with no other barrier than their own.
var<workgroup> held: array<u32, 128>;
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(subgroup_id) sid: u32, @builtin(subgroup_invocation_id) lane: u32, @builtin(num_subgroups) sgs: u32) {
  let lanes = 128u / sgs;
  let first = sid * lanes;
  let i = (wid.y * grid.x + wid.x) * 128u + first + lane;
  var v = x[i];
  for (var k = 0u; k < 16u; k++) {
    held[first + lane] = v;
    subgroupBarrier();
    v = 3u * v + held[first + (lane + k) % lanes];
    subgroupBarrier();
  }
  y[i] = v;
}
