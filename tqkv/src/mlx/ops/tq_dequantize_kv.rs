//! Decoding, into the rotated domain.

use super::Cache;
use crate::mlx::{CommandEncoder, DType, KernelRegistry, MlxBuffer, MlxDevice, Result};
use crate::ops::{Batch, Domain, RowOrder, dequantize};

/// Decodes one position of a 4-bit cache: `packed` u8 \[num_kv_heads, cache_capacity, head_dim/2\] and `norms` f32
/// \[num_kv_heads, cache_capacity, max(1, head_dim/256)\] into `dst` f32 \[num_kv_heads, head_dim\], rotated domain.
///
/// Buffers may be larger. Without heads or elements nothing happens.
///
/// # Errors
/// [`MlxError::InvalidArgument`](crate::mlx::MlxError::InvalidArgument) for a head_dim that is no power of two from 16 to
/// 512, `read_pos` at or past the capacity, a buffer that is too small, of another type or device, or shared with `dst`,
/// and a scale factor that is not finite and positive at head_dim 512.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_tq_dequantize_kv(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    dst: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    read_pos: u32,
    scale_factor_d512: f32,
) -> Result<()> {
    let cache = || Cache::new(4, num_kv_heads, head_dim, cache_capacity, scale_factor_d512);
    let empty = num_kv_heads == 0 || head_dim == 0;
    decode("tq_dequantize_kv", encoder, device, empty, cache, [packed, norms, dst], (read_pos, 1), DType::F32)
}

/// Decodes one position of a cache of 5, 6 or 8 bits: as [`dispatch_tq_dequantize_kv`], but `packed` is
/// \[num_kv_heads, cache_capacity, head_dim\], a code a byte.
///
/// # Errors
/// As [`dispatch_tq_dequantize_kv`], and for `codebook_bits` other than 5, 6 or 8.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_tq_dequantize_hb_kv(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    dst: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    read_pos: u32,
    scale_factor_d512: f32,
    codebook_bits: u32,
) -> Result<()> {
    let cache = || Cache::byte_packed(codebook_bits, num_kv_heads, head_dim, cache_capacity, scale_factor_d512);
    let empty = num_kv_heads == 0 || head_dim == 0;
    decode("tq_dequantize_hb_kv", encoder, device, empty, cache, [packed, norms, dst], (read_pos, 1), DType::F32)
}

/// Decodes positions `start_pos..start_pos + n_tokens` of a cache of 5, 6 or 8 bits into `dst` f32
/// \[num_kv_heads, n_tokens, head_dim\]: the same bytes as [`dispatch_tq_dequantize_hb_kv`] gives one by one.
///
/// Without tokens nothing happens.
///
/// # Errors
/// As [`dispatch_tq_dequantize_hb_kv`], and if the positions exceed the capacity.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_tq_dequantize_hb_kv_seq(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    dst: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    start_pos: u32,
    n_tokens: u32,
    scale_factor_d512: f32,
    codebook_bits: u32,
) -> Result<()> {
    let cache = || Cache::byte_packed(codebook_bits, num_kv_heads, head_dim, cache_capacity, scale_factor_d512);
    let (empty, at) = (num_kv_heads == 0 || head_dim == 0 || n_tokens == 0, (start_pos, n_tokens));
    decode("tq_dequantize_hb_kv_seq", encoder, device, empty, cache, [packed, norms, dst], at, DType::F32)
}

/// [`dispatch_tq_dequantize_hb_kv_seq`] with `dst` in f16: the same values, rounded to nearest even.
///
/// # Errors
/// As [`dispatch_tq_dequantize_hb_kv_seq`].
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_tq_dequantize_hb_kv_seq_f16(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    dst: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    start_pos: u32,
    n_tokens: u32,
    scale_factor_d512: f32,
    codebook_bits: u32,
) -> Result<()> {
    let cache = || Cache::byte_packed(codebook_bits, num_kv_heads, head_dim, cache_capacity, scale_factor_d512);
    let (empty, at) = (num_kv_heads == 0 || head_dim == 0 || n_tokens == 0, (start_pos, n_tokens));
    decode("tq_dequantize_hb_kv_seq_f16", encoder, device, empty, cache, [packed, norms, dst], at, DType::F16)
}

/// Decodes `at`.1 positions from `at`.0 on; `buffers` are packed, norms and dst.
#[allow(clippy::too_many_arguments)] // Four dispatches in one.
fn decode(
    op: &str,
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    empty: bool,
    cache: impl FnOnce() -> crate::Result<Cache>,
    [packed, norms, dst]: [&MlxBuffer; 3],
    at: (u32, u32),
    dtype: DType,
) -> Result<()> {
    if empty {
        return Ok(());
    }
    encoder.record(op, device, |encoder| {
        let cache = cache()?;
        let (start, n) = (at.0 as usize, at.1 as usize);
        let dst = dst.view("dst", dtype, &[cache.kv_heads, n, cache.row.head_dim()])?;
        let pool = cache.pool(packed, norms)?;
        let batch = Batch::contiguous(device.device(), cache.capacity, 0, cache.capacity, 0)?;
        dequantize(encoder, &pool, &batch, 0, start..start + n, Domain::Rotated, RowOrder::HeadMajor, &dst)
    })
}
