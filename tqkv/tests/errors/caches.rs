//! Configurations and caches.

use super::*;

#[test]
fn configurations() {
    let ok = || CacheConfig::new(2, KV_HEADS, D);
    assert_eq!(CacheConfig::new(0, 2, D).bytes(), Err(zero("layers")));
    assert_eq!(CacheConfig::new(2, 0, D).bytes(), Err(zero("kv_heads")));
    assert_eq!(ok().page_size(0).bytes(), Err(zero("page_size")));
    assert_eq!(ok().capacity(0).bytes(), Err(zero("capacity")));
    assert_eq!(ok().window_capacity(0).bytes(), Err(zero("window_capacity")));
    assert_eq!(ok().kind_at(1, LayerKind::Window(0)).bytes(), Err(zero("window")));
    assert_eq!(ok().page_size(12).bytes(), Err(mismatch("page_size", 12, "a multiple of 8")));
    let sinks = |positions, codec| Sinks { positions, codec: CodecPair::both(codec) };
    assert_eq!(ok().sinks(sinks(4, Codec::F16)).sink_sequences(0).bytes(), Err(zero("sink_sequences")));
    let want = Error::Bits { codec: "native", got: 9, expected: "2 to 8" };
    assert_eq!(ok().sinks_at(1, sinks(4, Codec::tq(9))).bytes(), Err(want));
    let layer = Error::Layer { got: 2, layers: 2 };
    assert_eq!(ok().sinks_at(2, sinks(4, Codec::F16)).bytes(), Err(layer.clone()));
    assert_eq!(ok().codec_at(2, CodecPair::both(Codec::F16)).bytes(), Err(layer.clone()));
    assert_eq!(ok().kind_at(2, LayerKind::Full).bytes(), Err(layer));
    for source in [1, 2, usize::MAX] {
        let want = mismatch("shared layer", source, "a layer before 1 that holds positions of its own");
        assert_eq!(ok().kind_at(1, LayerKind::Shared(source)).bytes(), Err(want));
    }
    for got in [0, 1025, 100_000] {
        let want = Error::HeadDim { codec: "tq4".into(), got, expected: "1 to 1024" };
        assert_eq!(CacheConfig::new(2, 2, got).bytes(), Err(want));
    }
    for got in [1, 9] {
        let want = Error::Bits { codec: "native", got, expected: "2 to 8" };
        assert_eq!(ok().key(Codec::tq(got)).bytes(), Err(want.clone()));
        assert_eq!(ok().value(Codec::tq(got)).bytes(), Err(want.clone()));
        assert_eq!(ok().codec_at(1, CodecPair::both(Codec::tq(got))).bytes(), Err(want));
    }
    let max = usize::MAX;
    let large = [
        CacheConfig::new(max, 2, D),
        CacheConfig::new(2, max, D),
        ok().page_size(max - 7),
        ok().page_size(max - 7).sinks(sinks(max, Codec::F16)),
        CacheConfig::new(max, max, D).capacity(max).page_size(max - 7),
        CacheConfig::new(1 << 40, 1 << 10, D),
    ];
    for config in large {
        assert_eq!(config.bytes(), Err(overflow("cache size", "isize")), "{config:?}");
        assert_eq!(KvCache::new(&Device::cpu(), config).map(|_| ()), Err(overflow("cache size", "isize")));
    }
    assert_eq!(ok().capacity(max).bytes(), Err(overflow("pages", "u32")));
    assert_eq!(ok().sinks(sinks(max, Codec::F16)).bytes(), Err(overflow("pages", "u32")));
    assert_eq!(ok().sinks(sinks(2, Codec::F16)).sink_sequences(max).bytes(), Err(overflow("pages", "u32")));
    let page = ok().page_size(1 << 27).capacity(1 << 27);
    assert_eq!(page.bytes(), Err(overflow("bytes of a page", "u32")));
    assert_eq!(ok().capacity(1 << 32).bytes(), Err(overflow("rows of a pool", "u32")));
}

#[test]
fn caches() {
    let s = Scene::new();
    let config = CacheConfig::new(3, KV_HEADS, D)
        .page_size(PAGE)
        .capacity(4 * PAGE)
        .kind_at(1, LayerKind::Window(4))
        .kind_at(2, LayerKind::Shared(0));
    let mut cache = KvCache::new(&s.device, config).unwrap();
    let (a, gone) = (cache.add_sequence(), cache.add_sequence());
    cache.free_sequence(gone).unwrap();
    let x = s.zeros(&[3, KV_HEADS, D]);
    let (q, out) = (s.zeros(&[3, HEADS, D]), s.zeros(&[3, HEADS, D]));
    let params = AttentionParams::for_head_dim(D);
    let unknown = || Error::UnknownSequence { got: 1 };
    let repeated = || Error::RepeatedSequence { got: 0 };
    let layer = || Error::Layer { got: 3, layers: 3 };

    // Nothing that fails may change what is held.
    let append = |cache: &mut KvCache, layer, tokens: &[_], x: &Buffer, want| {
        let (free, bytes) = (cache.free_pages(), cache.usage().used);
        s.fails(want, |e| cache.append(e, layer, tokens, x, x));
        assert_eq!((cache.free_pages(), cache.usage().used), (free, bytes));
        assert_eq!(cache.len(a), Ok(0));
    };
    append(&mut cache, 3, &[(a, 3)], &x, layer());
    append(&mut cache, 2, &[(a, 3)], &x, Error::SharedLayer { layer: 2, source_layer: 0 });
    append(&mut cache, 0, &[(gone, 3)], &x, unknown());
    append(&mut cache, 0, &[(a, 1), (a, 2)], &x, repeated());
    append(&mut cache, 0, &[], &x, zero("sequences of a batch"));
    append(&mut cache, 0, &[(a, 2)], &x, shape("x", &[3, 2, 64], "[2, 2, 64]"));
    append(&mut cache, 0, &[(a, 33)], &x, Error::OutOfPages { needed: 5, free: 4, pages: 4 });
    let needed = (1usize << 32).div_ceil(PAGE);
    append(&mut cache, 0, &[(a, u32::MAX as usize)], &x, Error::OutOfPages { needed, free: 4, pages: 4 });
    append(&mut cache, 0, &[(a, usize::MAX)], &x, overflow("length of a sequence", "u32"));

    let positions = |start, end, first, len| Error::Positions { start, end, first, len };
    let attend = |cache: &mut KvCache, layer, queries: &[_], want| {
        s.fails(want, |e| cache.attend(e, layer, queries, &q, &out, None, &params));
    };
    attend(&mut cache, 0, &[(a, 3)], positions(0, 3, 0, 0));
    attend(&mut cache, 3, &[(a, 3)], layer());
    attend(&mut cache, 0, &[(gone, 3)], unknown());
    attend(&mut cache, 0, &[(a, 1), (a, 2)], repeated());
    attend(&mut cache, 0, &[(a, usize::MAX)], positions(0, usize::MAX, 0, 0));

    run(&s.device, |e| cache.append(e, 0, &[(a, 3)], &x, &x));
    let uneven = || Error::UnevenLayers { sequence: 0, layer: 1, got: 0, expected: 3 };
    assert_eq!(cache.len(a), Err(uneven()));
    assert_eq!(cache.fork(a), Err(uneven()));
    assert_eq!(cache.truncate(a, 2), Err(positions(0, 2, 0, 0)));
    run(&s.device, |e| cache.append(e, 1, &[(a, 3)], &x, &x));
    assert_eq!(cache.len(a), Ok(3));
    assert_eq!(cache.truncate(a, 4), Err(positions(0, 4, 0, 3)));
    for len in [usize::MAX, usize::MAX - 1] {
        assert_eq!(cache.truncate(a, len), Err(positions(0, len, 0, 3)));
    }
    let one = s.zeros(&[1, KV_HEADS, D]);
    let decode = |cache: &mut KvCache, layer, id, at: Positions, want| {
        let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
        s.fails(want, |e| cache.dequantize(e, layer, Side::Value, id, at, domain, order, &one));
    };
    decode(&mut cache, 0, a, 3.into(), positions(3, 4, 0, 3));
    decode(&mut cache, 3, a, 0.into(), layer());
    decode(&mut cache, 0, gone, 0.into(), unknown());
    decode(&mut cache, 0, a, (0..2).into(), shape("out", &[1, 2, 64], "[2, 2, 64]"));
    let empty = cache.add_sequence();
    decode(&mut cache, 0, empty, 0.into(), positions(0, 1, 0, 0));
    assert_eq!(cache.pool(3, Side::Key).map(|_| ()), Err(layer()));
    assert_eq!(cache.free_sequence(gone), Err(unknown()));
    assert_eq!(cache.truncate(gone, 0), Err(unknown()));
    assert_eq!(cache.fork(gone), Err(unknown()));
    assert_eq!(cache.len(gone), Err(unknown()));
    assert_eq!(cache.len(a), Ok(3));
}

#[test]
fn sinks() {
    let s = Scene::new();
    let sinks = |codec| Sinks { positions: 4, codec: CodecPair::both(codec) };
    let config = CacheConfig::new(2, KV_HEADS, D).page_size(PAGE).capacity(4 * PAGE).sinks(sinks(Codec::F16));
    let mut cache = KvCache::new(&s.device, config.sinks_at(1, sinks(Codec::tq(8)))).unwrap();
    let a = cache.add_sequence();
    let x = s.zeros(&[6, KV_HEADS, D]);
    run(&s.device, |e| (0..2).try_for_each(|layer| cache.append(e, layer, &[(a, 6)], &x, &x)));
    let (q, out, lse) = (s.zeros(&[6, HEADS, D]), s.zeros(&[6, HEADS, D]), s.zeros(&[6, HEADS]));
    let params = AttentionParams::for_head_dim(D);
    let mut attend = |layer, q: &Buffer, out: &Buffer, lse: &Buffer, params: &AttentionParams, want| {
        s.fails(want, |e| cache.attend(e, layer, &[(a, 6)], q, out, Some(lse), params));
    };
    // Sinks and the rest in different bases, where the caller has rotated.
    let rotated = AttentionParams { domain: Domain::Rotated, ..params.clone() };
    let want = Error::RotatedSinks { layer: 0, got: "f16".into(), expected: "tq4".into() };
    attend(0, &q, &out, &lse, &rotated, want);
    // Queries among the sinks that would see beyond them.
    let open = AttentionParams { causal: false, ..params.clone() };
    attend(0, &q, &out, &lse, &open, Error::Positions { start: 0, end: 6, first: 4, len: 6 });
    attend(0, &s.zeros(&[5, HEADS, D]), &out, &lse, &params, shape("q", &[5, 4, 64], "[6, 4, 64]"));
    attend(0, &s.zeros(&[6, D]), &out, &lse, &params, shape("q", &[6, 64], "[6, heads, 64]"));
    attend(0, &q, &s.zeros(&[6, HEADS, 32]), &lse, &params, shape("out", &[6, 4, 32], "[6, 4, 64]"));
    attend(0, &q, &out, &s.zeros(&[6]), &params, shape("lse", &[6], "[6, 4]"));
    attend(0, &q, &q, &lse, &params, Error::Aliased { what: "out" });
    let whole = s.zeros(&[7, HEADS, D]);
    let (view, inside) = (whole.slice(0..6).unwrap(), whole.slice(5..6).unwrap().reshape(&[256]).unwrap());
    let inside = inside.slice(0..24).unwrap().reshape(&[6, HEADS]).unwrap();
    attend(0, &q, &view, &inside, &params, Error::Aliased { what: "lse" });
    let zero_window = AttentionParams { window: Some(0), ..params.clone() };
    attend(0, &q, &out, &lse, &zero_window, zero("window"));
    s.fails(zero("sequences of a batch"), |e| cache.attend(e, 0, &[], &q, &out, None, &params));
    // In one basis all is well.
    run(&s.device, |e| cache.attend(e, 1, &[(a, 6)], &q, &out, Some(&lse), &rotated));
    let mut decode = |at: Positions, want| {
        let one = s.zeros(&[1, KV_HEADS, D]);
        let (domain, order) = (Domain::Original, RowOrder::TokenMajor);
        s.fails(want, |e| cache.dequantize(e, 0, Side::Value, a, at, domain, order, &one));
    };
    decode((3..5).into(), Error::Positions { start: 3, end: 5, first: 4, len: 6 });
    decode(Positions::List(vec![4, 3]), Error::Positions { start: 3, end: 4, first: 4, len: 6 });
    decode(6.into(), Error::Positions { start: 6, end: 7, first: 4, len: 6 });
}
