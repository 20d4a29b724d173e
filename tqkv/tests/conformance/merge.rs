//! Partial results into one.

use super::*;

pub fn merged_parts_equal_the_whole(device: &Device) {
    let mut rng = Rng(6);
    let (d, kv_heads, heads, len) = (128, 2, 8, 100);
    let row = RowFormat::new(Codec::tq(4), d).unwrap();
    let key = Filled::new(device, &mut rng, row, kv_heads, 128, 1);
    let value = Filled::new(device, &mut rng, row, kv_heads, 128, 1);
    let q = device.upload(&rng.normals(heads * d), &[1, heads, d]).unwrap();
    let params = AttentionParams { causal: false, ..AttentionParams::for_head_dim(d) };
    // [0, 40), [40, 41) and [41, 100) against [0, 100), and a part that saw nothing.
    let part = |first: usize, len: usize| {
        let (out, lse) =
            (Guarded::new(device, DType::F32, &[1, heads, d]), Guarded::new(device, DType::F32, &[1, heads]));
        let batch = Batch::contiguous(device, 128, first, len, 1).unwrap();
        run(device, |e| attention(e, &q, &key.pool, &value.pool, &batch, &params, &out.buffer, Some(&lse.buffer)));
        (out, lse)
    };
    let (whole, whole_lse) = part(0, len);
    let parts = [part(0, 40), part(40, 41), part(41, len)];
    let nothing = (
        device.upload(&vec![0f32; heads * d], &[1, heads, d]).unwrap(),
        device.upload(&vec![f32::NEG_INFINITY; heads], &[1, heads]).unwrap(),
    );
    for dtype in FLOATS {
        let out = Guarded::new(device, dtype, &[1, heads, d]);
        let lse = Guarded::new(device, DType::F32, &[1, heads]);
        let mut views: Vec<_> = parts.iter().map(|(o, l)| (&o.buffer, &l.buffer)).collect();
        views.insert(1, (&nothing.0, &nothing.1));
        run(device, |e| merge(e, &views, &out.buffer, Some(&lse.buffer)));
        let want: Vec<f64> = whole.take().iter().map(|&x| x as f64).collect();
        let tolerance = 2.0 * attention_tolerance(device, DType::F32, dtype);
        assert!(relative_error(&out.take(), &want) <= tolerance, "{dtype}");
        let want: Vec<f64> = whole_lse.take().iter().map(|&x| x as f64).collect();
        assert!(relative_error(&lse.take(), &want) <= 1e-5);
    }
    let (out, lse) = (Guarded::new(device, DType::F32, &[1, heads, d]), Guarded::new(device, DType::F32, &[1, heads]));
    run(device, |e| merge(e, &[(&nothing.0, &nothing.1)], &out.buffer, Some(&lse.buffer)));
    assert!(out.take().iter().all(|&x| x == 0.0) && lse.take().iter().all(|&x| x == f32::NEG_INFINITY));
}

/// A part without positions, whose lse is -∞, may hold anything; a part with positions that is no number stays none.
pub fn merge_passes_over_empty_parts(device: &Device) {
    let (heads, d) = (2, 64);
    let part = |dtype: DType, x: f32, lse: f32| {
        (
            upload(device, dtype, &vec![x; heads * d], &[1, heads, d]),
            device.upload(&vec![lse; heads], &[1, heads]).unwrap(),
        )
    };
    let none = f32::NEG_INFINITY;
    let anything = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1.0];
    // Parts as (value, lse), and what they give.
    /// (value, lse) of the parts, and those of the whole.
    type Parts = (Vec<(f32, f32)>, f32, f32);
    let mut cases: Vec<Parts> = vec![
        (vec![(f32::NAN, none), (f32::INFINITY, none)], 0.0, none),
        (vec![(f32::NAN, none)], 0.0, none),
        (vec![(f32::NAN, -2.0), (3.0, 1.5)], f32::NAN, 1.5 + (-3.5f32).exp().ln_1p()),
        // Its weight is 0, and none the less it has been seen.
        (vec![(f32::NAN, -200.0), (3.0, 1.5)], f32::NAN, 1.5),
        (vec![(5.0, f32::NAN), (3.0, 1.5)], f32::NAN, f32::NAN),
        (vec![(5.0, f32::NAN), (f32::NAN, none)], f32::NAN, f32::NAN),
        (vec![(3.0, -3.4e38), (f32::NAN, none)], 3.0, -3.4e38),
    ];
    for x in anything {
        cases.push((vec![(x, none), (3.0, 1.5)], 3.0, 1.5));
        cases.push((vec![(3.0, -1e30), (x, none)], 3.0, -1e30));
    }
    // More than any kernel takes at once, empty ones first, last and in between.
    let many = |i: usize| if i % 12 == 7 { (3.0, 1.5) } else { (anything[i % 4], none) };
    cases.push(((0..24).map(many).collect(), 3.0, 1.5 + 2f32.ln()));
    cases.push(((0..24).map(|i| (anything[i % 4], none)).collect(), 0.0, none));
    for (parts, want, want_lse) in cases {
        for dtype in FLOATS {
            let held: Vec<_> = parts.iter().map(|&(x, lse)| part(dtype, x, lse)).collect();
            let views: Vec<_> = held.iter().map(|(o, l)| (o, l)).collect();
            let out = Guarded::new(device, DType::F32, &[1, heads, d]);
            let lse = Guarded::new(device, DType::F32, &[1, heads]);
            run(device, |e| merge(e, &views, &out.buffer, Some(&lse.buffer)));
            let same = |got: f32, want: f32| {
                got == want || (got.is_nan() && want.is_nan()) || (got - want).abs() <= 1e-6 * want.abs()
            };
            let (out, lse) = (out.take(), lse.take());
            let name = format!("{dtype} {parts:?}");
            assert!(out.iter().all(|&x| same(x, want)), "{name}: {} instead of {want}", out[0]);
            assert!(lse.iter().all(|&x| same(x, want_lse)), "{name}: lse {} instead of {want_lse}", lse[0]);
        }
    }
}
