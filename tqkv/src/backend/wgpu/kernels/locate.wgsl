// The pool's row for row r of the input, which counts heads within tokens.
fn locate(r: u32) -> u32 {
  let token = r / a.kv_heads;
  let head = r % a.kv_heads;
  // The first span that ends after the token: (first, len, start, new) each.
  var low = 0u;
  var high = a.sequences - 1u;
  while (low < high) {
    let middle = (low + high) / 2u;
    let span = a.spans_off + 4u * middle;
    if (batch[span + 2u] + batch[span + 3u] <= token) { low = middle + 1u; } else { high = middle; }
  }
  let span = a.spans_off + 4u * low;
  let position = batch[span + 1u] - batch[span + 3u] + token - batch[span + 2u];
  let slot = position % a.slots;
  let page = batch[a.table_off + low * a.width + slot / a.page_size];
  return (page * a.kv_heads + head) * a.page_size + slot % a.page_size;
}
