//! Every operation at head dims that are no multiple of 16.

use super::*;

/// A page of 16 positions in some order, of which 37 hold random vectors, for a head_dim that is no multiple of 16.
struct Odd {
    row: RowFormat,
    batch: Batch,
    key: PagePool,
    value: PagePool,
    /// What was stored, [kv_heads][positions], in the rotated domain.
    keys: Vec<Vec<Vec<f32>>>,
    values: Vec<Vec<Vec<f32>>>,
}

const ODD_LEN: usize = 37;
const ODD_HEADS: (usize, usize) = (2, 6);

impl Odd {
    fn new(device: &Device, row: RowFormat, rng: &mut Rng) -> Odd {
        let (d, kv_heads, pages) = (row.head_dim(), ODD_HEADS.0, [2, 0, 1]);
        let span = |new| Span { first: 0, len: ODD_LEN, new, pages: &pages };
        let all = Batch::new(device, 16, &[span(ODD_LEN)]).unwrap();
        let [key, value] = [0, 1].map(|_| new_pool(device, row, kv_heads, 16, 3).unwrap());
        let [k, v] = [0, 1].map(|_| rng.normals(ODD_LEN * kv_heads * d));
        let [x, y] = [&k, &v].map(|x| device.upload(x, &[ODD_LEN, kv_heads, d]).unwrap());
        run(device, |e| quantize(e, &[(&x, &key), (&y, &value)], &all));
        let stored = |pool: &PagePool, x: &[f32]| -> Vec<Vec<Vec<f32>>> {
            let (codes, scales) = (pool_codes(pool), pool_scales(pool));
            let (mut error, mut norm) = (0.0, 0.0);
            let rows = (0..kv_heads).map(|head| {
                let row_at = |p: usize| {
                    let i = (pages[p / 16] as usize * kv_heads + head) * 16 + p % 16;
                    let (bytes, n) = (row.row_bytes(), row.scales_per_row());
                    let decoded = reference::dequantize(&row, &codes[i * bytes..][..bytes], &scales[i * n..][..n]);
                    let restored = reference::restore(&row, &decoded.iter().map(|&x| x as f64).collect::<Vec<_>>());
                    let x = &x[(p * kv_heads + head) * d..][..d];
                    error += x.iter().zip(&restored).map(|(&x, y)| (x as f64 - y).powi(2)).sum::<f64>();
                    norm += x.iter().map(|&x| (x as f64).powi(2)).sum::<f64>();
                    decoded
                };
                (0..ODD_LEN).map(row_at).collect()
            });
            let rows = rows.collect();
            // 4^-bits is below the optimal quantizer's error by a factor of 1.9 at 2 bits and 2.7 at 8.
            let most = if row.bits() >= 16 { 1e-6 } else { 4.0 * 4f64.powi(-(row.bits() as i32)) };
            assert!(error / norm < most, "{} D={d}: {} of {most}", row.codec(), error / norm);
            rows
        };
        let (keys, values) = (stored(&key, &k), stored(&value, &v));
        Odd { row, batch: Batch::new(device, 16, &[span(2)]).unwrap(), key, value, keys, values }
    }

    /// What the query of the i-th of two new tokens must give, in the model's own domain.
    fn want(&self, q: &[f32], i: usize, head: usize) -> Vec<f64> {
        let rotated: Vec<f32> = reference::rotate(&self.row, q).iter().map(|&x| x as f32).collect();
        let scale = 1.0 / (self.row.head_dim() as f64).sqrt();
        let query = reference::Query { q: &rotated, scale: scale as f32 as f64, softcap: None, sink: None };
        let (seen, kv_head) = (ODD_LEN - 1 + i, head / (ODD_HEADS.1 / ODD_HEADS.0));
        let [k, v] = [&self.keys, &self.values]
            .map(|all| -> Vec<&[f32]> { all[kv_head][..seen].iter().map(Vec::as_slice).collect() });
        let (out, _) = reference::attention(&query, &k, &v);
        reference::restore(&self.row, &out)
    }
}

pub fn head_dims_that_are_no_multiple_of_16(device: &Device) {
    let mut rng = Rng(11);
    for d in [8, 20, 100] {
        for codec in codecs(d) {
            let row = RowFormat::new(codec, d).unwrap();
            let (odd, w, (kv_heads, heads)) = (Odd::new(device, row, &mut rng), row.row_dim(), ODD_HEADS);
            let [rotated, restored] = [w, d].map(|n| Guarded::new(device, DType::F32, &[kv_heads, ODD_LEN, n]));
            run(device, |e| {
                for (domain, out) in [(Domain::Rotated, &rotated), (Domain::Original, &restored)] {
                    let order = RowOrder::HeadMajor;
                    dequantize(e, &odd.key, &odd.batch, 0, 0..ODD_LEN, domain, order, &out.buffer)?;
                }
                Ok(())
            });
            let (rotated, restored) = (rotated.take(), restored.take());
            for (i, want) in odd.keys.iter().flatten().enumerate() {
                assert_eq!(&rotated[i * w..][..w], want, "{codec} D={d} row {i}");
                let want = reference::restore(&row, &want.iter().map(|&x| x as f64).collect::<Vec<_>>());
                assert!(relative_error(&restored[i * d..][..d], &want) < 1e-6, "{codec} D={d} row {i} restored");
            }
            for dtype in FLOATS {
                let q: Vec<f32> = rng.normals(2 * heads * d).iter().map(|&x| rounded(dtype, x)).collect();
                let input = upload(device, dtype, &q, &[2, heads, d]);
                let [out, back] = [0, 1].map(|_| Guarded::new(device, DType::F32, &[2, heads, d]));
                let [turned, turned_out] = [0, 1].map(|_| Guarded::new(device, DType::F32, &[2, heads, w]));
                let params = AttentionParams::for_head_dim(d);
                let in_rotated = AttentionParams { domain: Domain::Rotated, ..params.clone() };
                run(device, |e| {
                    let (key, value, batch) = (&odd.key, &odd.value, &odd.batch);
                    attention(e, &input, key, value, batch, &params, &out.buffer, None)?;
                    rotate(e, &row, Direction::Forward, &input, &turned.buffer)?;
                    attention(e, &turned.buffer, key, value, batch, &in_rotated, &turned_out.buffer, None)?;
                    rotate(e, &row, Direction::Inverse, &turned_out.buffer, &back.buffer)
                });
                turned.take();
                for (name, out, q_dtype) in [("", out.take(), dtype), ("rotated", back.take(), DType::F32)] {
                    for (j, q) in q.chunks(d).enumerate() {
                        let want = odd.want(q, j / heads, j % heads);
                        let error = relative_error(&out[j * d..][..d], &want);
                        let most = attention_tolerance(device, q_dtype, DType::F32);
                        assert!(error <= most, "{codec} D={d} {dtype} {name} query {j}: {error:e}");
                    }
                }
            }
        }
    }
}
