//! Encoding.

use super::{Cache, byte_packed_bits, expect_256_or_512};
use crate::error::Error;
use crate::mlx::{CommandEncoder, DType, KernelRegistry, MlxBuffer, MlxDevice, Result};
use crate::ops::{Batch, quantize};

/// Encodes one position in 4 bits: `src` f32 \[num_kv_heads, head_dim\] into `packed` u8
/// \[num_kv_heads, cache_capacity, head_dim/2\] and `norms` f32 \[num_kv_heads, cache_capacity, max(1, head_dim/256)\].
///
/// `is_sliding` takes `write_pos` modulo the capacity. `scale_factor_d512` is 1 if `None` and counts at head_dim 512
/// only. Buffers may be larger. Without heads or elements nothing happens.
///
/// # Errors
/// [`MlxError::InvalidArgument`](crate::mlx::MlxError::InvalidArgument) for a head_dim that is no power of two from 16 to
/// 512, `write_pos` at or past the capacity unless sliding, a buffer that is too small, of another type or device or
/// shared with another, a scale factor that is not finite and positive at head_dim 512, and for `rms_scratch`: that probe
/// of mlx-native is not offered.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_hadamard_quantize_kv(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    src: &MlxBuffer,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    write_pos: u32,
    is_sliding: bool,
    scale_factor_d512: Option<f32>,
    rms_scratch: Option<&MlxBuffer>,
) -> Result<()> {
    let cache = || {
        if rms_scratch.is_some() {
            let what = "fill rms_scratch: expected None".to_owned();
            return Err(Error::Unsupported { device: device.device().to_string(), what });
        }
        Cache::new(4, num_kv_heads, head_dim, cache_capacity, scale_factor_d512.unwrap_or(1.0))
    };
    let empty = num_kv_heads == 0 || head_dim == 0;
    let tokens = Tokens { start: write_pos, count: 1, skipped: 0, is_sliding };
    encode("hadamard_quantize_kv", encoder, device, empty, cache, &[[src, packed, norms]], tokens)
}

/// Encodes `n_tokens` positions from `write_pos_start` on in 4 bits, in one launch: tokens
/// `src_tok_offset..src_tok_offset + n_tokens` of `src` f32 \[tokens, num_kv_heads, head_dim\]. Of more tokens than a
/// sliding cache has slots, the last ones stay.
///
/// # Errors
/// As [`dispatch_hadamard_quantize_kv`]; if the positions exceed a cache that is not sliding, none is written.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_hadamard_quantize_kv_seq(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    src: &MlxBuffer,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    write_pos_start: u32,
    n_tokens: u32,
    src_tok_offset: u32,
    is_sliding: bool,
    scale_factor_d512: Option<f32>,
) -> Result<()> {
    let cache = || Cache::new(4, num_kv_heads, head_dim, cache_capacity, scale_factor_d512.unwrap_or(1.0));
    let empty = n_tokens == 0 || num_kv_heads == 0 || head_dim == 0;
    let tokens = Tokens { start: write_pos_start, count: n_tokens, skipped: src_tok_offset, is_sliding };
    encode("hadamard_quantize_kv_seq", encoder, device, empty, cache, &[[src, packed, norms]], tokens)
}

/// Encodes one position of K and of V in 4 bits, as two [`dispatch_hadamard_quantize_kv`] in one launch.
///
/// # Errors
/// As [`dispatch_hadamard_quantize_kv`], and for a head_dim other than 256 or 512.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_hadamard_quantize_kv_fast_dual(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    src_k: &MlxBuffer,
    src_v: &MlxBuffer,
    packed_k: &MlxBuffer,
    packed_v: &MlxBuffer,
    norms_k: &MlxBuffer,
    norms_v: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    write_pos: u32,
    is_sliding: bool,
    scale_factor_d512: Option<f32>,
) -> Result<()> {
    let cache = || {
        expect_256_or_512(4, head_dim)?;
        Cache::new(4, num_kv_heads, head_dim, cache_capacity, scale_factor_d512.unwrap_or(1.0))
    };
    let empty = num_kv_heads == 0 || head_dim == 0;
    let tokens = Tokens { start: write_pos, count: 1, skipped: 0, is_sliding };
    let parts = [[src_k, packed_k, norms_k], [src_v, packed_v, norms_v]];
    encode("hadamard_quantize_kv_fast_dual", encoder, device, empty, cache, &parts, tokens)
}

/// Encodes one position in 5, 6 or 8 bits: as [`dispatch_hadamard_quantize_kv`], but `packed` is
/// \[num_kv_heads, cache_capacity, head_dim\], a code a byte.
///
/// # Errors
/// As [`dispatch_hadamard_quantize_kv`], and for `codebook_bits` other than 5, 6 or 8 or a head_dim other than 256 or 512.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_hadamard_quantize_kv_hb(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    src: &MlxBuffer,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    write_pos: u32,
    is_sliding: bool,
    scale_factor_d512: f32,
    codebook_bits: u32,
) -> Result<()> {
    let cache = || byte_packed(codebook_bits, num_kv_heads, head_dim, cache_capacity, scale_factor_d512);
    let empty = num_kv_heads == 0 || head_dim == 0;
    let tokens = Tokens { start: write_pos, count: 1, skipped: 0, is_sliding };
    encode("hadamard_quantize_kv_hb", encoder, device, empty, cache, &[[src, packed, norms]], tokens)
}

/// Encodes `n_tokens` positions in 5, 6 or 8 bits, in one launch: as [`dispatch_hadamard_quantize_kv_seq`], but `packed`
/// is \[num_kv_heads, cache_capacity, head_dim\], a code a byte.
///
/// # Errors
/// As [`dispatch_hadamard_quantize_kv_hb`]; if the positions exceed a cache that is not sliding, none is written.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_hadamard_quantize_kv_hb_seq(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    src: &MlxBuffer,
    packed: &MlxBuffer,
    norms: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    write_pos_start: u32,
    n_tokens: u32,
    src_tok_offset: u32,
    is_sliding: bool,
    scale_factor_d512: f32,
    codebook_bits: u32,
) -> Result<()> {
    let cache = || byte_packed(codebook_bits, num_kv_heads, head_dim, cache_capacity, scale_factor_d512);
    let empty = n_tokens == 0 || num_kv_heads == 0 || head_dim == 0;
    let tokens = Tokens { start: write_pos_start, count: n_tokens, skipped: src_tok_offset, is_sliding };
    encode("hadamard_quantize_kv_hb_seq", encoder, device, empty, cache, &[[src, packed, norms]], tokens)
}

/// Encodes one position of K and of V in 5, 6 or 8 bits, as two [`dispatch_hadamard_quantize_kv_hb`] in one launch.
///
/// # Errors
/// As [`dispatch_hadamard_quantize_kv_hb`].
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn dispatch_hadamard_quantize_kv_hb_dual(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    src_k: &MlxBuffer,
    src_v: &MlxBuffer,
    packed_k: &MlxBuffer,
    packed_v: &MlxBuffer,
    norms_k: &MlxBuffer,
    norms_v: &MlxBuffer,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    write_pos: u32,
    is_sliding: bool,
    scale_factor_d512: f32,
    codebook_bits: u32,
) -> Result<()> {
    let cache = || byte_packed(codebook_bits, num_kv_heads, head_dim, cache_capacity, scale_factor_d512);
    let empty = num_kv_heads == 0 || head_dim == 0;
    let tokens = Tokens { start: write_pos, count: 1, skipped: 0, is_sliding };
    let parts = [[src_k, packed_k, norms_k], [src_v, packed_v, norms_v]];
    encode("hadamard_quantize_kv_hb_dual", encoder, device, empty, cache, &parts, tokens)
}

/// What mlx-native encodes in a code a byte: head dims 256 and 512 only.
fn byte_packed(
    codebook_bits: u32,
    num_kv_heads: u32,
    head_dim: u32,
    cache_capacity: u32,
    scale_factor_d512: f32,
) -> crate::Result<Cache> {
    expect_256_or_512(byte_packed_bits(codebook_bits)?, head_dim)?;
    Cache::byte_packed(codebook_bits, num_kv_heads, head_dim, cache_capacity, scale_factor_d512)
}

/// Which tokens of the source go where.
#[derive(Clone, Copy)]
struct Tokens {
    /// First position written.
    start: u32,
    count: u32,
    /// Tokens of the source before the first.
    skipped: u32,
    is_sliding: bool,
}

/// Encodes the same tokens of every part: source, packed and norms.
fn encode(
    op: &str,
    encoder: &mut CommandEncoder,
    device: &MlxDevice,
    empty: bool,
    cache: impl FnOnce() -> crate::Result<Cache>,
    parts: &[[&MlxBuffer; 3]],
    tokens: Tokens,
) -> Result<()> {
    if empty {
        return Ok(());
    }
    encoder.record(op, device, |encoder| {
        let cache = cache()?;
        let capacity = cache.capacity;
        let (mut start, count) = (tokens.start as usize, tokens.count as usize);
        // Of more tokens than slots the last ones stay, so the others are left out.
        let mut dropped = 0;
        if tokens.is_sliding {
            dropped = count.saturating_sub(capacity);
            start = (start + dropped) % capacity;
        } else if start + count > capacity {
            return Err(Error::Positions { start, end: start + count, first: 0, len: capacity });
        }
        let new = count - dropped;
        let batch = Batch::contiguous(device.device(), capacity, start, start + new, new)?;
        let end = tokens.skipped as usize + count;
        let parts = parts
            .iter()
            .map(|[src, packed, norms]| {
                let src = src.view("src", DType::F32, &[end, cache.kv_heads, cache.row.head_dim()])?;
                Ok((src.slice(end - new..end)?, cache.pool(packed, norms)?))
            })
            .collect::<crate::Result<Vec<_>>>()?;
        let parts: Vec<_> = parts.iter().map(|(src, pool)| (src, pool)).collect();
        quantize(encoder, &parts, &batch)
    })
}
