//! Attention of one query over a 4-bit cache.

use super::flash_attn_vec_tq_hb::{FlashAttnVecTqHbParams, attend};
use crate::mlx::{CommandEncoder, KernelRegistry, MlxBuffer, MlxDevice, Result};
use crate::ops::Domain;

/// What [`flash_attn_vec_tq`] computes.
#[derive(Clone, Copy, Debug)]
pub struct FlashAttnVecTqParams {
    /// Query heads, a multiple of `num_kv_heads`.
    pub num_heads: u32,
    /// KV heads.
    pub num_kv_heads: u32,
    /// Elements of a head: 256 or 512.
    pub head_dim: u32,
    /// Positions held, at least 1.
    pub kv_seq_len: u32,
    /// Positions that the cache has room for.
    pub kv_capacity: u32,
    /// Factor on q·k.
    pub scale: f32,
    /// 0: none, 1: causal (the same for one query, which is the newest), 2: sliding window.
    pub mask_type: u32,
    /// With mask 2: how many of the newest positions are seen; 0 for all.
    pub sliding_window: u32,
    /// Scores become softcap·tanh(score/softcap); 0 for none. (mlx-native ignores it.)
    pub softcap: f32,
    /// The slot of the oldest position: 0 until a ring has wrapped.
    pub ring_start: u32,
    /// What norms are divided by at head_dim 512; 0 stands for 1.
    pub scale_factor_d512: f32,
}

/// Attention of one query, in the rotated domain: `q` f32 \[num_heads, 1, head_dim\], rotated by
/// [`dispatch_fwht_sign_premult_f32`](super::fwht_standalone::dispatch_fwht_sign_premult_f32), over K and V as
/// [`dispatch_hadamard_quantize_kv`](super::hadamard_quantize_kv::dispatch_hadamard_quantize_kv) stores them, into
/// `output` of `q`'s shape, still rotated. `tmp` is not used.
///
/// # Errors
/// [`MlxError::InvalidArgument`](crate::mlx::MlxError::InvalidArgument) for a head_dim other than 256 or 512, no heads or
/// positions, heads that KV heads do not divide, more positions than capacity, an unknown mask, a ring_start at or past
/// the capacity, a scale that is not finite, a negative softcap or scale factor, and a buffer that is too small, of another
/// type or device, or shared with `output`.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn flash_attn_vec_tq(
    encoder: &mut CommandEncoder,
    _registry: &mut KernelRegistry,
    device: &MlxDevice,
    q: &MlxBuffer,
    k_packed: &MlxBuffer,
    k_norms: &MlxBuffer,
    v_packed: &MlxBuffer,
    v_norms: &MlxBuffer,
    output: &MlxBuffer,
    _tmp: &MlxBuffer,
    params: &FlashAttnVecTqParams,
) -> Result<()> {
    let p = FlashAttnVecTqHbParams {
        num_heads: params.num_heads,
        num_kv_heads: params.num_kv_heads,
        head_dim: params.head_dim,
        kv_seq_len: params.kv_seq_len,
        kv_capacity: params.kv_capacity,
        scale: params.scale,
        mask_type: params.mask_type,
        sliding_window: params.sliding_window,
        softcap: params.softcap,
        ring_start: params.ring_start,
        scale_factor_d512: if params.scale_factor_d512 == 0.0 { 1.0 } else { params.scale_factor_d512 },
        codebook_bits: 4,
        fuse_fwht_pre: 0,
        nsg: 1,
    };
    let buffers = [q, k_packed, k_norms, v_packed, v_norms, output];
    encoder.record("flash_attn_vec_tq", device, |e| attend(e, device, 4, buffers, &p, Domain::Rotated))
}

/// Bytes of `tmp`: none are used, but a buffer cannot be empty.
pub fn tmp_buffer_bytes(_num_heads: u32, _head_dim: u32) -> usize {
    size_of::<f32>()
}
