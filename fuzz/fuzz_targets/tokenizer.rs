#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tqkv_checks::targets::run("tokenizer", bytes));
