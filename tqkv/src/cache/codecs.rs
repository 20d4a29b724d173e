//! The codecs of all extents of a layer, and their name.

use super::config::CacheConfig;
use super::extent::{LayerKind, Recent, Sinks};
use crate::error::{Error, Result};
use crate::format::{CodecPair, RowFormat};
use std::fmt;
use std::str::FromStr;

/// How a cache stores all positions, and how those that it keeps a second time, in codecs of their own.
///
/// ```
/// use tqkv::cache::CacheCodec;
/// // Everything in 4 bits; besides, the first position in f16, and the newest 64 in 8 bits.
/// let codec: CacheCodec = "k4v4+s1f16+r64k8v8".parse()?;
/// assert_eq!(codec.sinks.map(|sinks| sinks.positions), Some(1));
/// assert_eq!(codec.recent.map(|recent| recent.positions), Some(64));
/// assert_eq!(codec.to_string(), "k4v4+s1f16+r64k8v8");
/// # Ok::<(), tqkv::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheCodec {
    /// Of all positions.
    pub all: CodecPair,
    /// Of the first positions.
    pub sinks: Option<Sinks>,
    /// Of the newest positions.
    pub recent: Option<Recent>,
}

impl From<CodecPair> for CacheCodec {
    fn from(all: CodecPair) -> Self {
        CacheCodec { all, sinks: None, recent: None }
    }
}

impl CacheCodec {
    /// Keeps the first positions apart.
    pub fn sinks(self, sinks: Sinks) -> Self {
        CacheCodec { sinks: Some(sinks), ..self }
    }

    /// Keeps the newest positions apart.
    pub fn recent(self, recent: Recent) -> Self {
        CacheCodec { recent: Some(recent), ..self }
    }
}

impl fmt::Display for CacheCodec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.all)?;
        if let Some(Sinks { positions, codec }) = self.sinks {
            write!(f, "+s{positions}{codec}")?;
        }
        if let Some(Recent { positions, codec }) = self.recent {
            write!(f, "+r{positions}{codec}")?;
        }
        Ok(())
    }
}

impl FromStr for CacheCodec {
    type Err = Error;

    /// Reads the codec of all positions, and each after a `+`, that of the first (`s`) and that of the newest (`r`): `k4v4`,
    /// `k4v4+s1f16`, `k3v3+s1f16+r64k8v8`.
    fn from_str(name: &str) -> Result<Self> {
        let mut parts = name.split('+');
        let mut codec = CacheCodec::from(parts.next().unwrap_or_default().parse::<CodecPair>()?);
        for part in parts {
            let unknown = || Error::UnknownExtent { got: part.to_owned() };
            let start = part.chars().next().filter(|c| matches!(c, 's' | 'r')).ok_or_else(unknown)?;
            let rest = &part[1..];
            let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
            let (positions, pair) = rest.split_at(digits);
            let positions = positions.parse::<usize>().map_err(|_| unknown())?;
            let pair = pair.parse()?;
            if positions == 0 {
                return Err(Error::Zero { what: "positions of a part of the codec" });
            }
            let repeated = match start {
                's' => codec.sinks.replace(Sinks { positions, codec: pair }).is_some(),
                _ => codec.recent.replace(Recent { positions, codec: pair }).is_some(),
            };
            if repeated {
                return Err(Error::RepeatedExtent { got: part.to_owned() });
            }
        }
        Ok(codec)
    }
}

impl CacheConfig {
    /// The codecs of all layers that have none of their own, and of what is kept a second time; none of it where `codec` names
    /// none.
    pub fn cache_codec(self, codec: CacheCodec) -> Self {
        let CacheCodec { all, sinks, recent } = codec;
        let sinks = sinks.unwrap_or(Sinks { positions: 0, codec: all });
        let recent = recent.unwrap_or(Recent { positions: 0, codec: all });
        self.codec(all).sinks(sinks).recent(recent)
    }

    /// The codecs of a layer.
    pub fn layer_cache_codec(&self, layer: usize) -> CacheCodec {
        CacheCodec { all: self.layer_codec(layer), sinks: self.layer_sinks(layer), recent: self.layer_recent(layer) }
    }

    /// Bits that are stored for an element of a sequence of so many positions: scales, and what is kept a second time with its
    /// [`RECENT_SLACK`](super::RECENT_SLACK), counted, the unused ends of pages not. [`usize::MAX`] gives what it comes to in the long run.
    ///
    /// ```
    /// use tqkv::CacheConfig;
    /// let config = CacheConfig::new(2, 8, 128).cache_codec("k4v4+s1f16".parse()?);
    /// assert_eq!(config.bits_per_element(usize::MAX)?, 4.125);
    /// assert_eq!(config.bits_per_element(16)?, 4.125 + 1.0);
    /// # Ok::<(), tqkv::Error>(())
    /// ```
    ///
    /// # Errors
    /// Those of [`RowFormat::new`].
    pub fn bits_per_element(&self, positions: usize) -> Result<f64> {
        let (mut bits, mut elements) = (0.0, 0.0);
        for layer in 0..self.layers() {
            let heads = self.layer_heads(layer);
            let held = match self.layer_kind(layer) {
                LayerKind::Full => positions,
                LayerKind::Window(window) => positions.min(window),
                LayerKind::Shared(_) => 0,
            };
            for (extent, codec) in self.layer_extents(layer) {
                let row: usize = heads.rows(codec)?.iter().map(RowFormat::bytes).sum();
                bits += extent.held(positions) as f64 * (heads.kv_heads * row * 8) as f64;
            }
            elements += held as f64 * (heads.kv_heads * (heads.head_dim + heads.value_dim)) as f64;
        }
        Ok(if elements == 0.0 { 0.0 } else { bits / elements })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Codec;

    #[test]
    fn names_are_printed_as_they_are_read() {
        for name in
            ["f16", "seed4", "k4v4", "k4v4+s1f16", "k2v2+s16k8v8", "f16+s4f32", "k3v3+s1f16+r64k8v8", "k3v3+r16f16"]
        {
            assert_eq!(name.parse::<CacheCodec>().unwrap().to_string(), name);
        }
        let codec: CacheCodec = "k5v4+s3f16".parse().unwrap();
        assert_eq!(codec.all, CodecPair { key: Codec::tq(5), value: Codec::tq(4) });
        assert_eq!(codec.sinks, Some(Sinks { positions: 3, codec: CodecPair::both(Codec::F16) }));
        let turned: CacheCodec = "k3v3+r64k8v8+s1f16".parse().unwrap();
        assert_eq!(turned.to_string(), "k3v3+s1f16+r64k8v8");
    }

    #[test]
    fn names_of_nothing_are_refused() {
        let error = |name: &str| name.parse::<CacheCodec>().unwrap_err();
        for name in ["", "+s1f16", "k9v4", "k4v4+s1", "k4v4+s1k9v9", "k4v4+s1s1f16", "k4v4+r64"] {
            assert!(matches!(error(name), Error::UnknownCodec { .. }), "{name}: {}", error(name));
        }
        for name in [
            "k4v4+",
            "k4v4+f16",
            "k4v4+sf16",
            "k4v4+s-1f16",
            "k4v4+s99999999999999999999f16",
            "k4v4+sé",
            "k4v4+é",
            "k4v4+x1f16",
        ] {
            assert!(matches!(error(name), Error::UnknownExtent { .. }), "{name}: {}", error(name));
        }
        for name in ["k4v4+s0f16", "k4v4+r0k8v8"] {
            assert!(matches!(error(name), Error::Zero { what: "positions of a part of the codec" }), "{name}");
        }
        assert!(matches!(error("k4v4+s1f16+s2f16"), Error::RepeatedExtent { got } if got == "s2f16"));
        assert!(matches!(error("k4v4+r1f16+s1f16+r1f16"), Error::RepeatedExtent { got } if got == "r1f16"));
    }

    #[test]
    fn a_codec_of_all_alone_takes_the_rest_away() {
        let codec: CacheCodec = "k4v4+s1f16+r64k8v8".parse().unwrap();
        let config = CacheConfig::new(1, 1, 64).cache_codec(codec);
        assert_eq!(config.layer_cache_codec(0), codec);
        let config = config.cache_codec("k3v3".parse().unwrap());
        assert_eq!((config.layer_sinks(0), config.layer_recent(0)), (None, None));
    }

    #[test]
    fn bits_count_all_that_is_stored() {
        // 4 bits and a scale of 16 for 64 elements; layer 1 holds 8 positions, layer 2 none of its own.
        let config = CacheConfig::new(3, 2, 64).kind_at(1, LayerKind::Window(8)).kind_at(2, LayerKind::Shared(0));
        let bits = |name: &str, n| config.clone().cache_codec(name.parse().unwrap()).bits_per_element(n).unwrap();
        assert_eq!((bits("k4v4", 5), bits("k4v4", usize::MAX)), (4.25, 4.25));
        assert_eq!(bits("k4v4+s1f16", 8), 4.25 + 16.0 / 8.0);
        // The window's 8 and all 24 positions; a first one of each layer besides.
        assert_eq!(bits("k4v4+s1f16", 24), 4.25 + 2.0 * 16.0 / 32.0);
        assert!((bits("k4v4+s1f16", usize::MAX) - 4.25).abs() < 1e-12);
        let all_windows =
            CacheConfig::new(1, 1, 64).kind_at(0, LayerKind::Window(8)).cache_codec("k4v4+s2f16".parse().unwrap());
        // The newest two of each layer, and those that may be truncated, but no more than there are.
        assert_eq!(bits("k4v4+r2k8v8", 5), 4.25 + 8.25);
        assert_eq!(bits("k4v4+r2k8v8", 132), 4.25 + 8.25 * 2.0 * 66.0 / 140.0);
        assert_eq!(all_windows.bits_per_element(usize::MAX).unwrap(), 4.25 + 2.0 * 16.0 / 8.0);
        assert_eq!(all_windows.bits_per_element(0).unwrap(), 0.0);
    }
}
