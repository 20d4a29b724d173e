//! Whether what was timed is right.

use super::shape::{Caches, Shape};
use anyhow::Result;
use half::f16;
use rayon::prelude::*;
use std::collections::BTreeSet;
use tqkv::format::exact::Coder;
use tqkv::format::{Codec, Encoding, RowFormat};
use tqkv::ops::{AttentionParams, PagePool};
use tqkv::{Buffer, DType, reference};

/// Rows of a pool on the host.
pub struct Rows {
    row: RowFormat,
    page_size: usize,
    /// Pages by slot, with codes and scales of all heads.
    pages: Vec<(Vec<u8>, Vec<f32>)>,
}

impl Rows {
    /// Those of a sequence with these pages.
    pub fn new(pool: &PagePool, pages: &[u32]) -> Result<Self> {
        let page = |&page: &u32| {
            let page = page as usize..page as usize + 1;
            let scales = pool.scales().map(|scales| floats(&scales.slice(page.clone())?)).transpose()?;
            Ok((host(&pool.codes().slice(page)?)?, scales.unwrap_or_default()))
        };
        Ok(Self {
            row: *pool.row(),
            page_size: pool.page_size(),
            pages: pages.iter().map(page).collect::<Result<_>>()?,
        })
    }

    /// Still rotated.
    pub fn decode(&self, head: usize, position: usize) -> Vec<f32> {
        let (codes, scales) = &self.pages[position / self.page_size];
        let (i, n) = (head * self.page_size + position % self.page_size, self.row.scales_per_row());
        let codes = &codes[i * self.row.row_bytes()..][..self.row.row_bytes()];
        reference::dequantize(&self.row, codes, &scales[i * n..][..n])
    }
}

/// How far attention is off for some heads of the first and the last sequence of the first cache. `new` positions of every
/// sequence have a query; its first, middle and last are looked at.
pub fn attention_error(
    caches: &Caches,
    shape: &Shape,
    new: usize,
    params: &AttentionParams,
    q: &[f32],
    out: &[f32],
) -> Result<f64> {
    let (lens, d) = (shape.lens(), shape.head_dim);
    let (key, value) = (*caches.key.row(), *caches.value.row());
    let mut error = 0.0;
    for (sequence, heads) in [(0, [0, shape.heads / 3]), (shape.batch - 1, [shape.heads * 2 / 3, shape.heads - 1])] {
        let pages = &caches.tables[0][sequence];
        let (keys, values) = (Rows::new(&caches.key, pages)?, Rows::new(&caches.value, pages)?);
        let of_head = |head: usize| {
            let kv_head = head / (shape.heads / shape.kv_heads);
            let decode = |rows: &Rows| -> Vec<Vec<f32>> {
                (0..lens[sequence]).into_par_iter().map(|p| rows.decode(kv_head, p)).collect()
            };
            let (k, v) = (decode(&keys), decode(&values));
            let tokens = BTreeSet::from([0, new / 2, new - 1]);
            largest(tokens.into_iter().map(|token| {
                let at = ((sequence * new + token) * shape.heads + head) * d;
                let rotated: Vec<f32> = reference::rotate(&key, &q[at..at + d]).into_iter().map(|v| v as f32).collect();
                let query = reference::Query { q: &rotated, scale: f64::from(params.scale), softcap: None, sink: None };
                let seen = lens[sequence] - new + token + 1;
                let (expected, _) = reference::attention(&query, &views(&k[..seen]), &views(&v[..seen]));
                relative(&out[at..at + d], reference::restore(&value, &expected))
            }))
        };
        let errors: Vec<f64> = heads.into_par_iter().map(of_head).collect();
        error = largest(errors.into_iter().chain([error]));
    }
    Ok(error)
}

/// How far a stored vector is from what the oracle stores for `x`, both decoded; the oracle has no search, of which each bit is
/// defined.
pub fn quantize_error(row: &RowFormat, encoding: Encoding, x: &[f32], got: &[f32]) -> f64 {
    match row.codec() {
        Codec::Native { .. } if encoding == Encoding::Search => {
            let (mut codes, mut scale) = (vec![0; row.row_bytes()], [0; 2]);
            Coder::new(row).with_encoding(encoding).encode(&mut x.to_vec(), &mut codes, &mut scale);
            let decoded = reference::dequantize(row, &codes, &[f16::from_le_bytes(scale).to_f32()]);
            relative(got, decoded.into_iter().map(f64::from))
        }
        Codec::F32 => relative(got, x.iter().map(|&v| f64::from(v))),
        Codec::F16 => relative(got, x.iter().map(|&v| f16::from_f32(v).to_f64())),
        _ => {
            let encoded = reference::quantize(row, x);
            let mut packed = vec![0; row.row_bytes()];
            row.pack(&encoded.codes, &mut packed);
            let error = |scales: &[f32]| {
                let mut decoded = reference::dequantize(row, &packed, scales);
                // Where an element is as good as on a boundary, either code is right.
                for ((decoded, got), margin) in decoded.iter_mut().zip(got).zip(&encoded.margins) {
                    if *margin < 1e-5 {
                        *decoded = *got;
                    }
                }
                relative(got, decoded.into_iter().map(f64::from))
            };
            if row.scale_dtype() != DType::F16 {
                return error(&encoded.scales);
            }
            // So is either neighbour of a scale that is as good as between two.
            let bits = f16::from_f32(encoded.scales[0]).to_bits();
            let near = [bits, bits + 1, bits.saturating_sub(1)].map(|b| error(&[f16::from_bits(b).to_f32()]));
            near.into_iter().fold(f64::NAN, f64::min)
        }
    }
}

/// Norm of the difference divided by the expected vector's.
pub fn relative(got: &[f32], expected: impl IntoIterator<Item = f64>) -> f64 {
    let (mut error, mut norm) = (0.0, 0.0);
    for (&got, expected) in got.iter().zip(expected) {
        error += (f64::from(got) - expected).powi(2);
        norm += expected * expected;
    }
    (error / norm).sqrt()
}

/// The largest of some errors; NaN if one is.
pub fn largest(errors: impl IntoIterator<Item = f64>) -> f64 {
    errors.into_iter().fold(0.0, |max, e| if e > max || e.is_nan() { e } else { max })
}

/// A buffer's floats, whatever their type.
pub fn floats(buffer: &Buffer) -> tqkv::Result<Vec<f32>> {
    Ok(match buffer.dtype() {
        DType::F16 => buffer.read::<f16>()?.into_iter().map(f16::to_f32).collect(),
        _ => buffer.read()?,
    })
}

fn host(buffer: &Buffer) -> Result<Vec<u8>> {
    let mut bytes = vec![0; buffer.bytes()];
    buffer.read_bytes(&mut bytes)?;
    Ok(bytes)
}

pub fn views(rows: &[Vec<f32>]) -> Vec<&[f32]> {
    rows.iter().map(|row| &row[..]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scale_may_be_rounded_either_way_and_no_further() {
        let row = RowFormat::new(Codec::tq(8), 128).unwrap();
        let x: Vec<f32> = (0..128).map(|i| ((i * 37 % 101) as f32 - 50.0) / 30.0).collect();
        let encoded = reference::quantize(&row, &x);
        let mut packed = vec![0; row.row_bytes()];
        row.pack(&encoded.codes, &mut packed);
        let bits = f16::from_f32(encoded.scales[0]).to_bits();
        let error = |bits: u16, packed: &[u8]| {
            quantize_error(
                &row,
                Encoding::Nearest,
                &x,
                &reference::dequantize(&row, packed, &[f16::from_bits(bits).to_f32()]),
            )
        };
        assert!([bits - 1, bits, bits + 1].into_iter().all(|b| error(b, &packed) < 1e-6));
        assert!([bits - 2, bits + 2].into_iter().all(|b| error(b, &packed) > 1e-4));
        packed[7] ^= 1;
        assert!(error(bits, &packed) > 1e-4);
        assert!(quantize_error(&row, Encoding::Nearest, &x, &[f32::NAN; 128]).is_nan());
    }
}
