//! Floats of any stored type from and to f32.

use crate::compute::DType;
use half::{bf16, f16, slice::HalfFloatSliceExt};

/// Reads `out.len()` floats. The bytes are aligned for their type, as every buffer's are.
pub(super) fn load(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        DType::F32 => out.copy_from_slice(bytemuck::cast_slice(bytes)),
        DType::F16 => load_f16(bytemuck::cast_slice(bytes), out),
        DType::BF16 => bytemuck::cast_slice::<_, bf16>(bytes).convert_to_f32_slice(out),
        DType::U8 | DType::U32 | DType::I64 => unreachable!("ops takes floats only"),
    }
}

/// Writes floats, rounding to nearest even.
pub(super) fn store(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        DType::F32 => bytes.copy_from_slice(bytemuck::cast_slice(values)),
        DType::F16 => store_f16(values, bytemuck::cast_slice_mut(bytes)),
        DType::BF16 => bytemuck::cast_slice_mut::<_, bf16>(bytes).convert_from_f32_slice(values),
        DType::U8 | DType::U32 | DType::I64 => unreachable!("ops takes floats only"),
    }
}

fn load_f16(from: &[f16], to: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the instructions are there.
        return unsafe { f16c::load(from, to) };
    }
    from.convert_to_f32_slice(to);
}

fn store_f16(from: &[f32], to: &mut [f16]) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("f16c") {
        // SAFETY: the instructions are there.
        return unsafe { f16c::store(from, to) };
    }
    to.convert_from_f32_slice(from);
}

/// As `half` does it, but for a function that is called for every eight.
#[cfg(target_arch = "x86_64")]
mod f16c {
    use half::{f16, slice::HalfFloatSliceExt};
    use std::arch::x86_64::*;

    /// # Safety
    /// Needs the instructions.
    #[target_feature(enable = "avx,f16c")]
    pub unsafe fn load(from: &[f16], to: &mut [f32]) {
        assert_eq!(from.len(), to.len());
        let (eights, rest) = from.as_chunks::<8>();
        let (to, last) = to.as_chunks_mut::<8>();
        for (x, out) in eights.iter().zip(to) {
            // SAFETY: eight of both.
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast()))) };
        }
        rest.convert_to_f32_slice(last);
    }

    /// # Safety
    /// Needs the instructions.
    #[target_feature(enable = "avx,f16c")]
    pub unsafe fn store(from: &[f32], to: &mut [f16]) {
        assert_eq!(from.len(), to.len());
        let (eights, rest) = from.as_chunks::<8>();
        let (to, last) = to.as_chunks_mut::<8>();
        for (x, out) in eights.iter().zip(to) {
            // SAFETY: eight of both.
            unsafe {
                let half = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(x.as_ptr()));
                _mm_storeu_si128(out.as_mut_ptr().cast(), half);
            }
        }
        last.convert_from_f32_slice(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every half, and floats near and between them; as many as vectors and some more.
    #[test]
    fn halves_are_those_of_half() {
        let halves: Vec<f16> = (0..=u16::MAX).chain([0x3c01; 3]).map(f16::from_bits).collect();
        let mut got = vec![0.0; halves.len()];
        load(DType::F16, bytemuck::cast_slice(&halves), &mut got);
        let same = |a: f32, b: f32| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(got.iter().zip(&halves).all(|(&got, want)| same(got, want.to_f32())));
        let floats: Vec<f32> =
            got.iter().flat_map(|x| [*x, x * 1.000_3, x * 1.000_488_3, x * 3e3]).chain([1e-40]).collect();
        let mut got = vec![f16::ZERO; floats.len()];
        store(DType::F16, &floats, bytemuck::cast_slice_mut(&mut got));
        let same = |a: f16, b: f16| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        assert!(got.iter().zip(&floats).all(|(&got, &x)| same(got, f16::from_f32(x))));
    }
}
