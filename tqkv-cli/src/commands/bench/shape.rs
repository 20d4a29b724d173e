//! What attention runs over.

use super::meter::Meter;
use anyhow::{Context, Error, Result, ensure};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::fmt;
use std::str::FromStr;
use tqkv::format::{CodecPair, RowFormat};
use tqkv::ops::{Batch, Bounds, DeviceTables, Lengths, PagePool, Span, quantize};
use tqkv::{Buffer, Device};

/// Sequences and heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Shape {
    pub batch: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// The shortest and the longest sequence.
    pub context: (usize, usize),
}

impl FromStr for Shape {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let parse = || {
            let mut parts = s.split('x');
            let batch = parts.next()?.parse().ok()?;
            let (heads, kv_heads) = parts.next()?.split_once('/')?;
            let head_dim = parts.next()?.parse().ok()?;
            let context = parts.next()?;
            let (from, to) = context.split_once('-').unwrap_or((context, context));
            let context = (from.parse().ok()?, to.parse().ok()?);
            let shape =
                Shape { batch, heads: heads.parse().ok()?, kv_heads: kv_heads.parse().ok()?, head_dim, context };
            parts.next().is_none().then_some(shape)
        };
        let shape = parse().with_context(|| format!("{s:?}: expected BATCHxHEADS/KV_HEADSxHEAD_DIMxCONTEXT"))?;
        let Shape { batch, heads, kv_heads, context: (from, to), .. } = shape;
        ensure!(batch > 0 && heads > 0 && kv_heads > 0 && from > 0, "{s:?}: expected no zeros");
        ensure!(heads.is_multiple_of(kv_heads), "{s:?}: expected heads to be a multiple of kv_heads");
        ensure!(from <= to, "{s:?}: expected the shorter context first");
        // As many as a pool may have.
        let rows = batch.checked_mul(kv_heads).and_then(|n| n.checked_mul(to)).filter(|&n| n <= u32::MAX as usize);
        ensure!(rows.is_some(), "{s:?}: expected batch times KV heads times context to be at most {}", u32::MAX);
        Ok(shape)
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { batch, heads, kv_heads, head_dim, context: (from, to) } = self;
        write!(f, "{batch}x{heads}/{kv_heads}x{head_dim}x{from}")?;
        if from < to { write!(f, "-{to}") } else { Ok(()) }
    }
}

impl Shape {
    /// Multiplications and additions of causal attention of so many new tokens a sequence.
    pub fn flops(&self, new: usize) -> f64 {
        let seen = |len: usize| (len - new) as f64 * new as f64 + new as f64 * (new as f64 + 1.0) / 2.0;
        4.0 * (self.heads * self.head_dim) as f64 * self.lens().into_iter().map(seen).sum::<f64>()
    }

    /// The sequences' lengths: always the same.
    pub fn lens(&self) -> Vec<usize> {
        let (from, to) = self.context;
        let mut rng = ChaCha8Rng::seed_from_u64(20_261_122);
        let mut len = || from as f64 * (to as f64 / from as f64).powf(rng.random());
        (0..self.batch).map(|_| len().round() as usize).collect()
    }
}

/// Several caches of one shape, so many that using them in turn finds nothing in the device's own caches.
pub struct Caches {
    pub key: PagePool,
    pub value: PagePool,
    pub page_size: usize,
    /// For each cache and sequence its pages, in random order.
    pub tables: Vec<Vec<Vec<u32>>>,
    /// Bytes of codes and scales of one cache.
    pub bytes: usize,
}

impl Caches {
    /// Filled with the vectors of `x`, [tokens, kv_heads, head_dim], again and again.
    pub fn new(meter: &Meter, shape: &Shape, codec: CodecPair, page_size: usize, x: &Buffer) -> Result<Self> {
        let device = &meter.device;
        let rows = [codec.key, codec.value].map(|codec| RowFormat::new(codec, shape.head_dim));
        let [key, value] = rows;
        let (key, value) = (key?, value?);
        let lens = shape.lens();
        let bytes = lens.iter().sum::<usize>() * shape.kv_heads * (key.bytes() + value.bytes());
        let copies = meter.cold_bytes.div_ceil(bytes).max(2);
        let pages: usize = lens.iter().map(|len| len.div_ceil(page_size)).sum::<usize>() * copies;
        let mut order: Vec<u32> = (0..u32::try_from(pages)?).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(pages as u64));
        let mut order = order.into_iter();
        let tables: Vec<Vec<Vec<u32>>> = (0..copies)
            .map(|_| lens.iter().map(|len| order.by_ref().take(len.div_ceil(page_size)).collect()).collect())
            .collect();
        let pool = |row| PagePool::new(device, row, shape.kv_heads, page_size, pages);
        let caches = Caches { key: pool(key)?, value: pool(value)?, page_size, tables, bytes };
        // A stretch of every sequence begins somewhere else in `x`, so that a wrong page is seen.
        let tokens = x.shape()[0] / 2;
        let mut at = 0;
        for (pages, &len) in caches.tables.iter().flatten().zip(lens.iter().cycle()) {
            for start in (0..len).step_by(tokens) {
                let (end, mut encoder) = ((start + tokens).min(len), device.encoder()?);
                let span = Span { first: 0, len: end, new: end - start, pages };
                let batch = Batch::new(device, page_size, &[span])?;
                let mut part = || {
                    at = (at + 977) % tokens;
                    x.slice(at..at + end - start)
                };
                let (k, v) = (part()?, part()?);
                quantize(&mut encoder, &[(&k, &caches.key), (&v, &caches.value)], &batch)?;
                encoder.submit_and_wait()?;
            }
        }
        Ok(caches)
    }

    /// A batch of all sequences of each cache, with so many new positions.
    pub fn batches(&self, device: &Device, shape: &Shape, new: usize) -> tqkv::Result<Vec<Batch>> {
        let lens = shape.lens();
        let batch = |tables: &Vec<Vec<u32>>| {
            let spans: Vec<_> =
                tables.iter().zip(&lens).map(|(pages, &len)| Span { first: 0, len, new, pages }).collect();
            Batch::new(device, self.page_size, &spans)
        };
        self.tables.iter().map(batch).collect()
    }

    /// The same with one new position a sequence, whose tables and lengths the host does not know.
    pub fn batches_on_device(&self, device: &Device, shape: &Shape) -> tqkv::Result<Vec<Batch>> {
        let lens = shape.lens();
        let (sequences, longest) = (lens.len(), lens.iter().copied().max().unwrap_or(0));
        let width = longest.div_ceil(self.page_size);
        let upload = |words: &[u32]| device.upload(words, &[words.len()]);
        let positions: Vec<u32> = lens.iter().map(|&len| len as u32).collect();
        let (positions, starts) = (upload(&positions)?, upload(&(0..=sequences as u32).collect::<Vec<_>>())?);
        let most = Bounds { sequences, tokens: sequences, new: 1, len: width * self.page_size };
        let batch = |pages: &Vec<Vec<u32>>| {
            let rows = pages.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat(0)).take(width));
            let entries = upload(&rows.collect::<Vec<_>>())?;
            let tables = DeviceTables { entries: &entries, width, stride: width, pages: self.key.pages() };
            let lengths = Lengths::Device { lens: &positions, starts: &starts, most };
            Batch::on_device(device, self.page_size, tables, lengths)
        };
        self.tables.iter().map(batch).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_that_are_seen_are_counted() {
        let shape: Shape = "2x4/2x8x5".parse().unwrap();
        // A query times a key of 8 elements and a weight times a value, four heads, two sequences.
        assert_eq!(shape.flops(1), (2 * 4 * 5 * 2 * (8 + 8)) as f64);
        assert_eq!(shape.flops(5), (2 * 4 * (1 + 2 + 3 + 4 + 5) * 2 * (8 + 8)) as f64);
    }

    #[test]
    fn a_shape_is_what_it_prints() {
        for name in ["8x32/8x128x32768", "64x32/8x128x128-16384"] {
            let shape: Shape = name.parse().unwrap();
            assert_eq!(shape.to_string(), name);
            let (from, to) = shape.context;
            assert_eq!(shape.lens().len(), shape.batch);
            assert!(shape.lens().iter().all(|len| (from..=to).contains(len)));
        }
        for name in ["", "8x32x128x4", "8x32/8x128", "8x32/8x128x1x1", "0x4/4x64x9", "1x3/2x64x9", "1x4/2x64x9-8"] {
            assert!(name.parse::<Shape>().is_err(), "{name}");
        }
    }
}
