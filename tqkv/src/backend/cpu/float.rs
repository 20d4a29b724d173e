//! Floats of any stored type from and to f32.

use crate::compute::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Reads `out.len()` floats. The bytes are aligned for their type, as every buffer's are.
pub(super) fn load(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        DType::F16 => bytemuck::cast_slice::<_, f16>(bytes).convert_to_f32_slice(out),
        DType::BF16 => bytemuck::cast_slice::<_, bf16>(bytes).convert_to_f32_slice(out),
        DType::U8 | DType::U32 => unreachable!("ops takes floats only"),
    }
}

/// Writes floats, rounding to nearest even.
pub(super) fn store(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        DType::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
        DType::F16 => bytemuck::cast_slice_mut::<_, f16>(bytes).convert_from_f32_slice(values),
        DType::BF16 => bytemuck::cast_slice_mut::<_, bf16>(bytes).convert_from_f32_slice(values),
        DType::U8 | DType::U32 => unreachable!("ops takes floats only"),
    }
}
