//! What is particular to the wgpu backend: limits, errors, a caller's own kernels, devices and buffers.
#![cfg(feature = "wgpu")]

mod support;

use support::*;
use tqkv::compute::KernelSource;
use tqkv::format::{Encoding, RowFormat};
use tqkv::ops::*;
use tqkv::{Buffer, CacheConfig, Codec, DType, Device, Error, KvCache, wgpu};

const DOUBLE: &str = "
@group(0) @binding(0) var<storage, read_write> x: array<f32>;
@group(0) @binding(1) var<uniform> c: vec4<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) id: vec3<u32>) {
  if (id.x < c.x) { x[id.x] = 2.0 * x[id.x]; }
}";

/// Runs on wgpu where there is one.
fn on_wgpu(body: impl FnOnce(&Device)) {
    on("wgpu", body);
}

#[test]
fn a_search_for_gains_is_refused() {
    on_wgpu(|device| {
        let config = CacheConfig::new(1, 1, 64);
        assert!(KvCache::new(device, config.clone().encoding(Encoding::Nearest)).is_ok());
        let refused = KvCache::new(device, config.encoding(Encoding::Search)).err();
        assert!(matches!(&refused, Some(Error::Unsupported { what, .. }) if what.contains("search")), "{refused:?}");
    });
}

#[test]
fn own_kernels_run_between_operations() {
    on_wgpu(|device| {
        device.kernels().register("double", KernelSource::Wgsl(DOUBLE.to_owned()));
        let row = RowFormat::new(Codec::tq(4), 64).unwrap();
        let data = Rng(1).normals(128);
        let x = device.upload(&data, &[2, 64]).unwrap();
        run(device, |e| {
            rotate(e, &row, Direction::Forward, &x, &x)?;
            e.dispatch("double", [2, 1, 1], &[&x], &[128, 0, 0, 0])?;
            rotate(e, &row, Direction::Inverse, &x, &x)
        });
        for (got, x) in x.read::<f32>().unwrap().iter().zip(&data) {
            assert!((got - 2.0 * x).abs() < 1e-5);
        }
        device.kernels().register("broken", KernelSource::Wgsl("fn main( {".to_owned()));
        let error = device.encoder().unwrap().dispatch("broken", [1, 1, 1], &[&x], &[]).unwrap_err();
        assert!(matches!(error, Error::KernelCompile { .. }), "{error}");
    });
}

#[test]
fn engines_devices_and_buffers_are_wrapped() {
    on_wgpu(|_| {
        let (device, queue) = engine();
        // SAFETY: the queue is the device's, which nothing else uses.
        let wrapped = unsafe { Device::from_wgpu(device.clone(), queue.clone()) }.unwrap();
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: None, size: 512, usage, mapped_at_creation: false };
        let theirs = device.create_buffer(&descriptor);
        let data = Rng(2).normals(128);
        queue.write_buffer(&theirs, 0, bytemuck::cast_slice(&data));
        // SAFETY: it is the device's, not mapped, and wrapped once.
        let x = unsafe { Buffer::from_wgpu(&wrapped, theirs.clone(), DType::F32, &[2, 64]) }.unwrap();
        assert_eq!(x.as_wgpu(), Some((&theirs, 0)));
        let row = RowFormat::new(Codec::tq(4), 64).unwrap();
        run(&wrapped, |e| rotate(e, &row, Direction::Forward, &x, &x));
        let want = tqkv::reference::rotate(&row, &data[..64]);
        assert!(relative_error(&x.read::<f32>().unwrap()[..64], &want) < 1e-6);
        // SAFETY: as above; it fails.
        let error = unsafe { Buffer::from_wgpu(&wrapped, theirs, DType::F32, &[3, 64]) }.unwrap_err();
        assert!(matches!(error, Error::TooSmall { got: 512, expected: 768, .. }), "{error}");
    });
}

#[test]
fn a_lost_device_is_said() {
    on_wgpu(|_| {
        let (device, queue) = engine();
        // SAFETY: the queue is the device's, which nothing else uses.
        let wrapped = unsafe { Device::from_wgpu(device.clone(), queue) }.unwrap();
        let x = wrapped.upload(&[1f32; 64], &[1, 64]).unwrap();
        device.destroy();
        let _ = device.poll(wgpu::PollType::Poll);
        let row = RowFormat::new(Codec::tq(4), 64).unwrap();
        let first = x.read::<f32>().unwrap_err();
        assert!(matches!(&first, Error::DeviceFailed { reason, .. } if reason.contains("is lost")), "{first}");
        let calls = [
            x.read::<f32>().map(|_| ()).unwrap_err(),
            x.write(&[1f32; 64]).unwrap_err(),
            wrapped.zeros(DType::F32, &[4]).map(|_| ()).unwrap_err(),
            wrapped.encoder().map(|_| ()).unwrap_err(),
            wrapped.encoder().and_then(|mut e| rotate(&mut e, &row, Direction::Forward, &x, &x)).unwrap_err(),
        ];
        for error in calls {
            assert!(matches!(&error, Error::DeviceFailed { reason, .. } if reason.contains("was lost")), "{error}");
        }
    });
}

#[test]
fn a_pool_over_a_binding_is_an_error_that_names_the_limit() {
    on_wgpu(|device| {
        let info = device.info();
        let [binding, buffer] = [info.largest_binding_bytes, info.largest_buffer_bytes].map(|n| n.unwrap() as usize);
        if binding > 512 << 20 || buffer <= binding {
            println!("not tried: bindings of {binding} bytes, buffers of {buffer}");
            return;
        }
        // 64 bytes a row: pools of exactly the limit, and of a page more.
        let row = RowFormat::new(Codec::tq(8), 64).unwrap();
        let page = 1024;
        let pages = binding / 64 / page;
        let x = device.upload(&Rng(3).normals(64), &[1, 1, 64]).unwrap();
        for (pages, fits) in [(pages, true), (pages + 1, false)] {
            let pool = PagePool::new(device, row, 1, page, pages).unwrap();
            let last = [pages as u32 - 1];
            let batch = Batch::new(device, page, &[Span { first: 0, len: 7, new: 1, pages: &last }]).unwrap();
            let out = Guarded::new(device, DType::F32, &[1, 1, 64]);
            let mut encoder = device.encoder().unwrap();
            let recorded = quantize(&mut encoder, &[(&x, &pool)], &batch).and_then(|()| {
                let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
                dequantize(&mut encoder, &pool, &batch, 0, 6, domain, order, &out.buffer)
            });
            if fits {
                recorded.unwrap();
                encoder.submit_and_wait().unwrap();
                let want: Vec<f64> = x.read::<f32>().unwrap().iter().map(|&x| x as f64).collect();
                assert!(relative_error(&out.take(), &want) < 0.02);
            } else {
                let error = recorded.unwrap_err();
                assert!(
                    matches!(&error, Error::Unsupported { what, .. } if what.contains("max_storage_buffer_binding_size")),
                    "{error}"
                );
            }
        }
        let error = device.zeros(DType::U8, &[buffer + 1]).map(|_| ()).unwrap_err();
        assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("max_buffer_size")), "{error}");
    });
}

#[test]
fn grids_over_65535_workgroups_are_folded() {
    on_wgpu(|device| {
        // A workgroup a row joins the splits: 2100 queries of 32 heads, each of which sees itself alone.
        let (tokens, heads, d) = (2100, 32, 16);
        let row = RowFormat::new(Codec::F32, d).unwrap();
        let mut rng = Rng(4);
        let values = rng.normals(tokens * d);
        let floats = device.upload(bytemuck::cast_slice::<_, u8>(&values), &[1, 1, tokens, 4 * d]).unwrap();
        let pool = PagePool::from_buffers(row, &floats, None).unwrap();
        let q = device.upload(&rng.normals(tokens * heads * d), &[tokens, heads, d]).unwrap();
        let batch = Batch::contiguous(device, tokens, 0, tokens, tokens).unwrap();
        let out = Guarded::new(device, DType::F32, &[tokens, heads, d]);
        let params = AttentionParams { window: Some(1), ..AttentionParams::for_head_dim(d) };
        run(device, |e| attention(e, &q, &pool, &pool, &batch, &params, &out.buffer, None));
        for (i, got) in out.take().chunks(d).enumerate() {
            let want = &values[i / heads * d..][..d];
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-6 * w.abs()), "row {i}");
        }
    });
}

#[test]
fn merges_of_more_parts_than_bindings() {
    on_wgpu(|device| {
        let (n, d) = (600, 16);
        let mut rng = Rng(5);
        let parts: Vec<_> = (0..n)
            .map(|_| {
                let out = device.upload(&rng.normals(2 * d), &[1, 2, d]).unwrap();
                let lse = device.upload(&rng.normals(2), &[1, 2]).unwrap();
                (out, lse)
            })
            .collect();
        let views: Vec<_> = parts.iter().map(|(o, l)| (o, l)).collect();
        let (out, lse) = (Guarded::new(device, DType::F32, &[1, 2, d]), Guarded::new(device, DType::F32, &[1, 2]));
        run(device, |e| merge(e, &views, &out.buffer, Some(&lse.buffer)));
        let (out, lse) = (out.take(), lse.take());
        for r in 0..2 {
            let (mut total, mut sum) = (0f64, vec![0f64; d]);
            for (o, l) in &parts {
                let weight = (l.read::<f32>().unwrap()[r] as f64).exp();
                total += weight;
                let o = o.read::<f32>().unwrap();
                sum.iter_mut().zip(&o[r * d..]).for_each(|(s, x)| *s += weight * *x as f64);
            }
            sum.iter_mut().for_each(|s| *s /= total);
            assert!(relative_error(&out[r * d..][..d], &sum) < 1e-5);
            assert!((lse[r] as f64 - total.ln()).abs() < 1e-5);
        }
    });
}

/// Two such vectors meet in a word, which different workgroups write.
#[test]
fn vectors_of_an_odd_number_of_16_bit_elements() {
    on_wgpu(|device| {
        let (d, kv_heads, heads, len) = (7, 2, 4, 37);
        for (codec, dtype) in [(Codec::tq(4), DType::F16), (Codec::tq(3), DType::BF16), (Codec::F16, DType::F16)] {
            let row = RowFormat::new(codec, d).unwrap();
            let mut rng = Rng(6);
            let (k, q) = (rng.normals(len * kv_heads * d), rng.normals(len * heads * d));
            let results = [device, &Device::cpu()].map(|device| {
                let pool = PagePool::new(device, row, kv_heads, len, 1).unwrap();
                let batch = Batch::contiguous(device, len, 0, len, len).unwrap();
                let (k, q) =
                    (upload(device, dtype, &k, &[len, kv_heads, d]), upload(device, dtype, &q, &[len, heads, d]));
                let restored = Guarded::new(device, dtype, &[len, kv_heads, d]);
                let out = Guarded::new(device, dtype, &[len, heads, d]);
                let merged = Guarded::new(device, dtype, &[len, heads, d]);
                let lse = Guarded::new(device, DType::F32, &[len, heads]);
                run(device, |e| {
                    quantize(e, &[(&k, &pool)], &batch)?;
                    let order = RowOrder::TokenMajor;
                    dequantize(e, &pool, &batch, 0, 0..len, Domain::Original, order, &restored.buffer)?;
                    let params = AttentionParams::for_head_dim(d);
                    attention(e, &q, &pool, &pool, &batch, &params, &out.buffer, Some(&lse.buffer))?;
                    merge(e, &[(&out.buffer, &lse.buffer); 2], &merged.buffer, None)
                });
                assert_eq!(merged.take(), out.take(), "{codec} {dtype}");
                (pool.codes().read::<u8>().unwrap(), restored.take(), out.take())
            });
            let [(codes, restored, out), want] = results;
            assert!(codes == want.0, "{codec} {dtype}: codes");
            for (got, want) in [(restored, want.1), (out, want.2)] {
                let want: Vec<f64> = want.iter().map(|&x| x as f64).collect();
                assert!(relative_error(&got, &want) < 4e-3, "{codec} {dtype}: {:e}", relative_error(&got, &want));
            }
        }
    });
}
