fn p_put_bits(word: u32, mask: u32, bits: u32) {
  atomicAnd(&p_codes[word], ~mask);
  atomicOr(&p_codes[word], bits);
}

// Stores the low `count` bits of `value` at a byte and leaves the bits around them, which others may be writing, alone.
fn p_put(byte: u32, value: u32, count: u32) {
  let shift = (byte & 3u) << 3u;
  let mask = select((1u << count) - 1u, 0xffffffffu, count == 32u);
  p_put_bits(byte >> 2u, mask << shift, value << shift);
  if (shift + count > 32u) {
    p_put_bits((byte >> 2u) + 1u, mask >> (32u - shift), value >> (32u - shift));
  }
}
