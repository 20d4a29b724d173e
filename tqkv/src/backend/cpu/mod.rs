//! The host's processor: operations run at submission, in order, each spread over threads.

mod attend;
mod attention;
mod float;
mod memory;
mod rows;
mod simd;
#[cfg(test)]
mod tests;

pub(crate) use memory::Memory;

use crate::compute::driver::{Completion, Driver, Recorder, Storage};
use crate::compute::{DType, DeviceInfo, DeviceKind, KernelSource};
use crate::error::{Error, Result};
use crate::problem::op::{Copy, Custom, Dequantize, Op, Quantize, Rotate};
use crate::problem::{Direction, Domain, RowOrder};
use rayon::prelude::*;
use rows::RowCoder;
use simd::Kernels;
use std::any::Any;
use std::sync::Arc;

/// Rows that one task encodes, decodes or rotates.
const ROWS_PER_TASK: usize = 32;
/// Decoded output from this size on is written past the caches, which it would not fit anyway.
const STREAM_BYTES: usize = 8 << 20;

pub(crate) struct Cpu {
    /// Threads of its own; rayon's global ones if `None`.
    threads: Option<Arc<rayon::ThreadPool>>,
    /// Or why none can be used: then every allocation and every recording fails.
    kernels: Result<&'static Kernels>,
}

impl Cpu {
    pub fn new() -> Self {
        Cpu { threads: None, kernels: simd::choose() }
    }

    pub fn with_threads(threads: usize) -> Result<Self> {
        Cpu::with_kernels(simd::choose()?, threads)
    }

    fn with_kernels(kernels: &'static Kernels, threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::Zero { what: "threads" });
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .map_err(|e| Error::DeviceUnavailable { device: "cpu".to_owned(), reason: e.to_string() })?;
        Ok(Cpu { threads: Some(Arc::new(pool)), kernels: Ok(kernels) })
    }
}

impl Driver for Cpu {
    fn info(&self) -> DeviceInfo {
        let threads = self.threads.as_ref().map_or_else(rayon::current_num_threads, |t| t.current_num_threads());
        DeviceInfo {
            kind: DeviceKind::Cpu,
            id: "cpu".to_owned(),
            name: format!("{} processor", std::env::consts::ARCH),
            details: vec![
                ("threads", threads.to_string()),
                ("kernels", self.kernels.as_ref().map_or_else(ToString::to_string, |k| k.name.to_owned())),
            ],
        }
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Storage>> {
        self.kernels.clone()?;
        Ok(Box::new(Memory::zeroed(bytes)?))
    }

    fn read(&self, storage: &dyn Storage, offset: usize, out: &mut [u8]) -> Result<()> {
        let bytes = memory_of(storage)?.read()?;
        out.copy_from_slice(&bytes[offset..offset + out.len()]);
        Ok(())
    }

    fn write(&self, storage: &dyn Storage, offset: usize, data: &[u8]) -> Result<()> {
        let mut bytes = memory_of(storage)?.write()?;
        bytes[offset..offset + data.len()].copy_from_slice(data);
        Ok(())
    }

    fn recorder(&self) -> Result<Box<dyn Recorder>> {
        Ok(Box::new(CpuRecorder { threads: self.threads.clone(), kernels: self.kernels.clone()?, ops: Vec::new() }))
    }

    fn workspace_bytes(&self) -> usize {
        0
    }
}

/// `ops` has checked that every buffer is on this device; this keeps the mistake loud if it ever did not.
fn memory_of(storage: &dyn Storage) -> Result<&Memory> {
    let other = || Error::WrongDevice { what: "buffer", got: "another device".into(), expected: "cpu".into() };
    storage.downcast().ok_or_else(other)
}

struct CpuRecorder {
    threads: Option<Arc<rayon::ThreadPool>>,
    kernels: &'static Kernels,
    ops: Vec<Op>,
}

impl CpuRecorder {
    fn take(&mut self, op: Op) -> Result<()> {
        if let Op::Custom(Custom { name, source, .. }) = &op
            && !matches!(source, KernelSource::Cpu(_))
        {
            let what = format!("run kernel {name}, whose source is for another kind of device");
            return Err(Error::Unsupported { device: "cpu".to_owned(), what });
        }
        self.ops.push(op);
        Ok(())
    }
}

impl Recorder for CpuRecorder {
    fn record(&mut self, op: Box<dyn Any + Send>) -> Result<()> {
        self.take(Op::from_any(op))
    }

    fn submit(self: Box<Self>) -> Result<Box<dyn Completion>> {
        let ops = &self.ops;
        let run = || ops.iter().try_for_each(|op| run(op, self.kernels));
        match &self.threads {
            Some(threads) => threads.install(run)?,
            None => run()?,
        }
        Ok(Box::new(Done))
    }
}

struct Done;

impl Completion for Done {
    fn wait(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

fn run(op: &Op, kernels: &'static Kernels) -> Result<()> {
    match op {
        Op::Rotate(op) => rotate(op, kernels),
        Op::Quantize(op) => quantize(op, kernels),
        Op::Dequantize(op) => dequantize(op, kernels),
        Op::Attention(op) => attention::attention(op, kernels),
        Op::Merge(op) => attention::merge(op),
        Op::Copy(op) => copy(op),
        Op::Custom(op) => custom(op),
    }
}

fn rotate(op: &Rotate, kernels: &'static Kernels) -> Result<()> {
    let coder = RowCoder::new(&op.row, kernels);
    let d = op.row.head_dim();
    let in_place = op.x.shares_memory(&op.out);
    let x = if in_place { None } else { Some(memory::view(&op.x)?) };
    let mut out = memory::view_mut(&op.out)?;
    let (from, to) = (op.x.dtype(), op.out.dtype());
    let (x_task, out_task) = (ROWS_PER_TASK * d * from.size(), ROWS_PER_TASK * d * to.size());
    out.bytes().par_chunks_mut(out_task).enumerate().for_each_init(Vec::new, |scratch, (task, rows)| {
        let floats = rows.len() / to.size();
        let x = x.as_ref().map(|x| &x.bytes()[task * x_task..][..floats * from.size()]);
        if to == DType::F32 {
            let v = bytemuck::cast_slice_mut(rows);
            if let Some(x) = x {
                float::load(from, x, v);
            }
            coder.rotate(op.direction, v);
        } else {
            scratch.resize(floats, 0f32);
            float::load(from, x.unwrap_or(rows), scratch);
            coder.rotate(op.direction, scratch);
            float::store(to, scratch, rows);
        }
    });
    Ok(())
}

fn quantize(op: &Quantize, kernels: &'static Kernels) -> Result<()> {
    for (x, pool) in &op.parts {
        let coder = RowCoder::new(pool.row(), kernels);
        let input = memory::view(x)?;
        let codes = memory::RowsMut::codes(pool)?;
        let scales = memory::RowsMut::scales(pool)?;
        let (d, kv_heads, dtype) = (pool.row().head_dim(), pool.kv_heads(), x.dtype());
        let row_bytes = d * dtype.size();
        let spans = op.batch.spans();
        let tokens = (0..op.batch.tokens()).into_par_iter().with_min_len(ROWS_PER_TASK.div_ceil(kv_heads));
        tokens.for_each_init(
            || vec![0f32; d],
            |v, token| {
                // The span that holds the token: the last that starts at or before it and has new tokens.
                let s = spans.partition_point(|s| (s.start + s.new) as usize <= token);
                let span = &spans[s];
                let position = (span.len - span.new) as usize + token - span.start as usize;
                let (page, slot) = op.batch.locate(s, position);
                for head in 0..kv_heads {
                    let index = (page * kv_heads + head) * pool.page_size() + slot;
                    float::load(dtype, &input.bytes()[(token * kv_heads + head) * row_bytes..][..row_bytes], v);
                    // SAFETY: `ops::quantize` has checked that no two new positions share a row, and each is written by
                    // one task only.
                    let (codes, scales) = unsafe { (codes.row_mut(index), scales.row_mut(index)) };
                    coder.encode(v, codes, scales);
                }
            },
        );
    }
    Ok(())
}

fn dequantize(op: &Dequantize, kernels: &'static Kernels) -> Result<()> {
    let coder = RowCoder::new(op.pool.row(), kernels);
    let codes = memory::Rows::codes(&op.pool)?;
    let scales = memory::Rows::scales(&op.pool)?;
    let mut out = memory::view_mut(&op.out)?;
    let (kv_heads, n, to) = (op.pool.kv_heads(), op.positions.len(), op.out.dtype());
    let (d, per_row) = (op.pool.row().head_dim(), op.pool.row().scales_per_row());
    let row_bytes = d * to.size();
    let large = op.out.bytes() >= STREAM_BYTES;
    let row_at = |r: usize| {
        let (head, i) = match op.order {
            RowOrder::TokenMajor => (r % kv_heads, r / kv_heads),
            RowOrder::HeadMajor => (r / n, r % n),
        };
        let (page, slot) = op.batch.locate(op.sequence, op.positions.get(i));
        (page * kv_heads + head) * op.pool.page_size() + slot
    };
    // Rows from `start` on, in f32.
    let fill = |start: usize, v: &mut [f32], factors: &mut [f32]| {
        let (count, mut i) = (v.len() / d, 0);
        while i < count {
            // As many rows as lie one after the other.
            let first = row_at(start + i);
            let run = (1..count - i).take_while(|&j| row_at(start + i + j) == first + j).count() + 1;
            let factors = (per_row > 0).then(|| {
                coder.factors(scales.rows(first, run), &mut factors[..run * per_row]);
                &factors[..run * per_row]
            });
            // SAFETY: `padded` gives a pointer that is readable for 64 bytes past the rows.
            unsafe { coder.decode(codes.padded(first, run), factors, &mut v[i * d..][..run * d]) };
            i += run;
        }
        if op.domain == Domain::Original {
            coder.rotate(Direction::Inverse, v);
        }
    };
    let scratch = || (vec![0f32; ROWS_PER_TASK * d], vec![0f32; ROWS_PER_TASK * per_row]);
    let tasks = out.bytes().par_chunks_mut(row_bytes * ROWS_PER_TASK).enumerate();
    tasks.for_each_init(scratch, |(v, factors), (task, rows)| {
        let start = task * ROWS_PER_TASK;
        if to == DType::F32 && !large {
            return fill(start, bytemuck::cast_slice_mut(rows), factors);
        }
        let v = &mut v[..rows.len() / to.size()];
        fill(start, v, factors);
        match to {
            DType::F32 => coder.stream(v, bytemuck::cast_slice_mut(rows)),
            _ => float::store(to, v, rows),
        }
    });
    Ok(())
}

fn copy(op: &Copy) -> Result<()> {
    let (from, to) = (op.from.offset(), op.to.offset());
    if op.from.shares_memory(&op.to) {
        memory_of(op.to.storage())?.write()?.copy_within(from..from + op.from.bytes(), to);
    } else {
        memory::view_mut(&op.to)?.bytes().copy_from_slice(memory::view(&op.from)?.bytes());
    }
    Ok(())
}

fn custom(op: &Custom) -> Result<()> {
    let KernelSource::Cpu(kernel) = &op.source else { unreachable!("checked when it was recorded") };
    let mut views = op.bindings.iter().map(memory::view_mut).collect::<Result<Vec<_>>>()?;
    let mut bindings: Vec<&mut [u8]> = views.iter_mut().map(|v| v.bytes()).collect();
    kernel(&mut bindings, &op.constants);
    Ok(())
}
