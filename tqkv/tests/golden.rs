//! The golden vectors, on every backend: what an independent implementation of the seed codec computed.

mod support;

use safetensors::SafeTensors;
use std::path::Path;
use support::*;
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Codec, DType, Device};

const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const POSITIONS: usize = 12;

struct Case {
    d: usize,
    bits: u8,
    bytes: Vec<u8>,
}

impl Case {
    fn all() -> Vec<Case> {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/golden");
        let mut cases = vec![];
        for d in [64, 128, 256, 512] {
            for bits in [2, 3, 4, 5, 6, 8] {
                let bytes = std::fs::read(dir.join(format!("d{d}_b{bits}.safetensors"))).unwrap();
                cases.push(Case { d, bits, bytes });
            }
        }
        cases
    }

    fn row(&self) -> RowFormat {
        RowFormat::new(Codec::seed(self.bits), self.d).unwrap()
    }

    fn f32(&self, name: &str) -> Vec<f32> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        bytemuck::pod_collect_to_vec(tensors.tensor(name).unwrap().data())
    }

    fn u8(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.bytes).unwrap().tensor(name).unwrap().data().to_vec()
    }

    /// A contiguous pool that holds the golden codes and norms.
    fn pool(&self, device: &Device, side: &str) -> PagePool {
        let row = self.row();
        let codes =
            if self.bits == 4 { self.u8(&format!("{side}.nibbles")) } else { self.u8(&format!("{side}.codes")) };
        let norms = self.f32(&format!("{side}.norms"));
        let codes = device.upload(&codes, &[1, KV_HEADS, POSITIONS, row.row_bytes()]).unwrap();
        let norms = device.upload(&norms, &[1, KV_HEADS, POSITIONS, row.scales_per_row()]).unwrap();
        PagePool::from_buffers(row, &codes, Some(&norms)).unwrap()
    }
}

fn decoded_values_are_bit_exact(device: &Device) {
    for case in Case::all() {
        for side in ["k", "v"] {
            let pool = case.pool(device, side);
            let batch = Batch::contiguous(device, POSITIONS, 0, POSITIONS, 0).unwrap();
            let out = Guarded::new(device, DType::F32, &[KV_HEADS, POSITIONS, case.d]);
            run(device, |e| {
                dequantize(e, &pool, &batch, 0, 0..POSITIONS, Domain::Rotated, RowOrder::HeadMajor, &out.buffer)
            });
            let expected = case.f32(&format!("{side}.dequantized"));
            let bits = |x: &[f32]| x.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
            assert!(bits(&out.take()) == bits(&expected), "d{} b{} {side}", case.d, case.bits);

            run(device, |e| {
                dequantize(e, &pool, &batch, 0, 0..POSITIONS, Domain::Original, RowOrder::HeadMajor, &out.buffer)
            });
            let expected = case.f32(&format!("{side}.restored"));
            for (got, want) in out.take().chunks(case.d).zip(expected.chunks(case.d)) {
                let norm = want.iter().map(|v| v * v).sum::<f32>().sqrt();
                // A transform of D terms rounds log2(D) ≤ 9 times: 9 half-steps of 2^-24, doubled.
                got.iter().zip(want).for_each(|(g, w)| assert!((g - w).abs() <= 1e-6 * norm, "{g} {w}"));
            }
        }
    }
}

fn codes_are_equal_away_from_boundaries(device: &Device) {
    for case in Case::all() {
        for side in ["k", "v"] {
            let row = case.row();
            let pool = PagePool::new(device, row, KV_HEADS, POSITIONS, 1).unwrap();
            let input = case.f32(&format!("{side}.input"));
            // [kv_heads, positions, D] as [positions, kv_heads, D].
            let mut tokens = vec![0f32; input.len()];
            for (i, row) in input.chunks(case.d).enumerate() {
                let (h, p) = (i / POSITIONS, i % POSITIONS);
                tokens[(p * KV_HEADS + h) * case.d..][..case.d].copy_from_slice(row);
            }
            let x = device.upload(&tokens, &[POSITIONS, KV_HEADS, case.d]).unwrap();
            let batch = Batch::contiguous(device, POSITIONS, 0, POSITIONS, POSITIONS).unwrap();
            run(device, |e| quantize(e, &[(&x, &pool)], &batch));
            let codes = pool.codes().read::<u8>().unwrap();
            let (want, margin) = (case.u8(&format!("{side}.codes")), case.f32(&format!("{side}.margin")));
            for (r, packed) in codes.chunks(row.row_bytes()).enumerate() {
                for i in 0..case.d {
                    let j = r * case.d + i;
                    let got = row.get_code(packed, i);
                    assert!(
                        got == u16::from(want[j]) || margin[j] < 1e-5,
                        "d{} b{} row {r} element {i}",
                        case.d,
                        case.bits
                    );
                }
            }
            let norms = pool.scales().unwrap().read::<f32>().unwrap();
            for (got, want) in norms.iter().zip(case.f32(&format!("{side}.norms"))) {
                assert!((got - want).abs() <= 1e-6 * want.abs(), "norm {got} {want}");
            }
        }
    }
}

fn attention_is_close_to_float64(device: &Device) {
    for case in Case::all() {
        let (key, value) = (case.pool(device, "k"), case.pool(device, "v"));
        let q = device.upload(&case.f32("q.rotated"), &[1, HEADS, case.d]).unwrap();
        let full = Batch::contiguous(device, POSITIONS, 0, POSITIONS, 1).unwrap();
        let nine = Batch::contiguous(device, POSITIONS, 0, 9, 1).unwrap();
        let ring = Batch::contiguous(device, POSITIONS, 4, 16, 1).unwrap();
        let mut plain = AttentionParams::new(case.f32("attn.scale")[0]);
        plain.domain = Domain::Rotated;
        let sinks = device.upload(&case.f32("attn.sinks.logits"), &[HEADS]).unwrap();
        let variants = [
            ("full", &full, plain.clone()),
            ("len9", &nine, plain.clone()),
            ("window5", &full, AttentionParams { window: Some(5), ..plain.clone() }),
            ("softcap20", &full, AttentionParams { softcap: Some(20.0), ..plain.clone() }),
            ("sinks", &full, AttentionParams { sink_logits: Some(sinks), ..plain.clone() }),
            ("ring4_window7", &ring, AttentionParams { window: Some(7), ..plain.clone() }),
        ];
        for (name, batch, params) in variants {
            let out = Guarded::new(device, DType::F32, &[1, HEADS, case.d]);
            let lse = Guarded::new(device, DType::F32, &[1, HEADS]);
            run(device, |e| attention(e, &q, &key, &value, batch, &params, &out.buffer, Some(&lse.buffer)));
            let want = case.f32(&format!("attn.{name}.out"));
            for (h, (got, want)) in out.take().chunks(case.d).zip(want.chunks(case.d)).enumerate() {
                let exact: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                let error = relative_error(got, &exact);
                let tolerance = attention_tolerance(device, DType::F32, DType::F32);
                assert!(error <= tolerance, "d{} b{} {name} head {h}: {error:e}", case.d, case.bits);
            }
            for (got, want) in lse.take().iter().zip(case.f32(&format!("attn.{name}.lse"))) {
                let tolerance = attention_tolerance(device, DType::F32, DType::F32) as f32;
                assert!((got - want).abs() <= tolerance * want.abs().max(1.0), "{name} lse {got} {want}");
            }
        }
    }
}

suite!(cpu, wgpu, cuda: (
    decoded_values_are_bit_exact, codes_are_equal_away_from_boundaries, attention_is_close_to_float64,
));
