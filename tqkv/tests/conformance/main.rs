//! One suite for every backend: written once over `Device`, stamped onto each by a line at the end.
//!
//! The judge is `tqkv::reference`. Outputs start as NaN between guards; pools start as garbage.

mod attention;
mod caches;
mod extremes;
mod head_dims;
mod merge;
mod rows;
#[path = "../support/mod.rs"]
mod support;

use attention::*;
use caches::*;
use extremes::*;
use head_dims::*;
use merge::*;
use rows::*;
use std::collections::HashMap;
use support::pools::*;
use support::*;
use tqkv::cache::{LayerKind, Sinks};
use tqkv::compute::DeviceKind;
use tqkv::format::{MAX_HEAD_DIM, RowFormat};
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, CodecPair, DType, Device, KvCache, reference};

const HEAD_DIMS: [usize; 10] = [64, 80, 96, 112, 128, 192, 256, 512, 576, MAX_HEAD_DIM];
const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// Every codec that exists at a head_dim.
fn codecs(head_dim: usize) -> Vec<Codec> {
    let native = (2..=8).map(Codec::tq);
    let seed = [2, 3, 4, 5, 6, 8].map(Codec::seed).into_iter();
    let all = native.chain(seed).chain([Codec::F16, Codec::F32]);
    all.filter(|&c| RowFormat::new(c, head_dim).is_ok()).collect()
}

/// A pool of random codes and plausible scales, and what the reference decodes from it.
struct Filled {
    pool: PagePool,
    /// Decoded rows by pool index (page · kv_heads + head) · page_size + slot.
    rows: Vec<Vec<f32>>,
}

impl Filled {
    fn new(device: &Device, rng: &mut Rng, row: RowFormat, kv_heads: usize, page_size: usize, pages: usize) -> Filled {
        Self::spread(device, rng, row, kv_heads, page_size, pages, 0)
    }

    /// Scales over so many powers of two, up and down.
    fn spread(
        device: &Device,
        rng: &mut Rng,
        row: RowFormat,
        kv_heads: usize,
        page_size: usize,
        pages: usize,
        octaves: usize,
    ) -> Filled {
        let n = pages * kv_heads * page_size;
        let codes: Vec<u8> = match row.codec() {
            Codec::F32 => bytemuck::cast_slice(&rng.normals(n * row.head_dim())).to_vec(),
            Codec::F16 => {
                let values = rng.normals(n * row.head_dim());
                values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect()
            }
            _ => rng.bytes(n * row.row_bytes()),
        };
        let spr = row.scales_per_row();
        // Scales of vectors whose elements are near 1.
        let unit = match row.codec() {
            Codec::Seed { .. } if row.head_dim() <= 256 => (row.head_dim() as f32).sqrt(),
            _ => 1.0,
        };
        let scales: Vec<f32> = (0..n * spr)
            .map(|_| {
                let scale = unit * (0.5 + rng.unit() as f32);
                let octave = if octaves > 0 { rng.below(2 * octaves + 1) as i32 - octaves as i32 } else { 0 };
                rounded(row.scale_dtype(), scale * 2f32.powi(octave))
            })
            .collect();
        let rows = (0..n)
            .map(|i| {
                reference::dequantize(&row, &codes[i * row.row_bytes()..][..row.row_bytes()], &scales[i * spr..][..spr])
            })
            .collect();
        let pool = new_pool(device, row, kv_heads, page_size, pages).unwrap();
        write_pool(&pool, &codes, &scales);
        Filled { pool, rows }
    }

    fn row(&self, page: usize, head: usize, slot: usize) -> &[f32] {
        &self.rows[(page * self.pool.kv_heads() + head) * self.pool.page_size() + slot]
    }
}

/// More positions than this are not laid out in tables on the device.
const MOST_ON_DEVICE: usize = 1 << 20;

/// Sequences over pages in a scrambled order, with what the reference needs to find a position.
struct Layout {
    page_size: usize,
    pages: usize,
    /// (first, len, new, pages)
    spans: Vec<(usize, usize, usize, Vec<u32>)>,
}

impl Layout {
    /// Each sequence gets the pages that its positions need, scattered over the pool.
    fn paged(rng: &mut Rng, page_size: usize, lens: &[(usize, usize)]) -> Layout {
        let total: usize = lens.iter().map(|(len, _)| len.div_ceil(page_size)).sum();
        let pages = total + 3;
        let mut order: Vec<u32> = (0..pages as u32).collect();
        for i in (1..pages).rev() {
            order.swap(i, rng.below(i + 1));
        }
        let mut order = order.into_iter();
        let spans = lens
            .iter()
            .map(|&(len, new)| (0, len, new, order.by_ref().take(len.div_ceil(page_size)).collect()))
            .collect();
        Layout { page_size, pages, spans }
    }

    /// One sequence in a contiguous ring.
    fn ring(capacity: usize, first: usize, len: usize, new: usize) -> Layout {
        Layout { page_size: capacity, pages: 1, spans: vec![(first, len, new, vec![0])] }
    }

    fn batch(&self, device: &Device) -> Batch {
        let held_from_0 = self.spans.iter().all(|(first, len, ..)| *first == 0 && *len <= MOST_ON_DEVICE);
        if are_tables_on_device() && held_from_0 && device.info().kind == DeviceKind::Cuda {
            return self.on_device(device);
        }
        let spans: Vec<_> = self
            .spans
            .iter()
            .map(|(first, len, new, pages)| Span { first: *first, len: *len, new: *new, pages })
            .collect();
        Batch::new(device, self.page_size, &spans).unwrap()
    }

    /// Tables and lengths on the device, between what is none of theirs; two sequences at the end have no part.
    fn on_device(&self, device: &Device) -> Batch {
        let width = self.spans.iter().map(|s| s.3.len()).max().unwrap_or(0) + 2;
        let (sequences, stride) = (self.spans.len() + 2, width + 3);
        let mut entries = vec![0xdead_beefu32; sequences * stride];
        let (mut lens, mut starts) = (vec![0u32; sequences], vec![0u32; sequences + 1]);
        for (s, (_, len, new, pages)) in self.spans.iter().enumerate() {
            entries[s * stride..][..pages.len()].copy_from_slice(pages);
            lens[s] = *len as u32;
            starts[s + 1] = starts[s] + *new as u32;
        }
        starts[self.spans.len() + 1..].fill(self.tokens() as u32);
        let most = Bounds {
            sequences,
            tokens: self.tokens(),
            new: self.spans.iter().map(|s| s.2).max().unwrap_or(0),
            len: width * self.page_size,
        };
        let upload = |words: &[u32]| device.upload(words, &[words.len()]).unwrap();
        let (entries, lens, starts) = (upload(&entries), upload(&lens), upload(&starts));
        let tables = DeviceTables { entries: &entries, width, stride, pages: self.pages };
        let lengths = Lengths::Device { lens: &lens, starts: &starts, most };
        Batch::on_device(device, self.page_size, tables, lengths).unwrap()
    }

    fn tokens(&self) -> usize {
        self.spans.iter().map(|s| s.2).sum()
    }

    fn locate(&self, sequence: usize, position: usize) -> (usize, usize) {
        let pages = &self.spans[sequence].3;
        let slot = position % (pages.len() * self.page_size);
        (pages[slot / self.page_size] as usize, slot % self.page_size)
    }
}

suite!(cpu, wgpu, cuda: (
    rotation_matches_the_definition, quantize_writes_the_codes, codes_are_the_cpus,
    vectors_that_are_not_finite_decode_to_nan, infinite_scales_decode_to_what_is_not_finite, dequantize_is_bit_exact,
    attention_of_every_codec, attention_of_every_shape, attention_with_every_option, attention_of_prompts,
    queries_of_any_size,
    what_is_not_a_number_stays_so, what_is_not_seen_does_not_matter, large_scores_share_the_weight,
    large_scores_are_told_apart, merge_passes_over_empty_parts, merged_parts_equal_the_whole,
    a_truncated_cache_forgets, a_batch_equals_its_sequences, head_dims_that_are_no_multiple_of_16,
    nothing_is_no_error,
));

/// Tests of a device whose pools have strides that are not tqkv's.
macro_rules! with_foreign_pools {
    ($device:literal: $($test:ident),*) => { $(
        #[test]
        fn $test() {
            crate::use_foreign_pools();
            crate::on($device, crate::$test);
        }
    )* };
}

/// In memory that is borrowed.
mod cpu_foreign {
    with_foreign_pools!("cpu":

        quantize_writes_the_codes,
        codes_are_the_cpus,
        vectors_that_are_not_finite_decode_to_nan,
        infinite_scales_decode_to_what_is_not_finite,
        dequantize_is_bit_exact,
        attention_of_every_codec,
        attention_of_every_shape,
        attention_with_every_option,
        attention_of_prompts,
        queries_of_any_size,
        what_is_not_a_number_stays_so,
        what_is_not_seen_does_not_matter,
        large_scores_share_the_weight,
        large_scores_are_told_apart,
        merged_parts_equal_the_whole,
        a_batch_equals_its_sequences,
        head_dims_that_are_no_multiple_of_16
    );
}

mod cuda_foreign {
    with_foreign_pools!("cuda":

        quantize_writes_the_codes,
        dequantize_is_bit_exact,
        attention_of_every_codec,
        attention_of_every_shape,
        attention_with_every_option,
        attention_of_prompts,
        a_batch_equals_its_sequences,
        head_dims_that_are_no_multiple_of_16
    );
}

/// With page tables, lengths and slots that are known to the device alone; those of the CPU are slots.
mod tables {
    macro_rules! tests {
        ($device:ident: $($test:ident),*) => { mod $device { $(
            #[test]
            fn $test() {
                crate::use_tables_on_device();
                crate::on(stringify!($device), crate::$test);
            }
        )* } };
    }
    tests!(cpu: quantize_writes_the_codes);
    tests!(cuda: quantize_writes_the_codes, attention_of_every_shape, attention_with_every_option);
}

/// The kernels that use subgroups, on a device that has none.
#[cfg(feature = "wgpu")]
#[test]
fn wgpu_without_subgroups() {
    on("wgpu", |_| {
        let (device, queue) = engine();
        // SAFETY: the queue is the device's, which nothing else uses.
        let device = unsafe { Device::from_wgpu(device, queue) }.unwrap();
        merged_parts_equal_the_whole(&device);
        large_scores_share_the_weight(&device);
        large_scores_are_told_apart(&device);
        a_batch_equals_its_sequences(&device);
        a_truncated_cache_forgets(&device);
    });
}
