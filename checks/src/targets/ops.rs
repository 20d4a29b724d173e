//! Operations with any shapes, strides and page tables: refused, or what the reference says, and no byte written elsewhere.

use crate::support::{Guarded, Rng, relative_error, rounded};
use arbitrary::{Result, Unstructured};
use std::any::Any;
use tqkv::format::RowFormat;
use tqkv::ops::*;
use tqkv::{Buffer, Codec, DType, Device, reference};

/// Bytes of a pool's memory at most.
const LARGEST: usize = 1 << 16;

pub fn run(bytes: &[u8]) {
    // Bytes that are at their end say nothing more.
    let _ = case(&mut Unstructured::new(bytes), super::cpu());
}

pub fn seeds() -> Vec<Vec<u8>> {
    (0..20).map(|i| Rng(i).bytes(60 + 10 * i as usize)).collect()
}

fn codec(u: &mut Unstructured) -> Result<Codec> {
    Ok(match u.int_in_range(0..=11)? {
        0 => Codec::F32,
        1 => Codec::F16,
        2 => Codec::seed(u.int_in_range(2..=9)?),
        3 => Codec::tq(u.arbitrary()?),
        n => Codec::tq(n - 2),
    })
}

/// Mostly some small number, now and then any.
fn number(u: &mut Unstructured, most: usize) -> Result<usize> {
    Ok(match u.int_in_range(0..=31)? {
        31 => u.arbitrary::<usize>()?,
        30 => 0,
        _ => u.int_in_range(0..=most)?,
    })
}

/// As [`number`], but rarely 0.
fn size(u: &mut Unstructured, most: usize) -> Result<usize> {
    Ok(match u.int_in_range(0..=63)? {
        63 => number(u, most)?,
        n => 1 + n % most,
    })
}

/// A pool, and a view of all its memory.
struct Pool {
    pool: PagePool,
    memory: Buffer,
    codes_at: usize,
    scales_at: usize,
}

/// In memory that ends where it should, of strides that may not go together.
fn pool(u: &mut Unstructured, device: &Device, row: RowFormat, shape: [usize; 3]) -> Result<Option<Pool>> {
    let [_, kv_heads, page_size] = shape;
    let (codes, scales) = (row.row_bytes(), row.scale_bytes());
    let whole = (codes.next_multiple_of(4) + scales).next_multiple_of(4);
    let (pages_of, row_of) = (kv_heads.saturating_mul(page_size), u.int_in_range(0..=3)? * 4);
    let (mut of_codes, mut of_scales, mut scales_at) = match u.int_in_range(0..=3)? {
        0 => {
            let dense = |bytes| Strides::dense(kv_heads.min(99), page_size.min(99), bytes);
            let all = shape.iter().fold(codes, |product, &n| product.saturating_mul(n));
            (dense(codes), dense(scales), all.min(LARGEST).next_multiple_of(4))
        }
        1 => {
            let bytes = whole + row_of;
            let by_position = Strides { page: pages_of.min(999) * bytes, head: bytes, row: kv_heads.min(99) * bytes };
            (by_position, by_position, codes.next_multiple_of(4))
        }
        2 => {
            let bytes = whole + row_of;
            let apart = Strides { page: page_size.min(99) * bytes, head: 4 * page_size.min(99) * bytes, row: bytes };
            (apart, apart, codes.next_multiple_of(4))
        }
        _ => {
            let any = |u: &mut Unstructured| {
                Ok::<_, arbitrary::Error>(Strides {
                    page: number(u, 4000)?,
                    head: number(u, 900)?,
                    row: number(u, 300)?,
                })
            };
            (any(u)?, any(u)?, number(u, 999)?)
        }
    };
    // One of them is off now and then.
    match u.int_in_range(0..=15)? {
        0 => of_codes.page = number(u, 9999)?,
        1 => of_scales.row = number(u, 99)?,
        2 => scales_at = number(u, 9999)?,
        _ => {}
    }
    let codes_at = if u.ratio(1, 4)? { u.int_in_range(0..=9)? } else { 0 };
    let bytes = match u.int_in_range(0..=9)? {
        0 => number(u, LARGEST)?,
        _ => LARGEST,
    };
    let bytes = bytes.min(LARGEST);
    let memory = borrowed(device, bytes);
    let view = |at: usize| memory.slice(at.min(bytes)..bytes).expect("within");
    let scales = (row.scales_per_row() > 0).then(|| view(scales_at));
    let made = PagePool::strided(row, shape, (&view(codes_at), of_codes), scales.as_ref().map(|s| (s, of_scales)));
    let made = if u.ratio(1, 8)? {
        PagePool::new(device, row, kv_heads.min(5), page_size.min(40), shape[0].min(6))
    } else {
        made
    };
    Ok(match made {
        Ok(pool) if pool.codes().shares_memory(&memory) => Some(Pool { pool, memory, codes_at, scales_at }),
        Ok(pool) => Some(Pool { memory: pool.codes().clone(), pool, codes_at: 0, scales_at: usize::MAX }),
        Err(error) => {
            drop(error.to_string());
            None
        }
    })
}

/// Bytes of garbage that nothing follows.
fn borrowed(device: &Device, bytes: usize) -> Buffer {
    let mut words: Vec<u32> = vec![0x3c3c_3c3c; bytes.div_ceil(4).max(1)];
    let start = words.as_mut_ptr().cast::<u8>();
    let owner: Box<dyn Any + Send + Sync> = Box::new(words);
    // SAFETY: the vector has as many bytes, and goes with the buffer; nobody else looks at it.
    unsafe { Buffer::from_host_ptr(device, start, DType::U8, &[bytes], owner) }.expect("memory of the host")
}

impl Pool {
    /// Codes and scales of a row, where the pool lies in borrowed memory or is dense.
    fn row(&self, bytes: &[u8], page: usize, head: usize, slot: usize) -> Vec<f32> {
        let (row, (codes, scales)) = (self.pool.row(), self.pool.strides());
        let at = |s: Strides| page * s.page + head * s.head + slot * s.row;
        let code = &bytes[self.codes_at + at(codes)..][..row.row_bytes()];
        let own: Vec<u8>;
        let scale = match self.pool.scales() {
            Some(buffer) if self.scales_at == usize::MAX => {
                let mut all = vec![0; buffer.bytes()];
                buffer.read_bytes(&mut all).expect("a buffer at rest");
                own = all[at(scales)..][..row.scale_bytes()].to_vec();
                &own[..]
            }
            Some(_) => &bytes[self.scales_at + at(scales)..][..row.scale_bytes()],
            None => &[],
        };
        let scale: Vec<f32> = match row.scale_dtype() {
            DType::F16 => scale.chunks(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            _ => scale.chunks(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        };
        reference::dequantize(row, code, &scale)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.memory.bytes()];
        self.memory.read_bytes(&mut bytes).expect("a buffer at rest");
        bytes
    }

    /// Which bytes of the memory are rows.
    fn is_row(&self) -> Vec<bool> {
        let mut all = vec![self.scales_at == usize::MAX; self.memory.bytes()];
        let (row, (codes, scales)) = (self.pool.row(), self.pool.strides());
        for page in 0..self.pool.pages() {
            for head in 0..self.pool.kv_heads() {
                for slot in 0..self.pool.page_size() {
                    let at = |s: Strides| page * s.page + head * s.head + slot * s.row;
                    all[self.codes_at + at(codes)..][..row.row_bytes()].fill(true);
                    if self.scales_at != usize::MAX && row.scale_bytes() > 0 {
                        all[self.scales_at + at(scales)..][..row.scale_bytes()].fill(true);
                    }
                }
            }
        }
        all
    }
}

/// A sequence: first, len, new, pages.
type OwnSpan = (usize, usize, usize, Vec<u32>);

fn spans(u: &mut Unstructured, page_size: usize, pages: usize) -> Result<Vec<OwnSpan>> {
    let n = u.int_in_range(0..=9)? % 4;
    let mut order: Vec<u32> = (0..pages.min(64) as u32).collect();
    let mut spans = vec![];
    for _ in 0..n.max(1) {
        let mut own = vec![];
        for _ in 0..u.int_in_range(0..=4)? {
            own.push(match u.int_in_range(0..=19)? {
                0 => NO_PAGE,
                1 => u.arbitrary()?,
                2 => u.int_in_range(0..=7)?,
                _ if order.is_empty() => 0,
                _ => order.swap_remove(u.choose_index(order.len())?),
            });
        }
        let slots = own.len().saturating_mul(page_size);
        let len = if u.ratio(1, 6)? { number(u, 300)? } else { number(u, slots.min(300))? };
        let first = if u.ratio(1, 3)? { number(u, len.min(300))? } else { 0 };
        let new = number(u, len.saturating_sub(first).min(40))?;
        spans.push((first, len, new, own));
    }
    Ok(spans)
}

fn case(u: &mut Unstructured, device: &Device) -> Result<()> {
    let head_dim = match u.int_in_range(0..=7)? {
        0 => number(u, 300)?,
        n => [16, 32, 48, 64, 80, 112, 128][n - 1],
    };
    let shape = [size(u, 5)?, size(u, 3)?, size(u, 18)?];
    let mut sides = vec![];
    for _ in 0..2 {
        let Ok(row) = RowFormat::new(codec(u)?, head_dim) else { return Ok(()) };
        let Some(pool) = pool(u, device, row, shape)? else { return Ok(()) };
        sides.push(pool);
    }
    let [page_size, pages] = [sides[0].pool.page_size(), sides[0].pool.pages()];
    let own = spans(u, page_size, pages)?;
    let given: Vec<Span> =
        own.iter().map(|(first, len, new, pages)| Span { first: *first, len: *len, new: *new, pages }).collect();
    let batch = match Batch::new(device, page_size, &given) {
        Ok(batch) => batch,
        Err(error) => {
            drop(error.to_string());
            return Ok(());
        }
    };
    assert_eq!(batch.tokens(), own.iter().map(|s| s.2).sum::<usize>());
    fill(device, &sides);
    write(u, device, &sides, &batch)?;
    read(u, device, &sides[0], &batch, &own)?;
    attend(u, device, &sides, &batch, &own)
}

/// Sane rows everywhere.
fn fill(device: &Device, sides: &[Pool]) {
    for Pool { pool, .. } in sides {
        let [n, kv_heads, d] = [pool.pages() * pool.page_size(), pool.kv_heads(), pool.row().head_dim()];
        let all: Vec<u32> = (0..pool.pages() as u32).collect();
        let whole = Batch::new(device, pool.page_size(), &[Span { first: 0, len: n, new: n, pages: &all }]);
        let x = device.upload(&Rng(7).normals(n * kv_heads * d), &[n, kv_heads, d]).expect("a buffer");
        let mut encoder = device.encoder().expect("an encoder");
        quantize(&mut encoder, &[(&x, pool)], &whole.expect("all pages")).expect("a whole pool");
        encoder.submit_and_wait().expect("recorded work runs");
    }
}

/// New rows are written, all others and everything between stay.
fn write(u: &mut Unstructured, device: &Device, sides: &[Pool], batch: &Batch) -> Result<()> {
    let Pool { pool, .. } = &sides[0];
    let n = if u.ratio(1, 12)? { number(u, 50)?.min(500) } else { batch.tokens() };
    let [kv_heads, d] = [pool.kv_heads(), pool.row().head_dim()];
    let x = device.upload(&Rng(n as u64).normals(n * kv_heads * d), &[n, kv_heads, d]).expect("a buffer");
    let before: Vec<_> = sides.iter().map(Pool::bytes).collect();
    let mut encoder = device.encoder().expect("an encoder");
    let parts: Vec<_> = sides.iter().map(|side| (&x, &side.pool)).collect();
    let result = quantize(&mut encoder, &parts, batch);
    encoder.submit_and_wait().expect("recorded work runs");
    for (side, before) in sides.iter().zip(before) {
        let after = side.bytes();
        if result.is_err() {
            assert!(before == after, "written in spite of {result:?}");
        }
        let is_row = side.is_row();
        assert!((0..after.len()).all(|i| is_row[i] || before[i] == after[i]), "written between rows");
    }
    Ok(())
}

fn locate(span: &OwnSpan, page_size: usize, position: usize) -> (usize, usize) {
    let slot = position % (span.3.len() * page_size);
    (span.3[slot / page_size] as usize, slot % page_size)
}

/// Positions decode to the bit.
fn read(u: &mut Unstructured, device: &Device, side: &Pool, batch: &Batch, own: &[OwnSpan]) -> Result<()> {
    let (sequence, pool) = (number(u, own.len())?, &side.pool);
    let positions: Vec<u32> = (0..u.int_in_range(0..=5)?).map(|_| Ok(number(u, 40)? as u32)).collect::<Result<_>>()?;
    let [n, kv_heads, d] = [positions.len(), pool.kv_heads(), pool.row().row_dim()];
    let out = Guarded::new(device, DType::F32, &[n, kv_heads, d]);
    let mut encoder = device.encoder().expect("an encoder");
    let (list, order) = (Positions::List(positions.clone()), RowOrder::TokenMajor);
    let result = dequantize(&mut encoder, pool, batch, sequence, list, Domain::Rotated, order, &out.buffer);
    encoder.submit_and_wait().expect("recorded work runs");
    let got = out.take();
    let held = own.get(sequence).map(|s| s.0..s.1);
    let valid = held.is_some_and(|held| positions.iter().all(|&p| held.contains(&(p as usize))));
    assert!(result.is_err() || valid, "{positions:?} decoded");
    if result.is_ok() {
        let bytes = side.bytes();
        for (row, &position) in got.chunks(kv_heads * d).zip(&positions) {
            let (page, slot) = locate(&own[sequence], pool.page_size(), position as usize);
            for (head, got) in row.chunks(d).enumerate() {
                let want = side.row(&bytes, page, head, slot);
                assert!(got.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "position {position}");
            }
        }
    }
    Ok(())
}

/// Attention is close to the reference.
fn attend(u: &mut Unstructured, device: &Device, sides: &[Pool], batch: &Batch, own: &[OwnSpan]) -> Result<()> {
    let (key, value) = (&sides[0], &sides[1]);
    let [kv_heads, d, n] = [key.pool.kv_heads(), key.pool.row().head_dim(), batch.tokens()];
    let group = u.int_in_range(1..=5)?;
    let heads = if u.ratio(1, 16)? { number(u, 20)?.min(40) } else { kv_heads * group };
    let mut params = AttentionParams::for_head_dim(d);
    params.causal = u.ratio(3, 4)?;
    params.window = if u.ratio(1, 3)? { Some(number(u, 20)?) } else { None };
    params.softcap = if u.ratio(1, 5)? { Some(u.int_in_range(0..=50)? as f32) } else { None };
    let dtype = [DType::F32, DType::F16, DType::BF16][u.int_in_range(0..=5)? % 3];
    let q: Vec<f32> = Rng(5).normals(n * heads * d).into_iter().map(|x| rounded(dtype, x)).collect();
    let input = crate::support::upload(device, dtype, &q, &[n, heads, d]);
    let (out, lse) = (Guarded::new(device, DType::F32, &[n, heads, d]), Guarded::new(device, DType::F32, &[n, heads]));
    let mut encoder = device.encoder().expect("an encoder");
    let result =
        attention(&mut encoder, &input, &key.pool, &value.pool, batch, &params, &out.buffer, Some(&lse.buffer));
    encoder.submit_and_wait().expect("recorded work runs");
    let (out, lse) = (out.take(), lse.take());
    if let Err(error) = result {
        drop(error.to_string());
        assert!(out.iter().chain(&lse).all(|x| x.is_nan()), "written in spite of {error}");
        return Ok(());
    }
    let (keys, values) = (key.bytes(), value.bytes());
    let queries = own.iter().flat_map(|span| (span.1 - span.2..span.1).map(move |p| (span, p)));
    for (token, (span, position)) in queries.enumerate() {
        let start = params.window.map_or(span.0, |w| span.0.max((position + 1).saturating_sub(w)));
        let end = if params.causal { position + 1 } else { span.1 };
        for head in 0..heads {
            let rows = |side: &Pool, bytes: &[u8]| -> Vec<Vec<f32>> {
                let at = (start..end.max(start)).map(|p| locate(span, key.pool.page_size(), p));
                at.map(|(page, slot)| side.row(bytes, page, head * kv_heads / heads, slot)).collect()
            };
            let (k, v) = (rows(key, &keys), rows(value, &values));
            let r = token * heads + head;
            let rotated: Vec<f32> =
                reference::rotate(key.pool.row(), &q[r * d..][..d]).iter().map(|&x| x as f32).collect();
            let softcap = params.softcap.map(f64::from);
            let query = reference::Query { q: &rotated, scale: params.scale.into(), softcap, sink: None };
            let [k, v] = [&k, &v].map(|rows| rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let (want, want_lse) = reference::attention(&query, &k, &v);
            let want = reference::restore(value.pool.row(), &want);
            let tolerance = crate::tolerance(device, dtype, &query, &k);
            let error = relative_error(&out[r * d..][..d], &want);
            assert!(error <= tolerance, "position {position} head {head}: {error:e}");
            let log = f64::from(lse[r]);
            let close = log == want_lse || (log - want_lse).abs() <= tolerance * want_lse.abs().max(1.0);
            assert!(close, "position {position} head {head}: lse {log} {want_lse}");
        }
    }
    Ok(())
}
