//! Operations become dispatches when they are recorded, and one command buffer when they are submitted.

use super::commands::{Commands, Place};
use super::context::Context;
use super::gpu::Gpu;
use super::kernels::{attention, dequantize, merge, quantize, rotate};
use super::memory::Memory;
use super::slot::Slot;
use crate::compute::driver::{Completion, Recorder};
use crate::compute::{Buffer, KernelSource};
use crate::error::Result;
use crate::problem::op::{Copy, Custom, Op};
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(super) struct WgpuRecorder(pub Commands);

impl Recorder for WgpuRecorder {
    #[cfg(test)]
    fn dispatches(&self) -> usize {
        self.0.dispatches()
    }

    fn record(&mut self, op: Box<dyn Any + Send>) -> Result<()> {
        let commands = &mut self.0;
        commands.context.gpu.check()?;
        match Op::from_any(op) {
            Op::Rotate(op) => rotate::record(commands, &op),
            Op::Refresh(_) => unreachable!("`Batch::on_device` makes none for this device"),
            Op::Quantize(all) => all.iter().try_for_each(|op| quantize::record(commands, op)),
            Op::Dequantize(op) => dequantize::record(commands, &op),
            Op::Attention(op) => attention::record::record(commands, &op),
            Op::Merge(op) => merge::record(commands, &op),
            Op::Copy(op) => copy(commands, &op),
            Op::Custom(op) => custom(commands, &op),
        }
    }

    fn submit(self: Box<Self>) -> Result<Box<dyn Completion>> {
        let index = self.0.submit(|_, _| {})?;
        Ok(Box::new(Submitted { context: self.0.context, index }))
    }

    fn submit_and_time(self: Box<Self>) -> Result<Duration> {
        let gpu = &self.0.context.gpu;
        if !gpu.device.features().contains(CLOCK) {
            let started = Instant::now();
            gpu.wait(Some(self.0.submit(|_, _| {})?))?;
            return Ok(started.elapsed());
        }
        let clock = Clock::new(gpu)?;
        gpu.wait(Some(self.0.submit(|encoder, before| clock.mark(encoder, before))?))?;
        clock.read(gpu)
    }
}

fn copy(commands: &mut Commands, op: &Copy) -> Result<()> {
    let place = |b: &Buffer| Ok(Place { buffer: Memory::of(b)?.buffer.clone(), offset: b.offset() as u64 });
    let (from, to, bytes) = (place(&op.from)?, place(&op.to)?, op.from.bytes() as u64);
    // wgpu copies between different buffers only.
    if op.from.shares_memory(&op.to) {
        let between = Place { buffer: commands.context.scratch(0, bytes)?.buffer.clone(), offset: 0 };
        commands.copy(from, between.clone(), bytes);
        commands.copy(between, to, bytes);
    } else {
        commands.copy(from, to, bytes);
    }
    Ok(())
}

fn custom(commands: &mut Commands, op: &Custom) -> Result<()> {
    let context = commands.context.clone();
    let gpu = &context.gpu;
    let KernelSource::Wgsl(text) = &op.source else {
        let what = format!("run kernel {}, whose source is for another kind of device", op.name);
        return Err(gpu.unsupported(what));
    };
    let most = gpu.limits.max_compute_workgroups_per_dimension;
    if let Some(n) = op.workgroups.iter().find(|&&n| n > most) {
        let what = format!("run {n} workgroups along an axis: max_compute_workgroups_per_dimension is {most}");
        return Err(gpu.unsupported(what));
    }
    let pipeline = context.pipelines.custom(gpu, &op.name, text)?;
    let slots = op.bindings.iter().map(|b| Slot::new(gpu, "a binding", b)).collect::<Result<Vec<_>>>()?;
    if let Some(b) = op.bindings.iter().zip(&slots).find(|(_, s)| s.rest != 0).map(|(b, _)| b) {
        let step = gpu.limits.min_storage_buffer_offset_alignment;
        let what = format!("bind a buffer at byte {}: min_storage_buffer_offset_alignment is {step}", b.offset());
        return Err(gpu.unsupported(what));
    }
    commands.dispatch_custom(pipeline, &slots, op.workgroups, &op.constants)
}

/// What timestamps between the commands of an encoder need.
pub(super) const CLOCK: wgpu::Features =
    wgpu::Features::TIMESTAMP_QUERY.union(wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS);

/// Two timestamps, before and after a submission's commands.
struct Clock {
    queries: wgpu::QuerySet,
    ticks: wgpu::Buffer,
}

impl Clock {
    fn new(gpu: &Gpu) -> Result<Self> {
        let ty = wgpu::QueryType::Timestamp;
        let descriptor = wgpu::QuerySetDescriptor { label: None, ty, count: 2 };
        let queries = gpu.guarded(|| gpu.device.create_query_set(&descriptor));
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        Ok(Clock { queries: queries.map_err(|e| gpu.reported(e, 16))?, ticks: gpu.create_buffer(16, usage)? })
    }

    fn mark(&self, encoder: &mut wgpu::CommandEncoder, before: bool) {
        encoder.write_timestamp(&self.queries, u32::from(!before));
        if !before {
            encoder.resolve_query_set(&self.queries, 0..2, &self.ticks, 0);
        }
    }

    fn read(&self, gpu: &Gpu) -> Result<Duration> {
        let mut ticks = [0u64; 2];
        gpu.read(&self.ticks, 0, bytemuck::cast_slice_mut(&mut ticks))?;
        let nanoseconds = ticks[1].saturating_sub(ticks[0]) as f64 * f64::from(gpu.queue.get_timestamp_period());
        Ok(Duration::from_secs_f64(nanoseconds / 1e9))
    }
}

struct Submitted {
    context: Arc<Context>,
    index: wgpu::SubmissionIndex,
}

impl Completion for Submitted {
    fn wait(self: Box<Self>) -> Result<()> {
        self.context.gpu.wait(Some(self.index))
    }
}
