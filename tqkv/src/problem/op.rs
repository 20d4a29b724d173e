//! Operations as data: validated, and on their way to a backend. Shapes stand beside the fields; D is the row's head_dim.

use super::{AttentionParams, Batch, Direction, Domain, PagePool, Positions, RowOrder, Visible};
use crate::compute::{Buffer, CommandEncoder, KernelSource};
use crate::error::Result;
use crate::format::RowFormat;
use std::any::Any;

#[allow(clippy::large_enum_variant)] // A list of them is short, and attention is most of it.
/// A validated operation.
pub(crate) enum Op {
    Rotate(Rotate),
    /// Brings a batch whose content lies in the device's memory, and what is planned for it, up to date with it.
    #[allow(dead_code)] // Not every backend reads what it is of.
    Refresh(Batch),
    /// In any order: they write to other places, and none reads what another writes.
    Quantize(Vec<Quantize>),
    Dequantize(Dequantize),
    Attention(Attention),
    Merge(Merge),
    Copy(Copy),
    /// A kernel of the caller's own.
    Custom(Custom),
}

impl Op {
    /// Hands the operation to an encoder's recorder.
    pub fn record(self, encoder: &mut CommandEncoder) -> Result<()> {
        encoder.record(Box::new(self))
    }

    /// What a recorder was handed.
    pub fn from_any(op: Box<dyn Any + Send>) -> Self {
        match op.downcast::<Op>() {
            Ok(op) => *op,
            Err(_) => unreachable!("`Op::record` alone calls `CommandEncoder::record`"),
        }
    }
}

pub(crate) struct Rotate {
    pub row: RowFormat,
    pub direction: Direction,
    /// [..., D], any float.
    pub x: Buffer,
    /// As `x`; may be the very same view.
    pub out: Buffer,
}

pub(crate) struct Quantize {
    /// One input and its pool: x is [tokens, kv_heads, D], any float.
    pub parts: Vec<(Buffer, PagePool)>,
    pub places: Places,
}

/// Where vectors are written.
pub(crate) enum Places {
    /// The newest `new` positions of every sequence.
    Batch(Batch),
    /// A slot for each token, page · page_size + row: [tokens], u32 or i64. Counts those that are neither -1 nor in the pool.
    Slots { slots: Buffer, out_of_range: Option<Buffer> },
}

impl Places {
    #[allow(dead_code)] // Not every backend asks.
    pub fn tokens(&self) -> usize {
        match self {
            Places::Batch(batch) => batch.tokens(),
            Places::Slots { slots, .. } => slots.len(),
        }
    }
}

pub(crate) struct Dequantize {
    pub pool: PagePool,
    pub batch: Batch,
    pub sequence: usize,
    pub positions: Positions,
    pub domain: Domain,
    pub order: RowOrder,
    /// [kv_heads, n, D] or [n, kv_heads, D] as `order` says, any float.
    pub out: Buffer,
}

pub(crate) struct Attention {
    /// [tokens, heads, D], any float.
    pub q: Buffer,
    pub heads: usize,
    pub key: PagePool,
    pub value: PagePool,
    pub batch: Batch,
    pub params: AttentionParams,
    /// As `q`, any float.
    pub out: Buffer,
    /// [tokens, heads] f32.
    pub lse: Option<Buffer>,
    /// Positions that lie elsewhere and belong to the same softmax: only for recorders that fuse them.
    pub near: Vec<Near>,
}

/// Positions of the same sequences in other pools, and which of them the same queries see.
#[allow(dead_code)] // Not every backend fuses.
pub(crate) struct Near {
    pub key: PagePool,
    pub value: PagePool,
    pub batch: Batch,
    pub visible: Visible,
}

pub(crate) struct Merge {
    /// Partial outputs [tokens, heads, D] of any float, and their lse [tokens, heads] f32.
    pub parts: Vec<(Buffer, Buffer)>,
    pub out: Buffer,
    pub lse: Option<Buffer>,
}

/// Bytes from one view to another of the same size; they may share memory but do not overlap. Offsets and size are
/// multiples of 4 bytes.
pub(crate) struct Copy {
    pub from: Buffer,
    pub to: Buffer,
}

/// A kernel of the caller's own.
pub(crate) struct Custom {
    pub name: String,
    pub source: KernelSource,
    /// The grid; a CPU has none.
    #[allow(dead_code)]
    pub workgroups: [u32; 3],
    pub bindings: Vec<Buffer>,
    pub constants: Vec<u32>,
}
