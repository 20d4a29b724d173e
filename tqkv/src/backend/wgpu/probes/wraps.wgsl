// Every thread's shuffle by a number of any size.
@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,
  @builtin(local_invocation_index) tid: u32, @builtin(subgroup_invocation_id) lane: u32) {
  let i = (wid.y * grid.x + wid.x) * 128u + tid;
  y[i] = subgroupShuffle(lane, x[i]);
}
