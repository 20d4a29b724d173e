//! Dispatches and copies that wait to be submitted: what kernels record into.
//!
//! A dispatch that has been seen before takes no memory of the device and makes no object there: its pipeline, tables and bind
//! group are found by small keys, and its parameters are words at an offset that the bind group leaves open.

use super::context::Context;
use super::gpu::lock;
use super::kernel::Kernel;
use super::memory::Memory;
use super::pipelines::{Pipeline, params_bytes};
use super::slot::Slot;
use crate::error::Result;
use crate::problem::Batch;
use std::any::Any;
use std::sync::Arc;

/// What a submission does, in order.
enum Step {
    Dispatch {
        pipeline: Arc<Pipeline>,
        group: wgpu::BindGroup,
        /// Where the parameters are in their segment, if the group leaves it open.
        offset: Option<u32>,
        grid: [u32; 3],
    },
    /// Bytes between two places, which hold them until then.
    Copy { from: Place, to: Place, bytes: u64 },
}

#[derive(Clone)]
pub(super) struct Place {
    pub buffer: wgpu::Buffer,
    pub offset: u64,
}

/// Memory for parameters and lists, and what is written there before the work runs.
struct Segment {
    memory: Arc<Memory>,
    words: Vec<u32>,
}

/// A list for kernels.
#[derive(Clone)]
pub(super) struct List {
    memory: Arc<Memory>,
    /// Words from the binding's start.
    pub first: u32,
}

impl List {
    pub fn slot(&self) -> Slot<'_> {
        Slot::whole(&self.memory)
    }
}

/// A batch where kernels can read it: `spans` and `table` count words from the binding's start.
#[derive(Clone)]
pub(super) struct BatchList {
    list: List,
    pub spans: u32,
    pub table: u32,
}

impl BatchList {
    pub fn slot(&self) -> Slot<'_> {
        self.list.slot()
    }
}

pub(super) struct Commands {
    pub context: Arc<Context>,
    steps: Vec<Step>,
    segments: Vec<Segment>,
    /// Batches that have been listed.
    batches: Vec<(Batch, BatchList)>,
    /// Other lists, by what they are made from, which lives as long.
    shared: Vec<(Arc<dyn Any + Send + Sync>, List)>,
    /// The key of a bind group, kept for its memory.
    key: Vec<u64>,
    dispatches: usize,
}

impl Commands {
    pub fn new(context: &Arc<Context>) -> Self {
        Commands {
            context: context.clone(),
            steps: vec![],
            segments: vec![],
            batches: vec![],
            shared: vec![],
            key: vec![],
            dispatches: 0,
        }
    }

    #[cfg(test)]
    pub fn dispatches(&self) -> usize {
        self.dispatches
    }

    /// The segment that has room for so many words more, at a multiple of `step` words.
    fn room(&mut self, words: usize, step: usize) -> Result<&mut Segment> {
        let fits = |s: &Segment| 4 * (s.words.len().next_multiple_of(step) + words) as u64 <= s.memory.buffer.size();
        if !self.segments.last().is_some_and(fits) {
            let memory = self.context.segment(self.segments.len(), 4 * words.next_multiple_of(4) as u64)?;
            self.segments.push(Segment { memory, words: vec![] });
        }
        let last = self.segments.len() - 1;
        let segment = &mut self.segments[last];
        segment.words.resize(segment.words.len().next_multiple_of(step), 0);
        Ok(segment)
    }

    /// Puts a list where kernels can bind it.
    pub fn list(&mut self, what: &str, words: &[u32]) -> Result<List> {
        let most = self.context.gpu.limits.max_storage_buffer_binding_size;
        if 4 * words.len() as u64 + 16 > most {
            let what = format!("bind {what} of {} words: max_storage_buffer_binding_size is {most}", words.len());
            return Err(self.context.gpu.unsupported(what));
        }
        // Vectors of four words, whatever comes after them.
        let segment = self.room(words.len().max(1), 4)?;
        let first = segment.words.len() as u32;
        segment.words.extend_from_slice(words);
        Ok(List { memory: segment.memory.clone(), first })
    }

    /// Puts a batch's spans and page tables where kernels can bind them, once a submission.
    pub fn batch(&mut self, batch: &Batch) -> Result<BatchList> {
        let same = |other: &Batch| std::ptr::eq(other.spans(), batch.spans());
        if let Some((_, list)) = self.batches.iter().find(|(other, _)| same(other)) {
            return Ok(list.clone());
        }
        let spans = bytemuck::cast_slice::<_, u32>(batch.spans());
        let words: Vec<u32> = spans.iter().chain(batch.table()).copied().collect();
        let list = self.list("the page tables", &words)?;
        let listed = BatchList { spans: list.first, table: list.first + spans.len() as u32, list };
        self.batches.push((batch.clone(), listed.clone()));
        Ok(listed)
    }

    /// Puts a list that is made from `of` where kernels can bind it, once a submission.
    pub fn shared_list<T: Any + Send + Sync>(
        &mut self,
        what: &str,
        of: &Arc<T>,
        words: impl Fn(&T) -> &[u32],
    ) -> Result<List> {
        let address = Arc::as_ptr(of).cast::<()>();
        if let Some((_, list)) = self.shared.iter().find(|(other, _)| Arc::as_ptr(other).cast::<()>() == address) {
            return Ok(list.clone());
        }
        let list = self.list(what, words(of))?;
        self.shared.push((of.clone(), list.clone()));
        Ok(list)
    }

    /// Memory between the passes of one operation.
    pub fn scratch(&self, which: usize, bytes: u64) -> Result<Arc<Memory>> {
        let gpu = &self.context.gpu;
        let most = gpu.limits.max_storage_buffer_binding_size;
        if bytes > most {
            let what = format!("bind {bytes} bytes of partial results: max_storage_buffer_binding_size is {most}");
            return Err(gpu.unsupported(what));
        }
        self.context.scratch(which, bytes)
    }

    /// Records a dispatch of so many workgroups. `slots` are the kernel's bindings in the order in which its text declares them.
    pub fn dispatch<K: Kernel>(&mut self, kernel: &K, slots: &[Slot], groups: usize, params: &K::Params) -> Result<()> {
        let context = self.context.clone();
        let pipeline = context.pipelines.get(&context.gpu, kernel)?;
        let most = context.gpu.limits.max_compute_workgroups_per_dimension as usize;
        let x = groups.min(most);
        let y = groups.div_ceil(x);
        if y > most {
            let what = format!("run {groups} workgroups: max_compute_workgroups_per_dimension is {most}");
            return Err(context.gpu.unsupported(what));
        }
        let bytes = params_bytes::<K::Params>();
        let step = context.gpu.limits.min_uniform_buffer_offset_alignment.max(16) as usize / 4;
        let segment = self.room(bytes as usize / 4, step)?;
        let offset = 4 * segment.words.len() as u32;
        let end = segment.words.len() + bytes as usize / 4;
        segment.words.extend([groups as u32, 0]);
        let words = bytemuck::bytes_of(params).chunks_exact(4);
        segment.words.extend(words.map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])));
        segment.words.resize(end, 0);
        let memory = segment.memory.clone();
        let params = Slot { memory: &memory, offset: 0, size: bytes, rest: 0 };
        let group = self.group(&pipeline, &params, slots)?;
        let grid = [x as u32, y as u32, 1];
        self.steps.push(Step::Dispatch { pipeline, group, offset: Some(offset), grid });
        self.dispatches += 1;
        Ok(())
    }

    /// The bind group of a dispatch, which is made if it is new.
    fn group(&mut self, pipeline: &Pipeline, params: &Slot, slots: &[Slot]) -> Result<wgpu::BindGroup> {
        let bindings = || std::iter::once(params).chain(slots);
        self.key.clear();
        self.key.push(pipeline.id);
        self.key.extend(bindings().flat_map(|s| [s.memory.id, s.offset, s.size]));
        if let Some(group) = self.context.groups.get(&self.key) {
            return Ok(group);
        }
        let group = bind(&self.context, pipeline, bindings())?;
        bindings().for_each(|s| s.memory.is_bound());
        self.context.groups.keep(&self.key, &group);
        Ok(group)
    }

    /// Records a caller's kernel, whose bind group is made anew each time.
    pub fn dispatch_custom(
        &mut self,
        pipeline: Arc<Pipeline>,
        slots: &[Slot],
        grid: [u32; 3],
        constants: &[u32],
    ) -> Result<()> {
        let mut bindings = slots.to_vec();
        let memory;
        if !constants.is_empty() {
            let step = self.context.gpu.limits.min_uniform_buffer_offset_alignment.max(16) as usize / 4;
            let padded = constants.len().next_multiple_of(4);
            let segment = self.room(padded, step)?;
            let offset = 4 * segment.words.len() as u64;
            segment.words.extend_from_slice(constants);
            segment.words.resize(segment.words.len().next_multiple_of(4), 0);
            memory = segment.memory.clone();
            bindings.push(Slot { memory: &memory, offset, size: 4 * padded as u64, rest: 0 });
        }
        let group = bind(&self.context, &pipeline, bindings.iter())?;
        self.steps.push(Step::Dispatch { pipeline, group, offset: None, grid });
        self.dispatches += 1;
        Ok(())
    }

    pub fn copy(&mut self, from: Place, to: Place, bytes: u64) {
        self.steps.push(Step::Copy { from, to, bytes });
    }

    /// Hands everything to the device. `around` is called with the encoder before the first command and after the last.
    pub fn submit(&self, around: impl Fn(&mut wgpu::CommandEncoder, bool)) -> Result<wgpu::SubmissionIndex> {
        let gpu = &self.context.gpu;
        gpu.check()?;
        let _turn = lock(&gpu.turn);
        let index = gpu.guarded(|| {
            for segment in &self.segments {
                gpu.queue.write_buffer(&segment.memory.buffer, 0, bytemuck::cast_slice(&segment.words));
            }
            let mut encoder = gpu.device.create_command_encoder(&Default::default());
            around(&mut encoder, true);
            self.encode(&mut encoder);
            around(&mut encoder, false);
            gpu.queue.submit([encoder.finish()])
        });
        gpu.check()?;
        let words: usize = self.segments.iter().map(|s| s.words.len()).sum();
        index.map_err(|e| gpu.reported(e, 4 * words))
    }

    fn encode(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = None;
        let mut last = None;
        for step in &self.steps {
            match step {
                Step::Copy { from, to, bytes } => {
                    (pass, last) = (None, None);
                    encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &to.buffer, to.offset, *bytes);
                }
                Step::Dispatch { pipeline, group, offset, grid } => {
                    let pass =
                        pass.get_or_insert_with(|| encoder.begin_compute_pass(&Default::default()).forget_lifetime());
                    if last.replace(pipeline.id) != Some(pipeline.id) {
                        pass.set_pipeline(&pipeline.pipeline);
                    }
                    pass.set_bind_group(0, group, offset.as_slice());
                    pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
                }
            }
        }
    }
}

fn bind<'a>(
    context: &Context,
    pipeline: &Pipeline,
    bindings: impl Iterator<Item = &'a Slot<'a>>,
) -> Result<wgpu::BindGroup> {
    let entries: Vec<_> = bindings
        .enumerate()
        .map(|(i, slot)| wgpu::BindGroupEntry {
            binding: i as u32,
            resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                buffer: &slot.memory.buffer,
                offset: slot.offset,
                size: std::num::NonZeroU64::new(slot.size),
            }),
        })
        .collect();
    let layout = &pipeline.layout;
    let descriptor = wgpu::BindGroupDescriptor { label: None, layout, entries: &entries };
    let group = context.gpu.guarded(|| context.gpu.device.create_bind_group(&descriptor));
    context.gpu.check()?;
    group.map_err(|e| context.gpu.reported(e, 0))
}
