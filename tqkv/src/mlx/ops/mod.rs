//! The dispatches, in mlx-native's modules.

pub mod flash_attn_vec_tq;
pub mod flash_attn_vec_tq_hb;
pub mod fwht_standalone;
pub mod hadamard_quantize_kv;
pub mod tq_dequantize_kv;

use super::MlxBuffer;
use crate::compute::DType;
use crate::error::{Error, Result};
use crate::format::{Codec, RowFormat, Scaling};
use crate::ops::PagePool;

/// What every dispatch says of the cache it works on.
#[derive(Clone, Copy)]
struct Cache {
    row: RowFormat,
    kv_heads: usize,
    capacity: usize,
}

impl Cache {
    /// `scale_factor_d512` counts at head_dim 512 only, as in mlx-native.
    fn new(bits: u8, kv_heads: u32, head_dim: u32, capacity: u32, scale_factor_d512: f32) -> Result<Self> {
        if capacity == 0 {
            return Err(Error::Zero { what: "cache_capacity" });
        }
        let mut row = RowFormat::new(Codec::seed(bits), head_dim as usize)?;
        if row.scaling() == Scaling::BlockRms {
            row = row.with_scale_factor_d512(scale_factor_d512)?;
        }
        Ok(Cache { row, kv_heads: kv_heads as usize, capacity: capacity as usize })
    }

    /// [`Cache::new`] for the widths that are stored in a byte each.
    fn byte_packed(
        codebook_bits: u32,
        kv_heads: u32,
        head_dim: u32,
        capacity: u32,
        scale_factor_d512: f32,
    ) -> Result<Self> {
        Cache::new(byte_packed_bits(codebook_bits)?, kv_heads, head_dim, capacity, scale_factor_d512)
    }

    /// `packed` [kv_heads, capacity, row_bytes] and `norms` [kv_heads, capacity, norms_per_pos] as a pool of one page.
    fn pool(&self, packed: &MlxBuffer, norms: &MlxBuffer) -> Result<PagePool> {
        let shape = |last| [1, self.kv_heads, self.capacity, last];
        let codes = packed.view("packed", DType::U8, &shape(self.row.row_bytes()))?;
        let scales = norms.view("norms", DType::F32, &shape(self.row.scales_per_row()))?;
        PagePool::from_buffers(self.row, &codes, Some(&scales))
    }
}

/// The widths that are stored in a byte each.
fn byte_packed_bits(codebook_bits: u32) -> Result<u8> {
    match codebook_bits {
        5 | 6 | 8 => Ok(codebook_bits as u8),
        _ => Err(Error::Mismatch {
            what: "codebook_bits",
            got: codebook_bits as usize,
            expected: "5, 6 or 8".to_owned(),
        }),
    }
}

/// The head dims of mlx-native's kernels for decoding steps.
fn expect_256_or_512(bits: u8, head_dim: u32) -> Result<()> {
    if !matches!(head_dim, 256 | 512) {
        return Err(Error::HeadDim {
            codec: Codec::seed(bits).to_string(),
            got: head_dim as usize,
            expected: "256 or 512",
        });
    }
    Ok(())
}
