//! Plans in the device's memory, made by the host or, for batches that only the device knows, there.

use super::plan::{Item, Plan, Problem, Sequences};
use super::shape::is_short;
use crate::backend::cuda::driver::lock;
use crate::backend::cuda::gpu::Gpu;
use crate::backend::cuda::kernel::kernel_struct;
use crate::backend::cuda::memory::Memory;
use crate::error::{Error, Result, checked_product};
use crate::problem::{Batch, Bounds, SpanInfo};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

kernel_struct! {
    /// Query rows of a sequence that are taken together: what the device makes items of.
    pub(super) struct Entry as "Entry" {
        span: SpanInfo,
        sequence: u32,
        row: u32,
        rows: u32,
        begin: u32,
        tiles: u32,
        line: u32,
    }
}

/// Bytes of the most row tiles that a batch has. The tokens of all sequences are no bound: starts that are not in order let sequences share them.
fn entries_bytes(problem: &Problem, most: &Bounds) -> Result<usize> {
    let entries = most.sequences * (most.new * problem.group).div_ceil(problem.rows);
    // The kernel adds up what all of them cost in 32 bits.
    let cost = most.len.div_ceil(problem.tile) + problem.warps + problem.overhead();
    let what = "tiles of a batch on the device";
    let total = checked_product(what, &[entries, problem.kv_heads, cost])?;
    if total > i32::MAX as usize {
        return Err(Error::SizeOverflow { what, limit: "i32" });
    }
    Ok(entries * size_of::<Entry>())
}

/// A plan on the device, kept with its batch.
pub(super) struct DevicePlan {
    pub problem: Problem,
    /// What the kernel was chosen for: see `Shape::short`.
    short: bool,
    sequences: Sequences,
    /// None if the device makes it.
    plan: Option<Mutex<Plan>>,
    /// Room for those of any lengths, and for what the device makes them of.
    pub items: Arc<Memory>,
    /// Whether work that makes it on the device was recorded.
    refreshed: AtomicBool,
}

impl DevicePlan {
    pub fn get(
        gpu: &Gpu,
        batch: &Batch,
        problem: Problem,
        short: bool,
        sequences: &Sequences,
    ) -> Result<Arc<DevicePlan>> {
        batch.plans().get(
            |p: &DevicePlan| p.problem == problem && p.short == short && p.sequences == *sequences,
            || {
                let bytes = problem.most_items(batch.spans()) * size_of::<Item>();
                let (plan, items) = if let Some(most) = batch.bounds() {
                    let items = gpu.stream.alloc(bytes + entries_bytes(&problem, most)?)?;
                    // No work, until it is planned.
                    items.clear()?;
                    (None, items)
                } else {
                    let plan = Plan::new(&problem, batch.spans(), sequences.few.clone());
                    let items = gpu.stream.alloc(bytes)?;
                    items.write(0, bytemuck::cast_slice(&plan.items))?;
                    (Some(Mutex::new(plan)), items)
                };
                let (items, sequences) = (Arc::new(items), sequences.clone());
                Ok(DevicePlan { problem, short, sequences, plan, items, refreshed: AtomicBool::new(false) })
            },
        )
    }

    /// Whether the device is to make it, and nothing that does was recorded yet: it is now.
    pub fn is_to_be_made(&self) -> bool {
        self.plan.is_none() && !self.refreshed.swap(true, Relaxed)
    }

    /// Where what the device makes items of begins.
    pub fn entries(&self, batch: &Batch) -> u64 {
        self.items.address + (self.problem.most_items(batch.spans()) * size_of::<Item>()) as u64
    }
}

impl crate::problem::Plan for DevicePlan {
    fn suits(&self, batch: &Batch) -> bool {
        self.short == is_short(batch, self.problem.kv_heads, self.problem.blocks)
            && self.sequences.suit(batch.spans(), self.problem.group)
    }

    fn follow(&self, batch: &Batch) -> Result<bool> {
        let Some(plan) = &self.plan else { return Ok(true) };
        let mut plan = lock(plan);
        plan.follow(&self.problem, batch.spans());
        debug_assert!(plan.items.len() <= self.problem.most_items(batch.spans()));
        self.items.write(0, bytemuck::cast_slice(&plan.items)).map(|()| true)
    }
}
