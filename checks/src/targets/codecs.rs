//! Names of codecs: what is read is what is written, and every cache that they name can be asked for its size.

use tqkv::cache::CacheCodec;
use tqkv::format::RowFormat;
use tqkv::{CacheConfig, CodecPair, Error};

pub fn run(bytes: &[u8]) {
    let [head_dim, name] = super::parts::<2>(bytes);
    let text = String::from_utf8_lossy(name);
    let head_dim = head_dim.len() * 8;
    if let Ok(pair) = text.parse::<CodecPair>() {
        assert_eq!(pair.to_string().parse(), Ok(pair));
        for row in [pair.key, pair.value].map(|codec| RowFormat::new(codec, head_dim)).into_iter().flatten() {
            let mut bytes = vec![0xa5; row.row_bytes()];
            let codes: Vec<u16> = (0..row.row_dim()).map(|i| (i % (1 << row.bits().min(8))) as u16).collect();
            if row.codebook().is_some() {
                row.pack(&codes, &mut bytes);
                assert!(codes.iter().enumerate().all(|(i, &code)| row.get_code(&bytes, i) == code), "{row:?}");
            }
        }
    }
    match text.parse::<CacheCodec>() {
        Ok(codec) => {
            assert_eq!(codec.to_string().parse(), Ok(codec));
            let config = CacheConfig::new(2, 1, head_dim).cache_codec(codec);
            // Absurd numbers of positions are a size that overflows, or a large one.
            let (size, bits) = (config.bytes(), config.bits_per_element(1000));
            assert!(size.is_err() || bits.is_ok_and(f64::is_finite), "{codec} {head_dim}: {size:?}");
        }
        Err(error) => assert!(!matches!(error, Error::Io { .. })),
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let names =
        ["k5v4", "k3v8", "seed4", "seed8+r3f16", "f16", "f32", "k4v4+s1f16", "k5v3+s4f16+r64k8v8", "k8v2+r1k2v2"];
    let seed = |name: &&str| [&[16, 0][..], &[0; 16], name.as_bytes()].concat();
    names.iter().map(seed).collect()
}
