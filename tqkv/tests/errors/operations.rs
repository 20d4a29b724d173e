//! Arguments of operations.

use super::*;

#[test]
fn quantizing() {
    let s = Scene::new();
    let x = s.zeros(&[3, KV_HEADS, D]);
    let batch = s.plain(5, 3);
    s.fails(zero("parts"), |e| quantize(e, &[], &batch));
    for bad in [[2, KV_HEADS, D], [3, 1, D], [3, KV_HEADS, 32], [3, 0, D]] {
        let x = s.zeros(&bad);
        s.fails(shape("x", &bad, "[3, 2, 64]"), |e| quantize(e, &[(&x, &s.key)], &batch));
    }
    let codes = s.device.zeros(DType::U8, &[3, KV_HEADS, D]).unwrap();
    let want = Error::DType { what: "x", got: "u8", expected: "f32, f16 or bf16" };
    s.fails(want, |e| quantize(e, &[(&codes, &s.key)], &batch));

    let other = Device::cpu_with_threads(1).unwrap();
    let wrong = |what| Error::WrongDevice { what, got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    let far = other.zeros(DType::F32, &[3, KV_HEADS, D]).unwrap();
    s.fails(wrong("x"), |e| quantize(e, &[(&far, &s.key)], &batch));
    let far = PagePool::new(&other, row(), KV_HEADS, PAGE, PAGES).unwrap();
    s.fails(wrong("pool"), |e| quantize(e, &[(&x, &far)], &batch));
    let far = Batch::new(&other, PAGE, &[Span { first: 0, len: 3, new: 3, pages: &[0] }]).unwrap();
    s.fails(wrong("batch"), |e| quantize(e, &[(&x, &s.key)], &far));

    let wide = Batch::new(&s.device, 16, &[Span { first: 0, len: 3, new: 3, pages: &[0] }]).unwrap();
    let want = mismatch("page_size of the batch", 16, "8 as in the pool");
    s.fails(want, |e| quantize(e, &[(&x, &s.key)], &wide));
    for page in [PAGES as u32, u32::MAX - 1] {
        let past = s.batch(&[Span { first: 0, len: 3, new: 3, pages: &[page] }]).unwrap();
        s.fails(Error::Page { got: page as usize, pages: PAGES }, |e| quantize(e, &[(&x, &s.key)], &past));
    }

    // The same page in two sequences, and twice in one table.
    let aliased = Error::Aliased { what: "a page that is written from two places" };
    let span = |len, new| Span { first: 0, len, new, pages: &[1] };
    let two = s.batch(&[span(1, 1), span(3, 2)]).unwrap();
    s.fails(aliased.clone(), |e| quantize(e, &[(&x, &s.key)], &two));
    let twice = s.batch(&[Span { first: 0, len: 9, new: 3, pages: &[2, 2] }]).unwrap();
    s.fails(aliased, |e| quantize(e, &[(&x, &s.key)], &twice));

    // One pool twice, and an input that lies in a pool's scales.
    let aliased = Error::Aliased { what: "pool" };
    s.fails(aliased.clone(), |e| quantize(e, &[(&x, &s.key), (&x, &s.key)], &batch));
    let memory = s.device.zeros(DType::F16, &[32]).unwrap();
    let scales = memory.slice(0..2).unwrap().reshape(&[1, 1, 2, 1]).unwrap();
    let codes = s.device.zeros(DType::U8, &[1, 1, 2, 4]).unwrap();
    let pool = PagePool::from_buffers(RowFormat::new(Codec::tq(2), 16).unwrap(), &codes, Some(&scales)).unwrap();
    let x = memory.slice(1..17).unwrap().reshape(&[1, 1, 16]).unwrap();
    let one = Batch::contiguous(&s.device, 2, 0, 1, 1).unwrap();
    s.fails(aliased, |e| quantize(e, &[(&x, &pool)], &one));
    // Beside them it may lie.
    let x = memory.slice(16..32).unwrap().reshape(&[1, 1, 16]).unwrap();
    let mut encoder = s.device.encoder().unwrap();
    quantize(&mut encoder, &[(&x, &pool)], &one).unwrap();
    encoder.submit_and_wait().unwrap();
}

#[test]
fn dequantizing() {
    let s = Scene::new();
    let batch = s.batch(&[Span { first: 2, len: 12, new: 0, pages: &[0, 1] }]).unwrap();
    let out = s.zeros(&[1, KV_HEADS, D]);
    let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
    let at = |positions: Positions, out: &Buffer, want: Error| {
        s.fails(want, |e| dequantize(e, &s.key, &batch, 0, positions, domain, order, out));
    };
    let positions = |start, end| Error::Positions { start, end, first: 2, len: 12 };
    at(Positions::from(12), &out, positions(12, 13));
    at(Positions::from(1), &out, positions(1, 2));
    at(Positions::from(11..13), &out, positions(11, 13));
    at(Positions::from(0..usize::MAX), &out, positions(0, usize::MAX));
    at(Positions::List(vec![5, 12]), &out, positions(12, 13));
    at(Positions::List(vec![u32::MAX]), &out, positions(u32::MAX as usize, 1 << 32));
    at(Positions::from(3..5), &out, shape("out", &[1, 2, 64], "[2, 2, 64]"));
    let bytes = s.device.zeros(DType::U8, &[1, KV_HEADS, D]).unwrap();
    at(Positions::from(3), &bytes, Error::DType { what: "out", got: "u8", expected: "f32, f16 or bf16" });
    let far = Device::cpu_with_threads(1).unwrap().zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    let wrong = Error::WrongDevice { what: "out", got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    at(Positions::from(3), &far, wrong);
    s.fails(mismatch("sequence", 1, "less than the batch's 1"), |e| {
        dequantize(e, &s.key, &batch, 1, 3, domain, order, &out)
    });
    let head_major = s.zeros(&[2, KV_HEADS, D]);
    s.fails(shape("out", &[2, 2, 64], "[2, 3, 64]"), |e| {
        dequantize(e, &s.key, &batch, 0, 3..6, domain, RowOrder::HeadMajor, &head_major)
    });
    let past = s.batch(&[Span { first: 0, len: 3, new: 0, pages: &[7] }]).unwrap();
    s.fails(Error::Page { got: 7, pages: PAGES }, |e| dequantize(e, &s.key, &past, 0, 1, domain, order, &out));
    // Into its own scales.
    let scales = s.key.scales().unwrap().reshape(&[PAGES * KV_HEADS * PAGE]).unwrap();
    let small = PagePool::from_buffers(
        RowFormat::new(Codec::tq(2), 16).unwrap(),
        &s.device.zeros(DType::U8, &[1, 1, 2, 4]).unwrap(),
        Some(&scales.slice(0..2).unwrap().reshape(&[1, 1, 2, 1]).unwrap()),
    )
    .unwrap();
    let two = Batch::contiguous(&s.device, 2, 0, 2, 0).unwrap();
    let inside = scales.slice(1..17).unwrap().reshape(&[1, 1, 16]).unwrap();
    s.fails(Error::Aliased { what: "out" }, |e| dequantize(e, &small, &two, 0, 0, domain, order, &inside));
    assert!(out.read::<f32>().unwrap().iter().all(|&x| x == 0.0));
}

#[test]
fn attending() {
    let s = Scene::new();
    let (batch, params) = (s.plain(5, 3), AttentionParams::for_head_dim(D));
    let poison = |shape: &[usize]| upload(&s.device, DType::F32, &vec![f32::NAN; shape.iter().product()], shape);
    let (q, out, lse) = (s.zeros(&[3, HEADS, D]), poison(&[3, HEADS, D]), poison(&[3, HEADS]));
    let fails = |want, q: &Buffer, out: &Buffer, lse: Option<&Buffer>, params: &AttentionParams| {
        s.fails(want, |e| attention(e, q, &s.key, &s.value, &batch, params, out, lse));
    };
    let flat = q.reshape(&[3 * HEADS, D]).unwrap();
    fails(shape("q", &[12, 64], "[3, heads, 64]"), &flat, &out, None, &params);
    let two = s.zeros(&[2, HEADS, D]);
    fails(shape("q", &[2, 4, 64], "[3, 4, 64]"), &two, &out, None, &params);
    fails(shape("out", &[2, 4, 64], "[3, 4, 64]"), &q, &two, None, &params);
    let none = s.zeros(&[3, 0, D]);
    fails(zero("heads"), &none, &none, None, &params);
    let (three, three_out) = (s.zeros(&[3, 3, D]), s.zeros(&[3, 3, D]));
    fails(mismatch("heads", 3, "a multiple of kv_heads 2"), &three, &three_out, None, &params);
    let bytes = s.device.zeros(DType::U8, &[3, HEADS, D]).unwrap();
    let dtype = |what, got: DType, expected| Error::DType { what, got: got.name(), expected };
    fails(dtype("q", DType::U8, "f32, f16 or bf16"), &bytes, &out, None, &params);
    fails(dtype("out", DType::U8, "f32, f16 or bf16"), &q, &bytes, None, &params);
    let half = s.device.zeros(DType::F16, &[3, HEADS]).unwrap();
    fails(dtype("lse", DType::F16, "f32"), &q, &out, Some(&half), &params);
    fails(shape("lse", &[2, 4, 64], "[3, 4]"), &q, &out, Some(&two), &params);
    fails(Error::Aliased { what: "out" }, &q, &q, None, &params);
    let within = q.reshape(&[3 * HEADS * D]).unwrap().slice(0..3 * HEADS).unwrap().reshape(&[3, HEADS]).unwrap();
    fails(Error::Aliased { what: "lse" }, &q, &out, Some(&within), &params);
    let far = Device::cpu_with_threads(1).unwrap();
    let wrong = |what| Error::WrongDevice { what, got: "another device (cpu)".to_owned(), expected: "cpu".to_owned() };
    let far_q = far.zeros(DType::F32, &[3, HEADS, D]).unwrap();
    fails(wrong("q"), &far_q, &out, None, &params);
    fails(wrong("out"), &q, &far_q, None, &params);
    fails(wrong("lse"), &q, &out, Some(&far.zeros(DType::F32, &[3, HEADS]).unwrap()), &params);
    let with = |change: fn(&mut AttentionParams)| {
        let mut params = params.clone();
        change(&mut params);
        params
    };
    let parameter = |name, got, expected| Error::Parameter { name, got, expected };
    let bad = with(|p| p.scale = f32::INFINITY);
    fails(parameter("scale", f32::INFINITY, "finite"), &q, &out, None, &bad);
    for cap in [0.0, -1.0, f32::INFINITY] {
        let bad = AttentionParams { softcap: Some(cap), ..params.clone() };
        fails(parameter("softcap", cap, "finite and positive"), &q, &out, None, &bad);
    }
    fails(zero("window"), &q, &out, None, &with(|p| p.window = Some(0)));
    let sinks = |buffer: Buffer| AttentionParams { sink_logits: Some(buffer), ..params.clone() };
    fails(shape("sink_logits", &[3], "[4]"), &q, &out, None, &sinks(s.zeros(&[3])));
    let halves = s.device.zeros(DType::F16, &[HEADS]).unwrap();
    fails(dtype("sink_logits", DType::F16, "f32"), &q, &out, None, &sinks(halves));
    fails(wrong("sink_logits"), &q, &out, None, &sinks(far.zeros(DType::F32, &[HEADS]).unwrap()));
    let of_out = out.reshape(&[3 * HEADS * D]).unwrap().slice(0..HEADS).unwrap();
    fails(Error::Aliased { what: "out" }, &q, &out, None, &sinks(of_out));

    let pool = |codec, d, kv_heads| {
        PagePool::new(&s.device, RowFormat::new(codec, d).unwrap(), kv_heads, PAGE, PAGES).unwrap()
    };
    let value = |want, value: &PagePool| {
        s.fails(want, |e| attention(e, &q, &s.key, value, &batch, &params, &out, None));
    };
    value(mismatch("head_dim of the values", 128, "64 as in the keys"), &pool(Codec::tq(4), 128, KV_HEADS));
    value(mismatch("kv_heads of the values", 1, "2 as in the keys"), &pool(Codec::tq(4), D, 1));
    let few = PagePool::new(&s.device, row(), KV_HEADS, PAGE, 1).unwrap();
    let both = s.batch(&[Span { first: 0, len: 10, new: 3, pages: &[0, 1] }]).unwrap();
    s.fails(Error::Page { got: 1, pages: 1 }, |e| attention(e, &q, &few, &s.value, &both, &params, &out, None));
    assert!(out.read::<f32>().unwrap().iter().chain(&lse.read::<f32>().unwrap()).all(|x| x.is_nan()));
}

#[test]
fn rotating_merging_copying() {
    let s = Scene::new();
    let x = s.zeros(&[2, D]);
    let go = |row: &RowFormat, x: &Buffer, out: &Buffer, want| {
        s.fails(want, |e| rotate(e, row, Direction::Forward, x, out));
    };
    let wide = RowFormat::new(Codec::tq(4), 80).unwrap();
    go(&wide, &x, &x, shape("x", &[2, 64], "[..., 80]"));
    go(&row(), &x, &s.zeros(&[3, D]), shape("out", &[3, 64], "[2, 64]"));
    let u32s = s.device.zeros(DType::U32, &[2, D]).unwrap();
    go(&row(), &u32s, &x, Error::DType { what: "x", got: "u32", expected: "f32, f16 or bf16" });
    let three = s.zeros(&[3, D]);
    let overlapping = Error::Aliased { what: "out" };
    go(&row(), &three.slice(0..2).unwrap(), &three.slice(1..3).unwrap(), overlapping);

    let (o, l) = (s.zeros(&[2, HEADS, D]), s.zeros(&[2, HEADS]));
    let out = s.zeros(&[2, HEADS, D]);
    s.fails(zero("parts"), |e| merge(e, &[], &out, None));
    s.fails(shape("out", &[2, 64], "[tokens, heads, head_dim]"), |e| merge(e, &[(&o, &l)], &x, None));
    s.fails(shape("part", &[2, 64], "[2, 4, 64]"), |e| merge(e, &[(&x, &l)], &out, None));
    s.fails(shape("lse of a part", &[2, 64], "[2, 4]"), |e| merge(e, &[(&o, &x)], &out, None));
    s.fails(Error::Aliased { what: "out" }, |e| merge(e, &[(&out, &l)], &out, None));
    s.fails(Error::Aliased { what: "lse" }, |e| merge(e, &[(&o, &l)], &out, Some(&l)));
    let half = s.device.zeros(DType::F16, &[2, HEADS]).unwrap();
    let want = Error::DType { what: "lse of a part", got: "f16", expected: "f32" };
    s.fails(want, |e| merge(e, &[(&o, &half)], &out, None));

    s.fails(shape("to", &[3, 64], "[2, 64]"), |e| copy(e, &x, &three));
    let want = Error::DType { what: "to", got: "u32", expected: "the type that is copied" };
    s.fails(want, |e| copy(e, &x, &u32s));
    s.fails(Error::Aliased { what: "to" }, |e| copy(e, &three.slice(0..2).unwrap(), &three.slice(1..3).unwrap()));
    let bytes = s.device.zeros(DType::U8, &[16]).unwrap();
    let (a, b) = (bytes.slice(1..5).unwrap(), bytes.slice(8..12).unwrap());
    s.fails(mismatch("offset of from", 1, "a multiple of 4"), |e| copy(e, &a, &b));
    s.fails(mismatch("offset of to", 1, "a multiple of 4"), |e| copy(e, &b, &a));
    let three = bytes.slice(0..3).unwrap();
    s.fails(mismatch("bytes copied", 3, "a multiple of 4"), |e| copy(e, &three, &bytes.slice(4..7).unwrap()));
}

/// What is not finite is stored as code 0 and scale NaN, decodes to NaN, and spoils attention that sees it, but no other.
#[test]
fn numbers_that_are_not_finite() {
    let device = Device::cpu();
    for codec in (2..=8).map(Codec::tq).chain([2, 3, 4, 5, 6, 8].map(Codec::seed)) {
        for d in [64, 256, 512] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
                let row = RowFormat::new(codec, d).unwrap();
                let mut x = Rng(9).normals(3 * d);
                x[d + 5] = bad;
                let pool = PagePool::new(&device, row, 1, 3, 1).unwrap();
                let batch = Batch::contiguous(&device, 3, 0, 3, 3).unwrap();
                let input = device.upload(&x, &[3, 1, d]).unwrap();
                let out = device.zeros(DType::F32, &[3, 1, d]).unwrap();
                let (q, attended) = (device.upload(&x[..d], &[1, 1, d]).unwrap(), device.zeros(DType::F32, &[1, 1, d]));
                let attended = attended.unwrap();
                let params = AttentionParams::for_head_dim(d);
                let newest = Batch::contiguous(&device, 3, 0, 3, 1).unwrap();
                run(&device, |e| {
                    quantize(e, &[(&input, &pool)], &batch)?;
                    dequantize(e, &pool, &batch, 0, 0..3, Domain::Original, RowOrder::TokenMajor, &out)?;
                    attention(e, &q, &pool, &pool, &newest, &params, &attended, None)
                });
                let codes = pool.codes().read::<u8>().unwrap();
                assert!(codes[row.row_bytes()..2 * row.row_bytes()].iter().all(|&c| c == 0), "{codec} {d} {bad}");
                let scales = download(pool.scales().unwrap());
                let n = row.scales_per_row();
                assert!(scales[n..2 * n].iter().all(|s| s.is_nan()));
                assert!(scales[..n].iter().chain(&scales[2 * n..]).all(|s| s.is_finite()));
                let out = out.read::<f32>().unwrap();
                assert!(out[d..2 * d].iter().all(|x| x.is_nan()), "{codec} {d} {bad}");
                assert!(out[..d].iter().chain(&out[2 * d..]).all(|x| x.is_finite()));
                assert!(attended.read::<f32>().unwrap().iter().all(|x| x.is_nan()), "{codec} {d} {bad}");
                // A window that does not reach it is not touched by it.
                let window = AttentionParams { window: Some(1), ..params };
                run(&device, |e| attention(e, &q, &pool, &pool, &newest, &window, &attended, None));
                assert!(attended.read::<f32>().unwrap().iter().all(|x| x.is_finite()));
            }
        }
    }
}
