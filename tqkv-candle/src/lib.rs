//! candle models on a tqkv cache.
