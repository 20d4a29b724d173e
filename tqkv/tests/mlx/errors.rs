//! Errors, with those that mlx-native missed.

use super::*;

/// The message of an invalid argument.
pub fn invalid(result: Result<()>) -> String {
    match result {
        Err(MlxError::InvalidArgument(message)) => message,
        other => panic!("expected an invalid argument, got {other:?}"),
    }
}

pub fn decoding_errors(device: &Device) {
    let c = Cache::new(device, &mut Rng(6), 8, 256, 1.0);
    let dst = poisoned(&c.device, DType::F32, KV_HEADS * 4 * 256);
    let half = poisoned(&c.device, DType::F16, KV_HEADS * 4 * 256);
    let small = poisoned(&c.device, DType::F32, 511);
    let two = |b: &MlxBuffer| b.slice_view(0, b.element_count() - 1).unwrap();
    #[derive(Clone, Copy)]
    struct Args<'a> {
        packed: &'a MlxBuffer,
        norms: &'a MlxBuffer,
        dst: &'a MlxBuffer,
        heads: u32,
        d: u32,
        cap: u32,
        start: u32,
        tokens: u32,
        factor: f32,
        bits: u32,
    }
    let (p, n) = (&c.packed, &c.norms);
    let (short_packed, short_norms) = (two(p), two(n));
    let good =
        Args { packed: p, norms: n, dst: &dst, heads: 2, d: 256, cap: 8, start: 0, tokens: 1, factor: 1.0, bits: 8 };
    let cases: Vec<(&str, Args)> = vec![
        ("seed8: expected a power of two from 16 to 512", Args { d: 96, ..good }),
        ("head_dim 1 ", Args { d: 1, ..good }),
        ("head_dim 2048 ", Args { d: 2048, ..good }),
        ("codebook_bits is 4: expected 5, 6 or 8", Args { bits: 4, ..good }),
        ("codebook_bits is 7: expected 5, 6 or 8", Args { bits: 7, ..good }),
        ("codebook_bits is 264: expected 5, 6 or 8", Args { bits: 264, ..good }),
        ("positions 8..9 asked for: expected them within 0..8", Args { start: 8, ..good }),
        ("positions 6..10 asked for: expected them within 0..8", Args { start: 6, tokens: 4, ..good }),
        ("positions 4294967295..4294967296 asked for", Args { start: u32::MAX, ..good }),
        ("dst holds 2044 bytes: expected at least 2048", Args { dst: &small, ..good }),
        ("dst holds f16: expected f32", Args { dst: &half, ..good }),
        ("packed holds 4095 bytes: expected at least 4096", Args { packed: &short_packed, ..good }),
        ("norms holds 60 bytes: expected at least 64", Args { norms: &short_norms, ..good }),
        ("packed holds f32: expected u8", Args { packed: n, ..good }),
        ("norms holds u8: expected f32", Args { norms: p, ..good }),
        ("packed holds 4096 bytes: expected at least 1099511627264", Args { heads: 2, cap: u32::MAX >> 1, ..good }),
        ("cache_capacity is 0", Args { cap: 0, ..good }),
        ("out shares memory with another argument", Args { dst: n, heads: 1, d: 16, cap: 1, ..good }),
        ("scale_factor_d512 is 0: expected finite and positive", Args { d: 512, cap: 4, factor: 0.0, ..good }),
        ("scale_factor_d512 is NaN: expected finite and positive", Args { d: 512, cap: 4, factor: f32::NAN, ..good }),
    ];
    for (want, Args { packed, norms, dst, heads: h, d, cap, start, tokens, factor: f, bits: b }) in cases {
        let (mut e, mut r) = (c.device.command_encoder().unwrap(), KernelRegistry::new());
        let seq = dispatch_tq_dequantize_hb_kv_seq(
            &mut e, &mut r, &c.device, packed, norms, dst, h, d, cap, start, tokens, f, b,
        );
        let message = invalid(seq);
        assert!(message.starts_with("tq_dequantize_hb_kv_seq: "), "{message}");
        assert!(message.contains(want), "{message:?} lacks {want:?}");
        if tokens == 1 {
            let one =
                dispatch_tq_dequantize_hb_kv(&mut e, &mut r, &c.device, packed, norms, dst, h, d, cap, start, f, b);
            assert!(invalid(one).contains(want), "{want}");
        }
        e.commit_and_wait().unwrap();
    }
    assert!(dst.as_slice::<f32>().unwrap().iter().all(|x| x.is_nan()), "an error wrote");

    // The 4-bit decoder by itself.
    let (mut e, mut r) = (c.device.command_encoder().unwrap(), KernelRegistry::new());
    let mut four = |d, pos, dst: &MlxBuffer| {
        dispatch_tq_dequantize_kv(&mut e, &mut r, &c.device, &c.packed, &c.norms, dst, 2, d, 8, pos, 1.0)
    };
    assert!(invalid(four(100_000, 0, &dst)).contains("head_dim 100000 with codec seed4"));
    assert!(invalid(four(256, 8, &dst)).contains("positions 8..9"));
    assert!(invalid(four(256, 0, &small)).contains("dst holds 2044 bytes"));
    four(256, 7, &dst).unwrap();

    // Nothing to do is no error, whatever else is wrong.
    for (h, d, n) in [(0, 256, 1), (2, 0, 1), (2, 256, 0)] {
        dispatch_tq_dequantize_hb_kv_seq(
            &mut e, &mut r, &c.device, &c.packed, &c.norms, &small, h, d, 8, 99, n, 1.0, 3,
        )
        .unwrap();
        dispatch_tq_dequantize_hb_kv_seq_f16(
            &mut e, &mut r, &c.device, &c.packed, &c.norms, &small, h, d, 8, 99, n, 1.0, 3,
        )
        .unwrap();
        if n > 0 {
            dispatch_tq_dequantize_hb_kv(&mut e, &mut r, &c.device, &c.packed, &c.norms, &small, h, d, 8, 99, 1.0, 3)
                .unwrap();
            dispatch_tq_dequantize_kv(&mut e, &mut r, &c.device, &c.packed, &c.norms, &small, h, d, 8, 99, 1.0)
                .unwrap();
        }
    }
}

pub fn encoding_errors(device: &Device) {
    let c = Cache::new(device, &mut Rng(7), 8, 256, 1.0);
    let src: MlxBuffer = device.upload(&[1f32; 4 * 2 * 256], &[4, 2, 256]).unwrap().into();
    let half = poisoned(&c.device, DType::F16, 4096);
    let (mut e, mut r) = (c.device.command_encoder().unwrap(), KernelRegistry::new());
    {
        let mut seq = |src: &MlxBuffer, d, cap, pos, n, offset, sliding, f, b| {
            dispatch_hadamard_quantize_kv_hb_seq(
                &mut e, &mut r, &c.device, src, &c.packed, &c.norms, 2, d, cap, pos, n, offset, sliding, f, b,
            )
        };
        assert!(
            invalid(seq(&src, 256, 8, 6, 3, 0, false, 1.0, 8))
                .contains("positions 6..9 asked for: expected them within 0..8")
        );
        assert!(
            invalid(seq(&src, 256, 8, 0, 3, 2, false, 1.0, 8))
                .contains("src holds 8192 bytes: expected at least 10240")
        );
        assert!(invalid(seq(&src, 256, 8, 0, 1, u32::MAX, true, 1.0, 8)).contains("src holds 8192 bytes"));
        assert!(
            invalid(seq(&src, 128, 8, 0, 1, 0, false, 1.0, 8))
                .contains("head_dim 128 with codec seed8: expected 256 or 512")
        );
        assert!(invalid(seq(&src, 256, 8, 0, 1, 0, false, 1.0, 3)).contains("codebook_bits is 3"));
        assert!(invalid(seq(&src, 256, 0, 0, 1, 0, true, 1.0, 8)).contains("cache_capacity is 0"));
        assert!(
            invalid(seq(&src, 256, 9, 0, 1, 0, true, 1.0, 8))
                .contains("packed holds 4096 bytes: expected at least 4608")
        );
        assert!(invalid(seq(&src, 512, 4, 0, 1, 0, true, -1.0, 8)).contains("scale_factor_d512 is -1"));
        assert!(invalid(seq(&half, 256, 8, 0, 1, 0, true, 1.0, 8)).contains("src holds f16: expected f32"));
        assert!(invalid(seq(&c.norms, 256, 8, 0, 1, 0, true, 1.0, 8)).contains("src holds 64 bytes"));
        seq(&half, 0, 0, 9, 1, 0, false, 1.0, 3).unwrap();
        seq(&half, 256, 0, 9, 0, 0, false, 1.0, 3).unwrap();
    }
    let mut four = |d, pos, sliding, rms: Option<&MlxBuffer>| {
        dispatch_hadamard_quantize_kv(
            &mut e, &mut r, &c.device, &src, &c.packed, &c.norms, 2, d, 8, pos, sliding, None, rms,
        )
    };
    assert!(invalid(four(256, 8, false, None)).contains("positions 8..9"));
    assert!(invalid(four(24, 0, false, None)).contains("head_dim 24"));
    assert!(invalid(four(1024, 0, false, None)).contains("head_dim 1024"));
    assert!(invalid(four(256, 0, false, Some(&half))).contains("rms_scratch"));
    assert!(
        invalid(dispatch_hadamard_quantize_kv_hb_dual(
            &mut e, &mut r, &c.device, &src, &src, &c.packed, &c.packed, &c.norms, &c.norms, 2, 256, 8, 0, false, 1.0,
            8,
        ))
        .contains("shares memory")
    );
    e.commit_and_wait().unwrap();
    assert!(c.packed.as_slice::<u8>().unwrap() == c.codes && c.norms.as_slice::<f32>().unwrap() == c.scales);
}

pub fn attention_errors(device: &Device) {
    let c = Cache::new(device, &mut Rng(8), 8, 256, 1.0);
    let (q, out) = (poisoned(&c.device, DType::F32, 4 * 256), poisoned(&c.device, DType::F32, 4 * 256));
    let good = FlashAttnVecTqHbParams {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 256,
        kv_seq_len: 8,
        kv_capacity: 8,
        scale: 1.0,
        mask_type: 1,
        sliding_window: 0,
        softcap: 0.0,
        ring_start: 0,
        scale_factor_d512: 1.0,
        codebook_bits: 8,
        fuse_fwht_pre: 0,
        nsg: 1,
    };
    let (mut e, mut r) = (c.device.command_encoder().unwrap(), KernelRegistry::new());
    let mut call = |p: FlashAttnVecTqHbParams, out: &MlxBuffer| {
        flash_attn_vec_tq_hb(&mut e, &mut r, &c.device, &q, &c.packed, &c.norms, &c.packed, &c.norms, out, out, &p)
    };
    type P = FlashAttnVecTqHbParams;
    let cases = [
        ("head_dim 128 with codec seed8: expected 256 or 512", P { head_dim: 128, ..good }),
        ("num_heads is 0", P { num_heads: 0, ..good }),
        ("num_kv_heads is 0", P { num_kv_heads: 0, ..good }),
        ("heads is 3: expected a multiple of kv_heads 2", P { num_heads: 3, ..good }),
        ("kv_seq_len is 0", P { kv_seq_len: 0, ..good }),
        ("kv_seq_len is 9: expected at most 8", P { kv_seq_len: 9, ..good }),
        ("ring_start is 8: expected at most 7", P { ring_start: 8, ..good }),
        ("mask_type is 3: expected one of [0, 1, 2]", P { mask_type: 3, ..good }),
        ("nsg is 0", P { nsg: 0, ..good }),
        ("nsg is 3", P { nsg: 3, ..good }),
        ("nsg is 8", P { nsg: 8, ..good }),
        ("fuse_fwht_pre is 2", P { fuse_fwht_pre: 2, ..good }),
        ("codebook_bits is 4", P { codebook_bits: 4, ..good }),
        ("softcap is -1: expected finite and positive", P { softcap: -1.0, ..good }),
        ("softcap is NaN: expected finite and positive", P { softcap: f32::NAN, ..good }),
        ("scale is inf: expected finite", P { scale: f32::INFINITY, ..good }),
        ("q holds 4096 bytes: expected at least 6144", P { num_heads: 6, ..good }),
        ("packed holds 4096 bytes", P { kv_capacity: 9, ..good }),
    ];
    for (want, params) in cases {
        let message = invalid(call(params, &out));
        assert!(message.contains(want), "{message:?} lacks {want:?}");
    }
    assert!(invalid(call(good, &q)).contains("out shares memory"));
    assert!(invalid(call(good, &c.norms)).contains("output holds 64 bytes"));
    let mut fwht = |d| dispatch_fwht_sign_undo_f32(&mut e, &mut r, &c.device, &out, 4, d);
    assert!(invalid(fwht(128)).contains("expected 256 or 512"));
    assert!(invalid(fwht(512)).contains("data holds 4096 bytes: expected at least 8192"));
    e.commit_and_wait().unwrap();
    assert!(out.as_slice::<f32>().unwrap().iter().all(|x| x.is_nan()), "an error wrote");
}

pub fn encoders_are_used_once(device: &Device) {
    let device = MlxDevice::from(device.clone());
    let (mut e, mut r) = (device.command_encoder().unwrap(), KernelRegistry::new());
    let data = poisoned(&device, DType::F32, 256);
    assert!(matches!(e.wait_until_completed(), Err(MlxError::CommandBufferError(_))));
    e.commit().unwrap();
    e.wait_until_completed().unwrap();
    e.wait_until_completed().unwrap();
    assert!(matches!(e.commit(), Err(MlxError::CommandBufferError(_))));
    assert!(matches!(e.commit_and_wait(), Err(MlxError::CommandBufferError(_))));
    let late = dispatch_fwht_sign_undo_f32(&mut e, &mut r, &device, &data, 1, 256);
    assert!(matches!(late, Err(MlxError::CommandBufferError(_))));

    // Another device, even of the same kind, is another device.
    let other = MlxDevice::from(Device::cpu_with_threads(1).unwrap());
    let mut e = device.command_encoder().unwrap();
    let wrong = dispatch_fwht_sign_undo_f32(&mut e, &mut r, &other, &data, 1, 256);
    let said = invalid(wrong);
    assert!(said.contains("device is on") && said.contains("cpu"), "{said}");
    let far = poisoned(&other, DType::F32, 256);
    let wrong = dispatch_fwht_sign_undo_f32(&mut e, &mut r, &device, &far, 1, 256);
    let said = invalid(wrong);
    assert!(said.contains("x is on") && said.contains("cpu"), "{said}");
}

pub fn buffers(device: &Device) {
    let device = MlxDevice::from(device.clone());
    let mut b = device.alloc_buffer(24, DType::F32, vec![2, 3]).unwrap();
    assert_eq!((b.byte_len(), b.element_count(), b.shape(), b.dtype()), (24, 6, &[2, 3][..], DType::F32));
    assert_eq!(b.as_slice::<f32>().unwrap(), [0.0; 6]);
    b.as_mut_slice::<f32>().unwrap().copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(b.as_slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);

    let mut tail = b.slice_view(16, 2).unwrap();
    let mut slice = tail.as_mut_slice::<f32>().unwrap();
    slice[1] = 7.0;
    slice.finish().unwrap();
    assert_eq!(b.with_shape(vec![6]).unwrap().as_slice::<f32>().unwrap(), [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]);

    let bad = |r: Result<MlxBuffer>| invalid(r.map(|_| ()));
    assert!(bad(b.slice_view(2, 1)).contains("slice_view"));
    assert!(bad(b.slice_view(16, 3)).contains("slice_view"));
    assert!(bad(b.slice_view(16, usize::MAX)).contains("slice_view"));
    assert!(bad(b.slice_view(u64::MAX - 3, 1)).contains("slice_view"));
    assert!(bad(b.with_shape(vec![5])).contains("as many elements as [5]"));
    assert!(bad(device.alloc_buffer(0, DType::F32, vec![0])).contains("byte_len is 0"));
    assert!(bad(device.alloc_buffer(8, DType::F32, vec![3])).contains("expected what [3] of f32 takes"));
    assert!(bad(device.alloc_buffer(8, DType::F32, vec![usize::MAX, 4])).contains("byte_len is 8"));
    let odd = device.alloc_buffer(3, DType::U8, vec![3]).unwrap();
    assert!(invalid(odd.as_slice::<u16>().map(|_| ())).contains("multiple of the element's 2"));
    assert!(invalid(odd.as_slice::<()>().map(|_| ())).contains("multiple"));
    let enormous = usize::MAX / 4 + 1;
    // Some devices run out of memory, some have a limit.
    assert!(matches!(
        device.alloc_buffer(enormous, DType::U8, vec![enormous]),
        Err(MlxError::BufferAllocationError { .. } | MlxError::InvalidArgument(_))
    ));
}
