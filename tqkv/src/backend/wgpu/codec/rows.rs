//! Stored rows and pools as kernels bind and read them, whatever their codec is.

use super::key::{Align, Stored};
use super::{scale, tables};
use crate::backend::wgpu::context::Context;
use crate::backend::wgpu::memory::Memory;
use crate::backend::wgpu::slot::Slot;
use crate::backend::wgpu::wgsl::builder::{Builder, line};
use crate::error::Result;
use crate::problem::PagePool;
use std::sync::Arc;

impl Stored {
    /// The same, read `n` elements at a time.
    pub fn fetched_by(mut self, n: usize) -> Self {
        self.align = self.elements().read_by(&self, n);
        self
    }

    /// Declares the bindings `{p}_codes` and, unless dense, `{p}_scales`.
    pub fn bind(&self, b: &mut Builder, p: &str) {
        b.storage(&format!("{p}_codes"), if self.align == Align::Vector { "vec4<u32>" } else { "u32" }, false);
        if self.format().scales_per_row() > 0 {
            b.storage(&format!("{p}_scales"), "u32", false);
        }
    }

    /// Declares the binding `{p}_tables` and the workgroup's copy of the codebook, with `fn {p}_fill(tid)`, which needs a barrier
    /// after it. Nothing for rows without a codebook.
    pub fn tables(&self, b: &mut Builder, p: &str) {
        let n = 4 * self.book_vectors();
        if n > 0 {
            tables::declare(b, self, p);
            line!(b, "var<workgroup> {p}_book: array<f32, {n}>;");
            line!(b, "fn {p}_fill(tid: u32) {{");
            line!(
                b,
                "  for (var i = tid; i < {n}u; i += WG) {{ {p}_book[i] = {p}_tables.levels[i >> 2u][i & 3u]; }}\n}}"
            );
        }
    }

    pub fn fill(&self, p: &str) -> String {
        if self.book_vectors() > 0 { format!("{p}_fill(tid);") } else { String::new() }
    }

    /// The lane's level, for shuffles.
    pub fn level(&self, p: &str) -> String {
        match self.lanes {
            0 => String::new(),
            _ => format!("let {p}_level = {p}_book[lane_id & {}u];", 4 * self.book_vectors() - 1),
        }
    }

    /// Declares `fn {p}_scale(row, s) -> u32`, which uses the parameter `{p}_scales_off`: the word that holds scale s of a row; and
    /// `fn {p}_factor(word, row) -> f32`, what `RowFormat::factor` makes of it.
    pub fn factor(&self, b: &mut Builder, p: &str) {
        scale::factor(b, &self.format(), p);
    }

    /// Which of a row's scales chunk `c` of `n` elements has.
    pub fn scale_of(&self, c: &str, n: usize) -> String {
        scale::of_chunk(&self.format(), c, n)
    }
}

/// A pool as a kernel reads it: its bindings, how its rows lie, and the bytes at which codes and scales start.
pub struct PoolSlots<'a> {
    pub codes: Slot<'a>,
    pub scales: Option<Slot<'a>>,
    pub stored: Stored,
    pub codes_off: u32,
    pub scales_off: u32,
    tables: Option<Arc<Memory>>,
}

impl<'a> PoolSlots<'a> {
    pub fn new(context: &Context, what: &str, pool: &'a PagePool) -> Result<Self> {
        let codes = Slot::new(&context.gpu, what, pool.codes())?;
        let scales = pool.scales().map(|s| Slot::new(&context.gpu, "scales", s)).transpose()?;
        let stored = Stored::new(pool, codes.rest, codes.size as usize);
        let tables = pool.row().codebook().map(|_| context.tables(pool.row())).transpose()?;
        let (codes_off, scales_off) = (codes.rest as u32, scales.map_or(0, |s| s.rest as u32));
        Ok(PoolSlots { codes, scales, stored, codes_off, scales_off, tables })
    }

    /// As [`Stored::bind`] declares them.
    pub fn slots(&self) -> impl Iterator<Item = Slot<'_>> {
        std::iter::once(self.codes).chain(self.scales)
    }

    /// As [`Stored::tables`] declares them.
    pub fn tables(&self) -> Option<Slot<'_>> {
        self.tables.as_deref().map(Slot::whole)
    }
}
