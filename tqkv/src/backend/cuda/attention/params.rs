//! What the tensor-core kernel is handed: `Params` of attention/params.cuh.

use super::plan::Item;
use crate::backend::cuda::kernel::kernel_struct;
use crate::backend::cuda::tables::{Side, Turn};

kernel_struct! {
    pub(super) struct Near as "Near" {
        key: Side,
        value: Side,
        spans: u64,
        table: u64,
        width: u32,
        page_size: u32,
        causal: u32,
        window: u32,
        key_factor: f32,
        value_factor: f32,
    }
}

kernel_struct! {
    pub(super) struct Params as "Params" {
        key: Side,
        value: Side,
        page_table: u64,
        items: u64,
        q: u64,
        out: u64,
        lse: u64,
        sink_logits: u64,
        partial: u64,
        partial_ml: u64,
        counters: u64,
        kv_heads: u32,
        group: u32,
        page_size: u32,
        table_width: u32,
        causal: u32,
        window: u32,
        q_scale: f32,
        out_scale: f32,
        softcap: f32,
        scale: f32,
        key_length: f32,
        pad: u32,
        near: [Near; 2],
    }
}

/// What holds all structs of the kernel to the host's layout.
pub(super) fn asserts() -> String {
    Turn::asserts() + &Side::asserts() + &Item::asserts() + &Near::asserts() + &Params::asserts()
}
