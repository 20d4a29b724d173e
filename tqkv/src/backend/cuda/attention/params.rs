//! What the kernels on tensor cores are handed: `Params` of attention/params.cuh.

use super::plan::Item;
use crate::backend::cuda::kernel::kernel_struct;
use crate::backend::cuda::memory::{address, batch_addresses};
use crate::backend::cuda::tables::{Side, Tables, side_asserts};
use crate::error::{Result, to_u32};
use crate::problem::Domain;
use crate::problem::op::Attention;
use bytemuck::Zeroable;

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

/// As kernels have it: one past 32 bits sees everything.
pub(super) fn window(window: Option<usize>) -> u32 {
    window.map_or(0, |w| u32::try_from(w).unwrap_or(0).min(i32::MAX as u32))
}

impl Params {
    /// Without items and workspace. `sides`: tables of keys and of values, and which levels kernels get.
    pub fn of(op: &Attention, [key, value]: [(&Tables, u64); 2]) -> Result<Self> {
        let original = op.params.domain == Domain::Original;
        let kv_heads = op.key.kv_heads();
        Ok(Params {
            key: Side::new(&op.key, key.0, key.1, original),
            value: Side::new(&op.value, value.0, value.1, original),
            page_table: batch_addresses(&op.batch)?[1],
            items: 0,
            q: address(&op.q),
            out: address(&op.out),
            lse: op.lse.as_ref().map_or(0, address),
            sink_logits: op.params.sink_logits.as_ref().map_or(0, address),
            partial: 0,
            partial_ml: 0,
            counters: 0,
            kv_heads: kv_heads as u32,
            group: to_u32("heads", op.heads / kv_heads)?,
            page_size: op.key.page_size() as u32,
            table_width: op.batch.width() as u32,
            causal: op.params.causal as u32,
            window: window(op.params.window),
            q_scale: op.params.scale,
            out_scale: 1.0,
            softcap: op.params.softcap.unwrap_or(0.0),
            scale: op.params.scale,
            key_length: 0.0,
            pad: 0,
            near: [Near::zeroed(); 2],
        })
    }
}

/// What holds all structs of the kernel to the host's layout.
pub(super) fn asserts() -> String {
    side_asserts() + &Item::asserts() + &Near::asserts() + &Params::asserts()
}
