//! What a cache keeps to, one rule a test.

use super::*;

#[test]
fn running_out_changes_nothing() {
    let device = Device::cpu();
    let no_sinks = Sinks { positions: 0, codec: CodecPair::both(Codec::F16) };
    let config = config().capacity(2 * PAGE).sinks_at(4, no_sinks).sinks_at(5, no_sinks).sinks_at(8, no_sinks);
    let mut cache = KvCache::new(&device, config).unwrap();
    let (a, b) = (cache.add_sequence(), cache.add_sequence());
    let x = device.zeros(DType::F32, &[PAGE + 1, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    for layer in [0, 1, 2, 4, 5, 7, 8] {
        cache.append(&mut encoder, layer, &[(a, PAGE + 1)], &x, &x).unwrap();
    }
    let before = cache.usage();
    assert_eq!(before.free, 0);
    assert!((before.fragmentation - 7.0 / 16.0).abs() < 1e-12);
    let one = x.slice(0..1).unwrap();
    let full = Err(Error::OutOfPages { needed: 1, free: 0, pages: 2 });
    assert_eq!(cache.append(&mut encoder, 0, &[(b, 1)], &one, &one), full);
    // A shared page that would be written needs a page of its own.
    let twin = cache.fork(a).unwrap();
    assert_eq!(cache.append(&mut encoder, 0, &[(twin, 1)], &one, &one), full);
    assert_eq!((cache.len(a), cache.len(b), cache.len(twin)), (Ok(PAGE + 1), Ok(0), Ok(PAGE + 1)));
    assert_eq!(cache.usage(), before);
}

/// Not even pages that a window would drop are gone.
#[test]
fn a_failing_append_changes_nothing() {
    let device = Device::cpu();
    let sinks = Sinks { positions: 5, codec: CodecPair::both(Codec::F16) };
    let config = CacheConfig::new(2, KV_HEADS, D).page_size(PAGE).capacity(8 * PAGE).sink_sequences(1);
    let config = config.kind_at(0, LayerKind::Window(WINDOW)).kind_at(1, LayerKind::Window(WINDOW)).sinks_at(1, sinks);
    let mut cache = KvCache::new(&device, config).unwrap();
    let (a, b) = (cache.add_sequence(), cache.add_sequence());
    let x = device.upload(&Rng(1).normals(60 * KV_HEADS * D), &[60, KV_HEADS, D]).unwrap();
    let rows = |n| x.slice(0..n).unwrap();
    let append = |cache: &mut KvCache, layer, tokens: &[_], x: &Buffer| {
        let mut encoder = device.encoder().unwrap();
        let result = cache.append(&mut encoder, layer, tokens, x, x);
        encoder.submit_and_wait().unwrap();
        result
    };
    for layer in 0..2 {
        append(&mut cache, layer, &[(a, 30)], &rows(30)).unwrap();
    }
    let twin = cache.fork(a).unwrap();
    let state = |cache: &mut KvCache| {
        let mut all = vec![];
        for (id, range) in [a, twin].into_iter().flat_map(|id| [(id, 5..30), (id, 0..5)]) {
            let out = device.zeros(DType::F32, &[range.len(), KV_HEADS, D]).unwrap();
            let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
            run(&device, |e| cache.dequantize(e, 1, Side::Key, id, range, domain, order, &out));
            all.push(out.read::<f32>().unwrap());
        }
        (cache.usage(), cache.free_pages(), all)
    };
    let before = state(&mut cache);
    // 4 pages are free; the window of `a` and of its fork leaves two each, which both hold.
    let full = append(&mut cache, 0, &[(a, 60)], &rows(60));
    assert!(matches!(full, Err(Error::OutOfPages { .. })), "{full:?}");
    assert_eq!(state(&mut cache), before);
    let both = append(&mut cache, 0, &[(a, 2), (twin, 40)], &rows(42));
    assert!(matches!(both, Err(Error::OutOfPages { .. })), "{both:?}");
    assert_eq!(state(&mut cache), before);
    // Pages were dropped and taken by then, a shared one would have been copied.
    let wrong = append(&mut cache, 0, &[(a, 2), (twin, 3)], &rows(4));
    assert!(matches!(wrong, Err(Error::Shape { .. })), "{wrong:?}");
    assert_eq!(state(&mut cache), before);
    // Room in the window's pages, but none for other sinks.
    let sinks = append(&mut cache, 1, &[(b, 3)], &rows(3));
    assert_eq!(sinks, Err(Error::OutOfPages { needed: 1, free: 0, pages: 1 }));
    assert_eq!(state(&mut cache), before);
    // What failed goes well where there is room.
    for layer in 0..2 {
        append(&mut cache, layer, &[(a, 2), (twin, 3)], &rows(5)).unwrap();
    }
    assert_eq!((cache.len(a), cache.len(twin)), (Ok(32), Ok(33)));
}

/// StreamingLLM: the first tokens and the newest ones, nothing between.
#[test]
fn sinks_stay_where_a_window_moves_on() {
    let device = Device::cpu();
    let sinks = Sinks { positions: 4, codec: CodecPair::both(Codec::F16) };
    let config = CacheConfig::new(1, KV_HEADS, D).kind_at(0, LayerKind::Window(WINDOW)).sinks(sinks).sink_sequences(1);
    let config = config.page_size(PAGE).capacity(4 * PAGE);
    // A page of two sides of f16 for four positions beside four pages of 4 bits and a scale.
    assert_eq!(config.bytes(), Ok(KV_HEADS * 2 * (4 * D * 2 + 4 * PAGE * (D / 2 + 2))));
    let mut cache = KvCache::new(&device, config).unwrap();
    let seq = cache.add_sequence();
    let x = device.upload(&Rng(1).normals(KV_HEADS * D), &[1, KV_HEADS, D]).unwrap();
    for _ in 0..200 {
        run(&device, |e| cache.append(e, 0, &[(seq, 1)], &x, &x));
    }
    let out = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    let mut decode = |position: usize| {
        let mut encoder = device.encoder().unwrap();
        let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
        cache.dequantize(&mut encoder, 0, Side::Key, seq, position, domain, order, &out)?;
        encoder.submit_and_wait()
    };
    for position in 0..200 {
        match decode(position) {
            Ok(()) => assert!(!(4..=200 - WINDOW - PAGE).contains(&position), "{position}"),
            Err(error) => {
                assert_eq!(error, Error::Positions { start: position, end: position + 1, first: 184, len: 200 });
                assert!((4..=200 - WINDOW).contains(&position), "{position}");
            }
        }
    }
    // In f16, not in 4 bits.
    decode(3).unwrap();
    let given = x.read::<f32>().unwrap();
    assert!(out.read::<f32>().unwrap().iter().zip(given).all(|(got, x)| *got == rounded(DType::F16, x)));
}

/// Without positions that the next token would see there is nothing that a window could have dropped.
#[test]
fn rolling_back_to_where_nothing_is_seen() {
    let device = Device::cpu();
    let sinks = Sinks { positions: 4, codec: CodecPair::both(Codec::F16) };
    let base = || CacheConfig::new(1, KV_HEADS, D).page_size(PAGE).capacity(20 * PAGE);
    let window = |w| base().kind_at(0, LayerKind::Window(w));
    let x = device.upload(&Rng(1).normals(40 * KV_HEADS * D), &[40, KV_HEADS, D]).unwrap();
    let q = device.upload(&Rng(2).normals(HEADS * D), &[1, HEADS, D]).unwrap();
    let append = |cache: &mut KvCache, seq, position: usize| {
        let x = x.slice(position..position + 1).unwrap();
        run(&device, |e| cache.append(e, 0, &[(seq, 1)], &x, &x));
    };
    let attended = |cache: &mut KvCache, seq, queries: usize| {
        let q = device.upload(&q.read::<f32>().unwrap().repeat(queries), &[queries, HEADS, D])?;
        let out = device.zeros(DType::F32, &[queries, HEADS, D])?;
        let mut encoder = device.encoder()?;
        cache.attend(&mut encoder, 0, &[(seq, queries)], &q, &out, None, &AttentionParams::for_head_dim(D))?;
        encoder.submit_and_wait()?;
        out.read::<f32>()
    };
    let full = |config: CacheConfig, rollback: usize| {
        let mut cache = KvCache::new(&device, config).unwrap();
        let seq = cache.add_sequence();
        (0..40).for_each(|i| append(&mut cache, seq, i));
        // The prefix first: it is what truncation leaves.
        let dir = tempfile::tempdir().unwrap();
        cache.save_prefix(seq, rollback, dir.path().join("prefix"), b"m").unwrap();
        cache.truncate(seq, rollback).unwrap();
        assert_eq!(cache.len(seq), Ok(rollback));
        let loaded = cache.load(dir.path().join("prefix"), b"m").unwrap()[0];
        assert_eq!(cache.len(loaded), Ok(rollback));
        (cache, [seq, loaded])
    };
    // From nothing on, as a new sequence; each step beside one that never went further.
    let goes_on = |cache: &mut KvCache, seqs: [SequenceId; 2], from: usize, until: usize| {
        let mut other = KvCache::new(&device, cache.config().clone()).unwrap();
        let fresh = other.add_sequence();
        (0..from).for_each(|i| append(&mut other, fresh, i));
        for i in from..until {
            append(&mut other, fresh, i);
            let want = attended(&mut other, fresh, 1).unwrap();
            for seq in seqs {
                append(cache, seq, i);
                assert_eq!(attended(cache, seq, 1).unwrap(), want, "position {i}");
            }
        }
    };
    for config in [window(4), window(1), base(), window(4).sinks(sinks), window(1).sinks(sinks)] {
        let (mut cache, seqs) = full(config, 0);
        assert_eq!(cache.usage().used, 0);
        assert!(cache.is_empty());
        goes_on(&mut cache, seqs, 0, 20);
    }
    for rollback in [35, 33, 32, 31, 16, 13, 1] {
        for config in [window(1), window(1).sinks(sinks)] {
            let (mut cache, seqs) = full(config.clone(), rollback);
            goes_on(&mut cache, seqs, rollback, rollback + 2);
            // The positions before are gone, though their page is there: nobody may see them.
            let out = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
            if rollback > 5 && rollback < 32 {
                for seq in seqs {
                    let early = attended(&mut cache, seq, 3);
                    assert!(matches!(early, Err(Error::Positions { first, .. }) if first >= rollback), "{early:?}");
                    let mut encoder = device.encoder().unwrap();
                    let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
                    let lost = cache.dequantize(&mut encoder, 0, Side::Key, seq, rollback - 1, domain, order, &out);
                    assert!(matches!(lost, Err(Error::Positions { first, .. }) if first >= rollback), "{lost:?}");
                }
            }
            for seq in seqs {
                cache.free_sequence(seq).unwrap();
            }
            assert_eq!(cache.usage().used, 0);
        }
    }
    // Where something is seen that was dropped, it is an error as ever.
    let mut cache = KvCache::new(&device, window(4)).unwrap();
    let seq = cache.add_sequence();
    (0..40).for_each(|i| append(&mut cache, seq, i));
    assert_eq!(cache.truncate(seq, 1), Err(Error::Positions { start: 0, end: 1, first: 32, len: 40 }));
}

/// A step gives what appending and attending by layer give, counts only when it is submitted, and says what it lacks.
#[test]
fn a_step_is_one_thing() {
    let device = Device::cpu();
    let (mut cache, mut other) = (KvCache::new(&device, config()).unwrap(), KvCache::new(&device, config()).unwrap());
    let params = AttentionParams::for_head_dim(D);
    let ids = [cache.add_sequence(), cache.add_sequence()];
    assert_eq!(ids, [other.add_sequence(), other.add_sequence()]);
    let mut rng = Rng(3);
    for tokens in [[11, 3], [1, 1], [1, 1], [9, 0], [1, 40], [1, 1]] {
        let n: usize = tokens.iter().sum();
        let tokens = [(ids[0], tokens[0]), (ids[1], tokens[1])];
        let mut input = |heads: usize| device.upload(&rng.normals(n * heads * D), &[n, heads, D]).unwrap();
        let all: Vec<_> = (0..LAYERS).map(|_| (input(KV_HEADS), input(KV_HEADS), input(HEADS))).collect();
        let outs = || -> Vec<_> {
            let new = |shape: &[usize]| device.zeros(DType::F32, shape).unwrap();
            (0..LAYERS).map(|_| (new(&[n, HEADS, D]), new(&[n, HEADS]))).collect()
        };
        let (got, want) = (outs(), outs());
        let mut encoder = device.encoder().unwrap();
        let mut step = cache.step(&tokens).unwrap();
        for (layer, (k, v, q)) in all.iter().enumerate() {
            let (out, lse) = &got[layer];
            if source(layer) != layer {
                let shared = Error::SharedLayer { layer, source_layer: source(layer) };
                assert_eq!(step.append(&mut encoder, layer, k, v), Err(shared));
                step.attend(&mut encoder, layer, q, out, Some(lse), &params).unwrap();
                continue;
            }
            // Before its keys are there nothing can be read.
            let early = step.attend(&mut encoder, layer, q, out, None, &params);
            assert!(matches!(early, Err(Error::Positions { .. })), "{early:?}");
            let short = k.slice(1..n).unwrap();
            assert!(matches!(step.append(&mut encoder, layer, &short, &short), Err(Error::Shape { .. })));
            step.append_and_attend(&mut encoder, layer, k, v, q, out, Some(lse), &params).unwrap();
        }
        step.submit(encoder).unwrap().wait().unwrap();
        run(&device, |e| {
            for (layer, (k, v, q)) in all.iter().enumerate() {
                if source(layer) == layer {
                    other.append(e, layer, &tokens, k, v)?;
                }
                other.attend(e, layer, &tokens, q, &want[layer].0, Some(&want[layer].1), &params)?;
            }
            Ok(())
        });
        for (layer, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.0.read::<f32>(), want.0.read::<f32>(), "layer {layer}");
            assert_eq!(got.1.read::<f32>(), want.1.read::<f32>(), "layer {layer}");
        }
        assert_eq!(cache.usage(), other.usage());
        assert_eq!((cache.len(ids[0]), cache.len(ids[1])), (other.len(ids[0]), other.len(ids[1])));
    }

    // What is missing is named, and nothing has changed, but that windows have dropped what no token sees any more.
    let (used, len) = (cache.usage().used, cache.len(ids[0]).unwrap());
    let x = device.zeros(DType::F32, &[2, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    let mut step = cache.step(&[(ids[0], 2)]).unwrap();
    step.append(&mut encoder, 0, &x, &x).unwrap();
    let missing = Error::UnevenLayers { sequence: number(ids[0]), layer: 1, got: len, expected: len + 2 };
    assert_eq!(step.submit(encoder).map(drop), Err(missing));
    let before = (cache.usage(), cache.len(ids[0]));
    assert!(before.0.used <= used && before.1 == Ok(len), "{before:?}");
    assert_eq!(cache.step(&[]).map(drop), Err(Error::Zero { what: "sequences of a batch" }));
    let twice = cache.step(&[(ids[0], 1), (ids[0], 1)]).map(drop);
    assert_eq!(twice, Err(Error::RepeatedSequence { got: number(ids[0]) }));
    assert!(matches!(cache.step(&[(ids[0], CAPACITY)]).map(drop), Err(Error::OutOfPages { .. })));
    assert_eq!((cache.usage(), cache.len(ids[0])), before);
    // A step cannot begin where appending by layer was left half done.
    let mut encoder = device.encoder().unwrap();
    cache.append(&mut encoder, 0, &[(ids[0], 2)], &x, &x).unwrap();
    assert!(matches!(cache.step(&[(ids[0], 1)]).map(drop), Err(Error::UnevenLayers { .. })));
    cache.truncate(ids[0], len).unwrap();
    assert_eq!((cache.usage(), cache.len(ids[0])), before);
}

/// Each layer is as the only one of a cache of its own, however different the others are.
#[test]
fn layers_may_differ_in_their_heads() {
    let device = Device::cpu();
    let (a, b, c) = (Heads::new(KV_HEADS, D), Heads::new(1, 64), Heads::new(4, 16));
    let window = LayerKind::Window(WINDOW);
    let sinks = Sinks { positions: 3, codec: CodecPair::both(Codec::F16) };
    let config = CacheConfig::new(5, KV_HEADS, D).page_size(PAGE).capacity(CAPACITY).sink_sequences(2);
    let config = config.heads_at(1, b).codec_at(1, "k8v8".parse().unwrap()).kind_at(2, LayerKind::Shared(1));
    let config = config.kind_at(3, window).heads_at(3, c).sinks_at(3, sinks).kind_at(4, window);
    let alone = |heads: Heads| {
        let config = CacheConfig::new(1, heads.kv_heads, heads.head_dim).page_size(PAGE).capacity(CAPACITY);
        config.sink_sequences(2)
    };
    let alone = [
        alone(a),
        alone(b).codec("k8v8".parse().unwrap()),
        alone(b).codec("k8v8".parse().unwrap()),
        alone(c).kind_at(0, window).sinks(sinks),
        alone(a).kind_at(0, window),
    ];
    let sum: usize = [0, 1, 3, 4].iter().map(|&layer| alone[layer].bytes().unwrap()).sum();
    assert_eq!(config.bytes(), Ok(sum));
    let mut cache = KvCache::new(&device, config.clone()).unwrap();
    assert_eq!(cache.bytes(), sum);
    let seq = cache.add_sequence();
    let mut alone: Vec<_> = alone
        .into_iter()
        .map(|config| {
            let mut cache = KvCache::new(&device, config).unwrap();
            let seq = cache.add_sequence();
            (cache, seq)
        })
        .collect();
    let mut rng = Rng(4);
    for n in [11, 1, 1, 20, 1, 9] {
        let mut encoder = device.encoder().unwrap();
        let mut step = cache.step(&[(seq, n)]).unwrap();
        let mut outs = vec![];
        let mut kv = vec![];
        for (layer, heads) in [a, b, b, c, a].into_iter().enumerate() {
            let mut input =
                |heads: usize, d: usize| device.upload(&rng.normals(n * heads * d), &[n, heads, d]).unwrap();
            let (kv_heads, d) = (heads.kv_heads, heads.head_dim);
            if layer != 2 {
                kv = vec![input(kv_heads, d), input(kv_heads, d)];
                step.append(&mut encoder, layer, &kv[0], &kv[1]).unwrap();
            }
            let (q, params) = (input(HEADS, d), AttentionParams::for_head_dim(d));
            let out = || device.zeros(DType::F32, &[n, HEADS, d]).unwrap();
            let (got, want) = (out(), out());
            step.attend(&mut encoder, layer, &q, &got, None, &params).unwrap();
            let (other, id) = &mut alone[layer];
            run(&device, |e| {
                other.append(e, 0, &[(*id, n)], &kv[0], &kv[1])?;
                other.attend(e, 0, &[(*id, n)], &q, &want, None, &params)
            });
            outs.push((got, want));
        }
        step.submit(encoder).unwrap().wait().unwrap();
        for (layer, (got, want)) in outs.iter().enumerate() {
            assert_eq!(got.read::<f32>(), want.read::<f32>(), "layer {layer}");
        }
    }
    // Keys of other layers do not fit, and what no kernel takes is refused before there is a cache.
    let mut step = cache.step(&[(seq, 1)]).unwrap();
    let x = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    assert!(matches!(step.append(&mut device.encoder().unwrap(), 1, &x, &x), Err(Error::Shape { .. })));
    let mismatch = |layer, heads: Heads| match config.clone().heads_at(layer, heads).bytes() {
        Err(Error::Mismatch { what, got, .. }) => (what, got),
        other => panic!("{other:?}"),
    };
    assert_eq!(mismatch(1, b.value_dim(32)), ("head_dim of the values", 32));
    assert_eq!(mismatch(2, a), ("kv_heads of a shared layer", KV_HEADS));
    assert_eq!(mismatch(2, Heads::new(1, 32)), ("head_dim of a shared layer", 32));
    assert_eq!(config.clone().heads_at(2, b).bytes(), Ok(sum));
    assert_eq!(config.clone().heads_at(5, b).bytes(), Err(Error::Layer { got: 5, layers: 5 }));
    assert_eq!(config.clone().heads_at(0, Heads::new(0, 32)).bytes(), Err(Error::Zero { what: "kv_heads" }));
}

#[test]
fn shared_and_unknown_layers_are_named() {
    let device = Device::cpu();
    let mut cache = KvCache::new(&device, config()).unwrap();
    let seq = cache.add_sequence();
    let x = device.zeros(DType::F32, &[1, KV_HEADS, D]).unwrap();
    let mut encoder = device.encoder().unwrap();
    let shared = Err(Error::SharedLayer { layer: 3, source_layer: 0 });
    assert_eq!(cache.append(&mut encoder, 3, &[(seq, 1)], &x, &x), shared);
    assert_eq!(
        cache.append(&mut encoder, LAYERS, &[(seq, 1)], &x, &x),
        Err(Error::Layer { got: LAYERS, layers: LAYERS })
    );
    let twice = [(seq, 1), (seq, 1)];
    assert_eq!(cache.append(&mut encoder, 0, &twice, &x, &x), Err(Error::RepeatedSequence { got: number(seq) }));
    for (kind, layer) in [(LayerKind::Shared(2), 2), (LayerKind::Shared(3), 2), (LayerKind::Window(0), 1)] {
        assert!(config().kind_at(layer, kind).bytes().is_err());
    }
    assert!(config().kind_at(3, LayerKind::Shared(1)).kind_at(1, LayerKind::Shared(0)).bytes().is_err());
    assert!(config().page_size(12).bytes().is_err());
    let ends = CacheConfig::new(6, 1, 64).codec_at_ends(1, CodecPair::both(tqkv::Codec::F16));
    let dense: Vec<bool> = (0..6).map(|l| ends.layer_codec(l).key.is_dense()).collect();
    assert_eq!(dense, [true, false, false, false, false, true]);
}
