//! mlx-native's names and argument order for its TurboQuant path, over [`ops`](crate::ops): its callers move by
//! changing `use mlx_native::…` to `use tqkv::mlx::…`, on any [`Device`](crate::Device). `docs/from-mlx-native.md` maps
//! old to new.
//!
//! What differs: every argument is checked before anything is recorded, and what mlx-native did not check (positions past
//! the capacity, buffers that are too small, types, aliased memory) is [`MlxError::InvalidArgument`] too; softcap works;
//! a sequence is encoded in one launch; grouped query heads decode K and V once.
//!
//! ```
//! use tqkv::mlx::ops::tq_dequantize_kv::dispatch_tq_dequantize_kv;
//! use tqkv::mlx::{DType, KernelRegistry, MlxDevice};
//!
//! let device = MlxDevice::new()?;
//! let mut registry = KernelRegistry::new();
//! let packed = device.alloc_buffer(2 * 8 * 128, DType::U8, vec![2, 8, 128])?;  // 2 KV heads, capacity 8, head_dim 256
//! let norms = device.alloc_buffer(2 * 8 * 4, DType::F32, vec![2, 8])?;
//! let dst = device.alloc_buffer(2 * 256 * 4, DType::F32, vec![2, 256])?;
//! let mut encoder = device.command_encoder()?;
//! dispatch_tq_dequantize_kv(
//!     &mut encoder, &mut registry, device.metal_device(), &packed, &norms, &dst, 2, 256, 8, 3, 1.0,
//! )?;
//! encoder.commit_and_wait()?;
//! assert!(dst.as_slice::<f32>()?.iter().all(|&x| x == 0.0));
//! # Ok::<(), tqkv::mlx::MlxError>(())
//! ```

mod buffer;
mod device;
mod encoder;
mod error;
pub mod ops;

pub use crate::compute::DType;
pub use buffer::{MlxBuffer, MlxSliceMut};
pub use device::MlxDevice;
pub use encoder::{CommandEncoder, KernelRegistry};
pub use error::{MlxError, Result};
pub use ops::flash_attn_vec_tq::{FlashAttnVecTqParams, flash_attn_vec_tq};
pub use ops::flash_attn_vec_tq_hb::{
    FlashAttnVecTqHbParams, flash_attn_vec_tq_hb, flash_attn_vec_tq_hb_with_fused_undo,
};
pub use ops::fwht_standalone::{dispatch_fwht_sign_premult_f32, dispatch_fwht_sign_undo_f32};
pub use ops::hadamard_quantize_kv::{
    dispatch_hadamard_quantize_kv, dispatch_hadamard_quantize_kv_fast_dual, dispatch_hadamard_quantize_kv_hb,
    dispatch_hadamard_quantize_kv_hb_dual, dispatch_hadamard_quantize_kv_hb_seq, dispatch_hadamard_quantize_kv_seq,
};
pub use ops::tq_dequantize_kv::{
    dispatch_tq_dequantize_hb_kv, dispatch_tq_dequantize_hb_kv_seq, dispatch_tq_dequantize_hb_kv_seq_f16,
    dispatch_tq_dequantize_kv,
};
