//! Positions of one layer, decoded.

use super::state::{KvCache, SequenceId, Side};
use crate::compute::{Buffer, CommandEncoder};
use crate::error::{Error, Result};
use crate::ops::{self, Domain, Positions, RowOrder};

impl KvCache {
    /// Decodes positions of a sequence in one layer; see [`ops::dequantize`]. A layer's sinks and its other positions are
    /// decoded by a call each.
    ///
    /// # Errors
    /// [`Error::Layer`](crate::Error::Layer), [`Error::UnknownSequence`](crate::Error::UnknownSequence), and those of
    /// [`ops::dequantize`]: [`Error::Positions`](crate::Error::Positions) for positions not yet appended, for those that a
    /// window has dropped, and for sinks together with others.
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    pub fn dequantize(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        side: Side,
        sequence: SequenceId,
        positions: impl Into<Positions>,
        domain: Domain,
        order: RowOrder,
        out: &Buffer,
    ) -> Result<()> {
        let of = self.layer(layer)?;
        let (extents, shape, source) = (of.extents.clone(), of.shape, of.source);
        let sinks = self.apart(shape).sinks;
        let (positions, mut first) = (positions.into(), sinks.map_or(0, |s| s.1));
        let mut spans = self.spans(source, &[(sequence, 0)], false)?;
        let mut pools = &extents[0];
        if let Some((extent, _)) = sinks.filter(|_| positions.all_below(first)) {
            spans[0].1 = spans[0].1.min(first);
            (pools, first) = (&extents[extent], 0);
        }
        let batch = self.batch(pools.group, first, &spans)?;
        ops::dequantize(encoder, pools.side(side), &batch, 0, positions, domain, order, out)
    }

    /// As [`dequantize`](KvCache::dequantize), of what a layer keeps of a sequence's newest positions
    /// ([`CacheConfig::recent`](crate::CacheConfig::recent)).
    ///
    /// # Errors
    /// As there; [`Error::Positions`](crate::Error::Positions) for positions that are not, or no longer, kept so, and for all if the layer keeps none.
    #[allow(clippy::too_many_arguments)] // Each is a thing of its own.
    pub fn dequantize_recent(
        &mut self,
        encoder: &mut CommandEncoder,
        layer: usize,
        side: Side,
        sequence: SequenceId,
        positions: std::ops::Range<usize>,
        domain: Domain,
        order: RowOrder,
        out: &Buffer,
    ) -> Result<()> {
        let of = self.layer(layer)?;
        let (extents, shape, source) = (of.extents.clone(), of.shape, of.source);
        let spans = self.spans(source, &[(sequence, 0)], false)?;
        let Some((extent, _)) = self.apart(shape).recent else {
            let std::ops::Range { start, end } = positions;
            return Err(Error::Positions { start, end, first: spans[0].1, len: spans[0].1 });
        };
        let batch = self.batch(extents[extent].group, 0, &spans)?;
        ops::dequantize(encoder, extents[extent].side(side), &batch, 0, positions, domain, order, out)
    }
}
