//! Attention of every codec, shape and option against float64.

use super::*;

/// One case of attention; `..BASE` fills in what a case does not change.
#[derive(Clone)]
struct Case {
    key: Codec,
    value: Codec,
    head_dim: usize,
    kv_heads: usize,
    group: usize,
    page_size: usize,
    /// (len, new) of each sequence; or one ring.
    lens: &'static [(usize, usize)],
    ring: Option<(usize, usize, usize, usize)>,
    causal: bool,
    window: Option<usize>,
    softcap: Option<f32>,
    sinks: bool,
    domain: Domain,
    q: DType,
    out: DType,
    /// Powers of two over which the values' scales lie, up and down.
    octaves: usize,
}

const BASE: Case = Case {
    key: Codec::tq(4),
    value: Codec::tq(4),
    head_dim: 128,
    kv_heads: 2,
    group: 4,
    page_size: 16,
    lens: &[(75, 1)],
    ring: None,
    causal: true,
    window: None,
    softcap: None,
    sinks: false,
    domain: Domain::Original,
    q: DType::F32,
    out: DType::F32,
    octaves: 0,
};

pub fn attention_of_every_codec(device: &Device) {
    let mut cases = vec![BASE];
    // With itself at every head_dim, small.
    for head_dim in HEAD_DIMS {
        for codec in codecs(head_dim) {
            cases.push(Case { key: codec, value: codec, head_dim, group: 2, lens: &[(37, 1)], ..BASE });
        }
    }
    // Kernels of all head_dims and types take long to compile: both of CUDA's where models are.
    let (usual, rare) = cases.into_iter().partition(|case| [64, 128, 256].contains(&case.head_dim));
    let mut cases = with_types(device, usual);
    cases.extend::<Vec<_>>(rare);
    // Mixed codecs.
    for (key, value) in [
        (Codec::tq(5), Codec::tq(4)),
        (Codec::tq(4), Codec::tq(3)),
        (Codec::tq(8), Codec::tq(2)),
        (Codec::seed(8), Codec::tq(4)),
        (Codec::F16, Codec::tq(4)),
        (Codec::tq(6), Codec::F16),
        (Codec::F32, Codec::seed(4)),
    ] {
        cases.push(Case { key, value, ..BASE });
    }
    // Values of every size that a scale can tell: the largest is near f16's.
    for value in [Codec::tq(4), Codec::tq(3), Codec::tq(8), Codec::seed(4), Codec::seed(5)] {
        for (octaves, q) in [(3, DType::F16), (15, DType::F16), (15, DType::BF16), (15, DType::F32)] {
            let lens = &[(700, 1), (20, 4), (300, 1)];
            cases.push(Case { value, octaves, q, lens, sinks: octaves == 3, ..BASE });
        }
    }
    attention_is_close_to_float64(device, cases);
}

pub fn attention_of_every_shape(device: &Device) {
    let mut cases = vec![];
    // Groups of query heads.
    for group in [1, 2, 3, 5, 7, 8, 12, 16, 20] {
        cases.push(Case { group, ..BASE });
    }
    // Lengths around tiles and pages, several sequences, several queries.
    for lens in [
        &[(1, 1)][..],
        &[(2, 2)],
        &[(15, 1), (16, 1), (17, 1)],
        &[(63, 1), (64, 1), (65, 1), (128, 1)],
        &[(300, 1)],
        &[(1, 1), (500, 1), (33, 1), (256, 1)],
        &[(20, 4), (7, 7), (90, 2)],
        &[(40, 16)],
        &[(70, 33), (5, 0), (64, 1)],
        &[(150, 150)],
    ] {
        for page_size in [16, 64] {
            cases.push(Case { lens, page_size, ..BASE });
        }
        cases.push(Case { lens, key: Codec::tq(3), value: Codec::tq(3), head_dim: 64, group: 1, page_size: 4, ..BASE });
        cases.push(Case { lens, key: Codec::tq(5), value: Codec::tq(4), head_dim: 80, group: 3, ..BASE });
        cases.push(Case { lens, key: Codec::F16, value: Codec::F16, ..BASE });
    }
    // Rings, contiguous, of sizes that align with nothing; the last one at the last positions that there are.
    let end = (1 << 31) - (1 << 16);
    let last = (77, end - 77, end, 70);
    for ring in [(12, 4, 16, 1), (12, 0, 9, 1), (50, 31, 81, 3), (77, 700, 770, 70), (64, 64, 128, 1), last] {
        for window in [None, Some(7)] {
            cases.push(Case { ring: Some(ring), window, ..BASE });
            cases.push(Case { ring: Some(ring), window, key: Codec::seed(5), value: Codec::seed(6), ..BASE });
            cases.push(Case {
                ring: Some(ring),
                window,
                key: Codec::tq(3),
                value: Codec::tq(7),
                head_dim: 112,
                ..BASE
            });
        }
    }
    attention_is_close_to_float64(device, with_types(device, cases));
}

pub fn attention_with_every_option(device: &Device) {
    let mut cases = vec![];
    // Windows, softcap, sinks, no mask, rotated domain, types; over several lengths and queries.
    let lens: &[_] = &[(90, 3), (30, 1), (200, 18)];
    for key in [Codec::tq(4), Codec::seed(5), Codec::F16, Codec::tq(3)] {
        let base = Case { key, value: key, lens, ..BASE };
        for window in [1, 5, 16, 64, 1000] {
            cases.push(Case { window: Some(window), ..base.clone() });
            cases.push(Case { window: Some(window), causal: false, ..base.clone() });
        }
        cases.push(Case { causal: false, ..base.clone() });
        cases.push(Case { softcap: Some(2.0), ..base.clone() });
        cases.push(Case { softcap: Some(20.0), sinks: true, window: Some(30), ..base.clone() });
        cases.push(Case { sinks: true, ..base.clone() });
        cases.push(Case { domain: Domain::Rotated, ..base.clone() });
        for q in FLOATS {
            for out in FLOATS {
                cases.push(Case { q, out, ..base.clone() });
            }
        }
    }
    attention_is_close_to_float64(device, with_types(device, cases));
}

/// Prompts, beside a sequence that decodes. On CUDA (compute capability 9.0) they have kernels of their own for half-precision queries, from 256
/// query rows and 2^20 pairs of a row and a position on; a few on other devices.
pub fn attention_of_prompts(device: &Device) {
    let lens: &[_] = &[(530, 530), (40, 1), (4200, 70)];
    let base = Case { lens, q: DType::F16, out: DType::F16, ..BASE };
    let mut cases = vec![base.clone()];
    for codec in [Codec::tq(2), Codec::tq(3), Codec::tq(8), Codec::seed(5), Codec::F16] {
        cases.push(Case { key: codec, value: codec, q: DType::BF16, out: DType::F32, ..base.clone() });
    }
    for (head_dim, group) in [(16, 4), (64, 4), (80, 5), (96, 7), (112, 4), (192, 4), (256, 4), (320, 4)] {
        let (key, value) = (Codec::tq(5), Codec::tq(4));
        cases.push(Case { key, value, head_dim, group, page_size: 9, ..base.clone() });
    }
    for key in [Codec::tq(4), Codec::seed(8), Codec::F16] {
        let base = Case { key, ..base.clone() };
        cases.push(Case { window: Some(100), page_size: 64, ..base.clone() });
        cases.push(Case { window: Some(1000), causal: false, ..base.clone() });
        cases.push(Case { causal: false, sinks: true, out: DType::BF16, ..base.clone() });
        cases.push(Case { softcap: Some(2.0), ..base.clone() });
        cases.push(Case { softcap: Some(20.0), sinks: true, window: Some(300), ..base.clone() });
        cases.push(Case { domain: Domain::Rotated, q: DType::BF16, ..base.clone() });
        // CUDA's tiles of 128 positions keep all bits of values over 2^20: docs/accuracy.md.
        cases.push(Case { octaves: 9, out: DType::F32, ..base.clone() });
        cases.push(Case { ring: Some((1000, 5000, 5900, 800)), kv_heads: 3, ..base.clone() });
    }
    let cuda = device.info().kind == DeviceKind::Cuda;
    let chosen = cases.into_iter().enumerate().filter(|(i, _)| cuda || i % 7 == 0);
    attention_is_close_to_float64(device, chosen.map(|(_, case)| case).collect());
}

/// Queries in f32, and in f16 and bf16 by turns: in both kinds for every case on CUDA, whose kernels for them differ; elsewhere, where only
/// loads do, in one kind a case.
fn with_types(device: &Device, cases: Vec<Case>) -> Vec<Case> {
    let cuda = device.info().kind == DeviceKind::Cuda;
    let types = |i: usize, case: &Case| {
        let half = [DType::F16, DType::BF16][i / 2 % 2];
        match (case.q, i % 2) {
            (DType::F32, _) if cuda => vec![DType::F32, half],
            (DType::F32, 1) => vec![half],
            (q, _) => vec![q],
        }
    };
    let typed = |(i, case): (usize, Case)| types(i, &case).into_iter().map(move |q| Case { q, ..case.clone() });
    cases.into_iter().enumerate().flat_map(typed).collect()
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Case {
            key,
            value,
            head_dim,
            kv_heads,
            group,
            page_size,
            lens,
            ring,
            causal,
            window,
            softcap,
            sinks,
            octaves,
            ..
        } = self;
        write!(
            f,
            "{key}/{value} D={head_dim} {kv_heads}x{group} heads, pages of {page_size}, (len, new) {lens:?}, ring {ring:?}, \
             causal {causal}, window {window:?}, softcap {softcap:?}, sinks {sinks}, octaves {octaves}, {:?}, q {}, out {}",
            self.domain, self.q, self.out
        )
    }
}

fn attention_is_close_to_float64(device: &Device, cases: Vec<Case>) {
    let mut rng = Rng(5);
    let mut worst: (f64, String) = (0.0, String::new());
    for case in cases {
        let (d, kv_heads, heads) = (case.head_dim, case.kv_heads, case.kv_heads * case.group);
        let layout = match case.ring {
            Some((capacity, first, len, new)) => Layout::ring(capacity, first, len, new),
            None => Layout::paged(&mut rng, case.page_size, case.lens),
        };
        let (key_row, value_row) = (RowFormat::new(case.key, d).unwrap(), RowFormat::new(case.value, d).unwrap());
        let key = Filled::new(device, &mut rng, key_row, kv_heads, layout.page_size, layout.pages);
        let value = Filled::spread(device, &mut rng, value_row, kv_heads, layout.page_size, layout.pages, case.octaves);
        let batch = layout.batch(device);
        let tokens = layout.tokens();
        let q: Vec<f32> = rng.normals(tokens * heads * d).iter().map(|&x| rounded(case.q, x)).collect();
        let sinks = rng.normals(heads);
        let mut params = AttentionParams::for_head_dim(d);
        params.causal = case.causal;
        params.window = case.window;
        params.softcap = case.softcap;
        params.domain = case.domain;
        params.sink_logits = case.sinks.then(|| device.upload(&sinks, &[heads]).unwrap());
        let input = upload(device, case.q, &q, &[tokens, heads, d]);
        let out = Guarded::new(device, case.out, &[tokens, heads, d]);
        let lse = Guarded::new(device, DType::F32, &[tokens, heads]);
        run(device, |e| {
            refresh(e, &batch)?;
            attention(e, &input, &key.pool, &value.pool, &batch, &params, &out.buffer, Some(&lse.buffer))
        });
        assert_eq!(batch.out_of_range().unwrap(), 0, "{case}");
        let (out, lse) = (out.take(), lse.take());

        let mut tokens_before = 0;
        for (s, &(first, len, new, _)) in layout.spans.iter().enumerate() {
            // Of a prompt some queries: the oracle is slow.
            for i in (0..new).filter(|i| new <= 150 || i % 29 < 2 || i + 2 > new) {
                let own = len - new + i;
                let start = case.window.map_or(first, |w| first.max((own + 1).saturating_sub(w)));
                let end = if case.causal { own + 1 } else { len };
                for (head, &sink) in sinks.iter().enumerate() {
                    let (mut keys, mut values) = (vec![], vec![]);
                    for (page, slot) in (start..end).map(|p| layout.locate(s, p)) {
                        keys.push(key.row(page, head / case.group, slot));
                        values.push(value.row(page, head / case.group, slot));
                    }
                    let r = (tokens_before + i) * heads + head;
                    let given = &q[r * d..][..d];
                    let rotated: Vec<f32> = match case.domain {
                        Domain::Rotated => given.to_vec(),
                        Domain::Original => reference::rotate(&key_row, given).iter().map(|&x| x as f32).collect(),
                    };
                    let query = reference::Query {
                        q: &rotated,
                        scale: params.scale as f64,
                        softcap: case.softcap.map(f64::from),
                        sink: case.sinks.then_some(sink as f64),
                    };
                    let (want, want_lse) = reference::attention(&query, &keys, &values);
                    let want = match case.domain {
                        Domain::Rotated => want,
                        Domain::Original => reference::restore(&value_row, &want),
                    };
                    // Of thousands of rows the unluckiest is further out, and CUDA rounds prompts' keys and values to f16: docs/accuracy.md.
                    let many = case.q != DType::F32 && new * case.group >= 256;
                    let prompt = match device.info().kind {
                        DeviceKind::Cuda if many => 1e-3,
                        DeviceKind::Cpu if many => 5e-4,
                        _ => 0.0,
                    };
                    let tolerance = attention_tolerance(device, case.q, case.out) + prompt;
                    let error = relative_error(&out[r * d..][..d], &want);
                    assert!(
                        error <= tolerance,
                        "{case}: sequence {s} query {i} head {head}: {error:e} > {tolerance:e}"
                    );
                    let lse_error = (lse[r] as f64 - want_lse).abs() / want_lse.abs().max(1.0);
                    assert!(
                        lse_error <= tolerance,
                        "{case}: sequence {s} query {i} head {head}: lse {} {want_lse}",
                        lse[r]
                    );
                    if case.out == DType::F32 && error > worst.0 {
                        worst = (error, format!("{case}"));
                    }
                }
            }
            tokens_before += new;
        }
    }
    println!("largest error {:.2e}: {}", worst.0, worst.1);
}
