//! mlx-native's surface: its two contracts, its results against the oracle, and its errors with those it missed.

mod support;

use half::f16;
use support::*;
use tqkv::format::RowFormat;
use tqkv::mlx::ops::{flash_attn_vec_tq::tmp_buffer_bytes, flash_attn_vec_tq_hb::compute_nsg};
use tqkv::mlx::*;
use tqkv::{Codec, Device, reference};

const KV_HEADS: usize = 2;
const CAPACITY: usize = 8;

/// A cache of random codes and plausible norms.
struct Cache {
    device: MlxDevice,
    registry: KernelRegistry,
    row: RowFormat,
    codes: Vec<u8>,
    scales: Vec<f32>,
    packed: MlxBuffer,
    norms: MlxBuffer,
}

impl Cache {
    fn new(device: &Device, rng: &mut Rng, bits: u8, d: usize, factor: f32) -> Cache {
        let row = RowFormat::new(Codec::seed(bits), d).unwrap().with_scale_factor_d512(factor).unwrap();
        let rows = KV_HEADS * CAPACITY;
        let codes = rng.bytes(rows * row.row_bytes());
        let scales: Vec<f32> = (0..rows * row.scales_per_row()).map(|_| 0.5 + rng.unit() as f32).collect();
        let packed = device.upload(&codes, &[codes.len()]).unwrap().into();
        let norms = device.upload(&scales, &[scales.len()]).unwrap().into();
        Cache { device: device.clone().into(), registry: KernelRegistry::new(), row, codes, scales, packed, norms }
    }

    /// What the oracle decodes at a position of a head.
    fn expected(&self, head: usize, position: usize) -> Vec<f32> {
        let (r, n) = (head * CAPACITY + position, self.row.scales_per_row());
        let codes = &self.codes[r * self.row.row_bytes()..][..self.row.row_bytes()];
        reference::dequantize(&self.row, codes, &self.scales[r * n..][..n])
    }

    fn run(
        &mut self,
        record: impl FnOnce(&Cache, &mut CommandEncoder, &mut KernelRegistry) -> Result<()>,
    ) -> Result<()> {
        let mut encoder = self.device.command_encoder()?;
        let mut registry = std::mem::take(&mut self.registry);
        let recorded = record(self, &mut encoder, &mut registry);
        self.registry = registry;
        recorded?;
        encoder.commit_and_wait()
    }

    /// The bits of one decoded position, by the dispatch for its width.
    fn single(&mut self, position: usize) -> Vec<u32> {
        let (d, bits) = (self.row.head_dim(), self.row.bits());
        let dst = poisoned(&self.device, DType::F32, KV_HEADS * d);
        self.run(|c, e, r| {
            let (h, d, n, p) = (KV_HEADS as u32, d as u32, CAPACITY as u32, position as u32);
            let f = c.row.scale_factor_d512();
            match bits {
                4 => dispatch_tq_dequantize_kv(e, r, &c.device, &c.packed, &c.norms, &dst, h, d, n, p, f),
                b => dispatch_tq_dequantize_hb_kv(e, r, &c.device, &c.packed, &c.norms, &dst, h, d, n, p, f, b as u32),
            }
        })
        .unwrap();
        dst.as_slice().unwrap()
    }

    /// The bits of several decoded positions.
    fn sequence(&mut self, start: usize, n: usize) -> Vec<u32> {
        let (d, bits) = (self.row.head_dim(), self.row.bits());
        let dst = poisoned(&self.device, DType::F32, KV_HEADS * n * d);
        self.run(|c, e, r| {
            let (h, d, cap, f) = (KV_HEADS as u32, d as u32, CAPACITY as u32, c.row.scale_factor_d512());
            let (start, n, b) = (start as u32, n as u32, bits as u32);
            dispatch_tq_dequantize_hb_kv_seq(e, r, &c.device, &c.packed, &c.norms, &dst, h, d, cap, start, n, f, b)
        })
        .unwrap();
        dst.as_slice().unwrap()
    }
}

fn poisoned(device: &MlxDevice, dtype: DType, n: usize) -> MlxBuffer {
    upload(device.device(), dtype, &vec![f32::NAN; n], &[n]).into()
}

/// Head dims and factors of the seed codec.
const SHAPES: [(usize, f32); 7] = [(16, 1.0), (32, 1.0), (64, 1.0), (128, 1.0), (256, 1.0), (512, 1.0), (512, 16.0)];

fn decoders_keep_their_contracts(device: &Device) {
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

fn the_f16_decoder_rounds_the_f32_one(device: &Device) {
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
fn encoded(
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

fn a_sequence_encodes_as_its_tokens_do(device: &Device) {
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

fn dual_encoders_equal_two_calls(device: &Device) {
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
fn fused_rotations_match_separate_ones(
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

fn attention_matches_the_oracle(device: &Device) {
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

/// The message of an invalid argument.
fn invalid(result: Result<()>) -> String {
    match result {
        Err(MlxError::InvalidArgument(message)) => message,
        other => panic!("expected an invalid argument, got {other:?}"),
    }
}

fn decoding_errors(device: &Device) {
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

fn encoding_errors(device: &Device) {
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

fn attention_errors(device: &Device) {
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

fn encoders_are_used_once(device: &Device) {
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

fn buffers(device: &Device) {
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

#[test]
fn users_may_move_everything_between_threads() {
    fn send_and_sync<T: Send + Sync>() {}
    send_and_sync::<(MlxDevice, MlxBuffer, MlxError, KernelRegistry)>();
    fn send<T: Send>() {}
    send::<CommandEncoder>();
    assert_eq!(MlxDevice::new().unwrap().device().info().id, Device::best().info().id);
}

/// A slice that cannot be written back is no silent loss.
#[test]
fn a_lost_write_fails_what_follows() {
    use std::sync::{Arc, Mutex, mpsc::channel};
    let device = Device::cpu_with_threads(1).unwrap();
    let mut b = MlxBuffer::from(device.upload(&[1f32; 256], &[256]).unwrap());
    let held = b.buffer().clone();
    let ((entered, is_entered), (leave, may_leave)) = (channel(), channel());
    let may_leave = Mutex::new(may_leave);
    let hold = Arc::new(move |_: &mut [&mut [u8]], _: &[u32]| {
        entered.send(()).unwrap();
        may_leave.lock().unwrap().recv().unwrap()
    });
    device.kernels().register("hold", tqkv::compute::KernelSource::Cpu(hold));
    let slice = b.as_mut_slice::<f32>().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| run(&device, |e| e.dispatch("hold", [1, 1, 1], &[&held], &[])));
        is_entered.recv().unwrap();
        drop(slice);
        leave.send(()).unwrap();
    });
    let mlx = MlxDevice::from(device.clone());
    let (mut e, mut r) = (mlx.command_encoder().unwrap(), KernelRegistry::new());
    let late = dispatch_fwht_sign_undo_f32(&mut e, &mut r, &mlx, &b, 1, 256);
    assert!(matches!(late, Err(MlxError::CommandBufferError(m)) if m.contains("in use by another thread")));
    assert!(b.as_slice::<f32>().is_err());
}

macro_rules! suite {
    ($($device:ident),*: $($test:ident)*) => { suite!(@ [$($device)*] [$($test)*]); };
    (@ [$($device:ident)*] $tests:tt) => { $(suite!(@@ $device $tests);)* };
    (@@ $device:ident [$($test:ident)*]) => {
        mod $device {
            use super::support::on;
            $(
                #[test]
                fn $test() {
                    on(stringify!($device), super::$test);
                }
            )*
        }
    };
}

suite! { cpu, wgpu, cuda:
    decoders_keep_their_contracts
    the_f16_decoder_rounds_the_f32_one
    a_sequence_encodes_as_its_tokens_do
    dual_encoders_equal_two_calls
    attention_matches_the_oracle
    decoding_errors
    encoding_errors
    attention_errors
    encoders_are_used_once
    buffers
}
