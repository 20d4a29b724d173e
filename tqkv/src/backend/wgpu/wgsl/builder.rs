//! The text of a kernel that is being put together.
//!
//! Kernels are put together for one shape, so that loops have constant bounds and shifts are constants.

use super::params::Params;
use crate::backend::wgpu::caps::Caps;

/// Threads of a workgroup; attention may have more.
pub const THREADS: usize = 128;

/// How a kernel uses a binding, and the least bytes that it must hold.
#[derive(Clone, Copy, Debug)]
pub enum Access {
    Read(u64),
    Write(u64),
    Uniform(u64),
}

/// A kernel's text and its bindings after number 0, the parameters.
pub struct Source {
    pub text: String,
    pub bindings: Vec<Access>,
}

/// A kernel that is being put together.
pub struct Builder {
    text: String,
    bindings: Vec<Access>,
}

/// `line!(b, "...")` appends a formatted line.
macro_rules! line {
    ($b:expr, $($arg:tt)*) => { $b.push(&format!($($arg)*)) };
}
pub(in crate::backend::wgpu) use line;

impl Builder {
    pub fn new(caps: &Caps) -> Self {
        Builder::with_threads(caps, THREADS)
    }

    pub fn with_threads(caps: &Caps, threads: usize) -> Self {
        let mut b = Builder { text: String::new(), bindings: vec![] };
        line!(b, "const WG = {threads}u;");
        b.push(include_str!("prelude.wgsl"));
        b.push(if caps.native_f16 { include_str!("f16_native.wgsl") } else { include_str!("f16_soft.wgsl") });
        b
    }

    pub fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.text.push('\n');
    }

    /// Declares the parameters as `a`, binding number 0: `groups`, the grid; `zero`; and the fields of `P`.
    pub fn params<P: Params>(&mut self) {
        self.push("struct Params {\n  groups: u32,\n  zero: u32,");
        for (name, ty) in P::FIELDS {
            line!(self, "  {name}: {ty},");
        }
        self.push("}\n@group(0) @binding(0) var<uniform> a: Params;");
    }

    /// Declares the next binding: an array.
    pub fn storage(&mut self, name: &str, element: &str, writable: bool) {
        let access = if writable { "read_write" } else { "read" };
        let n = self.bindings.len() + 1;
        line!(self, "@group(0) @binding({n}) var<storage, {access}> {name}: array<{element}>;");
        let least = if element.starts_with("vec4") { 16 } else { 4 };
        self.bindings.push(if writable { Access::Write(least) } else { Access::Read(least) });
    }

    /// Declares the next binding: a struct of arrays of vectors of four, (name, element, vectors) each.
    pub fn tables(&mut self, name: &str, fields: &[(&str, &str, usize)]) {
        line!(self, "struct Type_{name} {{");
        for (field, element, vectors) in fields {
            line!(self, "  {field}: array<vec4<{element}>, {vectors}>,");
        }
        let n = self.bindings.len() + 1;
        line!(self, "}}\n@group(0) @binding({n}) var<uniform> {name}: Type_{name};");
        self.bindings.push(Access::Uniform(fields.iter().map(|f| 16 * f.2 as u64).sum()));
    }

    /// Opens the entry point; `wg` is the workgroup's number in a grid that may be folded, `tid` the thread's.
    pub fn main(&mut self) {
        self.push(
            "@compute @workgroup_size(WG)\n\
             fn main(@builtin(workgroup_id) wid: vec3<u32>, @builtin(num_workgroups) grid: vec3<u32>,\n\
             \x20 @builtin(local_invocation_index) tid: u32) {\n\
             \x20 let wg = wid.y * grid.x + wid.x;\n\
             \x20 if (wg >= a.groups) { return; }",
        );
    }

    pub fn finish(self) -> Source {
        Source { text: self.text, bindings: self.bindings }
    }
}

/// A finite float as WGSL, bit for bit.
pub fn float(x: f32) -> String {
    format!("bitcast<f32>({:#x}u)", x.to_bits())
}

/// A vector of `n` ≤ 4 consecutive words of the array `name`, zeros after them.
pub fn words(name: &str, index: &str, from: usize, n: usize) -> String {
    let word = |k| if k < n { format!("{name}[{index} + {}u]", from + k) } else { "0u".to_owned() };
    format!("vec4<u32>({}, {}, {}, {})", word(0), word(1), word(2), word(3))
}
