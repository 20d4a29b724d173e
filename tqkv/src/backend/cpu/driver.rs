//! The device: memory, and operations that run at submission, in order, each spread over threads.

use super::isa::Isa;
use super::memory::{Memory, view_mut_of, view_of};
use super::threads::Threads;
use super::{attention, ops};
use crate::compute::driver::{Completion, Driver, Recorder, Storage};
use crate::compute::{DeviceInfo, DeviceKind, KernelSource};
use crate::error::{Error, Result};
use crate::problem::op::{Custom, Op};
use std::any::Any;
use std::sync::Arc;

pub(crate) struct Cpu {
    threads: Arc<Threads>,
    /// Or why none can be used: then every allocation and every recording fails.
    isa: Result<Isa>,
}

impl Cpu {
    pub fn new() -> Self {
        Cpu { threads: Arc::new(Threads::global()), isa: Isa::choose() }
    }

    pub fn with_threads(threads: usize) -> Result<Self> {
        Cpu::with_isa(Isa::choose()?, threads)
    }

    /// Fails if no kernels can be used.
    pub(super) fn expect_usable(&self) -> Result<()> {
        self.isa.clone().map(|_| ())
    }

    pub(super) fn with_isa(isa: Isa, threads: usize) -> Result<Self> {
        if threads == 0 {
            return Err(Error::Zero { what: "threads" });
        }
        Ok(Cpu { threads: Arc::new(Threads::new(threads)?), isa: Ok(isa) })
    }
}

impl Driver for Cpu {
    fn info(&self) -> DeviceInfo {
        let kernels = self.isa.as_ref().map_or_else(ToString::to_string, |isa| isa.name().to_owned());
        let name = format!("{} processor", std::env::consts::ARCH);
        let info = DeviceInfo::new(DeviceKind::Cpu, "cpu".to_owned(), name, vec![("kernels", kernels)]);
        DeviceInfo { threads: Some(self.threads.count()), ..info }
    }

    fn alloc(&self, bytes: usize) -> Result<Box<dyn Storage>> {
        self.expect_usable()?;
        Ok(Box::new(Memory::zeroed(bytes)?))
    }

    fn read(&self, storage: &dyn Storage, offset: usize, out: &mut [u8]) -> Result<()> {
        out.copy_from_slice(view_of(storage, offset..offset + out.len())?.bytes());
        Ok(())
    }

    fn write(&self, storage: &dyn Storage, offset: usize, data: &[u8]) -> Result<()> {
        view_mut_of(storage, offset..offset + data.len())?.bytes().copy_from_slice(data);
        Ok(())
    }

    fn recorder(&self) -> Result<Box<dyn Recorder>> {
        Ok(Box::new(CpuRecorder { threads: self.threads.clone(), isa: self.isa.clone()?, ops: Vec::new() }))
    }

    fn takes_strides(&self) -> bool {
        true
    }

    fn workspace_bytes(&self) -> usize {
        0
    }
}

struct CpuRecorder {
    threads: Arc<Threads>,
    isa: Isa,
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
        self.threads.run(|| ops.iter().try_for_each(|op| run(op, self.isa)))?;
        Ok(Box::new(Done))
    }
}

struct Done;

impl Completion for Done {
    fn wait(self: Box<Self>) -> Result<()> {
        Ok(())
    }
}

fn run(op: &Op, isa: Isa) -> Result<()> {
    match op {
        Op::Rotate(op) => ops::rotate(op, isa),
        Op::Refresh(_) => unreachable!("`Batch::on_device` makes none for this device"),
        Op::Quantize(all) => all.iter().try_for_each(|op| ops::quantize(op, isa)),
        Op::Dequantize(op) => ops::dequantize(op, isa),
        Op::Attention(op) => attention::attention(op, isa),
        Op::Merge(op) => attention::merge(op),
        Op::Copy(op) => ops::copy(op),
        Op::Custom(op) => ops::custom(op),
    }
}
