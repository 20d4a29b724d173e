//! A KV cache that stays compressed and is attended over directly.
