//! Shift and scale of keys' channels, on vectors of one KV head.

use super::memory::{self, View};
use crate::error::Result;
use crate::problem::PagePool;

/// A pool's map of channels, held for reading.
pub(super) struct Channels<'a> {
    view: View<'a>,
    kv_heads: usize,
    head_dim: usize,
}

impl<'a> Channels<'a> {
    pub fn of(pool: &'a PagePool) -> Result<Option<Self>> {
        let hold = |view| Channels { view, kv_heads: pool.kv_heads(), head_dim: pool.row().head_dim() };
        pool.channels().map(|map| memory::view(map.values()).map(hold)).transpose()
    }

    /// Shift, 1 / scale and scale of a KV head.
    fn head(&self, head: usize) -> [&[f32]; 3] {
        let all: &[f32] = bytemuck::cast_slice(self.view.bytes());
        [0, 1, 2].map(|i| &all[(i * self.kv_heads + head) * self.head_dim..][..self.head_dim])
    }

    /// A key into what is encoded.
    pub fn store(&self, head: usize, key: &mut [f32]) {
        let [shift, inverse, _] = self.head(head);
        key.iter_mut().zip(shift).zip(inverse).for_each(|((k, s), i)| *k = (*k - s) * i);
    }

    /// What was decoded into a key.
    pub fn restore(&self, head: usize, key: &mut [f32]) {
        let [shift, _, scale] = self.head(head);
        key.iter_mut().zip(shift).zip(scale).for_each(|((k, shift), scale)| *k = *k * scale + shift);
    }

    /// A query into one for what is encoded; gives its product with the shift.
    pub fn query(&self, head: usize, query: &mut [f32]) -> f64 {
        let [shift, _, scale] = self.head(head);
        let product = query.iter().zip(shift).map(|(&q, &s)| q as f64 * s as f64).sum();
        query.iter_mut().zip(scale).for_each(|(q, s)| *q *= s);
        product
    }
}
