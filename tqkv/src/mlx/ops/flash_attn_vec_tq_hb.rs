//! Attention of one query over a cache of 5, 6 or 8 bits.

use super::{Cache, byte_packed_bits, expect_256_or_512};
use crate::compute;
use crate::error::Error;
use crate::mlx::{CommandEncoder, DType, KernelRegistry, MlxBuffer, MlxDevice, Result};
use crate::ops::{AttentionParams, Batch, Direction, Domain, attention, rotate};

pub use super::flash_attn_vec_tq::tmp_buffer_bytes;

/// What [`flash_attn_vec_tq_hb`] computes.
#[derive(Clone, Copy, Debug)]
pub struct FlashAttnVecTqHbParams {
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
    /// What norms are divided by at head_dim 512.
    pub scale_factor_d512: f32,
    /// Bits of a code: 5, 6 or 8.
    pub codebook_bits: u32,
    /// 1: `q` comes unrotated and is rotated here. 0: the caller has rotated it.
    pub fuse_fwht_pre: u32,
    /// mlx-native's threads a workgroup: 1, 2 or 4, and of no effect here.
    pub nsg: u32,
}

/// Attention of one query over K and V of a code a byte: as
/// [`flash_attn_vec_tq`](super::flash_attn_vec_tq::flash_attn_vec_tq), with `codebook_bits` 5, 6 or 8.
///
/// # Errors
/// As there, and for other `codebook_bits`, a `fuse_fwht_pre` above 1 or an `nsg` other than 1, 2 or 4.
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn flash_attn_vec_tq_hb(
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
    params: &FlashAttnVecTqHbParams,
) -> Result<()> {
    let buffers = [q, k_packed, k_norms, v_packed, v_norms, output];
    encoder.record("flash_attn_vec_tq_hb", device, |encoder| {
        attend(encoder, device, byte_packed_bits(params.codebook_bits)?, buffers, params, Domain::Rotated)
    })
}

/// [`flash_attn_vec_tq_hb`] whose `output` is rotated back: do not undo it again.
///
/// # Errors
/// As [`flash_attn_vec_tq_hb`].
#[allow(clippy::too_many_arguments)] // mlx-native's signature.
pub fn flash_attn_vec_tq_hb_with_fused_undo(
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
    params: &FlashAttnVecTqHbParams,
) -> Result<()> {
    let buffers = [q, k_packed, k_norms, v_packed, v_norms, output];
    encoder.record("flash_attn_vec_tq_hb_with_fused_undo", device, |encoder| {
        attend(encoder, device, byte_packed_bits(params.codebook_bits)?, buffers, params, Domain::Original)
    })
}

/// mlx-native's choice of `nsg`: 1, since nothing depends on it.
pub fn compute_nsg(_kv_seq_len: u32) -> u32 {
    1
}

/// Attention with the output in `domain`; `buffers` are q, K's packed and norms, V's, and the output.
pub(super) fn attend(
    encoder: &mut compute::CommandEncoder,
    device: &MlxDevice,
    bits: u8,
    [q, k_packed, k_norms, v_packed, v_norms, output]: [&MlxBuffer; 6],
    p: &FlashAttnVecTqHbParams,
    domain: Domain,
) -> crate::Result<()> {
    expect_256_or_512(bits, p.head_dim)?;
    for (what, n) in [("num_heads", p.num_heads), ("num_kv_heads", p.num_kv_heads), ("kv_seq_len", p.kv_seq_len)] {
        if n == 0 {
            return Err(Error::Zero { what });
        }
    }
    if p.kv_seq_len > p.kv_capacity {
        let (got, expected) = (p.kv_seq_len as usize, p.kv_capacity as usize);
        return Err(Error::TooLarge { what: "kv_seq_len", got, expected });
    }
    if p.ring_start >= p.kv_capacity {
        let (got, expected) = (p.ring_start as usize, p.kv_capacity as usize - 1);
        return Err(Error::TooLarge { what: "ring_start", got, expected });
    }
    for (what, got, allowed) in [
        ("mask_type", p.mask_type, &[0, 1, 2][..]),
        ("fuse_fwht_pre", p.fuse_fwht_pre, &[0, 1]),
        ("nsg", p.nsg, &[1, 2, 4]),
    ] {
        if !allowed.contains(&got) {
            return Err(Error::Mismatch { what, got: got as usize, expected: format!("one of {allowed:?}") });
        }
    }
    let cache = Cache::new(bits, p.num_kv_heads, p.head_dim, p.kv_capacity, p.scale_factor_d512)?;
    let shape = [1, p.num_heads as usize, p.head_dim as usize];
    let mut q = q.view("q", DType::F32, &shape)?;
    let output = output.view("output", DType::F32, &shape)?;
    let (key, value) = (cache.pool(k_packed, k_norms)?, cache.pool(v_packed, v_norms)?);
    let first = p.ring_start as usize;
    let batch = Batch::contiguous(device.device(), cache.capacity, first, first + p.kv_seq_len as usize, 1)?;
    let params = AttentionParams {
        window: (p.mask_type == 2 && p.sliding_window > 0).then_some(p.sliding_window as usize),
        softcap: (p.softcap != 0.0).then_some(p.softcap),
        domain: Domain::Rotated,
        ..AttentionParams::new(p.scale)
    };
    if p.fuse_fwht_pre == 1 {
        let rotated = device.device().zeros(DType::F32, &shape)?;
        rotate(encoder, &cache.row, Direction::Forward, &q, &rotated)?;
        q = rotated;
    }
    attention(encoder, &q, &key, &value, &batch, &params, &output, None)?;
    match domain {
        Domain::Rotated => Ok(()),
        Domain::Original => rotate(encoder, &cache.row, Direction::Inverse, &output, &output),
    }
}
