//! Shift and scale of keys' channels: a pass of its own before vectors are encoded, before queries are rotated, and after vectors are
//! decoded. It goes through memory of the context, between the passes of one operation.

use crate::Buffer;
use crate::backend::wgpu::caps::Caps;
use crate::backend::wgpu::commands::Commands;
use crate::backend::wgpu::kernel::Kernel;
use crate::backend::wgpu::memory::Memory;
use crate::backend::wgpu::slot::Slot;
use crate::backend::wgpu::wgsl::builder::{Builder, Source, THREADS, line};
use crate::backend::wgpu::wgsl::params::params;
use crate::backend::wgpu::wgsl::tensor::Tensor;
use crate::error::{Result, checked_product};
use crate::format::DType;
use crate::problem::ChannelMap;
use std::sync::Arc;

/// The scratch memory that mapped vectors lie in.
const SCRATCH: usize = 2;
/// What bindings may start at a multiple of.
const STEP: usize = 256;

/// What is done to a vector.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub enum Way {
    /// A key becomes what is encoded.
    Store,
    /// A query becomes one for what is encoded; its product with the shift, times the softmax scale, is kept.
    Query,
    /// What was decoded becomes a key.
    Restore,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChannelKernel {
    pub way: Way,
    pub x: Tensor,
    pub out: Tensor,
}

params! {
    pub struct ChannelParams {
        rows: u32,
        x_off: u32,
        out_off: u32,
        map_off: u32,
        /// Words from the output's start to the queries' biases.
        bias_off: u32,
        /// Runs of eight elements of a row, and elements of a key.
        eights: u32,
        head_dim: u32,
        /// Row r is of KV head r / per % kv_heads.
        kv_heads: u32,
        per: u32,
        scale: f32,
    }
}

impl Kernel for ChannelKernel {
    type Params = ChannelParams;
    const NAME: &'static str = "channels";

    fn source(&self, caps: &Caps) -> Source {
        let mut b = Builder::new(caps);
        b.params::<ChannelParams>();
        self.x.bind(&mut b, "x", false);
        b.storage("map", "f32", false);
        self.out.bind(&mut b, "out", true);
        self.x.load(&mut b, "x");
        self.out.store(&mut b, "out");
        // Channels past the end are those of zeros, which stay zeros.
        b.push("fn four(which: u32, head: u32, e: u32, none: f32) -> vec4<f32> {");
        b.push("  var v = vec4(none);\n  for (var k = 0u; k < 4u; k++) {");
        b.push(
            "    if (e + k < a.head_dim) { v[k] = map[a.map_off + (which * a.kv_heads + head) * a.head_dim + e + k]; }",
        );
        b.push("  }\n  return v;\n}");
        b.push("fn eight(which: u32, head: u32, e: u32, none: f32) -> Eight {");
        b.push("  return Eight(four(which, head, e, none), four(which, head, e + 4u, none));\n}");
        b.main();
        b.push("  let i = wg * WG + tid;\n  let row = i / a.eights;\n  let e = i % a.eights * 8u;");
        b.push("  let head = row / a.per % a.kv_heads;\n  if (row < a.rows) {\n    let x = x_load(8u * i);");
        let (shift, inverse, scale) = ("eight(0u, head, e, 0.0)", "eight(1u, head, e, 1.0)", "eight(2u, head, e, 1.0)");
        match self.way {
            Way::Store => {
                line!(b, "    let shift = {shift};\n    let inverse = {inverse};");
                b.push("    let v = Eight(keep4(x.a - shift.a) * inverse.a, keep4(x.b - shift.b) * inverse.b);");
            }
            Way::Query => {
                line!(b, "    let scale = {scale};\n    let v = Eight(x.a * scale.a, x.b * scale.b);");
            }
            Way::Restore => {
                line!(b, "    let shift = {shift};\n    let scale = {scale};");
                b.push("    let v = Eight(x.a * scale.a + shift.a, x.b * scale.b + shift.b);");
            }
        }
        line!(b, "    {}\n  }}", self.out.store_eight("out", "8u * i", "v"));
        if self.way == Way::Query {
            b.push("  if (i < a.rows) {\n    let own = i / a.per % a.kv_heads;\n    var sum = vec4(0.0);");
            b.push("    for (var k = 0u; k < a.eights; k++) {\n      let x = x_load(8u * (i * a.eights + k));");
            b.push(
                "      let shift = eight(0u, own, 8u * k, 0.0);\n      sum += x.a * shift.a + x.b * shift.b;\n    }",
            );
            b.push("    let bias = ((sum.x + sum.y) + (sum.z + sum.w)) * a.scale;");
            b.push("    out[a.out_off + a.bias_off + i] = bitcast<u32>(bias);\n  }");
        }
        b.push("}");
        b.finish()
    }
}

/// Vectors in f32 between two passes.
pub struct Mapped {
    memory: Arc<Memory>,
    offset: u64,
    rows: usize,
    row_dim: usize,
}

impl Mapped {
    /// Room for some inputs' rows, and a number a row, one input after the other.
    pub fn room(commands: &Commands, inputs: &[(usize, usize)]) -> Result<Vec<Mapped>> {
        let bytes = |&(rows, row_dim): &(usize, usize)| {
            let words = checked_product("mapped vectors", &[rows, row_dim + 1])?;
            Ok(checked_product("mapped vectors", &[words, 4])?.next_multiple_of(STEP))
        };
        let sizes = inputs.iter().map(bytes).collect::<Result<Vec<_>>>()?;
        let memory = commands.scratch(SCRATCH, sizes.iter().sum::<usize>() as u64)?;
        let starts = sizes.iter().scan(0, |end, size| Some(std::mem::replace(end, *end + size)));
        let place = |(start, &(rows, row_dim)): (usize, &(usize, usize))| Mapped {
            memory: memory.clone(),
            offset: start as u64,
            rows,
            row_dim,
        };
        Ok(starts.zip(inputs).map(place).collect())
    }

    pub fn slot(&self) -> Slot<'_> {
        let size = (4 * self.rows * (self.row_dim + 1)).next_multiple_of(16) as u64;
        Slot { memory: &self.memory, offset: self.offset, size, rest: 0 }
    }

    /// As the pass after it reads or writes it.
    pub fn tensor(&self) -> Tensor {
        Tensor::new(DType::F32, true, self.row_dim, self.row_dim)
    }

    /// Words to the number of row 0.
    pub fn numbers(&self) -> u32 {
        (self.rows * self.row_dim) as u32
    }

    fn words(&self) -> Tensor {
        Tensor::new(DType::F32, false, self.row_dim, self.row_dim)
    }
}

/// What a map is applied to.
pub struct Pass<'a> {
    pub map: &'a ChannelMap,
    pub way: Way,
    /// Row r is of KV head r / per % kv_heads.
    pub per: usize,
    /// Of the softmax, where queries are mapped.
    pub scale: f32,
}

impl Pass<'_> {
    /// The vectors of `x` through the map into `to`.
    pub fn map_to(&self, commands: &mut Commands, x: &Buffer, to: &Mapped) -> Result<()> {
        let context = commands.context.clone();
        let (x, tensor) = Slot::tensor(&context.gpu, "vectors", x, to.row_dim)?;
        let kernel = ChannelKernel { way: self.way, x: tensor, out: to.words() };
        self.record(commands, &kernel, (&x, &to.slot()), to)
    }

    /// The vectors in `from` through the map into `out`.
    pub fn map_from(&self, commands: &mut Commands, from: &Mapped, out: &Buffer) -> Result<()> {
        let context = commands.context.clone();
        let (out, tensor) = Slot::tensor(&context.gpu, "out", out, from.row_dim)?;
        let kernel = ChannelKernel { way: self.way, x: from.tensor(), out: tensor };
        self.record(commands, &kernel, (&from.slot(), &out), from)
    }

    fn record(
        &self,
        commands: &mut Commands,
        kernel: &ChannelKernel,
        (x, out): (&Slot, &Slot),
        of: &Mapped,
    ) -> Result<()> {
        let context = commands.context.clone();
        let map = Slot::new(&context.gpu, "channels", self.map.values())?;
        let params = ChannelParams {
            rows: of.rows as u32,
            x_off: x.words(),
            out_off: out.words(),
            map_off: map.words(),
            bias_off: of.numbers(),
            eights: (of.row_dim / 8) as u32,
            head_dim: self.map.head_dim() as u32,
            kv_heads: self.map.kv_heads() as u32,
            per: self.per as u32,
            scale: self.scale,
        };
        commands.dispatch(kernel, &[*x, map, *out], (of.rows * of.row_dim / 8).div_ceil(THREADS), &params)
    }
}
