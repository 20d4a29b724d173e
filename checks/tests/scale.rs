//! A snapshot larger than the memory that it takes.

#[test]
fn a_snapshot_is_streamed_in_flat_memory() {
    let (bytes, grown, _) = tqkv_checks::scale::streamed(2).unwrap();
    assert!(bytes > 2 << 30);
    assert!(grown < 200 << 20, "{} MiB more in memory", grown >> 20);
}
