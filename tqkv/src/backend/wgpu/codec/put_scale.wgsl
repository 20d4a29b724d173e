// Two rows' scales share a word, and another workgroup may be writing the other.
fn p_put_scale(row: u32, scale: u32) {
  let i = (a.p_scales_off >> 1u) + row;
  let shift = (i & 1u) << 4u;
  atomicAnd(&p_scales[i >> 1u], ~(0xffffu << shift));
  atomicOr(&p_scales[i >> 1u], scale << shift);
}
