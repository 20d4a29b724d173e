//! The tqkv program.
fn main() {}
