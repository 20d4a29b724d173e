//! Operations become dispatches when they are recorded, and one command buffer when they are submitted.

use super::context::{Context, Pipeline, lock};
use super::wgsl::{Rows, Source, Tensor};
use super::{Slot, Target, attention, dequantize, merge, quantize, rotate};
use crate::compute::KernelSource;
use crate::compute::driver::{Completion, Recorder};
use crate::error::{Error, Result};
use crate::problem::op::{Copy, Custom, Op};
use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a kernel is specialised on.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) enum Spec {
    Rotate(rotate::Spec),
    Quantize(quantize::Spec),
    Dequantize(dequantize::Spec),
    Attention(attention::Spec),
    Join(attention::JoinSpec),
    Merge(Vec<Tensor>, bool),
    /// The text of a caller's kernel.
    Custom(String),
    /// The text of a check of the device's arithmetic.
    Probe(&'static str),
}

impl Spec {
    pub fn name(&self) -> &'static str {
        match self {
            Spec::Rotate(_) => "rotate",
            Spec::Quantize(_) => "quantize",
            Spec::Dequantize(_) => "dequantize",
            Spec::Attention(_) => "attention",
            Spec::Join(_) => "join",
            Spec::Merge(..) => "merge",
            Spec::Custom(_) => "custom",
            Spec::Probe(_) => "probe",
        }
    }
}

/// What a submission does, in order.
enum Step {
    Dispatch(Dispatch),
    /// Bytes between two places of one size.
    Copy(Slot, Slot),
}

struct Dispatch {
    pipeline: Arc<Pipeline>,
    slots: Vec<Slot>,
    /// Offset and size in the arena; none if the kernel takes no parameters.
    params: Option<(u64, u64)>,
    grid: [u32; 3],
}

pub(super) struct WgpuRecorder {
    pub context: Arc<Context>,
    steps: Vec<Step>,
    /// Parameters and lists.
    arena: Vec<u32>,
    /// Bytes that the largest operation needs between its passes, in each of two buffers.
    scratch: [u64; 2],
}

impl WgpuRecorder {
    pub fn new(context: &Arc<Context>) -> Self {
        WgpuRecorder { context: context.clone(), steps: vec![], arena: vec![], scratch: [0; 2] }
    }

    /// Puts words where kernels can bind them.
    fn store(&mut self, words: &[u32]) -> (u64, u64) {
        let limits = &self.context.limits;
        let step = limits.min_uniform_buffer_offset_alignment.max(limits.min_storage_buffer_offset_alignment).max(16);
        self.arena.resize(self.arena.len().next_multiple_of(step as usize / 4), 0);
        let offset = 4 * self.arena.len() as u64;
        self.arena.extend_from_slice(words);
        self.arena.resize(self.arena.len().next_multiple_of(4), 0);
        (offset, 4 * self.arena.len() as u64 - offset)
    }

    /// A list for a kernel.
    pub fn list(&mut self, what: &str, words: &[u32]) -> Result<Slot> {
        let most = self.context.limits.max_storage_buffer_binding_size;
        if 4 * words.len() as u64 + 16 > most {
            let what = format!("bind {what} of {} words: max_storage_buffer_binding_size is {most}", words.len());
            return Err(self.context.unsupported(what));
        }
        let (offset, size) = self.store(if words.is_empty() { &[0] } else { words });
        Ok(Slot { target: Target::Arena, offset, size, rest: 0 })
    }

    /// Memory between the passes of one operation.
    pub fn scratch(&mut self, which: usize, offset: u64, bytes: u64) -> Result<Slot> {
        let most = self.context.limits.max_storage_buffer_binding_size;
        if bytes > most {
            let what = format!("bind {bytes} bytes of partial results: max_storage_buffer_binding_size is {most}");
            return Err(self.context.unsupported(what));
        }
        self.scratch[which] = self.scratch[which].max(offset + bytes);
        Ok(Slot { target: Target::Scratch(which), offset, size: bytes, rest: 0 })
    }

    /// Records one dispatch: `fields` and `tables` are the parameters in the order in which the source declares them.
    pub fn dispatch(
        &mut self,
        spec: &Spec,
        source: impl FnOnce() -> Source,
        slots: Vec<Slot>,
        groups: usize,
        fields: &[u32],
        tables: &[&[u32]],
    ) -> Result<()> {
        let pipeline = self.context.pipeline(spec, source)?;
        let most = self.context.limits.max_compute_workgroups_per_dimension as usize;
        let x = groups.min(most);
        let y = groups.div_ceil(x);
        if y > most {
            let what = format!("run {groups} workgroups: max_compute_workgroups_per_dimension is {most}");
            return Err(self.context.unsupported(what));
        }
        let mut params = vec![groups as u32, 0];
        params.extend_from_slice(fields);
        for table in tables {
            params.resize(params.len().next_multiple_of(4), 0);
            params.extend_from_slice(table);
        }
        let params = Some(self.store(&params));
        self.steps.push(Step::Dispatch(Dispatch { pipeline, slots, params, grid: [x as u32, y as u32, 1] }));
        Ok(())
    }

    fn custom(&mut self, op: Custom) -> Result<()> {
        let context = self.context.clone();
        let KernelSource::Wgsl(text) = &op.source else {
            let what = format!("run kernel {}, whose source is for another kind of device", op.name);
            return Err(context.unsupported(what));
        };
        let most = context.limits.max_compute_workgroups_per_dimension;
        if let Some(n) = op.workgroups.iter().find(|&&n| n > most) {
            let what = format!("run {n} workgroups along an axis: max_compute_workgroups_per_dimension is {most}");
            return Err(context.unsupported(what));
        }
        let pipeline = context.custom_pipeline(&op.name, text)?;
        let slots = op.bindings.iter().map(|b| Slot::new(&context, "a binding", b)).collect::<Result<Vec<_>>>()?;
        if let Some(b) = op.bindings.iter().zip(&slots).find(|(_, s)| s.rest != 0).map(|(b, _)| b) {
            let step = context.limits.min_storage_buffer_offset_alignment;
            let what = format!("bind a buffer at byte {}: min_storage_buffer_offset_alignment is {step}", b.offset());
            return Err(context.unsupported(what));
        }
        let params = if op.constants.is_empty() { None } else { Some(self.store(&op.constants)) };
        self.steps.push(Step::Dispatch(Dispatch { pipeline, slots, params, grid: op.workgroups }));
        Ok(())
    }

    fn copy(&mut self, op: &Copy) -> Result<()> {
        let place = |b: &crate::Buffer| {
            let target = Target::Buffer(super::buffer_of(b.storage())?.clone());
            Ok(Slot { target, offset: b.offset() as u64, size: b.bytes() as u64, rest: 0 })
        };
        let (from, to) = (place(&op.from)?, place(&op.to)?);
        // wgpu copies between different buffers only.
        if op.from.shares_memory(&op.to) {
            let between = Slot { target: Target::Scratch(0), offset: 0, size: from.size, rest: 0 };
            self.scratch[0] = self.scratch[0].max(from.size);
            self.steps.push(Step::Copy(from, between.clone()));
            self.steps.push(Step::Copy(between, to));
        } else {
            self.steps.push(Step::Copy(from, to));
        }
        Ok(())
    }
}

impl WgpuRecorder {
    fn take(&mut self, op: Op) -> Result<()> {
        self.context.check()?;
        match op {
            Op::Rotate(op) => rotate::record(self, &op),
            Op::Quantize(op) => quantize::record(self, &op),
            Op::Dequantize(op) => dequantize::record(self, &op),
            Op::Attention(op) => attention::record(self, &op),
            Op::Merge(op) => merge::record(self, &op),
            Op::Copy(op) => self.copy(&op),
            Op::Custom(op) => self.custom(op),
        }
    }
}

impl Recorder for WgpuRecorder {
    #[cfg(test)]
    fn dispatches(&self) -> usize {
        self.steps.iter().filter(|s| matches!(s, Step::Dispatch(_))).count()
    }

    fn record(&mut self, op: Box<dyn Any + Send>) -> Result<()> {
        self.take(Op::from_any(op))
    }

    fn submit(self: Box<Self>) -> Result<Box<dyn Completion>> {
        Ok(Box::new(self.run(None)?))
    }

    fn submit_and_time(self: Box<Self>) -> Result<Duration> {
        let context = self.context.clone();
        if !context.device.features().contains(CLOCK) {
            let started = Instant::now();
            Box::new(self.run(None)?).wait()?;
            return Ok(started.elapsed());
        }
        let clock = Clock::new(&context)?;
        Box::new(self.run(Some(&clock))?).wait()?;
        clock.read(&context)
    }
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
    fn new(context: &Context) -> Result<Self> {
        let ty = wgpu::QueryType::Timestamp;
        let queries = context
            .guarded(|| context.device.create_query_set(&wgpu::QuerySetDescriptor { label: None, ty, count: 2 }));
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        Ok(Clock {
            queries: queries.map_err(|e| context.failed(e.to_string()))?,
            ticks: context.create_buffer(16, usage)?,
        })
    }

    fn read(&self, context: &Context) -> Result<Duration> {
        let mut ticks = [0u64; 2];
        context.read(&self.ticks, 0, bytemuck::cast_slice_mut(&mut ticks))?;
        let nanoseconds = ticks[1].saturating_sub(ticks[0]) as f64 * f64::from(context.queue.get_timestamp_period());
        Ok(Duration::from_secs_f64(nanoseconds / 1e9))
    }
}

impl WgpuRecorder {
    fn run(&self, clock: Option<&Clock>) -> Result<Submitted> {
        let context = self.context.clone();
        context.check()?;
        let mut shared = lock(&context.shared);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST;
        let arena = context.grown(&mut shared.arena, 4 * self.arena.len().max(4) as u64, usage)?;
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let [first, second] = &mut shared.scratch;
        let scratch = [
            context.grown(first, self.scratch[0].max(16), usage)?,
            context.grown(second, self.scratch[1].max(16), usage)?,
        ];
        let buffer_of = |slot: &Slot| match &slot.target {
            Target::Buffer(buffer) => buffer.clone(),
            Target::Arena => arena.clone(),
            Target::Scratch(which) => scratch[*which].clone(),
        };
        let index = context.guarded(|| {
            if !self.arena.is_empty() {
                context.queue.write_buffer(&arena, 0, bytemuck::cast_slice(&self.arena));
            }
            let mut encoder = context.device.create_command_encoder(&Default::default());
            if let Some(clock) = clock {
                encoder.write_timestamp(&clock.queries, 0);
            }
            let mut pass = None;
            for step in &self.steps {
                match step {
                    Step::Copy(from, to) => {
                        pass = None;
                        let (source, target) = (buffer_of(from), buffer_of(to));
                        encoder.copy_buffer_to_buffer(&source, from.offset, &target, to.offset, from.size);
                    }
                    Step::Dispatch(dispatch) => {
                        let group = bind(&context.device, dispatch, &buffer_of, &arena);
                        let pass = pass
                            .get_or_insert_with(|| encoder.begin_compute_pass(&Default::default()).forget_lifetime());
                        pass.set_pipeline(&dispatch.pipeline.pipeline);
                        pass.set_bind_group(0, &group, &[]);
                        pass.dispatch_workgroups(dispatch.grid[0], dispatch.grid[1], dispatch.grid[2]);
                    }
                }
            }
            drop(pass);
            if let Some(clock) = clock {
                encoder.write_timestamp(&clock.queries, 1);
                encoder.resolve_query_set(&clock.queries, 0..2, &clock.ticks, 0);
            }
            context.queue.submit([encoder.finish()])
        });
        drop(shared);
        context.check()?;
        let index = index.map_err(|e| match e {
            wgpu::Error::OutOfMemory { .. } => {
                Error::OutOfMemory { device: context.info.id.clone(), requested: 4 * self.arena.len() }
            }
            e => context.failed(e.to_string()),
        })?;
        Ok(Submitted { context, index })
    }
}

fn bind(
    device: &wgpu::Device,
    dispatch: &Dispatch,
    buffer_of: &impl Fn(&Slot) -> wgpu::Buffer,
    arena: &wgpu::Buffer,
) -> wgpu::BindGroup {
    let params = dispatch.params.map(|(offset, size)| (arena.clone(), offset, size));
    let places: Vec<_> = dispatch.slots.iter().map(|s| (buffer_of(s), s.offset, s.size)).chain(params).collect();
    let entries: Vec<_> = places
        .iter()
        .enumerate()
        .map(|(i, (buffer, offset, size))| wgpu::BindGroupEntry {
            binding: i as u32,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer,
                offset: *offset,
                size: std::num::NonZeroU64::new(*size),
            }),
        })
        .collect();
    let layout = &dispatch.pipeline.layout;
    device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
}

struct Submitted {
    context: Arc<Context>,
    index: wgpu::SubmissionIndex,
}

impl Completion for Submitted {
    fn wait(self: Box<Self>) -> Result<()> {
        self.context.wait(Some(self.index))
    }
}

/// A pool as a kernel reads it: its bindings, how its rows lie, and the bytes at which codes and scales start.
pub(super) fn pool_slots(
    context: &Context,
    what: &str,
    pool: &crate::problem::PagePool,
) -> Result<(Vec<Slot>, Rows, [u32; 2])> {
    let codes = Slot::new(context, what, pool.codes())?;
    let rows = Rows::new(pool, codes.rest, codes.size as usize);
    let mut offsets = [codes.rest as u32, 0];
    let mut slots = vec![codes];
    if let Some(scales) = pool.scales() {
        let scales = Slot::new(context, "scales", scales)?;
        offsets[1] = scales.rest as u32;
        slots.push(scales);
    }
    Ok((slots, rows, offsets))
}
