//! Batches whose page tables and lengths are on the device: what they hold is read, and planned for, there.

use super::device_plan::{DevicePlan, Entry};
use super::params::window;
use super::plan::Item;
use crate::backend::cuda::gpu::{Gpu, Recording};
use crate::backend::cuda::kernel::{KernelKey, KernelText, kernel_struct};
use crate::backend::cuda::memory::{address, batch_addresses};
use crate::error::Result;
use crate::format::DType;
use crate::problem::Batch;
use std::sync::Arc;

static REFRESH: KernelText = KernelText {
    name: "refresh",
    text: include_str!("../kernels/refresh.cu"),
    options: &[],
    macros: &[],
    asserts: || Item::asserts() + &Entry::asserts() + &Params::asserts(),
    shared_memory_symbol: None,
};

kernel_struct! {
    struct Params as "Params" {
        tables: u64,
        lens: u64,
        starts: u64,
        spans: u64,
        own: u64,
        out_of_range: u64,
        items: u64,
        entries: u64,
        stride: u64,
        wide_tables: u32,
        wide_lens: u32,
        sequences: u32,
        width: u32,
        page_size: u32,
        pages: u32,
        tokens: u32,
        most_new: u32,
        most_len: u32,
        kv_heads: u32,
        group: u32,
        rows: u32,
        tile: u32,
        warps: u32,
        blocks: u32,
        overhead: u32,
        causal: u32,
        window: u32,
    }
}

pub(in crate::backend::cuda) fn refresh_key() -> KernelKey {
    REFRESH.with([])
}

/// Reads a batch's content, and makes all its plans.
pub(in crate::backend::cuda) fn refresh(gpu: &Gpu, batch: &Batch, to: &mut Recording) -> Result<()> {
    // Where the host knows the lengths, it has made them.
    let plans = if batch.bounds().is_some() { batch.plans().all::<DevicePlan>() } else { vec![] };
    let (first, others) = plans.split_first().map_or((None, &[][..]), |(first, others)| (Some(first), others));
    record(gpu, batch, true, first, to)?;
    others.iter().try_for_each(|plan| record(gpu, batch, false, Some(plan), to))
}

/// Makes a plan for what a batch's memory holds by then.
pub(super) fn make(gpu: &Gpu, batch: &Batch, plan: &Arc<DevicePlan>, to: &mut Recording) -> Result<()> {
    record(gpu, batch, false, Some(plan), to)
}

/// `reads`: whether tables and lengths are brought up to date, too.
fn record(gpu: &Gpu, batch: &Batch, reads: bool, plan: Option<&Arc<DevicePlan>>, to: &mut Recording) -> Result<()> {
    let Some(source) = batch.source() else { return Ok(()) };
    let [spans, own] = batch_addresses(batch)?;
    let (sequences, width) = (batch.sequences(), batch.width());
    let wide = |dtype: DType| (dtype == DType::I64) as u32;
    let mut params = Params {
        tables: address(&source.entries),
        spans,
        own,
        out_of_range: own + 4 * (sequences * width) as u64,
        stride: source.stride as u64,
        wide_tables: wide(source.entries.dtype()),
        sequences: sequences as u32,
        width: width as u32,
        page_size: batch.page_size() as u32,
        pages: batch.pages() as u32,
        tokens: batch.tokens() as u32,
        ..bytemuck::Zeroable::zeroed()
    };
    if let Some((lens, starts, most)) = &source.lengths {
        (params.lens, params.starts, params.wide_lens) = (address(lens), address(starts), wide(lens.dtype()));
        (params.most_new, params.most_len) = (most.new as u32, most.len as u32);
    }
    if let Some(plan) = plan {
        let problem = &plan.problem;
        params = Params {
            items: plan.items.address,
            entries: plan.entries(batch),
            kv_heads: problem.kv_heads as u32,
            group: problem.group as u32,
            rows: problem.rows as u32,
            tile: problem.tile as u32,
            warps: problem.warps as u32,
            blocks: problem.blocks as u32,
            overhead: problem.overhead() as u32,
            causal: problem.visible.causal as u32,
            window: window(problem.visible.window),
            ..params
        };
        to.memory.push(plan.items.clone());
    }
    let readers = if reads { gpu.blocks(sequences, 1) } else { 0 };
    gpu.launch(&refresh_key(), 1 + readers, &params, to)
}
