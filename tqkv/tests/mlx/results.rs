//! Results against the oracle, and the two contracts.

use super::*;

/// Head dims and factors of the seed codec.
const SHAPES: [(usize, f32); 7] = [(16, 1.0), (32, 1.0), (64, 1.0), (128, 1.0), (256, 1.0), (512, 1.0), (512, 16.0)];

pub fn decoders_keep_their_contracts(device: &Device) {
    let mut rng = Rng(1);
    for (d, factor) in SHAPES {
        for bits in [4, 5, 6, 8] {
            let mut cache = Cache::new(device, &mut rng, bits, d, factor);
            let singles: Vec<_> = (0..CAPACITY).map(|p| cache.single(p)).collect();
            for (p, single) in singles.iter().enumerate() {
                let expected: Vec<u32> = (0..KV_HEADS).flat_map(|h| cache.expected(h, p)).map(f32::to_bits).collect();
                assert!(*single == expected, "d{d} b{bits} position {p}");
            }
            if bits == 4 {
                continue;
            }
            for start in 0..CAPACITY {
                // One token is the single position, to the byte; several are the concatenation, head by head.
                for n in 1..=CAPACITY - start {
                    let expected: Vec<u32> = (0..KV_HEADS)
                        .flat_map(|h| singles[start..start + n].iter().flat_map(move |s| &s[h * d..(h + 1) * d]))
                        .copied()
                        .collect();
                    assert!(cache.sequence(start, n) == expected, "d{d} b{bits} {n} from {start}");
                }
            }
        }
    }
}

pub fn the_f16_decoder_rounds_the_f32_one(device: &Device) {
    let mut rng = Rng(2);
    for (d, factor) in SHAPES {
        for bits in [5, 6, 8] {
            let mut cache = Cache::new(device, &mut rng, bits, d, factor);
            let dst = poisoned(&cache.device, DType::F16, KV_HEADS * 5 * d);
            cache
                .run(|c, e, r| {
                    let (h, d, cap) = (KV_HEADS as u32, d as u32, CAPACITY as u32);
                    dispatch_tq_dequantize_hb_kv_seq_f16(
                        e,
                        r,
                        &c.device,
                        &c.packed,
                        &c.norms,
                        &dst,
                        h,
                        d,
                        cap,
                        2,
                        5,
                        factor,
                        bits as u32,
                    )
                })
                .unwrap();
            let expected: Vec<u16> =
                cache.sequence(2, 5).into_iter().map(|x| f16::from_f32(f32::from_bits(x)).to_bits()).collect();
            assert!(dst.as_slice::<u16>().unwrap() == expected, "d{d} b{bits}");
        }
    }
}

/// Encodes `count` tokens of [tokens, KV_HEADS, d] from `offset` on at positions from `start` on, in one call or one by
/// one; gives packed and norms.
#[allow(clippy::too_many_arguments)]
pub fn encoded(
    device: &MlxDevice,
    x: &[f32],
    bits: u8,
    d: usize,
    factor: f32,
    (start, count, offset): (usize, usize, usize),
    sliding: bool,
    one_by_one: bool,
) -> Result<(Vec<u8>, Vec<u32>)> {
    let row = RowFormat::new(Codec::seed(bits), d).unwrap();
    let rows = KV_HEADS * CAPACITY;
    let mut r = KernelRegistry::new();
    let packed = device.alloc_buffer(rows * row.row_bytes(), DType::U8, vec![rows * row.row_bytes()])?;
    let n = rows * row.scales_per_row();
    let norms = device.alloc_buffer(n * 4, DType::F32, vec![n])?;
    let src: MlxBuffer = device.device().upload(x, &[x.len()]).unwrap().into();
    let (h, cap, hd) = (KV_HEADS as u32, CAPACITY as u32, d as u32);
    let mut e = device.command_encoder()?;
    if one_by_one {
        for i in 0..count {
            let one = src.slice_view(((offset + i) * KV_HEADS * d * 4) as u64, KV_HEADS * d)?;
            let p = (start + i) as u32;
            match bits {
                4 => dispatch_hadamard_quantize_kv(
                    &mut e,
                    &mut r,
                    device,
                    &one,
                    &packed,
                    &norms,
                    h,
                    hd,
                    cap,
                    p,
                    sliding,
                    Some(factor),
                    None,
                )?,
                b => dispatch_hadamard_quantize_kv_hb(
                    &mut e, &mut r, device, &one, &packed, &norms, h, hd, cap, p, sliding, factor, b as u32,
                )?,
            }
        }
    } else {
        let (p, n, o) = (start as u32, count as u32, offset as u32);
        match bits {
            4 => dispatch_hadamard_quantize_kv_seq(
                &mut e,
                &mut r,
                device,
                &src,
                &packed,
                &norms,
                h,
                hd,
                cap,
                p,
                n,
                o,
                sliding,
                Some(factor),
            )?,
            b => dispatch_hadamard_quantize_kv_hb_seq(
                &mut e, &mut r, device, &src, &packed, &norms, h, hd, cap, p, n, o, sliding, factor, b as u32,
            )?,
        }
    }
    e.commit_and_wait()?;
    Ok((packed.as_slice()?, norms.as_slice()?))
}

pub fn a_sequence_encodes_as_its_tokens_do(device: &Device) {
    let device = MlxDevice::from(device.clone());
    let mut rng = Rng(3);
    for (d, factor) in SHAPES {
        for bits in [4, 5, 6, 8] {
            if bits != 4 && d < 256 {
                continue; // mlx-native encodes a code a byte at 256 and 512 only.
            }
            let x = rng.normals(21 * KV_HEADS * d);
            // Plain, wrapping, and more tokens than slots; positions may be far past the capacity of a ring.
            for (tokens, sliding) in [
                ((0, 8, 0), false),
                ((3, 5, 4), false),
                ((6, 5, 1), true),
                ((1_000_003, 4, 0), true),
                ((5, 19, 2), true),
            ] {
                let batched = encoded(&device, &x, bits, d, factor, tokens, sliding, false).unwrap();
                let single = encoded(&device, &x, bits, d, factor, tokens, sliding, true).unwrap();
                assert!(batched == single, "d{d} b{bits} {tokens:?}");

                let row = RowFormat::new(Codec::seed(bits), d).unwrap().with_scale_factor_d512(factor).unwrap();
                let (start, count, offset) = tokens;
                for i in count.saturating_sub(CAPACITY)..count {
                    for h in 0..KV_HEADS {
                        let oracle = reference::quantize(&row, &x[((offset + i) * KV_HEADS + h) * d..][..d]);
                        let r = h * CAPACITY + (start + i) % CAPACITY;
                        let codes = &batched.0[r * row.row_bytes()..][..row.row_bytes()];
                        for (j, (&code, &margin)) in oracle.codes.iter().zip(&oracle.margins).enumerate() {
                            assert!(row.get_code(codes, j) == code || margin < 1e-5, "d{d} b{bits} token {i} {j}");
                        }
                    }
                }
            }
        }
    }
}

pub fn dual_encoders_equal_two_calls(device: &Device) {
    let device = MlxDevice::from(device.clone());
    let mut rng = Rng(4);
    for d in [256, 512] {
        for bits in [4, 5, 6, 8] {
            let row = RowFormat::new(Codec::seed(bits), d).unwrap();
            let x = [rng.normals(KV_HEADS * d), rng.normals(KV_HEADS * d)];
            let src = [0, 1].map(|i| MlxBuffer::from(device.device().upload(&x[i], &[x[i].len()]).unwrap()));
            let rows = KV_HEADS * CAPACITY;
            let bytes = rows * row.row_bytes();
            let packed = [(); 2].map(|()| device.alloc_buffer(bytes, DType::U8, vec![bytes]).unwrap());
            let n = rows * row.scales_per_row();
            let norms = [(); 2].map(|()| device.alloc_buffer(n * 4, DType::F32, vec![n]).unwrap());
            let (mut e, mut r) = (device.command_encoder().unwrap(), KernelRegistry::new());
            let (h, hd, cap) = (KV_HEADS as u32, d as u32, CAPACITY as u32);
            let ([sk, sv], [pk, pv], [nk, nv]) = (&src, &packed, &norms);
            match bits {
                4 => dispatch_hadamard_quantize_kv_fast_dual(
                    &mut e, &mut r, &device, sk, sv, pk, pv, nk, nv, h, hd, cap, 13, true, None,
                ),
                b => dispatch_hadamard_quantize_kv_hb_dual(
                    &mut e, &mut r, &device, sk, sv, pk, pv, nk, nv, h, hd, cap, 13, true, 1.0, b as u32,
                ),
            }
            .unwrap();
            e.commit_and_wait().unwrap();
            for i in 0..2 {
                let single = encoded(&device, &x[i], bits, d, 1.0, (13, 1, 0), true, true).unwrap();
                assert!((packed[i].as_slice().unwrap(), norms[i].as_slice().unwrap()) == single, "d{d} b{bits}");
            }
        }
    }
}

/// Attention in the model's own domain: rotated by the kernel, and by dispatches of one's own.
pub fn fused_rotations_match_separate_ones(
    k: &mut Cache,
    v: &Cache,
    q: &[f32],
    tmp: &MlxBuffer,
    common: FlashAttnVecTqHbParams,
) {
    let (h, hd) = (common.num_heads, common.head_dim);
    let upload = || -> MlxBuffer { k.device.device().upload(q, &[q.len()]).unwrap().into() };
    let (queries, rotated) = (upload(), upload());
    let (fused, by_hand) = (poisoned(&k.device, DType::F32, q.len()), poisoned(&k.device, DType::F32, q.len()));
    let fuse = FlashAttnVecTqHbParams { fuse_fwht_pre: 1, ..common };
    k.run(|k, e, r| {
        flash_attn_vec_tq_hb_with_fused_undo(
            e, r, &k.device, &queries, &k.packed, &k.norms, &v.packed, &v.norms, &fused, tmp, &fuse,
        )?;
        dispatch_fwht_sign_premult_f32(e, r, &k.device, &rotated, h, hd)?;
        e.memory_barrier();
        flash_attn_vec_tq_hb(
            e, r, &k.device, &rotated, &k.packed, &k.norms, &v.packed, &v.norms, &by_hand, tmp, &common,
        )?;
        dispatch_fwht_sign_undo_f32(e, r, &k.device, &by_hand, h, hd)
    })
    .unwrap();
    assert!(
        fused.as_slice::<u32>().unwrap() == by_hand.as_slice::<u32>().unwrap(),
        "d{hd} b{}: fused rotations differ from separate ones",
        common.codebook_bits
    );
}

pub fn attention_matches_the_oracle(device: &Device) {
    let mut rng = Rng(5);
    let heads = 6;
    for (d, factor) in [(256, 1.0), (512, 1.0), (512, 16.0)] {
        for bits in [4u8, 5, 6, 8] {
            let mut k = Cache::new(device, &mut rng, bits, d, factor);
            let v = Cache::new(device, &mut rng, bits, d, factor);
            // Scores of a few units, so that softcap and softmax both do something.
            let q: Vec<f32> = rng.normals(heads * d).iter().map(|x| x * 4.0).collect();
            // (kv_seq_len, ring_start, mask, window, softcap)
            let cases = [(8, 0, 0, 0, 0.0), (5, 0, 1, 0, 0.0), (8, 3, 1, 0, 0.0), (8, 6, 2, 4, 0.0), (7, 0, 2, 0, 2.0)];
            for (len, ring, mask_type, sliding_window, softcap) in cases {
                let buffer: MlxBuffer = device.upload(&q, &[heads, 1, d]).unwrap().into();
                let out = poisoned(&k.device, DType::F32, heads * d);
                let tmp_bytes = tmp_buffer_bytes(heads as u32, d as u32);
                let tmp = k.device.alloc_buffer(tmp_bytes, DType::F32, vec![tmp_bytes / 4]).unwrap();
                let scale = 1.0 / (d as f32).sqrt();
                let common = FlashAttnVecTqHbParams {
                    num_heads: heads as u32,
                    num_kv_heads: KV_HEADS as u32,
                    head_dim: d as u32,
                    kv_seq_len: len,
                    kv_capacity: CAPACITY as u32,
                    scale,
                    mask_type,
                    sliding_window,
                    softcap,
                    ring_start: ring,
                    scale_factor_d512: factor,
                    codebook_bits: bits as u32,
                    fuse_fwht_pre: 0,
                    nsg: compute_nsg(len),
                };
                let (packed, norms) = (&v.packed, &v.norms);
                k.run(|k, e, r| match bits {
                    4 => {
                        let params = FlashAttnVecTqParams {
                            num_heads: common.num_heads,
                            num_kv_heads: common.num_kv_heads,
                            head_dim: common.head_dim,
                            kv_seq_len: len,
                            kv_capacity: common.kv_capacity,
                            scale,
                            mask_type,
                            sliding_window,
                            softcap,
                            ring_start: ring,
                            scale_factor_d512: if factor == 1.0 { 0.0 } else { factor },
                        };
                        flash_attn_vec_tq(
                            e, r, &k.device, &buffer, &k.packed, &k.norms, packed, norms, &out, &tmp, &params,
                        )
                    }
                    _ => flash_attn_vec_tq_hb(
                        e, r, &k.device, &buffer, &k.packed, &k.norms, packed, norms, &out, &tmp, &common,
                    ),
                })
                .unwrap();
                if bits != 4 {
                    fused_rotations_match_separate_ones(&mut k, &v, &q, &tmp, common);
                }
                let start = if mask_type == 2 && sliding_window > 0 { len - sliding_window } else { 0 };
                let seen: Vec<usize> = (start..len).map(|i| (i + ring) as usize % CAPACITY).collect();
                for (h, got) in out.as_slice::<f32>().unwrap().chunks(d).enumerate() {
                    let head = h / (heads / KV_HEADS);
                    let keys: Vec<_> = seen.iter().map(|&p| k.expected(head, p)).collect();
                    let values: Vec<_> = seen.iter().map(|&p| v.expected(head, p)).collect();
                    let query = reference::Query {
                        q: &q[h * d..][..d],
                        scale: scale as f64,
                        softcap: (softcap > 0.0).then_some(softcap as f64),
                        sink: None,
                    };
                    let keys: Vec<&[f32]> = keys.iter().map(Vec::as_slice).collect();
                    let values: Vec<&[f32]> = values.iter().map(Vec::as_slice).collect();
                    let (want, _) = reference::attention(&query, &keys, &values);
                    let error = relative_error(got, &want);
                    assert!(
                        error <= attention_tolerance(device, DType::F32, DType::F32),
                        "d{d} b{bits} len {len} head {h}: {error:e}"
                    );
                }
            }
        }
    }
}
